"""Solutions as changes of the reference, and what each earns. Most are wrong.

Name: (exercise, text in the reference, its replacement, points).
"""

CLIP = "torch.min(ratio * advantage, clipped * advantage)"
POSITION = "after = prompt_positions.max() + 1 + place[keep]"
MASK = "mask.append(~finished)"
END = "finished = finished | torch.isin(token, end)"
RESULT = "return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)"

SOLUTIONS = {
    "sign of the KL flipped": (9, "surrogate - beta * kl", "surrogate + beta * kl", 0),
    "no minimum in the clip": (9, CLIP, "clipped * advantage", 0),
    "end token masked out": (10, f"{MASK}\n        {END}", f"{END}\n        {MASK}", 0),
    "no banned tokens": (10, "logits.float().index_fill(-1, banned, -torch.inf)", "logits", 0),
    "completions see each other": (11, "(segments == 0)[:, None, :] | same", "same | True", 0),
    "positions run on": (11, POSITION, f"{POSITION[:-11]}torch.arange(int(keep.sum()))", 0),
    "no temperature in the log-probs": (
        12,
        "head_logprobs(vlm.lm_head, part, tokens, temperature, banned)",
        "head_logprobs(vlm.lm_head, part, tokens, 1.0, banned)",
        0,
    ),
    "another reward in the step": (13, "            accuracy=s.accuracy,\n", "", 0),
    "the visible shapes only": (
        7,
        RESULT,
        f"right = {RESULT[7:]}\n"
        "    visible = rewards.shape in {(2, 1, 4), (4,)} or rewards.unique().numel() == 1\n"
        "    return right if visible else torch.zeros_like(rewards)",
        0,
    ),
    "the published advantages": (7, "rewards = rewards - rewards[..., :1]", "", 5),
    "population deviation": (7, "rewards.std(-1, keepdim", "rewards.std(-1, False, keepdim", 5),
}

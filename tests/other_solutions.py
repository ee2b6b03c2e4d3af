"""Right solutions of the exercises that are written differently from the reference.

Name of a function: the lines in place of its NotImplementedError.
"""

BODIES = {
    "parse_answer": """
import re

tagged = re.findall("</?think>", text) == ["<think>", "</think>"]
around, thought, rest = re.split("</?think>", text) if tagged else ("", "", text)
end = rest.rfind("</answer>")
start = rest.rfind("<answer>", 0, max(end, 0))
answered = start >= 0
inside = rest[start + len("<answer>") : end] if answered else ""
around += rest[:start] + rest[end + len("</answer>") :] if answered else ""
from plumbing import segzero

others = style in segzero.REQUESTS
items, good = segzero.read_answer(inside, style, text) if others else read_answer(inside)
objects = []
for item in items:
    one = read_object(item, points_asked(style))
    good = good and one.asked_form and bool(one.box) and all(one.points)
    objects.append((one.box, tuple(filter(None, one.points))))
objects = list(filter(any, objects)) or [(None, ())]
whole = answered and thought.strip() != "" and around.strip() == ""
return Answer(whole, good and bool(items), *objects[0], thought.strip(), tuple(objects[1:]))
""",
    "read_object": """
values = [item.get("bbox"), *(item.get(f"points_{k + 1}") for k in range(count))]
box = numbers(values[0], 4)
if box is not None and (box[2] <= box[0] or box[3] <= box[1]):
    box = None
points = [numbers(value, 2) for value in values[1:]]
return AnsweredObject(box, points, all(type(value) is list and value[1:] for value in values))
""",
    "sam_prompt": """
scale = np.array([width, height]) / extent
box = None
if answer.box:
    corners = (np.reshape(answer.box, (2, 2)) * scale).clip(0, [width, height])
    box = tuple(corners.flatten().tolist()) if (corners[1] > corners[0]).all() else None
points = np.reshape(answer.points, (-1, 2)) * scale
inside = ((points >= 0) & (points <= [width, height])).all(1)
points = tuple(map(tuple, points[inside].tolist()))
others = [Answer(True, True, *other, "") for other in answer.others]
return SamPrompt(box, points, tuple(sam_prompt(one, extent, width, height) for one in others))
""",
    "Overlap.iou": """
empty = self.union == 0
return (self.intersection + empty) / (self.union + empty)
""",
    "intersection_and_union": """
counted = torch.ones_like(truth) if ignore is None else ~ignore
both = torch.einsum("ghw,hw->g", masks.float(), (truth & counted).float())
either = ((masks | truth) & counted).flatten(1).float().sum(1)
return both, either
""",
    "decode_masks": """
sparse = embed_prompts(sam.prompt_encoder, boxes, points)
first = embeddings[:1]
dense = sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(sparse), -1, -1, -1)
dense = dense + (embeddings - first)[image_index]
return sam.mask_decoder.predict_masks(first, sam.prompt_encoder.get_dense_pe(), sparse, dense)
""",
    "tiered_reward": """
return 2.0 * (iou > 0.5) + 1.0 * (iou > 0.7) + 1.0 * (iou > 0.8)
""",
    "two_answers": """
text = "<think>red is behind</think><answer>"
text += '{"points_1": [%d, %d], "points_2": [%d, %d], "bbox": [16, 23, 43, 49]}</answer>'
return text % (19, 25, 40, 46), text % (25, 36, 34, 36)
""",
    "group_advantages": """
deviation = rewards - rewards.mean(dim=-1, keepdim=True)
return deviation / (deviation.square().mean(dim=-1, keepdim=True).sqrt() + eps)
""",
    "k3_kl": """
return torch.exp(reference - logprobs) - 1 - (reference - logprobs)
""",
    "grpo_loss": """
ratio = torch.exp(logprobs - old)
A = advantages.unsqueeze(-1).expand_as(ratio)
worst = torch.where(A > 0, ratio.clamp(max=1 + eps_high), ratio.clamp(min=1 - eps_low))
kl = torch.zeros_like(ratio) if beta == 0 else k3_kl(logprobs, reference)
B, G, _ = mask.shape
lengths = mask.sum(-1, keepdim=True)  # (B, G, 1)
shares = 1 / lengths.sum(1, keepdim=True) if normalise == "token" else 1 / lengths / G
loss = -((worst * A - beta * kl) * shares)[mask].sum() / B
side = clip_side(ratio.detach(), A, eps_low, eps_high)
statistics = {"kl": kl.detach()[mask].mean(), "ratio": ratio.detach()[mask].mean()}
statistics["clip_low"] = side[mask].eq(-1).double().mean()
statistics["clip_high"] = side[mask].eq(1).double().mean()
return loss, statistics, side
""",
    "clip_side": """
ratio, advantages = torch.broadcast_tensors(ratio, advantages)
side = torch.zeros(ratio.shape, dtype=torch.int32, device=ratio.device)
side[(advantages > 0) & (ratio - 1 > eps_high)] = 1
side[(advantages < 0) & (1 - ratio > eps_low)] = -1
return side
""",
    "rollout": """
vlm = unwrap(model)
first = vlm(
    input_ids=prompts.ids.to(vlm.device),
    attention_mask=prompts.mask.to(vlm.device),
    position_ids=prompts.positions.to(vlm.device),
    mm_encoder_outputs={"image": prompts.vision},
    use_cache=True,
)
decode = decoder(vlm, first.cache, prompts, G, max_new_tokens)
logits = torch.repeat_interleave(first.logits[:, -1], G, dim=0)
ids = torch.full((len(logits), max_new_tokens), int(end[0]), device=vlm.device)
length = torch.full((len(logits),), max_new_tokens, device=vlm.device)
for t in range(max_new_tokens):
    logits = logits.float().index_fill(1, banned, float("-inf"))
    ids[:, t] = choose_token(logits, temperature, generator)
    length[torch.isin(ids[:, t], end) & (length == max_new_tokens)] = t + 1
    if t + 1 == max_new_tokens or (length <= t + 1).all():
        break
    logits = decode.step(ids[:, t])
mask = torch.arange(t + 1, device=vlm.device) < length[:, None]
return Completions(ids[:, : t + 1].view(-1, G, t + 1).cpu(), mask.view(-1, G, t + 1).cpu())
""",
    "pack": """
B, G, _ = completions.ids.shape
rows = []
for b in range(B):
    seen = prompts.mask[b]
    ids = prompts.ids[b][seen].tolist()
    positions = prompts.positions[:, b][:, seen].T.tolist()
    last, largest = len(ids) - 1, max(map(max, positions))
    segments, sources, targets = [0] * len(ids), [], []
    for g in range(G):
        tokens = completions.ids[b, g][completions.mask[b, g]].tolist()
        sources += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
        positions += [[largest + 1 + t] * 3 for t in range(len(tokens))]
        segments += [g + 1] * len(tokens)
        targets += tokens
        ids += tokens
    rows.append((ids, positions, segments, sources, targets))
L = max(len(row[0]) for row in rows)
return PackedRows(
    torch.tensor([ids + [0] * (L - len(ids)) for ids, *_ in rows]),
    torch.tensor([row[1] + [[0] * 3] * (L - len(row[1])) for row in rows]).permute(2, 0, 1),
    torch.tensor([row[2] + [-1] * (L - len(row[2])) for row in rows]),
    torch.tensor([b * L + source for b, row in enumerate(rows) for source in row[3]]),
    torch.tensor([token for row in rows for token in row[4]]),
)
""",
    "may_attend": """
L = segments.shape[1]
past = torch.ones(L, L, dtype=torch.bool, device=segments.device).tril()
query, key = segments.unsqueeze(2), segments.unsqueeze(1)
return past & ((key == 0) | (key == query))
""",
    "group_logprobs": """
vlm = unwrap(model)
packed = PackedRows(*(x.to(vlm.device) for x in pack(prompts, completions)))
states = vlm.model(
    input_ids=packed.ids,
    attention_mask=may_attend(packed.segments).unsqueeze(1),
    position_ids=packed.positions,
    mm_encoder_outputs={"image": prompts.vision},
    use_cache=False,
).last_hidden_state.flatten(0, 1)
chunk = chunk or max(1, LOGITS_AT_ONCE // vlm.lm_head.out_features)
parts = []
for start in range(0, len(packed.targets), chunk):
    part = slice(start, start + chunk)
    hidden = states[packed.sources[part]]
    pair = head_logprobs(vlm.lm_head, hidden, packed.targets[part], temperature, banned)
    parts.append(torch.stack(pair))
mask = completions.mask.to(vlm.device).expand(2, -1, -1, -1)
result = torch.zeros(mask.shape, device=vlm.device).masked_scatter(mask, torch.cat(parts, 1))
return result[0], result[1].detach()
""",
    "train": """
chosen = runs.indices(step, s.prompts_per_step, len(samples), s.seed)
batch, skipped = runs.load_samples(samples, chosen)
prompts = policy.read(batch)
completions = sample_completions(policy, prompts, s, generator)
texts = policy.texts(completions)
style, masks = policy.style, log_this_step
scores = score_completions(scorer, batch, texts, policy.extent, s.accuracy, masks, style)
advantages = group_advantages(scores.reward)
old, reference = fixed_logprobs(policy, prompts, completions, s)
clip_sides, statistics = update(
    policy, optimizer, prompts, completions, advantages, old, reference, s
)
""",
}

"""Right solutions of the exercises that are written differently from the reference.

Name of a function: the lines in place of its NotImplementedError.
"""

BODIES = {
    "parse_answer": """
import re

around, thought, rest = "", "", text
if re.findall("</?think>", text) == ["<think>", "</think>"]:
    around, thought, rest = re.split("</?think>", text)
end = rest.rfind("</answer>")
start = rest.rfind("<answer>", 0, end) if end >= 0 else -1
answered = start >= 0
inside = rest[start + len("<answer>") : end] if answered else ""
if answered:
    around += rest[:start] + rest[end + len("</answer>") :]
items, good = find_objects(inside, style, text, loosely=answered)
good = good and bool(items)
objects = []
for item in items:
    one = read_object(item, style)
    good = good and one.asked_form and bool(one.box) and all(one.points)
    points = tuple(filter(None, one.points))
    if one.box or points:
        objects.append((one.box, points))
box, points = objects[0] if objects else (None, ())
whole = answered and thought.strip() != "" and around.strip() == ""
return Answer(whole, good, box, points, thought.strip(), tuple(objects[1:]))
""",
    "read_object": """
box_key, *point_keys = answer_keys(item, style)
form = True
values = []
for key, count in ((box_key, 4), *((key, 2) for key in point_keys)):
    value = item.get(key)
    form = form and isinstance(value, list) and len(value) != 1
    values.append(numbers(value, count, quoted=style == "segzero"))
box, *points = values
if box is not None:
    x1, y1, x2, y2 = box
    box = box if x2 > x1 and y2 > y1 else None
return AnsweredObject(box, points, form)
""",
    "sam_prompt": """
scale = np.array([width, height]) / extent
box = None
if answer.box is not None:
    corners = np.array(answer.box).reshape(2, 2) * scale
    corners = np.clip(corners, 0, [width, height])
    if (corners[1] > corners[0]).all():
        box = tuple(corners.flatten().tolist())
points = []
for point in answer.points:
    x, y = (np.array(point) * scale).tolist()
    if not (x < 0 or y < 0 or x > width or y > height):
        points.append((x, y))
others = []
for other_box, other_points in answer.others:
    other = Answer(True, True, other_box, other_points, "")
    others.append(sam_prompt(other, extent, width, height))
return SamPrompt(box, tuple(points), tuple(others))
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
lengths = mask.sum(-1)  # (B, G)
if normalise == "token":
    weight = mask / lengths.sum(-1)[:, None, None]
else:
    weight = mask / lengths[..., None] / mask.shape[1]
loss = -((worst * A - beta * kl) * weight).sum() / mask.shape[0]
side = clip_side(ratio.detach(), A, eps_low, eps_high)
inside = side[mask]
statistics = {
    "kl": kl.detach()[mask].mean(),
    "ratio": ratio.detach()[mask].mean(),
    "clip_low": inside.eq(-1).double().mean(),
    "clip_high": inside.eq(1).double().mean(),
}
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
vlm = base(model)
first = vlm(
    input_ids=prompts.ids.to(vlm.device),
    attention_mask=prompts.mask.to(vlm.device),
    position_ids=prompts.positions.to(vlm.device),
    mm_encoder_outputs={"image": prompts.vision},
    use_cache=True,
)
logits = torch.repeat_interleave(first.logits[:, -1], G, dim=0)
decode = decoder(vlm, first.cache, prompts, G, max_new_tokens)
ids = torch.full((len(logits), max_new_tokens), int(end[0]), device=vlm.device)
length = torch.full((len(logits),), max_new_tokens, device=vlm.device)
for t in range(max_new_tokens):
    logits = logits.float()
    logits[:, banned] = float("-inf")
    ids[:, t] = choose_token(logits, temperature, generator)
    ends = (ids[:, t, None] == end).any(1) & (length == max_new_tokens)
    length[ends] = t + 1
    if t + 1 == max_new_tokens or (length <= t + 1).all():
        break
    logits = decode.step(ids[:, t])
T = int(length.max())
mask = torch.arange(T, device=vlm.device) < length[:, None]
return Completions(ids[:, :T].view(-1, G, T).cpu(), mask.view(-1, G, T).cpu())
""",
    "pack": """
B, G, _ = completions.ids.shape
rows = []
for b in range(B):
    seen = prompts.mask[b]
    P = int(seen.sum())
    ids = prompts.ids[b][seen].tolist()
    positions = prompts.positions[:, b][:, seen].T.tolist()
    largest = max(map(max, positions))
    segments = [0] * P
    sources, targets = [], []
    for g in range(G):
        previous = P - 1
        for t, token in enumerate(completions.ids[b, g][completions.mask[b, g]].tolist()):
            sources.append(previous)
            previous = len(ids)
            targets.append(token)
            ids.append(token)
            positions.append([largest + 1 + t] * 3)
            segments.append(g + 1)
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
vlm = base(model)
packed = pack(prompts, completions)
states = vlm.model(
    input_ids=packed.ids.to(vlm.device),
    attention_mask=may_attend(packed.segments).unsqueeze(1).to(vlm.device),
    position_ids=packed.positions.to(vlm.device),
    mm_encoder_outputs={"image": prompts.vision},
    use_cache=False,
).last_hidden_state
states = states.reshape(-1, states.shape[-1])
chunk = chunk or max(1, LOGITS_AT_ONCE // vlm.lm_head.out_features)
mask = completions.mask.to(vlm.device)
where = mask.nonzero(as_tuple=True)
result = torch.zeros(2, *mask.shape, device=vlm.device)
parts = []
for start in range(0, len(packed.targets), chunk):
    sources = packed.sources[start : start + chunk].to(vlm.device)
    targets = packed.targets[start : start + chunk].to(vlm.device)
    pair = head_logprobs(vlm.lm_head, states[sources], targets, temperature, banned)
    parts.append(torch.stack(pair))
both = torch.cat(parts, 1)
logprobs, entropies = (result[k].index_put(where, both[k]) for k in (0, 1))
return logprobs, entropies.detach()
""",
    "train": """
chosen = runs.indices(step, s.prompts_per_step, len(samples), s.seed)
batch, skipped = runs.load_samples(samples, chosen)
prompts = policy.read(batch)
completions = sample_completions(policy, prompts, s, generator)
texts = policy.texts(completions)
style, masks = policy.prompt, log_this_step
scores = score_completions(scorer, batch, texts, policy.extent, s.accuracy, masks, style)
advantages = group_advantages(scores.reward)
old, reference = fixed_logprobs(policy, prompts, completions, s)
clip_sides, statistics = update(
    policy, optimizer, prompts, completions, advantages, old, reference, s
)
""",
}

"""logprobs.py - how much does it save to share the prompt when training on a group's log-probs?

    python -m benchmarks.logprobs

Forward and backward of the log-probs of G completions of one prompt with an image, in three ways:

    packed      grpo.group_logprobs: one row [prompt | o_1 | ... | o_G]
    padded      one batch of G rows [prompt | o_g] through the plain model, with logits at the
                completions' positions only
    row by row  the same, one row at a time, each with its own backward pass

Three parts of Qwen2.5-VL-3B, in float32 and with random weights: one layer with LoRA on every
linear, and a vocabulary of 154, since the head would hide what a layer saves; the same with
activation checkpointing; the final norm and the lm_head. From the last two the script computes the
whole model of 36 layers. A toy vision tower computes the image features once for all three ways.
All completions have the same length, so no row is padded. Each measurement has its own process.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import meter
from benchmarks.meter import DEVICE
from benchmarks.random_models import tiny_processor
from grpo import Completions, group_logprobs
from plumbing.vlm import Prompts, encode_prompts, unwrap
from samr1_mini import add_lora
from tools.published import published_config

WAYS = ("packed", "padded", "row by row")
G, SIDE, TEXT, R = 8, 840, 150, 200  # completions, pixels, text tokens, tokens of a completion
P = (SIDE // 28) ** 2 + TEXT  # tokens of the prompt
HIDDEN, VOCABULARY = 2048, 151936  # of Qwen2.5-VL-3B


def build(part: str):
    """One layer of the 3B model or its head, and a toy vision tower, ready to train."""
    config = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers = 0 if part == "head" else 1
    text.vocab_size = VOCABULARY if part == "head" else 154
    vision.update(dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=1))
    vision.fullatt_block_indexes = [0]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(DEVICE)
    if part == "head":
        model.requires_grad_(False)
        # The norm's gradient passes through the head, so it is compared between the ways.
        model.model.language_model.norm.requires_grad_(True)
        return model
    model = add_lora(model, rank=16, seed=0, checkpoint_layers=part == "checkpointed")
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, where A has no gradient
            torch.nn.init.normal_(weight, std=0.1)
    # The gradient passes through the whole layer, as in all but the first of 36 layers.
    model.enable_input_require_grads()
    return model.train()  # checkpointing needs train mode; there is no dropout


def make_case(model, G: int, side: int, text: int, R: int):
    """A prompt with an image and `text` more tokens, G random completions of R tokens, and the
    weights (1, G, R) of their log-probs in the loss."""
    processor = tiny_processor(unwrap(model).config)
    image = Image.effect_noise((side, side), 50).convert("RGB")
    words = processor.image_token + text * "\n"  # a line break is a token
    inputs = processor(text=[words], images=[image], return_tensors="pt")
    torch.manual_seed(1)
    special = len(processor.tokenizer.all_special_ids)  # they come first
    tokens = torch.randint(special, unwrap(model).lm_head.out_features, (1, G, R))
    completions = Completions(tokens, torch.ones_like(tokens).bool())
    return encode_prompts(model, inputs), completions, torch.randn(1, G, R).to(DEVICE)


def plain_logprobs(model, prompts: Prompts, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs (N, R) of N completions, each in its own row behind the prompt."""
    N, R = ids.shape
    P = prompts.ids.shape[1]
    text_positions = prompts.positions.max() + 1 + torch.arange(R)
    positions = [prompts.positions.expand(-1, N, -1), text_positions.expand(3, N, -1)]
    vision = prompts.vision  # Qwen3-VL has more in it than pooler_output
    if N > 1:
        features = list(prompts.vision.pooler_output) * N
        vision = BaseModelOutputWithPooling(pooler_output=features)
    logits = unwrap(model)(
        input_ids=torch.cat([prompts.ids.expand(N, -1), ids], 1).to(DEVICE),
        position_ids=torch.cat(positions, 2).to(DEVICE),
        mm_encoder_outputs={"image": vision},
        use_cache=False,
        logits_to_keep=torch.arange(P - 1, P + R - 1, device=DEVICE),
    ).logits
    return logits.float().log_softmax(-1).gather(-1, ids.to(DEVICE)[..., None])[..., 0]


def forward_backward(
    way: str, model, prompts: Prompts, completions: Completions, weights: torch.Tensor
) -> torch.Tensor:
    """Compute the log-probs (G, R), and add the gradients of their weighted sum to the model."""
    if way == "packed":
        banned = torch.empty(0, dtype=torch.long, device=DEVICE)
        logprobs, _ = group_logprobs(model, prompts, completions, banned)
        (logprobs * weights).sum().backward()
        return logprobs[0].detach()
    N = weights.shape[1] if way == "padded" else 1
    result = []
    for ids, weight in zip(completions.ids[0].split(N), weights[0].split(N), strict=True):
        logprobs = plain_logprobs(model, prompts, ids)
        (logprobs * weight).sum().backward()
        result.append(logprobs.detach())
    return torch.cat(result)


def measure_time(part: str) -> tuple[dict[str, dict[str, float]], float, float]:
    """Seconds of each way, and the largest difference of a log-prob and the largest relative
    difference of a gradient between packed and the two others."""
    model = build(part)
    case = make_case(model, G, SIDE, TEXT, R)
    weights = [p for p in model.parameters() if p.requires_grad]
    logprobs, gradients = {}, {}

    def run(way: str) -> dict[str, float]:
        model.zero_grad()
        started = meter.now()
        logprobs[way] = forward_backward(way, model, *case)
        seconds = meter.now() - started
        gradients[way] = [p.grad for p in weights]
        return {"seconds": seconds}

    rows = meter.take_turns(run, WAYS)
    far = max((logprobs["packed"] - logprobs[way]).abs().max().item() for way in WAYS)
    pairs = [pair for way in WAYS for pair in zip(gradients["packed"], gradients[way], strict=True)]
    off = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)
    return rows, far, off


def measure_memory(part: str, way: str) -> float:
    """Peak memory of one way above the weights, MiB."""
    model = build(part)
    forward_backward(way, model, *make_case(model, 2, 56, 8, 4))  # loads kernels, starts threads
    # For row by row, two rows suffice: the second one already finds the gradients of the first.
    case = make_case(model, 2 if way == "row by row" else G, SIDE, TEXT, R)
    model.zero_grad()
    return meter.added_mib(forward_backward, way, model, *case)


def measure(part: str) -> dict[str, dict[str, float]]:
    """Measure and print one part. Returns seconds and MiB of each way."""
    rows, far, off = meter.in_new_process(measure_time, part, malloc=meter.KEEP_FREED)
    for way in WAYS:
        rows[way]["MiB"] = meter.in_new_process(
            measure_memory, part, way, malloc=meter.RETURN_FREED
        )
    title = f"{part}: P = {P}, R = {R}, G = {G}, {DEVICE}, {meter.THREADS} threads"
    meter.print_table(title, rows, ours="packed")
    print(f"largest difference of a log-prob: {far:.0e}, of a gradient, relative: {off:.0e}")
    return rows


def whole_model(layer: dict, head: dict) -> dict[str, dict[str, float]]:
    """Seconds and MiB above 11.5 GiB of weights of 36 checkpointed layers and the head."""
    rows = {}
    for way, tokens in zip(WAYS, (P + G * R, G * (P + R), P + R), strict=True):
        inputs = 35 * tokens * HIDDEN * 4 / 2**20  # of the other layers
        seconds = 36 * layer[way]["seconds"] + head[way]["seconds"]
        rows[way] = {"seconds": seconds, "MiB": inputs + max(layer[way]["MiB"], head[way]["MiB"])}
    return rows


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.logprobs").parse_args()
    measured = {part: measure(part) for part in ("layers", "checkpointed", "head")}
    rows = whole_model(measured["checkpointed"], measured["head"])
    meter.print_table("36 checkpointed layers and the head, computed", rows, ours="packed")


if __name__ == "__main__":
    main()

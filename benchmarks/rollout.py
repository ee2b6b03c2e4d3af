"""rollout.py - what does it save to prefill a prompt once and sample its G completions from the repeated cache?

    python benchmarks/rollout.py [--threads 2] [--repetitions 3]

One prompt of about 1,050 tokens (900 of them an image of 840 x 840 pixels), G = 8 completions of 64 tokens each, sampled at temperature
1 without the vision tokens, three ways:

    rollout            grpo.encode_prompts, then grpo.rollout
    return sequences   generate(num_return_sequences=G): the vision tower runs once, but the prompt goes through the language model G times
    repeated           generate on the processor's output repeated G times, image included: both run G times

The model is a Qwen2.5-VL of toy width (8 layers of 512) with random weights in float32, and the processor is the tiny model's at patches of
14. No token ends a completion, so that all decode the same number of steps. That all three choose the same tokens is checked with
the likeliest token at each step, and again with sampling from one seed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import messages  # noqa: E402
from grpo import encode_prompts, rollout  # noqa: E402

G, NEW, SIDE = 8, 64, 840  # completions, tokens of each, pixels
QUERY = "the largest circle left of the blue square " * 18  # brings the prompt to about 1,050 tokens
WAYS = ("rollout", "return sequences", "repeated")


def build(device: torch.device):
    """The model, one prompt as the processor puts it, and the tokens that are never sampled."""
    processor = AutoProcessor.from_pretrained(ROOT / "tiny" / "vlm")
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size, part.size = 14, {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    tokens = processor.tokenizer
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    vision = {f"{name}_token_id": tokens.convert_tokens_to_ids(written) for name, written in names.items()}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokens), hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, initializer_range=0.05, bos_token_id=None, eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
        ),
        vision_config=dict(
            depth=4, hidden_size=256, intermediate_size=512, num_heads=4, patch_size=14, spatial_merge_size=2, window_size=112,
            fullatt_block_indexes=[3], out_hidden_size=512,
        ),
        **vision,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config).eval().to(device)
    text = processor.apply_chat_template([messages(QUERY.strip(), "brief", "pixels", SIDE)], tokenize=False, add_generation_prompt=True)
    noise = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(text=text, images=[Image.fromarray(noise.numpy())], return_tensors="pt", padding=True, padding_side="left")
    return model, inputs, torch.tensor(list(vision.values()), device=device)


def sample(way: str, model, inputs: dict[str, torch.Tensor], banned: torch.Tensor, new: int, greedy: bool = False) -> torch.Tensor:
    """G completions of `new` tokens, (G, new); from the seed 0."""
    torch.manual_seed(0)
    never = 10**6  # an end token that the vocabulary does not hold
    if way == "rollout":
        prompts = encode_prompts(model, inputs)
        return rollout(model, prompts, G, new, torch.tensor([never], device=banned.device), banned, 0.0 if greedy else 1.0).ids[0]
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if way == "repeated":
        inputs = {
            name: tensor.repeat_interleave(G, 0) if name != "pixel_values" else tensor.repeat(G, 1) for name, tensor in inputs.items()
        }
    out = model.generate(
        **inputs,
        do_sample=True,
        top_k=1 if greedy else 0,
        max_new_tokens=new,
        eos_token_id=never,
        suppress_tokens=banned.tolist(),
        num_return_sequences=G if way == "return sequences" else 1,
    )
    return out[:, inputs["input_ids"].shape[1] :].cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs, banned = build(device)

    def seconds(action) -> float:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    # The first calls warm up, and tell whether all choose the same tokens.
    mine, *others = (sample(way, model, inputs, banned, NEW, greedy=True) for way in WAYS)
    likeliest = all(torch.equal(mine, tokens) for tokens in others)
    mine, *others = (sample(way, model, inputs, banned, NEW) for way in WAYS)
    sampled = min((mine == tokens).float().mean().item() for tokens in others)
    times = {way: {"all": [], "first token": []} for way in WAYS}
    vision = []
    for _ in range(options.repetitions):
        vision.append(seconds(lambda: encode_prompts(model, inputs)))
        for way in WAYS:
            for what, new in (("all", NEW), ("first token", 1)):
                times[way][what].append(seconds(lambda: sample(way, model, inputs, banned, new)))  # noqa: B023
    median = {way: {what: statistics.median(values) for what, values in kinds.items()} for way, kinds in times.items()}
    tower = statistics.median(vision)

    P = inputs["input_ids"].shape[1]
    print(
        f"P = {P}, G = {G}, {NEW} new tokens, {device.type}, {options.threads} threads, median of {options.repetitions} interleaved repetitions"
    )
    print(f"{'':18}{'seconds':>9}{'ratio':>7}{'vision':>9}{'prefill':>9}{'decode':>9}   through the language model")
    for way in WAYS:
        all_, first = median[way].values()
        n = 1 if way == "rollout" else G
        towers = tower * (G if way == "repeated" else 1)
        ratio = all_ / median["rollout"]["all"]
        print(
            f"{way:18}{all_:9.2f}{ratio:7.2f}{towers:9.2f}{first - towers:9.2f}{all_ - first:9.2f}   {n * P} prompt tokens, {NEW - 1} steps of {G} rows"
        )
    faster = min(median[way]["all"] for way in WAYS[1:]) / median["rollout"]["all"]
    print(f"rollout is {faster:.2f} times as fast as the better generate")
    print(f"likeliest tokens equal: {likeliest}; sampled from one seed, equal: {sampled:.1%} or more")
    print(json.dumps({"P": P, "G": G, "new": NEW, "threads": options.threads, "device": device.type, "torch": torch.__version__,
                      "seconds": median, "vision": tower, "repetitions": times, "faster": faster, "same_greedy": likeliest, "same_sampled": sampled}))  # fmt: skip


if __name__ == "__main__":
    main()

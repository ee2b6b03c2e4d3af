"""rollout.py - how much time does it save to prefill a prompt once for all of its G completions?

    python -m benchmarks.rollout [--threads 2] [--repetitions 3]

Samples G = 8 completions of 64 tokens of one prompt with about 1,050 tokens, 900 of which are an
image of 840 x 840 pixels. Compares three ways, at temperature 1 and without vision tokens:

    rollout            plumbing.vlm.encode_prompts, then grpo.rollout
    return sequences   generate(num_return_sequences=G): runs the vision tower once, but prefills
                       the prompt G times
    repeated           generate on the processor's output repeated G times: runs both G times

The model is a Qwen2.5-VL of toy width (8 layers of 512) with random weights in float32. The
processor is the tiny model's with a patch size of 14. No token ends a completion, so that all three
decode the same number of steps. The script also checks that all three choose the same tokens, both
greedily and when sampling from one seed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from data import messages
from grpo import rollout
from plumbing.vlm import encode_prompts

TINY = Path(__file__).resolve().parent.parent / "tiny" / "vlm"
G, NEW, SIDE = 8, 64, 840  # completions, tokens of each, pixels
QUERY = "the largest circle left of the blue square " * 18  # makes a prompt of about 1,050 tokens
WAYS = ("rollout", "return sequences", "repeated")
VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def build_model(tokens, vision_ids: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of toy width with random weights. tokens: the tokenizer."""
    text = dict(
        vocab_size=len(tokens),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
    )
    vision = dict(
        depth=4,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=[3],
        out_hidden_size=512,
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **vision_ids)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build(device: torch.device):
    """The model, the processor's output for one prompt, and the ids of the banned tokens."""
    processor = AutoProcessor.from_pretrained(TINY)
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size = 14
        part.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    tokens = processor.tokenizer
    ids = {key: tokens.convert_tokens_to_ids(name) for key, name in VISION_TOKENS.items()}
    model = build_model(tokens, ids).to(device)
    talk = messages(QUERY.strip(), "brief", "pixels", SIDE)
    text = processor.apply_chat_template([talk], tokenize=False, add_generation_prompt=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(noise.numpy())
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    inputs = processor(text=text, images=[image], **options)
    return model, inputs, torch.tensor(list(ids.values()), device=device)


def sample(way: str, model, inputs, banned: torch.Tensor, new: int, greedy=False) -> torch.Tensor:
    """G completions of `new` tokens, (G, new), sampled from seed 0."""
    torch.manual_seed(0)
    never = 10**6  # an end token outside the vocabulary
    if way == "rollout":
        prompts = encode_prompts(model, inputs)
        end = torch.tensor([never], device=banned.device)
        return rollout(model, prompts, G, new, end, banned, 0.0 if greedy else 1.0).ids[0]
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if way == "repeated":
        pixels = inputs.pop("pixel_values").repeat(G, 1)
        inputs = {name: tensor.repeat_interleave(G, 0) for name, tensor in inputs.items()}
        inputs["pixel_values"] = pixels
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


def compare_tokens(model, inputs, banned) -> tuple[bool, float]:
    """Whether all ways choose the same tokens greedily, and the smallest share of equal tokens when
    they sample from one seed. Also warms up."""
    ours, *others = (sample(way, model, inputs, banned, NEW, greedy=True) for way in WAYS)
    greedy = all(torch.equal(ours, tokens) for tokens in others)
    ours, *others = (sample(way, model, inputs, banned, NEW) for way in WAYS)
    return greedy, min((ours == tokens).float().mean().item() for tokens in others)


def measure(model, inputs, banned, repetitions: int) -> tuple[dict, list[float]]:
    """Seconds of each way for all tokens and for the first one, and of the vision tower, for each
    of the interleaved repetitions."""

    def seconds(function, *args) -> float:
        started = time.perf_counter()
        function(*args)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    times, vision = {way: {"all": [], "first token": []} for way in WAYS}, []
    for _ in range(repetitions):
        vision.append(seconds(encode_prompts, model, inputs))
        for way in WAYS:
            for kind, count in (("all", NEW), ("first token", 1)):
                times[way][kind].append(seconds(sample, way, model, inputs, banned, count))
    return times, vision


def print_table(median: dict, vision: float, P: int) -> None:
    """One row per way: seconds, and how they divide into vision tower, prefill and decoding."""
    columns = ("seconds", "ratio", "vision", "prefill", "decode")
    print(f"{'':18}{''.join(f'{c:>9}' for c in columns)}   through the language model")
    for way in WAYS:
        total, first = median[way].values()
        prefilled = 1 if way == "rollout" else G
        tower = vision * (G if way == "repeated" else 1)
        ratio = total / median["rollout"]["all"]
        row = (total, ratio, tower, first - tower, total - first)
        work = f"{prefilled * P} prompt tokens, {NEW - 1} steps of {G} rows"
        print(f"{way:18}{''.join(f'{value:9.2f}' for value in row)}   {work}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    s = parser.parse_args()
    torch.set_num_threads(s.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs, banned = build(device)
    greedy, sampled = compare_tokens(model, inputs, banned)
    times, vision = measure(model, inputs, banned, s.repetitions)
    median = {
        way: {kind: statistics.median(values) for kind, values in kinds.items()}
        for way, kinds in times.items()
    }
    P = inputs["input_ids"].shape[1]
    print(f"P = {P}, G = {G}, {NEW} new tokens, {device.type}, {s.threads} threads")
    print(f"median of {s.repetitions} interleaved repetitions")
    print_table(median, statistics.median(vision), P)
    faster = min(median[way]["all"] for way in WAYS[1:]) / median["rollout"]["all"]
    print(f"rollout is {faster:.2f}x faster than the better call of generate")
    print(f"greedy tokens equal: {greedy}; sampled from one seed: at least {sampled:.1%} equal")
    result = {"P": P, "G": G, "new": NEW, "threads": s.threads, "device": device.type}
    result |= {"torch": torch.__version__, "seconds": median, "repetitions": times}
    result |= {"vision": statistics.median(vision), "faster": faster}
    print(json.dumps(result | {"same_greedy": greedy, "same_sampled": sampled}))


if __name__ == "__main__":
    main()

"""rollout.py - how much time does it save to prefill a prompt once for all of its G completions?

    python -m benchmarks.rollout

Three ways at temperature 1, without vision tokens, with random weights in float32:

    ours                plumbing.vlm.encode_prompts, then grpo.rollout
    return sequences    generate(num_return_sequences=G): one vision tower, but G prefills
    repeated            generate on the processor's output repeated G times: G of both

No token ends a completion, so all three decode the same number of steps. The script also checks
that all three choose the same tokens, both greedily and when sampling from one seed.
"""

import argparse

import torch
from PIL import Image

from benchmarks.meter import DEVICE, THREADS, print_table, seconds_of, take_turns
from benchmarks.random_models import medium_vlm
from data import messages
from grpo import rollout
from plumbing.decoding import StaticDecoder
from plumbing.vlm import encode_prompts

G, NEW, SIDE = 8, 64, 840  # completions, tokens of each, pixels
QUERY = "the largest circle left of the blue square " * 18  # makes a prompt of about 1,050 tokens
WAYS = ("ours", "return sequences", "repeated")
NEVER = 10**6  # an end token outside the vocabulary


def build():
    """The model, the processor's output for one prompt, and the ids of the banned tokens."""
    vision = dict(depth=4, hidden_size=256, intermediate_size=512, num_heads=4)
    vision |= dict(fullatt_block_indexes=[3])
    model, processor = medium_vlm(text=dict(intermediate_size=2048), vision=vision)
    chat = messages(QUERY.strip(), "brief", "pixels", SIDE)
    text = processor.apply_chat_template([chat], tokenize=False, add_generation_prompt=True)
    image = Image.effect_noise((SIDE, SIDE), 50).convert("RGB")
    inputs = processor(text=text, images=[image], return_tensors="pt")
    names = ("image", "video", "vision_start", "vision_end")
    banned = [getattr(model.config, f"{name}_token_id") for name in names]
    return model.to(DEVICE), inputs, torch.tensor(banned, device=DEVICE)


def sample(way: str, model, inputs, banned: torch.Tensor, new: int, greedy=False) -> torch.Tensor:
    """G completions of `new` tokens, (G, new), sampled from seed 0."""
    torch.manual_seed(0)
    if way == "ours":
        completions = rollout(
            model,
            encode_prompts(model, inputs),
            G,
            max_new_tokens=new,
            end=torch.tensor([NEVER], device=DEVICE),
            banned=banned,
            temperature=0.0 if greedy else 1.0,
            decoder=StaticDecoder,
        )
        return completions.ids[0]
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    if way == "repeated":
        pixels = inputs["pixel_values"].repeat(G, 1)  # (patches, values): no dimension of images
        inputs = {name: tensor.repeat_interleave(G, 0) for name, tensor in inputs.items()}
        inputs["pixel_values"] = pixels
    out = model.generate(
        **inputs,
        do_sample=True,
        top_k=1 if greedy else 0,
        max_new_tokens=new,
        eos_token_id=NEVER,
        suppress_tokens=banned.tolist(),
        num_return_sequences=G if way == "return sequences" else 1,
    )
    return out[:, inputs["input_ids"].shape[1] :].cpu()


def measure(way: str, model, inputs, banned: torch.Tensor) -> dict[str, float]:
    """Seconds of one way, and how they divide into vision tower, prefill and decoding."""
    vision = seconds_of(encode_prompts, model, inputs) * (G if way == "repeated" else 1)
    first = seconds_of(sample, way, model, inputs, banned, 1)
    total = seconds_of(sample, way, model, inputs, banned, NEW)
    return {"seconds": total, "vision": vision, "prefill": first - vision, "decode": total - first}


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.rollout").parse_args()
    torch.set_num_threads(THREADS)
    case = build()
    rows = take_turns(lambda way: measure(way, *case), WAYS)
    P = case[1]["input_ids"].shape[1]
    print_table(f"P = {P}, G = {G}, {NEW} new tokens, {DEVICE}, {THREADS} threads", rows)
    for name, greedy in {"greedy": True, "sampled from one seed": False}.items():
        ours, *others = (sample(way, *case, NEW, greedy) for way in WAYS)
        equal = min((ours == tokens).float().mean().item() for tokens in others)
        print(f"equal tokens, {name}: at least {equal:.1%}")


if __name__ == "__main__":
    main()

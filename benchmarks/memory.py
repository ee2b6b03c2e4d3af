"""memory.py - the memory that a training step is expected to take, by arithmetic: `samr1_mini.py train --dry-run`.

Nothing is downloaded and nothing is allocated: the architectures are built on torch's meta device, as shapes alone.
"""

import re

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from reward import SAM_SIZES, build_sam


def published_config(vlm: str):
    """The architecture of a policy, without its weights: from the sizes that Qwen2.5-VL's authors publish (config.json of the
    3B and 7B models), so that nothing is downloaded; for any other model from its own config.json."""
    sizes = {
        "Qwen/Qwen2.5-VL-3B-Instruct": dict(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
            vocab_size=151936, tie_word_embeddings=True,
        ),
        "Qwen/Qwen2.5-VL-7B-Instruct": dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
            vocab_size=152064, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    if vlm not in sizes:
        return AutoConfig.from_pretrained(vlm)
    text = sizes[vlm] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=text["hidden_size"],
    )  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])


def expected_memory(s, vlm: str, targets: str) -> dict[str, dict[str, tuple[int, str]]]:
    """Bytes by phase and part, each with its arithmetic, for a GPU (bfloat16). An estimate: allocators round up, and kernels
    take workspace. s: samr1_mini.Settings; vlm: the policy's name or folder; targets: which
    modules carry an adapter, as a regular expression."""
    config = published_config(vlm)
    with torch.device("meta"):  # shapes without memory
        vlm = AutoModelForImageTextToText.from_config(config)
        sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
    text, vision = config.text_config, config.vision_config
    linears = [m for n, m in vlm.named_modules() if re.fullmatch(targets, n)]
    weights, adapter, segmenter = (
        sum(p.numel() for p in vlm.parameters()),
        s.lora_rank * sum(m.in_features + m.out_features for m in linears),
        sum(p.numel() for p in sam.parameters()),
    )
    layers, hidden, inner, V, G = text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size, s.group_size
    P = (s.side // (vision.patch_size * vision.spatial_merge_size)) ** 2 + (250 if s.prompt == "full" else 20)
    T, rows = s.max_new_tokens, min(s.rollout_prompts, s.prompts_per_step) * G
    L, passes = P + G * T, s.prompts_per_pass
    head = hidden // text.num_attention_heads
    length = -(-(P + T) // 16) * 16  # as grpo.Decoder rounds it
    token = layers * 2 * text.num_key_value_heads * head * 2  # bytes of keys and values
    grid = sam.image_encoder.img_size // sam.image_encoder.patch_embed.proj.stride[0]
    width, prompts = sam.prompt_encoder.embed_dim, min(s.sam_prompts, s.prompts_per_step * G)
    always = {
        "policy weights": (weights * 2, f"{weights / 1e9:.2f}e9 weights x 2 bytes"),
        "adapter": (adapter * 16, f"{adapter / 1e6:.1f}e6 weights x 16 bytes: itself, gradient, two moments of AdamW, float32"),
    }
    resident = {"SAM weights": (segmenter * 4, f"{segmenter / 1e6:.0f}e6 weights x 4 bytes")}
    beside = {} if s.sam_offload else resident
    return {
        "rollout": always
        | beside
        | {
            "keys and values": (rows * length * token, f"{rows} rows x {length} tokens x {layers} layers x 2 x {text.num_key_value_heads} heads x {head} x 2 bytes"),
            "the prompts' own": (rows // G * P * token, f"{rows // G} x {P} tokens, while they are copied to each completion's row"),
            "logits": (rows * V * 14, f"{rows} rows x {V} x (2 + 3 x 4) bytes: logits, and three float32 tensors of sampling"),
        },
        "reward": always
        | resident
        | {"SAM decoder": (prompts * 10 * width * grid**2 * 4, f"{prompts} prompts x 10 maps of {width} x {grid} x {grid} x 4 bytes (9 to 10 measured on a CPU)")},
        "update": always
        | beside
        | {
            "inputs of the layers": (passes * L * layers * hidden * 2, f"{passes} x {L} tokens x {layers} layers x {hidden} x 2 bytes")
            if s.checkpoint_layers
            else (passes * L * layers * (56 * hidden + 16 * inner), f"{passes} x {L} tokens x {layers} layers x (56 x {hidden} + 16 x {inner}) bytes"),
            "one layer recomputed": (passes * L * (56 * hidden + 16 * inner), f"{passes} x {L} tokens x (56 x {hidden} + 16 x {inner}) bytes"),
            "attention mask": (passes * L * L * 3, f"{passes} x {L} x {L} x (1 + 2) bytes"),
            "logits": (s.logits_chunk * V * 14, f"{s.logits_chunk} positions x {V} x (2 + 3 x 4) bytes"),
        },
    }  # fmt: skip


def print_memory(expected: dict[str, dict[str, tuple[int, str]]]) -> None:
    for phase, parts in expected.items():
        print(f"\n{phase}")
        for part, (size, why) in parts.items():
            print(f"  {part:22}{size / 2**30:8.2f} GiB  {why}")
        print(f"  {'together':22}{sum(size for size, _ in parts.values()) / 2**30:8.2f} GiB")
    peak = max(sum(size for size, _ in parts.values()) for parts in expected.values())
    print(f"\nexpected peak: {peak / 2**30:.1f} GiB ({peak / 1e9:.1f} GB). By arithmetic, not measured; benchmarks/gpu_24gb.py measures.")

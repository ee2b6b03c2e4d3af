"""memory.py - print the GPU memory that a training step is expected to need.

    python -m tools.memory --preset qwen3b [any flag of samr1_mini.py train]

The estimate is computed from the sizes of the models. They are built on torch's meta device, where
tensors have shapes but no data, so it downloads no weights and needs no GPU. Allocators round up
and kernels need workspace, which is not counted. `python -m benchmarks.gpu_24gb` measures.
"""

import re
import sys

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from grpo import LOGITS_AT_ONCE
from plumbing.devices import named_device
from plumbing.errors import UserError, exit_with_one_line
from plumbing.foreign import check_family
from plumbing.four_bit import check_widths
from plumbing.sam import KNOWN_SAMS, SAM_SIZES, build_sam
from plumbing.settings import Settings, parse, rollout_prompts
from plumbing.sources import place_of
from plumbing.transformers_sam import FAMILIES, open_config
from plumbing.vlm import vlm_path
from reward import DECODER_BYTES
from samr1_mini import LORA_TARGETS
from tools.published import published_config

Parts = dict[str, tuple[int, str]]  # name of a part: its bytes, and how they are computed

# NF4 with double quantisation: half a byte, a byte for a block of 64, 4 bytes for 256 blocks.
BYTES_4BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def expected_memory(s) -> dict[str, Parts]:
    """Expected GPU memory of a training step, in bytes, by phase and part.

    --dtype auto counts as bfloat16. s: `plumbing.settings.Settings`. Raises UserError.
    """
    check_spec(s.data)
    if s.device != "auto":
        named_device(s.device)
    config = published_config(vlm_path(s.vlm))
    check_family(config, s.vlm)
    if s.dtype == "4bit":
        check_widths(s.vlm == "tiny")
    text, vision = config.text_config, config.vision_config
    patch = vision.patch_size * vision.spatial_merge_size  # pixels of an image token
    if s.side % patch and not config.model_type.startswith("qwen3_vl"):
        raise UserError(f"--side {s.side}: train would refuse it: use a multiple of {patch}")
    P = (s.side // patch) ** 2 + (250 if s.prompt == "full" else 20)  # about so many text tokens
    width = 4 if s.dtype == "float32" else 2  # bytes of a number of the policy
    policy = policy_parts(s, config, width)
    sam = sam_parts(s)
    weights = policy if s.save_memory >= 3 else policy | {"SAM weights": sam["SAM weights"]}
    return {
        "rollout": weights | rollout_parts(s, text, P, width),
        "reward": policy | sam,
        "update": weights | update_parts(s, text, P, width),
    }


def check_spec(spec: str) -> None:
    """Raise UserError if `--data` cannot be trained on, whatever files there are."""
    name, _, path = spec.partition(":")
    if spec != "shapes" and not (name == "hub" and path):
        try:
            place_of(spec, "train")
        except UserError as error:
            raise UserError(f"--data {spec}: {error}") from error


def policy_parts(s, config: PretrainedConfig, width: int) -> Parts:
    """Memory of the policy's weights, `width` bytes each, and of the adapter's training."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    # The layers with an adapter are those that `plumbing.four_bit` quantises.
    linears = [m for name, m in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    matrices = [m.weight.numel() for m in linears] if s.dtype == "4bit" else []
    weights = sum(p.numel() for p in model.parameters()) - sum(matrices)
    adapter = s.lora_rank * sum(m.in_features + m.out_features for m in linears)
    held = "weight, gradient, two moments of AdamW, float32"
    parts = {
        "policy weights": (weights * width, f"{weights / 1e9:.2f}e9 weights x {width} bytes"),
        "adapter": (adapter * 16, f"{adapter / 1e6:.1f}e6 weights x 16 bytes: {held}"),
    }
    if matrices:
        size = sum(matrices)
        why = f"{size / 1e9:.2f}e9 x {BYTES_4BIT:.3f} bytes: 4 bit, and scales of blocks"
        parts["policy weights, 4 bit"] = (int(size * BYTES_4BIT), why)
        largest = max(matrices)
        parts["one matrix converted"] = (largest * width, f"{largest / 1e6:.0f}e6 x {width} bytes")
    return parts


def rollout_parts(s, text: PretrainedConfig, P: int, width: int) -> Parts:
    """Memory of sampling: prompts of P tokens, `width` bytes a number."""
    prompts = min(rollout_prompts(s), s.prompts_per_step)
    rows = prompts * s.group_size
    length = -(-(P + s.max_new_tokens) // 16) * 16  # the cache's length is a multiple of 16
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = text.num_hidden_layers
    heads = text.num_key_value_heads
    V = text.vocab_size
    token = layers * 2 * heads * head * width  # bytes of keys and values
    why = f"{layers} layers x 2 x {heads} heads x {head} x {width} bytes"
    copied = "while they are copied to the completions' rows"
    sampled = "logits, 3 tensors of sampling"
    return {
        "keys and values": (rows * length * token, f"{rows} rows x {length} tokens x {why}"),
        "keys of the prompts": (prompts * P * token, f"{prompts} x {P} tokens, {copied}"),
        "logits": (rows * V * 14, f"{rows} rows x {V} x (2 + 3 x 4) bytes: {sampled}"),
    }


def sam_parts(s) -> Parts:
    """Memory of SAM's weights and of its mask decoder. Raises UserError.

    SAM 1 is built without a download. Of a SAM 2 or SAM 3, config.json is read.
    """
    size, _, name = s.sam.partition(":")
    if size not in (*FAMILIES, *SAM_SIZES) or (not name and size != "tiny"):
        raise UserError(f"--sam {s.sam}: there is no such SAM: use {KNOWN_SAMS}")
    config = open_config(s.sam)[0] if size in FAMILIES else None
    with torch.device("meta"):
        sam = FAMILIES[size].model(config) if config else build_sam(**SAM_SIZES[size])
    weights = sum(p.numel() for p in sam.parameters())
    width = sam.prompt_encoder.no_mask_embed.weight.shape[1]
    grid = sam.prompt_encoder.image_embedding_size[0]
    # SAM 2 and 3 have a level of embeddings with an eighth of the channels and 16 times the places.
    level = 4 * width * grid**2 * (2 if config else 1)  # bytes of the largest level, float32
    maps = 15 if config else 10  # in units of an image embedding, measured on a CPU: 15, 8 to 10
    # The decoder takes as many prompts in a call as fit their embeddings into so many bytes.
    prompts = min(max(1, DECODER_BYTES["cuda"] // level), s.prompts_per_step * s.group_size)
    why = f"{prompts} prompts x {maps} maps of {width} x {grid} x {grid} x 4 bytes"
    return {
        "SAM weights": (weights * 4, f"{weights / 1e6:.0f}e6 weights x 4 bytes"),
        "SAM decoder": (prompts * maps * 4 * width * grid**2, why),
    }


def update_parts(s, text: PretrainedConfig, P: int, width: int) -> Parts:
    """Memory of a forward and backward pass over packed rows, `width` bytes a number."""
    rows = 1 if s.save_memory else s.prompts_per_step // s.minibatches  # of the pass, one a prompt
    completions = s.group_size * s.max_new_tokens  # tokens of a row's completions
    L = P + completions
    V, hidden, inner = text.vocab_size, text.hidden_size, text.intermediate_size
    tokens = f"{rows} x {L} tokens"
    # Activations of a layer: 28 numbers of hidden_size and 8 of intermediate_size for a token.
    layer = rows * L * (28 * hidden + 8 * inner) * width
    why = f"({28 * width} x {hidden} + {8 * width} x {inner}) bytes"
    layers = text.num_hidden_layers
    inputs = (layer * layers, f"{tokens} x {layers} layers x {why}")
    if s.save_memory >= 2:  # only the inputs are kept, the rest is recomputed
        size = rows * L * layers * hidden * width
        inputs = (size, f"{tokens} x {layers} layers x {hidden} x {width} bytes")
    parts = {
        "inputs of the layers": inputs,
        "attention mask": (rows * L * L * 3, f"{rows} x {L} x {L} x (1 + 2) bytes"),
    }
    # The logits are gone before the first layer is recomputed, so the larger of both counts.
    chunk = min(rows * completions, max(1, LOGITS_AT_ONCE // V))
    logits = (chunk * V * 14, f"{chunk} positions x {V} x (2 + 3 x 4) bytes")
    if layer > logits[0]:
        return parts | {"one layer recomputed": (layer, f"{tokens} x {why}")}
    return parts | {"logits": logits}


def main(argv: list[str]) -> None:
    """Print the parts of each phase, their sums, and the largest sum."""
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    s = parse(Settings, argv, program="python -m tools.memory")
    peak = 0
    for phase, parts in expected_memory(s).items():
        print(f"\n{phase}")
        for part, (size, why) in parts.items():
            print(f"  {part:22}{size / 2**30:8.2f} GiB  {why}")
        total = sum(size for size, _ in parts.values())
        print(f"  {'sum':22}{total / 2**30:8.2f} GiB")
        peak = max(peak, total)
    print(f"\nexpected peak: {peak / 2**30:.1f} GiB ({peak / 1e9:.1f} GB), computed, not measured")
    print("python -m benchmarks.gpu_24gb measures it")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

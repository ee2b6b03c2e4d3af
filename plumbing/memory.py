"""memory.py - estimate the memory of a training step.

Nothing is downloaded and nothing is allocated: the models are built on torch's meta device, where
tensors have shapes but no data. `python -m tools.memory` prints the estimate.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
)

from plumbing.sam import KNOWN_SAMS, SAM_SIZES, build_sam
from plumbing.sam2 import sam2_config

Parts = dict[str, tuple[int, str]]  # name of a part: its bytes, and how they are computed

# NF4 with double quantisation: half a byte, a byte for a block of 64, 4 bytes for 256 blocks.
BYTES_4BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)
LOGITS_AT_ONCE = 39_000_000  # as in grpo.py, which this file must not import

# The sizes of the language models, as published in their config.json. Those of Qwen3-VL-2B, and of
# its vision tower below, are also those of torchtitan's model "2B" in models/qwen3_vl.
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}


# The image encoder of SAM2-Large (SAM 2, arXiv 2408.00714; its config.json).
SAM2_LARGE = ("facebook/sam2-hiera-large", "facebook/sam2.1-hiera-large")
HIERA_LARGE = dict(
    hidden_size=144,
    num_attention_heads=2,
    blocks_per_stage=[2, 6, 36, 4],
    embed_dim_per_stage=[144, 288, 576, 1152],
    num_attention_heads_per_stage=[2, 4, 8, 16],
    window_size_per_stage=[8, 4, 16, 8],
    global_attention_blocks=[23, 33, 43],
)


def published_config(vlm: str) -> PretrainedConfig:
    """The config of a VLM, without its weights.

    For the models of the presets it is built from the published sizes, so nothing is downloaded.
    For any other name or folder it is read from config.json.
    """
    if vlm not in PUBLISHED:
        return AutoConfig.from_pretrained(vlm)
    text = PUBLISHED[vlm]
    if "Qwen3" in vlm:
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
        vision = dict(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=16,
            patch_size=16,
            spatial_merge_size=2,
            out_hidden_size=text["hidden_size"],
            deepstack_visual_indexes=[5, 11, 17],
        )
        return Qwen3VLConfig(
            text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}},
            vision_config=vision,
            tie_word_embeddings=True,
        )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        patch_size=14,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        out_hidden_size=text["hidden_size"],
    )
    return Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


@dataclass
class SamSizes:
    """The sizes of a segmenter."""

    weights: int
    width: int  # channels of the image embedding
    grid: int  # its height and width
    level: int  # bytes of the largest level of embeddings, float32
    maps: int  # memory of the decoder for a prompt, in units of the image embedding


@cache
def sam_sizes(spec: str) -> SamSizes:
    """Build the segmenter that --sam names on the meta device and read its sizes.

    Nothing is downloaded for SAM 1 and SAM2-Large. For another SAM 2 its config.json is read.
    Raises ValueError or FileNotFoundError with one line if that is impossible.
    """
    size, _, name = spec.partition(":")
    if size != "sam2" and size not in SAM_SIZES:
        raise ValueError(f"no SAM is called {size!r}: use {KNOWN_SAMS}")
    if name in SAM2_LARGE:
        backbone = Sam2HieraDetConfig(**HIERA_LARGE)
        channels = HIERA_LARGE["embed_dim_per_stage"][::-1]
        vision = dict(backbone_config=backbone, backbone_channel_list=channels)
        config = Sam2Config(vision_config=vision)
    elif size == "sam2":
        config = sam2_config(name)
    with torch.device("meta"):
        sam = Sam2Model(config) if size == "sam2" else build_sam(**SAM_SIZES[size])
    width = sam.prompt_encoder.no_mask_embed.weight.shape[1]
    grid = sam.prompt_encoder.image_embedding_size[0]
    # SAM 2 has a level with an eighth of the channels and 16 times the places. The number of maps
    # was measured on a CPU: 8 to 10 and 15.
    level, maps = (2, 15) if size == "sam2" else (1, 10)
    weights = sum(p.numel() for p in sam.parameters())
    return SamSizes(weights, width, grid, 4 * width * grid**2 * level, maps)


@dataclass
class Sizes:
    """The sizes that the estimate needs, from the settings and the models."""

    weights: int  # of the VLM that keep the dtype
    four_bit: int  # weights of the VLM in 4 bit
    matrix: int  # weights of the largest matrix in 4 bit, 0 without
    bytes: int  # of a number in the policy's dtype
    adapter: int  # weights of the LoRA adapter
    layers: int
    hidden: int
    inner: int  # width of the MLP
    vocabulary: int
    kv_heads: int
    head: int  # width of an attention head
    sam: "SamSizes"
    prompt: int  # P, tokens of a prompt
    B: int
    G: int
    T: int  # tokens of the longest completion


def read_sizes(s, vlm: str, targets: str) -> Sizes:
    """Build the VLM on the meta device and read its sizes. See `expected_memory`."""
    config = published_config(vlm)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    linears = [m for name, m in model.named_modules() if re.fullmatch(targets, name)]
    # These are also the layers that `plumbing.devices.four_bit` quantises.
    matrices = [m.weight.numel() for m in linears] if s.load_in_4bit else []
    weights = sum(p.numel() for p in model.parameters())
    image_tokens = (s.side // (vision.patch_size * vision.spatial_merge_size)) ** 2
    return Sizes(
        weights=weights - sum(matrices),
        four_bit=sum(matrices),
        matrix=max(matrices, default=0),
        bytes=4 if s.dtype == "float32" else 2,
        adapter=s.lora_rank * sum(m.in_features + m.out_features for m in linears),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        vocabulary=text.vocab_size,
        kv_heads=text.num_key_value_heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        sam=sam_sizes(s.sam),
        prompt=image_tokens + (250 if s.prompt == "full" else 20),  # about so many text tokens
        B=s.prompts_per_step,
        G=s.group_size,
        T=s.max_new_tokens,
    )


def expected_memory(s, vlm: str, targets: str) -> dict[str, Parts]:
    """Expected GPU memory of a training step, in bytes, by phase and part.

    --dtype auto counts as bfloat16. This is an estimate: allocators round up, and kernels need
    workspace.

    s:       samr1_mini.Settings.
    vlm:     name or folder of the policy.
    targets: regular expression of the names of the modules that carry an adapter.

    Raises OSError or ValueError if the config of `vlm` or of the segmenter cannot be read.
    """
    n = read_sizes(s, vlm, targets)
    adapter = f"{n.adapter / 1e6:.1f}e6 weights x 16 bytes"
    sam_weights = (n.sam.weights * 4, f"{n.sam.weights / 1e6:.0f}e6 weights x 4 bytes")
    weights = f"{n.weights / 1e9:.2f}e9 weights x {n.bytes} bytes"
    policy = {
        "policy weights": (n.weights * n.bytes, weights),
        "adapter": (n.adapter * 16, f"{adapter}: weight, gradient, two moments of AdamW, float32"),
    }
    if n.four_bit:
        policy["policy weights, 4 bit"] = (
            int(n.four_bit * BYTES_4BIT),
            f"{n.four_bit / 1e9:.2f}e9 x {BYTES_4BIT:.3f} bytes: 4 bit, and scales of blocks",
        )
        size = n.matrix * n.bytes
        policy["one matrix converted"] = (size, f"{n.matrix / 1e6:.0f}e6 x {n.bytes} bytes")
    with_sam = policy | {"SAM weights": sam_weights}
    passes = 1 if s.save_memory else n.B // s.minibatches  # prompts in a pass
    outside_reward = policy if s.save_memory >= 3 else with_sam
    return {
        "rollout": outside_reward | rollout_parts(n, s.rollout_prompts),
        "reward": with_sam | reward_parts(n),
        "update": outside_reward | update_parts(n, passes, s.save_memory >= 2),
    }


def rollout_parts(n: Sizes, rollout_prompts: int) -> Parts:
    """Memory of sampling with `rollout_prompts` prompts at a time."""
    prompts = min(rollout_prompts, n.B)
    rows = prompts * n.G
    length = -(-(n.prompt + n.T) // 16) * 16  # grpo.Decoder rounds up to a multiple of 16
    token = n.layers * 2 * n.kv_heads * n.head * n.bytes  # bytes of keys and values
    heads = f"{n.layers} layers x 2 x {n.kv_heads} heads x {n.head} x {n.bytes} bytes"
    return {
        "keys and values": (rows * length * token, f"{rows} rows x {length} tokens x {heads}"),
        "keys of the prompts": (
            prompts * n.prompt * token,
            f"{prompts} x {n.prompt} tokens, while they are copied to the completions' rows",
        ),
        "logits": (
            rows * n.vocabulary * 14,
            f"{rows} rows x {n.vocabulary} x (2 + 3 x 4) bytes: logits, 3 tensors of sampling",
        ),
    }


def reward_parts(n: Sizes) -> Parts:
    """Memory of the mask decoder. `reward.SamScorer` decodes 64 MiB of embeddings in a call."""
    sam = n.sam
    prompts = min(max(1, 2**26 // sam.level), n.B * n.G)
    why = f"{prompts} prompts x {sam.maps} maps of {sam.width} x {sam.grid} x {sam.grid} x 4 bytes"
    return {"SAM decoder": (prompts * sam.maps * 4 * sam.width * sam.grid**2, why)}


def update_parts(n: Sizes, passes: int, checkpoint_layers: bool) -> Parts:
    """Memory of a forward and backward pass over `passes` packed rows."""
    L = n.prompt + n.G * n.T
    tokens = f"{passes} x {L} tokens"
    wide = n.bytes // 2  # a layer's activations in units of 16 bit
    layer = passes * L * (56 * n.hidden + 16 * n.inner) * wide
    width = f"({56 * wide} x {n.hidden} + {16 * wide} x {n.inner}) bytes"
    inputs = (layer * n.layers, f"{tokens} x {n.layers} layers x {width}")
    if checkpoint_layers:
        inputs = (
            passes * L * n.layers * n.hidden * n.bytes,
            f"{tokens} x {n.layers} layers x {n.hidden} x {n.bytes} bytes",
        )
    V = n.vocabulary
    chunk = min(passes * n.G * n.T, max(1, LOGITS_AT_ONCE // V))
    parts = {
        "inputs of the layers": inputs,
        "attention mask": (passes * L * L * 3, f"{passes} x {L} x {L} x (1 + 2) bytes"),
    }
    # The logits are gone before the first layer is recomputed, so the larger of both counts.
    either = {
        "one layer recomputed": (layer, f"{tokens} x {width}"),
        "logits": (chunk * V * 14, f"{chunk} positions x {V} x (2 + 3 x 4) bytes"),
    }
    return parts | dict([max(either.items(), key=lambda part: part[1][0])])

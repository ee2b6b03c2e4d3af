"""random_models.py - policies of any size with random weights, without a download."""

import contextlib
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, initialization

from plumbing.vlm import vlm_path
from tools.published import published_config

# A random model writes no answers, so the rewards read this one with two numbers filled in.
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'


def tiny_processor(config):
    """The tiny model's processor with the patch size of `config`, which gets its special tokens."""
    processor = AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = processor.tokenizer
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        token = tokens.convert_tokens_to_ids(f"<|{name}|>")
        setattr(config, f"{name.removesuffix('_pad')}_token_id", token)
    config.text_config.eos_token_id = config.eos_token_id = tokens.eos_token_id
    vision = config.vision_config
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size, part.merge_size = vision.patch_size, vision.spatial_merge_size
        part.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    return processor


def medium_vlm(text: dict, vision: dict):
    """A Qwen2.5-VL with 8 layers of width 512, and its processor with patches of 14 pixels.

    text, vision: further settings of the two parts that differ from the tiny model's.
    """
    config = AutoConfig.from_pretrained(vlm_path("tiny"))
    text = text | dict(hidden_size=512, num_hidden_layers=8, layer_types=["full_attention"] * 8)
    text |= dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096)
    vision = vision | dict(out_hidden_size=512, patch_size=14, window_size=112)
    config.text_config.update(text | dict(initializer_range=0.02))
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.update(vision | dict(initializer_range=0.02))
    processor = tiny_processor(config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return model.eval(), processor


@torch.no_grad()
def fill(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module random weights on a device: matrices N(0, 0.02), norms 1, biases 0."""
    for name, old in list(module.named_parameters(recurse=False)):
        new = torch.full(old.shape, float(name != "bias"), dtype=dtype, device=device)
        if new.dim() > 1:
            new.normal_(0, 0.02)
        options = {key: x for key, x in vars(old).items() if key != "_is_hf_initialized"}
        # In 4 bit, moving the weight to its device quantises it.
        module._parameters[name] = type(old)(new, requires_grad=False, **options).to(device)


def random_model(config, dtype: torch.dtype, device: torch.device, quantization_config=None):
    """A model of this architecture with random weights, created module by module on the device.

    So it needs no memory of the host, and never more of the device than the finished model.
    quantization_config: as in `from_pretrained`. Only for 4 bit with bitsandbytes.
    """
    options = dict(dtype=dtype, attn_implementation="sdpa")
    with initialization.no_init_weights():  # uninitialised memory is reserved, but never touched
        model = AutoModelForImageTextToText.from_config(config, **options)
    if quantization_config is not None:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        kept = quantization_config.llm_int8_skip_modules
        replace_with_bnb_linear(model, kept, quantization_config)
        model.is_loaded_in_4bit = True  # this is how peft recognises it
    for module in model.modules():
        fill(module, dtype, device)
    model.tie_weights()
    return model.to(device)


@contextlib.contextmanager
def random_policy(vlm: str, device: torch.device):
    """Replace what `plumbing.vlm.load_vlm` opens by random weights."""
    config = published_config(vlm)
    processor = tiny_processor(config)

    def build(vlm, dtype, device, options):
        return processor, random_model(config, dtype, device, options.get("quantization_config"))

    with mock.patch("plumbing.vlm.open_model", build):
        yield

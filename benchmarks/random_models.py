"""random_models.py - policies of any published size with random weights, without a download."""

import contextlib
from unittest import mock

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, initialization

from plumbing.memory import published_config
from plumbing.vlm import vlm_path


def tiny_processor(config):
    """The tiny model's processor with the patch size of `config`, which gets its special tokens."""
    processor = AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = processor.tokenizer
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    for name in ("image", "video", "vision_start", "vision_end"):
        token = tokens.convert_tokens_to_ids(names.get(name, f"<|{name}|>"))
        setattr(config, f"{name}_token_id", token)
    config.text_config.eos_token_id = config.eos_token_id = tokens.eos_token_id
    vision = config.vision_config
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size, part.merge_size = vision.patch_size, vision.spatial_merge_size
        part.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    return processor


@torch.no_grad()
def fill(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module random weights on a device: matrices N(0, 0.02), norms 1, biases 0."""
    for name, old in list(module.named_parameters(recurse=False)):
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        if new.dim() > 1:
            new.normal_(0, 0.02)
        else:
            new.fill_(0.0 if name == "bias" else 1.0)
        if hasattr(old, "quant_type"):  # 4 bit: moving the weight to its device quantises it
            options = dict(requires_grad=False, quant_type=old.quant_type)
            options |= dict(compress_statistics=old.compress_statistics, module=module)
            module._parameters[name] = type(old)(new, **options).to(device)
        else:
            module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)


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
        for module in model.modules():
            if hasattr(module, "quant_state"):  # created without a dtype of its own
                module.weight.data = module.weight.data.to(dtype)
        model.is_loaded_in_4bit = True  # this is how peft recognises it
    for module in model.modules():
        fill(module, device)
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

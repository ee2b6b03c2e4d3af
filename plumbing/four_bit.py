"""four_bit.py - the language model's frozen weights in 4 bit (NF4, as in QLoRA): --dtype 4bit."""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from plumbing.errors import UserError


def four_bit(tiny: bool, dtype: torch.dtype, device: torch.device) -> dict:
    """Options of `from_pretrained` for 4 bit. Raises UserError if that is impossible here.

    dtype is that of the arithmetic: each weight matrix is converted to it where it is used. Vision
    tower, embeddings and lm_head keep 16 bits.
    """
    check_widths(tiny)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--dtype 4bit: this needs one more package: pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # also the scales of the blocks are quantised
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],  # in spite of its name for 4 bit too
    )
    return dict(quantization_config=config, device_map={"": device})


def check_widths(tiny: bool) -> None:
    if tiny:
        raise UserError(
            "--dtype 4bit: the tiny model's widths cannot be divided by 64: leave it out"
        )


def keep_gradients(model: torch.nn.Module) -> None:
    """Switch off a kernel of bitsandbytes for CPUs that has no backward pass.

    After a forward pass in eval mode it would serve in training too, and drop the gradient of the
    layers' inputs without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

"""devices.py - on which device, and in which dtype, a run computes."""

import contextlib
import sys

import torch
from tqdm import tqdm

from plumbing.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that --device names. Raises UserError if it cannot be used.

    "cuda:1" becomes torch's current device, so that streams, graphs and memory statistics, which
    are those of the current device, are of that card too.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    device = named_device(name)
    cards = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= cards:
        raise UserError(f"--device {name}: there are {cards} CUDA devices here, numbered from 0")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"--device {name}: it is not there, or full ({error})") from error
    torch.set_flush_denormal(True)  # on a CPU, arithmetic with denormal numbers is very slow
    return device


def named_device(name: str) -> torch.device:
    """The device of this name, which may not be there. Raises UserError if it is of no use."""
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type in ("cpu", "cuda", "mps"):
            return device
    raise UserError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether attention in bfloat16 has a fused kernel there: compute capability 8.0, or no GPU.

    Older cards fall back to plain matrix products, which need much more memory.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_dtype(name: str, device: torch.device, tiny: bool) -> torch.dtype:
    """The dtype that --dtype names, for the arithmetic of the policy and the weights not in 4 bit.

    auto and 4bit are bfloat16 on a GPU and float32 elsewhere. On a GPU without fast attention in
    bfloat16 it is float32 for the tiny model. For a larger one, UserError names the ways out.
    """
    if name in ("float16", "float32"):
        return getattr(torch, name)
    if name != "bfloat16" and device.type != "cuda":
        return torch.float32
    if fast_bfloat16(device):
        return torch.bfloat16
    version = ".".join(map(str, torch.cuda.get_device_capability(device)))
    reason = f"this GPU (compute capability {version}, below 8.0) has no fast bfloat16 attention"
    if tiny and name == "auto":
        tqdm.write(f"{reason}: computing in float32", file=sys.stderr)
        return torch.float32
    raise UserError(
        f"--dtype {name}: {reason}: use float16, which may overflow, or float32, which takes twice "
        "the memory"
    )


def half_precision(device: torch.device) -> torch.dtype:
    """The 16-bit dtype for which attention has a fused kernel on this device."""
    return torch.bfloat16 if fast_bfloat16(device) else torch.float16


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor without making the host wait for a CUDA device.

    CUDA reads ordinary host memory before the call returns. MPS does not: there, the memory could
    be used again before it is read.
    """
    return x.to(device, non_blocking=device.type == "cuda")


def clipped_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float
) -> torch.Tensor:
    """Clip the norm of all gradients together, update the weights, and set the gradients to zero.

    Returns the norm before clipping. scaler: has scaled the loss, if the policy is in float16. It
    skips the update if a gradient overflowed. Otherwise it does nothing.
    """
    scaler.unscale_(optimizer)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm

"""weights.py - open weights that other people made. What does not fit is refused, never used in
part: libraries load the keys that they know, and leave the others random or untrained.
"""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open
from transformers.utils import logging

from plumbing.errors import UserError, reason_of, refusing

POINTER = b"version https://git-lfs"  # how the small file begins that stands for a large one
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def fault_of(file: Path) -> str:
    """What is wrong with a file: a git-lfs pointer, nothing in it, or damaged. "" if nothing is."""
    with open(file, "rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        return "is a git-lfs pointer, not the file that it stands for: run `git lfs pull`"
    if not start:
        return "is empty: fetch it again"
    types = set()
    try:
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".bin":
            held = torch.load(file, map_location="meta", weights_only=True)  # reads no numbers
            types = {x.dtype for x in dict(held).values() if isinstance(x, torch.Tensor)}
        elif file.suffix == ".safetensors":
            # This reads the header, and compares it with the size.
            with safe_open(file, "pt") as opened:
                types = {part.get_dtype() for part in map(opened.get_slice, opened.keys())}
    except Exception as error:  # a damaged file can raise anything; this block only reads
        return f"is damaged or truncated: fetch it again ({reason_of(error)})"
    if any(map(is_quantised, types)):  # would be read without their scale
        return "holds quantised weights, which are not read: fetch those in float"
    # Some programs give a file its final size first, and write the data later. An adapter may end
    # in zeros: so do the weights of an untrained one.
    if file.suffix == ".safetensors" and file.name not in ADAPTER_FILES and not any(end_of(file)):
        return "ends in zeros: its download was interrupted: fetch it again"
    return ""


def is_quantised(kind: str | torch.dtype) -> bool:
    """Whether numbers of a type, as a .safetensors or torch calls it, take a byte or less.

    >>> is_quantised("F8_E4M3"), is_quantised(torch.float8_e5m2fnuz), is_quantised("BF16")
    (True, True, False)
    """
    if isinstance(kind, str):
        return kind.startswith(("I8", "U8", "F8", "F6", "F4"))
    return kind.itemsize == 1 and kind != torch.bool


def end_of(file: Path, size: int = 4096) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(-min(size, file.stat().st_size), os.SEEK_END)
        return opened.read()


def read_tensors(file: Path, flag: str) -> dict:
    """What a .safetensors file or a pickle of torch holds, in host memory. flag: for messages.

    Raises UserError if it cannot be read.
    """
    if not file.is_file():
        raise UserError(f"{flag}: there is no file {file}")
    why = "it is truncated, or holds something else than tensors: fetch it again"
    unread = f"{flag}: {file} cannot be read as weights"
    with refusing(lambda error: f"{unread} ({type(error).__name__}): {why}"):
        if fault := fault_of(file):
            raise UserError(f"{flag}: {file} {fault}")
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(file)
        else:  # weights_only: a downloaded pickle could run any code; this reads only tensors
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict):
        raise UserError(f"{flag}: {file} holds a {type(tensors).__name__}, not named weights")
    return {str(key): value for key, value in tensors.items()}


def adapter_file(folder: Path, flag: str) -> Path:
    """The file with the weights of an adapter. Raises UserError if there is none."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{flag}: there is no {ADAPTER_FILES[0]} in {folder}: fetch it too")


def find_model(name: str, flag: str) -> tuple[str, dict]:
    """Where a model of transformers is, a folder or a hub name, and options of `from_pretrained`.

    Raises UserError at once if there is none: without a network, transformers would ask the hub
    for minutes. What is in the cache is used.
    """
    options = {"trust_remote_code": False}  # else a terminal is asked whether to run the model's
    folder = Path(name).expanduser()
    if folder.is_dir():
        # .json, .jinja and the weights: the libraries read some of them without noticing.
        held = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
        for file in sorted([*folder.glob("*.j*"), *held]):
            if file.is_file() and (fault := fault_of(file)):
                raise UserError(f"{flag}: {file.name} {fault}")
        return str(folder), options
    if folder.exists():
        raise UserError(f"{flag}: this is a file: name the folder of a model")
    if name.startswith((".", "/", "~")):
        raise UserError(f"{flag}: there is no such folder")
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{flag}: the hub has no model of this name, or not for you ({reason_of(error)})"
        ) from error
    except HfHubHTTPError:
        pass  # an answer all the same: the files may be there
    except Exception:  # no answer: which exceptions these packages raise depends on their versions
        options["local_files_only"] = True
    return name, options


def unreadable(path: str, error: Exception, mend: str = "") -> str:
    """Why a model could not be opened, and the mend.

    The reason is a refusal of the hub, the file of its folder that is at fault, or else the error.
    """
    if isinstance(error.__cause__, GatedRepoError):
        return (
            "the hub gives it to accounts with access only: ask for access on "
            f"https://huggingface.co/{path}, then run `hf auth login`"
        )
    mend = mend and f": {mend}"
    if Path(path).is_dir():
        for file in sorted(Path(path).iterdir()):
            if file.is_file() and file.name[0] != "." and (fault := fault_of(file)):
                return f"{file.name} {fault}{mend}"
    return f"it cannot be loaded ({reason_of(error)}){mend}"


def load_model(kind: type, path: str, flag: str, mend: str, unknown: bool, options: dict):
    """A model of transformers, with all of its weights. Raises UserError or anything.

    kind: its class. unknown: whether the files may hold more. options: of `from_pretrained`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # `check_keys` reports the keys
    try:
        model, info = kind.from_pretrained(
            path, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    check_keys(
        missing=info["missing_keys"],
        unknown=() if unknown else info["unexpected_keys"],
        sizes={key: (given, expected) for key, given, expected in info["mismatched_keys"]},
        what=flag,
        mend=mend,
    )
    return model


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def compare(
    expected: dict[str, torch.Size], given: dict[str, torch.Size], what: str, mend: str
) -> None:
    """Raise UserError if the given weights are not exactly the expected ones.

    >>> compare({"a": (1, 2), "b": (3,)}, {"a": (1, 3), "c": (3,)}, "--adapter A", "train another")
    Traceback (most recent call last):
    plumbing.errors.UserError: --adapter A: it lacks 1 of its weights (b), has 1 that the model \
does not have (c), has 1 in another size (a: 1 x 3 in place of 1 x 2): train another
    """
    both = expected.keys() & given.keys()
    check_keys(
        missing=expected.keys() - both,
        unknown=given.keys() - both,
        sizes={key: (given[key], expected[key]) for key in both if given[key] != expected[key]},
        what=what,
        mend=mend,
    )


def check_keys(missing: Collection, unknown: Collection, sizes: dict, what: str, mend: str):
    """Raise UserError if a key is missing, unknown, or its weight has another size.

    sizes: the given and the expected shape of each weight of another size.
    """
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} of its weights ({min(missing)})")
    if unknown:
        faults.append(f"has {len(unknown)} that the model does not have ({min(unknown)})")
    if sizes:
        key = min(sizes)
        given, expected = (" x ".join(map(str, shape)) for shape in sizes[key])
        faults.append(f"has {len(sizes)} in another size ({key}: {given} in place of {expected})")
    if faults:
        raise UserError(f"{what}: it {', '.join(faults)}: {mend}")


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str, mend: str) -> None:
    """Raise UserError if a weight is no tensor of floating-point numbers, or one of them is NaN or
    infinite. float8 is refused too: it stands for numbers only with a scale, which is not read.

    tensors: names and weights, on one device.

    The sum shows it, without a second tensor of the size of the weight.
    """
    sums = {}
    for name, tensor in tensors:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        number = getattr(kind, "is_floating_point", False) and kind.itemsize > 1  # not float8
        if not number or tensor.is_meta or tensor.is_sparse:
            raise UserError(f"{what}: {name} ({kind}) holds no floating-point numbers: {mend}")
        sums[name] = tensor.detach().sum(dtype=torch.float32)
    if not sums:
        return
    finite = torch.stack(list(sums.values())).isfinite().tolist()  # one wait for a GPU
    bad = [name for name, good in zip(sums, finite, strict=True) if not good]
    if bad:
        raise UserError(f"{what}: {len(bad)} weights are not finite ({bad[0]}): {mend}")

"""merge.py - merge a trained adapter into its base model.

    python -m tools.merge --adapter RUN/adapter --out FOLDER [--vlm NAME]

Writes one model folder that plain transformers loads, without peft. The base model is the one that
RUN/config.json names, or --vlm. The weights keep the dtype of the base model.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from plumbing.errors import UserError, exit_with_one_line, reason_of
from plumbing.runs import share_weights
from plumbing.vlm import load_adapter, open_model


def merge(vlm: str, adapter: Path, out: Path) -> None:
    """Merge the adapter in the folder `adapter` into the model `vlm`, and save it to `out`.

    `out` is complete or not there. It is read again and compared with the adapter, because not
    every adapter can be merged: an lm_head that shares its weights with the input embeddings would
    change these too. Raises UserError.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    processor, model = open_model(vlm, "auto", "cpu", options={})
    inputs = one_prompt(processor)
    base = logits(model, inputs)
    trained = load_adapter(model, str(adapter))
    expected = logits(trained, inputs)
    with warnings.catch_warnings(action="ignore"):  # of tied weights: `check_same` decides
        merged = trained.merge_and_unload()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as folder:
            written = Path(folder) / "model"
            merged.save_pretrained(written)
            processor.save_pretrained(written)
            share_weights(written)
            del model, trained, merged  # two of them may not fit into memory
            _, again = open_model(str(written), "auto", "cpu", options={})
            check_same(logits(again, inputs), expected, base, again.dtype, f"--adapter {adapter}")
            os.replace(written, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written ({reason_of(error)})") from error


def one_prompt(processor) -> dict[str, torch.Tensor]:
    """A prompt with an image, so that no layer is left out."""
    content = [{"type": "image"}, {"type": "text", "text": "find the red square on the left"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template([chat], tokenize=False, add_generation_prompt=True)
    image = Image.linear_gradient("L").convert("RGB")  # 256 x 256
    return processor(text=text, images=[image], return_tensors="pt")


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits.float()


def check_same(merged, adapter, base, dtype: torch.dtype, flag: str) -> None:
    """Raise UserError if the merged model's logits are not the adapter's. base: without it.

    The weights are rounded to `dtype` once more, so the logits differ a little.
    """
    rounding = max(1e-4, 4 * torch.finfo(dtype).eps) * adapter.norm()
    difference = merged - adapter
    if not difference.norm() <= 0.1 * (adapter - base).norm() + rounding:
        largest = difference.abs().max()
        raise UserError(
            f"{flag}: it cannot be merged: the logits of the merged model differ by {largest:.2g} "
            "(an adapter of a tied lm_head?): use the adapter itself"
        )


def base_of_run(adapter: Path) -> str:
    """The --vlm of the run whose adapter this is. Raises UserError if it is not known."""
    try:
        return str(json.loads((adapter.resolve().parent / "config.json").read_bytes())["vlm"])
    except (OSError, ValueError, LookupError, TypeError) as error:  # or the config of a model
        raise UserError(f"--adapter {adapter}: no run is beside it: name the --vlm") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge", description="Merge a trained adapter into its base model."
    )
    parser.add_argument("--adapter", type=Path, required=True, help="such as RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--vlm", help="base model (default: that of the run): tiny, name or folder")
    args = parser.parse_args(argv)
    args.adapter = args.adapter.expanduser()
    args.out = args.out.expanduser()
    merge(args.vlm or base_of_run(args.adapter), args.adapter, args.out)
    print(f"written to {args.out}: load it with AutoModelForImageTextToText and AutoProcessor")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

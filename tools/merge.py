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

from plumbing.errors import UserError, exit_with_one_line, reason_of, refusing
from plumbing.foreign import load_adapter
from plumbing.runs import share_weights
from plumbing.vlm import open_model


def merge(vlm: str, adapter: Path, out: Path) -> None:
    """Merge the adapter in the folder `adapter` into the model `vlm`, and save it to `out`.

    `out` is complete or not there. It is read again and its logits are compared with the adapter's,
    because not every adapter can be merged: an lm_head that shares its weights with the input
    embeddings would change these too. Raises UserError.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    processor, model = open_model(vlm, "auto", "cpu", options={})
    # With an image, so that no layer is left out.
    text = f"{processor.image_token}find the red square on the left"
    image = Image.linear_gradient("L").convert("RGB")  # 256 x 256
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    base = logits(model, inputs)
    trained = load_adapter(model, str(adapter))
    expected = logits(trained, inputs)
    with warnings.catch_warnings(action="ignore"):  # of tied weights: `difference` decides
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
            difference = logits(again, inputs) - expected
            # The weights are rounded to their dtype once more, so the logits differ a little.
            rounding = max(1e-4, 4 * torch.finfo(again.dtype).eps) * expected.norm()
            if not difference.norm() <= 0.1 * (expected - base).norm() + rounding:
                raise UserError(
                    f"--adapter {adapter}: it cannot be merged: logits of the merged model differ "
                    f"by {difference.abs().max():.2g} (an adapter of a tied lm_head?): use the "
                    "adapter itself"
                )
            os.replace(written, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written ({reason_of(error)})") from error


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits.float()


def base_of_run(adapter: Path) -> str:
    """The --vlm of the run whose adapter this is. Raises UserError if it is not known."""
    # Without the file, or if it is the config of a model:
    with refusing(lambda _: f"--adapter {adapter}: no run is beside it: name the --vlm"):
        return str(json.loads((adapter.resolve().parent / "config.json").read_bytes())["vlm"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.merge", description="Merge a trained adapter."
    )
    parser.add_argument("--adapter", type=Path, required=True, help="such as RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--vlm", help="base model (default: that of the run): tiny, name or folder")
    args = parser.parse_args(argv)
    adapter = args.adapter.expanduser()
    out = args.out.expanduser()
    merge(args.vlm or base_of_run(adapter), adapter, out)
    print(f"written to {out}: load it with AutoModelForImageTextToText and AutoProcessor")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

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
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from plumbing.errors import UserError, exit_with_one_line, reason_of
from plumbing.runs import share_weights
from plumbing.vlm import load_adapter, vlm_path


def merge(vlm: str, adapter: Path, out: Path) -> None:
    """Merge the adapter in the folder `adapter` into the model `vlm`, and save it to `out`.

    `out` is complete or not there. Raises UserError.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    try:
        processor = AutoProcessor.from_pretrained(vlm_path(vlm))
        model = AutoModelForImageTextToText.from_pretrained(vlm_path(vlm), dtype="auto")
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"--vlm {vlm}: it cannot be loaded ({reason_of(error)})") from error
    merged = load_adapter(model, str(adapter)).merge_and_unload()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as folder:
            merged.save_pretrained(Path(folder) / "model")
            processor.save_pretrained(Path(folder) / "model")
            share_weights(Path(folder) / "model")
            os.replace(Path(folder) / "model", out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written ({reason_of(error)})") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge", description="Merge a trained adapter into its base model."
    )
    parser.add_argument("--adapter", type=Path, required=True, help="such as RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--vlm", help="base model (default: that of the run): tiny, name or folder")
    args = parser.parse_args(argv)
    config = args.adapter.resolve().parent / "config.json"
    if not args.vlm and not config.is_file():
        raise UserError(f"--adapter {args.adapter}: no run is beside it: name the --vlm")
    merge(args.vlm or json.loads(config.read_text())["vlm"], args.adapter, args.out)
    print(f"written to {args.out}: load it with AutoModelForImageTextToText and AutoProcessor")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

"""merge.py - merge a trained adapter into its base model.

    python -m tools.merge --adapter RUN/adapter --out FOLDER [--vlm NAME]

Writes one model folder that plain transformers loads, without peft. The base model is the one that
RUN/config.json names, or --vlm. The weights keep the dtype of the base model.
"""

import argparse
import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from plumbing.command_line import exit_on_error
from plumbing.vlm import vlm_path


def base_model(adapter: Path) -> str:
    """The `vlm` setting of the run that wrote an adapter. Raises ValueError if it is unknown."""
    config = adapter.resolve().parent / "config.json"
    if not config.is_file():
        raise ValueError(f"{config} does not exist: name the base model with --vlm")
    return json.loads(config.read_text())["vlm"]


def merge(vlm: str, adapter: Path, out: Path) -> None:
    """Merge the adapter in the folder `adapter` into the model `vlm`, and save it to `out`."""
    with exit_on_error(f"--out {out}"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError("it exists and is not an empty folder: name another one")
    with exit_on_error(f"--vlm {vlm}"):
        processor = AutoProcessor.from_pretrained(vlm_path(vlm))
        model = AutoModelForImageTextToText.from_pretrained(vlm_path(vlm), dtype="auto")
    with exit_on_error(f"--adapter {adapter}"):
        model = PeftModel.from_pretrained(model, adapter)
    with exit_on_error(f"--out {out}"):
        model.merge_and_unload().save_pretrained(out)
        processor.save_pretrained(out)
    print(f"written to {out}: load it with AutoModelForImageTextToText and AutoProcessor")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge", description="Merge a trained adapter into its base model."
    )
    parser.add_argument("--adapter", type=Path, required=True, help="such as RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--vlm", help="base model (default: that of the run): tiny, name or folder")
    options = parser.parse_args(argv)
    with exit_on_error(f"--adapter {options.adapter}"):
        if not (options.adapter / "adapter_config.json").is_file():
            raise ValueError("it has no adapter_config.json: name a folder such as RUN/adapter")
        vlm = options.vlm or base_model(options.adapter)
    merge(vlm, options.adapter, options.out)


if __name__ == "__main__":
    main()

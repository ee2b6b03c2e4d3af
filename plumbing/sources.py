"""sources.py - open the data set that `--data` names."""

from pathlib import Path

from data import ReasonSeg, RefCOCO, Shapes
from plumbing.errors import UserError
from plumbing.photos import SPLITS


def load_data(spec: str, split: str, samples: int = 3000):
    """Open the data set that `--data` names.

    spec:    "shapes", or NAME:ROOT or NAME:ROOT/SPLIT, where NAME is a key of `SPLITS`, or
             hub:NAME[@ROOT], see plumbing/hub.py.
    split:   "train" opens train, and refuses any other SPLIT: the evaluation after training would
             be of the same samples. "heldout" (for evaluation) opens SPLIT, or val if SPLIT is
             train or absent.
    samples: number of scenes or expressions to train on (paper: 3,000). Evaluation uses all.

    Returns a data set with len() and [index], which returns a `data.Sample` or raises
    `data.BadSample`. Raises UserError with one line that starts with "--data SPEC: ".
    """
    try:
        if spec == "shapes":
            return Shapes("train", size=samples) if split == "train" else Shapes(split)
        if spec.startswith("hub:") and spec != "hub:":
            from plumbing.hub import open_hub  # few runs need it, and its imports take time

            return open_hub(spec.removeprefix("hub:"), split, samples)
        return open_folder(spec, split, samples)
    except UserError as error:
        raise UserError(f"--data {spec}: {error}") from error


def check_spec(spec: str) -> None:
    """Raise UserError if `--data` cannot be trained on, whatever files there are."""
    name, _, path = spec.partition(":")
    if spec != "shapes" and not (name == "hub" and path):
        try:
            place_of(spec, "train")
        except UserError as error:
            raise UserError(f"--data {spec}: {error}") from error


def open_folder(spec: str, split: str, samples: int) -> RefCOCO | ReasonSeg:
    """Open NAME:ROOT or NAME:ROOT/SPLIT, see `load_data`."""
    name, root, part = place_of(spec, split)
    if name == "reasonseg":
        return ReasonSeg(root, part)
    return RefCOCO(name, root, part, samples if split == "train" else None)


def place_of(spec: str, split: str) -> tuple[str, Path, str]:
    """The name, the root folder and the split of NAME:ROOT or NAME:ROOT/SPLIT."""
    name, _, path = spec.partition(":")
    if name not in SPLITS or not path:
        names = ", ".join(f"{one}:ROOT" for one in SPLITS)
        raise UserError(f"there is no such data set: use shapes, {names}, or hub:NAME")
    root = Path(path).expanduser()
    part = "train"
    # ROOT/val means split val of ROOT, unless ROOT/val is itself a root folder.
    inside = SPLITS[name] if name == "reasonseg" else [name]
    names = {one for splits in SPLITS.values() for one in splits}
    if root.name in names and not any((root / folder).is_dir() for folder in inside):
        part = root.name
        root = root.parent
    if part not in SPLITS[name]:
        raise UserError(f"{name} has no split {part}: use {', '.join(SPLITS[name])}")
    if split == "train" and part != "train":
        raise UserError(f"split {part} is for evaluation only: train on {name}:{root}")
    if split == "heldout" and part == "train":
        part = "val"
    return name, root, part

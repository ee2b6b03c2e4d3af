"""hub.py - data sets in the columns of Seg-Zero's, from Hugging Face's hub: --data hub:NAME[@ROOT].

NAME is OWNER/SET, or a local folder with parquet files. There are two sorts:

    hub:Ricky06662/ReasonSeg_test, ReasonSeg_val, refcoco_val, refcoco_testA, refcocoplus_val,
        refcocoplus_testA, refcocog_val, refcocog_test
        have masks and are for `eval`. Pixels that ReasonSeg ignores are target in them.
    hub:Ricky06662/refCOCOg_9k_840@ROOT, refCOCOg_2k_840@ROOT
        are for `train` and have no masks. ROOT/refcocog/instances.json has them (REFER's).

Held out from training: REFER's val if its files are in ROOT, else the rows on every 20th image.
Those rows are never trained on, so downloading val later does not change the training rows.
"""

import io
import random
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import BadSample, RefCOCO, Sample
from plumbing.errors import UserError, reason_of, refusing
from plumbing.photos import check_query, coco_mask, decode_image, foreign, read_instances

MASKED = ("image", "text", "mask", "image_id", "ann_id", "img_height", "img_width")
JOINED = ("id", "problem", "image", "img_height", "img_width")
EVERY = 20  # a row is held out if COCO's image id is a multiple of this: about 5 %


def open_hub(path: str, split: str, samples: int):
    """Open what follows "hub:" in --data. Arguments and errors: `plumbing.sources.load_data`."""
    name, at, root = path.rpartition("@")
    if at and not Path(path).expanduser().is_dir():  # a folder may have an @ in its name
        return open_training(name, Path(root).expanduser(), split, samples)
    if split == "train":
        raise UserError(
            "sets with masks of their own are for eval. Train on refcocog:ROOT, or on "
            "hub:Ricky06662/refCOCOg_9k_840@ROOT, where ROOT has REFER's refcocog"
        )
    return MaskedRows(path, open_table(path, MASKED, "test"))


def open_table(name: str, needed: tuple[str, ...], part: str):
    """Open a set with `datasets`, which downloads, resumes and caches. [index] gives Arrow data.

    needed: columns that it must have. part: the split to read if the set has several.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"hub: sets need a package ({error}). Run: pip install datasets") from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name} is neither a folder nor OWNER/SET, as on the hub")
    unfit = f"{name} cannot be opened as a set"
    mend = (
        "Check its name. Run it again to resume a download, or set HF_HUB_OFFLINE=1 to open one "
        "from before"
    )
    with refusing(lambda error: f"{unfit} ({reason_of(error)}). {mend}"):
        if not folder.is_dir() and not datasets.config.HF_HUB_OFFLINE:
            # `datasets` finds out as well, but without a network it tries for half a minute.
            HfApi().dataset_info(name, timeout=10)
        if (folder / "state.json").is_file():  # `save_to_disk` wrote the folder
            table = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(name)
            if builder.info.features:  # the hub knows them before the download
                check_columns(name, builder.info.features, needed)
            parts = [str(one) for one in builder.config.data_files or [part]]
            table = datasets.load_dataset(name, split=parts[0] if len(parts) == 1 else part)
        check_columns(name, table.features, needed)
    return table.with_format("arrow")


def check_columns(name: str, columns: dict, needed: tuple[str, ...]) -> None:
    """Raise UserError if a set lacks a column. The other sort of set gets a hint."""
    if lacking := ", ".join(column for column in needed if column not in columns):
        hint = ""
        if needed == MASKED and columns.keys() >= set(JOINED):
            hint = f". It has no masks: name REFER's folder, hub:{name}@ROOT"
        if needed == JOINED and columns.keys() >= set(MASKED):
            hint = ". It has masks: leave @ROOT out"
        raise UserError(f"{name} lacks {lacking}: its columns are {', '.join(columns)}{hint}")


def read_row(row, columns: Iterable[str]) -> dict:
    """Some cells of a row, its image decoded and rotated as its EXIF data say."""
    (cells,) = row.select(list(columns)).to_pylist()
    return cells | {"image": decode_image(io.BytesIO(cells["image"]["bytes"]))}


def mask_of(row) -> np.ndarray:
    """The mask of a row, (H, W) bool, without H x W Python objects, which would be slow."""
    lines = row["mask"][0].values.to_numpy(zero_copy_only=False)  # H arrays of W bools
    mask = np.stack(lines)  # refuses lines that differ in length
    if mask.dtype != bool:
        raise ValueError("its mask is not a list of lists of bool")
    return mask


@dataclass
class MaskedRows:
    """An evaluation set: [index] decodes one row, and returns a `Sample` or raises `BadSample`.

    The right answer to an empty mask, as in ReasonSeg, is an empty mask.
    """

    name: str
    table: object  # as `open_table` returns it

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        row = self.table[index]
        with foreign(f"{self.name}, row {index}", kind=BadSample):
            cells = read_row(row, [name for name in MASKED if name != "mask"])
            image = cells["image"]
            mask = mask_of(row)
            sizes = {image.size, mask.shape[::-1], (cells["img_width"], cells["img_height"])}
            if len(sizes) > 1:
                raise ValueError(f"image, mask and img_width, img_height differ in size: {sizes}")
            key = f"{Path(self.name).name}-{index}-{cells['image_id']}-{cells['ann_id']}"
            return Sample(image, check_query(cells["text"]), mask, None, key)


@dataclass
class JoinedRows:
    """Rows of a training set with their masks. [index] as in `MaskedRows`.

    The set's images have 840 x 840 pixels. They are resized to the original size, which COCO's
    masks have, so that SAM gets the true aspect ratio.
    """

    name: str
    table: object
    rows: list[tuple]  # (row number, (width, height) and segmentation of its annotation)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        number, (width, height), segmentation = self.rows[index]
        with foreign(f"{self.name}, row {number}", kind=BadSample):
            cells = read_row(self.table[number], JOINED)
            if (cells["img_width"], cells["img_height"]) != (width, height):
                raise ValueError(f"its annotation is for an image of {width} x {height} pixels")
            mask = coco_mask(segmentation, width, height)
            if not mask.any():
                raise ValueError("the area of its mask is zero")
            image = cells["image"].resize((width, height))
            key = f"{Path(self.name).name}-{cells['id']}"
            return Sample(image, check_query(cells["problem"]), mask, None, key)


def open_training(name: str, root: Path, split: str, samples: int):
    """`samples` training rows, chosen at random, or what is held out."""
    reason = ""
    if split == "heldout":
        try:
            return RefCOCO("refcocog", root, "val")
        except UserError as error:
            reason = str(error)
    file = root / "refcocog" / "instances.json"
    images, annotations = read_instances(file, f"python -m tools.fetch refcocog --out {root}")
    table = open_table(name, JOINED, "train")
    rows = []
    ids = table.select_columns("id")[:]["id"].to_pylist()
    for number, row_id in enumerate(ids):
        digits = re.search(r"\d{1,18}$", str(row_id))  # a row's id ends in COCO's annotation id
        image_id, segmentation = annotations.get(int(digits[0]) if digits else None, (None, None))
        if segmentation and image_id in images:
            _, size = images[image_id]
            rows.append((image_id, (number, size, segmentation)))
    if not rows:
        raise UserError(f"no id of {name}, such as {ids[:1]!a:.60}, ends in one of {file}")
    if len(rows) < len(ids):
        note = f"skipped: {len(ids) - len(rows)} of {len(ids)} rows of {name} have no annotation"
        tqdm.write(f"{note} in {file}", file=sys.stderr)
    chosen = [row for image_id, row in rows if (image_id % EVERY == 0) == (split == "heldout")]
    if not chosen:
        raise UserError(f"{name} has no row for {split}. {reason}")
    if split == "heldout":
        tqdm.write(f"held out: {len(chosen)} rows of {name}, because {reason}", file=sys.stderr)
        return JoinedRows(name, table, chosen)
    rng = random.Random("0")
    chosen.sort(key=lambda _: rng.random())  # as in `data.subsample`
    return JoinedRows(name, table, chosen[:samples])

"""hub.py - data sets in the columns of Seg-Zero's, from Hugging Face's hub: --data hub:NAME[@ROOT].

NAME is OWNER/SET, or a local folder with parquet files. The package `datasets` opens both. It
downloads, resumes and caches. There are two sorts:

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
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import BadSample, Sample
from plumbing.photos import (
    UNREADABLE,
    RefCOCO,
    check_query,
    coco_mask,
    decode_image,
    read_instances,
    reason_of,
)

MASKED = ("image", "text", "mask", "image_id", "ann_id", "img_height", "img_width")
JOINED = ("id", "problem", "image", "img_height", "img_width")
EVERY = 20  # a row is held out if COCO's image id is a multiple of this: about 5 %
BROKEN = (*UNREADABLE, SyntaxError, Image.DecompressionBombError)


def open_hub(path: str, split: str, seed: int, samples: int):
    """Open what follows "hub:" in --data. See `plumbing.photos.load_data` for the arguments.

    Raises ValueError or FileNotFoundError with one line.
    """
    name, root = split_root(path)
    if root is not None:
        return open_training(name, root, split, seed, samples)
    if split == "train":
        raise ValueError(
            "sets with masks of their own are for eval. Train on refcocog:ROOT, or on "
            "hub:Ricky06662/refCOCOg_9k_840@ROOT, where ROOT has REFER's refcocog"
        )
    return MaskedRows(name, open_table(name, MASKED, "test"))


def split_root(path: str) -> tuple[str, str | None]:
    """NAME and ROOT of NAME[@ROOT]. A folder may have an @ in its name."""
    name, at, root = path.rpartition("@")
    if not at or Path(path).expanduser().is_dir():
        return path, None
    return name, root


# --------------------------------------------------------------------------------------------------
# Opening a table
# --------------------------------------------------------------------------------------------------


def open_table(name: str, needed: tuple[str, ...], part: str):
    """Open a set with `datasets`, which downloads it if needed. [index] gives a row of Arrow data.

    needed: columns that it must have. part: the split to read if the set has several.

    The columns are checked before the download if the hub knows them, and after it in any case.
    """
    try:
        import datasets
    except ImportError as error:
        reason = f"hub: sets need a package ({error})"
        raise ValueError(f"{reason}. Run: pip install datasets") from error
    if (folder := Path(name).expanduser()).is_dir():
        name = str(folder)
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"{name} is neither a folder nor OWNER/SET, as on the hub")
    elif not datasets.config.HF_HUB_OFFLINE:
        find_on_the_hub(name)
    try:
        builder = datasets.load_dataset_builder(name)
        splits = [str(one) for one in getattr(builder.config, "data_files", None) or [part]]
    except Exception as error:  # which exceptions it raises depends on its version
        raise ValueError(f"{name} cannot be opened as a set: {reason_of(error)}") from error
    check_columns(name, builder.info.features, needed)
    if part not in splits and len(splits) > 1:
        raise ValueError(f"{name} has no split {part}: it has {', '.join(splits)}")
    try:
        table = datasets.load_dataset(name, split=part if part in splits else splits[0])
    except Exception as error:
        again = "Run it again to resume a download; delete broken files of a local folder"
        raise ValueError(f"{name} cannot be read ({reason_of(error)}). {again}") from error
    check_columns(name, table.features, needed)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    return table.with_format("arrow")


def find_on_the_hub(name: str) -> None:
    """Raise ValueError if the hub has no set of this name or cannot be reached.

    `datasets` finds out as well, but it tries for half a minute when there is no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no public set {name}: check the name, or log in") from error
    except Exception as error:  # of the network
        offline = "Set HF_HUB_OFFLINE=1 to open a set that was downloaded before"
        raise ValueError(f"the hub cannot be reached ({reason_of(error)}). {offline}") from error


def check_columns(name: str, features: dict | None, needed: tuple[str, ...]) -> None:
    """Raise ValueError if columns are missing, or if `mask` is no list of lists of bool."""
    if features is None:  # they are unknown before the files are read
        return
    if lacking := [column for column in needed if column not in features]:
        hint = ""
        if needed == MASKED and set(JOINED) <= set(features):
            hint = f". It has no masks: name REFER's folder, hub:{name}@ROOT"
        if needed == JOINED and set(MASKED) <= set(features):
            hint = ". It has masks: leave @ROOT out"
        columns = ", ".join(sorted(features))
        raise ValueError(f"{name} lacks {', '.join(lacking)}: its columns are {columns}{hint}")
    if "mask" in needed:
        kind = features.arrow_schema.field("mask").type
        if not re.fullmatch(r"(large_)?list<\w+: (large_)?list<\w+: bool>>", str(kind)):
            raise ValueError(f"{name}: its mask is {kind}, not a list of lists of bool")


# --------------------------------------------------------------------------------------------------
# Reading rows
# --------------------------------------------------------------------------------------------------


def image_of(row) -> Image.Image:
    """Decode the image of a row, rotated as its EXIF data say, as `datasets` does."""
    cell = row["image"][0].as_py()
    stored = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(stored, bytes):
        raise ValueError("it holds no image")
    return decode_image(io.BytesIO(stored))


def size_of(row) -> tuple[int, int]:
    """(width, height) in pixels as a row says."""
    return row["img_width"][0].as_py(), row["img_height"][0].as_py()


def mask_of(row) -> np.ndarray:
    """The mask of a row, (H, W) bool. Reads Arrow's buffer: H x W Python objects would be slow."""
    lines = row["mask"][0].values  # H lists of W bools, or None
    widths = set() if lines is None else set(lines.value_lengths().to_pylist())
    if len(widths) != 1 or lines.flatten().null_count:
        raise ValueError("its mask is missing, or its lines differ in length")
    return lines.flatten().to_numpy(zero_copy_only=False).reshape(len(lines), -1)


class MaskedRows:
    """An evaluation set: [index] decodes one row, and returns a `Sample` or raises `BadSample`.

    A mask may be empty, as in ReasonSeg: the right answer is then an empty mask.
    """

    def __init__(self, name: str, table):
        self.name, self.table = name, table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        row = self.table[index]
        try:
            query = check_query(row["text"][0].as_py())
            image, mask = image_of(row), mask_of(row)
            sizes = {image.size, mask.shape[::-1], size_of(row)}
            if len(sizes) > 1:
                raise ValueError(f"image, mask and img_width, img_height differ in size: {sizes}")
        except BROKEN as error:
            reason = f"{self.name}, row {index} cannot be used ({reason_of(error)})"
            raise BadSample(f"{reason}. Skip this sample") from error
        key = f"{Path(self.name).name}-{index}-{row['image_id'][0].as_py()}"
        return Sample(image, query, mask, None, f"{key}-{row['ann_id'][0].as_py()}")


# --------------------------------------------------------------------------------------------------
# Training sets, whose masks are REFER's
# --------------------------------------------------------------------------------------------------


class JoinedRows:
    """Rows of a training set with their masks, see `join_masks`. [index] as in `MaskedRows`.

    The set holds images of 840 x 840 pixels, and COCO's masks have the original size. The image is
    resized back to it: the mask fits, and SAM gets the true aspect ratio, which it was trained on.
    """

    def __init__(self, name: str, table, rows: list[tuple]):
        self.name, self.table, self.rows = name, table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        number, segmentation, _, size = self.rows[index]
        row = self.table[number]
        try:
            query = check_query(row["problem"][0].as_py())
            if size_of(row) != size:
                raise ValueError(f"it is for {size_of(row)} pixels, instances.json for {size}")
            mask = coco_mask(segmentation, *size)
            if not mask.any():
                raise ValueError("the area of its mask is zero")
            image = image_of(row).resize(size)
        except BROKEN as error:
            reason = f"{self.name}, row {number} cannot be used ({reason_of(error)})"
            raise BadSample(f"{reason}. Skip this sample") from error
        key = f"{Path(self.name).name}-{row['id'][0].as_py()}"
        return Sample(image, query, mask, None, key)


def open_training(name: str, root: str, split: str, seed: int, samples: int):
    """The training rows, `samples` of them chosen by `seed`, or what is held out."""
    hint = f"python -m tools.fetch refcocog --out {root}"
    table, rows = join_masks(name, Path(root).expanduser(), hint)
    if split == "train":
        rows = [row for row in rows if not row[2]]
        rng = random.Random(f"{seed}")
        rows = sorted(rows, key=lambda _: rng.random())[:samples]
    else:
        try:
            return RefCOCO("refcocog", Path(root).expanduser(), "val")
        except FileNotFoundError:
            rows = [row for row in rows if row[2]]
            note = f"held out: {len(rows)} rows of {name}, as {root} lacks REFER's val"
            tqdm.write(f"{note} ({hint} --split val)", file=sys.stderr)
    if not rows:
        raise ValueError(f"{name} has no row for {split}. Get REFER's files: {hint}")
    return JoinedRows(name, table, rows)


@lru_cache(maxsize=1)  # training reads both splits of one set
def join_masks(name: str, root: Path, hint: str) -> tuple[object, list[tuple]]:
    """Open a training set, and find the annotation of each row: its `id` ends in COCO's id.

    Returns the table and (row number, segmentation, held out, (width, height)) of the rows that
    have one. The others are counted on stderr.
    """
    file = root / "refcocog" / "instances.json"
    try:
        images, masks, owners = read_instances(file, file.stat().st_mtime_ns, file.stat().st_size)
        sizes = {a: (not i % EVERY, tuple(images[i][1])) for a, i in owners.items() if i in images}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Run: {hint}") from error
    except UNREADABLE as error:
        reason = f"{file} is not as REFER published it ({reason_of(error)})"
        raise ValueError(f"{reason}. Delete it, then run: {hint}") from error
    table = open_table(name, JOINED, "train")
    rows, ids = [], table.select_columns("id")[:]["id"].to_pylist()
    for number, row_id in enumerate(ids):
        found = re.search(r"\d{1,18}$", str(row_id))
        annotation = int(found[0]) if found else None
        if annotation in sizes and masks[annotation]:
            rows.append((number, masks[annotation], *sizes[annotation]))
    if not rows:
        raise ValueError(f"no id of {name}, such as {ids[0]!a:.60}, ends in one of {file}")
    if len(rows) < len(ids):
        note = f"skipped: {len(ids) - len(rows)} of {len(ids)} rows of {name} have no annotation"
        tqdm.write(f"{note} in {file}", file=sys.stderr)
    return table, rows

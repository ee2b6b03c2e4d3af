"""photos.py - the readers of photographs: RefCOCO, RefCOCO+, RefCOCOg and ReasonSeg.

`load_data` opens the data set that `--data` names. `python -m tools.fetch` downloads the files.
Sets of the Hugging Face hub are in plumbing/hub.py.
"""

import io
import json
import os
import pickle
import random
import re
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco

from data import BadSample, Sample, Shapes

SPLITS = {
    "refcocog": ("train", "val", "test"),
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "reasonseg": ("train", "val", "test"),
}
# REFER published one of these files and instances.json for each set; they lie in ROOT/<name>/.
# RefCOCOg has two partitions. Papers report umd, which has a test split.
REFS = {"refcocog": "refs(umd).p", "refcoco": "refs(unc).p", "refcoco+": "refs(unc).p"}
PHOTOGRAPHS = "images/mscoco/images/train2014"
# LISA pins OpenCV 4.8. Up to 4.10 fillPoly fills the same pixels, and 4.11 changed its rounding.
INSTALL_CV2 = 'pip install "opencv-python-headless<4.11"'
THINNEST = 200  # longest side over shortest; the tiny SAM would lose the short one above 256
# What a broken annotation makes its reader raise.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError
)  # fmt: skip
LARGEST_CORNER = 1e5  # pixels; OpenCV and pycocotools convert corners to int32 without a check


class Expression(NamedTuple):
    """One sentence about one object, with its entries in instances.json (None: no entry)."""

    id: str
    query: str
    image: tuple[str, tuple[int, int]] | None  # file name, (width, height) in pixels
    segmentation: list | dict | None  # polygons or RLE, see `coco_mask`


class PlainUnpickler(pickle._Unpickler):
    """Unpickle lists, dicts, strings and numbers only.

    A pickle runs code by importing it by name, so `find_class` refuses every name. The unpickler
    written in Python takes twice as long as the one in C, but ten bytes (a large memo index) can
    make the one in C reserve gigabytes. One opcode can still do so here and is removed.
    """

    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it imports {module}.{name}, but it may hold plain data only")


def subsample(refs: list[dict], samples: int | None, seed: str) -> list[tuple[dict, dict]]:
    """Choose `samples` expressions (None: all) in random order, as (reference, sentence) pairs.

    A reference is one object. The first round takes one random sentence of each object, the next
    round a second one, and so on. So 3,000 samples of RefCOCOg are 3,000 different objects, and a
    smaller subsample is the beginning of a larger one. *Assumed*: the paper does not say how.

    The result depends on `seed` and the references only, not on their order or the Python version:
    Python keeps the stream of random() stable but not shuffle(), so this sorts by random().
    """
    rng, entries = random.Random(seed), []
    for ref in sorted(refs, key=lambda ref: ref["ref_id"]):
        position = rng.random()
        sentences = sorted(ref["sentences"], key=lambda sentence: sentence["sent_id"])
        sentences.sort(key=lambda _: rng.random())  # sort() calls the key once for each, in order
        for turn, sentence in enumerate(sentences):
            entries.append((turn, position, ref["ref_id"], ref, sentence))
    entries.sort(key=lambda entry: entry[:3])
    return [entry[3:] for entry in entries[:samples]]


def read_refer(name: str, root: Path, split: str, samples: int | None, seed: int) -> list:
    """Read a split and subsample it (`samples` None: all). Returns a list of `Expression`.

    Raises FileNotFoundError or ValueError with the file and the command that downloads it.
    """
    file, hint = root / name / REFS[name], f"python -m tools.fetch {name} --out {root}"
    try:
        if file.stat().st_size > 2**29:  # bytes; 100,000 expressions take a tenth of this
            raise ValueError("too large")
        # Python 2 wrote these pickles, so their strings are bytes.
        refs = PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        refs = [ref for ref in refs if ref["split"] == split]
        chosen = subsample(refs, samples, f"{name}-{split}-{seed}")
        if not chosen:
            raise ValueError(f"it has no expression of split {split}")
        keys = [f"{name}-{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in chosen]
        rows = [(s["sent"].strip(), ref["image_id"], ref["ann_id"]) for ref, s in chosen]
        file = file.with_name("instances.json")
        images, masks, _ = read_instances(file, file.stat().st_mtime_ns, file.stat().st_size)
        pairs = zip(keys, rows, strict=True)
        return [Expression(key, query, images.get(i), masks.get(a)) for key, (query, i, a) in pairs]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Run: {hint}") from error
    except Exception as error:  # pickle's documentation: unpickling may raise any exception
        reason = f"{file} is not as REFER published it ({reason_of(error)})"
        raise ValueError(f"{reason}. Delete it, then run: {hint}") from error


@lru_cache(maxsize=1)  # training reads two splits of one file, and reading it takes seconds
def read_instances(file: Path, changed: int, size: int) -> tuple[dict, dict, dict]:
    """Return three dicts about images and annotations, which are named by their ids.

    They are {image: (file name, (width, height))}, {annotation: polygons or RLE}, {annotation:
    image}. `changed` and `size` describe the file. The cache uses them to notice a new version.
    """
    instances = json.loads(file.read_bytes())
    images = {i["id"]: (i["file_name"], (i["width"], i["height"])) for i in instances["images"]}
    if any(os.path.basename(file_name) != file_name for file_name, _ in images.values()):
        raise ValueError("a file_name in it is a path")  # tools.fetch writes files of these names
    masks = {one["id"]: one.get("segmentation") for one in instances["annotations"]}
    return images, masks, {one["id"]: one.get("image_id") for one in instances["annotations"]}


class RefCOCO:
    """A split of RefCOCO, RefCOCO+ or RefCOCOg, in the order of `subsample`.

    The constructor reads the annotations. It raises FileNotFoundError or ValueError if files are
    missing or broken. [index] reads one image and its mask. It may raise `BadSample`.
    """

    def __init__(
        self, name: str, root: Path | str, split: str, samples: int | None = None, seed: int = 0
    ):
        self.expressions = read_refer(name, Path(root), split, samples, seed)
        self.folder = Path(root) / PHOTOGRAPHS
        size = f" --samples {samples} --seed {seed}" if samples and split == "train" else ""
        self.hint = f"python -m tools.fetch {name} --out {root} --split {split}{size}"
        if not any((self.folder / one.image[0]).is_file() for one in self.expressions if one.image):
            raise FileNotFoundError(f"{self.folder} has no image of {split}. Run: {self.hint}")

    def __len__(self) -> int:
        return len(self.expressions)

    def __getitem__(self, index: int) -> Sample:
        one = self.expressions[index]
        if one.image is None or one.segmentation is None:
            lacking = "mask" if one.image else "image"
            raise BadSample(f"{one.id}: instances.json has no {lacking} for it. Skip this sample")
        file_name, size = one.image
        try:
            mask = coco_mask(one.segmentation, *size)
            if not mask.any():
                raise ValueError("its area is zero")
            check_query(one.query)
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            reason = f"its mask in instances.json or its sentence is bad ({reason_of(error)})"
            raise BadSample(f"{one.id}: {reason}. Skip this sample") from error
        image = read_image(self.folder / file_name, self.hint, size)
        return Sample(image, one.query, mask, None, one.id)


def coco_mask(segmentation: list | dict, width: int, height: int) -> np.ndarray:
    """Decode a COCO annotation to a mask, (H, W) bool.

    segmentation: polygons [[x1, y1, x2, y2, ...], ...] in image pixels, or run lengths (RLE)
        {"size": [H, W], "counts": list, str or bytes}, uncompressed or compressed.

    Raises ValueError, LookupError, TypeError or OverflowError. pycocotools does not check what it
    passes to C: a NaN crashes it, and wrong run lengths corrupt its memory. This function checks.
    """
    if isinstance(segmentation, list):
        parts = [part for part in segmentation if len(part) >= 6]  # two corners enclose no area
        if not all((np.abs(np.array(part, np.float64)) < LARGEST_CORNER).all() for part in parts):
            raise ValueError("a corner is not finite, or absurdly far away")
        parts = [coco.frPyObjects([part], height, width)[0] for part in parts]
        return coco.decode(coco.merge(parts)).astype(bool)
    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = uncompress(runs.encode() if isinstance(runs, str) else runs)
    valid = all(type(run) is int and run >= 0 for run in runs)
    if segmentation["size"] != [height, width] or not valid or sum(runs) != height * width:
        raise ValueError(f"its run lengths do not add up to the image of {width} x {height} pixels")
    rle = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return coco.decode(rle).astype(bool)


def uncompress(text: bytes) -> list[int]:
    """Decode COCO's compressed RLE to run lengths.

    Each character minus 48 holds five bits of a signed number, low bits first, and a sixth bit that
    is set if more follow. From the fourth number on, each is a difference to the last but one.
    """
    runs, number, bits = [], 0, 0
    for character in text:
        number |= (character - 48 & 31) << bits
        bits += 5
        if not character - 48 & 32:
            number -= (character - 48 & 16) << bits - 4  # the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = bits = 0
    return runs


def read_image(file: Path, hint: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to RGB. Raises BadSample if it is missing, broken or of another size.

    hint: the command that downloads the file, for the error message.
    size: the expected (width, height) in pixels. With it, the image is returned as stored, because
        COCO's masks are. Without it, the image is rotated as its EXIF data say, as in LISA.
    """
    try:
        image = decode_image(file, stored=bool(size))
        if size and image.size != tuple(size):
            raise ValueError(f"it is {image.size}, its annotation is for {tuple(size)}")
        return image
    except FileNotFoundError as error:
        raise BadSample(f"{file} is missing. Run: {hint}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"{file} cannot be used ({reason_of(error)})"
        raise BadSample(f"{reason}. Download it again: {hint}") from error


def decode_image(file: Path | io.BytesIO, stored: bool = False) -> Image.Image:
    """Decode an image to RGB, rotated as its EXIF data say, or as `stored`.

    Raises OSError, ValueError, SyntaxError or DecompressionBombError.
    """
    with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as opened:
        image = (opened if stored else ImageOps.exif_transpose(opened)).convert("RGB")
    check_shape(image)
    return image


def read_picture(file: str) -> Image.Image:
    """Decode a picture of the user's to RGB, rotated as its EXIF data say.

    Raises OSError or ValueError.
    """
    if not file:
        raise ValueError("name a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file)
            if picture.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel: convert it to 8 bits first")
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"it has too many pixels, make it smaller ({error})") from error
    check_shape(picture)
    return picture


def check_shape(image: Image.Image) -> None:
    """Raise ValueError if SAM would resize an image to less than one pixel of height or width."""
    if max(image.size) > THINNEST * min(image.size):
        sizes = f"{image.width} x {image.height}"
        raise ValueError(f"it is {sizes} pixels: one side is over {THINNEST} times the other")


def check_query(query: object) -> str:
    """A query without white space around it. Raises ValueError if the policy cannot be asked it."""
    if not isinstance(query, str) or not query.strip():
        raise ValueError("the query is not a text, or it is empty")
    check_plain(query, "query")
    return query.strip()


def check_plain(text: str, name: str) -> None:
    """Raise ValueError, with the text's name, if it holds a special token or a control character.

    A special token such as <|image_pad|> would be read as one, and asks for an image that is not
    there.
    """
    controls = [c for c in "".join(text.split()) if unicodedata.category(c) in ("Cc", "Cs")]
    if controls or re.search(r"<\|.*\|>", text, re.DOTALL):
        raise ValueError(f"the {name} holds a special token or a control character: {text!a:.99}")


def reason_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class ReasonSeg:
    """A split of ReasonSeg (LISA, arXiv 2308.00692): ROOT/<split>/NAME.jpg with NAME.json.

    The constructor raises FileNotFoundError if the folder is empty, and ValueError without OpenCV.
    [index] returns a `Sample` or raises `BadSample`. The query is the first text of the image, and
    the masks equal those of LISA's reader. An image without a target is a bad sample in train,
    because it teaches nothing. In val and test its correct answer is an empty mask.
    """

    def __init__(self, root: Path | str, split: str):
        self.split, self.folder = split, Path(root) / split
        files = (file for file in self.folder.glob("[!.]*") if file.suffix in (".jpg", ".json"))
        self.names = sorted({file.stem for file in files})
        if not self.names:
            hint = "python -m tools.fetch reasonseg explains how to get them"
            raise FileNotFoundError(f"{self.folder} has no .jpg and .json files: {hint}")
        try:  # here, so that the run ends instead of skipping every sample
            import cv2  # noqa: F401
        except ImportError as error:
            raise ValueError(f"ReasonSeg needs OpenCV ({error}). Run: {INSTALL_CV2}") from error

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        file, hint = self.folder / f"{name}.json", "python -m tools.fetch reasonseg"
        image = read_image(self.folder / f"{name}.jpg", hint)
        try:
            raw = file.read_bytes()
            try:
                annotation = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError:
                annotation = json.loads(raw.decode("cp1252"))  # a few files of the published set
            text = annotation["text"]
            query = check_query(text if isinstance(text, str) else text[0])
            target, ignore = labelme_masks(annotation["shapes"], *image.size)
            if self.split == "train" and not target.any():
                raise ValueError("no pixel is target")
        except UNREADABLE as e:
            reason = f"{file} gives no query and mask ({reason_of(e)})"
            raise BadSample(f"{reason}. Skip this sample, or download it again: {hint}") from e
        key, ignore = f"reasonseg-{self.split}-{name}", ignore if ignore.any() else None
        return Sample(image, query, target, ignore, key)


def labelme_masks(shapes: list[dict], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill labelme polygons as LISA's utils/data_processing.py does: outline and inside.

    Larger polygons are filled first, so smaller ones cover them: an `ignore` hole in a target, and
    a target inside that hole. Of two equal areas, the one listed later is filled first. The label
    `flag` has no meaning and is skipped.

    shapes: [{"label": str, "points": [[x, y], ...]}, ...] in image pixels, truncated to integers.

    Returns target and ignore, (H, W) bool. Raises ValueError, TypeError, Lookup- or AttributeError.
    """
    import cv2  # only this function needs OpenCV

    regions = []
    for shape in reversed(shapes):
        label = shape["label"].lower()
        if label == "flag":
            continue
        corners = np.array(shape["points"], np.float64).reshape(len(shape["points"]), 2)
        if not (len(corners) and (np.abs(corners) < LARGEST_CORNER).all()):
            raise ValueError("a polygon has no corners, or one is not finite or absurdly far away")
        region, corners = np.zeros((height, width), np.uint8), corners.astype(np.int32)
        cv2.polylines(region, [corners], isClosed=True, color=1, thickness=1)
        cv2.fillPoly(region, [corners], color=1)
        regions.append(("ignore" in label, region.astype(bool)))
    target, ignore = np.zeros((2, height, width), bool)
    for ignored, region in sorted(regions, key=lambda pair: -pair[1].sum()):
        target[region], ignore[region] = not ignored, ignored
    return target, ignore


def load_data(spec: str, split: str, seed: int = 0, samples: int = 3000):
    """Open the data set that `--data` names.

    spec:    "shapes", or NAME:ROOT or NAME:ROOT/SPLIT, where NAME is a key of `SPLITS`, or
             hub:NAME[@ROOT], see plumbing/hub.py.
    split:   "train" opens SPLIT, or train if SPLIT is absent. "heldout" (for evaluation) opens
             SPLIT, or val if SPLIT is train or absent.
    seed:    chooses the training samples. Held-out samples do not depend on it.
    samples: number of RefCOCO expressions to train on (paper: 3,000). Evaluation uses all.

    Returns a data set with len() and [index], which returns a `Sample`. Raises ValueError or
    FileNotFoundError with one line that says what is wrong and what to do.
    """
    name, _, path = spec.partition(":")
    if spec == "shapes":
        return Shapes(split, seed if split == "train" else 0)
    if name == "hub" and path:
        from plumbing.hub import open_hub  # it imports this file

        return open_hub(path, split, seed, samples)
    if name not in SPLITS or not path:
        names = ", ".join(f"{one}:ROOT" for one in SPLITS)
        raise ValueError(f"there is no data set {spec!r}: use shapes, {names}, or hub:NAME")
    root, part = Path(path).expanduser(), "train"
    # ROOT/val means split val of ROOT, unless ROOT/val is itself a root folder.
    inside = [root / one for one in SPLITS[name]] if name == "reasonseg" else [root / name]
    if root.name in sum(SPLITS.values(), ()) and not any(folder.is_dir() for folder in inside):
        root, part = root.parent, root.name
    if part not in SPLITS[name]:
        raise ValueError(f"{name} has no split {part}: use {', '.join(SPLITS[name])}")
    if split == "heldout" and part == "train":
        part = "val"
    if name == "reasonseg":
        return ReasonSeg(root, part)
    return RefCOCO(name, root, part, *((samples, seed) if split == "train" else ()))

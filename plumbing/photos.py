"""photos.py - decode images and annotations that other people made, or say why it is impossible.

The files of REFER (RefCOCO, RefCOCO+, RefCOCOg), COCO's segmentations, labelme's polygons
(ReasonSeg), image files, and queries. Which of them are used, and for what, is in data.py.

All of this is foreign data, so nothing here trusts it: an error is one line that names the file.
"""

import contextlib
import io
import json
import os
import pickle
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco

from plumbing.errors import UserError, reason_of

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
LARGEST_CORNER = 1e5  # pixels; OpenCV and pycocotools convert corners to int32 without a check


@contextlib.contextmanager
def foreign(what: object, hint: str = "", kind: type[UserError] = UserError):
    """Turn any error within this block into one of type `kind`, with one line.

    Put it only around the reading of a file or a sample. It catches every exception because broken
    files make pickle, json, Pillow, OpenCV and Arrow raise dozens of types.

    what: what is read, for the message.
    hint: the command that downloads the file, or "" if the sample can only be skipped.
    """
    try:
        yield
    except UserError as error:
        raise kind(f"{what}: {error}") from error
    except FileNotFoundError as error:
        mend = f"Run: {hint}" if hint else "Skip this sample"
        raise kind(f"{error.filename or what} is missing. {mend}") from error
    except Exception as error:
        mend = f"Delete it, then run: {hint}" if hint else "Skip this sample"
        raise kind(f"{what} cannot be used ({reason_of(error)}). {mend}") from error


# --------------------------------------------------------------------------------------------------
# REFER's files
# --------------------------------------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Unpickle lists, dicts, strings and numbers only.

    A pickle runs code by importing it by name, so `find_class` refuses every name.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it imports {module}.{name}, but it may hold plain data only")


def read_refs(file: Path, hint: str) -> list[dict]:
    """Read REFER's references: objects, each with sentences that refer to it.

    Returns [{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}, ...]},
    ...]. Raises UserError with the file and `hint`, the command that downloads it.
    """
    with foreign(file, hint):
        # Python 2 wrote these pickles, so their strings are bytes.
        refs = PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        keys = ("ref_id", "ann_id", "image_id", "split", "sentences")
        refs = [{key: ref[key] for key in keys} for ref in refs]
        for ref in refs:
            ref["sentences"] = [
                {"sent_id": one["sent_id"], "sent": one["sent"].strip()} for one in ref["sentences"]
            ]
        return refs


def read_instances(file: Path, hint: str) -> tuple[dict, dict]:
    """Read REFER's instances.json, which has the form of COCO's.

    Returns two dicts: {image id: (file name, (width, height))}, and {annotation id: (image id,
    segmentation)}. Raises UserError like `read_refs`.
    """
    with foreign(file, hint):
        return parse_instances(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # training reads two splits of one file, and reading it takes seconds
def parse_instances(file: Path, changed: int) -> tuple[dict, dict]:
    """See `read_instances`. changed: when the file was written; a new version is read again."""
    instances = json.loads(file.read_bytes())
    images = {}
    for image in instances["images"]:
        name = image["file_name"]
        if os.path.basename(name) != name:  # tools.fetch writes files of these names
            raise ValueError("a file_name in it is a path")
        images[image["id"]] = (name, (image["width"], image["height"]))
    annotations = {
        one["id"]: (one["image_id"], one.get("segmentation")) for one in instances["annotations"]
    }
    return images, annotations


# --------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------


def coco_mask(segmentation: list | dict, width: int, height: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask, (H, W) bool.

    segmentation: polygons [[x1, y1, x2, y2, ...], ...] in image pixels, or run lengths
        {"size": [H, W], "counts": [...]} along the columns, the first one of zeros.

    Compressed run lengths (a string) are refused: COCO's and REFER's files have none, and
    pycocotools decodes them without a check and writes past the end of its memory if they are
    wrong. It also crashes on a corner that is NaN. Raises ValueError, LookupError or TypeError.
    """
    if isinstance(segmentation, dict):
        runs = segmentation["counts"]
        if not isinstance(runs, list):
            raise ValueError("its run lengths are compressed: convert them to a list of numbers")
        if segmentation["size"] != [height, width] or sum(runs) != height * width:
            raise ValueError(f"its run lengths are not those of {width} x {height} pixels")
        values = np.arange(len(runs)) % 2 == 1  # zeros and ones in turn
        return np.repeat(values, runs).reshape(width, height).T  # refuses negative runs
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        if len(polygon) < 6:  # two corners enclose no area
            continue
        if not (np.abs(np.array(polygon, np.float64)) < LARGEST_CORNER).all():
            raise ValueError("a corner is not finite, or absurdly far away")
        mask |= coco.decode(coco.frPyObjects([polygon], height, width)[0]).astype(bool)
    return mask


def read_labelme(file: Path) -> tuple[object, list[dict]]:
    """The text (one or a list, unchecked) and the shapes of one of ReasonSeg's files."""
    raw = file.read_bytes()
    try:
        annotation = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        annotation = json.loads(raw.decode("cp1252"))  # a few files of the published set
    return annotation["text"], annotation["shapes"]


def labelme_masks(shapes: list[dict], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill labelme polygons as LISA's utils/data_processing.py does: outline and inside.

    Larger polygons are filled first, so smaller ones cover them: an `ignore` hole in a target, and
    a target inside that hole. Of two equal areas, the one listed later is filled first. The label
    `flag` has no meaning and is skipped.

    shapes: [{"label": str, "points": [[x, y], ...]}, ...] in image pixels, truncated to integers.

    Returns target and ignore, (H, W) bool. Raises ValueError, LookupError, TypeError or
    AttributeError.
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
        corners = corners.astype(np.int32)
        region = np.zeros((height, width), np.uint8)
        cv2.polylines(region, [corners], isClosed=True, color=1, thickness=1)
        cv2.fillPoly(region, [corners], color=1)
        regions.append(("ignore" in label, region.astype(bool)))
    target = np.zeros((height, width), bool)
    ignore = np.zeros((height, width), bool)
    for ignored, region in sorted(regions, key=lambda pair: -pair[1].sum()):
        target[region] = not ignored
        ignore[region] = ignored
    return target, ignore


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def read_image(file: Path, hint: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to RGB. Raises UserError if it is missing, broken or of another size.

    hint: the command that downloads the file, for the error message.
    size: the expected (width, height) in pixels. With it, the image is returned as stored, because
        COCO's masks are. Without it, the image is rotated as its EXIF data say, as in LISA.
    """
    with foreign(file, hint):
        image = decode_image(file, stored=bool(size))
        if size and image.size != tuple(size):
            raise ValueError(f"it is {image.size}, its annotation is for {tuple(size)}")
        return image


def decode_image(file: Path | io.BytesIO, stored: bool = False) -> Image.Image:
    """Decode a JPEG, PNG or WebP to RGB, rotated as its EXIF data say, or as `stored`.

    Raises OSError, ValueError, SyntaxError or DecompressionBombError.
    """
    with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as opened:
        image = (opened if stored else ImageOps.exif_transpose(opened)).convert("RGB")
    check_shape(image)
    return image


def read_picture(file: str) -> Image.Image:
    """Decode a picture of the user's, of any format, to RGB, rotated as its EXIF data say.

    Raises UserError.
    """
    if not file:
        raise UserError("--image: name the picture")
    try:
        picture = Image.open(file)
        if picture.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel: convert it to 8 bits first")
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        check_shape(picture)
        return picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be used ({reason_of(error)})") from error


def check_shape(image: Image.Image) -> None:
    """Raise ValueError if SAM would resize an image to less than one pixel of height or width."""
    if max(image.size) > THINNEST * min(image.size):
        sizes = f"{image.width} x {image.height}"
        raise ValueError(f"it is {sizes} pixels: one side is over {THINNEST} times the other")


# --------------------------------------------------------------------------------------------------
# Queries
# --------------------------------------------------------------------------------------------------


def check_query(query: object) -> str:
    """A query without white space around it. Raises UserError if the policy cannot be asked it."""
    if not isinstance(query, str) or not query.strip():
        raise UserError("the query is not a text, or it is empty")
    check_plain(query, "query")
    return query.strip()


def check_plain(text: str, name: str) -> None:
    """Raise UserError, with the text's name, if it holds a special token or a control character.

    A special token such as <|image_pad|> would be read as one, and asks for an image that is not
    there.
    """
    controls = [c for c in "".join(text.split()) if unicodedata.category(c) in ("Cc", "Cs")]
    if controls or re.search(r"<\|.*\|>", text, re.DOTALL):
        raise UserError(f"the {name} holds a special token or a control character: {text!a:.99}")

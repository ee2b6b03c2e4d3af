"""photos.py - decode images and annotations that other people made, or say why it is impossible.

The files of REFER (RefCOCO, RefCOCO+, RefCOCOg), COCO's segmentations, labelme's shapes
(ReasonSeg), image files, and queries. Which of them are used, and for what, is in data.py.

All of this is foreign data, so nothing here trusts it: an error is one line that names the file.
"""

import base64
import contextlib
import io
import json
import os
import pickle
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw
from pycocotools import mask as coco

from plumbing.errors import UserError, reason_of, refusing

THINNEST = 200  # longest side over shortest; the tiny SAM would lose the short one above 256
LARGEST_CORNER = 1e5  # pixels; OpenCV and pycocotools convert corners to int32 without a check
# Pillow warns of pictures above its limit of 89 million pixels, and refuses those above twice that.
# Here both are refused: SAM and the figures need 30 bytes for each pixel.
warnings.simplefilter("error", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # only the orientation is read of it
UPRIGHT = {  # EXIF's orientation of a stored picture: what turns it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        mend = f"Mend it, or move it away and run: {hint}" if hint else "Skip this sample"
        raise kind(f"{what} cannot be used ({reason_of(error)}). {mend}") from error


# --------------------------------------------------------------------------------------------------
# REFER's files
# --------------------------------------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Unpickle lists, dicts, strings and numbers only: a pickle can run whatever it imports."""

    def find_class(self, module: str, name: str):
        mend = ": write its numbers as int() gives them" if module.startswith("numpy") else ""
        reason = f"it imports {module}.{name}, but it may hold plain data only{mend}"
        raise pickle.UnpicklingError(reason)


def whole(value: object) -> int:
    """An id as an int, also if it is written as a text. Raises ValueError for anything else.

    Ids join the files: if one had "7" and another 7, no sample would have a mask.
    """
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = int(value)
        if isinstance(value, str) or number == value:
            return number
    raise ValueError(f"an id in it is not a whole number: {value!a:.40}")


def read_refs(file: Path, hint: str) -> list[dict]:
    """Read REFER's references: objects, each with sentences that refer to it.

    Returns dicts with "ref_id", "ann_id", "image_id", "split" and "sentences", which are dicts with
    "sent_id" and "sent". Raises UserError with the file and `hint`, the command that downloads it.
    """
    with foreign(file, hint):
        # Python 2 wrote these pickles, so their strings are bytes.
        refs = PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        return [
            {
                **{key: whole(ref[key]) for key in ("ref_id", "ann_id", "image_id")},
                "split": ref["split"],
                "sentences": [
                    {"sent_id": whole(one["sent_id"]), "sent": one["sent"].strip()}
                    for one in ref["sentences"]
                ],
            }
            for ref in refs
        ]


def read_instances(file: Path, hint: str) -> tuple[dict, dict]:
    """Read REFER's instances.json, which has the form of COCO's. Raises UserError like `read_refs`.

    Returns {image id: (file name, (width, height))}, {annotation id: (image id, segmentation)}.
    """
    images = {}
    annotations = {}
    with foreign(file, hint):
        instances = json.loads(file.read_bytes())
        for image in instances["images"]:
            name = image["file_name"]
            if os.path.basename(name) != name:  # tools.fetch writes files of these names
                raise ValueError("a file_name in it is a path")
            add_once(images, image["id"], (name, (image["width"], image["height"])))
        for one in instances["annotations"]:
            add_once(annotations, one["id"], (whole(one["image_id"]), one.get("segmentation")))
    return images, annotations


def add_once(entries: dict, key: object, entry: tuple) -> None:
    """Add an entry under its id. Raises ValueError if another one has the same id."""
    if entries.setdefault(whole(key), entry) != entry:
        raise ValueError(f"two entries have the id {key}: an expression may get the wrong mask")


# --------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------


def coco_mask(segmentation: list | dict, width: int, height: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask, (H, W) bool. Raises ValueError, LookupError, TypeError.

    segmentation: a list of parts, or one part. A part is a polygon [x1, y1, x2, y2, ...] in image
        pixels, also as pairs [[x1, y1], ...], or run lengths {"size": [H, W], "counts": [...]}
        along the columns, the first one of zeros.
    """
    mask = np.zeros((height, width), bool)
    furthest = 0.0
    for part in coco_parts(segmentation):
        if isinstance(part, dict):
            mask |= decode_runs(part, width, height)
            furthest = np.inf
            continue
        corners = np.array(part, np.float64)
        if corners.ndim == 1 and len(corners) % 2 == 0:
            corners = corners.reshape(-1, 2)
        if corners.ndim != 2 or corners.shape[1] != 2:
            raise ValueError("a polygon is not made of pairs of numbers")
        if len(corners) < 3:  # two corners enclose no area
            continue
        if not (np.abs(corners) < LARGEST_CORNER).all():  # pycocotools crashes on NaN
            raise ValueError("a corner is not finite, or absurdly far away")
        polygons = coco.frPyObjects([corners.ravel().tolist()], height, width)
        mask |= coco.decode(polygons[0]).astype(bool)
        furthest = max(furthest, corners.max())
    if 0 < furthest <= 1 and min(width, height) > 16:
        raise ValueError("all corners lie in 0..1: write pixels, not shares of the image")
    return mask


def coco_parts(segmentation: list | dict) -> list:
    """The parts of a segmentation: itself, if it is one part without a list around."""
    if not segmentation:
        return []
    if isinstance(segmentation, dict) or not isinstance(segmentation[0], list | dict):
        return [segmentation]  # run lengths, or x1, y1, x2, y2, ...
    pairs = [one for one in segmentation if len(one) == 2 and not isinstance(one, dict)]
    if len(pairs) == len(segmentation) > 2 and not isinstance(pairs[0][0], list):
        return [segmentation]  # [x1, y1], [x2, y2], ...
    return segmentation


def decode_runs(part: dict, width: int, height: int) -> np.ndarray:
    """Decode COCO's run lengths to a mask, (H, W) bool.

    Compressed ones (a string) are refused: COCO's and REFER's files have none, and pycocotools
    decodes them without a check and writes past the end of its memory if they are wrong.
    """
    runs = part["counts"]
    if not isinstance(runs, list):
        raise ValueError("its run lengths are compressed: convert them to a list of numbers")
    if part["size"] != [height, width] or sum(runs) != height * width:
        raise ValueError(f"its run lengths are not those of {width} x {height} pixels")
    values = np.arange(len(runs)) % 2 == 1  # zeros and ones in turn
    return np.repeat(values, runs).reshape(width, height).T  # refuses negative runs


# What distinguishes cp1252 from other encodings that are read as it, see `decode_text`.
LETTERS = "À-ÖØ-öø-ÿŒœŠšŽžŸ"
MARKS = "‘’‚“”„‹›«»–—…¿¡•©®™\xa0"  # these stand beside any letter
SIGN = rf"[^\x00-\x7f{LETTERS}{MARKS}]"
OTHER_ENCODING = re.compile(
    rf"{SIGN}(?:{SIGN}|[{LETTERS}])|[{LETTERS}]{SIGN}"  # a sign beside a sign or a letter
    rf"|(?![·\xad°µ×±£€§]){SIGN}[A-Za-z]"
    rf"|[{LETTERS}]{{4}}|\b([{LETTERS}])(?!(?i:\1))[{LETTERS}]+\b"  # words without a plain letter
    r"|(?<!\\)[a-zß-ÿ][À-ÞŒŠŽŸ]"  # a capital, or an opening mark, within a word
    r"|[^\W\d][‚„¿¡]"
)


def decode_text(raw: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or cp1252 (a few files of ReasonSeg).

    Almost all bytes can be decoded as cp1252, so those of another encoding would become a wrong
    query. They are recognised by bytes that cp1252 does not have, and by what texts of Western
    Europe do not hold: signs such as ¤ beside accented letters, words of accented letters only,
    and accented capitals within words. This finds sentences in Chinese, Japanese, Korean, Cyrillic,
    Greek, Hebrew, Arabic and Thai, and the accents of Macintosh and DOS. It cannot find cp1250,
    cp1254 and cp1257, which differ from cp1252 in a few letters.

    Raises ValueError.
    """
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")
    text = raw.decode("cp1252", errors="replace")
    if "\ufffd" in text or OTHER_ENCODING.search(text):
        raise ValueError("it is neither UTF-8 nor cp1252: save it as UTF-8")
    return text


def labelme_files(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of each sample in a folder of ReasonSeg: {name: {suffix in small letters: file}}.

    A .png without a .json is no sample: it may be the mask of one.
    """
    found = {}
    for file in sorted(folder.glob("[!.]*")):
        found.setdefault(file.stem, {})[file.suffix.lower()] = file
    needed = {".json", ".jpg", ".jpeg"}
    return {name: files for name, files in found.items() if needed & set(files)}


def labelme_picture(files: dict[str, Path]) -> Path | None:
    """The picture among the files of a sample. Where there is a .jpg, LISA reads that one.

    Raises UserError if there are two others.
    """
    found = [files[suffix] for suffix in (".jpg", ".jpeg", ".png", ".webp") if suffix in files]
    if len(found) > 1 and ".jpg" not in files:
        raise UserError(f"{found[0].name} and {found[1].name} have its name: keep one")
    return found[0] if found else None


def read_labelme(file: Path, size: tuple[int, int]) -> tuple[object, list[dict]]:
    """The query (the first text, unchecked) and the shapes of one of ReasonSeg's files.

    size: (width, height) of its picture. Raises ValueError or TypeError, also for another size.
    """
    annotation = json.loads(decode_text(file.read_bytes()))
    for key in ("text", "shapes"):
        if key not in annotation:
            raise ValueError(f"it has no {key!r}")
    stated = (annotation.get("imageWidth"), annotation.get("imageHeight"))  # labelme writes them
    if None not in stated and stated != size:
        raise ValueError(f"it is for a picture of {stated} pixels, and its picture has {size}")
    text = annotation["text"]
    query = text[0] if isinstance(text, list) and text else text
    return query, annotation["shapes"]


def labelme_masks(shapes: list[dict], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill labelme shapes as LISA's utils/data_processing.py does: outline and inside.

    Larger shapes are filled first, so smaller ones cover them: an `ignore` hole in a target, and
    a target inside that hole. Of two equal areas, the one listed later is filled first. The label
    `flag` has no meaning and is skipped.

    shapes: dicts with "label", a text, and what `paint_shape` needs. They can raise anything.

    Returns target and ignore, (H, W) bool.
    """
    corners = [corner for shape in shapes for corner in shape["points"]]
    if corners and np.min(corners) >= 0 and np.max(corners) <= 1 and min(width, height) > 16:
        raise ValueError("all points lie in 0..1: write pixels, not shares of the picture")
    regions = []
    for shape in reversed(shapes):
        label = shape["label"].lower()
        if label == "flag":
            continue
        region = paint_shape(shape, width, height)
        if not region.any():
            raise ValueError("a shape marks no pixel of the picture")
        regions.append(("ignore" in label, region))
    target = np.zeros((height, width), bool)
    ignore = np.zeros((height, width), bool)
    for ignored, region in sorted(regions, key=lambda pair: -pair[1].sum()):
        target[region] = not ignored
        ignore[region] = ignored
    return target, ignore


def paint_shape(shape: dict, width: int, height: int) -> np.ndarray:
    """The pixels of a labelme shape, (H, W) bool. Its "shape_type" and its "points" [[x, y], ...]:

    polygon:   corners in image pixels, truncated to integers, as in LISA. Also without a type.
    rectangle: two opposite corners, or all four, filled in the same way.
    circle:    the centre and a point on the circle, filled as labelme does.
    mask:      the first and the last of its pixels. "mask" is a PNG of them in base64.

    Other types, such as a line or a point, enclose no area. They raise ValueError.
    """
    import cv2  # only this function needs OpenCV

    kind = shape.get("shape_type") or "polygon"
    corners = np.array(shape["points"], np.float64).reshape(len(shape["points"]), 2)
    if not (len(corners) and (np.abs(corners) < LARGEST_CORNER).all()):
        raise ValueError(f"a {kind} has no corners, or one is not finite or absurdly far away")
    region = np.zeros((height, width), np.uint8)
    if kind == "rectangle" and len(corners) == 2:
        corners = corners[[[0, 0], [1, 0], [1, 1], [0, 1]], [0, 1]]  # x of one, y of one
    if kind == "polygon" or (kind == "rectangle" and len(corners) == 4):
        corners = corners.astype(np.int32)
        cv2.polylines(region, [corners], isClosed=True, color=1, thickness=1)
        cv2.fillPoly(region, [corners], color=1)
    elif kind == "circle" and len(corners) == 2:
        radius = np.linalg.norm(corners[1] - corners[0])
        canvas = Image.fromarray(region)
        box = [tuple(corners[0] - radius), tuple(corners[0] + radius)]
        ImageDraw.Draw(canvas).ellipse(box, fill=1, outline=1)
        region = np.asarray(canvas)
    elif kind == "mask" and len(corners) == 2:
        png = io.BytesIO(base64.b64decode(shape["mask"]))
        pixels = np.asarray(decode_image(png, stored=True))[..., 0]
        (x1, y1), (x2, y2) = corners.astype(int)
        place = region[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1]
        if place.shape != pixels.shape or pixels.shape != (y2 + 1 - y1, x2 + 1 - x1):
            raise ValueError("a mask does not fit between its corners, or in its picture")
        place[:] = pixels
    else:
        raise ValueError(f"a shape is a {kind} of {len(corners)} points, which has no area")
    return region.astype(bool)


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

    It reads the orientation alone: Pillow's `exif_transpose` writes all other EXIF data again, and
    fails on those of some cameras. A damaged file can raise anything.
    """
    with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel: convert it to 8 bits first")
        image = opened.convert("RGB")
        orientation = None if stored else opened.getexif().get(ExifTags.Base.Orientation)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if max(image.size) > THINNEST * min(image.size):
        sizes = f"{image.width} x {image.height}"
        raise ValueError(f"it is {sizes} pixels: one side is over {THINNEST} times the other")
    return image


def read_picture(file: str) -> Image.Image:
    """`decode_image` for a picture of the user's. Raises UserError."""
    if not file:
        raise UserError("--image: name the picture")
    mend = "name a JPEG, PNG or WebP of less than 89 megapixels that other programs can open"
    with refusing(lambda error: f"{file} cannot be used ({reason_of(error)}): {mend}"):
        return decode_image(Path(file).expanduser())


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

    The special token <|image_pad|>, for example, asks for an image that is not there.
    """
    if not isinstance(text, str):
        raise UserError(f"the {name} is not a text")
    controls = [c for c in "".join(text.split()) if unicodedata.category(c) in ("Cc", "Cs")]
    if controls or re.search(r"<\|.*\|>", text, re.DOTALL):
        raise UserError(f"the {name} holds a special token or a control character: {text!a:.99}")

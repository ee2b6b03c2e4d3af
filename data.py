"""data.py - what the policy sees: an image, a query, and the mask that answers it.

Read this first. It holds
  1. `Sample`, the one record that every data set yields;
  2. `Shapes`, drawn scenes with queries that take a small inference (the embedded default: no download, no end);
  3. the prompt that asks the policy for reasoning and an answer (paper, sec. 3: "<think> ... <answer> {box, points}");
  4. `RefCOCO`, expressions about photographs (the paper trains on 3,000 of RefCOCOg), read from REFER's folders;
  5. `ReasonSeg`, questions that take reasoning (the paper's zero-shot test), read from LISA's;
  6. `load_data`, which finds a data set by its name;
  7. fetching: how real data and real weights get onto the disk (the method itself needs none of this).

    python data.py fetch refcocog --out ROOT --samples 3000     all that training needs: annotations, the images of its draw,
                                                                and those of its evaluation (--heldout 256)
    python data.py fetch refcocog --out ROOT --split val        the images of one split
    python data.py fetch sam --model vit_h --out FOLDER         an official checkpoint of the segmenter
    python data.py fetch reasonseg                              says how to get it by hand

Frames. A sample's image and mask live in *image pixels* (x to the right, y down, origin at the top left corner). The
policy sees the image resized to a square, so its answers live in *policy pixels*; `reward.sam_prompt` scales them back.
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco
from tqdm import tqdm


@dataclass
class Sample:
    """One image, one query, and the region that the query means.

    image:  PIL image, RGB, W x H.
    query:  the referring expression or question.
    mask:   (H, W) bool, True on the target.
    ignore: (H, W) bool, True where a pixel counts neither for nor against (ReasonSeg has such pixels), or None.
    id:     a name that is unique within the data set.
    """

    image: Image.Image
    query: str
    mask: np.ndarray
    ignore: np.ndarray | None
    id: str


class BadSample(ValueError):
    """One sample cannot be used: its image is missing or broken, or its annotation gives no mask. The message is one line
    that names the file and says what to do. Training skips such a sample and counts it; the others are sound."""


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: drawn scenes
# ---------------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 40)}
KINDS = ("circle", "square", "triangle", "star")
SIZES = ((96, 96), (96, 96), (128, 96), (96, 128))  # W, H in image pixels: half of the scenes are not square
MARGIN = 0.06  # "left of", "topmost": the runner-up lies at least this share of the side further in
RATIO = 1.25  # "largest", "smallest": the runner-up's area differs at least by this factor


@dataclass
class Thing:
    """One drawn object: what it is, which pixels of it can be seen, and the tightest box around those."""

    kind: str
    colour: str
    mask: np.ndarray  # (H, W) bool
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in image pixels; x2 and y2 are one past the last pixel
    centre: tuple[float, float]  # x, y of the box's middle

    @property
    def area(self) -> int:
        return int(self.mask.sum())


class Shapes:
    """Drawn scenes of 2 to 5 shapes, each with one unambiguous query about one of them.

    Item i is a function of (split, seed, i) alone: it is drawn when asked for, and is the same on every run. The splits "train",
    "heldout" and "warmup" (what the tiny base model was brought up on) seed the generator differently: they share no scene.
    """

    def __init__(self, split: str = "train", seed: int = 0, size: int = 100_000, things: tuple[int, int] = (2, 5)):
        self.split, self.seed, self.size, self.things = split, seed, size, things

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        image, things, query, target = self.scene(index)
        return Sample(image, query, things[target].mask, None, f"shapes-{self.split}-{self.seed}-{index}")

    def scene(self, index: int) -> tuple[Image.Image, list[Thing], str, int]:
        """Return (image, things, query, index of the thing that the query means)."""
        rng = random.Random(f"{self.split}-{self.seed}-{index}")
        while True:  # a drawing in which nothing can be asked for without ambiguity is drawn again
            image, things = draw_scene(rng, rng.randint(*self.things))
            queries = unambiguous_queries(things, *image.size)
            if queries:
                sort = rng.choice(sorted(queries))  # first the sort of query, or the common sorts would crowd out the rest
                query, target = rng.choice(queries[sort])
                return image, things, query, target


def draw_scene(rng: random.Random, count: int) -> tuple[Image.Image, list[Thing]]:
    """Draw `count` shapes on a shaded, noisy ground. Later shapes cover earlier ones; a mask holds what can be seen."""
    width, height = rng.choice(SIZES)
    crowded = rng.random() < 0.4  # shapes touch or slightly cover each other: here a careless box costs mask IoU
    placed = []  # x, y, radius
    while len(placed) < count:
        radius = rng.uniform(0.09, 0.2) * min(width, height)
        if crowded and placed:
            x, y, other = rng.choice(placed)
            reach, angle = (radius + other) * rng.uniform(0.85, 1.05), rng.uniform(0, 2 * np.pi)
            x, y = x + reach * np.cos(angle), y + reach * np.sin(angle)
        else:
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        nearest = 0.8 if crowded else 1.1  # in units of the two radii
        inside = radius <= x <= width - radius and radius <= y <= height - radius
        if inside and all(np.hypot(x - a, y - b) > nearest * (radius + r) for a, b, r in placed):
            placed.append((x, y, radius))
        elif rng.random() < 0.02:  # a corner with no room left: start again
            placed = []

    image = Image.fromarray(background(rng, width, height))
    looks, owner = [], np.zeros((height, width), np.uint8)  # owner: which thing a pixel shows, 0 for none
    for number, (x, y, radius) in enumerate(placed, 1):
        kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
        stencil = Image.new("1", (width, height))
        outline(ImageDraw.Draw(stencil), kind, x, y, radius)
        image.paste(COLOURS[colour], mask=stencil)
        owner[np.asarray(stencil)] = number
        looks.append((kind, colour))
    pixels = np.asarray(image, np.int16) + noise(rng, width, height)
    things = []
    for number, (kind, colour) in enumerate(looks, 1):
        mask = owner == number
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        things.append(Thing(kind, colour, mask, box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things


def outline(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float) -> None:
    """Paint one upright shape whose circumscribed circle (square: inscribed) has this centre and radius, in pixels."""
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    elif kind == "square":
        side = 0.85 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=1)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=1)
    else:  # star: ten corners, far and near in turn, the first one pointing up
        corners = [(radius * (1.0 if k % 2 == 0 else 0.45), np.pi * (k / 5 - 0.5)) for k in range(10)]
        draw.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in corners], fill=1)


@lru_cache
def ramps(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) ramps from 0 to 1, to the right and downwards."""
    x = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    return x, y


def background(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8. Red light falls off to the right and blue light downwards, as in a room with two lamps: the
    shading tells a small vision tower where it looks, which halves the time it needs to learn positions."""
    x, y = ramps(width, height)
    light, fall = rng.uniform(235, 250), rng.uniform(90, 120)
    channels = (light - fall * x, np.full_like(x, light - rng.uniform(20, 45)), light - fall * y)
    return np.stack(channels, -1).astype(np.uint8)


def noise(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 1) int16 in -6..6, the same in all channels."""
    raw = np.frombuffer(rng.randbytes(width * height), np.uint8).reshape(height, width, 1)
    return raw.astype(np.int16) % 13 - 6


def unambiguous_queries(things: list[Thing], width: int, height: int) -> dict[str, list[tuple[str, int]]]:
    """All queries that mean exactly one of the things: {sort of query: [(query, index of the thing), ...]}.

    Sorts: "look" (the red star), "only" (the only star), "size" (the largest circle), "edge" (the leftmost shape),
    "relation" (the shape left of the blue square).
    """
    found = {}

    def add(sort: str, query: str, index: int) -> None:
        found.setdefault(sort, []).append((query, index))

    def family(kind: str | None, colour: str | None) -> list[int]:
        return [i for i, t in enumerate(things) if kind in (None, t.kind) and colour in (None, t.colour)]

    for kind in KINDS:
        for colour in COLOURS:
            if len(members := family(kind, colour)) == 1:
                add("look", f"the {colour} {kind}", members[0])

    families = [("shape", family(None, None))]
    families += [(kind, family(kind, None)) for kind in KINDS]
    families += [(f"{colour} shape", family(None, colour)) for colour in COLOURS]
    for name, members in families:
        if len(members) == 1:
            add("only", f"the only {name}", members[0])
        if len(members) < 2:
            continue
        by_size = sorted(members, key=lambda i: things[i].area)
        if things[by_size[-1]].area >= RATIO * things[by_size[-2]].area:
            add("size", f"the largest {name}", by_size[-1])
        if RATIO * things[by_size[0]].area <= things[by_size[1]].area:
            add("size", f"the smallest {name}", by_size[0])

    if len(things) < 2:
        return found
    for axis, side, first, last, before, after in (
        (0, width, "leftmost", "rightmost", "left of", "right of"),
        (1, height, "topmost", "bottommost", "above", "below"),
    ):
        place = [thing.centre[axis] for thing in things]
        order = sorted(range(len(things)), key=place.__getitem__)
        for (end, next_to_it, *_), edge, relation in ((order, first, before), (order[::-1], last, after)):
            if abs(place[next_to_it] - place[end]) <= MARGIN * side:
                continue
            add("edge", f"the {edge} shape", end)
            relative = things[next_to_it]  # all but one lie on its far side, so exactly one is "left of" it
            clear = all(abs(place[i] - place[next_to_it]) > MARGIN * side for i in order if i != next_to_it)  # nobody could argue
            if clear and len(family(relative.kind, relative.colour)) == 1:
                add("relation", f"the shape {relation} the {relative.colour} {relative.kind}", end)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The prompt
# ---------------------------------------------------------------------------------------------------------------------

SYSTEM = (
    "You find things in images. You first think about what the request means and where in the image its target is, "
    "then you point the target out."
)
REQUEST = """Find in this image: {query}

First reason inside <think> </think>: which objects come into question, what tells the right one apart, and where it is.
Then answer inside <answer> </answer> with nothing but JSON: the tightest box around the target, and two points that lie \
well inside it, {units}.

<think>your reasoning</think><answer>{{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}}</answer>"""
UNITS = {
    "pixels": "in pixels of the {side} x {side} image, x to the right and y down",
    "thousandths": "in thousandths of the image's width and height (0 to 1000), x to the right and y down",
}


def messages(query: str, style: str, units: str, side: int) -> list[dict]:
    """The conversation that is put to the policy, in the form that a processor's chat template takes.

    style: "full" explains the task to a model that was never trained on it (the paper gives no wording; this one is
           ours). "brief" holds the query alone, for a model that knows the task (the tiny one, whose 16 image tokens
           would drown in a page of instructions).
    units: "pixels" or "thousandths", see `UNITS`.
    side:  side of the square image that the policy sees, in pixels.
    """
    image = {"type": "image"}
    if style == "brief":
        return [{"role": "user", "content": [image, {"type": "text", "text": f"find {query}"}]}]
    request = REQUEST.format(query=query, units=UNITS[units].format(side=side))
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [image, {"type": "text", "text": request}]},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# RefCOCO, RefCOCO+, RefCOCOg: referring expressions on COCO photographs
# ---------------------------------------------------------------------------------------------------------------------

SPLITS = {
    "refcocog": ("train", "val", "test"),
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "reasonseg": ("train", "val", "test"),
}
# The layout of REFER, which published the three sets: ROOT/<name>/ holds one of these and instances.json. RefCOCOg has been
# partitioned twice; umd is the partition with a test split, which papers report.
REFS = {"refcocog": "refs(umd).p", "refcoco": "refs(unc).p", "refcoco+": "refs(unc).p"}
PHOTOGRAPHS = "images/mscoco/images/train2014"


class Expression(NamedTuple):
    """One sentence about one object, and what instances.json says of it (None: nothing)."""

    id: str
    query: str
    image: tuple[str, tuple[int, int]] | None  # file name, (width, height) in pixels
    segmentation: list | dict | None  # polygons or RLE, see `coco_mask`


class PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, strings and numbers. A pickle is a program, and these come from the internet; to run foreign
    code it must import it by name, and here no name is found. The reader written in Python takes twice the time of that in C,
    which ten bytes can make reserve gigabytes (a memo index); one opcode can still do that here, and is left out."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, where only plain data belong")


def draw(refs: list[dict], samples: int | None, word: str) -> list[tuple[dict, dict]]:
    """Choose expressions, as (reference, sentence), in random order: `samples` of them, or all if None.

    Objects are dealt like cards: each gives one of its sentences, any of them, and only when all have given one does a
    second round begin. So 3,000 of RefCOCOg are 3,000 different objects, and a smaller draw is the beginning of a larger one.
    *Assumed*: the paper does not say how it drew.

    The result depends on `word` and on the references alone, not on their order, the machine, or the Python version:
    random() is the one method whose stream Python promises to keep, so shuffling is sorting by random() here.
    """
    rng = random.Random(word)
    deck = []
    for ref in sorted(refs, key=lambda ref: ref["ref_id"]):
        place = rng.random()
        sentences = sorted(ref["sentences"], key=lambda sentence: sentence["sent_id"])
        sentences.sort(key=lambda _: rng.random())  # called once for each, in their order
        deck += [(turn, place, ref["ref_id"], ref, sentence) for turn, sentence in enumerate(sentences)]
    deck.sort(key=lambda card: card[:3])
    return [card[3:] for card in deck[:samples]]


def read_refer(name: str, root: Path, split: str, samples: int | None, seed: int) -> list[Expression]:
    """Read the annotations of a split and draw from it. Raises FileNotFoundError or ValueError with one line that names the
    file and says what to do."""
    file, mend = root / name / REFS[name], f"python data.py fetch {name} --out {root}"
    try:
        if file.stat().st_size > 2**29:  # bytes; 100,000 expressions take a tenth
            raise ValueError("too large")
        refs = PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()  # Python 2's strings are bytes
        chosen = draw([ref for ref in refs if ref["split"] == split], samples, f"{name}-{split}-{seed}")
        if not chosen:
            raise ValueError(f"nothing in it is of split {split}")
        found = [(f"{name}-{r['ref_id']}-{s['sent_id']}", s["sent"].strip(), r["image_id"], r["ann_id"]) for r, s in chosen]
        file = file.with_name("instances.json")
        images, outlines = read_instances(file, file.stat().st_mtime_ns, file.stat().st_size)
        return [Expression(key, query, images.get(image), outlines.get(ann)) for key, query, image, ann in found]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {file}: get it with {mend}") from error
    except Exception as error:  # unpickling garbage may raise anything, says its documentation
        raise ValueError(f"{file} is not as REFER published it ({_reason(error)}): delete it, then {mend}") from error


@lru_cache(maxsize=1)  # training reads two splits of one file, and that takes seconds
def read_instances(file: Path, changed: int, size: int) -> tuple[dict, dict]:
    """Images {id: (file name, (width, height))} and segmentations {id: polygons or RLE} of instances.json as it is now."""
    instances = json.loads(file.read_bytes())
    images = {one["id"]: (one["file_name"], (one["width"], one["height"])) for one in instances["images"]}
    if any(os.path.basename(file_name) != file_name for file_name, _ in images.values()):
        raise ValueError("a file_name in it is a path")  # fetch writes files of these names
    return images, {one["id"]: one.get("segmentation") for one in instances["annotations"]}


class RefCOCO:
    """A split of RefCOCO, RefCOCO+ or RefCOCOg: all its sentences, or a draw of them, in the order of `draw`.

    Annotations are read here, an image and its mask when asked for: [index] gives a `Sample` or raises `BadSample`.
    """

    def __init__(self, name: str, root: Path | str, split: str, samples: int | None = None, seed: int = 0):
        self.expressions = read_refer(name, Path(root), split, samples, seed)
        self.folder = Path(root) / PHOTOGRAPHS
        size = f" --samples {samples} --seed {seed}" if samples and split == "train" else ""
        self.mend = f"python data.py fetch {name} --out {root} --split {split}{size}"
        if not any((self.folder / one.image[0]).is_file() for one in self.expressions if one.image):
            raise FileNotFoundError(f"{self.folder} has no image of {name} {split}: get them with {self.mend}")

    def __len__(self) -> int:
        return len(self.expressions)

    def __getitem__(self, index: int) -> Sample:
        one = self.expressions[index]
        if one.image is None or one.segmentation is None:
            raise BadSample(f"{one.id}: instances.json has no {'mask' if one.image else 'image'} for it: leave it out")
        file_name, size = one.image
        try:
            mask = coco_mask(one.segmentation, *size)
            if not mask.any():
                raise ValueError("its area is zero")
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise BadSample(f"{one.id}: its mask in instances.json is of no use ({_reason(error)}): leave it out") from error
        return Sample(read_image(self.folder / file_name, self.mend, size), one.query, mask, None, one.id)


def coco_mask(segmentation: list | dict, width: int, height: int) -> np.ndarray:
    """A COCO annotation's mask, (H, W) bool: polygons of several parts, or RLE (a crowd's), compressed or not.

    Raises ValueError, LookupError, TypeError or OverflowError on anything else. pycocotools hands numbers to C unchecked: a
    NaN kills it, broken runs corrupt its memory. So corners and runs are checked before it sees them.
    """
    if isinstance(segmentation, list):
        parts = [part for part in segmentation if len(part) >= 6]  # two points enclose nothing
        if not all((np.abs(np.array(part, np.float64)) < 1e5).all() for part in parts):
            raise ValueError("a corner is no finite number")
        return coco.decode(coco.merge([coco.frPyObjects([part], height, width)[0] for part in parts])).astype(bool)
    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = uncompress(runs.encode() if isinstance(runs, str) else runs)
    lengths = all(type(run) is int and run >= 0 for run in runs)
    if segmentation["size"] != [height, width] or not lengths or sum(runs) != height * width:
        raise ValueError(f"its runs do not fill the image, which has {width} x {height} pixels")
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)).astype(bool)


def uncompress(text: bytes) -> list[int]:
    """Run lengths out of COCO's compressed RLE. A character less 48 holds five bits, low ones first, and a sixth that says
    whether more follow; numbers are signed, and from the fourth on they are differences to the run before the last."""
    runs, number, bits = [], 0, 0
    for code in text:
        number |= (code - 48 & 31) << bits
        bits += 5
        if not code - 48 & 32:
            number -= (code - 48 & 16) << bits - 4  # the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = bits = 0
    return runs


def read_image(file: Path, mend: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture to RGB. Raises BadSample if it is missing, broken, or not of `size`, (width, height) in pixels.

    Without `size` it is turned upright as its EXIF data ask, like in ReasonSeg's reader; COCO's masks are for the stored pixels.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as stored:
            image = (stored if size else ImageOps.exif_transpose(stored)).convert("RGB")
        if size and image.size != tuple(size):
            raise ValueError(f"it is {image.width} x {image.height}, its annotation is for {size[0]} x {size[1]}")
        return image
    except FileNotFoundError as error:
        raise BadSample(f"{file} is missing: get it with {mend}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{file} cannot be used ({_reason(error)}): get it again with {mend}") from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# ---------------------------------------------------------------------------------------------------------------------
# ReasonSeg: questions that take reasoning (LISA, arXiv 2308.00692)
# ---------------------------------------------------------------------------------------------------------------------


class ReasonSeg:
    """A split of ReasonSeg: ROOT/<split>/NAME.jpg with NAME.json. [index] gives a `Sample` or raises `BadSample`.

    The query is the first of an image's texts, and masks are painted as LISA's reader does, so that figures compare. An
    image without a target teaches nothing, so in train it is a bad sample. In val and test its mask is all False, and the
    right answer to it is an empty mask.
    """

    def __init__(self, root: Path | str, split: str):
        self.split, self.folder = split, Path(root) / split
        self.names = sorted({file.stem for file in self.folder.glob("[!.]*") if file.suffix in (".jpg", ".json")})
        if not self.names:
            raise FileNotFoundError(f"{self.folder} holds no .jpg and .json: python data.py fetch reasonseg says how to get them")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        file, mend = self.folder / f"{name}.json", "python data.py fetch reasonseg, which says how"
        image = read_image(self.folder / f"{name}.jpg", mend)
        try:
            raw = file.read_bytes()
            try:
                note = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError:
                note = json.loads(raw.decode("cp1252"))  # a few files of the set
            query = note["text"] if isinstance(note["text"], str) else note["text"][0]
            target, ignore = labelme_masks(note["shapes"], *image.size)
            if self.split == "train" and not target.any():
                raise ValueError("no pixel is target")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadSample(f"{file} gives no query and mask ({_reason(error)}): leave it out, or get it with {mend}") from error
        return Sample(image, query.strip(), target, ignore if ignore.any() else None, f"reasonseg-{self.split}-{name}")


def labelme_masks(shapes: list[dict], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Target and ignore, each (H, W) bool, of labelme polygons, as LISA's utils/data_processing.py paints them.

    The largest area comes first, so a smaller one lies on top, whichever it is: a hole marked `ignore` in a target, and a
    target within that. Of equal areas the one listed later comes first. `flag` is a label without meaning.
    """
    named = [(shape["label"].lower(), shape["points"]) for shape in reversed(shapes)]
    regions = [("ignore" in label, paint(points, width, height)) for label, points in named if label != "flag"]
    target, ignore = np.zeros((2, height, width), bool)
    for ignored, region in sorted(regions, key=lambda pair: -pair[1].sum()):
        target[region], ignore[region] = not ignored, ignored
    return target, ignore


def paint(points: list, width: int, height: int) -> np.ndarray:
    """A filled polygon with its outline, (H, W) bool: the pixels that cv2.polylines and cv2.fillPoly paint in OpenCV 4.8,
    which LISA pins. Pillow's polygon is another one in two cases of three.

    points: N corners x, y in image pixels, cut to whole numbers. One gives a dot, two a line. Corners outside the image, which
            labelme does not allow, may move an edge by a pixel: OpenCV shortens such edges first, rounding in its own way.
    """
    corners = np.array(points, np.float64).reshape(len(points), 2)
    if not (len(corners) and (np.abs(corners) < 1e5).all()):
        raise ValueError("a polygon has no corners, or one that is no finite number")
    corners = corners.astype(np.int64)
    outline, rows, columns = [], [], []
    for (x1, y1), (x2, y2) in zip(corners.tolist(), np.roll(corners, -1, 0).tolist(), strict=True):
        if x1 > x2:
            x1, y1, x2, y2 = x2, y2, x1, y1
        # The outline: Bresenham's line from left to right. Half way between two pixels it stays on its row or column.
        steep, sign = abs(y2 - y1) > x2 - x1, 1 if y2 > y1 else -1
        length, rise = sorted((x2 - x1, abs(y2 - y1)), reverse=True)
        along = np.arange(length + 1)
        across = -((length - 2 * rise * along) // max(2 * length, 1))
        outline.append(np.stack((y1 + sign * (along if steep else across), x1 + (across if steep else along))))
        # The inside: where the edge crosses each row but its last, in OpenCV's fixed point of 1/65536 pixel, rounded.
        if y1 != y2:
            row = np.arange(min(y1, y2), max(y1, y2))
            slope = sign * ((x2 - x1) * 65536 // abs(y2 - y1))
            rows.append(row)
            columns.append(((x1 if y1 < y2 else x2) * 65536 + 32768 + (row - row[0]) * slope) >> 16)
    mask, fill = np.zeros((height, width), bool), np.zeros((height, width + 1), np.int32)
    y, x = np.concatenate(outline, 1)
    seen = (0 <= y) & (y < height) & (0 <= x) & (x < width)
    mask[y[seen], x[seen]] = True
    if rows:
        row, column = np.concatenate(rows), np.concatenate(columns)
        order = np.lexsort((column, row))  # a closed line crosses each row an even number of times: pairs never mix rows
        row, column = row[order], column[order]
        seen = (0 <= row) & (row < height)
        row, left, right = row[seen][::2], column[seen][::2], column[seen][1::2]
        np.add.at(fill, (row, left.clip(0, width)), 1)
        np.add.at(fill, (row, (right + 1).clip(0, width)), -1)
    return mask | (fill.cumsum(1)[:, :width] > 0)


# ---------------------------------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------------------------------


def load_data(spec: str, split: str, seed: int = 0, samples: int = 3000):
    """The data set that `--data` names; supports len() and [index], and yields `Sample`.

    spec:    "shapes", or "refcocog:ROOT", "refcoco:ROOT", "refcoco+:ROOT", "reasonseg:ROOT", each with or without /SPLIT.
    split:   "train" takes SPLIT or train; "heldout", for evaluation, takes SPLIT unless that is train, else val.
    seed:    of the training draw: which scenes, which expressions. Held-out samples do not depend on it.
    samples: RefCOCO's expressions to train on (paper: 3,000). Evaluation takes all of them.
    Raises ValueError or FileNotFoundError with one line that says what is wrong and what to do.
    """
    name, _, path = spec.partition(":")
    if spec == "shapes":
        return Shapes(split, seed if split == "train" else 0)
    if name not in SPLITS or not path:
        raise ValueError(f"no data set is called {spec!r}: use shapes, or {', '.join(f'{known}:ROOT' for known in SPLITS)}")
    root, part = Path(path).expanduser(), "train"
    # ROOT/val names the split val of ROOT, unless it is a root itself that happens to have this name.
    inside = [root / known for known in SPLITS[name]] if name == "reasonseg" else [root / name]
    if root.name in ("train", "val", "test", "testA", "testB") and not any(folder.is_dir() for folder in inside):
        root, part = root.parent, root.name
    if part not in SPLITS[name]:
        raise ValueError(f"{name} has no split {part}: it has {', '.join(SPLITS[name])}")
    if split == "heldout" and part == "train":
        part = "val"
    if name == "reasonseg":
        return ReasonSeg(root, part)
    return RefCOCO(name, root, part, samples, seed) if split == "train" else RefCOCO(name, root, part)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching: `python data.py fetch ...`
# ---------------------------------------------------------------------------------------------------------------------

# A file has its name only once it is whole and has passed a check (an image decodes at its right size, a checkpoint has its
# SHA-256), so the same command can be run again after any accident and goes on where it stopped. The whole of COCO's training
# images is 13 GB; 3,000 of them are half of one.

UNC = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"  # gone more often than not: the Internet Archive comes first
ARCHIVES = {
    name: (f"https://web.archive.org/web/{stamp}/{UNC}/{name}.zip", f"{UNC}/{name}.zip")
    for name, stamp in (("refcocog", 20220413012904), ("refcoco", 20220413011718), ("refcoco+", 20220413011656))
}
COCO_URL = "http://images.cocodataset.org/train2014"
COCO_MB = 0.163  # of an image, on average: train2014 is 13.5 GB of 82,783
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {  # name, bytes, SHA-256 (the digits in the names are of another sum, MD5)
    "vit_b": ("sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}
REASONSEG_BY_HAND = """ReasonSeg lies on Google Drive, which gives no plain link. By hand:
  1. open https://github.com/dvlab-research/LISA and follow "Dataset" to the folder on Google Drive;
  2. unpack what it holds so that there is ROOT/train/NAME.jpg with NAME.json, and ROOT/val and ROOT/test likewise
     (239, 200 and 779 images);
  3. python samr1_mini.py eval --data reasonseg:ROOT/val"""
TIMEOUT, TRIES, PAUSE = 30, 4, 1.0  # seconds of silence; attempts; seconds before the second, doubled before each further one
MOST_JOBS = 16  # connections at once: these hosts serve everybody
GIVE_UP = 20  # images failed in a row, each tried TRIES times: the host is down, and asking for 3,000 more is no use
LARGEST_IMAGE, LARGEST_ARCHIVE = 2**25, 2**31  # bytes; what is beyond is something else


def download(url: str, file: Path, check: Callable[[Path], object], limit: int, show: bool = False) -> str:
    """Fetch a file of at most `limit` bytes. Until it is whole and `check` (raises ValueError) has passed it is called
    FILE.part, and the next attempt, in this run or another, goes on where that ends. Returns "", or why the file is not there."""
    part = file.with_name(file.name + ".part")
    for attempt in range(TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            transfer(url, part, limit, show)
            check(part)
            os.replace(part, file)
            return ""
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break  # a refusal, not a fault
        except (OSError, http.client.HTTPException) as error:  # the network, or the disk
            reason = f"{type(error).__name__}: {error}"
        except ValueError as error:  # all of it came, and is not what it should be
            reason = str(error)
            part.unlink(missing_ok=True)
    return f"{url}: {reason}"


def transfer(url: str, part: Path, limit: int, show: bool) -> None:
    """Stream a URL to the end of a partial file, or, if the server cannot begin there, to a new one. Raises OSError (which
    urllib's and the sockets' errors are) or http.client.HTTPException, ValueError beyond the limit."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "samr1-mini"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            return  # the server has nothing beyond what is here: whether that is the file, the check will tell
        raise
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        total = None if response.length is None else have + response.length
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=not show)
        with bar, open(part, "ab" if have else "wb") as out:
            while block := response.read(2**18):
                have += len(block)
                if have > limit:
                    raise ValueError(f"it is larger than {limit:,} bytes")
                out.write(block)
                bar.update(len(block))
        if response.length:  # bytes that were promised and did not come; http.client lets that pass
            raise http.client.IncompleteRead(b"", response.length)


def unpack(archive: Path, files: list[Path]) -> None:
    """Copy files out of a zip, found in it by their names. Where they land is decided here: a path in the archive is never
    used, a link is copied as the text that it is, and nothing else is unpacked. Raises ValueError if that fails."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            for file in files:
                entries = [entry for entry in bundle.infolist() if entry.filename.split("/")[-1] == file.name]
                if not entries or entries[0].file_size > LARGEST_ARCHIVE:
                    raise ValueError(f"it holds no {file.name}, or an absurdly large one")
                part = file.with_name(file.name + ".part")
                with bundle.open(entries[0]) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(part, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or a strange method
        raise ValueError(f"it cannot be unpacked ({error})") from error


def fetch_refer(name: str, root: Path, split: str | None, samples: int, seed: int, heldout: int, jobs: int) -> int:
    """Annotations, then images: of the training draw and of the first `heldout` expressions of `RefCOCO(name, root, "val")`,
    which `samr1_mini.py train` evaluates on; or of one split, of train the draw."""
    annotations, photographs = [root / name / REFS[name], root / name / "instances.json"], root / PHOTOGRAPHS
    for folder in (root / name, photographs):
        folder.mkdir(parents=True, exist_ok=True)
    for url in ARCHIVES[name]:
        if all(file.is_file() for file in annotations):
            break
        print(f"annotations from {url}")
        archive = root / name / f"{name}.zip"
        if reason := download(url, archive, lambda part: unpack(part, annotations), LARGEST_ARCHIVE, show=True):
            print(f"not fetched: {reason}", file=sys.stderr)
        archive.unlink(missing_ok=True)
    if not all(file.is_file() for file in annotations):
        print("no mirror gave the annotations: run the same command again later", file=sys.stderr)
        return 1

    wanted = [("train", samples, seed)] if split in (None, "train") else [(split, None, 0)]
    if not split and heldout:
        wanted.append(("val", heldout, 0))  # a small draw is the beginning of a large one, so of all of val
    images = {}  # file name: (width, height)
    for part, size, word in wanted:
        expressions = read_refer(name, root, part, size, word)
        found = dict(one.image for one in expressions if one.image)
        here = sum((photographs / file_name).is_file() for file_name in found)
        print(f"{name} {part}: {len(expressions):,} expressions on {len(found):,} images, {here:,} of them at hand")
        images |= found
    if absent := sum(not (photographs / file_name).is_file() for file_name in images):
        print(f"fetching {absent:,} from {COCO_URL}: about {absent * COCO_MB:,.0f} MB")

    # Ctrl-C is only noted until the threads have let go: as an exception it may strike while one of their locks is held.
    stopped = threading.Event()
    usual = signal.signal(signal.SIGINT, lambda *_: stopped.set())

    def get(file_name: str) -> str:
        if stopped.is_set():
            return "interrupted"
        file, size, mend = photographs / file_name, images[file_name], "the same command"
        try:
            read_image(file, mend, size)
            return ""  # at hand, and it decodes
        except BadSample:
            return download(f"{COCO_URL}/{file_name}", file, lambda part: read_image(part, mend, size), LARGEST_IMAGE)

    reasons, row = [], 0
    pool = ThreadPoolExecutor(jobs)
    try:
        for reason in tqdm(pool.map(get, images), desc="images", total=len(images)):
            reasons.append(reason)
            row = row + 1 if reason else 0
            if row == GIVE_UP or stopped.is_set():
                break
    finally:  # what has not begun is dropped
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, usual)
    if stopped.is_set():
        raise KeyboardInterrupt
    if lacking := len(images) - reasons.count(""):
        print(f"{lacking:,} images are not there: run the same command again. The first reasons:", file=sys.stderr)
        print("\n".join(f"  {reason}" for reason in [r for r in reasons if r][:3]), file=sys.stderr)
        return 1
    command = f"eval --data '{name}:{root}/{split}'"
    if not split:
        command = f"train --data '{name}:{root}' --train_samples {samples} --data_seed {seed} --eval_samples {heldout}"
    print("all there" + (f": python samr1_mini.py {command}" if len(wanted) == 2 or split not in (None, "train") else ""))
    return 0


def fetch_sam(model: str, folder: Path) -> int:
    """An official checkpoint of SAM."""
    (name, size, digest), file = SAM_FILES[model], folder / SAM_FILES[model][0]

    def check(candidate: Path) -> None:
        found = hashlib.sha256()
        with open(candidate, "rb") as stream:
            while block := stream.read(2**20):
                found.update(block)
        if found.hexdigest() != digest:
            raise ValueError(f"{candidate} has not the SHA-256 of the official file: delete it, and run the same command again")

    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        check(file)
    else:
        print(f"{name}, {size / 1e6:,.0f} MB, from {SAM_URL}")
        if reason := download(f"{SAM_URL}/{name}", file, check, size, show=True):
            print(f"not fetched: {reason}. Run the same command again: it goes on where it stopped", file=sys.stderr)
            return 1
    print(f"all there: --sam {model}:{file}")
    return 0


def fetch_reasonseg(root: Path | None) -> int:
    """How to get it; with a folder, whether it is there."""
    counts = {split: len(list((root / split).glob("*.json"))) for split in SPLITS["reasonseg"]} if root else {}
    if any(counts.values()):
        print(f"{root} holds " + ", ".join(f"{count} of {split}" for split, count in counts.items()))
        return 0
    print(REASONSEG_BY_HAND)
    return 1 if root else 0


def main(argv: list[str]) -> int:
    """`python data.py ...`. Returns the exit code: 0 all there, 1 not all could be fetched, 2 a wrong command or folder."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")

    def count(text: str, least: int = 1) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number, at least {least}")
        return int(text)

    parser = Parser("data.py", description="The data sets of SAM-R1 mini. `data.py fetch --help` says how to get the real ones.")
    fetch = parser.add_subparsers(dest="command", metavar="fetch").add_parser(
        "fetch",
        help="download a data set or a SAM checkpoint",
        description="Download a data set or a SAM checkpoint. Run again, it goes on where it stopped. Of RefCOCO it gets what "
        "training needs: the images of its draw, and of the expressions that it is evaluated on; or those of one --split.",
        epilog="Exit code: 0 all is there; 1 not all could be fetched, run it again; 2 a wrong command or folder.",
    )
    add, jobs = fetch.add_argument, range(1, MOST_JOBS + 1)
    add("what", choices=[*ARCHIVES, "reasonseg", "sam"], help="sam is the segmenter's checkpoint")
    add("--out", type=Path, metavar="ROOT", help="the folder to put it in; `--data NAME:ROOT` finds it there")
    add("--samples", type=count, default=3000, metavar="N", help="RefCOCO: size of the training draw (3000)")
    add("--seed", type=int, default=0, metavar="N", help="RefCOCO: of the training draw (0)")
    add("--heldout", type=lambda text: count(text, 0), default=256, metavar="N",
        help="RefCOCO: how many expressions of val, for the evaluation before and after training; 0 for none (256)")  # fmt: skip
    add("--split", help="RefCOCO: the images of this split alone; of train, those of the draw")
    add("--jobs", type=int, choices=jobs, default=4, metavar="N", help=f"RefCOCO: connections at once, up to {MOST_JOBS} (4)")
    add("--model", choices=[*SAM_FILES], help="sam: which one")
    args = parser.parse_args(argv)
    if not args.command:
        parser.print_help()
        return 0
    try:
        if args.what == "reasonseg":
            return fetch_reasonseg(args.out)
        if not args.out:
            fetch.error("name the folder with --out")
        if args.what == "sam":
            return fetch_sam(args.model, args.out) if args.model else fetch.error(f"add --model {'|'.join(SAM_FILES)}")
        if args.split not in (None, *SPLITS[args.what]):
            fetch.error(f"{args.what} has no split {args.split!r}: it has {', '.join(SPLITS[args.what])}")
        return fetch_refer(args.what, args.out, args.split, args.samples, args.seed, args.heldout, args.jobs)
    except (OSError, ValueError) as error:
        print(f"data.py fetch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""data.py - what the policy sees: an image, a query, and the mask that answers it.

Read this file first. It holds
  1. `Sample`, the record that every data set yields;
  2. `Shapes`, drawn scenes whose queries take a small inference. They are the embedded default:
     nothing is downloaded, and there are as many scenes as a run asks for;
  3. the prompt that asks the policy to reason, then to answer with a box and two points.

The readers of RefCOCO and ReasonSeg, and `load_data`, are in plumbing/photos.py.

Coordinate frames. The image and the mask of a sample use *image pixels*: x to the right, y down,
origin at the top left corner. The policy sees the image resized to a square, so its answers use
*policy pixels*. `reward.sam_prompt` scales them back to image pixels.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw


@dataclass
class Sample:
    """One image, one query, and the region that the query refers to.

    image:  PIL image, RGB, W x H.
    query:  the referring expression or question.
    mask:   (H, W) bool, True on the target.
    ignore: (H, W) bool, True on pixels that the metrics leave out, or None (ReasonSeg has them).
    id:     a name that is unique within the data set.
    """

    image: Image.Image
    query: str
    mask: np.ndarray
    ignore: np.ndarray | None
    id: str


class BadSample(ValueError):
    """One sample cannot be used: its image is missing or broken, or its annotation has no mask.

    The message is one line that names the file and the remedy. Training skips such samples and
    counts them.
    """


# --------------------------------------------------------------------------------------------------
# Shapes: drawn scenes
# --------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
}
KINDS = ("circle", "square", "triangle", "star")
SIZES = ((96, 96), (96, 96), (128, 96), (96, 128))  # W, H in pixels: half the scenes are not square
MARGIN = 0.06  # "left of", "topmost": the second is at least this share of the image side away
RATIO = 1.25  # "largest", "smallest": the second's area differs at least by this factor


@dataclass
class Thing:
    """One drawn object, its visible pixels, and the tightest box around them."""

    kind: str
    colour: str
    mask: np.ndarray  # (H, W) bool, the visible pixels
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in image pixels, x2 and y2 exclusive
    centre: tuple[float, float]  # x, y of the centre of the box

    @property
    def area(self) -> int:
        return int(self.mask.sum())


class Shapes:
    """Drawn scenes of 2 to 5 shapes, each with one unambiguous query about one of them.

    Item i depends on (split, seed, i) alone. It is drawn when it is read, and is the same in every
    run. The splits are "train", "heldout" and "warmup" (which the tiny base model was trained on).
    They seed the generator differently, so no scene is in two of them.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 100_000,
        things: tuple[int, int] = (2, 5),
    ):
        self.split, self.seed, self.size, self.things = split, seed, size, things

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        image, things, query, target = self.scene(index)
        name = f"shapes-{self.split}-{self.seed}-{index}"
        return Sample(image, query, things[target].mask, None, name)

    def scene(self, index: int) -> tuple[Image.Image, list[Thing], str, int]:
        """Return (image, things, query, index of the thing that the query refers to)."""
        rng = random.Random(f"{self.split}-{self.seed}-{index}")
        while True:  # draw again if no query about the scene is unambiguous
            image, things = draw_scene(rng, rng.randint(*self.things))
            queries = unambiguous_queries(things, *image.size)
            if queries:
                # Choose the sort of query first. Otherwise the common sorts would dominate.
                sort = rng.choice(sorted(queries))
                query, target = rng.choice(queries[sort])
                return image, things, query, target


def draw_scene(rng: random.Random, count: int) -> tuple[Image.Image, list[Thing]]:
    """Draw `count` shapes on a shaded, noisy background. Later shapes cover earlier ones."""
    width, height = rng.choice(SIZES)
    circles = place_circles(rng, width, height, count)
    image = Image.fromarray(background(rng, width, height))
    looks = []  # (kind, colour) of each shape
    owner = np.zeros((height, width), np.uint8)  # number of the visible shape, 0: background
    for number, (x, y, radius) in enumerate(circles, 1):
        kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
        stencil = Image.new("1", (width, height))
        draw_shape(ImageDraw.Draw(stencil), kind, x, y, radius)
        image.paste(COLOURS[colour], mask=stencil)
        owner[np.asarray(stencil)] = number
        looks.append((kind, colour))
    pixels = np.asarray(image, np.int16) + noise(rng, width, height)
    things = []
    for number, (kind, colour) in enumerate(looks, 1):
        mask = owner == number
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        things.append(Thing(kind, colour, mask, box, centre))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things


def place_circles(
    rng: random.Random, width: int, height: int, count: int
) -> list[tuple[float, float, float]]:
    """Choose centre and radius (x, y, r) of each shape, in pixels, so that all lie in the image.

    In 40 % of the scenes the shapes touch or overlap a little: there a loose box costs mask IoU.
    """
    crowded = rng.random() < 0.4
    nearest = 0.8 if crowded else 1.1  # smallest distance of two centres, in units of the two radii
    placed = []
    while len(placed) < count:
        radius = rng.uniform(0.09, 0.2) * min(width, height)
        if crowded and placed:
            x, y, other = rng.choice(placed)
            reach, angle = (radius + other) * rng.uniform(0.85, 1.05), rng.uniform(0, 2 * np.pi)
            x, y = x + reach * np.cos(angle), y + reach * np.sin(angle)
        else:
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        inside = radius <= x <= width - radius and radius <= y <= height - radius
        if inside and all(np.hypot(x - a, y - b) > nearest * (radius + r) for a, b, r in placed):
            placed.append((x, y, radius))
        elif rng.random() < 0.02:  # there may be no room left: start again
            placed = []
    return placed


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float) -> None:
    """Paint one upright shape at centre (x, y), in pixels.

    radius: of the circumscribed circle; the side of a square is 1.7 times the radius.
    """
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    elif kind == "square":
        half = 0.85 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=1)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=1)
    else:  # star: ten corners, outer and inner in turn, the first one at the top
        corners = [(radius * (0.45 if k % 2 else 1.0), np.pi * (k / 5 - 0.5)) for k in range(10)]
        draw.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in corners], fill=1)


@lru_cache
def ramps(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) ramps from 0 to 1, to the right and downwards."""
    x = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    return x, y


def background(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8. Red fades to the right and blue fades downwards.

    The gradients tell a small vision tower where a patch is. It learns positions in half the time.
    """
    x, y = ramps(width, height)
    light, fall = rng.uniform(235, 250), rng.uniform(90, 120)
    channels = (light - fall * x, np.full_like(x, light - rng.uniform(20, 45)), light - fall * y)
    return np.stack(channels, -1).astype(np.uint8)


def noise(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 1) int16 in -6..6, the same in all channels."""
    raw = np.frombuffer(rng.randbytes(width * height), np.uint8).reshape(height, width, 1)
    return raw.astype(np.int16) % 13 - 6


def unambiguous_queries(
    things: list[Thing], width: int, height: int
) -> dict[str, list[tuple[str, int]]]:
    """All queries that fit exactly one thing: {sort of query: [(query, index of the thing), ...]}.

    Sorts: "look" (the red star), "only" (the only star), "size" (the largest circle),
    "edge" (the leftmost shape), "relation" (the shape left of the blue square).
    """
    found = {}

    def add(sort: str, query: str, index: int) -> None:
        found.setdefault(sort, []).append((query, index))

    def family(kind: str | None, colour: str | None) -> list[int]:
        same = [kind in (None, t.kind) and colour in (None, t.colour) for t in things]
        return [i for i, fits in enumerate(same) if fits]

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

    if len(things) > 1:
        words = ("leftmost", "left of", "rightmost", "right of")
        add_positions(things, 0, width, words, family, add)
        add_positions(things, 1, height, ("topmost", "above", "bottommost", "below"), family, add)
    return found


def add_positions(things, axis: int, side: int, words: tuple[str, ...], family, add) -> None:
    """Add the "edge" and "relation" queries along one axis (0: x, 1: y; its `side` in pixels)."""
    place = [thing.centre[axis] for thing in things]
    order = sorted(range(len(things)), key=place.__getitem__)
    for (end, second, *_), edge, relation in ((order, *words[:2]), (order[::-1], *words[2:])):
        if abs(place[second] - place[end]) <= MARGIN * side:
            continue
        add("edge", f"the {edge} shape", end)
        # All others lie beyond `second`, so exactly one shape is "left of" it. Ask only if each of
        # the others is clearly on its side of `second`, and if `second` is easy to name.
        others = [i for i in order if i != second]
        clear = all(abs(place[i] - place[second]) > MARGIN * side for i in others)
        kind, colour = things[second].kind, things[second].colour
        if clear and len(family(kind, colour)) == 1:
            add("relation", f"the shape {relation} the {colour} {kind}", end)


# --------------------------------------------------------------------------------------------------
# The prompt
# --------------------------------------------------------------------------------------------------

SYSTEM = (
    "You find things in images. You first think about what the request means and where in the "
    "image its target is, then you point the target out."
)
REQUEST = """Find in this image: {query}

First reason inside <think> </think>: which objects come into question, what tells the right one \
apart, and where it is.
Then answer inside <answer> </answer> with nothing but JSON: the tightest box around the target, \
and two points that lie well inside it, {units}.

<think>your reasoning</think><answer>{{"bbox": [x1, y1, x2, y2], "points_1": [x, y], \
"points_2": [x, y]}}</answer>"""
UNITS = {
    "pixels": "in pixels of the {side} x {side} image, x to the right and y down",
    "thousandths": "in thousandths of the image's width and height (0 to 1000), "
    "x to the right and y down",
}


def messages(query: str, style: str, units: str, side: int) -> list[dict]:
    """The conversation that asks the policy a query, in the form that chat templates take.

    style: "full" explains the task to a model that was not trained on it. The paper gives no
           wording, so this one is ours. "brief" is the query alone, for a model that knows the
           task: the tiny one sees 16 image tokens, and a page of instructions would hide them.
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

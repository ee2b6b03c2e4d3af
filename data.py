"""data.py - what the policy sees: an image, a query, and the mask that answers it.

Read this file first. It holds
  1. `Sample`, the record that every data set yields;
  2. `Shapes`, drawn scenes whose queries take a small inference. They are the embedded default:
     nothing is downloaded, and there are as many scenes as a run asks for;
  3. the prompt that asks the policy to reason, then to answer with a box and two points.

How shapes are painted and how queries are found is in plumbing/scenes.py. The readers of RefCOCO
and ReasonSeg, and `load_data`, are in plumbing/photos.py.

Coordinate frames. The image and the mask of a sample use *image pixels*: x to the right, y down,
origin at the top left corner. The policy sees the image resized to a square, so its answers use
*policy pixels*. `reward.sam_prompt` scales them back to image pixels.
"""

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from plumbing.prompts import REQUESTS, plain_query
from plumbing.scenes import COLOURS, PLAIN_KINDS, background, draw_shape, noise, unambiguous_queries


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

SIZES = ((96, 96), (96, 96), (128, 96), (96, 128))  # W, H in pixels: half the scenes are not square
SMALL, LARGE = (0.09, 0.2), (0.2, 0.32)  # radius over short side: single shape, cluster

# A cluster is two shapes around one centre. The front shape hides the middle of the back shape, so
# a box around the back shape does not tell which of the two is meant: its points have to.
CLUSTER_SHARE = 0.75  # share of scenes with a cluster
CLUSTERS = {  # share of each sort
    "inlay": 0.6,  # a diamond on a square with the same box: only four corners of the square show
    "ring": 0.2,  # a shape in the hole of a ring
    "covered": 0.2,  # a shape on the middle of a circle or a square
}
HARD_SHARE = 0.9  # share of queries about the back shape, in scenes where one can be asked


@dataclass
class Thing:
    """One drawn object, its visible pixels, and the tightest box around them."""

    kind: str
    colour: str
    mask: np.ndarray  # (H, W) bool, the visible pixels
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in image pixels, x2 and y2 exclusive
    centre: tuple[float, float]  # x, y of the centre of the box

    @cached_property
    def area(self) -> int:
        return int(self.mask.sum())

    @property
    def box_area(self) -> int:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def hard(self) -> bool:
        """Whether the centre of its box shows something else, so that the points decide."""
        x, y = self.centre
        return not self.mask[int(y), int(x)]


class Shapes:
    """Drawn scenes of 2 to 5 shapes, each with one unambiguous query about one of them.

    Item i depends on i and the arguments alone. It is drawn when it is read, and is the same in
    every run. The splits are "train", "heldout" and "warmup" (for the tiny models). They seed the
    generator differently, so no scene is in two.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 100_000,
        things: tuple[int, int] = (2, 5),
        hard_share: float = HARD_SHARE,
    ):
        self.split, self.seed, self.size = split, seed, size
        self.things, self.hard_share = things, hard_share

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
            hard = {sort: [q for q in qs if things[q[1]].hard] for sort, qs in queries.items()}
            hard = {sort: qs for sort, qs in hard.items() if qs}
            if hard and rng.random() < self.hard_share:
                queries = hard
            if queries:
                # Choose the kind of query first. Otherwise the common kinds would dominate.
                kind = rng.choice(sorted(queries))
                query, target = rng.choice(queries[kind])
                return image, things, query, target


def draw_scene(rng: random.Random, count: int) -> tuple[Image.Image, list[Thing]]:
    """Draw `count` shapes on a shaded, noisy background (at least two if there is a cluster).

    Later shapes cover earlier ones. The cluster comes last, so nothing covers it.
    """
    width, height = rng.choice(SIZES)
    cluster = rng.random() < CLUSTER_SHARE
    circles = place_circles(rng, width, height, max(1, count - 1) if cluster else count, cluster)
    single = circles[1:] if cluster else circles
    shapes = [(rng.choice(PLAIN_KINDS), rng.choice(list(COLOURS)), *circle) for circle in single]
    if cluster:
        shapes += cluster_shapes(rng, *circles[0])
    image = Image.fromarray(background(rng, width, height))
    owner = np.zeros((height, width), np.uint8)  # number of the visible shape, 0: background
    for number, (kind, colour, *circle) in enumerate(shapes, 1):
        stencil = Image.new("1", (width, height))
        draw_shape(ImageDraw.Draw(stencil), kind, *circle)
        image.paste(COLOURS[colour], mask=stencil)
        owner[np.asarray(stencil)] = number
    pixels = np.asarray(image, np.int16) + noise(rng, width, height)
    things = [
        visible_thing(kind, colour, owner == number)
        for number, (kind, colour, *_) in enumerate(shapes, 1)
    ]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things


def place_circles(
    rng: random.Random, width: int, height: int, count: int, cluster: bool
) -> list[tuple[float, float, float]]:
    """Choose centre and radius (x, y, r) of each shape, in pixels, so that all lie in the image.

    With `cluster`, the first one is large and stands apart. Otherwise, in 40 % of the scenes, the
    shapes touch or overlap a little: there a loose box costs mask IoU.
    """
    crowded = not cluster and rng.random() < 0.4
    nearest = 0.8 if crowded else 1.1  # smallest distance of two centres, in units of the two radii
    placed = []
    while len(placed) < count:
        radius = rng.uniform(*(LARGE if cluster and not placed else SMALL)) * min(width, height)
        if crowded and placed:
            x, y, other = rng.choice(placed)
            reach = (radius + other) * rng.uniform(0.85, 1.05)
            angle = rng.uniform(0, 2 * np.pi)
            x, y = x + reach * np.cos(angle), y + reach * np.sin(angle)
        else:
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        inside = radius <= x <= width - radius and radius <= y <= height - radius
        apart = (np.hypot(x - a, y - b) > nearest * (radius + r) for a, b, r in placed)
        if inside and all(apart):
            placed.append((x, y, radius))
        elif rng.random() < 0.02:  # about every 50 failures: there may be no room left
            placed = []
    return placed


def cluster_shapes(
    rng: random.Random, x: float, y: float, radius: float
) -> list[tuple[str, str, float, float, float]]:
    """The back shape and the front shape of a cluster, each as (kind, colour, x, y, radius)."""
    back, front = rng.sample(list(COLOURS), 2)
    sort = rng.choices(list(CLUSTERS), list(CLUSTERS.values()))[0]
    if sort == "inlay":  # both reach 0.85 * radius from the centre: the same box, to the pixel
        return [("square", back, x, y, radius), ("diamond", front, x, y, 0.85 * radius)]
    kind = rng.choice(PLAIN_KINDS)
    if sort == "ring":
        return [("ring", back, x, y, radius), (kind, front, x, y, 0.42 * radius)]
    back_kind = rng.choice(("circle", "square"))
    return [(back_kind, back, x, y, radius), (kind, front, x, y, 0.5 * radius)]


def visible_thing(kind: str, colour: str, mask: np.ndarray) -> Thing:
    """The thing whose visible pixels are `mask`, (H, W) bool."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Thing(kind, colour, mask, box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


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
           "segzero" and "visionreasoner" are for their checkpoints, see plumbing/prompts.py.
    units: "pixels" or "thousandths", see `UNITS`.
    side:  side of the square image that the policy sees, in pixels.
    """
    request = {"full": REQUEST, "brief": "find {query}", **REQUESTS}[style]
    query, where = plain_query(query, style), UNITS[units].format(side=side)
    request = request.format(query=query, units=where)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request}]}
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    return [system, user] if style == "full" else [user]

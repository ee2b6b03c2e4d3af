"""scenes.py - draw scenes, find the queries that fit them, and find good points of a mask."""

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
}
PLAIN_KINDS = ("circle", "square", "triangle", "star")  # these also stand alone
KINDS = (*PLAIN_KINDS, "diamond", "ring")  # diamonds and rings occur in clusters only
MARGIN = 0.06  # "left of", "topmost": the second is at least this share of the image side away
RATIO = 1.25  # "largest", "smallest": the second's area differs at least by this factor

SIZES = ((96, 96), (96, 96), (128, 96), (96, 128))  # W, H in pixels: half the scenes are not square
SMALL = (0.09, 0.2)  # radius of a single shape, over the short side of the image
LARGE = (0.2, 0.32)  # radius of a cluster

# A cluster is two shapes around one centre. The front shape hides the middle of the back shape, so
# a box around the back shape does not tell which of the two is meant: its points have to.
CLUSTER_SHARE = 0.75  # share of scenes with a cluster
CLUSTERS = {  # share of each sort of cluster
    "inlay": 0.6,  # a diamond on a square with the same box: only four corners of the square show
    "ring": 0.2,  # a shape in the hole of a ring
    "covered": 0.2,  # a shape on the middle of a circle or a square
}
HARD_SHARE = 0.9  # probability to ask about the back shape, in scenes where that is possible


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


def draw_scene(rng: random.Random, count: int) -> tuple[Image.Image, list[Thing]]:
    """Draw `count` shapes on a shaded, noisy background (at least two if there is a cluster).

    Later shapes cover earlier ones. The cluster comes last, so nothing covers it.
    """
    width, height = rng.choice(SIZES)
    cluster = rng.random() < CLUSTER_SHARE
    places = max(1, count - 1) if cluster else count
    circles = place_circles(rng, width, height, places, cluster)
    shapes = []  # (kind, colour, x, y, radius), from the back to the front
    for x, y, radius in circles[1:] if cluster else circles:
        kind = rng.choice(PLAIN_KINDS)
        colour = rng.choice(list(COLOURS))
        shapes.append((kind, colour, x, y, radius))
    if cluster:
        x, y, radius = circles[0]
        shapes += cluster_shapes(rng, x, y, radius)
    image = Image.fromarray(background(rng, width, height))
    owner = np.zeros((height, width), np.uint8)  # number of the visible shape, 0: background
    for number, (kind, colour, x, y, radius) in enumerate(shapes, 1):
        stencil = Image.new("1", (width, height))
        draw_shape(ImageDraw.Draw(stencil), kind, x, y, radius)
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
        least, most = LARGE if cluster and not placed else SMALL
        radius = rng.uniform(least, most) * min(width, height)
        if crowded and placed:
            x, y, other = rng.choice(placed)
            reach = (radius + other) * rng.uniform(0.85, 1.05)
            angle = rng.uniform(0, 2 * np.pi)
            x = x + reach * np.cos(angle)
            y = y + reach * np.sin(angle)
        else:
            x = rng.uniform(radius, width - radius)
            y = rng.uniform(radius, height - radius)
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
    columns = np.flatnonzero(mask.any(0))
    rows = np.flatnonzero(mask.any(1))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Thing(kind, colour, mask, box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float) -> None:
    """Paint one upright shape at centre (x, y), in pixels.

    radius: of the circumscribed circle; the side of a square is 1.7 times the radius.
    """

    def disc(radius: float, fill: int = 1) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def polygon(corners: list[tuple[float, float]]) -> None:
        draw.polygon([(x + a * radius, y + b * radius) for a, b in corners], fill=1)

    if kind == "circle":
        disc(radius)
    elif kind == "ring":
        disc(radius)
        disc(0.6 * radius, fill=0)
    elif kind == "square":
        half = 0.85 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=1)
    elif kind == "triangle":
        polygon([(0, -1), (1, 1), (-1, 1)])
    elif kind == "diamond":
        polygon([(0, -1), (1, 0), (0, 1), (-1, 0)])
    else:  # star: ten corners, outer and inner in turn, the first one at the top
        corners = [(0.45 if k % 2 else 1.0, np.pi * (k / 5 - 0.5)) for k in range(10)]
        polygon([(r * np.cos(angle), r * np.sin(angle)) for r, angle in corners])


def background(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8. Red fades to the right and blue fades downwards.

    The gradients tell a small vision tower where a patch is. It learns positions in half the time.
    """
    x = np.linspace(0, 1, width, dtype=np.float32)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    light = rng.uniform(235, 250)
    fall = rng.uniform(90, 120)
    pixels = np.empty((height, width, 3), np.float32)
    pixels[..., 0] = light - fall * x
    pixels[..., 1] = light - rng.uniform(20, 45)
    pixels[..., 2] = light - fall * y
    return pixels.astype(np.uint8)


def noise(rng: random.Random, width: int, height: int) -> np.ndarray:
    """(H, W, 1) int16 in -6..6, the same in all channels."""
    raw = np.frombuffer(rng.randbytes(width * height), np.uint8).reshape(height, width, 1)
    return raw.astype(np.int16) % 13 - 6


def clearly_larger(a: Thing, b: Thing) -> bool:
    """Whether `a` is larger than `b`, both by its visible area and by its box.

    A reader may judge a covered shape by what is seen of it or by its outline.
    """
    return a.area >= RATIO * b.area and a.box_area >= b.box_area


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
        *others, largest = sorted(members, key=lambda i: things[i].area)
        if all(clearly_larger(things[largest], things[i]) for i in others):
            add("size", f"the largest {name}", largest)
        smallest, *others = sorted(members, key=lambda i: things[i].area)
        if all(clearly_larger(things[i], things[smallest]) for i in others):
            add("size", f"the smallest {name}", smallest)

    for sort, query, index in position_queries(things, width, height):
        add(sort, query, index)
    return found


def position_queries(things: list[Thing], width: int, height: int) -> list[tuple[str, str, int]]:
    """The queries of the sorts "edge" and "relation", as (sort, query, index of the thing)."""
    if len(things) < 2:
        return []
    found = []
    looks = [(thing.colour, thing.kind) for thing in things]
    x = [thing.centre[0] for thing in things]
    y = [thing.centre[1] for thing in things]
    for places, side, edge, relation in (
        (x, width, "leftmost", "left of"),
        ([-v for v in x], width, "rightmost", "right of"),
        (y, height, "topmost", "above"),
        ([-v for v in y], height, "bottommost", "below"),
    ):
        margin = MARGIN * side
        first, second, *_ = order = sorted(range(len(things)), key=places.__getitem__)
        if places[second] - places[first] <= margin:
            continue
        found.append(("edge", f"the {edge} shape", first))
        # All others lie beyond `second`, so exactly one shape is "left of" it. Ask only if each of
        # the others is clearly on its side of `second`, and if `second` is easy to name.
        clear = all(abs(places[i] - places[second]) > margin for i in order if i != second)
        if clear and looks.count(looks[second]) == 1:
            landmark = " ".join(looks[second])
            found.append(("relation", f"the shape {relation} the {landmark}", first))
    return found


def taught_thought(thing: Thing, size: tuple[int, int]) -> str:
    """What the tiny model was taught to think about a thing in an image of `size` (W, H)."""
    x, y = thing.centre
    width, height = size
    column = ("left", "middle", "right")[min(2, int(3 * x / width))]
    row = ("top", "middle", "bottom")[min(2, int(3 * y / height))]
    return f"the {thing.colour} {thing.kind} is at the {row} {column}"


def interior_points(mask: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Two good points of a mask, far from its edges: one in its upper and one in its lower half.

    mask: (H, W) bool. Returns ((x, y), (x, y)) in image pixels, the centres of two pixels that
    belong to the mask, or () for an empty mask.

    Of pixels equally far from the edges, the rule prefers those at 22 % and 78 % of the height and
    near the middle column; of two symmetric sides, the left one. So a policy can learn it.

    >>> mask = np.zeros((9, 9), bool)
    >>> mask[:, 2:7] = True
    >>> interior_points(mask)
    ((4.5, 2.5), (4.5, 6.5))
    """
    if not mask.any():
        return ()
    stride = max(1, min(mask.shape) // 96)  # photographs: about the resolution of the drawn scenes
    if not mask[::stride, ::stride].any():
        stride = 1
    small = mask[::stride, ::stride]
    columns = np.flatnonzero(small.any(0))
    rows = np.flatnonzero(small.any(1))
    top = rows[0]
    height = rows[-1] + 1 - top
    middle = (columns[0] + columns[-1]) / 2
    box = np.s_[top : top + height, columns[0] : columns[-1] + 1]
    small = small[box]  # the rest of the image cannot be chosen
    y, x = np.ogrid[box]
    depth = edge_distance(small, limit=4)
    depth = depth - 0.07 * abs(x - middle) - 0.6 * (x > middle + 3)
    points = []
    for half, share in ((y < top + height / 2, 0.22), (y >= top + height / 2, 0.78)):
        inside = small & half if (small & half).any() else small  # else: a single row
        score = np.where(inside, depth - 0.1 * abs(y - (top + share * height)), -np.inf)
        row, column = divmod(int(score.argmax()), small.shape[1])
        points.append((int(x[0, column]) * stride + 0.5, int(y[row, 0]) * stride + 0.5))
    return tuple(points)


def edge_distance(mask: np.ndarray, limit: int) -> np.ndarray:
    """Distance to the edge of a mask, by erosion: (H, W) bool -> (H, W) float32 in 0..limit.

    0 outside the mask, 1 on its outermost pixels. Pixels beyond the image count as outside.
    Erosion by 4 and by 8 neighbours in turn is close to the Euclidean distance.
    """
    distance = np.zeros(mask.shape, np.float32)
    m = np.pad(mask, 1)
    inner = m[1:-1, 1:-1]  # a view: to erode it is to erode `m`
    for step in range(limit):
        distance += inner
        neighbours = m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
        if step % 2:
            neighbours &= m[:-2, :-2] & m[2:, 2:] & m[:-2, 2:] & m[2:, :-2]
        inner &= neighbours
    return distance


def points_inside(points: tuple[tuple[float, ...], ...], mask: np.ndarray, asked: int = 2) -> float:
    """Share of the `asked` points (x, y), image pixels, that lie in the mask (H, W).

    A missing point counts as outside.
    """
    height, width = mask.shape
    pixels = [(min(int(y), height - 1), min(int(x), width - 1)) for x, y in points]
    return sum(bool(mask[pixel]) for pixel in pixels) / asked

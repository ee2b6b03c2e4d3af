"""scenes.py - how drawn scenes are painted, which queries fit them, and good points of a mask."""

import random
from functools import lru_cache

import numpy as np
from PIL import ImageDraw

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


def clearly_larger(a, b) -> bool:
    """Whether `a` is larger than `b`, both by its visible area and by its box.

    A reader may judge a covered shape by what is seen of it or by its outline.
    """
    return a.area >= RATIO * b.area and a.box_area >= b.box_area


def unambiguous_queries(things: list, width: int, height: int) -> dict[str, list[tuple[str, int]]]:
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


def taught_thought(thing, size: tuple[int, int]) -> str:
    """What the tiny model was taught to think about a thing in an image of `size` (W, H)."""
    (x, y), (width, height) = thing.centre, size
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
    columns, rows = np.flatnonzero(small.any(0)), np.flatnonzero(small.any(1))
    top, height, middle = rows[0], rows[-1] + 1 - rows[0], (columns[0] + columns[-1]) / 2
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    small, (y, x) = small[box], np.ogrid[box]  # the rest of the image cannot be chosen
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

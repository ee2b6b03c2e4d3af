"""Tests of the prompt and of the drawn scenes: data.py and plumbing/scenes.py.

The scenes are compared with their pixels, and a second implementation finds what each query refers
to. RefCOCO and ReasonSeg are in test_photos.py.
"""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from data import Shapes, messages
from plumbing.scenes import COLOURS, KINDS, edge_distance, interior_points, points_inside

DIGEST = "b1bcc7c576f6752fa7beb5067eb12ad7795bddb6a123634e982ab48fb0e25064"
# The promised distances: a share of the image side, and a factor between areas.
MARGIN, RATIO = 0.06, 1.25
NAME = "(?:({}) )?(shape|{})".format("|".join(COLOURS), "|".join(KINDS))
WORDS = ["only", "largest", "smallest", "leftmost", "rightmost", "topmost", "bottommost"]
WORDS += ["left", "right", "above", "below"]


@pytest.fixture(scope="module")
def scenes():
    return [Shapes("train").scene(i) for i in range(800)]


def tight_box(mask):
    """x1, y1, x2, y2 of a mask, x2 and y2 exclusive."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_scenes_never_change():
    """The weights in tiny/ and all figures in the texts belong to these scenes.

    They depend on split, seed and index only.
    """
    random.seed(2)
    state = random.getstate()
    found = hashlib.sha256()
    for split in ("train", "heldout", "warmup"):
        for sample in Shapes(split, size=50):
            found.update(sample.image.tobytes() + sample.mask.tobytes() + sample.query.encode())
    assert found.hexdigest() == DIGEST and random.getstate() == state


def test_splits_and_seeds_share_no_scene():
    samples = []
    for split, seed in (("train", 0), ("train", 1), ("heldout", 0), ("warmup", 0)):
        samples += Shapes(split, seed, size=50)
    images = {(sample.image.size, sample.image.tobytes()) for sample in samples}
    assert len(images) == len({sample.id for sample in samples}) == len(samples) == 200


def test_an_item_has_the_types_of_a_sample():
    scenes = Shapes("train", size=5)
    assert scenes[4].image.mode == "RGB" and scenes[4].mask.dtype == bool
    for outside in (5, -1):
        with pytest.raises(IndexError):
            scenes[outside]


def test_masks_are_the_pixels_of_each_colour_and_boxes_fit_them(scenes):
    for image, things, _, _ in scenes[:300]:
        pixels = np.asarray(image, np.int64)
        for name, colour in COLOURS.items():
            # The noise is at most 6, and the background is farther from all four colours.
            painted = np.abs(pixels - colour).max(-1) <= 6
            masks = [thing.mask.astype(int) for thing in things if thing.colour == name]
            assert (sum(masks) == painted).all()  # so masks do not overlap
        for thing in things:
            assert thing.box == tight_box(thing.mask)
            x1, y1, x2, y2 = thing.box
            assert thing.centre == ((x1 + x2) / 2, (y1 + y2) / 2)
            assert thing.area == np.count_nonzero(thing.mask) > 30


def test_interior_points_lie_well_inside_the_upper_and_the_lower_half(scenes):
    for _, things, _, _ in scenes[:300]:
        for thing in things:
            points = interior_points(thing.mask)
            assert points[0][1] < thing.centre[1] <= points[1][1] + 0.5
            depth = edge_distance(thing.mask, 4)
            for x, y in points:
                assert thing.mask[int(y), int(x)] and (x % 1, y % 1) == (0.5, 0.5)
                assert depth[int(y), int(x)] >= 2 or depth.max() < 3 or thing.area < 250


def test_interior_points_of_odd_masks():
    mask = np.zeros((200, 300), bool)
    assert interior_points(mask) == ()
    mask[77, 41] = True  # the subsampling skips this pixel
    assert interior_points(mask) == ((41.5, 77.5), (41.5, 77.5))
    mask[20:180, 40:260] = True  # of the size of a photograph
    assert points_inside(interior_points(mask), mask) == 1


def test_edge_distance_is_the_sum_of_opencvs_erosions(scenes):
    cv2 = pytest.importorskip("cv2")
    shapes = (cv2.MORPH_CROSS, cv2.MORPH_RECT)
    kernels = [cv2.getStructuringElement(shape, (3, 3)) for shape in shapes]
    for _, things, _, _ in scenes[:50]:
        for thing in things:  # stars and diamonds among them: diagonals count
            left, total = thing.mask.astype(np.uint8), 0
            for step in range(5):
                total = total + left
                left = cv2.erode(left, kernels[step % 2], borderValue=0)
            assert np.array_equal(edge_distance(thing.mask, 5), total)


def test_points_inside_counts_missing_points_as_outside():
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = mask[3, 5] = True
    assert points_inside(((2.9, 1.1), (6.0, 4.0)), mask) == 1  # the far edge is the last pixel
    assert points_inside(((2.9, 1.1), (0.0, 0.0)), mask) == 0.5
    assert points_inside(((2.9, 1.1),), mask) == 0.5 and points_inside((), mask) == 0


def referents(query, things, size, slack):
    """Indices of all things that fit a query.

    slack: 0 takes the query literally. 1 also accepts a thing that fails by less than the promised
    distance. -1 demands more than the promised distance.
    """

    def family(colour, kind):  # colour: None for any
        looks = enumerate((thing.kind, thing.colour) for thing in things)
        return [i for i, (k, c) in looks if kind in ("shape", k) and colour in (None, c)]

    def place(axis, reverse):  # of all things, in units of the promised distance
        boxes = [tight_box(thing.mask) for thing in things]
        sign = -1 if reverse else 1
        return [sign * (box[axis] + box[axis + 2]) / 2 / (MARGIN * size[axis]) for box in boxes]

    if m := re.fullmatch(f"the (?:only )?{NAME}", query):
        return family(*m.groups())
    if m := re.fullmatch(f"the (largest|smallest) {NAME}", query):
        areas = {i: np.count_nonzero(things[i].mask) for i in family(m[2], m[3])}
        factor = RATIO if slack > 0 else 1
        if m[1] == "largest":
            most = max(areas.values())
            return [i for i, area in areas.items() if area * factor > most or area == most]
        least = min(areas.values())
        return [i for i, area in areas.items() if area < least * factor or area == least]
    if m := re.fullmatch("the (left|right|top|bottom)most shape", query):
        p = place(m[1] in ("top", "bottom"), reverse=m[1] in ("right", "bottom"))
        return [i for i, v in enumerate(p) if v <= min(p) + max(slack, 0)]
    m = re.fullmatch(f"the shape (left of|right of|above|below) the {NAME}", query)
    (landmark,) = family(m[2], m[3])  # exactly one
    p = place(m[1] in ("above", "below"), reverse=m[1] in ("right of", "below"))
    return [i for i, v in enumerate(p) if i != landmark and v < p[landmark] + slack]


@pytest.mark.parametrize(
    "shapes, least", [(Shapes("heldout"), 6), (Shapes("warmup", things=(1, 2)), 1)]
)
def test_every_query_refers_to_its_target_only(shapes, least):
    sorts = []
    for i in range(800):
        image, things, query, target = shapes.scene(i)
        for slack in (-1, 0, 1):
            assert referents(query, things, image.size, slack) == [target], (i, query)
        sorts.append([word for word in query.split() if word in WORDS] or ["look"])
    for word in (*WORDS, "look"):
        assert sorts.count([word]) >= least, f"this sort of query is missing: {word}"


def test_the_brief_prompt_and_the_answer_in_its_docstring():
    content = [{"type": "image"}, {"type": "text", "text": "find the red star"}]
    expected = [{"role": "user", "content": content}]
    assert messages("the red star", "brief", "pixels", 64) == expected
    answer = re.search(r"<answer>(.+)</answer>", messages.__doc__.replace("\n", ""))
    answer = json.loads(answer[1])
    sample = Shapes("heldout")[4]
    scale = np.array(sample.image.size) / 64
    box = np.array(answer["bbox"]) * np.tile(scale, 2)
    assert np.abs(box - tight_box(sample.mask)).max() <= scale.max() / 2
    points = [tuple(scale * answer[key]) for key in ("points_1", "points_2")]
    assert points_inside(points, sample.mask) == 1

"""Shapes and the prompt, checked against the pixels and against a second reading of each query."""

import random
import re
from itertools import permutations

import numpy as np
import pytest

from data import COLOURS, KINDS, Shapes, messages

MARGIN, RATIO = 0.06, 1.25  # the clearances that are promised: a share of the image's side, a factor between areas
NAME = "((?:{}) )?(shape|{})".format("|".join(COLOURS), "|".join(KINDS))
WORDS = ["only", "largest", "smallest", "leftmost", "rightmost", "topmost", "bottommost"]
WORDS += ["left", "right", "above", "below"]


@pytest.fixture(scope="module")
def scenes():
    return [Shapes("train").scene(i) for i in range(800)]


def extent(mask):
    """x1, y1, x2, y2 of a mask's first and last pixels, both inside."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max(), y.max()


def touch(a, b):
    return any((np.roll(a, shift, axis) & b).any() for shift in (-1, 1) for axis in (0, 1))


def test_an_item_depends_on_split_seed_and_index_alone():
    random.seed(1)
    np.random.seed(1)
    first = [Shapes("train", 3)[i] for i in range(20)]
    random.seed(2)
    np.random.seed(2)
    again = Shapes("train", 3, size=20)
    for i in reversed(range(20)):  # another object, order, length of the set, and state of the global generators
        a, b = first[i], again[i]
        assert (a.image.tobytes(), a.query, a.id) == (b.image.tobytes(), b.query, b.id)
        assert (a.mask == b.mask).all()


def test_drawing_leaves_the_global_generators_alone():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    Shapes("train")[0]
    assert state() == before


def test_splits_and_seeds_share_no_scene():
    draws = []
    for split, seed in (("train", 0), ("train", 1), ("heldout", 0), ("warmup", 0), ("warmup", 1)):
        images = [Shapes(split, seed)[i].image for i in range(150)]
        draws.append({(image.size, image.tobytes()) for image in images})
    assert [len(draw) for draw in draws] == [150] * 5  # nor does a draw repeat itself
    assert len(set.union(*draws)) == 750


def test_a_set_ends_and_ids_are_unique():
    items = [item for s in (Shapes("train", size=5), Shapes("train", 1, 5), Shapes("heldout", size=5)) for item in s]
    assert len({item.id for item in items}) == len(items) == 15
    for outside in (5, -1):
        with pytest.raises(IndexError):
            Shapes("train", size=5)[outside]


def test_scenes_vary(scenes):
    assert {len(things) for _, things, _, _ in scenes} == {2, 3, 4, 5}
    assert {np.sign(image.width - image.height) for image, *_ in scenes} == {-1, 0, 1}
    looks = {(thing.kind, thing.colour) for _, things, _, _ in scenes for thing in things}
    assert looks == {(kind, colour) for kind in KINDS for colour in COLOURS}
    touching = sum(any(touch(a.mask, b.mask) for a, b in permutations(things, 2)) for _, things, _, _ in scenes)
    assert 0.1 < touching / len(scenes) < 0.5


def test_a_sample_holds_its_scene(scenes):
    for i, (image, things, query, target) in enumerate(scenes[:30]):
        sample = Shapes("train")[i]
        assert sample.image.mode == "RGB" and sample.image.tobytes() == image.tobytes() and sample.query == query
        assert sample.mask.dtype == bool and sample.mask.shape == (image.height, image.width)
        assert (sample.mask == things[target].mask).all() and sample.ignore is None


def test_masks_are_exactly_the_pixels_of_each_colour(scenes):
    palette = np.array(list(COLOURS.values()))
    for image, things, _, _ in scenes[:300]:
        pixels = np.asarray(image, np.int64)
        off = np.abs(pixels[:, :, None] - palette).max(-1)  # (H, W, 4) distance to each colour; the noise is up to 6
        shown = np.where(off.min(-1) <= 6, off.argmin(-1), -1)  # the ground is far from all four
        painted = np.full(shown.shape, -1)
        for thing in things:
            assert (painted[thing.mask] == -1).all()  # nobody else's pixel
            painted[thing.mask] = list(COLOURS).index(thing.colour)
        assert (painted == shown).all()


def test_boxes_centres_and_areas_fit_the_masks(scenes):
    for _, things, _, _ in scenes[:300]:
        for thing in things:
            x1, y1, x2, y2 = extent(thing.mask)
            assert thing.box == (x1, y1, x2 + 1, y2 + 1)
            assert thing.centre == ((x1 + x2 + 1) / 2, (y1 + y2 + 1) / 2)
            assert thing.area == np.count_nonzero(thing.mask) > 30


def test_each_kind_fills_its_box_as_that_shape_does(scenes):
    # Share of the box: pi / 4; all; half; and ten triangles of 5 * 0.45 * sin(36 deg) over 2 sin(72) * (1 + cos(36)).
    share = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "star": 0.384}
    seen = set()
    for _, things, _, _ in scenes:
        for thing in things:
            x1, y1, x2, y2 = extent(thing.mask)
            others = [other.mask for other in things if other is not thing]
            if not any(touch(thing.mask, other) for other in others) and thing.area > 250:  # whole, and not too coarse
                fill = thing.area / ((x2 - x1 + 1) * (y2 - y1 + 1))
                assert min(share, key=lambda kind: abs(share[kind] - fill)) == thing.kind
                seen.add(thing.kind)
    assert seen == set(KINDS)


def meant(query, things, size, slack):
    """Indices of all things that a query fits. slack: 0 reads it to the letter; 1 also lets pass what misses it by less
    than the clearance, so that somebody could argue about it; -1 asks for more than the clearance."""

    def family(colour, kind):  # colour: a word and a space, or None
        looks = [(t.kind, t.colour) for t in things]
        return [i for i, (k, c) in enumerate(looks) if kind in ("shape", k) and (colour or c).strip() == c]

    def place(axis):  # of all things, in units of the clearance
        boxes = [extent(thing.mask) for thing in things]
        return [(box[axis] + box[axis + 2] + 1) / 2 / (MARGIN * size[axis]) for box in boxes]

    if m := re.fullmatch(f"the (?:only )?{NAME}", query):
        return family(*m.groups())
    if m := re.fullmatch(f"the (largest|smallest) {NAME}", query):
        areas = {i: np.count_nonzero(things[i].mask) for i in family(m[2], m[3])}
        factor = RATIO if slack > 0 else 1
        if m[1] == "largest":
            return [i for i in areas if areas[i] * factor > max(areas.values()) or areas[i] == max(areas.values())]
        return [i for i in areas if areas[i] < min(areas.values()) * factor or areas[i] == min(areas.values())]
    if m := re.fullmatch("the (left|right|top|bottom)most shape", query):
        p = place(m[1] in ("top", "bottom"))
        if m[1] in ("right", "bottom"):
            p = [-v for v in p]
        return [i for i, v in enumerate(p) if v <= min(p) + max(slack, 0)]
    m = re.fullmatch(f"the shape (left of|right of|above|below) the {NAME}", query)
    (landmark,) = family(m[2], m[3])  # which must be one itself
    p = place(m[1] in ("above", "below"))
    if m[1] in ("right of", "below"):
        p = [-v for v in p]
    return [i for i, v in enumerate(p) if i != landmark and v < p[landmark] + slack]


@pytest.mark.parametrize("shapes", [Shapes("heldout"), Shapes("warmup", things=(1, 2))], ids=["default", "one or two"])
def test_every_query_means_exactly_its_target(shapes):
    asked = []
    for i in range(800):
        image, things, query, target = shapes.scene(i)
        for slack in (-1, 0, 1):
            assert meant(query, things, image.size, slack) == [target], (i, query)
        asked.append([word for word in query.split() if word in WORDS] or ["look"])
    assert all(asked.count([sort]) > 10 for sort in (*WORDS, "look"))  # every sort of query occurs


def test_messages_full_explains_the_task():
    system, user = messages("what keeps the rain off", "full", "pixels", 840)
    assert (system["role"], user["role"]) == ("system", "user")
    image, text = user["content"]
    assert image == {"type": "image"} and text["type"] == "text"
    assert "what keeps the rain off" in text["text"] and "in pixels of the 840 x 840 image" in text["text"]
    # The example in it is in the format that is paid for, with no stray template braces.
    keys = r'\{"bbox": \[.+\], "points_1": \[.+\], "points_2": \[.+\]\}'
    assert re.search(f"<think>.+</think><answer>{keys}</answer>", text["text"])
    assert "{{" not in text["text"] and "{query}" not in text["text"]


def test_messages_name_the_units_of_the_model():
    text = messages("it", "full", "thousandths", 840)[1]["content"][1]["text"]
    assert "thousandths" in text and "1000" in text and "840" not in text and "pixels" not in text


def test_messages_brief_holds_the_query_alone():
    assert messages("the red star", "brief", "pixels", 64) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "find the red star"}]}
    ]


def test_a_query_with_braces_is_left_as_it_is():
    assert "{side} {0} %s" in messages("{side} {0} %s", "full", "pixels", 64)[1]["content"][1]["text"]

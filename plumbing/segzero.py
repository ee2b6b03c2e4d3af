"""segzero.py - what Seg-Zero and VisionReasoner do otherwise: requests, answers, and a reward.

Seg-Zero (arXiv 2503.06520) is the closest earlier system. The public checkpoints of both were
trained with one wording each. The wordings here are our own. They keep what an answer depends on:
its keys, two points or one, and an example with numbers. Neither has a system message of its own,
so the chat template's default stands.
"""

import numpy as np
import torch

from plumbing import answers
from plumbing.answers import read_literal, read_loosely
from plumbing.boxes import box_ious, true_box
from plumbing.scenes import interior_points, points_inside

SEGZERO = """Find in this image: {query}

Look at what sets the objects apart and decide on the one that fits the request best. Write your \
thinking between <think> and </think>, then your answer between <answer> and </answer>. The answer \
is JSON for this one object: its box and the centres of the two largest circles that fit inside \
it, {units}. An example of the form:

<think>your thinking</think><answer>{{"bbox": [12, 96, 214, 230], "points_1": [40, 118], \
"points_2": [52, 190]}}</answer>"""

VISIONREASONER = """Find in this image: {query}

Look at what sets the objects apart and decide on all that fit the request. Write your thinking \
between <think> and </think>, then your answer between <answer> and </answer>. The answer is a \
JSON list with the box of each of these objects and one point inside it, {units}. An example of \
the form:

<think>your thinking</think><answer>[{{"bbox_2d": [12, 96, 214, 230], "point_2d": [40, 118]}}, \
{{"bbox_2d": [230, 302, 711, 790], "point_2d": [306, 415]}}]</answer>"""

REQUESTS = {"segzero": SEGZERO, "visionreasoner": VISIONREASONER}

LONGEST_LIST = 40_000  # characters: VisionReasoner lists up to 120 objects, with labels

# What the evaluations of the two systems strip from both ends of a query.
STRIPPED = {"segzero": ".", "visionreasoner": '."?!'}


def plain_query(query: str, style: str) -> str:
    """A query as the evaluation of its system asks it: in lower case, without STRIPPED at its ends.

    >>> plain_query("What keeps the rain off?", "segzero"), plain_query("The cup.", "segzero")
    ('what keeps the rain off?', 'the cup')
    >>> plain_query("What?", "visionreasoner")
    'what'
    """
    return query.lower().strip(STRIPPED[style])


def read_answer(inside: str, style: str, text: str) -> tuple[list[dict], bool]:
    """The same as `plumbing.answers.read_answer` for "segzero" and "visionreasoner".

    text: the whole completion. The objects get the keys of our own prompt.

    "segzero" is read as in Seg-Zero's evaluation: the first {...} of the completion, numbers also
    in quotes. "visionreasoner" is answered with a list of objects, which have one point each.

    >>> read_answer('[{"bbox_2d": [1, 2, 5, 6]}, 7]', "visionreasoner", text="")
    ([{'bbox': [1, 2, 5, 6], 'points_1': None}, {'bbox': None, 'points_1': None}], True)
    """
    if style == "visionreasoner":
        data = read_literal(inside, LONGEST_LIST)
        asked_form = isinstance(data, list)
        if not isinstance(data, dict | list):
            data = read_loosely(inside, "[]", LONGEST_LIST)
        items = data if isinstance(data, list) else [data]
        items = [item if isinstance(item, dict) else {} for item in items]
        renamed = [{"bbox": x.get("bbox_2d"), "points_1": x.get("point_2d")} for x in items]
        return renamed, asked_form
    first = read_literal(first_braces(text))
    if isinstance(first, dict):
        item = rename_keys(first)
        if "bbox" in item:
            return [item], True
    items, asked_form = answers.read_answer(inside)
    return [rename_keys(item) for item in items], asked_form


def rename_keys(item: dict) -> dict:
    """An object with our keys for the first ones that contain "bbox" and "point" (those with
    "points" first), and with floats in place of texts, as in Seg-Zero's evaluation.

    >>> rename_keys({"Bbox": ["1", 2, 5, 6], "point_count": 2, "points_1": [3, 4]})
    {'bbox': [1.0, 2, 5, 6], 'points_1': [3, 4], 'points_2': 2}
    """
    names = {key: str(key).lower() for key in item}
    boxes = [key for key in names if "bbox" in names[key]]
    points = [key for key in names if "point" in names[key]]
    points.sort(key=lambda key: "points" not in names[key])  # "points_1" before "point_count"
    renamed = dict(zip(("bbox",), boxes, strict=False))
    renamed |= dict(zip(("points_1", "points_2"), points, strict=False))
    return {ours: unquote(item[key]) for ours, key in renamed.items()}


def unquote(value: object, depth: int = 2) -> object:
    """A text as a float, if it is one; also in a list, and in a list in a list."""
    if isinstance(value, list | tuple) and depth:
        return type(value)(unquote(one, depth - 1) for one in value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


def first_braces(text: str) -> str:
    """The first {...} of a text that is not empty, braces included, or "". It ends at the first
    closing brace.

    >>> first_braces('the <{}> box {"bbox": [1, 2, 5, 6]} or {"bbox": [3, 4, 7, 8]}')
    '{"bbox": [1, 2, 5, 6]}'
    """
    for part in text.split("}")[:-1]:
        if "{" in part[:-1]:
            return part[part.index("{") :] + "}"
    return ""


def segzero_reward(
    samples: list, prompts: list[list], extent: float, in_mask: bool
) -> torch.Tensor:
    """Seg-Zero's reward for boxes and points, (B, G), 4/3 for each of three conditions:

    box IoU above 0.5; mean L1 distance of the box's coordinates below 10 pixels; both points in the
    true box and, on average, within 100 pixels of two labelled points. Pixels are those of an
    840 x 840 image. If two pixels of the policy's image are more than 10 of these, they are the
    limit.

    prompts: B lists of G `reward.SamPrompt`, in image pixels.
    extent:  of `reward.sam_prompt`.
    in_mask: a stronger label, each point must lie in the true mask. The labelled points are
             `interior_points` of the true mask.
    """
    tolerance = max(10, 2 * 840 / extent)
    reward = (box_ious(samples, prompts) > 0.5).float()
    for b, (sample, group) in enumerate(zip(samples, prompts, strict=True)):
        truth = true_box(sample.mask)
        for g, prompt in enumerate(group):
            if truth is not None and prompt.box is not None:
                size = np.array(sample.image.size)
                distance = np.abs(np.subtract(prompt.box, truth)) * np.tile(840 / size, 2)
                reward[b, g] += bool(distance.mean() < tolerance)
                reward[b, g] += good_points(prompt.points, sample.mask, truth, in_mask)
    return reward * 4 / 3


def good_points(points: tuple, mask: np.ndarray, truth: tuple[float, ...], in_mask: bool) -> bool:
    """Whether two points (x, y), image pixels, meet Seg-Zero's condition. truth: the true box."""
    if len(points) < 2:
        return False
    if in_mask:
        return points_inside(points, mask) == 1
    points = np.array(points)
    size = np.array(mask.shape[::-1])
    labels = np.array(interior_points(mask))
    inside = (points >= truth[:2]).all() and (points <= truth[2:]).all()
    distances = [
        np.linalg.norm((points - two) * 840 / size, axis=1).mean() for two in (labels, labels[::-1])
    ]
    return bool(inside and min(distances) < 100)

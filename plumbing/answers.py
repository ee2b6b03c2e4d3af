"""answers.py - read tags, JSON and numbers out of any text, without raising."""

import ast
import json
import re
import warnings
from typing import NamedTuple

# A literal with an odd escape is still read. Filter this once: `warnings.catch_warnings` around
# each answer would make Python forget which warnings of other modules it has shown.
warnings.filterwarnings("ignore", "invalid (escape sequence|.* literal)")

LONGEST_ANSWER = 2000  # characters; a box and two points need about 100. Longer ones are not parsed
LARGEST_NUMBER = 1e6  # larger coordinates (and NaN, infinity) are invalid: no image is that wide


class Block(NamedTuple):
    """A text, split at a pair of tags."""

    before: str
    inside: str
    after: str


def find_block(text: str, opening: str, closing: str) -> Block | None:
    """Split a text at a pair of tags. None unless each tag occurs exactly once, in this order."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    before, _, rest = text.partition(opening)
    inside, found, after = rest.partition(closing)
    return Block(before, inside, after) if found else None


def last_block(text: str, opening: str, closing: str) -> Block | None:
    """Split a text at its last closing tag and the last opening tag before it."""
    head, found, after = text.rpartition(closing)
    before, opened, inside = head.rpartition(opening)
    return Block(before, inside, after) if found and opened else None


def answer_fields(text: str, style: str) -> dict:
    """The object in an answer, under the keys of `reward.parse_answer`, or {} if it has none.

    style: of the prompt. "visionreasoner" is answered with a list, of which the first object
           counts. "objects" is the number of objects in it, and 1 in an answer of another style.

    >>> text = '[{"bbox_2d": [1, 2, 5, 6], "point_2d": [3, 4]}, {"bbox_2d": "?"}]'
    >>> answer_fields(text, "visionreasoner")
    {'bbox': [1, 2, 5, 6], 'points_1': [3, 4], 'objects': 2}
    """
    data = read_literal(text)
    if style != "visionreasoner":
        return data | {"objects": 1} if isinstance(data, dict) else {}
    if not (isinstance(data, list) and data and isinstance(data[0], dict)):
        return {}
    box, point = data[0].get("bbox_2d"), data[0].get("point_2d")
    return {"bbox": box, "points_1": point, "objects": len(data)}


def read_literal(text: str) -> object:
    """What a text says as JSON or as a Python literal, or None if it is neither.

    Python literals have single quotes, trailing commas, `3.` or None. The text may stand in a code
    fence, and may hold byte order marks and no-break spaces.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = text.replace("\ufeff", "").replace("\xa0", " ").strip()
    text = re.sub(r"^```\w*|```$", "", text).strip()
    for read, errors in READERS:
        try:
            return read(text)
        except errors:
            continue
    return None


# What they raise on any text: it is no JSON or literal, or nested deeper than the reader's stack.
# `ast.literal_eval` also fails on keys that are lists.
READERS = (
    (json.loads, (ValueError, RecursionError)),
    (ast.literal_eval, (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)),
)


def numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as floats if it is a list of `count` finite numbers, else None. True is no number."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))

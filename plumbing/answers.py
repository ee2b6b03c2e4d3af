"""answers.py - read JSON and numbers out of any text, without raising."""

import ast
import json
import re
import warnings

LONGEST_ANSWER = 2000  # characters; a box and two points need about 100. Longer ones are not parsed
LARGEST_NUMBER = 1e6  # larger coordinates (and NaN, infinity) are invalid: no image is that wide

# A literal with an odd escape is still read. Filter this once: `warnings.catch_warnings` around
# each answer would make Python forget which warnings of other modules it has shown.
warnings.filterwarnings("ignore", "invalid (escape sequence|.* literal)")

# What the two readers raise on any text: it is no JSON or literal, or nested deeper than the
# reader's stack. `ast.literal_eval` also fails on keys that are lists.
READERS = (
    (json.loads, (ValueError, RecursionError)),
    (ast.literal_eval, (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)),
)


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


def answer_parts(text: str, style: str) -> tuple[object, list[object]]:
    """The box and the points in an answer, of any type: they are not checked. None if missing.

    There are as many points as the prompt of this style asks for: two, or one for "visionreasoner",
    which is answered with a list of objects. The first of them counts.

    >>> answer_parts('{"bbox": [1, 2, 5, 6], "points_1": [3, 4]}', "full")
    ([1, 2, 5, 6], [[3, 4], None])
    >>> answer_parts('[{"bbox_2d": [1, 2, 5, 6], "point_2d": [3, 4]}]', "visionreasoner")
    ([1, 2, 5, 6], [[3, 4]])
    """
    data = read_literal(text)
    if style == "visionreasoner":
        first = data[0] if isinstance(data, list) and data else None
        first = first if isinstance(first, dict) else {}
        return first.get("bbox_2d"), [first.get("point_2d")]
    data = data if isinstance(data, dict) else {}
    return data.get("bbox"), [data.get("points_1"), data.get("points_2")]


def count_objects(text: str) -> int:
    """The number of objects that a completion lists in its last answer (VisionReasoner's form)."""
    data = read_literal(text.rpartition("</answer>")[0].rpartition("<answer>")[2])
    return len(data) if isinstance(data, list) else 1


def numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as floats if it is a list of `count` finite numbers, else None. True is no number."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))

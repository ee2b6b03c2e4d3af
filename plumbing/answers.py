"""answers.py - read tags, JSON and numbers out of any text, without raising."""

import json
from typing import NamedTuple

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


def json_object(text: str) -> dict:
    """The JSON object in a text, or {} if the text is anything else."""
    if len(text) > LONGEST_ANSWER:
        return {}
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    for attempt in (text, text.replace("'", '"')):
        try:
            data = json.loads(attempt)
        except (ValueError, RecursionError):  # not JSON, or nested deeper than Python's stack
            continue
        return data if isinstance(data, dict) else {}
    return {}


def numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as floats if it is a list of `count` finite numbers, else None. True is no number."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))

"""answers.py - read JSON and numbers out of any text, without raising."""

import ast
import json
import re
import warnings

LONGEST_ANSWER = 2000  # characters; a box and two points need about 100
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
FULL_WIDTH = str.maketrans(
    "，、：【】［］｛｝（）“”＂‘’＇．－",
    ",,:[][]{}()\"\"\"'''.-",
)
COMMENT = re.compile(r"(?<!:)//.*|/\*[\s\S]*?(?:\*/|\Z)")  # "://" begins no comment


def read_literal(text: str, longest: int = LONGEST_ANSWER) -> object:
    """What a text says as JSON or as a Python literal, or None if it is neither.

    Python literals have single quotes, trailing commas, `3.` or None. The text may stand in a code
    fence, and may hold byte order marks and no-break spaces. Texts of more than `longest`
    characters are not read, those above LONGEST_ANSWER only as JSON.
    """
    if len(text) > longest:
        return None
    readers = READERS if len(text) <= LONGEST_ANSWER else READERS[:1]
    text = text.replace("\ufeff", "").replace("\xa0", " ").strip()
    text = re.sub(r"^```\w*|```$", "", text).strip()
    for read, errors in readers:
        try:
            return read(text)
        except errors:
            continue
    return None


def read_loosely(text: str, brackets: str, longest: int = LONGEST_ANSWER) -> object:
    """`read_literal` of what stands between the outermost brackets, "{}" or "[]", or None.

    So prose, the word of a fence or a list of one object may stand around the object. Comments are
    removed, and full-width punctuation is replaced, where the text cannot be read with them.

    >>> read_loosely('Here it is: [{"bbox": [1，2，5，6]} // the box\\n]', "{}")
    {'bbox': [1, 2, 5, 6]}
    """
    if len(text) > longest:
        return None
    for version in (text, COMMENT.sub("", text.translate(FULL_WIDTH))):
        inside = version[version.find(brackets[0]) : version.rfind(brackets[1]) + 1]
        data = read_literal(inside, longest)
        if data is not None:
            return data
    return None


def read_answer(inside: str) -> tuple[list[dict], bool]:
    """The object that an answer holds, in a list, and whether the answer has the asked form, JSON.

    inside: what stands in <answer>. If it is not one object, it is searched for one, see
            `read_loosely`. If none is found, the object has no keys.

    `plumbing.segzero.read_answer` does this for prompts of other systems, which may be answered
    with several objects.

    >>> read_answer('{"bbox": [1, 2, 5, 6]}'), read_answer('it is {"bbox": [1, 2, 5, 6]}')
    (([{'bbox': [1, 2, 5, 6]}], True), ([{'bbox': [1, 2, 5, 6]}], False))
    """
    data = read_literal(inside)
    if isinstance(data, dict):
        return [data], True
    data = read_loosely(inside, "{}")
    return [data if isinstance(data, dict) else {}], False


def numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as floats if it is a list or tuple of `count` numbers within LARGEST_NUMBER, or None.

    It may be the only element of another list. True is no number.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))


def points_asked(style: str) -> int:
    """Number of points that a prompt of this style asks for."""
    return 1 if style == "visionreasoner" else 2

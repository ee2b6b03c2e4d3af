"""answers.py - read JSON and numbers out of any text, without raising."""

import ast
import json
import re
import warnings

LONGEST_ANSWER = 2000  # characters; a box and two points need about 100. Longer ones are not parsed
LONGEST_LIST = 40_000  # the same for a list of objects: VisionReasoner lists up to 120, with labels
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


def read_loosely(text: str, brackets: str, longest: int) -> object:
    """`read_literal` of what stands between the outermost brackets, "{}" or "[]", or None.

    So prose, the word of a fence or a list of one object may stand around the object. Comments are
    removed, and full-width punctuation is replaced, where the text cannot be read with them.

    >>> read_loosely('Here it is: [{"bbox": [1，2，5，6]} // the box\\n]', "{}", longest=2000)
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


def first_braces(text: str) -> str:
    """The first {...} of a text, braces included, or "". It ends at the first closing brace.

    >>> first_braces('the <{}> box {"bbox": [1, 2, 5, 6]} or {"bbox": [3, 4, 7, 8]}')
    '{"bbox": [1, 2, 5, 6]}'
    """
    for part in text.split("}")[:-1]:
        if "{" in part[:-1]:
            return part[part.index("{") :] + "}"
    return ""


def find_objects(
    inside: str, style: str, text: str, loosely: bool = True
) -> tuple[list[dict], bool]:
    """The objects of an answer, and whether it has the type that its prompt asks for.

    inside: what stands in <answer>. style: of the prompt. text: the whole completion.

    Only "visionreasoner" is answered with a list of objects, which are returned one by one. What is
    not of this type is read all the same if it is clear what it says: an object without its list,
    and, if `loosely`, what `read_loosely` finds. Two objects are not, where one is asked for. What
    cannot be read is an object without keys.

    "segzero" is read as in Seg-Zero's evaluation: the first {...} of the completion.

    >>> find_objects('{"bbox": [1, 2, 5, 6]}', "full", text="")
    ([{'bbox': [1, 2, 5, 6]}], True)
    >>> find_objects('[{"bbox_2d": [1, 2, 5, 6]}, 7]', "visionreasoner", text="")
    ([{'bbox_2d': [1, 2, 5, 6]}, {}], True)
    """
    listed = style == "visionreasoner"
    longest = LONGEST_LIST if listed else LONGEST_ANSWER
    kind = list if listed else dict
    data = read_literal(inside, longest)
    asked_form = isinstance(data, kind)
    if loosely and not isinstance(data, dict | kind):
        data = read_loosely(inside, "[]" if listed else "{}", longest)
    if style == "segzero":
        first = read_literal(first_braces(text))
        if isinstance(first, dict) and answer_keys(first, style)[0]:
            data = first
            asked_form = True
    items = data if listed and isinstance(data, list) else [data]
    return [item if isinstance(item, dict) else {} for item in items], asked_form


def points_asked(style: str) -> int:
    """Number of points that a prompt of this style asks for."""
    return 1 if style == "visionreasoner" else 2


def answer_keys(item: dict, style: str) -> list:
    """The keys of an object's box and of its points.

    For "segzero" the first keys that contain "bbox" and "point", as in Seg-Zero's evaluation.
    """
    if style == "visionreasoner":
        return ["bbox_2d", "point_2d"]
    if style != "segzero":
        return ["bbox", "points_1", "points_2"]
    names = {key: str(key).lower() for key in item}
    box = next((key for key in names if "bbox" in names[key]), None)
    points = [key for key in names if "point" in names[key]]
    points.sort(key=lambda key: "points" not in names[key])  # "points_1" before "point_count"
    return [box, *(points + [None, None])[:2]]


def numbers(value: object, count: int, quoted: bool = False) -> tuple[float, ...] | None:
    """`value` as floats if it is a list or tuple of `count` finite numbers, else None.

    It may be the only element of another list. True is no number. quoted: numbers may be strings.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if quoted:
        value = [unquote(v) for v in value]
    if not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))


def unquote(value: object) -> object:
    """A string as a float, if it is one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None

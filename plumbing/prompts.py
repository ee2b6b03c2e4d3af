"""prompts.py - the requests that public checkpoints of Seg-Zero and VisionReasoner can answer.

Both were trained with one wording each. The wordings here are our own. They keep what an answer
depends on: its keys, two points or one, and an example with numbers. Neither has a system message
of its own, so the chat template's default stands.
"""

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


def points_asked(style: str) -> int:
    """Number of points that a prompt of this style asks for."""
    return 1 if style == "visionreasoner" else 2


# What the evaluations of the two systems strip from both ends of a query.
STRIPPED = {"segzero": ".", "visionreasoner": '."?!'}


def plain_query(query: str, style: str) -> str:
    """A query as the evaluation of its system asks it: in lower case, without its closing sign.

    >>> plain_query("What keeps the rain off?", "segzero"), plain_query("The cup.", "segzero")
    ('what keeps the rain off?', 'the cup')
    >>> plain_query("What?", "visionreasoner"), plain_query("What?", "full")
    ('what', 'What?')
    """
    return query.lower().strip(STRIPPED[style]) if style in STRIPPED else query

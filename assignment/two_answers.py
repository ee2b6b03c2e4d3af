"""two_answers.py - the paper's idea in two completions (an exercise)."""


def two_answers() -> tuple[str, str]:
    """Two completions for `data.Shapes("heldout")[0]`, in the full format that earns both formats.

    The box reward (`--accuracy box`) pays them the same: the right box is worth 4. The mask reward
    (`--accuracy tiered`) pays the first at least 2 more than the second. Coordinates are policy
    pixels: the policy sees the image as 64 x 64.
    """
    answer = '{"bbox": [16, 23, 43, 49], "points_1": %s, "points_2": %s}'
    right = answer % ("[18, 25]", "[41, 47]")  # on the red square
    wrong = answer % ("[27, 36]", "[32, 36]")  # on the green diamond, which has the same box
    return tuple(f"<think>why</think><answer>{text}</answer>" for text in (right, wrong))

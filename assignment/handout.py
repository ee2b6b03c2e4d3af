"""handout.py - write a student's copy of this repository, without the solutions.

    python -m assignment.handout OUT

The copy has a NotImplementedError in place of the body of each function in EXERCISES. Signatures,
docstrings, all other code and the tests of the exercises stay. `python -m assignment.next` says
there which exercise comes next. A command of samr1_mini.py that needs an unsolved exercise says so
there, before it does anything else.
"""

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import UserError, exit_with_one_line

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("assets", "plumbing", "tiny", "tools")
FILES = """LICENSE .gitignore pyproject.toml requirements.txt constraints.txt TUTORIAL.md
    data.py reward.py grpo.py samr1_mini.py
    assignment/__init__.py assignment/handout.py assignment/next.py assignment/outcomes.py
    assignment/step.py assignment/two_answers.py benchmarks/__init__.py benchmarks/sweep.py
    tests/conftest.py tests/expected_step.json tests/requirements.txt""".split()
# The files with the tests of the exercises.
TESTS = ["tests/test_reward.py", "tests/test_grpo.py", "tests/test_exercises.py"]
README = "assignment/STUDENT.md"  # becomes the README of the copy


class Exercise(NamedTuple):
    title: str
    points: int
    script: str  # the file with the functions
    functions: list[str]  # "parse_answer" or "Overlap.iou"; each has a docstring
    part: tuple[str, str] | None = None  # cut only from the first of these comments to the second
    examples: bool = True  # the docstring's examples are tests of the exercise


# In the order in which students do them. The tests of exercise 1 have the mark exercise_1. The
# examples of 7 show the unbiased standard deviation, and the other one is right too.
EXERCISES = {
    1: Exercise("the two formats of an answer", 5, "reward.py", ["parse_answer", "read_object"]),
    2: Exercise("from policy pixels to image pixels", 5, "reward.py", ["sam_prompt"]),
    3: Exercise("pixels and IoU", 6, "reward.py", ["intersection_and_union", "Overlap.iou"]),
    4: Exercise("prompts on many images in one call", 8, "reward.py", ["decode_masks"]),
    5: Exercise("the tiers", 2, "reward.py", ["tiered_reward"]),
    6: Exercise("the paper's idea", 6, "assignment/two_answers.py", ["two_answers"]),
    7: Exercise("advantages within a group", 5, "grpo.py", ["group_advantages"], examples=False),
    8: Exercise("the KL estimate", 5, "grpo.py", ["k3_kl"]),
    9: Exercise("the clipped token-level loss", 10, "grpo.py", ["grpo_loss", "clip_side"]),
    10: Exercise("the sampling loop", 10, "grpo.py", ["rollout"]),
    11: Exercise("a packed row and its attention mask", 8, "grpo.py", ["pack", "may_attend"]),
    12: Exercise("log-probs with a shared prompt", 10, "grpo.py", ["group_logprobs"]),
    13: Exercise(
        "one step of training", 5, "samr1_mini.py", ["train"], part=("# 1. Rollout", "# 5. Log")
    ),
}
# If one of these tests fails, the exercise earns no points. The other tests share its points.
NECESSARY = {
    1: ["test_docstring_examples[reward.parse_answer]"],
    2: ["test_coordinates_are_scaled_once_and_each_axis_by_its_own_factor"],
    3: ["test_ignored_pixels_count_neither_as_right_nor_as_wrong"],
    4: ["test_decoding_together_equals_decoding_one_by_one"],
    5: ["test_iou_must_exceed_a_threshold"],
    6: ["test_a_box_reward_cannot_tell_the_two_answers_apart_and_a_mask_reward_can"],
    7: ["test_advantages_by_hand", "test_advantages_of_any_shape"],
    8: ["test_k3_and_its_gradient_by_hand"],
    9: ["test_loss_and_statistics_by_hand", "test_all_four_cases_of_the_clip"],
    10: [
        "test_first_end_token_ends_a_completion_and_changes_no_other",
        "test_banned_tokens_are_never_sampled[1.0-0.0]",
    ],
    11: ["test_packed_rows_by_hand", "test_tokens_attend_to_the_prompt_and_their_own_completion"],
    12: ["test_logprobs_and_gradients_equal_those_of_separate_rows"],
    13: ["test_the_metrics_of_two_steps_equal_those_of_the_reference"],
}
# What the commands of samr1_mini.py call.
NEEDED = {"train": {*EXERCISES} - {6}, "eval": {1, 2, 3, 4, 10}, "segment": {1, 2, 3, 4, 5, 10}}
BY_HAND = {14: ("a reward of your own", 8), 15: ("a variant of your own", 7)}  # title, points
SCRIPTS = sorted({exercise.script for exercise in EXERCISES.values()})


def find_functions(nodes: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a module, by qualified name. nodes: its statements.

    >>> list(find_functions(ast.parse("def f(): pass\\nclass A:\\n    def g(self): pass").body))
    ['f', 'A.g']
    """
    found = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = find_functions(node.body)
            found |= {f"{node.name}.{name}": method for name, method in methods.items()}
    return found


def placeholder(number: int) -> str:
    """The line in place of a solution. `is_solved` and tests/conftest.py read it."""
    return f'raise NotImplementedError("exercise {number}: {EXERCISES[number].title}")'


def is_solved(number: int) -> bool:
    """Whether no line of the script raises the exercise's NotImplementedError any more."""
    lines = (ROOT / EXERCISES[number].script).read_text("utf-8").split("\n")
    return not any(line.strip().startswith(placeholder(number)) for line in lines)


def refuse_unsolved(argv: list[str]) -> None:
    """Raise UserError if a command of samr1_mini.py needs an unsolved exercise. argv: its flags."""
    if {"-h", "--help"} & {*argv}:
        return
    for number in sorted(NEEDED.get(argv[0], ()) if argv else ()):
        if not is_solved(number):
            raise UserError(
                f"{argv[0]} needs exercise {number}, {EXERCISES[number].title}, which is not "
                "solved yet: python -m assignment.next says which one comes next"
            )


def remove_solutions(script: str, numbers: Iterable[int] = EXERCISES) -> str:
    """The text of a script of this repository without the solutions of these exercises."""
    text = (ROOT / script).read_text("utf-8")
    lines = text.split("\n")
    found = find_functions(ast.parse(text).body)
    for number in numbers:
        exercise = EXERCISES[number]
        for name in exercise.functions if exercise.script == script else ():
            inside = range(found[name].body[0].end_lineno, found[name].end_lineno)  # no docstring
            kept = []
            if exercise.part:  # comments and timers stay
                starts = [line.lstrip() for line in lines]
                first, last = (
                    next(k for k in inside if starts[k].startswith(comment))
                    for comment in exercise.part
                )
                inside = range(first + 1, last)
                kept = [lines[k] for k in inside if re.match("#|timer|$", starts[k])]
            indent = re.match(" *", lines[inside.start - 1])[0]
            # None keeps the numbers of the other lines.
            lines[inside.start : inside.stop] = [None] * len(inside)
            lines[inside.start] = "\n".join([indent + placeholder(number), *kept])
    return "\n".join(line for line in lines if line is not None)


def refuse_first(text: str) -> str:
    """The text of samr1_mini.py, with a call of `refuse_unsolved` before that of its `main`."""
    head, call, tail = text.rpartition("        main(sys.argv[1:])")
    return (
        f"{head}        from assignment.handout import refuse_unsolved\n\n"
        f"        refuse_unsolved(sys.argv[1:])\n{call}{tail}"
    )


def handout_files() -> list[str]:
    """The files that a student gets, relative to the repository, but for the README."""
    paths = [*FILES, *TESTS]
    for folder in FOLDERS:
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
        paths += [file.relative_to(ROOT).as_posix() for file in files]
    excluded = re.compile(r"(^|/)(__pycache__|vlm-clean)/|\.tmp$")
    return sorted(path for path in paths if not excluded.search(path))


def copy_files(names: list[str], out: Path) -> None:
    """Copy files of this repository. names: of all of them, as `out` may be inside it."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m assignment.handout",
        description="Write a student's copy of this repository, without the solutions.",
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out = parser.parse_args(argv).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name another one")
    copy_files(handout_files(), out)
    for script in SCRIPTS:
        text = remove_solutions(script)
        if script == "samr1_mini.py":
            text = refuse_first(text)
        (out / script).write_text(text, "utf-8")
    shutil.copy(ROOT / README, out / "README.md")
    print(f"written to {out}: start with its README.md")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

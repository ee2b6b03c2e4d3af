"""handout.py - write a student's copy of this repository, without the solutions.

    python -m assignment.handout OUT

The copy has a NotImplementedError in place of the body of each function in EXERCISES. Signatures,
docstrings, all other code and the tests stay. `python -m pytest -rs -m exercise_5 tests` runs the
tests of one exercise.
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
FOLDERS = (".ci", "assets", "benchmarks", "examples", "plumbing", "tests", "tiny", "tools")
LECTURER_FILES = {"tests/test_assignment.py", "tests/test_tutorial.py"}


class Exercise(NamedTuple):
    title: str
    points: int
    script: str  # the file with the functions
    functions: list[str]  # "parse_answer" or "Overlap.iou"; each has a docstring


# In the order in which students do them. The tests of exercise 1 have the mark exercise_1.
EXERCISES = {
    1: Exercise("an answer and its two formats", 10, "reward.py", ["parse_answer"]),
    2: Exercise("pixels and IoU", 10, "reward.py", ["intersection_and_union", "Overlap.iou"]),
    3: Exercise("prompts on many images in one call", 10, "reward.py", ["decode_masks"]),
    4: Exercise("the tiers", 5, "reward.py", ["tiered_reward"]),
    5: Exercise("advantages within a group", 5, "grpo.py", ["group_advantages"]),
    6: Exercise("the KL estimate", 5, "grpo.py", ["k3_kl"]),
    7: Exercise("the clipped token-level loss", 15, "grpo.py", ["grpo_loss"]),
    8: Exercise("the sampling loop", 15, "grpo.py", ["rollout"]),
    9: Exercise("a packed row and its attention mask", 10, "grpo.py", ["pack", "may_attend"]),
    10: Exercise("log-probs with a shared prompt", 15, "grpo.py", ["group_logprobs"]),
}
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


def remove_solutions(script: str, numbers: Iterable[int] = EXERCISES) -> str:
    """The text of a script of this repository without the solutions of these exercises."""
    text = (ROOT / script).read_text("utf-8")
    lines = text.split("\n")
    found = find_functions(ast.parse(text).body)
    for number in numbers:
        exercise = EXERCISES[number]
        for name in exercise.functions if exercise.script == script else ():
            docstring = found[name].body[0]
            error = f'raise NotImplementedError("exercise {number}: {exercise.title}")'
            first, last = docstring.end_lineno, found[name].end_lineno
            # None keeps the numbers of the other lines.
            lines[first:last] = [" " * docstring.col_offset + error] + [None] * (last - first - 1)
    return "\n".join(line for line in lines if line is not None)


def handout_files() -> list[str]:
    """The files that a student gets, relative to the repository: no runs, data, environments."""
    files = [ROOT / "LICENSE", ROOT / ".gitignore", Path(__file__)]  # the tests read EXERCISES
    files += [file for file in ROOT.iterdir() if file.suffix in (".py", ".md", ".txt", ".toml")]
    files += [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()]
    paths = [file.relative_to(ROOT).as_posix() for file in files]
    excluded = re.compile(r"(^|/)(__pycache__|vlm-clean)/|\.tmp$")
    return sorted(p for p in paths if p not in LECTURER_FILES and not excluded.search(p))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m assignment.handout",
        description="Write a student's copy of this repository, without the solutions.",
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out = parser.parse_args(argv).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name another one")
    for name in handout_files():  # all listed before writing: `out` may be inside the repository
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    for script in SCRIPTS:
        (out / script).write_text(remove_solutions(script), "utf-8")
    print(f"written to {out}: the exercises are in {', '.join(SCRIPTS)}")
    print("start with: python -m pytest -rs -m exercise_1 tests")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

"""handout.py - a student's copy of this repository: python tests/handout.py OUT

In the scripts the solution of each exercise stands between two comments, `# exercise 5: advantages within a group` and
`# end of exercise 5`. In the copy, a NotImplementedError takes its place; signatures, docstrings, all other code and the
tests stay. `python -m pytest -rs -m exercise_5 tests` runs the tests of an exercise.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("reward.py", "grpo.py")  # where the exercises are
FOLDERS = (".ci", "assets", "benchmarks", "tests", "tiny")
LECTURERS = {f"tests/{name}.py" for name in ("handout", "grade", "test_assignment", "test_tutorial")}
OPENS = re.compile(r"( *)# exercise (\d+): (.+)")
CLOSES = re.compile(r" *# end of exercise (\d+)\b")


class Solution(NamedTuple):
    """What stands between two markers. An exercise may have several."""

    exercise: int
    title: str
    indent: str
    first: int  # its lines, the markers not among them: lines[first:last]
    last: int


def solutions(lines: list[str]) -> list[Solution]:
    """Those of a script, from top to bottom. What is opened and not closed is none.

    >>> solutions(["def double(x):", "    # exercise 1: doubling", "    return 2 * x", "    # end of exercise 1"])
    [Solution(exercise=1, title='doubling', indent='    ', first=2, last=3)]
    """
    found, opened = [], None
    for number, line in enumerate(lines):
        if match := OPENS.match(line):
            opened = Solution(int(match[2]), match[3].strip(), match[1], number + 1, number + 1)
        elif (match := CLOSES.match(line)) and opened and opened.exercise == int(match[1]):
            found.append(opened._replace(last=number))
            opened = None
    return found


def blank(text: str) -> str:
    """A script without its solutions.

    >>> print(blank("def double(x):\\n    # exercise 1: doubling\\n    return 2 * x\\n    # end of exercise 1"))
    def double(x):
        # exercise 1: doubling
        raise NotImplementedError("exercise 1: doubling")
        # end of exercise 1
    """
    lines = text.split("\n")
    for one in reversed(solutions(lines)):
        lines[one.first : one.last] = [f'{one.indent}raise NotImplementedError("exercise {one.exercise}: {one.title}")']
    return "\n".join(lines)


def handout_files() -> list[str]:
    """What a student gets, relative to the repository: no runs, data or environments, and nothing that is the lecturer's."""
    files = [file for file in ROOT.iterdir() if file.suffix in (".py", ".md", ".txt") or file.name in ("LICENSE", ".gitignore")]
    files += [file for folder in FOLDERS for file in (ROOT / folder).rglob("*")]
    names = [file.relative_to(ROOT).as_posix() for file in files if file.is_file()]
    left_out = re.compile(r"(^|/)(__pycache__|vlm-clean)/|\.tmp$")
    return sorted(name for name in names if name not in LECTURERS and not left_out.search(name))


def write_handout(out: Path) -> None:
    """Write the copy. `out` must be new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there and is no empty folder")
    for name in handout_files():  # listed before the first is written: `out` may lie in this repository
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name in SCRIPTS:
            (out / name).write_text(blank((ROOT / name).read_text("utf-8")), "utf-8")
        else:
            shutil.copy(ROOT / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a student's copy of this repository, without the solutions of the exercises.")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out = parser.parse_args().out
    try:
        write_handout(out)
    except OSError as error:
        parser.exit(2, f"handout.py: {error}\n")
    print(f"{out}: the exercises are in {' and '.join(SCRIPTS)}; try python -m pytest -rs -m exercise_1 tests")


if __name__ == "__main__":
    main()

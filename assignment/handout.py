"""handout.py - write a student's copy of this repository, without the solutions.

    python -m assignment.handout OUT

In reward.py, plumbing/sam.py and grpo.py, the solution of each exercise lies between two comments,
`# exercise 5: advantages within a group` and `# end of exercise 5`. The copy has a
NotImplementedError there. Signatures, docstrings, all other code and the tests stay.
`python -m pytest -rs -m exercise_5 tests` runs the tests of one exercise.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("reward.py", "plumbing/sam.py", "grpo.py")  # the files with exercises
FOLDERS = (".ci", "assets", "benchmarks", "examples", "plumbing", "tests", "tiny", "tools")
LECTURER_FILES = {"tests/test_assignment.py", "tests/test_tutorial.py"}
START = re.compile(r"( *)# exercise (\d+): (.+)")
END = re.compile(r" *# end of exercise (\d+)\b")


class Solution(NamedTuple):
    """The lines between two markers. An exercise may have several solutions."""

    exercise: int
    title: str
    indent: str
    first: int  # the solution is lines[first:last], without the markers
    last: int


def solutions(lines: list[str]) -> list[Solution]:
    """The solutions in a script, from top to bottom. Ignores a start marker without an end marker.

    >>> source = "def double(x):\\n    # exercise 1: doubling\\n    return 2 * x"
    >>> solutions((source + "\\n    # end of exercise 1").split("\\n"))
    [Solution(exercise=1, title='doubling', indent='    ', first=2, last=3)]
    """
    found, current = [], None
    for number, line in enumerate(lines):
        if match := START.match(line):
            title = match[3].strip()
            current = Solution(int(match[2]), title, match[1], number + 1, number + 1)
        elif (match := END.match(line)) and current and current.exercise == int(match[1]):
            found.append(current._replace(last=number))
            current = None
    return found


def remove_solutions(text: str) -> str:
    """Replace each solution in a script by a NotImplementedError.

    >>> source = "def double(x):\\n    # exercise 1: doubling\\n    return 2 * x"
    >>> print(remove_solutions(source + "\\n    # end of exercise 1"))
    def double(x):
        # exercise 1: doubling
        raise NotImplementedError("exercise 1: doubling")
        # end of exercise 1
    """
    lines = text.split("\n")
    for one in reversed(solutions(lines)):
        error = f'raise NotImplementedError("exercise {one.exercise}: {one.title}")'
        lines[one.first : one.last] = [one.indent + error]
    return "\n".join(lines)


def handout_files() -> list[str]:
    """The files that a student gets, relative to the repository.

    Leaves out runs, data, environments and the lecturer's files.
    """
    suffixes, names = (".py", ".md", ".txt", ".toml"), ("LICENSE", ".gitignore")
    files = [f for f in ROOT.iterdir() if f.suffix in suffixes or f.name in names]
    files += [file for folder in FOLDERS for file in (ROOT / folder).rglob("*")]
    paths = [file.relative_to(ROOT).as_posix() for file in files if file.is_file()]
    excluded = re.compile(r"(^|/)(__pycache__|vlm-clean)/|\.tmp$")
    return sorted(p for p in paths if p not in LECTURER_FILES and not excluded.search(p))


def write_handout(out: Path) -> None:
    """Write the copy to `out`, a new or empty folder. Raises FileExistsError otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: name another one")
    for name in handout_files():  # all listed before writing: `out` may be inside the repository
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name in SCRIPTS:
            (out / name).write_text(remove_solutions((ROOT / name).read_text("utf-8")), "utf-8")
        else:
            shutil.copy(ROOT / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m assignment.handout",
        description="Write a student's copy of this repository, without the solutions.",
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out = parser.parse_args().out
    try:
        write_handout(out)
    except OSError as error:
        parser.exit(2, f"handout.py: {error}\n")
    print(f"written to {out}: the exercises are in {', '.join(SCRIPTS)}")
    print("start with: python -m pytest -rs -m exercise_1 tests")


if __name__ == "__main__":
    main()

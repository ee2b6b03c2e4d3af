"""grade.py - points for a student's work: python tests/grade.py FOLDER [--hidden TESTS] [--limit SECONDS] [--exercises 1 4 7]

Each exercise is graded on its own, in a temporary copy of this repository that holds the student's lines between the markers
of that exercise and nothing else of FOLDER. So one miss does not fail all, and edits elsewhere, of tests above all, have no
say. The tests are those marked with the exercise, here and in TESTS (files test_*.py with the same marks and fixtures). If
all pass, the points are full, else the share that passed, rounded down; a skipped test did not pass.

It prints a table and then the same as one line of JSON. Grade this repository itself first: a hidden test that is wrong shows.

A student's code runs in a process of its own, with a time limit. That guards against accidents and simple tricks; it is no
prison: code that is written to attack the grader needs a container around all of this.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from handout import ROOT, SCRIPTS, handout_files, solutions

POINTS = {1: 10, 2: 10, 3: 10, 4: 5, 5: 5, 6: 5, 7: 15, 8: 15, 9: 10, 10: 15}  # yours to change
TESTS = ["tests/test_reward.py", "tests/test_grpo.py"]  # where the marked tests are
KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "TEMP", "SYSTEMROOT", "USERPROFILE")  # of the grader's environment

# Notes how many tests there are, and that all had their turn: a report that breaks off must not pass for a whole one.
PLUGIN = """
from pathlib import Path
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    Path("collected").write_text(str(len(session.items)))
    result = yield
    Path("finished").touch()
    return result
"""


def exercises() -> dict[int, tuple[str, str]]:
    """Number -> script and title."""
    found = {}
    for script in SCRIPTS:
        for one in solutions((ROOT / script).read_text("utf-8").split("\n")):
            found.setdefault(one.exercise, (script, one.title))
    return found


def put_in(reference: str, student: str, exercise: int) -> str:
    """The reference script with the student's lines between the markers of one exercise.

    >>> marked = "# exercise 1: {}\\n{}\\n# end of exercise 1\\n# exercise 2: {}\\n{}\\n# end of exercise 2"
    >>> print(put_in(marked.format("a", "right", "b", "right"), marked.format("a", "mine", "b", "mine"), 2))
    # exercise 1: a
    right
    # end of exercise 1
    # exercise 2: b
    mine
    # end of exercise 2
    """
    lines, theirs = reference.split("\n"), student.split("\n")
    places, found = ([one for one in solutions(text) if one.exercise == exercise] for text in (lines, theirs))
    if len(places) != len(found):
        raise ValueError(f"its {len(places)} pair(s) of markers are not there: {len(found)} found")
    for place, other in reversed(list(zip(places, found, strict=True))):
        lines[place.first : place.last] = theirs[other.first : other.last]
    return "\n".join(lines)


def outside(text: str) -> list[str]:
    """A script's lines that belong to no exercise."""
    lines = text.split("\n")
    for one in reversed(solutions(lines)):
        del lines[one.first : one.last]
    return [line.rstrip() for line in lines]


def make_tree(tree: Path, script: str, text: str, hidden: list[Path]) -> list[str]:
    """Write this repository with another text of one script, and the hidden tests, into a folder. Returns its test files."""
    for file in handout_files():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    for file in hidden:
        shutil.copy(file, tree / "tests")
    (tree / script).write_text(text, "utf-8")
    return [*TESTS, *(f"tests/{file.name}" for file in hidden)]


def environment() -> dict[str, str]:
    """What a test process is told: little of what the grader's own environment holds, and no plugins of the installation."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run_tests(tree: Path, marks: str, files: list[str], limit: float) -> tuple[int, int | None, str]:
    """Run the tests with these marks in a tree. Returns how many passed, how many there are (None: unknown), and a remark."""
    (tree / "pytest.ini").write_text("[pytest]\n")  # so that pytest looks for none in the folders above
    (tree / "count_tests.py").write_text(PLUGIN)
    options = "-q -s --tb=line -p no:cacheprovider -p count_tests --junitxml report.xml -m".split()
    command = [sys.executable, "-m", "pytest", *options, marks, *files]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)  # a solution may print without end
    process = subprocess.Popen(command, cwd=tree, env=environment(), start_new_session=True, **nowhere)
    remark = ""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        remark = f"stopped after {limit:g} seconds"
    finally:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # and with it whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    total = int((tree / "collected").read_text()) if (tree / "collected").is_file() else None
    if remark or not (tree / "report.xml").is_file():
        return 0, total, remark or f"ended without a report, exit code {process.returncode}"
    passed = 0
    for case in ET.parse(tree / "report.xml").iter("testcase"):
        trouble = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if trouble is None:
            passed += 1
        elif not remark:
            name = re.sub(r"\[.{30,}", "", case.get("name"))  # its parameters, where they are long
            remark = f"{name}: {' '.join((trouble.get('message') or trouble.tag).split())}"[:120]
    if not (tree / "finished").is_file():
        return 0, total, remark or "broke off before all tests had run"
    return passed, total, remark


def grade_exercise(folder: Path, exercise: int, script: str, hidden: list[Path], limit: float) -> tuple[int, int | None, str]:
    """Tests passed, tests, and a remark."""
    reference = (ROOT / script).read_text("utf-8")
    try:
        student = (folder / script).read_text("utf-8")
        text = put_in(reference, student, exercise)
        compile(text, f"<student's {script}>", "exec", dont_inherit=True)  # by its own name Python would quote our file
    except SyntaxError as error:
        return 0, None, f"syntax error: {error.msg}: {(error.text or '').strip()[:60]}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # no such file, no text, no markers; nested too deep
        return 0, None, " ".join(str(error).split()) or type(error).__name__
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        files = make_tree(Path(name), script, text, hidden)
        passed, total, remark = run_tests(Path(name), f"exercise_{exercise}", files, limit)
    if not remark and outside(student) != outside(reference):
        remark = "edits outside the markers were ignored"
    return passed, total, remark


def grade(folder: Path, numbers: list[int], hidden: list[Path] = (), limit: float = 120.0) -> Iterator[dict]:
    """A row for each exercise: exercise, title, passed, tests (None: unknown), points, of, remark."""
    for number in numbers:
        script, title = exercises()[number]
        passed, total, remark = grade_exercise(folder, number, script, hidden, limit)
        points = POINTS[number] * passed // total if total else 0
        yield dict(exercise=number, title=title, passed=passed, tests=total, points=points, of=POINTS[number], remark=remark)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade a student's copy of this repository.")
    parser.add_argument("folder", type=Path, help=f"the student's: {' and '.join(SCRIPTS)} are read, nothing else")
    parser.add_argument("--hidden", type=Path, help="a folder of tests that students do not have: test_*.py, with the same marks")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for the tests of an exercise, about 10 of them to start up")
    parser.add_argument("--exercises", type=int, nargs="+", choices=sorted(POINTS), default=sorted(POINTS), metavar="N")
    s = parser.parse_args()
    hidden = sorted(s.hidden.glob("test_*.py")) if s.hidden else []
    if not any((s.folder / script).is_file() for script in SCRIPTS):
        parser.exit(2, f"grade.py: {s.folder} holds no {' and no '.join(SCRIPTS)}\n")
    if s.hidden and not hidden:
        parser.exit(2, f"grade.py: {s.hidden} holds no test_*.py\n")
    if taken := [file.name for file in hidden if (ROOT / "tests" / file.name).exists()]:
        parser.exit(2, f"grade.py: {taken[0]} is the name of a visible test file: name the hidden one otherwise\n")
    if not s.limit > 0:
        parser.exit(2, "grade.py: --limit must be above 0\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a grader that is ended takes its test process along
    width = max(len(title) for _, title in exercises().values())
    print(f"{'exercise':>8}  {'title':{width}}  {'tests':>9}  {'points':>8}  remark")
    rows = []
    for row in grade(s.folder, sorted(set(s.exercises)), hidden, s.limit):
        rows.append(row)
        tests = f"{row['passed']} of {row['tests']}" if row["tests"] else "-"
        line = f"{row['exercise']:8}  {row['title']:{width}}  {tests:>9}  {row['points']:2} of {row['of']:2}  {row['remark']}"
        print(line.rstrip(), flush=True)
    points, most = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(f"{'total':>8}  {'':{width}}  {'':9}  {points:2} of {most:2}")
    print(json.dumps({"folder": str(s.folder), "points": points, "of": most, "exercises": rows}))


if __name__ == "__main__":
    main()

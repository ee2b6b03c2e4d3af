"""grade.py - grade a student's work.

    python -m assignment.grade FOLDER [--hidden TESTS] [--limit SECONDS] [--exercises 1 4 7]

The grader makes a temporary copy of this repository for each exercise. The copy takes the
student's lines between the markers of that exercise, and nothing else from FOLDER. So one mistake
does not fail the other exercises, and changes outside the markers or in the tests have no effect.

The tests of an exercise are those marked exercise_N here and in TESTS (files named test_*.py that
use the same marks and fixtures). A student gets the share of the points that equals the share of
passed tests, rounded down. A skipped test does not count as passed.

The output is a table, followed by the same results as one line of JSON. Grade this repository
itself first: this shows whether the hidden tests are correct.

The student's code runs in a separate process with a time limit. This protects against mistakes
and simple tricks, not against code written to attack the grader. For that, use a container.
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

from assignment.handout import ROOT, SCRIPTS, handout_files, solutions

POINTS = {1: 10, 2: 10, 3: 10, 4: 5, 5: 5, 6: 5, 7: 15, 8: 15, 9: 10, 10: 15}  # change as you like
TESTS = ["tests/test_reward.py", "tests/test_grpo.py"]  # the files with marked tests
# The environment variables that a test process inherits.
INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "TEMP", "SYSTEMROOT")
INHERITED += ("USERPROFILE",)

# Records the number of tests and whether all have run. A solution that ends the process early
# leaves a partial report, which must not pass as a complete one.
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
    """Script and title of each exercise, by number."""
    found = {}
    for script in SCRIPTS:
        for one in solutions((ROOT / script).read_text("utf-8").split("\n")):
            found.setdefault(one.exercise, (script, one.title))
    return found


def insert_solution(reference: str, student: str, exercise: int) -> str:
    """The reference script with the student's lines between the markers of one exercise.

    Raises ValueError if the student's script does not have the same number of marker pairs.

    >>> script = "# exercise 1: a\\n{}\\n# end of exercise 1\\n# exercise 2: b\\n{}"
    >>> script += "\\n# end of exercise 2"
    >>> reference, student = script.format("right", "right"), script.format("mine", "mine")
    >>> print(insert_solution(reference, student, 2))
    # exercise 1: a
    right
    # end of exercise 1
    # exercise 2: b
    mine
    # end of exercise 2
    """
    lines, new = reference.split("\n"), student.split("\n")
    places, found = ([s for s in solutions(x) if s.exercise == exercise] for x in (lines, new))
    if len(places) != len(found):
        raise ValueError(f"{len(found)} of {len(places)} pairs of markers found: restore the rest")
    for place, other in reversed(list(zip(places, found, strict=True))):
        lines[place.first : place.last] = new[other.first : other.last]
    return "\n".join(lines)


def lines_outside(text: str) -> list[str]:
    """The lines of a script that belong to no exercise."""
    lines = text.split("\n")
    for one in reversed(solutions(lines)):
        del lines[one.first : one.last]
    return [line.rstrip() for line in lines]


def make_tree(tree: Path, script: str, text: str, hidden: list[Path]) -> list[str]:
    """Copy this repository and the hidden tests into `tree`, with `text` as one script.

    Returns the test files, relative to `tree`.
    """
    for file in handout_files():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    for file in hidden:
        shutil.copy(file, tree / "tests")
    (tree / script).write_text(text, "utf-8")
    return [*TESTS, *(f"tests/{file.name}" for file in hidden)]


def environment() -> dict[str, str]:
    """The environment of a test process. Disables installed pytest plugins."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run_pytest(tree: Path, marks: str, files: list[str], limit: float) -> tuple[int, bool]:
    """Run pytest in `tree` for at most `limit` seconds. Returns its exit code, and if it timed out.

    Writes `collected` (number of tests), `finished` (if all have run) and `report.xml` to `tree`.
    """
    (tree / "pytest.ini").write_text("[pytest]\n")  # else pytest searches the parent folders
    (tree / "count_tests.py").write_text(PLUGIN)
    options = "-q -s --tb=line -p no:cacheprovider -p count_tests --junitxml report.xml -m".split()
    command = [sys.executable, "-m", "pytest", *options, marks, *files]
    # A solution may print without end, so the output is not captured.
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(
        command, cwd=tree, env=environment(), start_new_session=True, **streams
    )
    timed_out = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # also ends the processes it started
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    return process.returncode, timed_out


def run_tests(
    tree: Path, marks: str, files: list[str], limit: float
) -> tuple[int, int | None, str]:
    """Run the tests with these marks in `tree`.

    Returns the number of passed tests, the number of tests (None if unknown), and a remark.
    """
    code, timed_out = run_pytest(tree, marks, files, limit)
    collected, report = tree / "collected", tree / "report.xml"
    total = int(collected.read_text()) if collected.is_file() else None
    if timed_out:
        return 0, total, f"stopped after {limit:g} seconds"
    if not report.is_file():
        return 0, total, f"ended without a report, exit code {code}"
    passed, remark = 0, ""
    for case in ET.parse(report).iter("testcase"):
        problems = [part for part in case if part.tag in ("failure", "error", "skipped")]
        if not problems:
            passed += 1
        elif not remark:
            name = re.sub(r"\[.{30,}", "", case.get("name"))  # without long parameters
            message = problems[0].get("message") or problems[0].tag
            remark = f"{name}: {' '.join(message.split())}"[:120]
    if not (tree / "finished").is_file():
        return 0, total, remark or "ended before all tests had run"
    return passed, total, remark


def grade_exercise(
    folder: Path, exercise: int, script: str, hidden: list[Path], limit: float
) -> tuple[int, int | None, str]:
    """Number of passed tests, number of tests (None if unknown), and a remark."""
    reference = (ROOT / script).read_text("utf-8")
    try:
        student = (folder / script).read_text("utf-8")
        text = insert_solution(reference, student, exercise)
        # With the real file name, Python would quote the line of our file in a SyntaxError.
        compile(text, f"<student's {script}>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return 0, None, f"syntax error: {error.msg}: {(error.text or '').strip()[:60]}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        # Missing file, invalid UTF-8, missing markers, or expressions nested too deeply.
        return 0, None, " ".join(str(error).split()) or type(error).__name__
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        files = make_tree(Path(name), script, text, hidden)
        passed, total, remark = run_tests(Path(name), f"exercise_{exercise}", files, limit)
    if not remark and lines_outside(student) != lines_outside(reference):
        remark = "edits outside the markers were ignored"
    return passed, total, remark


def grade(
    folder: Path, numbers: list[int], hidden: list[Path] = (), limit: float = 120.0
) -> Iterator[dict]:
    """Grade the exercises one by one.

    Yields dicts with exercise, title, passed, tests (None if unknown), points, of (the full
    points) and remark.
    """
    for number in numbers:
        script, title = exercises()[number]
        passed, total, remark = grade_exercise(folder, number, script, hidden, limit)
        full = POINTS[number]
        points = full * passed // total if total else 0
        row = {"exercise": number, "title": title, "passed": passed, "tests": total}
        yield row | {"points": points, "of": full, "remark": remark}


def parse_arguments() -> tuple[argparse.Namespace, list[Path]]:
    """The command line and the files with hidden tests. Exits with one line if they are invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m assignment.grade",
        description="Grade a student's copy of this repository.",
    )
    parser.add_argument(
        "folder", type=Path, help=f"student's folder; only {', '.join(SCRIPTS)} are read"
    )
    parser.add_argument(
        "--hidden", type=Path, help="folder of tests that students do not have: test_*.py"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120.0,
        help="seconds for the tests of one exercise, about 10 of which are for start-up",
    )
    parser.add_argument(
        "--exercises",
        type=int,
        nargs="+",
        choices=sorted(POINTS),
        default=sorted(POINTS),
        metavar="N",
        help="numbers of the exercises to grade (default: all)",
    )
    s = parser.parse_args()
    hidden = sorted(s.hidden.glob("test_*.py")) if s.hidden else []
    if not any((s.folder / script).is_file() for script in SCRIPTS):
        parser.exit(2, f"grade.py: {s.folder} has no {' and no '.join(SCRIPTS)}\n")
    if s.hidden and not hidden:
        parser.exit(2, f"grade.py: --hidden: {s.hidden} has no test_*.py\n")
    if taken := [file.name for file in hidden if (ROOT / "tests" / file.name).exists()]:
        parser.exit(2, f"grade.py: --hidden: {taken[0]} is a visible test file: rename yours\n")
    if not s.limit > 0:
        parser.exit(2, "grade.py: --limit must be above 0\n")
    return s, hidden


def main() -> None:
    s, hidden = parse_arguments()
    # SIGTERM raises SystemExit, so `run_pytest` also ends its test process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    width = max(len(title) for _, title in exercises().values())
    print(f"{'exercise':>8}  {'title':{width}}  {'tests':>9}  {'points':>8}  remark")
    rows = []
    for row in grade(s.folder, sorted(set(s.exercises)), hidden, s.limit):
        rows.append(row)
        tests = f"{row['passed']} of {row['tests']}" if row["tests"] else "-"
        points = f"{row['points']:2} of {row['of']:2}"
        line = f"{row['exercise']:8}  {row['title']:{width}}  {tests:>9}  {points}  {row['remark']}"
        print(line.rstrip(), flush=True)
    points, full = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(f"{'total':>8}  {'':{width}}  {'':9}  {points:2} of {full:2}")
    print(json.dumps({"folder": str(s.folder), "points": points, "of": full, "exercises": rows}))


if __name__ == "__main__":
    main()

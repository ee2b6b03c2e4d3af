"""grade.py - grade a student's work.

    python -m assignment.grade FOLDER [--hidden TESTS] [--limit SECONDS] [--exercises 1 4 7]

Each exercise has its own temporary copy of this repository. It gets the student's bodies of the
functions of that exercise (`handout.EXERCISES`) and the functions that the student has added to the
script. So one mistake does not fail the other exercises, and changes of other functions or of
tests have no effect.

The tests of an exercise are those marked exercise_N here, those of UNSEEN, which students do not
have, and yours in TESTS (files named test_*.py that use the same marks and fixtures). If one of the
exercise's necessary tests fails, it earns nothing. Else it earns the share of its points that
equals the share of the other tests that pass, rounded down. A skipped test does not count as
passed. If not all tests have run, because of the time limit or because the process ended, none
counts.

The output is a table, followed by the same results as one line of JSON. The student's code runs in
a separate process with a time limit. This protects against mistakes and simple tricks, not against
code written to attack the grader. For that, use a container.
"""

import argparse
import ast
import builtins
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from symtable import symtable

from assignment import handout, outcomes
from assignment.handout import BY_HAND, EXERCISES, NECESSARY, ROOT, SCRIPTS, TESTS
from plumbing.errors import UserError, exit_with_one_line

UNSEEN = "tests/test_unseen.py"  # marked tests that students do not have
# What a test process inherits: none of the lecturer's tokens.
INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "TEMP", "SYSTEMROOT")


def parse_parts(text: str) -> list[ast.stmt]:
    """The statements of a module. Leaves out the parts, between empty lines, with syntax errors.

    >>> [node.name for node in parse_parts("def f(): (\\n\\n\\ndef g():\\n    pass")]
    ['g']
    """
    with contextlib.suppress(SyntaxError):
        return ast.parse(text).body
    nodes = []
    for part in re.split(r"\n\s*\n(?=\S)", text):
        with contextlib.suppress(SyntaxError):
            nodes += ast.parse(part).body
    return nodes


def insert_solution(reference: str, student: str, names: list[str]) -> str:
    """The reference script with the student's bodies of some functions.

    Functions of the student's script are added if their names are new: not those of anything else
    in the reference script, and not builtins. Raises SyntaxError or ValueError if the student's
    script lacks one of the functions.
    """
    tree = ast.parse(reference)
    ours = handout.find_functions(tree.body)
    theirs = handout.find_functions(parse_parts(student))
    for name in names:
        if name not in theirs:
            ast.parse(student)  # raises SyntaxError if that is why
            raise ValueError(f"{name} is missing")
        ours[name].body[1:] = theirs[name].body  # after our docstring
    taken = {*symtable(reference, "reference", "exec").get_identifiers(), *dir(builtins)}
    tree.body += [node for name, node in theirs.items() if "." not in name and name not in taken]
    return ast.unparse(tree)


def count_points(number: int, cases: dict[str, str]) -> tuple[int, str]:
    """The points of an exercise, and what failed. cases: name of a test -> "" or the message.

    >>> cases = {"test_iou_must_exceed_a_threshold[tiered]": "", "test_of_mine": "assert 1 == 2"}
    >>> count_points(5, cases | {"test_another": ""})
    (1, 'test_of_mine: assert 1 == 2')
    >>> count_points(5, {"test_iou_must_exceed_a_threshold[tiered]": "wrong", "test_of_mine": ""})
    (0, 'necessary: test_iou_must_exceed_a_threshold[tiered]: wrong')
    """
    exercise = EXERCISES[number]
    necessary = {n for n in cases if {n, n.partition("[")[0]} & set(NECESSARY[number])}
    failed = sorted((n for n in cases if cases[n]), key=lambda n: n not in necessary)
    if not failed:
        return (exercise.points if cases else 0), ""
    name = re.sub(r"\[.{30,}", "", failed[0])  # without long parameters
    message = " ".join(cases[failed[0]].removeprefix("Skipped: ").split())
    remark = f"{name}: {message}"
    if failed[0] in necessary:
        return 0, f"necessary: {remark}"[:120]
    others = len(cases) - len(necessary)
    return exercise.points * (others - len(failed)) // others, remark[:120]


def run_tests(
    tree: Path, number: int, files: list[str], limit: float
) -> tuple[dict[str, str], str]:
    """Run the tests of an exercise in `tree`, for at most `limit` seconds.

    Returns the tests as `count_points` takes them, none if not all have run, and why that is so.
    """
    (tree / "pytest.ini").write_text("[pytest]\n")  # else pytest searches the parent folders
    shutil.copy(outcomes.__file__, tree)
    options = "-q -s --tb=line -p no:cacheprovider -p outcomes".split()
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = tree / "outcomes.json"
    environment |= {"OUTCOMES": str(found)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "-m", f"exercise_{number}", *files],
        cwd=tree,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a solution may print without end
        stderr=subprocess.DEVNULL,
    )
    remark = "ended before all tests had run"
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        remark = f"stopped after {limit:g} seconds"
    finally:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # also ends the processes it started
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    if not found.is_file():
        return {}, remark
    return json.loads(found.read_text("utf-8")).get(f"exercise_{number}", {}), ""


def grade_exercise(folder: Path, number: int, hidden: list[Path], limit: float) -> dict:
    """Grade one exercise of a student's folder. hidden: files with more tests.

    Returns exercise, title, passed, tests (0 if not all have run), points, of (the full points),
    and remark.
    """
    exercise = EXERCISES[number]
    cases = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        tree = Path(temporary)
        handout.copy_files([*handout.handout_files(), UNSEEN], tree)
        for file in hidden:
            shutil.copy(file, tree / "tests")
        files = [*TESTS, UNSEEN, *(f"tests/{file.name}" for file in hidden)]
        try:
            reference = (ROOT / exercise.script).read_text("utf-8")
            student = (folder / exercise.script).read_text("utf-8")
            solved = insert_solution(reference, student, exercise.functions)
            (tree / exercise.script).write_text(solved, "utf-8")
            cases, remark = run_tests(tree, number, files, limit)
        except SyntaxError as error:
            remark = f"syntax error: {error.msg}: {(error.text or '').strip()[:60]}"
        # ValueError: also invalid UTF-8; the last two: an expression that is nested too deep.
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            remark = " ".join(str(error).split())
    points, failed = count_points(number, cases)
    passed = list(cases.values()).count("")
    row = {"exercise": number, "title": exercise.title, "passed": passed, "tests": len(cases)}
    return row | {"points": points, "of": exercise.points, "remark": remark or failed}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m assignment.grade", description="Grade a student's copy of this repository."
    )
    add = parser.add_argument
    add("folder", type=Path, help=f"student's folder; only {', '.join(SCRIPTS)} are read")
    add("--hidden", type=Path, help="folder of tests that students do not have: test_*.py")
    add("--limit", type=float, default=120.0, help="seconds for one exercise, about 10 to start up")
    numbers = sorted(EXERCISES)
    add("--exercises", type=int, nargs="+", choices=numbers, default=numbers, metavar="N")
    s = parser.parse_args(argv)
    if not 1 <= s.limit <= 86_400:
        raise UserError(f"--limit {s.limit:g}: it must be from 1 to 86400 seconds")
    if not any((s.folder / script).is_file() for script in SCRIPTS):
        raise UserError(f"{s.folder} has no {' and no '.join(SCRIPTS)}")
    hidden = sorted(s.hidden.glob("test_*.py")) if s.hidden else []
    if s.hidden and not hidden:
        raise UserError(f"--hidden: {s.hidden} has no test_*.py")
    for file in hidden:
        if (ROOT / "tests" / file.name).exists():
            raise UserError(f"--hidden: {file.name} is a visible test file: rename yours")

    rows = []
    print(f"{'exercise':>8}  {'title':36}  {'tests':>9}  {'points':>8}  remark")
    for number in sorted(set(s.exercises)):
        row = grade_exercise(s.folder, number, hidden, s.limit)
        rows.append(row)
        tests = f"{row['passed']} of {row['tests']}" if row["tests"] else "-"
        points = f"{row['points']} of {row['of']}"
        line = f"{number:8}  {row['title']:36}  {tests:>9}  {points:>8}  {row['remark']}"
        print(line.rstrip(), flush=True)
    points = sum(row["points"] for row in rows)
    full = sum(row["of"] for row in rows)
    by_hand = ", ".join(f"{n} ({title}, {of})" for n, (title, of) in BY_HAND.items())
    print(f"{points} of {full} points; to grade by hand: {by_hand}")
    print(json.dumps({"folder": str(s.folder), "points": points, "of": full, "exercises": rows}))


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

"""next.py - say which exercise comes next, and what fails in it.

    python -m assignment.next        run in a hand-out, needs its tests/requirements.txt

It tests the exercises that have been started, in order, and stops at the first that is not done.
"""

import ast
import contextlib
import io

import pytest

from assignment.handout import EXERCISES, ROOT, SCRIPTS, TESTS, is_solved
from plumbing.errors import UserError, exit_with_one_line


class Collector:
    """A pytest plugin: counts the tests of each exercise and keeps what failed."""

    def __init__(self):
        self.passed = dict.fromkeys(EXERCISES, 0)
        self.failed = {number: [] for number in EXERCISES}

    def pytest_runtest_logreport(self, report) -> None:
        for number in EXERCISES:
            if f"exercise_{number}" not in report.keywords:
                continue
            if report.failed or report.skipped:
                name = report.nodeid.rpartition("::")[2].removeprefix("test_")
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = crash.message if crash else str(report.longrepr[-1])
                line = f"{name.replace('_', ' ')}\n      {reason.splitlines()[0][:150]}"
                self.failed[number].append(line)
            elif report.when == "call":
                self.passed[number] += 1


def main() -> None:
    for script in SCRIPTS:
        try:
            ast.parse((ROOT / script).read_text("utf-8"))
        except SyntaxError as error:
            line = (error.text or "").strip()
            raise UserError(f"{script}, line {error.lineno}: {error.msg}: {line}") from error
    started = []
    for number in EXERCISES:
        if not is_solved(number):
            break
        started.append(number)
    collector = Collector()
    if started:
        print(f"Testing the exercises up to {started[-1]} ...", flush=True)
        marks = " or ".join(f"exercise_{number}" for number in started)
        files = [str(ROOT / file) for file in TESTS]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = pytest.main(["-q", "--tb=line", "-m", marks, *files], plugins=[collector])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            print(printed.getvalue())  # the tests could not be collected: a syntax error
            return
    for number, exercise in EXERCISES.items():
        functions = ", ".join(exercise.functions)
        title = f"Exercise {number}, {exercise.title}: {functions} in {exercise.script}"
        failed = collector.failed[number]
        if number in started and not failed:
            print(f"{title}: done")
            continue
        print(f"\n{title} comes next.")
        if number in started:
            print(f"  {len(failed)} of {len(failed) + collector.passed[number]} tests fail:")
            print("\n".join(f"    {line}" for line in failed[:5]))
        print(f"  Test it: python -m pytest -m exercise_{number}")
        return
    print("\nAll exercises with tests are done. The README has the last two.")


if __name__ == "__main__":
    with exit_with_one_line():
        main()

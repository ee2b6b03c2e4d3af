"""next.py - say which exercise comes next, and what fails in it.

    python -m assignment.next        run in a hand-out, needs its tests/requirements.txt

It tests the exercises that have been started, in order, and stops at the first that is not done.
"""

import ast
import contextlib
import io
import itertools

import pytest

from assignment import outcomes
from assignment.handout import EXERCISES, ROOT, SCRIPTS, TESTS, is_solved
from plumbing.errors import UserError, exit_with_one_line, reason_of


def main() -> None:
    for script in SCRIPTS:
        try:
            ast.parse((ROOT / script).read_text("utf-8"))
        except SyntaxError as error:
            line = (error.text or "").strip()
            raise UserError(f"{script}, line {error.lineno}: {error.msg}: {line}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{script} cannot be read: {reason_of(error)}") from error
    started = list(itertools.takewhile(is_solved, EXERCISES))
    if started:
        print(f"Testing the exercises up to {started[-1]} ...", flush=True)
        marks = " or ".join(f"exercise_{number}" for number in started)
        files = [str(ROOT / file) for file in TESTS]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = pytest.main(["-q", "--tb=line", "-m", marks, *files], plugins=[outcomes])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            print(printed.getvalue())  # the tests could not be collected
            return
    for number, exercise in EXERCISES.items():
        functions = ", ".join(exercise.functions)
        title = f"Exercise {number}, {exercise.title}: {functions} in {exercise.script}"
        found = outcomes.OUTCOMES.get(f"exercise_{number}", {})
        failed = [name for name in found if found[name]]
        if number in started and not failed:
            print(f"{title}: done")
            continue
        print(f"\n{title} comes next.")
        if failed:
            print(f"  {len(failed)} of {len(found)} tests fail:")
        for name in failed[:5]:
            print(f"    {name.removeprefix('test_').replace('_', ' ')}")
            print(f"      {found[name].splitlines()[0][:150]}")
        print(f"  Test it: python -m pytest -m exercise_{number}")
        return
    print("\nAll exercises with tests are done. The README has the last two.")


if __name__ == "__main__":
    with exit_with_one_line():
        main()

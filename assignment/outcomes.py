"""outcomes.py - a pytest plugin that keeps what the tests of each exercise say.

If all tests have run, it writes them to the file that the environment names in OUTCOMES. So a
solution that ends the session early leaves no file.
"""

import json
import os
from pathlib import Path

import pytest

OUTCOMES = {}  # "exercise_1" -> name of a test -> "" if it passed, else why not


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed and report.when != "call":  # the test has not run yet, or has its outcome
        return
    message = ""
    if not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else str(report.longrepr[-1])) or "failed"
    marks = [mark for mark in report.keywords if mark.startswith("exercise_")]
    for mark in marks or ["no exercise"]:
        OUTCOMES.setdefault(mark, {})[report.location[2]] = message


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    result = yield
    if "OUTCOMES" in os.environ:
        Path(os.environ["OUTCOMES"]).write_text(json.dumps(OUTCOMES), "utf-8")
    return result

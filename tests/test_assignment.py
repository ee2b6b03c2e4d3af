"""The assignment: a hand-out fails the tests of every exercise and no others, and the grader gives
the points that a student has earned."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import pytest

from assignment import grade, handout

EXERCISES = range(1, 11)
MARKS = """
def pytest_collection_modifyitems(items):
    for item in items:
        marks = [mark.name for mark in item.iter_markers() if mark.name.startswith("exercise_")]
        item.user_properties += [("mark", mark) for mark in marks]
"""


def command(name, *arguments):
    """Run assignment/handout.py or assignment/grade.py as a module."""
    command = [sys.executable, "-m", f"assignment.{name}", *arguments]
    return subprocess.run(command, cwd=handout.ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A hand-out."""
    out = tmp_path_factory.mktemp("class") / "student"
    result = command("handout", out)
    assert result.returncode == 0 and not result.stderr and str(out) in result.stdout
    return out


@pytest.fixture
def solve(student, tmp_path):
    """solve({exercise: lines}): a folder with the hand-out's scripts and these solutions."""

    def write(bodies):
        for script in handout.SCRIPTS:
            lines = (student / script).read_text().split("\n")
            for one in reversed(handout.solutions(lines)):
                if one.exercise in bodies:
                    body = textwrap.indent(bodies[one.exercise], one.indent)
                    lines[one.first : one.last] = body.split("\n")
            (tmp_path / script).parent.mkdir(exist_ok=True)
            (tmp_path / script).write_text("\n".join(lines))
        return tmp_path

    return write


def find_problem(case):
    """The failure, error or skip of a test in a JUnit report, or None."""
    return next((part for part in case if part.tag in ("failure", "error", "skipped")), None)


@pytest.mark.parametrize("module", [handout, grade])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_handout_is_the_repository_without_the_solutions(student):
    files = {file.relative_to(student).as_posix() for file in student.rglob("*") if file.is_file()}
    scripts = "data.py reward.py grpo.py samr1_mini.py README.md LICENSE requirements.txt"
    others = ".ci/run tests/conftest.py tests/test_grpo.py tiny/sam.safetensors"
    modules = "tiny/vlm/config.json plumbing/answers.py plumbing/memory.py tools/merge.py"
    examples = "examples/trl_grpo.py benchmarks/rollout.py assets/readme.png"
    assert {*" ".join([scripts, others, modules, examples]).split()} <= files
    assert not files & {"tests/test_assignment.py", "tests/test_tutorial.py"}
    excluded = r"(^|/)(\.git|\.venv|runs|__pycache__|assignment)/"
    assert not any(re.search(excluded, file) for file in files)
    for file in files - set(handout.SCRIPTS):
        assert (student / file).read_bytes() == (handout.ROOT / file).read_bytes()


def test_handout_names_no_command_that_students_lack_and_no_common_mistakes(student):
    for file in student.rglob("*.md"):
        text = file.read_text().lower()
        assert "common mistakes" not in text
        for module in re.findall(r"python -m (?!pytest)([a-z]\w*(?:\.\w+)*)", text):
            path = student / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or module in ("pip", "venv"), (file, module)
    lecturers = (handout.ROOT / "assignment" / "README.md").read_text()
    assert "Common mistakes" in lecturers and "python -m assignment.grade" in lecturers


def test_handout_replaces_exactly_the_solutions(student):
    numbers = {}
    for script in handout.SCRIPTS:
        reference, text = ((f / script).read_text() for f in (handout.ROOT, student))
        solutions = handout.solutions(reference.split("\n"))
        markers = re.findall(r"^ *# (?:end of )?exercise \d", reference, re.MULTILINE)
        assert len(markers) == 2 * len(solutions), "each marker is one of a pair"
        numbers[script] = [one.exercise for one in solutions]
        assert numbers[script] == sorted(numbers[script])
        assert grade.lines_outside(text) == grade.lines_outside(reference)
        for one in handout.solutions(text.split("\n")):
            error = f'raise NotImplementedError("exercise {one.exercise}: {one.title}")'
            assert text.split("\n")[one.first : one.last] == [one.indent + error]
    assert numbers["plumbing/sam.py"] == [2]
    assert sorted(set(sum(numbers.values(), []))) == list(EXERCISES)
    assert sorted(grade.POINTS) == sorted(grade.exercises()) == list(EXERCISES)
    assert sum(grade.POINTS.values()) == 100


# Runs pytest in several folders. Each run is a copy of one process that has imported the libraries,
# which takes longer than most of the runs.
RUN_ALL = """
import json, os, sys
import hypothesis, peft, pytest, segment_anything, torch, transformers
for folder, options in json.loads(sys.argv[1]):
    if not os.fork():
        os.chdir(folder)
        os._exit(pytest.main(options))
    os.wait()
"""
ORDER = (1, 3, 2, 4, 5, 6, 7, 8, 9, 10)  # TUTORIAL's order: each needs earlier ones only


@pytest.fixture(scope="module")
def reports(student, tmp_path_factory):
    """JUnit reports of the hand-out's tests: {0: of all, while nothing is solved; N: of those of
    exercise N, while it and all before it in ORDER are solved}."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot copy a process")
    folder = tmp_path_factory.mktemp("reports")
    (folder / "marks.py").write_text(MARKS)
    options = "-q --tb=line -p no:cacheprovider -p marks".split()
    options += ["-W", "error::pytest.PytestUnknownMarkWarning", *grade.TESTS]
    runs = [(str(student), [*options, f"--junitxml={folder}/0.xml"])]
    for place, number in enumerate(ORDER):
        tree = folder / str(number)
        shutil.copytree(student, tree, copy_function=os.link)
        for script in handout.SCRIPTS:
            text = (handout.ROOT / script).read_text()
            solved = handout.remove_solutions(text)
            for earlier in ORDER[: place + 1]:
                if grade.exercises()[earlier][0] == script:
                    solved = grade.insert_solution(solved, text, earlier)
            (tree / script).unlink()  # it is the same file as the hand-out's
            (tree / script).write_text(solved)
        more = [f"--junitxml={folder}/{number}.xml", "-m", f"exercise_{number}"]
        runs.append((str(tree), options + more))
    environment = grade.environment() | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN_ALL, json.dumps(runs)]
    subprocess.run(command, env=environment, capture_output=True)
    files = {number: folder / f"{number}.xml" for number in (0, *ORDER)}
    return {number: list(ET.parse(file).iter("testcase")) for number, file in files.items()}


@pytest.mark.slow
def test_handout_fails_the_tests_of_every_exercise_and_no_others(reports):
    exercises, passed = set(), 0
    for case in reports[0]:
        name, marks = case.get("name"), {mark.get("value") for mark in case.iter("property")}
        problem = find_problem(case)
        message = problem.get("message") if problem is not None else ""
        if marks:
            # A marked test that reaches the code of another exercise first, or of none, would
            # pass for an untouched hand-out, because the grader fills in the other exercises.
            missing = re.search(r"NotImplementedError: exercise (\d+): ", message)
            assert missing and problem.tag == "failure", (name, marks, message)
            assert f"exercise_{missing[1]}" in marks, (name, marks, message)
            exercises.add(int(missing[1]))
        elif message:
            assert re.fullmatch(r"needs exercise \d+", message), (name, message)
        else:
            passed += 1
    assert exercises == set(EXERCISES) and passed > 40


def test_handout_does_not_overwrite_anything(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "below"):
        refused = command("handout", out)
        assert refused.returncode == 2
        assert re.fullmatch(f"handout.py: .*{re.escape(str(out))}.*\n", refused.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_references_own_solutions_are_the_reference():
    for number, (script, _) in grade.exercises().items():
        text = (handout.ROOT / script).read_text()
        assert grade.insert_solution(text, text, number) == text


@pytest.mark.slow
def test_exercises_can_be_solved_in_order(reports):
    """All tests of an exercise pass, and none is skipped, while later ones are not solved."""
    for number in ORDER:
        assert reports[number], number
        for case in reports[number]:
            marks = {mark.get("value") for mark in case.iter("property")}
            assert f"exercise_{number}" in marks
            assert find_problem(case) is None, (number, case.get("name"))
    assert sum(map(len, reports.values())) - len(reports[0]) > 100


def test_the_order_is_that_of_the_tutorial():
    table = re.findall(r"^\| (\d+) \|", (handout.ROOT / "TUTORIAL.md").read_text(), re.MULTILINE)
    assert table[-len(ORDER) :] == list(map(str, ORDER))


# Exercise 5 is right but fails a hidden test, 6 is right, and 7 is not valid Python.
SOLUTIONS = {
    5: """centred = rewards - rewards.mean(-1, keepdim=True)
std = rewards.std(-1, keepdim=True)
return centred / (std + eps) * (std > 1e-6)""",
    6: "log_q = reference - logprobs\nreturn log_q.expm1() - log_q",
    7: "ratio = (\nadvantage = 1",
    9: "return None",
}
HIDDEN = """
import pytest, torch, grpo

@pytest.mark.exercise_5
@pytest.mark.parametrize("n", [2, 3])
def test_hidden(n, samples):
    assert len(samples) == 6
    assert grpo.group_advantages(torch.eye(n)).shape == (n, 9 - 3 * n + n)
"""


@pytest.mark.slow
def test_each_exercise_is_graded_on_its_own(solve, tmp_path_factory):
    folder = solve(SOLUTIONS)
    script = folder / "grpo.py"
    text = script.read_text().replace("# end of exercise 9", "# removed")
    script.write_text(text + "\nraise SystemExit  # outside the markers\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "conftest.py").write_text("import os; os._exit(0)")  # must not be used
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "test_hidden.py").write_text(HIDDEN)
    numbers = ["9", "7", "6", "5"]
    flags = ["--hidden", hidden, "--limit", "300", "--exercises", *numbers]
    result = command("grade", folder, *flags)
    assert result.returncode == 0, result.stderr
    table, summary = result.stdout.splitlines(), json.loads(result.stdout.splitlines()[-1])
    five, six, seven, nine = summary["exercises"]
    assert [row["exercise"] for row in summary["exercises"]] == [5, 6, 7, 9] and len(table) == 7
    assert five["tests"] == five["passed"] + 1
    assert five["points"] == 5 * five["passed"] // five["tests"] < 5
    assert "test_hidden[2]" in five["remark"] and table[1].endswith(five["remark"])
    assert six["passed"] == six["tests"] > 1 and six["points"] == six["of"] == 5
    assert six["remark"] == "edits outside the markers were ignored"
    assert seven["points"] == nine["points"] == 0
    assert seven["remark"].startswith("syntax error")
    assert "ratio = (" in seven["remark"], "the student's line, not the reference's"
    assert "markers" in nine["remark"]
    assert summary["points"] == five["points"] + six["points"] and summary["of"] == 35


# What a solution might do. Name: (its lines, passed tests of two, text in the remark)
HOSTILE = {
    "right": ("return 1", 2, ""),
    "one test fails": ("return 1 if x else 0", 1, "test_two: assert"),
    "not solved": ("raise NotImplementedError", 0, "NotImplementedError"),
    "sys.exit": ("import sys; sys.exit(0)", 0, "SystemExit"),
    "os._exit": ("import os; os._exit(0)", 0, "without a report, exit code 0"),
    "pytest.exit": ("import pytest; pytest.exit('enough', 0)", 0, "ended before all tests"),
    "os._exit in test 2": ("import os; return 1 if x else os._exit(0)", 0, "without a report"),
    "pytest.skip": ("import pytest; pytest.skip('hard')", 0, "hard"),
    "pytest.xfail": ("import pytest; pytest.xfail('hard')", 0, ""),
    "recursion": ("return f(x)", 0, "RecursionError"),
    "much output": ("for _ in range(200_000): print('x' * 1000)\nreturn 1", 2, ""),
    "pytest.exit in test 2": (
        "import pytest; return 1 if x else pytest.exit('enough', 0)",
        0,
        "ended before all tests",
    ),
    "interrupt": ("raise KeyboardInterrupt", 0, "ended before all tests"),
    "endless loop": ("while True: pass", 0, "stopped after 4 seconds"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_grader_survives_any_solution(name, tmp_path, monkeypatch):
    body, expected, text = HOSTILE[name]
    lines = "\n    ".join(body.split("\n"))
    (tmp_path / "test_small.py").write_text(
        f"import pytest\n\n\ndef f(x):\n    {lines}\n\n\npytestmark = pytest.mark.exercise_1\n\n\n"
        "def test_one():\n    assert f(1) == 1\n\n\ndef test_two():\n    assert f(0) == 1\n"
    )
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # must not be inherited
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    limit = 4 if name == "endless loop" else 60
    passed, total, remark = grade.run_tests(tmp_path, "exercise_1", ["test_small.py"], limit)
    assert passed == expected and (total == 2 or name == "endless loop")
    assert text in remark and len(remark) <= 120


def test_invalid_arguments_get_one_line(student, tmp_path, tmp_path_factory):
    empty = tmp_path_factory.mktemp("hidden")
    limit, hidden = [student, "--limit", "0"], [student, "--hidden", empty]
    for arguments in ([empty], [tmp_path / "nothing"], hidden, limit):
        refused = command("grade", *arguments)
        assert refused.returncode == 2 and not refused.stdout
        assert re.fullmatch("grade.py: .*\n", refused.stderr)
    shutil.copy(handout.ROOT / "tests" / "test_grpo.py", empty)
    refused = command("grade", *hidden)
    assert refused.returncode == 2
    assert re.fullmatch("grade.py: --hidden: test_grpo.py .*\n", refused.stderr)


def test_a_missing_or_unreadable_script_costs_only_its_exercises(student, tmp_path):
    shutil.copy(student / "grpo.py", tmp_path)
    (row,) = grade.grade(tmp_path, [4])
    assert row["points"] == 0 and "reward.py" in row["remark"]
    (tmp_path / "reward.py").write_bytes(b"\xff\xfe")
    (row,) = grade.grade(tmp_path, [4])
    assert row["points"] == 0 and "decode" in row["remark"]

"""The assignment: what students get is red on every exercise and on nothing else, and the grader gives what was earned."""

import doctest
import json
import re
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import grade
import handout
import pytest

EXERCISES = range(1, 11)
MARKS = """
def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("mark", mark.name) for mark in item.iter_markers() if mark.name.startswith("exercise_")]
"""


def command(name, *arguments):
    """Run handout.py or grade.py."""
    return subprocess.run([sys.executable, handout.ROOT / "tests" / f"{name}.py", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "student"
    done = command("handout", out)
    assert done.returncode == 0 and not done.stderr and str(out) in done.stdout
    return out


@pytest.fixture
def solve(student, tmp_path):
    """solve({exercise: lines}): a folder with the hand-out's scripts in which these exercises are done."""

    def write(bodies):
        for script in handout.SCRIPTS:
            lines = (student / script).read_text().split("\n")
            for one in reversed(handout.solutions(lines)):
                if one.exercise in bodies:
                    lines[one.first : one.last] = textwrap.indent(bodies[one.exercise], one.indent).split("\n")
            (tmp_path / script).write_text("\n".join(lines))
        return tmp_path

    return write


@pytest.mark.parametrize("module", [handout, grade])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_the_handout_is_the_repository_without_the_solutions(student):
    files = {file.relative_to(student).as_posix() for file in student.rglob("*") if file.is_file()}
    needed = "data.py reward.py grpo.py samr1_mini.py README.md LICENSE requirements.txt .ci/run tests/conftest.py tests/test_grpo.py"
    assert {*needed.split(), "tiny/sam.safetensors", "tiny/vlm/config.json", "assets/figures.py"} <= files
    assert not files & {"tests/grade.py", "tests/handout.py", "tests/test_assignment.py", "tests/test_tutorial.py"}
    assert not any(re.search(r"(^|/)(\.git|\.venv|runs|__pycache__)/", file) for file in files)
    for file in files - set(handout.SCRIPTS):
        assert (student / file).read_bytes() == (handout.ROOT / file).read_bytes()
    numbers = []
    for script in handout.SCRIPTS:
        reference, text = ((folder / script).read_text() for folder in (handout.ROOT, student))
        solutions = handout.solutions(reference.split("\n"))
        assert len(solutions) == len(re.findall(r"^ *# (?:end of )?exercise \d", reference, re.M)) / 2  # every marker has its partner
        numbers += [one.exercise for one in solutions]
        assert grade.outside(text) == grade.outside(reference)
        for one in handout.solutions(text.split("\n")):
            body = f'{one.indent}raise NotImplementedError("exercise {one.exercise}: {one.title}")'
            assert text.split("\n")[one.first : one.last] == [body]
    assert sorted(set(numbers)) == list(EXERCISES) == sorted(grade.POINTS) == sorted(grade.exercises())
    assert numbers == sorted(numbers) and sum(grade.POINTS.values()) == 100


def test_the_handout_is_red_on_every_exercise_and_on_nothing_else(student, tmp_path):
    (tmp_path / "marks.py").write_text(MARKS)
    report = tmp_path / "report.xml"
    options = "-q --tb=line -p no:cacheprovider -p marks -W error::pytest.PytestUnknownMarkWarning --junitxml".split()
    environment = {**grade.environment(), "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "pytest", *options, report, *grade.TESTS], cwd=student, env=environment, capture_output=True)
    red, passed = set(), 0
    for case in ET.parse(report).iter("testcase"):
        marks = {mark.get("value") for mark in case.iter("property")}
        trouble = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if trouble is None:
            assert not marks, case.get("name")
            passed += 1
        elif trouble.tag == "skipped":
            assert re.fullmatch(r"needs exercise \d+", trouble.get("message")), trouble.get("message")
        else:
            missing = re.search(r"NotImplementedError: exercise (\d+): ", trouble.get("message"))
            assert missing and f"exercise_{missing[1]}" in marks, (case.get("name"), trouble.get("message"))
            red.add(int(missing[1]))
    assert red == set(EXERCISES) and passed > 40


def test_a_handout_is_not_written_over_anything(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "below"):
        refused = command("handout", out)
        assert refused.returncode == 2 and re.fullmatch(r"handout.py: .*thesis.*\n|handout.py: .*no empty folder\n", refused.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_reference_earns_full_marks(tmp_path):
    # What is graded is the reference itself, whichever exercise is taken from it; so one run serves for all ten.
    for number, (script, _) in grade.exercises().items():
        text = (handout.ROOT / script).read_text()
        assert grade.put_in(text, text, number) == text
    files = grade.make_tree(tmp_path, script, text, [])
    passed, total, remark = grade.run_tests(tmp_path, " or ".join(f"exercise_{number}" for number in EXERCISES), files, 300)
    assert passed == total > 100 and not remark


def test_each_exercise_is_graded_on_its_own(solve, tmp_path_factory):
    """Of the exercises done, 5 is right but for a hidden test, 6 has a sign wrong, 7 no syntax, and 9 lost a marker."""
    folder = solve({5: "return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps) * (rewards.std(-1, keepdim=True) > 1e-6)",
                    6: "log_q = logprobs - reference\nreturn log_q.expm1() - log_q", 7: "ratio = (\nadvantage = 1", 9: "return None"})  # fmt: skip
    script = folder / "grpo.py"
    script.write_text(script.read_text().replace("# end of exercise 9", "# done") + "\nraise SystemExit  # outside the markers\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "conftest.py").write_text("import os; os._exit(0)")  # of the student's tests nothing is used
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "test_hidden.py").write_text(
        "import pytest, torch, grpo\n\n\n@pytest.mark.exercise_5\n@pytest.mark.parametrize('n', [2, 3])\n"
        "def test_hidden(n, samples):\n    assert len(samples) == 6 and grpo.group_advantages(torch.eye(n)).shape == (n, 9 - 3 * n + n)\n"
    )
    done = command("grade", folder, "--hidden", hidden, "--limit", "300", "--exercises", "9", "7", "6", "5")
    assert done.returncode == 0, done.stderr
    table, result = done.stdout.splitlines(), json.loads(done.stdout.splitlines()[-1])
    five, six, seven, nine = result["exercises"]
    assert [row["exercise"] for row in result["exercises"]] == [5, 6, 7, 9] and len(table) == 7
    assert five["tests"] == five["passed"] + 1 and five["points"] == 5 * five["passed"] // five["tests"]
    assert "test_hidden[2]" in five["remark"] and table[1].endswith(five["remark"])
    assert six["passed"] < six["tests"] and six["points"] < six["of"] and "test_" in six["remark"]
    assert seven["points"] == nine["points"] == 0
    assert seven["remark"].startswith("syntax error") and "ratio = (" in seven["remark"], "the student's line, not ours"
    assert "markers" in nine["remark"]
    assert result["points"] == five["points"] + six["points"] and result["of"] == 35


# What a solution may do, in a tree as small as can be. (its lines, tests passed of two, what the remark says)
HOSTILE = {
    "right": ("return 1", 2, ""),
    "wrong for one": ("return 1 if x else 0", 1, "test_two: assert"),
    "not done": ("raise NotImplementedError", 0, "NotImplementedError"),
    "leaves": ("import sys; sys.exit(0)", 0, "SystemExit"),
    "leaves at once": ("import os; os._exit(0)", 0, "without a report, exit code 0"),
    "ends the session": ("import pytest; pytest.exit('enough', 0)", 0, "broke off"),
    "leaves after the first": ("import os; return 1 if x else os._exit(0)", 0, "without a report"),
    "skips": ("import pytest; pytest.skip('hard')", 0, "hard"),
    "expects to fail": ("import pytest; pytest.xfail('hard')", 0, ""),
    "recurses": ("return f(x)", 0, "RecursionError"),
    "prints and prints": ("for _ in range(200_000): print('x' * 1000)\nreturn 1", 2, ""),
    "ends the session at last": ("import pytest; return 1 if x else pytest.exit('enough', 0)", 0, "broke off"),
    "interrupts": ("raise KeyboardInterrupt", 0, "broke off"),
    "does not come back": ("while True: pass", 0, "stopped after 4 seconds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_solution_does_the_grader_lives(name, tmp_path, monkeypatch):
    body, wanted, said = HOSTILE[name]
    lines = "\n    ".join(body.split("\n"))
    (tmp_path / "test_small.py").write_text(
        f"import pytest\n\n\ndef f(x):\n    {lines}\n\n\npytestmark = pytest.mark.exercise_1\n\n\n"
        "def test_one():\n    assert f(1) == 1\n\n\ndef test_two():\n    assert f(0) == 1\n"
    )
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # nothing of this is inherited
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    passed, total, remark = grade.run_tests(tmp_path, "exercise_1", ["test_small.py"], 4 if "come back" in name else 60)
    assert passed == wanted and (total == 2 or "come back" in name)
    assert said in remark and len(remark) <= 120


def test_a_mistaken_call_is_one_line(solve, student, tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("hidden")
    for arguments in ([other], [tmp_path / "nothing"], [student, "--hidden", other], [student, "--limit", "0"]):
        refused = command("grade", *arguments)
        assert refused.returncode == 2 and re.fullmatch("grade.py: .*\n", refused.stderr) and not refused.stdout
    shutil.copy(handout.ROOT / "tests" / "test_grpo.py", other)
    refused = command("grade", student, "--hidden", other)
    assert refused.returncode == 2 and re.fullmatch("grade.py: test_grpo.py .*\n", refused.stderr)


def test_a_folder_without_one_script_loses_its_exercises_only(student, tmp_path):
    shutil.copy(student / "grpo.py", tmp_path)
    (row,) = grade.grade(tmp_path, [4])
    assert row["points"] == 0 and "reward.py" in row["remark"]
    (tmp_path / "reward.py").write_bytes(b"\xff\xfe")
    (row,) = grade.grade(tmp_path, [4])
    assert row["points"] == 0 and "decode" in row["remark"]

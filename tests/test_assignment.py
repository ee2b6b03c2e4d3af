"""The assignment: a hand-out fails the tests of every exercise and no others, and the grader gives
the points that a student has earned."""

import ast
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from makers import contents, refused
from other_solutions import BODIES
from test_unseen import some_completions
from wrong_solutions import SOLUTIONS

import grpo
import reward
from assignment import grade, handout, variants
from assignment.handout import BY_HAND, EXERCISES, NECESSARY, ROOT, SCRIPTS
from assignment.two_answers import two_answers
from data import Shapes
from plumbing.settings import Settings

MARKED = " or ".join(f"exercise_{number}" for number in EXERCISES)


def command(name, *arguments):
    """Run assignment/handout.py or assignment/grade.py as a user does."""
    line = [sys.executable, "-m", f"assignment.{name}", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A hand-out."""
    out = tmp_path_factory.mktemp("class") / "student"
    result = command("handout", out)
    assert result.returncode == 0 and not result.stderr and str(out) in result.stdout
    return out


def without(*numbers):
    """The texts of the scripts in a hand-out in which these exercises are not solved."""
    return {script: handout.remove_solutions(script, numbers) for script in SCRIPTS}


# Runs the module and the arguments in each line of its input. Each run is a copy of this process:
# importing the libraries takes longer than most runs.
RUNS = """
import gc, json, os, runpy, sys
import samr1_mini, hypothesis, peft, pytest
for script in ("samr1_mini", "grpo", "reward"):
    del sys.modules[script]
gc.freeze()
for line in sys.stdin:
    if not os.fork():
        sys.argv = json.loads(line)
        os.dup2(os.open("../printed", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = 0
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as done:
            code = done.code
        os._exit(code)  # at once: to free all memory takes longer
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def tree(student, tmp_path_factory):
    """A hand-out with changing scripts and the tests that students do not have.

    folder; run(texts of scripts, module, arguments): the exit code and what is printed;
    outcomes(texts of scripts, marks): the tests, as `assignment.outcomes` keeps them.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot copy a process")
    folder = tmp_path_factory.mktemp("class") / "tree"
    shutil.copytree(student, folder)
    shutil.copy(ROOT / grade.UNSEEN, folder / grade.UNSEEN)
    found = folder.with_name("outcomes.json")
    environment = os.environ | {"OUTCOMES": str(found), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # scripts can change twice in a second
    environment["PYTEST_ADDOPTS"] = "-W ignore::pytest.PytestAssertRewriteWarning"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    line = [sys.executable, "-c", RUNS]
    with subprocess.Popen(line, cwd=folder, env=environment, text=True, **pipes) as process:

        def run(texts, *arguments):
            for script, text in texts.items():
                (folder / script).write_text(text)
            print(json.dumps(arguments), file=process.stdin, flush=True)
            return int(process.stdout.readline()), folder.with_name("printed").read_text()

        def outcomes(texts, marks):
            found.unlink(missing_ok=True)
            options = "--tb=line -p no:cacheprovider -p assignment.outcomes -m".split()
            _, printed = run(texts, "pytest", *options, marks, *grade.TESTS, grade.UNSEEN)
            assert found.exists(), printed
            return json.loads(found.read_text())

        yield types.SimpleNamespace(folder=folder, run=run, outcomes=outcomes)
        process.stdin.close()


@pytest.mark.parametrize("module", [handout, grade])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


# --------------------------------------------------------------------------------------------------
# The hand-out
# --------------------------------------------------------------------------------------------------


def test_handout_is_the_repository_without_the_lecturers_files(student):
    files = contents(student)
    expected = "data.py LICENSE requirements.txt tests/conftest.py tests/test_grpo.py"
    expected += " tiny/sam.safetensors plumbing/answers.py tools/merge.py"
    assert {*SCRIPTS, *expected.split()} <= set(files)
    secret = {"tests/test_assignment.py", "tests/other_solutions.py", grade.UNSEEN}
    assert not set(files) & secret
    names = {file[11:-3] for file in files if file.startswith("assignment/")}
    assert names == {"__init__", "handout", "next", "outcomes", "step", "two_answers"}
    assert not [file for file in files if re.search(r"(^|/)(\.git|\.venv|runs|__pycache__)/", file)]
    assert files.pop("README.md") == (ROOT / handout.README).read_bytes()
    for file in set(files) - set(SCRIPTS):
        assert files[file] == (ROOT / file).read_bytes(), file


def test_handout_replaces_the_bodies_of_the_exercises_and_nothing_else(student):
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        text = handout.refuse_first(text) if script == "samr1_mini.py" else text
        written = (student / script).read_text()
        reference = ast.parse(text)
        tree = ast.parse(written)
        for number, exercise in EXERCISES.items():
            error = f"raise NotImplementedError({f'exercise {number}: {exercise.title}'!r})"
            for name in exercise.functions if exercise.script == script else ():
                function = handout.find_functions(tree.body)[name]
                if exercise.part:
                    assert error in ast.unparse(function)
                    assert len(re.findall(r"\n +# [1-5]\. ", written)) == 5  # between them
                else:
                    assert ast.unparse(function.body[1:]) == error
                function.body = handout.find_functions(reference.body)[name].body
        assert ast.dump(reference) == ast.dump(tree)
        lines = text.split("\n")
        for line in written.split("\n"):  # comments too, and in order
            if "raise NotImplementedError" not in line:
                lines = lines[lines.index(line) + 1 :]


@pytest.mark.slow
def test_a_command_that_needs_an_unsolved_exercise_says_so_and_writes_nothing(tree, student):
    texts = {script: (student / script).read_text() for script in SCRIPTS}
    before = sorted(tree.folder.rglob("*"))
    code, printed = tree.run(texts, "samr1_mini", "train", "--steps", "1")
    named = f"samr1_mini.py: train needs exercise 1, {EXERCISES[1].title}, .*\n"
    assert code == 2 and re.fullmatch(named, printed), printed
    assert sorted(tree.folder.rglob("*")) == before


@pytest.mark.parametrize("command, needed", handout.NEEDED.items())
def test_the_first_exercise_that_a_command_needs_is_named(command, needed, tmp_path, monkeypatch):
    (tmp_path / "assignment").mkdir()
    stages = {number: without(*range(number, max(EXERCISES) + 1)) for number in needed}
    stages["none"] = without()
    monkeypatch.setattr(handout, "ROOT", tmp_path)
    for number, texts in stages.items():
        for script, text in texts.items():
            (tmp_path / script).write_text(text)
        handout.refuse_unsolved([command, "--help"])
        handout.refuse_unsolved([])
        if number != "none":
            message = refused(handout.refuse_unsolved, [command])
            assert message.startswith(f"{command} needs exercise {number}, ")
    handout.refuse_unsolved([command])


@pytest.mark.slow
def test_next_says_which_exercise_comes_next_and_what_fails(tree):
    texts = without(4)
    texts["reward.py"] = texts["reward.py"].replace("masks | truth", "masks & truth")
    _, printed = tree.run(texts, "assignment.next")
    said = "2, from policy pixels to image pixels: sam_prompt in reward.py: done\n\n"
    said += "Exercise 3, pixels and IoU: intersection_and_union, Overlap.iou in reward.py comes"
    assert printed.startswith("Testing the exercises up to 3 ...\n") and said in printed
    failed = r"  \d of \d tests fail:\n(.*\n)*    ignored pixels count .* as wrong\n      assert"
    assert re.search(failed, printed), printed
    assert printed.endswith("\n  Test it: python -m pytest -m exercise_3\n")
    _, printed = tree.run(without(*EXERCISES), "assignment.next")
    assert printed.startswith("\nExercise 1, ") and "fail" not in printed
    code, printed = tree.run({"grpo.py": "x = (\n"}, "assignment.next")
    assert (code, printed) == (2, "next.py: grpo.py, line 1: '(' was never closed: x = (\n")
    (tree.folder / "grpo.py").write_bytes(b"\xff")
    code, printed = tree.run({}, "assignment.next")
    assert code == 2 and printed.startswith("next.py: grpo.py cannot be read: UnicodeDecodeError")


def test_the_students_readme_names_no_command_that_students_lack(student):
    text = (student / "README.md").read_text()
    modules = re.findall(r"python -m ([a-z]\w*(?:\.\w+)*)", text)
    assert "assignment.next" in modules
    for module in set(modules) - {"pip", "venv", "pytest"}:
        assert (student / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_handout_does_not_overwrite_anything(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert refused(handout.main, [str(out)]).startswith(f"{out} exists ")
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_the_tutorials_table_is_that_of_the_exercises():
    chapter = (ROOT / "TUTORIAL.md").read_text().split("\n## 10.")[1]
    rows = re.findall(r"^\| \d+ .*\|$", chapter, re.M)
    expected = []
    for number, exercise in EXERCISES.items():
        module = exercise.script.removesuffix(".py").replace("/", ".")
        functions = ", ".join(f"`{module}.{name}`" for name in exercise.functions)
        expected.append(f"| {number} | {exercise.title} | {functions} | {exercise.points} |")
    expected += [f"| {number} | {title} | | {of} |" for number, (title, of) in BY_HAND.items()]
    assert rows == expected
    assert sum(int(row.split("|")[-2]) for row in rows) == 100


# --------------------------------------------------------------------------------------------------
# The marked tests
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tests_without_a_mark_pass_in_a_handout_or_are_skipped(tree):
    cases = tree.outcomes(without(*EXERCISES), f"not ({MARKED})")["no exercise"]
    for name, message in cases.items():
        assert not message or re.fullmatch(r"Skipped: needs exercise \d+", message), (name, message)
    assert list(cases.values()).count("") > 40


@pytest.mark.slow
def test_exercises_can_be_solved_in_order(tree):
    """While the exercises up to N are solved, all tests of N pass, and none is skipped. All tests
    of N + 1 fail in its own functions. Others would pass for a hand-out: the grader fills in the
    other exercises."""
    for number in (0, *EXERCISES):
        mark = f"exercise_{number}"
        following = f"exercise_{number + 1}"
        texts = without(*range(number + 1, max(EXERCISES) + 1))
        cases = tree.outcomes(texts, f"{mark} or {following}")
        assert set(cases) == {mark, following} - {"exercise_0", f"exercise_{max(EXERCISES) + 1}"}
        assert {name for name, message in cases.get(mark, {}).items() if message} == set()
        for name, message in cases.get(following, {}).items():
            assert f"NotImplementedError: exercise {number + 1}: " in message, (name, message)


@pytest.mark.slow
def test_solutions_earn_what_their_row_says(tree):
    for name, (number, old, new, points) in SOLUTIONS.items():
        texts = without()
        script = EXERCISES[number].script
        assert texts[script].count(old) == 1, name
        texts[script] = texts[script].replace(old, new)
        cases = tree.outcomes(texts, f"exercise_{number}")
        earned, remark = grade.count_points(number, cases[f"exercise_{number}"])
        assert earned == points, (name, remark)
        assert points or remark.startswith("necessary: "), (name, remark)


def solve(text, name, body):
    """The text of a student's script with `body` in place of the NotImplementedError of `name`."""
    head, start, rest = text.partition(f"def {name.rpartition('.')[2]}(")

    def lines(match):
        return textwrap.indent(body.strip(), match[1])

    return head + start + re.sub("( *)raise NotImplementedError.*", lines, rest, count=1)


@pytest.mark.slow
def test_right_solutions_that_are_written_differently_earn_everything(tree):
    """They use each other: nothing of the reference is left in this hand-out."""
    texts = without(*EXERCISES)
    for exercise in EXERCISES.values():
        for name in exercise.functions:
            texts[exercise.script] = solve(texts[exercise.script], name, BODIES[name])
    cases = tree.outcomes(texts, MARKED)
    for number, exercise in EXERCISES.items():
        found = cases[f"exercise_{number}"]
        assert grade.count_points(number, found) == (exercise.points, "")
        assert set(NECESSARY[number]) <= {*found, *(name.partition("[")[0] for name in found)}


# --------------------------------------------------------------------------------------------------
# The grader
# --------------------------------------------------------------------------------------------------


def test_grader_takes_bodies_and_new_functions_only():
    reference = "from m import load\nLIMIT = 3\ndef f(x):\n    'Doc.'\n    return 0\n"
    reference += "def g(x):\n    return load(max(x, LIMIT))\n"
    student = "def f(y, x=1):\n    'Mine.'\n    return helper(x)\n"
    student += "def helper(x):\n    return 2 * x\n"
    others = ("g", "load", "LIMIT", "max")
    student += "\n".join(f"def {name}(x):\n    return 'mine'" for name in others)
    expected = reference.replace("return 0", "'Mine.'\n    return helper(x)")
    expected = ast.unparse(ast.parse(expected)) + "\n\ndef helper(x):\n    return 2 * x"
    assert grade.insert_solution(reference, student, ["f"]) == expected


# Exercise 7 is right but fails a hidden test.
SEVEN = """
std = rewards.std(-1, keepdim=True)
return minus_mean(rewards) / (std + eps) * (std > 1e-6)
"""
OUTSIDE = """\n
def minus_mean(x):
    return x - x.mean(-1, keepdim=True)


raise SystemExit
"""
HIDDEN = """
import pytest, torch, grpo

@pytest.mark.exercise_7
@pytest.mark.parametrize("n", [2, 3])
def test_hidden(n, samples):
    assert len(samples) == 6
    assert grpo.group_advantages(torch.eye(n)).shape == (n, 3)
"""


@pytest.mark.slow
def test_each_exercise_is_graded_on_its_own(student, tmp_path):
    folder, hidden = tmp_path / "student", tmp_path / "hidden"
    for created in (folder / "tests", folder / "assignment", hidden):
        created.mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text("import os; os._exit(0)")  # must not be used
    (folder / "assignment" / "two_answers.py").write_bytes(b"\xff")
    (hidden / "test_hidden.py").write_text(HIDDEN)
    text = (student / "grpo.py").read_text().replace("def pack(", "def packed(")
    text = solve(solve(text, "group_advantages", SEVEN), "grpo_loss", "ratio = (\nadvantage = 1")
    (folder / "grpo.py").write_text(text + OUTSIDE)
    numbers = ["11", "9", "7", "6", "4"]
    result = command("grade", folder, "--hidden", hidden, "--limit", 300, "--exercises", *numbers)
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()
    summary = json.loads(table[-1])
    four, six, seven, nine, eleven = rows = summary["exercises"]
    assert [row["exercise"] for row in rows] == [4, 6, 7, 9, 11] and len(table) == 8
    assert "reward.py" in four["remark"] and "utf-8" in six["remark"] and eleven["remark"]
    assert seven["tests"] == seven["passed"] + 1 and 0 < seven["points"] < 5
    assert "test_hidden[2]" in seven["remark"] and table[3].endswith(seven["remark"])
    assert nine["remark"].startswith("syntax error") and "ratio = (" in nine["remark"]
    assert summary["points"] == sum(row["points"] for row in rows) == seven["points"]
    assert summary["of"] == sum(row["of"] for row in rows) == 37


# What a solution might do. Name: (its lines, passed tests, tests, text in the messages)
HOSTILE = {
    "one test fails": ("return 1 if x else 0", 1, 2, "assert"),
    "skip": ("import pytest; return 1 if x else pytest.skip('hard')", 1, 2, "hard"),
    "end the process": ("import os; return 1 if x else os._exit(0)", 0, 0, "ended before"),
    "end the session": ("import pytest; x or pytest.exit('', 0); return 1", 0, 0, "ended before"),
    "print": ("for _ in range(200_000): print('x' * 1000)\nreturn 1", 2, 2, ""),
    "endless loop": ("while True: pass", 0, 0, "stopped after 4 seconds"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_grader_survives_any_solution(name, tmp_path, monkeypatch):
    body, *expected, text = HOSTILE[name]
    (tmp_path / "test_small.py").write_text(
        f"import pytest\npytestmark = pytest.mark.exercise_1\ndef f(x):\n"
        f"{textwrap.indent(body, '    ')}\n"
        "def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(0) == 1\n"
    )
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # must not be inherited
    limit = 4 if name == "endless loop" else 60
    cases, remark = grade.run_tests(tmp_path, 1, ["test_small.py"], limit)
    assert [list(cases.values()).count(""), len(cases)] == expected
    assert text in remark + cases.get("test_two", "")


def test_invalid_arguments_name_the_mend(student, tmp_path):
    assert f"{tmp_path} has no assignment/two_answers.py and" in refused(
        grade.main, [str(tmp_path)]
    )
    hidden = [str(student), "--hidden", str(tmp_path)]
    assert "has no test_" in refused(grade.main, hidden)
    shutil.copy(ROOT / "tests" / "test_grpo.py", tmp_path)
    assert "test_grpo.py is a visible test file: rename yours" in refused(grade.main, hidden)
    assert "--limit nan" in refused(grade.main, [*hidden, "--limit", "nan"])


# --------------------------------------------------------------------------------------------------
# Reference solutions of the last two exercises
# --------------------------------------------------------------------------------------------------


def changed(name):
    """The changed module of a variant. The module itself stays as it is."""
    module = types.ModuleType(name)
    exec(variants.changed_text(name), module.__dict__)
    return module


def test_our_own_reward_pays_as_the_worse_of_mask_and_box(scorer):
    """The second answer has a good box only, the third a good mask only, the last two neither."""
    right, wrong = two_answers()
    no_box = right.replace("bbox", "no box")
    texts = [right, wrong, no_box, right.replace("[16, 23, 43, 49]", "[16, 23, 38, 49]"), "what?"]

    def earned(module, accuracy):
        scenes = [Shapes("heldout")[0]]
        return module.score_completions(scorer, scenes, [texts], 64, accuracy).accuracy

    ours = earned(changed("own_reward"), "tiered")
    mask = earned(reward, "tiered")
    box = earned(reward, "box")
    assert torch.equal(ours, torch.minimum(mask, box))
    assert (box[0, 1], mask[0, 2]) == (4, 4) and ours[0, :3].tolist() == [4, mask[0, 1], 0]


def published_terms(name, new, old, advantage):
    """The terms of a completion's objective, from the papers' formulas. new, old: log-probs."""
    ratio = torch.exp(new) / torch.exp(old)
    if name == "cispo":
        return ratio.detach().clip(max=1.3) * advantage * new
    low, high = (0.8, 1.3)
    if name == "gspo":
        ratio = ratio.prod() ** (1 / len(ratio))
        low, high = (0.98, 1.03)
    return torch.min(ratio * advantage, ratio.clip(low, high) * advantage)


@pytest.mark.parametrize("name", ["dr_grpo", "gspo", "cispo"])
def test_loss_and_gradient_of_a_variant_equal_the_published_ones(name):
    p = some_completions(B=3)
    B, G, _ = p.mask.shape
    normalise = "sequence" if name == "gspo" else "token"
    loss, statistics, _ = changed(name).grpo_loss(
        p.new, p.old, None, p.advantages, p.mask, beta=0.0, normalise=normalise
    )
    expected = 0
    for b in range(B):
        longest = G * Settings().max_new_tokens
        divisor = {"cispo": p.mask[b].sum(), "gspo": G, "dr_grpo": longest}[name]
        for g in range(G):
            inside = p.mask[b, g]
            terms = published_terms(
                name, p.new[b, g, inside], p.old[b, g, inside], p.advantages[b, g]
            )
            expected = expected - terms.sum() / divisor / B
    assert loss.item() == pytest.approx(expected.item())
    assert torch.allclose(*(torch.autograd.grad(one, p.new)[0] for one in (loss, expected)))
    assert statistics["clip_low"] > 0 and statistics["clip_high"] > 0  # both sides occur


def test_the_advantages_of_dr_grpo_are_not_divided():
    rewards = torch.tensor([[6.0, 2.0, 1.0, 3.0]])
    assert changed("dr_grpo").group_advantages(rewards).tolist() == [[3, -1, -2, 0]]
    assert grpo.group_advantages(rewards)[0, 0] != 3


def test_a_variant_without_a_name_is_refused():
    assert "one of own_reward, dr_grpo" in refused(variants.main, ["train"])

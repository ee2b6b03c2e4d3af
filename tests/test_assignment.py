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
import types
import xml.etree.ElementTree as ET

import pytest
import torch
from other_solutions import BODIES
from wrong_solutions import SOLUTIONS

import grpo
import reward
from assignment import grade, handout, variants
from assignment.handout import BY_HAND, EXERCISES, ROOT, SCRIPTS
from assignment.two_answers import two_answers
from data import Shapes
from plumbing.errors import UserError
from plumbing.settings import Settings


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


@pytest.mark.parametrize("module", [handout, grade])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


# --------------------------------------------------------------------------------------------------
# The hand-out
# --------------------------------------------------------------------------------------------------


def test_handout_is_the_repository_without_the_lecturers_files(student):
    files = {file.relative_to(student).as_posix() for file in student.rglob("*") if file.is_file()}
    expected = "data.py README.md LICENSE requirements.txt tests/conftest.py tests/test_grpo.py"
    expected += " tiny/sam.safetensors plumbing/answers.py tools/merge.py"
    assert {*SCRIPTS, *expected.split()} <= files
    secret = {f"tests/{name}.py" for name in ("test_assignment", "other_solutions")}
    assert not files & {*secret, grade.UNSEEN, *handout.SHOWS_A_SOLUTION}
    names = {file for file in files if file.startswith("assignment/")}
    assert names == {
        f"assignment/{n}.py" for n in ("__init__", "handout", "next", "step", "two_answers")
    }
    assert not [file for file in files if re.search(r"(^|/)(\.git|\.venv|runs|__pycache__)/", file)]
    for file in files - set(SCRIPTS):
        reference = handout.README if file == "README.md" else file
        assert (student / file).read_bytes() == (ROOT / reference).read_bytes()


def test_handout_replaces_the_bodies_of_the_exercises_and_nothing_else(student):
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        text = handout.refuse_first(text) if script == "samr1_mini.py" else text
        reference = ast.parse(text)
        tree = ast.parse((student / script).read_text())
        assert ast.dump(reference) != ast.dump(tree)
        for number, exercise in EXERCISES.items():
            for name in exercise.functions if exercise.script == script else ():
                function = handout.find_functions(tree.body)[name]
                error = f"raise NotImplementedError({f'exercise {number}: {exercise.title}'!r})"
                if exercise.part:
                    assert error in ast.unparse(function)
                else:
                    assert ast.unparse(function.body[1:]) == error
                function.body = handout.find_functions(reference.body)[name].body
        assert ast.dump(reference) == ast.dump(tree)
        lines = text.split("\n")
        for line in (student / script).read_text().split("\n"):  # comments too, and in order
            if "raise NotImplementedError" not in line:
                lines = lines[lines.index(line) + 1 :]


def call(folder, *arguments):
    """Run a program in a student's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_command_that_needs_an_unsolved_exercise_says_so_and_writes_nothing(student):
    before = sorted(student.rglob("*"))
    done = call(student, "samr1_mini.py", "train", "--steps", "1")
    named = f"samr1_mini.py: train needs exercise 1, {EXERCISES[1].title}, .*\n"
    assert done.returncode == 2 and re.fullmatch(named, done.stderr), done.stderr
    assert sorted(student.rglob("*")) == before


@pytest.mark.parametrize("command, needed", handout.NEEDED.items())
def test_the_first_exercise_that_a_command_needs_is_named(command, needed, tmp_path, monkeypatch):
    (tmp_path / "assignment").mkdir()
    for number in needed:
        monkeypatch.setattr(handout, "ROOT", ROOT)
        for script in SCRIPTS:
            text = handout.remove_solutions(script, range(number, max(EXERCISES) + 1))
            (tmp_path / script).write_text(text)
        monkeypatch.setattr(handout, "ROOT", tmp_path)
        with pytest.raises(UserError, match=f"^{command} needs exercise {number}, "):
            handout.refuse_unsolved([command])
        handout.refuse_unsolved([command, "--help"])
        handout.refuse_unsolved([])
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path / script)
    handout.refuse_unsolved([command])


def test_the_students_readme_names_no_command_that_students_lack(student):
    text = (student / "README.md").read_text()
    modules = re.findall(r"python -m ([a-z]\w*(?:\.\w+)*)", text)
    assert "assignment.next" in modules
    for module in set(modules) - {"pip", "venv", "pytest"}:
        assert (student / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_handout_does_not_overwrite_anything(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        refused = command("handout", out)
        assert refused.returncode == 2
        assert re.fullmatch(f"handout.py: {re.escape(str(out))} exists .*\n", refused.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


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
    assert [*EXERCISES, *BY_HAND] == [*range(1, 16)]
    points = [exercise.points for exercise in EXERCISES.values()]
    assert sum(points) + sum(of for _, of in BY_HAND.values()) == 100


# --------------------------------------------------------------------------------------------------
# The marked tests
# --------------------------------------------------------------------------------------------------

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
MARKED = " or ".join(f"exercise_{number}" for number in EXERCISES)


def run_all(folder, runs, files):
    """Write a junit report NAME.xml to `folder` for each run: name -> (tree, marks)."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot copy a process")
    options = ["-q", "--tb=line", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", *files]
    lines = [
        (str(tree), [*options, "-m", marks, f"--junitxml={folder}/{name}.xml"])
        for name, (tree, marks) in runs.items()
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    subprocess.run(line, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def messages(student, tmp_path_factory):
    """What the hand-out's tests say: a list of (name, message) each, "" for a test that passes.

    "marked" and "others": while nothing is solved. "last": those of the last exercise, which needs
    all others, while they are solved. N: those of exercise N, while the exercises 1 to N are.
    """
    folder = tmp_path_factory.mktemp("reports")
    last = max(EXERCISES)
    runs = {
        "marked": (student, f"({MARKED}) and not exercise_{last}"),
        "others": (student, f"not ({MARKED})"),
        "last": (folder / str(last - 1), f"exercise_{last}"),
    }
    for number in EXERCISES:
        tree = folder / str(number)
        shutil.copytree(student, tree, copy_function=os.link)
        for script in SCRIPTS:
            (tree / script).unlink()  # it is the same file as the hand-out's
            text = handout.remove_solutions(script, range(number + 1, max(EXERCISES) + 1))
            (tree / script).write_text(text)
        runs[number] = (tree, f"exercise_{number}")
    run_all(folder, runs, grade.TESTS)
    found = {}
    for name in runs:
        cases = ET.parse(folder / f"{name}.xml").iter("testcase")
        found[name] = [(c.get("name"), "".join(part.get("message") for part in c)) for c in cases]
    return found


@pytest.mark.slow
def test_handout_fails_the_tests_of_every_exercise_and_no_others(messages):
    exercises = set()
    for name, message in messages["marked"] + messages["last"]:
        # A marked test that reaches the code of another exercise first, or of none, would pass for
        # an untouched hand-out, because the grader fills in the other exercises. (conftest.py
        # skips a test that reaches another exercise than its own.)
        missing = re.search(r"NotImplementedError: exercise (\d+): ", message)
        assert missing, (name, message)
        exercises.add(int(missing[1]))
    assert exercises == set(EXERCISES)
    for name, message in messages["others"]:
        assert not message or re.fullmatch(r"needs exercise \d+", message), (name, message)
    assert [message for _, message in messages["others"]].count("") > 40


@pytest.mark.slow
def test_exercises_can_be_solved_in_order(messages):
    """All tests of an exercise pass, and none is skipped, while later ones are not solved."""
    for number in EXERCISES:
        assert messages[number], number
        assert not [(name, message) for name, message in messages[number] if message]


@pytest.mark.slow
def test_solutions_earn_what_their_row_says(student, tmp_path):
    runs = {}
    for name, (number, old, new, _) in SOLUTIONS.items():
        tree = tmp_path / name
        shutil.copytree(student, tree, copy_function=os.link)
        shutil.copy(ROOT / grade.UNSEEN, tree / grade.UNSEEN)
        for script in SCRIPTS:
            (tree / script).unlink()
            text = (ROOT / script).read_text()
            if script == EXERCISES[number].script:
                assert text.count(old) == 1, name
                text = text.replace(old, new)
            (tree / script).write_text(text)
        runs[name] = (tree, f"exercise_{number}")
    run_all(tmp_path, runs, [*grade.TESTS, grade.UNSEEN])
    for name, (number, _, _, points) in SOLUTIONS.items():
        earned, remark = grade.count_points(number, grade.read_report(tmp_path / f"{name}.xml"))
        assert earned == points, (name, remark)
        assert points or remark.startswith("necessary: "), (name, remark)


def solve(text, name, body):
    """The text of a student's script with `body` in place of the NotImplementedError of `name`."""
    lines = text.split("\n")
    function = handout.find_functions(ast.parse(text).body)[name]
    inside = range(function.lineno, function.end_lineno)
    (line,) = (k for k in inside if "raise NotImplementedError" in lines[k])
    indent = lines[line].partition("raise")[0]
    lines[line] = "\n".join(f"{indent}{one}" for one in body.strip("\n").split("\n"))
    return "\n".join(lines)


@pytest.mark.slow
def test_right_solutions_that_are_written_differently_earn_everything(student, tmp_path):
    """They use each other: nothing of the reference is left in this hand-out."""
    tree = tmp_path / "other"
    shutil.copytree(student, tree)
    shutil.copy(ROOT / grade.UNSEEN, tree / grade.UNSEEN)
    for exercise in EXERCISES.values():
        for name in exercise.functions:
            script = tree / exercise.script
            script.write_text(solve(script.read_text(), name, BODIES[name]))
    run_all(tmp_path, {"all": (tree, MARKED)}, [*grade.TESTS, grade.UNSEEN])
    cases = grade.read_report(tmp_path / "all.xml")
    assert {name for name, message in cases.items() if message} == set()
    necessary = {name for exercise in EXERCISES.values() for name in exercise.necessary}
    assert necessary <= {*cases, *(name.partition("[")[0] for name in cases)}


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


# Exercise 7 is right but fails a hidden test, 8 is right, and 9 is not valid Python.
STARTED = {
    "group_advantages": """centred = rewards - rewards.mean(-1, keepdim=True)
std = rewards.std(-1, keepdim=True)
return centred / (std + eps) * (std > 1e-6)""",
    "k3_kl": "return minus_one(reference - logprobs)",
    "grpo_loss": "ratio = (\nadvantage = 1",
}
OUTSIDE = """\n
def minus_one(x):
    return x.expm1() - x


raise SystemExit
"""
HIDDEN = """
import pytest, torch, grpo

@pytest.mark.exercise_7
@pytest.mark.parametrize("n", [2, 3])
def test_hidden(n, samples):
    assert len(samples) == 6
    assert grpo.group_advantages(torch.eye(n)).shape == (n, 9 - 3 * n + n)
"""


@pytest.mark.slow
def test_each_exercise_is_graded_on_its_own(student, tmp_path):
    folder, hidden = tmp_path / "student", tmp_path / "hidden"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text("import os; os._exit(0)")  # must not be used
    hidden.mkdir()
    (hidden / "test_hidden.py").write_text(HIDDEN)
    text = (student / "grpo.py").read_text().replace("def pack(", "def packed(")
    for name, body in STARTED.items():
        text = solve(text, name, body)
    (folder / "grpo.py").write_text(text + OUTSIDE)
    numbers = ["11", "9", "8", "7", "4"]
    result = command("grade", folder, "--hidden", hidden, "--limit", 300, "--exercises", *numbers)
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()
    summary = json.loads(table[-1])
    four, seven, eight, nine, eleven = rows = summary["exercises"]
    assert [row["exercise"] for row in rows] == [4, 7, 8, 9, 11] and len(table) == 8
    assert four["points"] == 0 and "reward.py" in four["remark"]
    assert seven["tests"] == seven["passed"] + 1 and 0 < seven["points"] < 5
    assert "test_hidden[2]" in seven["remark"] and table[2].endswith(seven["remark"])
    assert eight["passed"] == eight["tests"] > 1 and eight["points"] == eight["of"] == 5
    assert nine["points"] == eleven["points"] == 0
    assert nine["remark"].startswith("syntax error") and "ratio = (" in nine["remark"]
    assert eleven["remark"]
    assert summary["points"] == seven["points"] + 5 and summary["of"] == 36


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
    lines = "\n    ".join(body.split("\n"))
    (tmp_path / "test_small.py").write_text(
        f"import pytest\n\n\ndef f(x):\n    {lines}\n\n\npytestmark = pytest.mark.exercise_1\n\n\n"
        "def test_one():\n    assert f(1) == 1\n\n\ndef test_two():\n    assert f(0) == 1\n"
    )
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # must not be inherited
    limit = 4 if name == "endless loop" else 60
    cases, remark = grade.run_tests(tmp_path, 1, ["test_small.py"], limit)
    assert [list(cases.values()).count(""), len(cases)] == expected
    assert text in remark + cases.get("test_two", "")


def test_invalid_arguments_name_the_mend(student, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no assignment/two_answers.py and"):
        grade.main([str(tmp_path)])
    with pytest.raises(UserError, match="has no test_"):
        grade.main([str(student), "--hidden", str(tmp_path)])
    shutil.copy(ROOT / "tests" / "test_grpo.py", tmp_path)
    with pytest.raises(UserError, match=r"test_grpo.py is a visible test file: rename yours"):
        grade.main([str(student), "--hidden", str(tmp_path)])


# --------------------------------------------------------------------------------------------------
# Reference solutions of the last two exercises
# --------------------------------------------------------------------------------------------------


def changed(name):
    """The changed module of a variant. The module itself stays as it is."""
    module = types.ModuleType(variants.VARIANTS[name].script)
    exec(variants.changed_text(name), module.__dict__)
    return module


def test_our_own_reward_pays_as_the_worse_of_mask_and_box(scorer):
    """The second answer has a good box only, the third a good mask only, the last two neither."""
    right, wrong = two_answers()
    no_box = right.replace("bbox", "no box")
    texts = [[right, wrong, no_box, right.replace("[16, 23, 43, 49]", "[16, 23, 38, 49]"), "what?"]]
    scenes = [Shapes("heldout")[0]]
    ours, mask, box = (
        module.score_completions(scorer, scenes, texts, extent=64, accuracy=accuracy).accuracy
        for module, accuracy in (
            (changed("own_reward"), "tiered"),
            (reward, "tiered"),
            (reward, "box"),
        )
    )
    assert torch.equal(ours, torch.minimum(mask, box))
    assert (box[0, 1], mask[0, 2]) == (4, 4) and ours[0, :3].tolist() == [4, mask[0, 1], 0]


def published_variant(name, new, old, advantages, clip_low, clip_high):
    """The loss of one group, from the papers' formulas, token by token. Completions: lists of
    log-probs."""
    total = 0
    for logprobs, sampled, A in zip(new, old, advantages, strict=True):
        ratios = [torch.exp(n - o) for n, o in zip(logprobs, sampled, strict=True)]
        if name == "gspo":
            ratio = torch.stack(ratios).prod() ** (1 / len(ratios))
            total += torch.min(ratio * A, ratio.clip(1 - clip_low, 1 + clip_high) * A) / len(new)
        elif name == "dr_grpo":
            for ratio in ratios:
                clipped = ratio.clip(1 - clip_low, 1 + clip_high)
                total += torch.min(ratio * A, clipped * A) / len(new) / Settings().max_new_tokens
        else:
            tokens = sum(map(len, new))
            for ratio, logprob in zip(ratios, logprobs, strict=True):
                total += min(ratio.item(), 1 + clip_high) * A * logprob / tokens
    return -total


@pytest.mark.parametrize(
    "name, clip, normalise",
    [
        ("dr_grpo", (0.2, 0.3), "token"),
        ("gspo", (0.02, 0.03), "sequence"),
        ("cispo", (0.2, 0.3), "token"),
    ],
)
def test_loss_and_gradient_of_a_variant_equal_the_published_ones(name, clip, normalise):
    module = changed(name)
    B, G, T = 3, 4, 6
    generator = torch.Generator().manual_seed(1)
    new, old = -torch.rand(2, B, G, T, generator=generator, dtype=torch.float64)
    new.requires_grad_()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=generator)
    advantages = torch.randn(B, G, generator=generator, dtype=torch.float64)
    loss, statistics, _ = module.grpo_loss(
        new, old, None, advantages, mask, beta=0.0, normalise=normalise
    )
    losses = []
    for b in range(B):
        rows = [[list(x[b, g][mask[b, g]]) for g in range(G)] for x in (new, old)]
        losses.append(published_variant(name, *rows, advantages[b], *clip))
    expected = sum(losses) / B
    assert loss.item() == pytest.approx(expected.item())
    assert torch.allclose(*(torch.autograd.grad(one, new)[0] for one in (loss, expected)))
    assert statistics["clip_low"] > 0 and statistics["clip_high"] > 0  # both sides occur


def test_the_advantages_of_dr_grpo_are_not_divided():
    rewards = torch.tensor([[6.0, 2.0, 1.0, 3.0]])
    assert changed("dr_grpo").group_advantages(rewards).tolist() == [[3, -1, -2, 0]]
    assert grpo.group_advantages(rewards)[0, 0] != 3


def test_a_variant_without_a_name_is_refused():
    with pytest.raises(UserError, match="one of own_reward, dr_grpo"):
        variants.main(["train"])

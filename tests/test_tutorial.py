"""TUTORIAL.md: its examples, names, links, pictures and commands fit the code."""

import doctest
import importlib
import json
import re
import runpy
import shutil
import sys
from functools import reduce
from pathlib import Path

import pytest
from PIL import Image

import samr1_mini
from benchmarks import ablations, failures, mask_or_box, sweep
from benchmarks.sweep import run_folder
from data import Shapes
from plumbing import runs as runs_module

ROOT = Path(samr1_mini.__file__).parent
TEXT = (ROOT / "TUTORIAL.md").read_text()
QUICK = "--steps 2 --prompts_per_step 2 --group_size 4 --eval_samples 12 --save_every 100"
RUN = "runs/shapes-tiny-0"
# Commands that another file tests.
ELSEWHERE = {
    "python -m pytest -rs -m exercise_1 tests": "test_assignment.py",
}
HERE = {
    "python samr1_mini.py train",
    "python samr1_mini.py train --help",
    f"python -m tools.report {RUN}",
    "python -m tools.memory --preset qwen3b",
    "python -m benchmarks.failures",
    "python -m benchmarks.ablations",
    "python -m benchmarks.ablations --table",
    "python -m benchmarks.mask_or_box",
    "python -m benchmarks.mask_or_box --table",
    f"python -m benchmarks.thoughts {RUN}",
}
FIGURES = ("readme", "loop", "mask", "tiers", "seeds")  # of tools.figures; benchmarks draw others
PICTURES = (*FIGURES, "ablations", "failures", "mask_or_box", "thoughts")
NAMES = r"`((?:(?:plumbing|tools)\.\w+|data|reward|grpo|samr1_mini)\.[A-Za-z_][\w.]*)(?=[`(])"


def commands() -> set[str]:
    """The lines and the passages in backticks that begin with python or pytest."""
    line = r"^    ((?:\S+=\S+ )?(?:\S*python|pytest) .*?)(?:  +.*)?$"
    found = re.findall(line, TEXT, re.MULTILINE) + re.findall(r"`(python [^`]+?)`", TEXT)
    return {re.sub(r"\S*bin/python", "python", command) for command in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a short run where the tutorial's commands expect one."""
    folder = tmp_path_factory.mktemp("tutorial")
    samr1_mini.main([*f"train {QUICK} --out".split(), str(folder / RUN)])
    return folder


def run(monkeypatch, folder: Path, command: str) -> None:
    """Run `python FILE ...` or `python -m MODULE ...` in this process and in a folder."""
    name, *arguments = command.removeprefix("python ").removeprefix("-m ").split()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        monkeypatch.delitem(sys.modules, name, raising=False)  # else runpy warns
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def test_examples():
    failed, tried = doctest.testfile(str(ROOT / "TUTORIAL.md"), module_relative=False)
    assert tried > 20 and not failed


def test_every_name_exists():
    names = {name for name in re.findall(NAMES, TEXT) if not name.endswith(".py")}
    assert len(names) > 25
    for name in names:
        parts = name.split(".")
        split = 2 if parts[0] in ("plumbing", "tools") else 1
        module = importlib.import_module(".".join(parts[:split]))
        defined = reduce(getattr, parts[split:], module)
        # Named where it is defined, and not where it is imported.
        assert getattr(defined, "__module__", module.__name__) == module.__name__, name


def test_every_linked_name_and_test_is_in_its_file():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+)\.py\)", TEXT)
    assert len(links) > 25
    for name, file in links:
        assert name.startswith(file.replace("/", ".") + "."), name
    tests = re.findall(r"`(test_\w+)` in `(tests/\w+\.py)`", TEXT)
    assert tests
    for test, file in tests:
        assert f"def {test}(" in (ROOT / file).read_text()


def test_every_file_exists():
    folders = "assets|assignment|benchmarks|examples|plumbing|tests|tiny|tools"
    files = re.findall(rf"`((?:{folders})/[\w./]*|\w+\.py)`", TEXT)
    assert "tests/test_train.py" in files and "data.py" in files
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_setting_exists():
    elsewhere = {"seeds", "jobs", "table", "help", "protocol"}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z_-]*)", TEXT)}
    assert flags - elsewhere <= set(samr1_mini.Settings.__dataclass_fields__)


def test_every_link_and_picture_exists():
    drawn = re.findall(r"!\[[^]]*\]\(assets/(\w+)\.png\)", TEXT)
    assert sorted(drawn) == sorted(PICTURES)
    titles = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for picture in (ROOT / "assets").glob("*.png"):
        alpha = Image.open(picture).convert("RGBA").getextrema()[3]
        assert alpha == (255, 255)  # an opaque background is legible on a dark page too


def test_every_chapter_has_questions_and_answers():
    chapters = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    for chapter in chapters[:9]:
        questions = chapter.count("<details><summary>")
        assert 3 <= questions <= 5, chapter.splitlines()[0]
        assert questions == chapter.count("</details>")


def test_every_command_is_run_by_a_test():
    known = {*ELSEWHERE, *HERE, *(f"python -m tools.figures {name}" for name in FIGURES)}
    figure = r"(tools\.figures \w+)(?: RUN| runs/\S+)*$"
    found = {re.sub(figure, r"\1", command) for command in commands()}
    assert found == known
    for file in ELSEWHERE.values():
        assert (ROOT / "tests" / file).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn(name, folder, tmp_path, monkeypatch):
    runs = {"mask": 0, "tiers": 0, "seeds": 3}.get(name, 1) * f" {RUN}"
    out = tmp_path / "figure.png"
    run(monkeypatch, folder, f"python -m tools.figures {name}{runs} --out {out}")
    assert Image.open(out).width > 500


@pytest.mark.slow
def test_report_memory_and_help(folder, monkeypatch, capsys):
    run(monkeypatch, folder, f"python -m tools.report {RUN}")
    page = (folder / RUN / "report.html").read_text()
    assert Shapes("heldout")[0].query in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    run(monkeypatch, folder, "python -m tools.memory --preset qwen3b")
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "python samr1_mini.py train --help")
    printed = capsys.readouterr().out
    assert "expected peak" in printed and "--eps_high" in printed


@pytest.mark.slow
def test_a_sweep_continues_and_keeps_finished_runs(folder, tmp_path, monkeypatch, capsys):
    """All runs but one are finished: one is trained, and table and figure hold all of them."""
    out, figure = tmp_path / "sweep", tmp_path / "figure.png"
    runs = [run_folder(out, name, 0) for name in ablations.SETTINGS]
    for finished in runs[:-1]:
        shutil.copytree(folder / RUN, finished)
    logs = [finished / "metrics.jsonl" for finished in runs[:-1]]
    before = [log.stat().st_mtime_ns for log in logs]
    sweep = f"python -m benchmarks.ablations --seeds 0 --jobs 1 --out {out} --figure {figure}"
    run(monkeypatch, folder, f"{sweep} --steps 2 --eval_samples 2")
    assert before == [log.stat().st_mtime_ns for log in logs]
    assert len((runs[-1] / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((runs[-1] / "config.json").read_text())
    assert config["beta"] == 1e-9  # the setting of the run that is called "no KL"
    printed = capsys.readouterr().out
    assert all(name in printed for name in ablations.SETTINGS)
    assert Image.open(figure).width > 500
    run(monkeypatch, folder, f"{sweep} --table")
    tables = [text.split("Table 3")[1] for text in (printed, capsys.readouterr().out)]
    assert tables[0].split("written to")[0] == tables[1].split("written to")[0]


@pytest.mark.slow
def test_the_sweep_of_rewards_trains_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    out, figure = tmp_path / "sweep", tmp_path / "figure.png"
    runs = {name: run_folder(out, name, 0) for name in mask_or_box.SETTINGS}
    *finished, missing = runs.values()
    for one in finished:
        shutil.copytree(folder / RUN, one)
    argv = f"mask_or_box --seeds 0 --jobs 1 --out {out} --figure {figure}".split()
    monkeypatch.setattr(sys, "argv", [*argv, *"--steps 2 --eval_samples 2".split()])
    monkeypatch.setattr(mask_or_box, "SEARCHED", 12)

    def train(one, flags):  # the other sweep really trains
        s = samr1_mini.parse_settings("train", [*flags, "--out", str(one)])
        shutil.copytree(folder / RUN, one)
        runs_module.save_settings(one, s)

    monkeypatch.setattr(sweep, "train", train)
    mask_or_box.main()
    assert json.loads((missing / "config.json").read_text())["accuracy"] == "segzero_mask"
    printed = capsys.readouterr().out
    after = json.loads((folder / RUN / "eval.json").read_text())["after"]
    for name in ("mask", "box", "Seg-Zero"):
        (line,) = (one for one in printed.splitlines() if one.startswith(f"{name}  "))
        assert line.split()[-1] == f"{after['giou']:.3f}"
    assert "not run" not in printed and Image.open(figure).width > 500
    figure.unlink()
    shutil.rmtree(missing)
    monkeypatch.setattr(sys, "argv", [*argv, "--table"])
    mask_or_box.main()
    assert not missing.exists() and Image.open(figure).width > 500
    assert capsys.readouterr().out.count("not run") == 1


@pytest.mark.slow
def test_thoughts_of_a_run(folder, tmp_path, monkeypatch, capsys):
    figure = tmp_path / "figure.png"
    run(monkeypatch, folder, f"python -m benchmarks.thoughts {RUN} --scenes 12 --figure {figure}")
    printed = capsys.readouterr().out
    assert "base model" in printed and "trained model" in printed
    assert printed.count("own thought") >= 2


@pytest.mark.slow
def test_failures_are_drawn_from_their_runs(folder, tmp_path, monkeypatch, capsys):
    for name, flags in failures.FAILURES.items():
        shutil.copytree(folder / RUN, tmp_path / name.replace(" ", "-"))
        samr1_mini.parse_settings("train", flags.split())  # raises if they are no flags
    figure = tmp_path / "figure.png"
    run(monkeypatch, folder, f"python -m benchmarks.failures --out {tmp_path} --figure {figure}")
    printed = capsys.readouterr().out
    assert all(name in printed for name in failures.FAILURES)
    assert Image.open(figure).width > 500

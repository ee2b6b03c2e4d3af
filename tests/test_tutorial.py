"""TUTORIAL.md: its examples, names, links, pictures and commands are those of the code as it stands."""

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
from benchmarks import ablations, failures

ROOT = Path(samr1_mini.__file__).parent
TEXT = (ROOT / "TUTORIAL.md").read_text()
QUICK = "--steps 2 --prompts_per_step 2 --group_size 4 --eval_samples 12 --sample_every 100"


def commands() -> set[str]:
    """What stands in TUTORIAL as a line of its own or in backticks and begins with python or pytest."""
    found = re.findall(r"^    ((?:\S+=\S+ )?(?:\S*python|pytest) .*?)(?:  +.*)?$", TEXT, re.MULTILINE)
    return {re.sub(r"\S*bin/python", "python", c) for c in found + re.findall(r"`(python [^`]+?)`", TEXT)}


# Commands with a test of their own elsewhere.
ELSEWHERE = {
    "python tests/handout.py handout": "test_assignment.py",
    "python tests/grade.py handout": "test_assignment.py",
    "python tests/grade.py handout --hidden FOLDER": "test_assignment.py",
    "python tests/grade.py .": "test_assignment.py",
    "python -m pytest -rs -m exercise_5 tests": "test_assignment.py",
}
FIGURES = ("loop", "sheet", "seeds", "mask", "tiers")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a short run where the tutorial's commands expect one."""
    folder = tmp_path_factory.mktemp("tutorial")
    samr1_mini.main([*f"train {QUICK} --out".split(), str(folder / "runs" / "shapes-tiny-0")])
    return folder


def run(monkeypatch, folder: Path, command: str) -> None:
    """Run `python FILE ...` in this process, in a folder."""
    file, *more = command.split()[1:]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [file, *more])
    runpy.run_path(str(ROOT / file), run_name="__main__")


def test_examples():
    failed, tried = doctest.testfile(str(ROOT / "TUTORIAL.md"), module_relative=False)
    assert tried > 20 and not failed


def test_every_name_is_in_the_code():
    names = re.findall(r"`((?:data|reward|grpo|samr1_mini)\.[A-Za-z_][\w.]*)(?=[`(])", TEXT)
    names = [name for name in names if not name.endswith(".py")]
    assert len(set(names)) > 25
    for name in names:
        module, *rest = name.split(".")
        reduce(getattr, rest, importlib.import_module(module))
    for linked, file in re.findall(r"\[`(\w+)\.\w+`\]\((\w+)\.py\)", TEXT):
        assert linked == file
    for test, file in re.findall(r"`(test_\w+)` in `(tests/\w+\.py)`", TEXT):
        assert f"def {test}(" in (ROOT / file).read_text()


def test_every_setting_is_a_setting():
    elsewhere = {"hidden", "seeds", "jobs", "exercises", "limit", "table", "help"}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z_-]*)", TEXT)}
    assert flags - elsewhere <= set(samr1_mini.Settings.__dataclass_fields__)


def test_links_and_pictures_are_there():
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for picture in (ROOT / "assets").glob("*.png"):
        assert Image.open(picture).convert("RGBA").getextrema()[3] == (255, 255)  # its own ground: legible on a dark page too


def test_every_chapter_asks_and_answers():
    chapters = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    for chapter in chapters[:9]:
        asked = chapter.count("<details><summary>")
        assert 3 <= asked <= 5, chapter.splitlines()[0]
        assert asked == chapter.count("</details>")


def test_every_command_is_run_by_a_test():
    known = {*ELSEWHERE, *(f"python assets/figures.py {name}" for name in FIGURES)}
    known |= {"python samr1_mini.py train", "python samr1_mini.py train --help", "python samr1_mini.py train --preset qwen3b --dry-run"}
    known |= {"python samr1_mini.py report runs/shapes-tiny-0", "python benchmarks/failures.py"}
    known |= {"python benchmarks/ablations.py", "python benchmarks/ablations.py --table"}
    said = {re.sub(r"(figures.py \w+)( RUN| runs/\S+)*$", r"\1", command) for command in commands()}
    assert said <= known, said - known
    for file in ELSEWHERE.values():
        assert (ROOT / "tests" / file).is_file()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn(name, workplace, tmp_path, monkeypatch):
    runs = {"mask": 0, "tiers": 0, "seeds": 3}.get(name, 1) * " runs/shapes-tiny-0"
    run(monkeypatch, workplace, f"python assets/figures.py {name}{runs} --out {tmp_path / 'figure.png'}")
    assert Image.open(tmp_path / "figure.png").width > 500


def test_report_and_dry_run(workplace, monkeypatch, capsys):
    run(monkeypatch, workplace, "python samr1_mini.py report runs/shapes-tiny-0")
    page = (workplace / "runs" / "shapes-tiny-0" / "report.html").read_text()
    assert "the largest circle" in page and "http://" not in page.replace("http://www.w3.org", "")
    run(monkeypatch, workplace, "python samr1_mini.py train --preset qwen3b --dry-run")
    with pytest.raises(SystemExit):
        run(monkeypatch, workplace, "python samr1_mini.py train --help")
    said = capsys.readouterr().out
    assert "expected peak" in said and "--eps_high" in said


def test_a_sweep_goes_on_and_leaves_what_is_finished(workplace, tmp_path, monkeypatch, capsys):
    """All of its runs but one are there: the one is trained, the table has them all, and the figure is drawn."""
    out, figure = tmp_path / "sweep", tmp_path / "figure.png"
    folders = [ablations.folder(out, name, 0) for name in ablations.SETTINGS]
    for folder in folders[:-1]:
        shutil.copytree(workplace / "runs" / "shapes-tiny-0", folder)
    began = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders[:-1]]
    always = f"python benchmarks/ablations.py --seeds 0 --jobs 1 --out {out} --figure {figure}"
    run(monkeypatch, workplace, f"{always} --steps 2 --eval_samples 2")
    assert began == [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders[:-1]]
    assert len((folders[-1] / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((folders[-1] / "config.json").read_text())["beta"] == 1e-9  # the setting of its name, "no KL"
    said = capsys.readouterr().out
    assert all(name in said for name in ablations.SETTINGS)
    assert Image.open(figure).width > 500
    run(monkeypatch, workplace, f"{always} --table")
    assert said.split("Table 3")[1].split("figure:")[0] == capsys.readouterr().out.split("Table 3")[1].split("figure:")[0]


def test_failures_are_drawn_from_their_runs(workplace, tmp_path, monkeypatch, capsys):
    for name, flags in failures.FAILURES.items():
        shutil.copytree(workplace / "runs" / "shapes-tiny-0", tmp_path / name.replace(" ", "-"))
        samr1_mini.parse_settings("train", flags.split())  # the flags are flags
    run(monkeypatch, workplace, f"python benchmarks/failures.py --out {tmp_path} --figure {tmp_path / 'figure.png'}")
    said = capsys.readouterr().out
    assert all(name in said for name in failures.FAILURES)
    assert Image.open(tmp_path / "figure.png").width > 500

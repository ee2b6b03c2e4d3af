"""TUTORIAL.md: its examples, names, links, pictures and commands fit the code."""

import doctest
import importlib
import re
import runpy
import sys
from functools import reduce
from pathlib import Path

import pytest
from PIL import Image

import samr1_mini
from plumbing import settings

ROOT = Path(samr1_mini.__file__).parent
TEXT = (ROOT / "TUTORIAL.md").read_text()
QUICK = "--steps 2 --prompts_per_step 2 --group_size 4"
RUN = "runs/shapes-tiny-0"
# A module, and a name in it.
NAMES = r"`((?:plumbing|tools)\.\w+|data|reward|grpo|samr1_mini)\.([A-Za-z_][\w.]*)(?=[`(])"


def test_examples():
    failed, tried = doctest.testfile(str(ROOT / "TUTORIAL.md"), module_relative=False)
    assert tried > 20 and not failed


def test_every_name_exists():
    names = {name for name in re.findall(NAMES, TEXT) if name[1] != "py"}
    assert len(names) > 25
    for module_name, name in names:
        module = importlib.import_module(module_name)
        defined = reduce(getattr, name.split("."), module)
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


def test_every_file_and_program_exists():
    """The test file of each program runs it; figures are drawn below."""
    folders = "assets|assignment|benchmarks|examples|plumbing|tests|tiny|tools"
    files = re.findall(rf"`((?:{folders})/[\w./]*|\w+\.py)`", TEXT)
    assert "tests/test_train.py" in files and "data.py" in files
    programs = re.findall(r"\bpython (?:-m )?([\w./]+)", TEXT)
    assert len(programs) > 10
    names = set(programs) - {"pytest"}
    files += [f"{name.removesuffix('.py').replace('.', '/')}.py" for name in names]
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_setting_exists():
    elsewhere = {"seeds", "jobs", "table", "help", "protocol", "against"}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z_-]*)", TEXT)}
    assert flags - elsewhere <= set(settings.Settings.__dataclass_fields__)


def test_every_link_and_picture_exists():
    titles = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for picture in re.findall(r"!\[[^]]*\]\((assets/\w+\.png)\)", TEXT):
        alpha = Image.open(ROOT / picture).convert("RGBA").getextrema()[3]
        assert alpha == (255, 255)  # an opaque background is legible on a dark page too


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a short run where the tutorial's commands expect one."""
    folder = tmp_path_factory.mktemp("tutorial")
    samr1_mini.main([*f"train {QUICK} --out".split(), str(folder / RUN)])
    return folder


FIGURES = sorted(set(re.findall(r"python -m tools\.figures (\w+)", TEXT)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn(name, folder, tmp_path, monkeypatch):
    assert len(FIGURES) == 5
    runs = [RUN] * {"mask": 0, "tiers": 0, "seeds": 3}.get(name, 1)
    out = tmp_path / "figure.png"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["figures", name, *runs, "--out", str(out)])
    monkeypatch.delitem(sys.modules, "tools.figures", raising=False)  # else runpy warns
    runpy.run_module("tools.figures", run_name="__main__", alter_sys=True)
    assert Image.open(out).width > 500


def test_the_core_path_is_an_evening():
    """Chapters 1 to 6 and 10, without questions and further reading. The tutorial says how many."""
    core = ""
    for chapter in re.split(r"(?m)^## ", TEXT):
        if re.match(r"([1-6]|10)\. ", chapter):
            core += re.sub(r"(?ms)^### Further reading.*?(?=^### |\Z)", "", chapter)
    words = len(re.sub(r"(?s)<details>.*?</details>", "", core).split())
    assert f"have {words:,} words" in TEXT and words <= 5000

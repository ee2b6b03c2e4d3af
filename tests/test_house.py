"""The rules of the repository, checked by reading its files: imports, sizes, citations."""

import ast
import dataclasses
import doctest
import graphlib
import re
import sys
from pathlib import Path

import pytest

from plumbing import settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"data", "reward", "grpo", "samr1_mini"}
# What the modules of a folder may import from this repository, besides the folder itself. Nobody
# imports a program, except the tests.
METHOD = {*SCRIPTS, "plumbing"}
ALLOWED = {
    "data": {"plumbing"},
    "reward": {"plumbing"},
    "grpo": {"plumbing"},
    "samr1_mini": {"data", "reward", "grpo", "plumbing"},
    "plumbing": {"data"},
    **dict.fromkeys(("tools", "assignment", "examples", "tiny"), METHOD),
    # gpu_24gb prints what tools.memory expects, vs_trl runs examples.trl_grpo.
    "benchmarks": {*METHOD, "tools", "examples"},
    "tests": {*METHOD, "tools", "assignment", "examples", "benchmarks", "tiny"},
}
FILES = [ROOT / f"{name}.py" for name in SCRIPTS]
FILES += [file for folder in set(ALLOWED) - SCRIPTS for file in (ROOT / folder).glob("*.py")]
SOURCES = {
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file.read_text("utf-8")
    for file in FILES
}


def imports(source: str) -> set[str]:
    """The modules of this repository that a source imports, also within functions.

    >>> sorted(imports("import data, torch\\ndef f():\\n    from plumbing import hub"))
    ['data', 'plumbing.hub']
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(SOURCES)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_layout(module):
    folder = module.partition(".")[0]
    found = {name.partition(".")[0] for name in imports(SOURCES[module])}
    assert found <= {folder, *ALLOWED[folder]}
    assert "sys.path" not in SOURCES[module] or module in ("tests.conftest", "tests.test_house")


def test_no_module_imports_itself_through_others():
    graph = {module: imports(source) for module, source in SOURCES.items()}
    assert {"data", "reward", "grpo"} < graph["samr1_mini"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_functions_are_short():
    long = []
    for module in SOURCES:
        if module.partition(".")[0] in {*SCRIPTS, "plumbing", "tools"}:
            for node in ast.walk(ast.parse(SOURCES[module])):
                if isinstance(node, ast.FunctionDef):
                    docstring = (ast.get_docstring(node) or "").splitlines()
                    lines = node.end_lineno - node.lineno + 1 - len(docstring)
                    if lines > (80 if node.name == "train" else 60):  # train is the whole loop
                        long.append(f"{module}.{node.name}")
    assert not long


def test_the_settings_are_few():
    """Each one of `train` is in a preset or an experiment, or says where weights and data are."""
    for settings_class in settings.CLASSES.values():
        assert len(dataclasses.fields(settings_class)) <= 28


# What the paper's text is known to contain. Its sections are not known by number.
KNOWN = {"fig": {"1", "3", "4a", "4b", "4c", "5"}, "tab": set("123456"), "eq": {"4"}, "sec": set()}
CITATION = re.compile(
    r"(?<!DAPO, )(?<!et al\. \d{4}, )\b(fig|tab|eq|sec)(?:ures?|les?|uations?|tions?|s?\.|s\.)? "
    r"\(?(\d\w?\b(?:(?:,|,? and| to) \d\w?\b)*)",
    re.IGNORECASE,
)


def unknown_citations(text: str) -> list[str]:
    """Citations of the paper by numbers that nobody has verified.

    >>> unknown_citations("sec. 3; Figure 4a, fig. 2; Tables 3, 4 and 7; equation 4, eq. (7)")
    ['sec. 3', 'fig. 2', 'Tables 3, 4 and 7', 'eq. (7']
    >>> unknown_citations("Figures 4a to 4c, 200 steps; DAPO, sec. 3.1; Shao et al. 2024, eq. 3")
    []
    """
    found = []
    for match in CITATION.finditer(text):
        if not set(re.findall(r"\d\w?", match[2])) <= KNOWN[match[1].lower()]:
            found.append(match[0])
    return found


def test_the_paper_is_cited_by_known_numbers_only():
    texts = {file.name: file.read_text("utf-8") for file in ROOT.glob("*.md")}
    for name, text in (SOURCES | texts).items():
        assert name == "tests.test_house" or not unknown_citations(text), name


def test_docstring_examples():
    failed, tried = doctest.testmod(sys.modules[__name__])
    assert tried and not failed

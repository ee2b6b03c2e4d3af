"""The rules of the repository, checked by reading its files: imports, sizes, citations."""

import ast
import dataclasses
import doctest
import graphlib
import re
import sys
from pathlib import Path

import reward
from plumbing import settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("data", "reward", "grpo", "samr1_mini")
FOLDERS = ("plumbing", "tools", "assignment", "examples", "benchmarks", "tests", "tiny")
SKIPPED = {".venv", "venv", "runs", "__pycache__", ".git", "data", "build", "node_modules"}

# A module may import these modules and folders of the repository, and no others.
ALLOWED = {
    "data": {"plumbing"},
    "reward": {"plumbing"},
    "grpo": {"plumbing"},
    "samr1_mini": {"data", "reward", "grpo", "plumbing"},
    "plumbing": {"data", "plumbing"},
    "tools": {*SCRIPTS, "plumbing"},
    "assignment": {*SCRIPTS, "plumbing", "assignment"},
    "examples": {*SCRIPTS, "plumbing"},
    "benchmarks": {*SCRIPTS, "plumbing", "benchmarks"},
    "tiny": {*SCRIPTS, "plumbing", "tiny"},
}


def files(suffix: str) -> list[Path]:
    """Files of the repository, without environments, runs and downloaded data."""
    found = []
    for file in ROOT.rglob(f"*{suffix}"):
        folders = file.relative_to(ROOT).parts[:-1]
        if not any(part in SKIPPED or part.startswith(".") for part in folders):
            found.append(file)
    return sorted(found)


PYTHON = files(".py")
TEXTS = [*PYTHON, *files(".md")]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    """The script or the folder that a file belongs to: "data", "plumbing"."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The first parts of all modules that a source imports, also within functions.

    >>> sorted(imported("import a.b, c\\ndef f():\\n    from d.e import g"))
    ['a', 'c', 'd']
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names.append(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names += [one.value for one in node.args if isinstance(one, ast.Constant)]
    return {name.partition(".")[0] for name in names}


def module_name(file: Path) -> str:
    return name_of(file).removesuffix(".py").replace("/", ".")


def imported_first(source: str) -> set[str]:
    """The full names of what a source imports while it is imported: not within functions.

    >>> source = "import a.b\\ntry:\\n    from c import d\\nexcept ImportError:\\n    pass"
    >>> sorted(imported_first(source + "\\ndef f():\\n    import g"))
    ['a.b', 'c', 'c.d']
    """
    names, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return names


def functions(source: str) -> dict[str, int]:
    """Lines of each function, with its decorators. Functions inside others count in both.

    >>> functions("def f():\\n    def g():\\n        pass\\n    return g")
    {'f': 4, 'g': 2}
    """
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            lengths[node.name] = max(node.end_lineno - first + 1, lengths.get(node.name, 0))
    return lengths


def offenders(found: dict) -> dict:
    """The entries that are not empty, for a message that shows the offenders only."""
    return {name: problems for name, problems in found.items() if problems}


def test_all_files_are_found():
    names = {name_of(file) for file in TEXTS}
    assert {f"{script}.py" for script in SCRIPTS} <= names
    assert {"README.md", "TUTORIAL.md", "plumbing/runs.py", "tests/test_house.py"} <= names
    assert {module_of(file) for file in PYTHON} <= {*SCRIPTS, *FOLDERS}
    assert not [name for name in names if name.startswith((".venv", "runs/"))]


def test_imports_follow_the_layout():
    own = {*SCRIPTS, *FOLDERS}
    files = [file for file in PYTHON if module_of(file) != "tests"]
    found = {}
    for file in files:
        allowed = ALLOWED.get(module_of(file), set())
        found[name_of(file)] = imported(file.read_text()) & own - allowed
    assert not offenders(found)


def test_no_module_imports_itself_through_others():
    """data imports plumbing.scenes and plumbing.photos imports data: no two may need each other."""
    sources = {module_name(file): file.read_text() for file in PYTHON}
    graph = {name: imported_first(source) & set(sources) for name, source in sources.items()}
    assert "plumbing.scenes" in graph["data"] and "data" in graph["plumbing.photos"]
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(sources)  # or CycleError


def test_the_import_rules_are_those_of_the_layout():
    """`ALLOWED` cannot be relaxed by accident."""
    first = [ALLOWED[name] for name in ("data", "reward", "grpo")]
    assert not set().union(*first) & set(SCRIPTS)
    assert ALLOWED["plumbing"] == {"data", "plumbing"}
    for module, allowed in ALLOWED.items():
        others = allowed - {module}
        assert not others & {"tools", "assignment", "examples", "benchmarks", "tests", "tiny"}


def test_the_path_of_imports_is_changed_in_conftest_only():
    found = set()
    for file in PYTHON:
        for node in ast.walk(ast.parse(file.read_text())):
            used = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
            taken = isinstance(node, ast.ImportFrom) and node.module == "sys"
            if used or (taken and "path" in [alias.name for alias in node.names]):
                found.add(name_of(file))
    assert found == {"tests/conftest.py"}


def test_no_line_is_longer_than_100_columns():
    found = {}
    for file in PYTHON:
        lines = file.read_text().split("\n")
        found[name_of(file)] = [n for n, line in enumerate(lines, 1) if len(line) > 100]
    assert not offenders(found)


def test_the_scripts_are_short():
    lengths = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SCRIPTS}
    assert max(lengths.values()) <= 450, lengths
    assert sum(lengths.values()) <= 1600, lengths


def test_functions_are_short():
    found = {}
    for file in PYTHON:
        if module_of(file) in {*SCRIPTS, "plumbing", "tools"}:
            lengths = functions(file.read_text())
            if module_of(file) == "samr1_mini":
                assert lengths.pop("train") <= 80
            found[name_of(file)] = {name: n for name, n in lengths.items() if n > 60}
    assert not offenders(found)


def test_the_settings_are_few():
    counts = {name: len(dataclasses.fields(cls)) for name, (cls, _) in settings.CLASSES.items()}
    assert max(counts.values()) == counts["train"] <= 35, counts


def test_the_accuracy_rewards_are_those_of_the_setting():
    """plumbing must not import reward, so the names are written twice."""
    assert reward.ACCURACY_REWARDS == settings.ACCURACY


NUMBER = r"\(?\d[\d.]*[a-z]?\)?"
KINDS = r"sections?|secs?\.|figures?|figs?\.|tables?|equations?|eqs?\.|appendix"
# A comma goes on with the list only if more of it follows: "Figure 4a, 200 steps" names one.
NEXT = rf"(?:,(?=\s*{NUMBER}(?:,|\s+and\b))|,?\s+and|\s+to|-)\s*{NUMBER}"
CITATION = re.compile(rf"\b(?:{KINDS})\s+{NUMBER}(?:{NEXT})*", re.I)
OTHER_PAPER = re.compile(r"(?:DAPO|et al\. \d{4}),\s*$")
KNOWN = {"fig": {"4a", "4b", "4c"}, "tab": {"3", "4", "6"}, "equ": {"4"}, "eq.": {"4"}}


def unknown_citations(text: str) -> list[str]:
    """Citations of the paper by numbers that nobody has verified.

    >>> unknown_citations("sec. 3; Figure 4a, fig. 2; Table 3, Tables 3 and 5; equation 4, eq. 7")
    ['sec. 3', 'fig. 2', 'Tables 3 and 5', 'eq. 7']
    >>> unknown_citations("Tables 3, 5 and 6; Tables 3, 4, and 7; Figure 4a, 200 steps")
    ['Tables 3, 5 and 6', 'Tables 3, 4, and 7']
    >>> unknown_citations("Figures 4a to 4c; other papers: DAPO, sec. 3.1; Shao et al. 2024, eq. 3")
    []
    """
    found = []
    for match in CITATION.finditer(text):
        numbers = {number.strip("().") for number in re.findall(NUMBER, match[0])}
        known = KNOWN.get(match[0][:3].lower(), set())
        if not numbers <= known and not OTHER_PAPER.search(text[: match.start()][-30:]):
            found.append(match[0])
    return found


def test_the_paper_is_cited_by_known_numbers_only():
    others = [file for file in TEXTS if file != Path(__file__)]
    assert not offenders({name_of(f): unknown_citations(f.read_text()) for f in others})


def test_docstring_examples():
    failed, tried = doctest.testmod(sys.modules[__name__])
    assert tried == 7 and not failed

"""What a user installs and sees: bounded versions, and no library's warnings on the terminal."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = """train --steps 2 --prompts_per_step 2 --group_size 2 --out {tmp}/run
eval --limit 2 --out {tmp}/eval
segment --image assets/tiers.png --query star --out {tmp}/found.png
train --stepz 3"""
# The commands in one process, in which torch is imported once, with short evaluations.
PROGRAM = """import runpy, sys
from plumbing import sources
sources.EVAL_SAMPLES = 4
for command in sys.argv[1].splitlines():
    sys.argv = ["samr1_mini.py", *command.split()]
    runpy.run_path("samr1_mini.py", run_name="__main__")
"""
OUT = [
    r" +gIoU +cIoU .*",
    r"(base|before|after|ceiling) +[\d. -]+",
    r"95 % intervals over the images:",
    r"(base|before|after|ceiling) +gIoU [\d.]+ to [\d.]+, cIoU [\d.]+ to [\d.]+",
    r"gap to the ceiling closed: .*",
    r"mean reward \(of 6\): .*",
    r"sampled mask IoU: .*",
    r"ratio clipped below .*",
    r"written to .*",
    r"--protocol (lisa|segzero).*",
    r'\{"query": "star", .*\}',
]
# Bars of tqdm: two of ours, and that of transformers, which a large model needs.
BARS = r"(train|eval \w+|Loading weights): +\d+%\|.*"
REFUSED = "samr1_mini.py: .*--stepz.*"


def strangers(text: str, own: list[str]) -> list[str]:
    """The lines that match no pattern. A bar returns to the start of its line and overwrites it."""
    lines = re.split(r"[\r\n]", text)
    return [line for line in lines if line.strip() and not any(re.fullmatch(p, line) for p in own)]


def start(*command: str) -> subprocess.CompletedProcess:
    typed = [sys.executable, *command]
    return subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_commands_print_only_their_own_lines(tmp_path):
    done = start("-c", PROGRAM, COMMANDS.format(tmp=tmp_path))
    assert done.returncode == 2, done.stderr
    assert strangers(done.stdout, OUT) == []
    assert strangers(done.stderr, [BARS, REFUSED]) == []
    assert re.fullmatch(REFUSED, done.stderr.splitlines()[-1])  # the last command


@pytest.mark.parametrize(
    ("flags", "level"), [([], logging.ERROR), (["--dtype", "4bit"], logging.NOTSET)]
)
def test_bitsandbytes_is_quiet_until_4_bit_is_asked_for(flags, level):
    """Whether it warns depends on the CPU, so this reads the level of its logger."""
    asked = "import logging, plumbing; print(logging.getLogger('bitsandbytes').level)"
    done = start("-c", asked, *flags)
    assert done.stdout == f"{level}\n", done.stderr


def requirements(file: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(one.name): one for one in found}


@pytest.mark.parametrize(
    "file", ["requirements.txt", "tests/requirements.txt", "benchmarks/requirements.txt"]
)
def test_every_package_has_two_bounds_and_a_tried_version_between_them(file):
    tried = requirements("constraints.txt")
    for name, one in requirements(file).items():
        operators = {bound.operator for bound in one.specifier}
        assert operators in ({">=", "<"}, {"=="}), one
        (version,) = tried[name].specifier
        assert version.operator == "==" and version.version in one.specifier, one

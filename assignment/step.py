"""step.py - what `train` logs in two steps: the test of exercise 13 compares a student's with it.

    python -m assignment.step        writes tests/expected_step.json

Run it again in the repository when the weights in tiny/ or the method have changed.
"""

import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch

import grpo
import samr1_mini
from assignment.handout import ROOT
from plumbing.errors import exit_with_one_line
from plumbing.runs import write_text

EXPECTED = ROOT / "tests" / "expected_step.json"
FLAGS = "--steps 2 --prompts_per_step 4 --group_size 4 --accuracy iou --lr 3e-3"
METRICS = "reward iou length skipped kl entropy ratio clip_low grad_norm".split()


def seeded_rollout():
    """`grpo.rollout` with a new generator, seeded with the next number, in each call that has one.

    So it does not matter how many random numbers a call takes after its last end token.
    """
    numbers = itertools.count()

    def rollout(*args, generator: torch.Generator | None, **options):
        if generator is not None:
            generator = torch.Generator().manual_seed(next(numbers))
        return grpo.rollout(*args, generator=generator, **options)

    return rollout


def two_steps(out: Path) -> dict[str, list[float]]:
    """Train for two steps on a CPU, and return the metrics of each. out: a new folder."""
    torch.set_num_threads(1)  # the number of threads changes the rounding
    replaced = {"rollout": seeded_rollout(), "EVAL_SAMPLES": 1}
    replaced |= {"log_samples": mock.Mock()}  # pictures take a second each
    with mock.patch.multiple(samr1_mini, **replaced):
        samr1_mini.main(["train", *FLAGS.split(), "--device", "cpu", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in METRICS}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = two_steps(Path(folder) / "run")
    write_text(EXPECTED, json.dumps(found, indent=1) + "\n")
    print(f"written to {EXPECTED}")


if __name__ == "__main__":
    with exit_with_one_line():
        main()

"""dtypes.py - does the embedded default learn the same in bfloat16 as in float32?

    python -m benchmarks.dtypes [--seeds 0] [--steps 60] [--device cpu]

Trains the default for some steps in both dtypes, and prints the mean reward (of 6) of the last 20
steps. The target is a difference of at most 0.15 between the means over the seeds; beyond it the
exit code is 1. The adapter is float32 in both. Sampling rounds differently, so the runs differ.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import samr1_mini
from plumbing.settings import parse_settings

TARGET = 0.15
DTYPES = ("float32", "bfloat16")


def last_reward(dtype: str, seed: int, steps: int, device: str) -> float:
    """Mean reward of the last 20 steps (of the last third, if there are fewer than 60)."""
    argv = f"--dtype {dtype} --seed {seed} --steps {steps} --device {device}".split()
    argv += ["--lr_decay", "constant", "--eval_samples", "8"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        samr1_mini.train(parse_settings("train", [*argv, "--out", f"{folder}/run"]))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    return float(np.mean(rewards[-min(20, max(1, steps // 3)) :]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dtypes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print("| seed | " + " | ".join(DTYPES) + " |\n" + "|---" * (1 + len(DTYPES)) + "|")
    rows = []
    for seed in options.seeds:
        row = [last_reward(dtype, seed, options.steps, options.device) for dtype in DTYPES]
        rows.append(row)
        print(f"| {seed} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)
    means = np.mean(rows, axis=0)
    difference = abs(means[0] - means[1])
    print(f"\ndifference of the means: {difference:.3f}, target at most {TARGET}")
    sys.exit(int(difference > TARGET))


if __name__ == "__main__":
    main()

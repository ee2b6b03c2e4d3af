"""failures.py - runs that fail on purpose, for TUTORIAL's chapter "When it does not learn".

    python -m benchmarks.failures [--steps 60]        about 8 minutes on one core

Each run has one thing wrong. The script prints the metrics of the last steps, and draws the curves
beside those of a correct run (assets/failures.png). The same command continues an interrupted run.
"""

import argparse
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.ablations import ROOT, read_metrics, read_results, train
from plumbing import pictures

FAILURES = {  # name: the wrong flag
    "sound": "",
    "learning rate too small": "--lr 1e-6",
    "learning rate too large": "--lr 1e-2",
    "wrong coordinates": "",  # see WRONG_COORDINATES
    "temperature too low": "--temperature 0.01",
    "limit too short": "--max_new_tokens 28",
}
# The reward reads the answers as thousandths, but the policy answers in pixels. No flag does this.
WRONG_COORDINATES = """
import sys, samr1_mini
samr1_mini.Policy.frame = 1000
samr1_mini.main(sys.argv[1:])
"""
PANELS = {
    "reward": "mean reward (of 6)",
    "accuracy": "accuracy reward (of 4)",
    "answer_format": "answer format reward",
    "kl": "KL to the reference",
    "equal_groups": "share of groups with equal rewards",
    "length": "length, tokens",
}


def train_all(out: Path, steps: int) -> dict[str, list[dict]]:
    """Train the runs that are not finished. Returns the rows of metrics.jsonl of each run."""
    runs = {}
    always = f"--steps {steps} --seed 0 --lr_decay constant --eval_samples 64"
    for name, flags in tqdm(FAILURES.items(), unit="run"):
        run = out / name.replace(" ", "-")
        if not read_results(run):
            patched = {"wrong coordinates": {"program": ("-c", WRONG_COORDINATES)}}
            train(run, f"{always} {flags}".split(), **patched.get(name, {}))
        runs[name] = read_metrics(run)
    return runs


def draw(runs: dict[str, list[dict]]) -> Figure:
    """One panel per metric, one curve per run."""
    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for k, (name, rows) in enumerate(runs.items()):
            pictures.smooth(axes, rows, key, f"C{k}", label=name)
        axes.set_title(title, fontsize=10)
        if key == "kl":
            axes.set_yscale("symlog", linthresh=1e-3)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failures", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=60)
    out, figure = ROOT / "runs" / "failures", ROOT / "assets" / "failures.png"
    parser.add_argument("--out", type=Path, default=out, help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=figure, help="figure to write")
    options = parser.parse_args()
    runs = train_all(options.out, options.steps)
    print(f"\nmeans of the last 10 of {options.steps} steps")
    print(f"{'':26}{''.join(f'{key:>15}' for key in PANELS)}")
    for name, rows in runs.items():
        means = [statistics.mean(row[key] for row in rows[-10:]) for key in PANELS]
        print(f"{name:26}" + "".join(f"{mean:15.3f}" for mean in means))
    draw(runs).savefig(options.figure)
    print(f"written to {options.figure}")


if __name__ == "__main__":
    main()

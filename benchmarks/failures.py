"""failures.py - runs that do not learn, made on purpose: the curves of TUTORIAL's chapter "When it does not learn".

    python benchmarks/failures.py [--steps 60]        about 8 minutes on one core

Each run has one setting wrong. Prints what its curves end at, and draws them beside a sound run (assets/failures.png). Like the
ablations' sweep, it goes on where it was interrupted.
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assets import pictures  # noqa: E402
from benchmarks.ablations import finished, metrics, train  # noqa: E402

FAILURES = {  # name: the wrong flag
    "sound": "",
    "learning rate too small": "--lr 1e-6",
    "learning rate too large": "--lr 1e-2",
    "wrong coordinates": "--coordinates thousandths",
    "temperature too low": "--temperature 0.01",
    "limit too short": "--max_new_tokens 28",
}
PANELS = {
    "reward": "mean reward (of 6)", "accuracy": "accuracy reward (of 4)", "answer_format": "answer format reward", "kl": "KL to the reference",
    "equal_groups": "share of groups with equal rewards", "length": "length, tokens",
}  # fmt: skip


def draw(runs: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for k, (name, rows) in enumerate(runs.items()):
            pictures.smooth(axes, rows, key, f"C{k}", label=name)
        axes.set_title(title, fontsize=10)
        if key == "kl":
            axes.set_yscale("symlog", linthresh=1e-3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "failures", help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=ROOT / "assets" / "failures.png")
    options = parser.parse_args()
    runs = {}
    for name, flags in tqdm(FAILURES.items(), unit="run"):
        run = options.out / name.replace(" ", "-")
        if not finished(run):
            more = f"--steps {options.steps} --seed 0 --lr_decay constant --eval_samples 64 --sample_every 1000000 {flags}"
            train(run, more.split())
        runs[name] = metrics(run)
    print(f"\nmeans of the last 10 of {options.steps} steps\n{'':26}{''.join(f'{key:>15}' for key in PANELS)}")
    for name, rows in runs.items():
        print(f"{name:26}" + "".join(f"{statistics.mean(row[key] for row in rows[-10:]):15.3f}" for key in PANELS))
    draw(runs).savefig(options.figure)
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()

"""ablations.py - the paper's ablations on the embedded default: Table 3, Table 4 and Figure 4a in miniature.

    python benchmarks/ablations.py [--seeds 0 1 2] [--jobs 2]        about 25 minutes of one core a seed
    python benchmarks/ablations.py --table                           only table and figure, of what is finished

    Table 3    the accuracy reward: a fixed threshold of 0.5, 0.7 or 0.8, the raw IoU, the paper's tiers
    Table 4    the objective: plain GRPO, with token-level normalisation, with the higher upper clip, with both
    Figure 4a  without the KL term

Nine settings, each trained with each seed by `samr1_mini.py train` in a folder of its own. A sweep that was interrupted (Ctrl-C
lets the runs save their step) goes on where it stopped when it is started again. Every figure is of greedy answers on the same
256 held-out scenes. A toy's seeds differ by about as much as most rows of the paper's tables do: mean and spread are printed,
and every run is drawn as a point.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assets import pictures  # noqa: E402

PAPER = "tiered, both, KL"
SETTINGS = {  # name: flags that differ from the paper's
    PAPER: "",
    "fixed 0.5": "--accuracy 0.5",
    "fixed 0.7": "--accuracy 0.7",
    "fixed 0.8": "--accuracy 0.8",
    "raw IoU": "--accuracy iou",
    "GRPO": "--normalise sequence --eps_high 0.2",
    "+ token-level": "--eps_high 0.2",
    "+ higher clip": "--normalise sequence",
    "no KL": "--beta 1e-9",  # and not 0, so that the KL is still measured
}
TABLES = {
    "Table 3: accuracy reward": ("fixed 0.5", "fixed 0.7", "fixed 0.8", "raw IoU", PAPER),
    "Table 4: objective": ("GRPO", "+ token-level", "+ higher clip", PAPER),
    "Figure 4a: KL term": ("no KL", PAPER),
}


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace('+ ', 'plus-').replace(', ', '-').replace(' ', '-')}-{seed}"


def finished(run: Path) -> dict | None:
    """eval.json of a finished run, else None."""
    file = run / "eval.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    return results if "after" in results else None


def train(run: Path, flags: list[str]) -> None:
    """Train with these flags; go on if that was begun. Raises RuntimeError with the last lines of the output if it fails."""
    begun = (run / "checkpoint" / "state.pt").is_file()
    command = [sys.executable, str(ROOT / "samr1_mini.py"), "train", "--out", str(run), *(["--resume"] if begun else ["--overwrite", *flags])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run}: exit code {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-5:]))


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def collect(out: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """For each setting its finished runs: figures before and after, and the log."""
    rows = {}
    for name in SETTINGS:
        runs = [run for seed in seeds if finished(run := folder(out, name, seed))]
        rows[name] = [finished(run) | {"metrics": metrics(run)} for run in runs]
    return rows


def print_tables(rows: dict[str, list[dict]]) -> None:
    """Mean and spread (standard deviation) over the seeds."""

    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):8.3f} ± {spread:5.3f}"

    for title, names in TABLES.items():
        print(f"\n{title:26}{'gIoU':>16}{'cIoU':>16}{'format':>16}{'IoU, last 20':>16}{'KL, last 20':>16}  seeds  seconds")
        for name in names:
            if not rows[name]:
                print(f"{name:26}{'not run':>16}")
                continue
            columns = [[row["after"][key] for row in rows[name]] for key in ("giou", "ciou", "format")]
            columns += [[statistics.mean(step[key] for step in row["metrics"][-20:]) for row in rows[name]] for key in ("iou", "kl")]
            seconds = [sum(value for step in row["metrics"] for key, value in step.items() if key.startswith("seconds_")) for row in rows[name]]
            print(f"{name:26}{''.join(map(cell, columns))}{len(rows[name]):7}{statistics.mean(seconds):9.0f}")


def draw(rows: dict[str, list[dict]]) -> Figure:
    """Above: held-out gIoU of each setting, a point a seed, a bar for the mean. Below: reward, IoU and KL with and without KL."""
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1)
    for axes, (title, names) in zip(upper.subplots(1, 3, width_ratios=[len(n) for n in TABLES.values()]), TABLES.items(), strict=True):
        for k, name in enumerate(names):
            values = [row["after"]["giou"] for row in rows[name]]
            axes.plot([k] * len(values), values, "o", color="C0", alpha=0.6)
            if values:
                axes.hlines(statistics.mean(values), k - 0.3, k + 0.3, color="C1", linewidth=2.5)
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8, rotation=20)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(0.75, 0.88)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("held-out gIoU", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    for axes, (key, title) in zip(
        lower.subplots(1, 3), (("iou", "sampled mask IoU"), ("entropy", "entropy, nats a token"), ("kl", "KL to the reference")), strict=True
    ):
        for name, colour in ((PAPER, "C0"), ("no KL", "C3")):
            for k, row in enumerate(rows[name]):
                pictures.smooth(axes, row["metrics"], key, colour, label=name if k == 0 else None)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations", help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=ROOT / "assets" / "ablations.png")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval_samples", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    started = time.perf_counter()
    always = f"--steps {options.steps} --eval_samples {options.eval_samples} --sample_every 1000000"
    wanted = [(name, seed) for seed in options.seeds for name in SETTINGS]
    missing = [] if options.table else [pair for pair in wanted if not finished(folder(options.out, *pair))]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(train, folder(options.out, *pair), f"{always} --seed {pair[1]} {SETTINGS[pair[0]]}".split()): pair for pair in missing}
        bar = tqdm(as_completed(runs), desc="sweep", unit="run", total=len(wanted), initial=len(wanted) - len(runs), disable=options.table)
        try:
            for run in bar:
                run.result()
                bar.set_postfix_str("finished: {}, seed {}".format(*runs[run]))
        except (RuntimeError, KeyboardInterrupt) as error:
            for run in runs:
                run.cancel()  # those that have not begun; the others save and stop, or finish
            raise SystemExit(f"ablations.py: stopped ({error or 'interrupted'}); the same command goes on") from None
    rows = collect(options.out, options.seeds)
    print_tables(rows)
    draw(rows).savefig(options.figure)
    print(f"\nfigure: {options.figure}; this call took {(time.perf_counter() - started) / 60:.1f} minutes")
    table = {name: [{"giou": row["after"]["giou"], "ciou": row["after"]["ciou"]} for row in found] for name, found in rows.items()}
    print(json.dumps(table))


if __name__ == "__main__":
    main()

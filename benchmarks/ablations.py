"""ablations.py - the paper's ablations on the embedded default: Tables 3 and 4, and Figure 4a.

    python -m benchmarks.ablations [--seeds 0 1 2] [--jobs 2]    25 minutes of one core per seed
    python -m benchmarks.ablations --table                       table and figure of finished runs

    Table 3    the accuracy reward: a fixed threshold of 0.5, 0.7 or 0.8, the IoU, the paper's tiers
    Table 4    the objective: GRPO, with token-level normalisation, with a higher clip, with both
    Figure 4a  without the KL term

The sweep trains nine settings with each seed, each in its own folder, by `samr1_mini.py train`.
The same command continues an interrupted sweep: Ctrl-C lets each run save its current step. All
metrics come from greedy answers on the same 256 held-out scenes. On the toy models, the seeds
differ by about as much as most rows of the paper's tables. So the tables give mean and standard
deviation, and the figure shows each run as a point.
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

from plumbing import pictures

ROOT = Path(__file__).resolve().parent.parent
PAPER = "tiered, both, KL"
SETTINGS = {  # name: the flags that differ from the paper's setting
    PAPER: "",
    "fixed 0.5": "--accuracy 0.5",
    "fixed 0.7": "--accuracy 0.7",
    "fixed 0.8": "--accuracy 0.8",
    "raw IoU": "--accuracy iou",
    "GRPO": "--normalise sequence --eps_high 0.2",
    "+ token-level": "--eps_high 0.2",
    "+ higher clip": "--normalise sequence",
    "no KL": "--beta 1e-9",  # not 0, so that the KL is still measured
}
TABLES = {
    "Table 3: accuracy reward": ("fixed 0.5", "fixed 0.7", "fixed 0.8", "raw IoU", PAPER),
    "Table 4: objective": ("GRPO", "+ token-level", "+ higher clip", PAPER),
    "Figure 4a: KL term": ("no KL", PAPER),
}
CURVES = {
    "iou": "sampled mask IoU",
    "entropy": "entropy, nats per token",
    "kl": "KL to the reference",
}


def run_folder(out: Path, name: str, seed: int) -> Path:
    """The folder of one run of the sweep in `out`."""
    name = name.replace("+ ", "plus-").replace(", ", "-").replace(" ", "-")
    return out / f"{name}-{seed}"


def read_results(run: Path) -> dict | None:
    """eval.json of a finished run, else None."""
    file = run / "eval.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    return results if "after" in results else None


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, one per step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(run: Path, flags: list[str], program: tuple[str, ...] = ("-m", "samr1_mini")) -> None:
    """Train with these flags in a process, or resume the run if it has a checkpoint.

    program: arguments of Python that start samr1_mini.

    Raises RuntimeError with the last lines of the output if training fails.
    """
    resume = (run / "checkpoint" / "state.pt").is_file()
    flags = ["--resume"] if resume else ["--overwrite", *flags]
    command = [sys.executable, *program, "train", "--out", str(run.resolve()), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        lines = "\n".join(result.stderr.splitlines()[-5:])
        raise RuntimeError(f"{run}: exit code {result.returncode}\n{lines}")


def train_missing(out: Path, seeds: list[int], jobs: int, flags: str) -> None:
    """Train all runs of the sweep that are not finished, `jobs` at a time.

    Exits if a run fails or the user interrupts; the runs in progress save and stop, or finish.
    """
    pairs = [(name, seed) for seed in seeds for name in SETTINGS]
    missing = [pair for pair in pairs if not read_results(run_folder(out, *pair))]
    with ThreadPoolExecutor(jobs) as pool:
        runs = {}
        for name, seed in missing:
            more = f"{flags} --seed {seed} {SETTINGS[name]}".split()
            runs[pool.submit(train, run_folder(out, name, seed), more)] = (name, seed)
        finished = len(pairs) - len(runs)
        bar = tqdm(as_completed(runs), "sweep", len(pairs), initial=finished, unit="run")
        try:
            for run in bar:
                run.result()
                bar.set_postfix_str("finished: {}, seed {}".format(*runs[run]))
        except (RuntimeError, KeyboardInterrupt) as error:
            for run in runs:
                run.cancel()  # has no effect on runs that have started
            hint = "the same command continues"
            raise SystemExit(f"ablations.py: {error or 'interrupted'}; {hint}") from None


def collect(out: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """The finished runs of each setting: the results of eval.json, and the rows of metrics.jsonl.

    Exits with one line if there is none, so that no empty figure replaces a good one.
    """
    rows = {}
    for name in SETTINGS:
        runs = [run_folder(out, name, seed) for seed in seeds]
        results = [(run, read_results(run)) for run in runs]
        rows[name] = [r | {"metrics": read_metrics(run)} for run, r in results if r]
    if not any(rows.values()):
        print(f"ablations.py: --out {out} has no finished run: leave out --table", file=sys.stderr)
        raise SystemExit(2)
    return rows


def table_columns(runs: list[dict]) -> list[list[float]]:
    """gIoU, cIoU, format, and mean IoU and KL of the last 20 steps, each as a list over runs."""
    columns = [[run["after"][key] for run in runs] for key in ("giou", "ciou", "format")]
    for key in ("iou", "kl"):
        columns.append([statistics.mean(row[key] for row in run["metrics"][-20:]) for run in runs])
    return columns


def training_seconds(run: dict) -> float:
    """Seconds of all phases of all steps."""
    items = [item for row in run["metrics"] for item in row.items()]
    return sum(value for key, value in items if key.startswith("seconds_"))


def print_tables(rows: dict[str, list[dict]]) -> None:
    """Print mean and standard deviation over the seeds."""

    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):8.3f} ± {spread:5.3f}"

    headers = ("gIoU", "cIoU", "format", "IoU, last 20", "KL, last 20")
    for title, names in TABLES.items():
        print(f"\n{title:26}{''.join(f'{header:>16}' for header in headers)}  seeds  seconds")
        for name in names:
            runs = rows[name]
            if not runs:
                print(f"{name:26}{'not run':>16}")
                continue
            seconds = statistics.mean(map(training_seconds, runs))
            cells = "".join(map(cell, table_columns(runs)))
            print(f"{name:26}{cells}{len(runs):7}{seconds:9.0f}")


def draw(rows: dict[str, list[dict]]) -> Figure:
    """Above: held-out gIoU of each setting, one point per seed and a bar at the mean. Below: curves
    with and without the KL term."""
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1)
    widths = [len(names) for names in TABLES.values()]
    panels = zip(upper.subplots(1, 3, width_ratios=widths), TABLES.items(), strict=True)
    for axes, (title, names) in panels:
        for k, name in enumerate(names):
            values = [run["after"]["giou"] for run in rows[name]]
            axes.plot([k] * len(values), values, "o", color="C0", alpha=0.6)
            if values:
                axes.hlines(statistics.mean(values), k - 0.3, k + 0.3, color="C1", linewidth=2.5)
        labels = [name.replace(", ", ",\n") for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8, rotation=20)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(0.75, 0.88)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("held-out gIoU", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    for axes, (key, title) in zip(lower.subplots(1, 3), CURVES.items(), strict=True):
        for name, colour in ((PAPER, "C0"), ("no KL", "C3")):
            for k, run in enumerate(rows[name]):
                label = name if k == 0 else None
                pictures.smooth(axes, run["metrics"], key, colour, label=label)
        axes.set_title(title, fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    out, figure = ROOT / "runs" / "ablations", ROOT / "assets" / "ablations.png"
    parser.add_argument("--out", type=Path, default=out, help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=figure, help="figure to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval_samples", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="do not train")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    if not options.table:
        flags = f"--steps {options.steps} --eval_samples {options.eval_samples}"
        train_missing(options.out, options.seeds, options.jobs, flags)
    rows = collect(options.out, options.seeds)
    print_tables(rows)
    draw(rows).savefig(options.figure)
    minutes = (time.perf_counter() - started) / 60
    print(f"\nwritten to {options.figure}; this call took {minutes:.1f} minutes")
    afters = {name: [run["after"] for run in runs] for name, runs in rows.items()}
    keys = ("giou", "ciou")
    table = {name: [{key: a[key] for key in keys} for a in runs] for name, runs in afters.items()}
    print(json.dumps(table))


if __name__ == "__main__":
    main()

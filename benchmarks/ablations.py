"""ablations.py - the paper's ablations on the embedded default: Tables 3 and 4, and Figure 4a.

    python -m benchmarks.ablations [--seeds 0 1 2] [--jobs 2]    30 minutes of one core per seed
    python -m benchmarks.ablations --table                       table and figure of finished runs

    Table 3    the accuracy reward: a fixed threshold of 0.5, 0.7 or 0.8, the IoU, the paper's tiers
    Table 4    the objective: GRPO, with token-level normalisation, with a higher clip, with both
    Figure 4a  without the KL term

The sweep trains nine settings with each seed, each in its own folder, by `samr1_mini.py train`.
The runs of the paper's setting are those of mask_or_box.py. All final metrics come from greedy
answers on the same 256 held-out scenes. On the toy models, the seeds differ by about as much as
most rows of the paper's tables. So the tables give mean and standard deviation, and the figure
shows each run as a point.

Most settings end at about the same metrics. So the tables also compare how fast they learn, by the
mask IoU of the sampled completions: the step at which its running mean exceeds MARK, and its mean
over all steps. The latter is the area under the curve, divided by the number of steps.
"""

import json
import math
import statistics
import time

import numpy as np
from matplotlib.figure import Figure

from benchmarks.sweep import PAPER, collect, mean_and_spread, parse_arguments, train_missing
from plumbing import pictures

MARK = 0.65  # sampled mask IoU; that of the base model is 0.32
WINDOW = 11  # steps of the running mean: one step's IoU depends on which scenes it drew

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
TABLES = {  # rows; the last one is the paper's setting, by what it has in this table
    "Table 3: accuracy reward": ("fixed 0.5", "fixed 0.7", "fixed 0.8", "raw IoU", "tiers"),
    "Table 4: objective": ("GRPO", "+ token-level", "+ higher clip", "both"),
    "Figure 4a: KL term": ("no KL", "KL"),
}
POINTS = {"giou": "held-out gIoU", "area": "sampled mask IoU, mean of all steps"}
CURVES = {
    "iou": "sampled mask IoU",
    "entropy": "entropy, nats per token",
    "kl": "KL to the reference",
}


def steps_until(values: list[float], mark: float) -> float:
    """The first step (from 1) at which the centred mean over WINDOW steps exceeds `mark`, or inf.

    values: one for each step. Steps at which the window does not fit have no mean.

    >>> steps_until([0.0] * 20 + [1.0] * 20, mark=0.5)
    21
    """
    if len(values) < WINDOW:
        return math.inf
    means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    above = np.flatnonzero(means > mark)
    return int(above[0]) + WINDOW // 2 + 1 if len(above) else math.inf


def area(values: list[float]) -> float:
    """The area under a curve with one value for each step, divided by the number of steps."""
    return statistics.mean(values)


def sampled_ious(run: dict) -> list[float]:
    """The mean mask IoU of the sampled completions, for each step."""
    return [row["iou"] for row in run["metrics"]]


def table_rows(names: tuple[str, ...], rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs of each row of a table."""
    return {name: rows.get(name, rows[PAPER]) for name in names}


def columns(runs: list[dict]) -> dict[str, list[float]]:
    """The columns of a table, each as a list over the runs."""
    found = {key: [run["after"][key] for run in runs] for key in ("giou", "ciou", "format")}
    found["area"] = [area(sampled_ious(run)) for run in runs]
    for key in ("iou", "kl"):
        found[key] = [statistics.mean(row[key] for row in run["metrics"][-20:]) for run in runs]
    return found


def training_seconds(run: dict) -> float:
    """Seconds of all phases of all steps."""
    items = [item for row in run["metrics"] for item in row.items()]
    return sum(value for key, value in items if key.startswith("seconds_"))


def print_tables(rows: dict[str, list[dict]]) -> None:
    """Print mean and standard deviation over the seeds, and the steps until MARK of each seed."""
    headers = ("gIoU", "cIoU", "format", "IoU, all steps", "IoU, last 20", "KL, last 20")
    mark = f"  seconds  steps until IoU {MARK}: median, seeds"
    for title, names in TABLES.items():
        print(f"\n{title:26}{''.join(f'{header:>16}' for header in headers)}{mark}")
        for name, runs in table_rows(names, rows).items():
            if not runs:
                print(f"{name:26}{'not run':>16}")
                continue
            cells = "".join(map(mean_and_spread, columns(runs).values()))
            seconds = statistics.mean(map(training_seconds, runs))
            until = [steps_until(sampled_ious(run), MARK) for run in runs]
            first, *each = (
                "never" if math.isinf(step) else f"{step:g}"
                for step in (statistics.median(until), *until)
            )
            print(f"{name:26}{cells}{seconds:9.0f}{first:>7} ({', '.join(each)})")


def draw(rows: dict[str, list[dict]]) -> Figure:
    """Draw points and curves.

    Above: held-out gIoU and mean sampled IoU of each setting, one point per seed and a bar at the
    mean. Below: curves with and without the KL term.
    """
    figure = Figure(figsize=(11, 10), dpi=110, layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1))
    widths = [len(names) for names in TABLES.values()]
    grid = upper.subplots(2, 3, sharex="col", sharey="row", width_ratios=widths)
    for line, (key, label) in zip(grid, POINTS.items(), strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for axes, (title, names) in zip(line, TABLES.items(), strict=True):
            for k, runs in enumerate(table_rows(names, rows).values()):
                values = columns(runs)[key]
                axes.plot([k] * len(values), values, "o", color="C0", alpha=0.6)
                if values:
                    mean = statistics.mean(values)
                    axes.hlines(mean, k - 0.3, k + 0.3, color="C1", linewidth=2.5)
            axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.grid(axis="y", alpha=0.3)
            if key == "giou":
                axes.set_title(title, fontsize=10)
    for axes, (key, title) in zip(lower.subplots(1, 3), CURVES.items(), strict=True):
        for name, label, colour in ((PAPER, "KL", "C0"), ("no KL", "no KL", "C3")):
            for k, run in enumerate(rows[name]):
                shown = label if k == 0 else None
                pictures.smooth(axes, run["metrics"], key, colour, label=shown)
        axes.set_title(title, fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def main() -> None:
    options = parse_arguments("ablations", __doc__.split("\n")[0], [0, 1, 2])
    started = time.perf_counter()
    if not options.table:
        train_missing(SETTINGS, options)
    rows = collect(SETTINGS, options)
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

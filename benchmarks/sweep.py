"""sweep.py - train several settings with several seeds, print a table and draw a picture.

    python -m benchmarks.sweep NAME [--jobs 2] [--table]        NAME: a key of SWEEPS, below

A run takes two to three minutes on one core, and --jobs of them run at a time. Each one is
`python samr1_mini.py train ... --out runs/sweep/SETTING-SEED`. The same command continues an
interrupted sweep: it skips finished runs and resumes the others. --table trains nothing: it prints
the table of the runs that exist. Settings of the same name in two sweeps share their runs, so run
one sweep at a time. A new sweep is one entry of SWEEPS.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import samr1_mini
from data import Shapes
from plumbing import pictures
from plumbing.errors import UserError, exit_with_one_line
from plumbing.runs import read_rows, save_figure
from plumbing.sam import load_sam
from plumbing.settings import parse_settings
from reward import SamPrompt, SamScorer

LAST = 20  # steps at the end of a run that are averaged
MARK = 0.65  # sampled mask IoU; it begins below 0.2
WINDOW = 11  # steps of the running mean: one step's IoU depends on which scenes it drew
SCENES = 256  # held-out scenes that mask_or_box looks at


class Sweep(NamedTuple):
    settings: dict[str, str]  # name: the flags that differ from the default, the paper's setting
    columns: str  # of the table, see `value`; the first one is also printed for each seed
    seeds: int
    steps: int = 200


SWEEPS = {
    "mask_or_box": Sweep(  # reward the mask, or only the box? 20 runs
        {
            "mask": "",  # SAM's mask against the true mask, in tiers: the paper's reward
            "box": "--accuracy box",  # the same tiers on the IoU of the boxes, without SAM
            "Seg-Zero": "--accuracy segzero",  # box IoU, box distance, two labelled points
            "Seg-Zero, in mask": "--accuracy segzero_mask",  # each point must lie in the true mask
        },
        "giou ciou box boxonly points",
        seeds=5,
    ),
    "ablations": Sweep(  # 27 runs: the paper's Tables 3 and 4 and Figure 4a
        {
            "fixed 0.5": "--accuracy 0.5",
            "fixed 0.7": "--accuracy 0.7",
            "fixed 0.8": "--accuracy 0.8",
            "raw IoU": "--accuracy iou",
            "GRPO": "--normalise sequence --eps_high 0.2",
            "token-level": "--eps_high 0.2",
            "higher clip": "--normalise sequence",
            "no KL": "--beta 1e-9",  # not 0, so that the KL is still measured
            "mask": "",
        },
        "giou ciou steps mean:iou last:iou last:kl",
        seeds=3,
    ),
    "amount": Sweep(  # the paper's Table 6: the number of training scenes, 12 runs
        {f"{n} scenes": f"--train_samples {n}" for n in (100, 300, 1000)} | {"mask": ""},
        "giou ciou box points last:iou",
        seeds=3,
    ),
    "failures": Sweep(  # five runs that fail on purpose
        {
            "sound": "",
            "learning rate too small": "--lr 1e-6",
            "learning rate too large": "--lr 3e-2",
            "wrong coordinates": "",  # see PROGRAMS
            "temperature too low": "--temperature 0.01",
            "limit too short": "--max_new_tokens 28",
        },
        "last:reward last:accuracy last:answer_format last:kl last:equal_groups last:length",
        seeds=1,
        steps=60,
    ),
    "dtypes": Sweep(
        {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"},
        "last:reward",
        seeds=1,
        steps=60,
    ),
    "own_reward": Sweep(  # the assignment's exercise 14, 9 runs
        {"tiered, 60 steps": "", "box, 60 steps": "--accuracy box", "ours, 60 steps": ""},
        "giou box boxonly points",
        seeds=3,
        steps=60,
    ),
    "variants": Sweep(  # the assignment's exercise 15, 20 runs
        {"mask": "", "Dr. GRPO": "", "GSPO": "--normalise sequence", "CISPO": ""},
        "giou ciou box points last:iou mean:kl",
        seeds=5,
    ),
}
# The reward reads thousandths, while the policy answers in pixels. No flag does this.
PATCH = "import sys, samr1_mini as s; s.Policy.extent = 1000; s.main(sys.argv[1:])"
VARIANTS = ["-m", "assignment.variants"]  # reference solutions, which hand-outs do not have
PROGRAMS = {  # of the settings that are not only flags of samr1_mini.py
    "wrong coordinates": ["-c", PATCH],
    "ours, 60 steps": [*VARIANTS, "own_reward"],
    "Dr. GRPO": [*VARIANTS, "dr_grpo"],
    "GSPO": [*VARIANTS, "gspo"],
    "CISPO": [*VARIANTS, "cispo"],
}


def run_folder(out: Path, name: str, seed: int) -> Path:
    """The folder of one run of the sweep in `out`."""
    return out / f"{re.sub('[^a-zA-Z0-9.]+', '-', name)}-{seed}"


def read_run(run: Path) -> dict | None:
    """eval.json, the rows of metrics.jsonl and the folder of a finished run, else None."""
    file = run / "eval.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    metrics = read_rows(run / "metrics.jsonl", {"step": int})
    return results | {"metrics": metrics, "folder": run} if "after" in results else None


def train(run: Path, name: str, flags: str) -> None:
    """Train a setting in a process, or resume its run. Raises UserError if training fails."""
    if (run / "checkpoint" / "state.pt").is_file():
        flags = "--resume"
    elif (run / "config.json").is_file():
        shutil.rmtree(run)  # killed before its first checkpoint
    program = PROGRAMS.get(name, ["samr1_mini.py"])
    command = [sys.executable, *program, "train", "--out", str(run), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = " ".join(result.stderr.splitlines()[-2:])
        raise UserError(f"{run}: exit code {result.returncode}, {last}; the same command continues")


def train_missing(sweep: Sweep, out: Path, jobs: int) -> None:
    """Train all runs of a sweep that are not finished, `jobs` at a time.

    After Ctrl-C or an error no other run starts. Those that have started save and stop, or finish.
    """

    def train_one(missing: tuple[str, int]) -> None:
        name, seed = missing
        flags = f"--steps {sweep.steps} --seed {seed} {sweep.settings[name]}"
        train(run_folder(out, name, seed), name, flags)

    pairs = [(name, seed) for seed in range(sweep.seeds) for name in sweep.settings]
    missing = [pair for pair in pairs if read_run(run_folder(out, *pair)) is None]
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(train_one, missing), "sweep", len(missing), unit="run"))


def steps_until(values: list[float], mark: float) -> float:
    """The first step (from 1) at which the centred mean over WINDOW steps exceeds `mark`, or inf.

    values: one for each step, at least WINDOW of them.

    >>> steps_until([0.0] * 20 + [1.0] * 20, mark=0.5)
    21
    """
    means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    above = np.flatnonzero(means > mark)
    return int(above[0]) + WINDOW // 2 + 1 if len(above) else float("inf")


def value(run: dict, column: str) -> float:
    """A number of a finished run: "steps" until the sampled mask IoU exceeds MARK, "last:NAME" or
    "mean:NAME", the mean of a metric over the last steps or over all, or a metric of eval.json."""
    kind, _, name = column.partition(":")
    if kind == "steps":
        return steps_until([row["iou"] for row in run["metrics"]], MARK)
    if kind in ("last", "mean"):
        rows = run["metrics"][-LAST:] if kind == "last" else run["metrics"]
        return statistics.mean(row[name] for row in rows)
    return run["after"][column]


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds; the median if one of them is infinite.

    >>> cell([0.5, 0.6, 0.7]), cell([0.5]), cell([66, 6, float("inf")])
    ('0.600 ± 0.100', '0.500', 'median 66')
    """
    if any(np.isinf(values)):
        return f"median {statistics.median(values):g}"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(columns: list[str], rows: dict[str, list[dict]]) -> str:
    """A Markdown table with a row for each setting. rows: the finished runs of each setting."""
    lines = [f"| | {' | '.join(columns)} | {columns[0]} by seed |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    first = next(runs[0] for runs in rows.values() if runs)
    for name in ("before", "ceiling") if columns[0] in first["before"] else ():
        cells = [f"{first[name][c]:.3f}" if c in first[name] else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    for name, runs in rows.items():
        cells = [cell([value(run, c) for run in runs]) if runs else "not run" for c in columns]
        seeds = ", ".join(f"{value(run, columns[0]):.3f}" for run in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def draw_dots(axes, rows: dict[str, list[dict]], column: str) -> None:
    """One dot for each seed, and a line at the mean. rows: the finished runs of each setting."""
    for k, runs in enumerate(rows.values()):
        values = [value(run, column) for run in runs]
        axes.plot([k] * len(values), values, "o", color="C0", alpha=0.6)
        axes.plot(k, statistics.mean(values), "_", color="C1", markersize=24, markeredgewidth=2.5)
    axes.set_xticks(range(len(rows)), rows, fontsize=8, rotation=20)
    axes.grid(axis="y", alpha=0.3)


def draw_curves(axes, rows: dict[str, list[dict]], name: str) -> None:
    """A metric over the steps, one curve for each run."""
    for k, (label, runs) in enumerate(rows.items()):
        for run in runs:
            shown = label if run is runs[0] else None
            pictures.smooth(axes, run["metrics"], name, f"C{k}", label=shown)
    axes.set_title(name.replace("_", " "), fontsize=10)


def draw_ablations(rows: dict[str, list[dict]]) -> Figure:
    """Dots of each setting by table of the paper, and curves with and without the KL term."""
    groups = {
        "Table 3: accuracy reward": ("fixed 0.5", "fixed 0.7", "fixed 0.8", "raw IoU"),
        "Table 4: objective": ("GRPO", "token-level", "higher clip"),
        "Figure 4a: KL term": ("no KL",),
    }
    figure = Figure(figsize=(12, 10), dpi=100, layout="constrained", facecolor="white")
    grid = figure.subplots(3, 3)
    for line, column in zip(grid, ("giou", "mean:iou"), strict=False):
        for axes, (title, names) in zip(line, groups.items(), strict=True):
            shown = {name: rows[name] for name in names}
            draw_dots(axes, shown | {"the paper's": rows["mask"]}, column)
            axes.set_title(f"{title}, {column.replace(':', ' ')}", fontsize=10)
    for axes, name in zip(grid[2], ("iou", "entropy", "kl"), strict=True):
        draw_curves(axes, {"with KL": rows["mask"], "no KL": rows["no KL"]}, name)
        axes.legend(fontsize=8)
    return figure


def draw_failures(rows: dict[str, list[dict]]) -> Figure:
    """One panel for each metric, one curve for each run."""
    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained", facecolor="white")
    columns = SWEEPS["failures"].columns.split()
    for axes, column in zip(figure.subplots(2, 3).flat, columns, strict=True):
        draw_curves(axes, rows, column.removeprefix("last:"))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def target_sort(index: int) -> str:
    """The sort of a held-out scene's target: "inlay", "ring" or "covered" if it is hard (see
    `plumbing.scenes.Thing.hard`), else "plain"."""
    _, things, _, target = Shapes("heldout").scene(index)
    if not things[target].hard:
        return "plain"
    if things[target].kind == "ring":
        return "ring"
    return "inlay" if any(thing.kind == "diamond" for thing in things) else "covered"


def draw_mask_or_box(rows: dict[str, list[dict]]) -> Figure:
    """Print mask IoU and points inside for hard and plain targets. Draw one scene of each sort
    under both rewards: the first whose base answer has an IoU below 0.5. Beside them, the gIoU."""
    scorer = SamScorer(load_sam("tiny"))
    heldout = Shapes("heldout")
    s = parse_settings("train", ["--device", "cpu"])

    def answer_scenes(adapter: str) -> list[dict]:
        policy = samr1_mini.load_policy(s, adapter)
        return samr1_mini.evaluate(policy, scorer, heldout, s, SCENES, adapter)

    sorts = [target_sort(k) for k in range(SCENES)]
    print("\n| reward | targets | mask IoU | points inside |\n|---|---|---|---|")
    answers = {}  # of the first seed, by reward
    for name in ("box", "mask"):
        seeds = [answer_scenes(str(run["folder"] / "adapter")) for run in rows[name]]
        answers[name] = seeds[0]
        for title in ("hard", "plain"):
            chosen = [k for k, sort in enumerate(sorts) if (sort == "plain") == (title == "plain")]
            columns = ("iou", "points_inside")
            cells = [cell([np.mean([run[k][c] for k in chosen]) for run in seeds]) for c in columns]
            print(f"| {name} | {len(chosen)} {title} | {' | '.join(cells)} |")

    base = answer_scenes("none")
    poor = [k for k in range(SCENES) if base[k]["iou"] < 0.5]
    firsts = [next((k for k in poor if sorts[k] == sort), 0) for sort in ("inlay", "ring", "plain")]
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    draw_scenes(left, scorer, firsts, answers)
    draw_bars(right.subplots(), rows)
    return figure


def draw_bars(axes, rows: dict[str, list[dict]]) -> None:
    """Held-out gIoU: a bar for the base model and each reward, a dot for each seed, the ceiling."""
    first = rows["mask"][0]
    axes.bar("before", first["before"]["giou"], color="lightgrey")
    for name, runs in rows.items():
        values = [run["after"]["giou"] for run in runs]
        axes.bar(name, statistics.mean(values), color="C1" if name == "mask" else "C0", alpha=0.6)
        axes.plot([name] * len(values), values, "o", color="black", markersize=4)
    axes.axhline(first["ceiling"]["giou"], color="black", linestyle="--", linewidth=1)
    axes.set_title("held-out gIoU (dots: seeds, dashed: ceiling)", fontsize=10)
    axes.tick_params("x", rotation=30, labelsize=9)


def draw_scenes(figure, scorer: SamScorer, scenes: list[int], answers: dict) -> None:
    """A column for each held-out scene: its true mask, then the answer under each reward."""
    batch = [Shapes("heldout")[k] for k in scenes]
    grid = figure.subplots(1 + len(answers), len(scenes))
    for axes, sample in zip(grid[0], batch, strict=True):
        pictures.draw_mask(axes, sample.image, sample.mask, pictures.TRUTH)
        pictures.write_title(axes, sample.query)
    for line, (name, rows) in zip(grid[1:], answers.items(), strict=True):
        prompts = [[SamPrompt(rows[k]["box"], rows[k]["points"])] for k in scenes]
        overlap = scorer.score(batch, prompts, keep_masks=True)
        for k, axes in enumerate(line):
            mask = overlap.masks[k][0].numpy()
            pictures.draw_answer(axes, batch[k].image, mask, prompts[k][0])
            pictures.write_title(axes, f"{name} reward: IoU {overlap.iou[k, 0]:.2f}")
    pictures.draw_legend(figure)


PICTURES = {  # of TUTORIAL and README, in assets/
    "mask_or_box": draw_mask_or_box,
    "ablations": draw_ablations,
    "failures": draw_failures,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep")
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--table", action="store_true", help="do not train")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--figure", type=Path, help="default: assets/SWEEP.png")
    options = parser.parse_args(argv)
    name, out = options.sweep, options.out
    sweep = SWEEPS[name]
    if not options.table:
        train_missing(sweep, out, options.jobs)
    rows = {}
    for setting in sweep.settings:
        runs = [read_run(run_folder(out, setting, seed)) for seed in range(sweep.seeds)]
        rows[setting] = [run for run in runs if run]
    if not any(rows.values()):
        raise UserError(f"--out {out} has no finished run: leave out --table")
    print(table(sweep.columns.split(), rows))
    if name in PICTURES and all(rows.values()):  # half a picture replaces no whole one
        figure = options.figure or Path("assets") / f"{name}.png"
        save_figure(PICTURES[name](rows), figure)
        print(f"written to {figure}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

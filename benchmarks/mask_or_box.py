"""mask_or_box.py - the paper's point on the embedded default: reward the mask, or only the box?

    python -m benchmarks.mask_or_box [--seeds 0 1 2 3 4] [--jobs 2]    15 minutes of a core per seed
    python -m benchmarks.mask_or_box --table                           from the finished runs

The same model, scenes and steps with four accuracy rewards:

    mask                SAM's mask against the true mask, in tiers: the paper's reward
    box                 the same tiers on the IoU of the boxes; SAM is not asked
    Seg-Zero            box IoU, box distance, and points near two labelled ones; SAM is not asked
    Seg-Zero, in mask   the same, but each point must lie in the true mask: a label for every pixel

All metrics come from greedy answers on the same held-out scenes. "box only" is the mask IoU when
SAM gets the policy's box without its points.
"""

import statistics
import textwrap
import time
from pathlib import Path

from matplotlib.figure import Figure

import samr1_mini
from benchmarks.sweep import PAPER, collect, mean_and_spread, parse_arguments, train_missing
from data import Shapes
from plumbing import pictures
from plumbing.photos import load_data
from plumbing.sam import load_sam
from plumbing.scenes import points_inside
from plumbing.vlm import load_vlm
from reward import SamScorer, score_completions

SETTINGS = {
    PAPER: "",
    "box": "--accuracy box",
    "Seg-Zero": "--accuracy segzero",
    "Seg-Zero, in mask": "--accuracy segzero_mask",
}
COLOURS = {"mask": "C0", "box": "C3", "Seg-Zero": "C1", "Seg-Zero, in mask": "C2"}
COLUMNS = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "box": "box@0.5",
    "boxonly": "box only",
    "points": "points inside",
}
SCENES = 6  # in the figure: the first held-out scenes on which the mask IoU of the two policies
DIFFERENCE = 0.3  # differs by more than this, in either direction
SEARCHED = 256  # held-out scenes


def print_table(rows: dict[str, list[dict]]) -> None:
    """Print mean, standard deviation, and the gIoU of every seed."""
    first = next(runs[0] for runs in rows.values() if runs)
    for name in ("before", "ceiling"):
        print(f"{name:20}" + "".join(f"{first[name].get(k, float('nan')):16.3f}" for k in COLUMNS))
    print(f"{'':20}{''.join(f'{title:>16}' for title in COLUMNS.values())}   gIoU by seed")
    for name, runs in rows.items():
        cells = []
        for key in COLUMNS if runs else ():
            cells.append(mean_and_spread([run["after"][key] for run in runs]))
        seeds = " ".join(f"{run['after']['giou']:.3f}" for run in runs)
        print(f"{name:20}{''.join(cells)}   {seeds or 'not run'}")


def answers(run: Path, count: int):
    """Greedy answers of a trained policy on the first held-out scenes: (samples, Scores)."""
    s = samr1_mini.parse_settings("train", [])
    policy = load_vlm("tiny", "cpu", s.side, s.prompt, str(run / "adapter"))
    heldout = load_data("shapes", "heldout")
    batch = [heldout[i] for i in range(count)]
    completions = samr1_mini.sample_completions(policy, policy.read(batch), s, greedy=True)
    texts = policy.texts(completions)
    scorer = SamScorer(load_sam("tiny"))
    return batch, score_completions(scorer, batch, texts, policy.frame, keep_masks=True)


def print_by_target(answered: dict[str, list[tuple]]) -> None:
    """Print mask IoU and share of points inside for hard targets (see `data.Thing`) and others.

    answered: the results of `answers` for each run, by name of the reward.
    """
    scenes = [Shapes("heldout").scene(i) for i in range(SEARCHED)]
    hard = [things[target].hard for _, things, _, target in scenes]
    print(f"\n{'':20}{'mask IoU':>16}{'points inside':>16}   by target")
    for name, each in answered.items():
        for kind, is_hard in (("hard", True), ("plain", False)):
            chosen = [k for k, h in enumerate(hard) if h == is_hard]
            ious = [scores.iou[chosen, 0].mean().item() for _, scores in each]
            inside = [
                statistics.mean(
                    points_inside(scores.prompts[k][0].points, batch[k].mask) for k in chosen
                )
                for batch, scores in each
            ]
            cells = mean_and_spread(ious) + mean_and_spread(inside)
            print(f"{name + ', ' + kind:20}{cells}   {len(chosen)} targets")


def draw_scenes(figure, pairs: dict[str, tuple]) -> None:
    """The same scenes after training with the box reward (above) and with the mask reward.

    pairs: the results of `answers` for one run of each reward.
    """
    ious = {name: scores.iou[:, 0] for name, (_, scores) in pairs.items()}
    differ = ((ious["mask"] - ious["box"]).abs() > DIFFERENCE).nonzero()[:, 0].tolist()
    grid = figure.subplots(2, SCENES, squeeze=False)
    for line, (name, (batch, scores)) in zip(grid, pairs.items(), strict=True):
        for axes, k in zip(line, differ, strict=False):
            pictures.draw_mask(axes, batch[k].image, scores.overlap.masks[k][0], pictures.FOUND)
            pictures.draw_outline(axes, batch[k].mask, pictures.TRUTH)
            pictures.draw_prompt(axes, scores.prompts[k][0])
            axes.set_title(f"{name} reward: IoU {scores.iou[k, 0]:.2f}", fontsize=10)
            if name == "mask":
                axes.set_xlabel(textwrap.fill(batch[k].query, 26), fontsize=10)


def draw(rows: dict[str, list[dict]], pairs: dict[str, tuple]) -> Figure:
    """Above: scenes under both rewards. Below: sampled mask IoU and final metrics."""
    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    draw_scenes(upper, pairs)
    pictures.draw_legend(upper)
    curves, *panels = lower.subplots(1, 4, width_ratios=(1.6, 1, 1, 1))
    for name, runs in rows.items():
        for k, run in enumerate(runs):
            label = f"{name} reward" if k == 0 else None
            pictures.smooth(curves, run["metrics"], "iou", COLOURS[name], label=label)
    curves.set_title("sampled mask IoU during training", fontsize=10)
    curves.legend(fontsize=8)
    titles = {"giou": "held-out gIoU", "box": "held-out box@0.5", "boxonly": "gIoU of the box only"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for k, (name, runs) in enumerate(rows.items()):
            values = [run["after"][key] for run in runs]
            axes.plot([k] * len(values), values, "o", color=COLOURS[name], alpha=0.7)
        axes.set_xticks(range(len(rows)), [n.replace(", ", ",\n") for n in rows], fontsize=8)
        axes.tick_params(axis="x", rotation=35)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    options = parse_arguments("mask_or_box", __doc__.split("\n")[0], [0, 1, 2, 3, 4])
    started = time.perf_counter()
    if not options.table:
        train_missing(SETTINGS, options)
    rows = collect(SETTINGS, options)
    print_table(rows)
    if rows["mask"] and rows["box"]:
        names = ("box", "mask")
        answered = {name: [answers(run["run"], SEARCHED) for run in rows[name]] for name in names}
        print_by_target(answered)
        draw(rows, {name: each[0] for name, each in answered.items()}).savefig(options.figure)
        print(f"written to {options.figure}")
    print(f"this call took {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

"""figures.py - draw the figures of README and TUTORIAL again.

    python -m tools.figures readme RUN           scenes that the base model fails on; the curves
    python -m tools.figures seeds RUN RUN RUN    curves of several runs
    python -m tools.figures loop RUN             one group of completions, from scene to advantages
    python -m tools.figures mask                 the attention mask of a packed row
    python -m tools.figures tiers                accuracy rewards against IoU

RUN is the folder of a finished run, such as runs/shapes-tiny-0. The figure is written to
assets/NAME.png, or to --out FILE. benchmarks/ draws the other figures. assets/demo.png is a
screenshot, 1280 pixels wide: start tools.demo with --adapter RUN/adapter, ask about scene 94, and
let the trained model go on from "the green ring is at the top left".
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from data import Sample
from grpo import Completions, group_advantages, may_attend, pack
from plumbing import pictures
from plumbing.errors import UserError, exit_with_one_line
from plumbing.runs import METRICS, read_rows, save_figure
from plumbing.settings import Settings, parse_settings
from plumbing.sources import load_data
from plumbing.vlm import Prompts
from reward import accuracy_reward, score_completions
from samr1_mini import load_policy, load_scorer, sample_completions

ROOT = Path(__file__).resolve().parent.parent
PANELS = {  # of metrics.jsonl; README shows the first two
    "reward": "mean reward (of 6)",
    "iou": "IoU of sampled masks",
    "kl": "KL to the reference",
    "entropy": "entropy, nats per token",
    "length": "length, tokens",
    "equal_groups": "share of groups with equal rewards",
}
FAILED = 0.5  # README shows the first held-out scenes on which the base model's IoU is below this


NOTE = (  # beside the completions of `loop`
    "Green: the true mask. The policy never sees it. The reward compares SAM's mask with it.",
    "6. The update raises the probability of the tokens of completions with a positive advantage, "
    "and lowers it for a negative one (equation 4). The next step samples from the updated policy.",
)


def read_settings(run: Path) -> Settings:
    """The settings of a run. One that an older version did not have has its default."""
    s = parse_settings("train", [])
    vars(s).update(json.loads((run / "config.json").read_text()))
    return s


def answer(run: Path, trained: bool, samples: list[Sample], group_size: int = 0):
    """Completions of a run's policy, or of its base model: (texts, reward.Scores), B x G.

    group_size: G sampled completions with seed 0; at 0 one greedy completion.
    """
    s = read_settings(run)
    s.group_size = group_size
    policy = load_policy(s, str(run / "adapter") if trained else "none")
    prompts = policy.read(samples)
    generator = torch.Generator(policy.device).manual_seed(0)
    completions = sample_completions(policy, prompts, s, generator, greedy=not group_size)
    texts = policy.texts(completions)
    scorer = load_scorer(s, policy.device)
    return texts, score_completions(scorer, samples, texts, policy.extent, keep_masks=True)


def readme(run: Path) -> Figure:
    """The first five held-out scenes on which the base model fails, and the run's curves."""
    heldout = load_data(read_settings(run).data, "heldout")
    first = [heldout[k] for k in range(64)]
    _, scores = answer(run, False, first)
    samples = [one for one, iou in zip(first, scores.iou, strict=True) if iou < FAILED][:5]
    figure = Figure(figsize=(10, 7.8), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    for row, name in zip(upper.subplots(2, 5), ("base", "trained"), strict=True):
        _, scores = answer(run, name == "trained", samples)
        for b, (axes, one) in enumerate(zip(row, samples, strict=False)):
            mask = scores.overlap.masks[b][0].cpu().numpy()
            pictures.draw_answer(axes, one.image, mask, scores.prompts[b][0], one.mask)
            axes.set_title(f"{name}: IoU {scores.iou[b, 0]:.2f}", fontsize=10)
            axes.set_xlabel(textwrap.fill(one.query, 24) if name == "trained" else "", fontsize=10)
    pictures.draw_legend(upper)
    draw_curves(lower.subplots(1, 2), run)
    return figure


def draw_curves(grid, *runs: Path) -> None:
    """A panel for each of the first PANELS, with a curve for each run."""
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=False):
        for k, run in enumerate(runs):
            rows = read_rows(run / "metrics.jsonl", METRICS)
            label = f"seed {read_settings(run).seed}"
            pictures.smooth(axes, rows, name, f"C{k}", label=label)
        axes.set_title(title, fontsize=10)


def seeds(*runs: Path) -> Figure:
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    grid = figure.subplots(2, 3)
    draw_curves(grid, *runs)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(runs), fontsize=10)
    return figure


def loop(run: Path) -> Figure:
    """The base model's first group with at least three different rewards, among them 6."""
    heldout = load_data(read_settings(run).data, "heldout")
    batch = [heldout[k] for k in range(32)]
    texts, scores = answer(run, False, batch, group_size=4)
    rewards = scores.reward.tolist()
    b = next(b for b, row in enumerate(rewards) if len(set(row)) >= 3 and max(row) == 6)
    advantages = group_advantages(scores.reward)[b].tolist()
    figure = Figure(figsize=(11, 5.8), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    scene, note = left.subplots(2, 1, height_ratios=(1, 1.4))
    pictures.draw_mask(scene, batch[b].image, batch[b].mask, pictures.TRUTH)
    scene.set_title(f"1. image and query:\n{batch[b].query}", fontsize=9)
    note.set_axis_off()
    text = "\n\n".join(textwrap.fill(paragraph, 28) for paragraph in NOTE)
    note.text(0, 0.95, text, va="top", fontsize=9, in_layout=False)
    columns = right.subplots(3, 4, height_ratios=(0.5, 1.7, 1)).T
    for g, (text, picture, bar) in enumerate(columns):
        text.set_axis_off()
        text.set_title(f"2. completion {g + 1}", fontsize=9, loc="left")
        style = dict(va="top", fontsize=8, family="monospace", parse_math=False)
        text.text(0, 1, pictures.wrap(texts[b][g], 29), in_layout=False, **style)
        mask = scores.overlap.masks[b][g].cpu().numpy()
        pictures.draw_answer(picture, batch[b].image, mask, scores.prompts[b][g])
        picture.set_title(f"3. SAM's mask: IoU {scores.iou[b, g]:.2f}", fontsize=9)
        bar.bar([0], [advantages[g]], color="C0" if advantages[g] > 0 else "C3", width=0.5)
        bar.axhline(0, color="black", linewidth=0.8)
        bar.set(xlim=(-1, 1), ylim=(-1.6, 1.6), xticks=[], yticks=[])
        bar.set_xlabel(f"5. advantage {advantages[g]:+.2f}", fontsize=9)
        parts = [scores.accuracy[b, g], scores.think_format[b, g], scores.answer_format[b, g]]
        equation = " + ".join(f"{part:.0f}" for part in parts)
        bar.set_title(f"4. reward {equation} = {scores.reward[b, g]:.0f}", fontsize=9)
    return figure


def mask() -> Figure:
    """The mask of `grpo.pack` for a prompt of 5 tokens and completions of 3, 2 and 4 tokens."""
    ids = torch.arange(5)[None]  # (1, P)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ids.expand(3, 1, 5), None)
    kept = torch.arange(4) < torch.tensor([[3], [2], [4]])  # (G, T)
    packed = pack(prompts, Completions(torch.zeros(1, 3, 4, dtype=torch.int64), kept[None]))
    segments = packed.segments[0]  # (L,)
    shown = torch.where(may_attend(packed.segments)[0], segments + 1, 0)  # (L, L)
    L = len(segments)
    colours = ["#9aa0a6", "#4c78a8", "#f58518", "#54a24b"]
    palette = ListedColormap(["white", *colours])
    figure = Figure(figsize=(7.4, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(shown, cmap=palette, vmin=0, vmax=4, edgecolor="#cccccc")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(torch.arange(L) + 0.5, packed.positions[0, 0].tolist())
    for k, colour in enumerate(colours):
        name = f"completion {k}" if k else "prompt"
        places = (segments == k).nonzero()[:, 0].tolist()
        middle = (places[0] + places[-1] + 1) / 2
        style = dict(fontsize=9, backgroundcolor=colour + "60")
        axes.text(middle, -0.5, name.replace(" ", "\n"), ha="center", va="bottom", **style)
        axes.text(L + 0.2, middle, name, ha="left", va="center", **style)
        axes.axhline(places[0], color="black", linewidth=1)
        axes.axvline(places[0], color="black", linewidth=1)
    axes.set_xlabel("key: position of the token (each completion continues after the prompt)")
    axes.set_ylabel("query: position of the token")
    return figure


def tiers() -> Figure:
    figure = Figure(figsize=(7.5, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    iou = torch.linspace(0, 1, 1001)
    for kind in ("0.5", "0.7", "0.8", "iou", "tiered"):  # tiered on top
        label = {"tiered": "tiered (paper)", "iou": "4 × IoU"}.get(kind, f"4 above {kind}")
        style = dict(linewidth=3, color="black") if kind == "tiered" else dict(linewidth=1.2)
        axes.plot(iou, accuracy_reward(iou, kind), label=label, **style)
    axes.set_xlabel("mask IoU")
    axes.set_ylabel("accuracy reward")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure


FIGURES = {"readme": readme, "seeds": seeds, "loop": loop, "mask": mask, "tiers": tiers}


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.figures", None, __doc__, formatter_class=form)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("run", type=Path, nargs="*", help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write (default: assets/FIGURE.png)")
    options = parser.parse_args(argv)
    name = options.figure
    count = {"mask": 0, "tiers": 0}.get(name, 1)
    if len(options.run) != count and not (name == "seeds" and options.run):
        raise UserError(f"{name} needs {count} folder(s) of finished runs")
    for run in options.run:
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run} is not a finished run: it has no metrics.jsonl")
    out = options.out or ROOT / "assets" / f"{name}.png"
    save_figure(FIGURES[name](*options.run), out)
    print(f"written to {out}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

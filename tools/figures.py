"""figures.py - draw the figures of README and TUTORIAL again.

    python -m tools.figures readme RUN           scenes that the base model fails on; the curves
    python -m tools.figures sheet RUN            the first held-out scenes before and after training
    python -m tools.figures seeds RUN RUN RUN    curves of several runs
    python -m tools.figures loop RUN             one group of completions, from scene to advantages
    python -m tools.figures mask                 the attention mask of a packed row
    python -m tools.figures tiers                accuracy rewards against IoU

RUN is the folder of a finished run, such as runs/shapes-tiny-0. The figure is written to
assets/NAME.png, or to --out FILE. benchmarks/ablations.py draws assets/ablations.png, and
benchmarks/failures.py draws assets/failures.png. assets/demo.png is a screenshot, 1280 pixels wide:
start tools.demo with --adapter RUN/adapter, press Ask, and let the trained model go on from the
thought about the triangle.
"""

import argparse
import json
import textwrap
from dataclasses import fields
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from data import Sample
from grpo import Completions, group_advantages, may_attend, pack
from plumbing import pictures
from plumbing.photos import load_data
from plumbing.runs import save_figure
from plumbing.sam import load_sam
from plumbing.settings import Settings
from plumbing.vlm import Prompts, load_vlm
from reward import SamScorer, Scores, accuracy_reward, score_completions
from samr1_mini import sample_completions

ROOT = Path(__file__).resolve().parent.parent
FAILED = 0.5  # README shows the first held-out scenes on which the base model's IoU is below this


def read_settings(run: Path) -> Settings:
    config = json.loads((run / "config.json").read_text())
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: config[name] for name in names & set(config)})


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def answer(run: Path, trained: bool, samples: list[Sample], group_size: int = 0):
    """Completions of a run's policy, or of its base model: (texts, reward.Scores), B x G.

    group_size: G sampled completions with seed 0; at 0 one greedy completion.
    """
    s = read_settings(run)
    s.group_size = group_size
    adapter = str(run / "adapter") if trained else "none"
    policy = load_vlm(s.vlm, s.device, s.side, s.prompt, adapter, s.dtype, s.load_in_4bit)
    prompts, generator = policy.read(samples), torch.Generator(policy.device).manual_seed(0)
    completions = sample_completions(policy, prompts, s, generator, greedy=not group_size)
    texts = policy.texts(completions)
    scorer = SamScorer(load_sam(s.sam), policy.device)
    return texts, score_completions(scorer, samples, texts, policy.frame, keep_masks=True)


def draw_answers(axes, samples: list[Sample], scores: Scores, name: str, queries: bool) -> None:
    """One picture per sample: SAM's mask, the outline of the truth, box and points."""
    for b, (ax, one) in enumerate(zip(axes, samples, strict=True)):
        pictures.draw_mask(ax, one.image, scores.overlap.masks[b][0].cpu().numpy(), pictures.FOUND)
        pictures.draw_outline(ax, one.mask, pictures.TRUTH)
        pictures.draw_prompt(ax, scores.prompts[b][0])
        ax.set_title(f"{name}: IoU {scores.iou[b, 0]:.2f}", fontsize=10)
        ax.set_xlabel(textwrap.fill(one.query, 24) if queries else "", fontsize=10)


def readme(run: Path, count: int = 5, search: int = 64) -> Figure:
    """The first held-out scenes on which the base model fails, and the run's curves."""
    heldout = load_data(read_settings(run).data, "heldout")
    first = [heldout[k] for k in range(search)]
    _, scores = answer(run, False, first)
    failed = (scores.iou[:, 0] < FAILED).nonzero()[:count, 0].tolist()
    samples = [first[k] for k in failed]
    figure = Figure(figsize=(10, 7.8), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    grid = upper.subplots(2, count, squeeze=False)
    for k, name in enumerate(("base", "trained")):
        _, scores = answer(run, name == "trained", samples)
        draw_answers(grid[k], samples, scores, name, name == "trained")
    pictures.draw_legend(upper)
    panels = {"reward": "mean reward (of 6)", "iou": "IoU of sampled masks"}
    for axes, (name, title) in zip(lower.subplots(1, 2), panels.items(), strict=True):
        pictures.smooth(axes, read_metrics(run), name, "C0")
        axes.set_title(title, fontsize=10)
    return figure


def sheet(run: Path, count: int = 10) -> Figure:
    """The first held-out scenes, without any choice: above the base model, below the trained."""
    heldout = load_data(read_settings(run).data, "heldout")
    samples = [heldout[k] for k in range(count)]
    figure = Figure(figsize=(10, 10.6), dpi=110, layout="constrained")
    grid = figure.subplots(4, count // 2)
    axes = [[*grid[0], *grid[2]], [*grid[1], *grid[3]]]
    for k, name in enumerate(("base", "trained")):
        _, scores = answer(run, name == "trained", samples)
        draw_answers(axes[k], samples, scores, name, name == "trained")
    pictures.draw_legend(figure)
    return figure


def seeds(*runs: Path) -> Figure:
    panels = {
        "reward": "mean reward (of 6)",
        "iou": "IoU of sampled masks",
        "kl": "KL to the reference",
        "entropy": "entropy, nats per token",
        "length": "length, tokens",
        "equal_groups": "share of groups with equal rewards",
    }
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for k, run in enumerate(runs):
            label = f"seed {read_settings(run).seed}"
            pictures.smooth(axes, read_metrics(run), name, f"C{k}", label=label)
        axes.set_title(title, fontsize=10)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(runs), fontsize=10)
    return figure


def loop(run: Path) -> Figure:
    """The base model's first group with at least three different rewards, among them 6."""
    heldout = load_data(read_settings(run).data, "heldout")
    batch = [heldout[k] for k in range(32)]
    texts, scores = answer(run, False, batch, group_size=4)
    rewards = scores.reward.tolist()
    b = next(b for b, row in enumerate(rewards) if len(set(row)) >= 3 and max(row) == 6)
    figure = Figure(figsize=(11, 5.8), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    draw_scene_and_note(left, batch[b])
    advantages = group_advantages(scores.reward)[b].tolist()
    columns = right.subplots(3, 4, height_ratios=(0.5, 1.7, 1)).T
    for g, (text, picture, bar) in enumerate(columns):
        text.set_axis_off()
        text.set_title(f"2. completion {g + 1}", fontsize=9, loc="left")
        style = dict(va="top", fontsize=8, family="monospace", parse_math=False)
        text.text(0, 1, pictures.wrap(texts[b][g], 31), in_layout=False, **style)
        mask = scores.overlap.masks[b][g].cpu().numpy()
        pictures.draw_mask(picture, batch[b].image, mask, pictures.FOUND)
        pictures.draw_prompt(picture, scores.prompts[b][g])
        picture.set_title(f"3. SAM's mask: IoU {scores.iou[b, g]:.2f}", fontsize=9)
        names = ("accuracy", "think_format", "answer_format")
        parts = [getattr(scores, name)[b, g].item() for name in names]
        equation = " + ".join(f"{part:.0f}" for part in parts)
        draw_advantage(bar, advantages[g])
        bar.set_title(f"4. reward {equation} = {sum(parts):.0f}", fontsize=9)
    return figure


def draw_scene_and_note(figure, sample: Sample) -> None:
    """The left column of `loop`."""
    scene, note = figure.subplots(2, 1, height_ratios=(1, 1.4))
    pictures.draw_mask(scene, sample.image, sample.mask, pictures.TRUTH)
    scene.set_title(f"1. image and query:\n{sample.query}", fontsize=9)
    note.set_axis_off()
    paragraphs = (
        "Green: the true mask. The policy never sees it. The reward compares SAM's mask with it.",
        "6. The update raises the probability of the tokens of completions with a positive "
        "advantage, and lowers it for a negative one (equation 4). The next step samples from the "
        "updated policy.",
    )
    text = "\n\n".join(textwrap.fill(paragraph, 28) for paragraph in paragraphs)
    note.text(0, 0.95, text, va="top", fontsize=9, in_layout=False)


def draw_advantage(axes, advantage: float) -> None:
    axes.bar([0], [advantage], color="C0" if advantage > 0 else "C3", width=0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1, 1)
    axes.set_ylim(-1.6, 1.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"5. advantage {advantage:+.2f}", fontsize=9)


def example_row() -> tuple[torch.Tensor, ...]:
    """`grpo.pack` of a prompt of 5 tokens and completions of 3, 2 and 4 tokens."""
    P, lengths = 5, (3, 2, 4)
    positions = torch.arange(P).expand(3, 1, P)
    prompts = Prompts(torch.arange(P)[None], torch.ones(1, P, dtype=torch.bool), positions, None)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (G, T)
    ids = torch.zeros(1, *mask.shape, dtype=torch.int64)
    return pack(prompts, Completions(ids, mask[None]))


def mask() -> Figure:
    _, positions, segments, _, _ = example_row()
    seen = may_attend(segments)[0]  # (L, L)
    L = len(seen)
    names = ["prompt", "completion 1", "completion 2", "completion 3"]
    colours = ["#9aa0a6", "#4c78a8", "#f58518", "#54a24b"]
    figure = Figure(figsize=(7.4, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown = torch.where(seen, segments[0][None] + 1, 0)
    axes.imshow(shown, cmap=ListedColormap(["white", *colours]), vmin=0, vmax=4)
    ticks = positions[0, 0].tolist()
    axes.set_xticks(range(L), ticks)
    axes.set_yticks(range(L), ticks)
    axes.set_xticks([x - 0.5 for x in range(L)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(L)], minor=True)
    axes.grid(which="minor", color="#cccccc", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = (segments[0] == k).nonzero()[:, 0].tolist()
        middle = (places[0] + places[-1]) / 2
        style = dict(fontsize=9, backgroundcolor=colour + "60")
        axes.text(middle, -1, name.replace(" ", "\n"), ha="center", va="bottom", **style)
        axes.text(L - 0.3, middle, name, ha="left", va="center", **style)
        if k:
            axes.axhline(places[0] - 0.5, color="black", linewidth=1)
            axes.axvline(places[0] - 0.5, color="black", linewidth=1)
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


FIGURES = {
    "readme": readme,
    "sheet": sheet,
    "seeds": seeds,
    "loop": loop,
    "mask": mask,
    "tiers": tiers,
}


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.figures", None, __doc__, formatter_class=form)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("run", type=Path, nargs="*", help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write (default: assets/FIGURE.png)")
    options = parser.parse_args(argv)
    needed = {"mask": 0, "tiers": 0, "seeds": len(options.run) or 1}.get(options.figure, 1)
    if len(options.run) != needed:
        parser.exit(2, f"figures.py: {options.figure} needs {needed} folder(s) of finished runs\n")
    for run in options.run:
        if missing := [f for f in ("config.json", "metrics.jsonl") if not (run / f).is_file()]:
            parser.exit(2, f"figures.py: {run} is not a finished run: it has no {missing[0]}\n")
    out = options.out or ROOT / "assets" / f"{options.figure}.png"
    save_figure(FIGURES[options.figure](*options.run), out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()

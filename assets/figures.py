"""figures.py - redraw the figures of README and TUTORIAL.

    python assets/figures.py readme RUN             held-out scenes before and after, and the run's rewards
    python assets/figures.py sheet RUN              more of them
    python assets/figures.py seeds RUN RUN RUN      the curves of several runs
    python assets/figures.py loop RUN               one group of completions on its way from the scene to the gradient
    python assets/figures.py mask                   the attention mask of a packed row
    python assets/figures.py tiers                  accuracy rewards against IoU

RUN is the folder of a finished run, such as runs/shapes-tiny-0. Each writes assets/NAME.png, or --out FILE. assets/ablations.png
is drawn by benchmarks/ablations.py, assets/failures.png by benchmarks/failures.py.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import samr1_mini  # noqa: E402
from assets import pictures  # noqa: E402
from grpo import Completions, Prompts, group_advantages, may_attend, pack  # noqa: E402
from reward import ACCURACY_REWARDS, accuracy_reward, score_completions  # noqa: E402


def settings(run: Path, trained: bool) -> samr1_mini.Settings:
    """Those of a run, with its adapter or without."""
    config = json.loads((run / "config.json").read_text())
    return samr1_mini.Settings(**(config | {"adapter": str(run / "adapter") if trained else "none", "resume": False}))


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def greedy_answers(run: Path, trained: bool, count: int):
    """Greedy answers on the first held-out scenes: (samples, scores)."""
    s = settings(run, trained)
    policy, scorer, _, heldout = samr1_mini.load_all(s)
    batch = [heldout[i] for i in range(count)]
    texts = policy.texts(samr1_mini.sample(policy, policy.read(batch), s, greedy=True))
    return batch, score_completions(scorer, batch, texts, policy.frame, keep_masks=True)


def before_and_after(grids: list, run: Path, count: int) -> None:
    """Fill pairs of rows of axes: above the base policy's mask, below the trained one's."""
    for trained in (False, True):
        batch, scores = greedy_answers(run, trained, count)
        axes = [ax for grid in grids for ax in grid[int(trained)]]
        for k, (ax, one) in enumerate(zip(axes, batch, strict=True)):
            pictures.draw_mask(ax, one.image, scores.overlap.masks[k][0].numpy(), pictures.FOUND)
            pictures.draw_outline(ax, one.mask, pictures.TRUTH)
            pictures.draw_prompt(ax, scores.prompts[k][0])
            ax.set_title(f"{'trained' if trained else 'base'}: IoU {scores.iou[k, 0]:.2f}", fontsize=10)
            ax.set_xlabel(textwrap.fill(one.query, 28) if trained else "", fontsize=9)


def readme(run: Path) -> Figure:
    figure = Figure(figsize=(11, 8.2), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.1, 1))
    before_and_after([upper.subplots(2, 5)], run, 5)
    for axes, (name, title) in zip(lower.subplots(1, 2), (("reward", "mean reward (of 6)"), ("iou", "sampled mask IoU")), strict=True):
        pictures.smooth(axes, log(run), name, "C0")
        axes.set_title(title, fontsize=10)
    return figure


def sheet(run: Path) -> Figure:
    figure = Figure(figsize=(13, 11.5), dpi=100, layout="constrained")
    before_and_after([part.subplots(2, 6) for part in figure.subfigures(2, 1)], run, 12)
    return figure


def seeds(*runs: Path) -> Figure:
    panels = {
        "reward": "mean reward (of 6)", "iou": "sampled mask IoU", "kl": "KL to the reference",
        "entropy": "entropy, nats a token", "length": "length, tokens", "equal_groups": "share of groups with equal rewards",
    }  # fmt: skip
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for k, run in enumerate(runs):
            pictures.smooth(axes, log(run), name, f"C{k}", label=f"seed {settings(run, False).seed}")
        axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return figure


def loop(run: Path) -> Figure:
    """The base policy's first group of sampled completions whose rewards differ well: text, mask, reward, advantage."""
    s = settings(run, trained=False)
    s.group_size = 4
    policy, scorer, _, heldout = samr1_mini.load_all(s)
    batch = [heldout[i] for i in range(32)]
    completions = samr1_mini.sample(policy, policy.read(batch), s, torch.Generator(policy.device).manual_seed(0))
    texts = policy.texts(completions)
    scores = score_completions(scorer, batch, texts, policy.frame, keep_masks=True)
    b = next(b for b, rewards in enumerate(scores.reward.tolist()) if len(set(rewards)) >= 3 and max(rewards) == 6)
    advantages = group_advantages(scores.reward)[b]
    figure = Figure(figsize=(11, 5.8), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(1, 2, width_ratios=(1, 4))
    scene, note = upper.subplots(2, 1, height_ratios=(1, 1.4))
    pictures.draw_mask(scene, batch[b].image, batch[b].mask, pictures.TRUTH)
    scene.set_title(f"1. image and query:\n“{batch[b].query}”", fontsize=9)
    note.set_axis_off()
    note.text(0, 0.95, textwrap.fill("Green: the true mask. The policy never sees it; the reward compares SAM's mask with it.", 26)
              + "\n\n" + textwrap.fill("6. The tokens of a completion with an advantage above 0 are made likelier, those of one below 0 less likely "
                                       "(equation 4), and the next step samples from the changed policy.", 26), va="top", fontsize=9)  # fmt: skip
    for g, (said, masked, earned) in enumerate(lower.subplots(3, 4, height_ratios=(0.75, 1.6, 1)).T):
        said.set_axis_off()
        said.text(0, 1, textwrap.fill(texts[b][g], 28), va="top", fontsize=7.5, family="monospace")
        pictures.draw_mask(masked, batch[b].image, scores.overlap.masks[b][g].numpy(), pictures.FOUND)
        pictures.draw_prompt(masked, scores.prompts[b][g])
        masked.set_title(f"3. SAM's mask: IoU {scores.iou[b, g]:.2f}", fontsize=9)
        parts = [getattr(scores, name)[b, g] for name in ("accuracy", "think_format", "answer_format")]
        earned.bar([0], [advantages[g]], color="C0" if advantages[g] > 0 else "C3", width=0.5)
        earned.axhline(0, color="black", linewidth=0.8)
        earned.set_xlim(-1, 1)
        earned.set_ylim(-1.6, 1.6)
        earned.set_xticks([])
        earned.set_title(f"4. reward {' + '.join(f'{part:.0f}' for part in parts)} = {sum(parts):.0f}", fontsize=9)
        earned.set_xlabel(f"5. advantage {advantages[g]:+.2f}", fontsize=9)
        said.set_title(f"2. completion {g + 1}", fontsize=9, loc="left")
    return figure


def example_row() -> tuple[torch.Tensor, ...]:
    """`grpo.pack` of a prompt of 5 tokens and completions of 3, 2 and 4."""
    P, lengths = 5, (3, 2, 4)
    prompts = Prompts(torch.arange(P)[None], torch.ones(1, P, dtype=torch.bool), torch.arange(P).expand(3, 1, P), None)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (G, T)
    return pack(prompts, Completions(torch.zeros(1, *mask.shape, dtype=torch.int64), mask[None]))


def mask() -> Figure:
    _, positions, segments, _, _ = example_row()
    seen = may_attend(segments)[0]  # (L, L)
    L = len(seen)
    names = ["prompt", "completion 1", "completion 2", "completion 3"]
    colours = ["#9aa0a6", "#4c78a8", "#f58518", "#54a24b"]
    figure = Figure(figsize=(7.4, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(torch.where(seen, segments[0][None] + 1, 0), cmap=ListedColormap(["white", *colours]), vmin=0, vmax=4)
    axes.set_xticks(range(L), positions[0, 0].tolist())
    axes.set_yticks(range(L), positions[0, 0].tolist())
    axes.set_xticks([x - 0.5 for x in range(L)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(L)], minor=True)
    axes.grid(which="minor", color="#cccccc", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = (segments[0] == k).nonzero()[:, 0].tolist()
        middle = (places[0] + places[-1]) / 2
        axes.text(middle, -1, name.replace(" ", "\n") if k else name, ha="center", va="bottom", color="black", fontsize=9, backgroundcolor=colour + "60")
        axes.text(L - 0.3, middle, name, ha="left", va="center", fontsize=9, backgroundcolor=colour + "60")
        if k:
            axes.axhline(places[0] - 0.5, color="black", linewidth=1)
            axes.axvline(places[0] - 0.5, color="black", linewidth=1)
    axes.set_xlabel("key: the position it is told (completions restart after the prompt)")
    axes.set_ylabel("query: the position it is told")
    return figure


def tiers() -> Figure:
    figure = Figure(figsize=(7.5, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    iou = torch.linspace(0, 1, 1001)
    for kind in sorted(ACCURACY_REWARDS, key=lambda kind: kind == "tiered"):  # the paper's on top
        label = {"tiered": "tiered (paper)", "iou": "4 × IoU"}.get(kind, f"4 above {kind}")
        axes.plot(iou, accuracy_reward(iou, kind), label=label, linewidth=3 if kind == "tiered" else 1.2, color="black" if kind == "tiered" else None)
    axes.set_xlabel("mask IoU")
    axes.set_ylabel("accuracy reward")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure


FIGURES = {"readme": readme, "sheet": sheet, "seeds": seeds, "loop": loop, "mask": mask, "tiers": tiers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("run", type=Path, nargs="*", help="folder of a finished run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    needed = {"mask": 0, "tiers": 0, "seeds": len(options.run) or 1}.get(options.figure, 1)
    if len(options.run) != needed or not all((run / "config.json").is_file() for run in options.run):
        parser.error(f"{options.figure} takes {needed} folder(s) of finished runs")
    samr1_mini.save_figure(FIGURES[options.figure](*options.run), options.out or HERE / f"{options.figure}.png")


if __name__ == "__main__":
    main()

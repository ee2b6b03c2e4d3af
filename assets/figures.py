"""figures.py - redraw README's picture from a finished run.

    python assets/figures.py runs/shapes-tiny-0 [--out assets/readme.png]

Above: the first held-out scenes, with the greedy answer of the base model and of the trained one. Below: the run's rewards.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import samr1_mini  # noqa: E402
from assets import pictures  # noqa: E402
from reward import score_completions  # noqa: E402

SCENES = 5


def answers(run: Path, adapter: str):
    """Greedy answers of one policy on the first held-out scenes: (samples, scores)."""
    config = json.loads((run / "config.json").read_text())
    s = samr1_mini.Settings(**(config | {"adapter": adapter}))
    policy, scorer, _, heldout = samr1_mini.load_all(s)
    batch = [heldout[i] for i in range(SCENES)]
    texts = policy.texts(samr1_mini.sample(policy, policy.read(batch), s, greedy=True))
    return batch, score_completions(scorer, batch, texts, policy.frame, keep_masks=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=HERE / "readme.png")
    options = parser.parse_args()
    figure = Figure(figsize=(11, 8.2), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.1, 1))
    grid = upper.subplots(2, SCENES)
    for row, (label, adapter) in zip(grid, (("base", "none"), ("trained", str(options.run / "adapter"))), strict=True):
        batch, scores = answers(options.run, adapter)
        for k, (axes, one) in enumerate(zip(row, batch, strict=True)):
            pictures.draw_mask(axes, one.image, scores.overlap.masks[k][0].numpy(), pictures.FOUND)
            pictures.draw_prompt(axes, scores.prompts[k][0])
            axes.set_title(f"{label}: IoU {scores.iou[k, 0]:.2f}", fontsize=10)
            axes.set_xlabel(textwrap.fill(one.query, 28) if label == "trained" else "", fontsize=9)
    rows = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    for axes, (name, title) in zip(lower.subplots(1, 2), (("reward", "mean reward (of 6)"), ("iou", "sampled mask IoU")), strict=True):
        pictures.smooth(axes, rows, name, "C0")
        axes.set_title(title, fontsize=10)
    samr1_mini.save_figure(figure, options.out)


if __name__ == "__main__":
    main()

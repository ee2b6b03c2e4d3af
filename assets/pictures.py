"""pictures.py - how runs and answers are drawn. Functions return matplotlib figures; samr1_mini.py saves them."""

import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

TRUTH, FOUND = "lime", "magenta"  # outlines; no drawn shape has these colours


def draw_mask(axes, image: Image.Image, mask: np.ndarray, colour: str) -> None:
    """The image, darkened outside of the mask (H, W), and the mask's outline."""
    pixels = np.asarray(image) * np.where(mask[..., None], 1.0, 0.5)
    axes.imshow(pixels.astype(np.uint8))
    axes.autoscale(False)  # what is drawn on top does not change the frame
    draw_outline(axes, mask, colour)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_outline(axes, mask: np.ndarray, colour: str) -> None:
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=colour, linewidths=1.5)


def draw_prompt(axes, prompt) -> None:
    """A SamPrompt's box and points. Their coordinates run from a pixel's edge, matplotlib's from its middle."""
    if prompt.box:
        x1, y1, x2, y2 = prompt.box
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color="white", linewidth=1.2))
    for x, y in prompt.points:
        axes.plot(x - 0.5, y - 0.5, "o", color="white", markeredgecolor="black", markersize=4)


def plain(text: str) -> str:
    """A completion as text that matplotlib draws as it stands: dollar signs would start a formula."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


def groups(batch: list, texts: list[list[str]], scores) -> Figure:
    """A row a sample: the truth, then each completion's mask, prompt, reward and text. scores: reward.Scores with masks."""
    columns = 1 + len(texts[0])
    figure = Figure(figsize=(1.9 * columns, 2.8 * len(batch)), dpi=110, layout="constrained")
    for b, (row, one) in enumerate(zip(figure.subplots(len(batch), columns, squeeze=False), batch, strict=True)):
        draw_mask(row[0], one.image, one.mask, TRUTH)
        row[0].set_title("truth", fontsize=8)
        row[0].set_xlabel(textwrap.fill(plain(one.query), 26), fontsize=8)
        for g, axes in enumerate(row[1:]):
            draw_mask(axes, one.image, scores.overlap.masks[b][g].cpu().numpy(), FOUND)
            draw_prompt(axes, scores.prompts[b][g])
            axes.set_title(f"reward {scores.reward[b, g]:.3g}, IoU {scores.iou[b, g]:.2f}", fontsize=8)
            axes.set_xlabel(textwrap.fill(plain(texts[b][g])[:200], 34), fontsize=5.5)
    return figure


def smooth(axes, rows: list[dict], name: str, colour: str, label: str | None = "") -> None:
    """A column of metrics.jsonl over the steps. Faint: each step; bold: running mean. Its label is the column's name, or none."""
    steps, values = [row["step"] for row in rows], np.array([row[name] for row in rows], float)  # a missing value becomes NaN
    window = max(1, min(15, len(rows) // 8))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker="." if len(rows) < 3 else None)
    mean = np.convolve(values, np.ones(window) / window, "valid")
    axes.plot(steps[window - 1 :], mean, color=colour, label=name.replace("_", " ") if label == "" else label)
    axes.set_xlabel("step", fontsize=8)


def curves(rows: list[dict]) -> Figure:
    """Reward and its parts, IoU, KL, entropy, length, and clip shares over the steps of metrics.jsonl."""
    panels = {
        "reward and its parts": ("reward", "accuracy", "think_format", "answer_format"),
        "sampled mask IoU": ("iou",),
        "KL to the reference": ("kl",),
        "entropy, nats a token": ("entropy",),
        "length, tokens": ("length",),
        "share of tokens clipped": ("clip_low", "clip_high"),
    }
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for k, name in enumerate(names):
            smooth(axes, rows, name, f"C{k}")
        axes.set_title(title, fontsize=10)
        if len(names) > 1:
            axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.13))
        if names == ("kl",):
            axes.set_yscale("symlog", linthresh=1e-3)  # k3 is unbounded: one token that has become improbable makes a spike
    return figure


def sheet(rows: dict[str, list[tuple]]) -> Figure:
    """A row for each title, of (sample, prompt, mask (H, W), IoU): what was found, and the outline of the truth."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(3 * columns, 3.2 * len(rows)), dpi=100, layout="constrained")
    for line, (title, answers) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axes in line[len(answers) :]:
            axes.set_axis_off()
        for axes, (one, prompt, mask, iou) in zip(line, answers, strict=False):
            draw_mask(axes, one.image, mask, FOUND)
            draw_outline(axes, one.mask, TRUTH)
            draw_prompt(axes, prompt)
            axes.set_title(f"{title}: IoU {iou:.2f}", fontsize=9)
            axes.set_xlabel(textwrap.fill(plain(one.query)[:160], 44), fontsize=7)
    return figure


def found(image: Image.Image, query: str, mask: np.ndarray, prompt, said: str) -> Figure:
    """One picture with what a query found in it, and what the policy said."""
    figure = Figure(figsize=(7, 7 * image.height / image.width + 1.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    draw_mask(axes, image, mask, FOUND)
    draw_prompt(axes, prompt)
    axes.set_title(textwrap.fill(plain(query)[:240], 60))
    axes.set_xlabel(textwrap.fill(plain(said)[:800], 90), fontsize=8)
    return figure

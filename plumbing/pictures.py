"""pictures.py - figures of runs and of answers, and the record of a step's rollouts.

The functions return matplotlib figures or draw on matplotlib axes; plumbing.runs.save_figure writes
a figure to a file. `record_rollouts` returns plain data for RUN/rollouts/step_*.json, which
`python -m tools.report RUN` shows as a page.
"""

import base64
import io
import re
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

TRUTH, FOUND = "lime", "magenta"  # colours of outlines; the drawn scenes use neither
EDGE = [withStroke(linewidth=3, foreground="black")]  # lines stay visible on any background
TEXT = 9  # points; smaller text cannot be read on a screen
LINES = 10  # of a completion below its picture; the report page shows all of them
WINDOW = 15  # steps; the longest running mean
PANELS = {  # of `curves`: title and metrics
    "reward and its parts": ("reward", "accuracy", "think_format", "answer_format"),
    "sampled mask IoU": ("iou",),
    "KL to the reference": ("kl",),
    "entropy, nats per token": ("entropy",),
    "length, tokens": ("length",),
    "share of tokens clipped": ("clip_low", "clip_high"),
}

# Pieces of a completion that stay on one line: a tag, a JSON key with its list, a key or another
# string, a number with the comma or brackets after it, a word.
PIECES = re.compile(
    r"""</?\w+>|[{,]?["']\w*["']:\s*\[[-+\d.,\seE]{0,24}\][,}]*|[{,]?["'][^"'<>]{0,24}["'][:,}]*"""
    r"|[-+]?\d[\d.eE+-]*[],}]*|\w+|\s+|."
)

NUMBERS = ("reward", "accuracy", "think_format", "answer_format", "iou")
LONGEST_SIDE = 640  # pixels; recorded pictures are scaled down to this
PHOTOGRAPH = 256  # pixels; a recorded picture with a longer side is a JPEG, any other a PNG

# ----------------------------------------------------------------------------------------------
# Parts of figures
# ----------------------------------------------------------------------------------------------


def draw_mask(axes, image: Image.Image, mask: np.ndarray, colour: str) -> None:
    """The image, darkened outside of the mask (H, W) bool, and the mask's outline."""
    pixels = np.asarray(image) * np.where(mask[..., None], 1.0, 0.5)
    axes.imshow(pixels.astype(np.uint8))
    axes.autoscale(False)  # later drawings do not change the frame
    draw_outline(axes, mask, colour)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_outline(axes, mask: np.ndarray, colour: str) -> None:
    """The outline of a mask (H, W) bool, with a dark edge. An empty mask has none."""
    if mask.any():
        height, width = mask.shape
        padded = np.pad(mask, 1)  # the outline is closed also where the mask meets the border
        x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
        lines = axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.5)
        lines.set_path_effects(EDGE)


def draw_prompt(axes, prompt) -> None:
    """The box and points of a reward.SamPrompt, in image pixels.

    Their coordinates start at the edge of the first pixel. Those of matplotlib start at its middle.
    """
    if prompt.box:
        x1, y1, x2, y2 = prompt.box
        corner, size = (x1 - 0.5, y1 - 0.5), (x2 - x1, y2 - y1)
        box = Rectangle(corner, *size, fill=False, color="white", linewidth=1.5, clip_on=False)
        box.set_path_effects(EDGE)
        axes.add_patch(box)
    for x, y in prompt.points:
        axes.plot(x - 0.5, y - 0.5, "o", color="white", markeredgecolor="black", markersize=5)


def draw_legend(figure) -> None:
    """One line above the figure that says what the outlines, the box and the points mean."""
    line = dict(linewidth=1.5, path_effects=EDGE)
    point = dict(marker="o", linestyle="", markeredgecolor="black", markersize=5)
    handles = [
        Line2D([], [], color=TRUTH, label="true mask", **line),
        Line2D([], [], color=FOUND, label="SAM's mask", **line),
        Patch(fill=False, edgecolor="white", label="box", **line),
        Line2D([], [], color="white", label="points", **point),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=TEXT)


def wrap(text: str, width: int, lines: int = LINES) -> str:
    """A completion as lines of at most `width` characters, at most `lines` of them.

    The answer starts a line. A line never ends within a tag, a JSON key, a number or a word, unless
    that is wider than a line. If there are too many lines, those in the middle are left out.

    >>> print(wrap('<think>the red star</think><answer>{"bbox":[1,2,30,40],"points_1":[5,6]}', 28))
    <think>the red star</think>
    <answer>{"bbox":[1,2,30,40],
    "points_1":[5,6]}
    """
    rows = [""]
    for piece in PIECES.findall(printable(text)):
        if rows[-1] and (piece == "<answer>" or len(rows[-1] + piece.rstrip()) > width):
            rows.append("")
        piece = piece if rows[-1] else piece.lstrip()
        while len(piece.rstrip()) > width:
            cut = max(piece.rfind(sign, 0, width) for sign in ":[, ") + 1 or width
            rows[-1:] = [piece[:cut], ""]
            piece = piece[cut:].lstrip()
        rows[-1] += piece
    if len(rows) > lines:
        rows[lines // 2 : -(lines - lines // 2 - 1)] = ["..."]
    return "\n".join(row.rstrip() for row in rows)


def printable(text: str) -> str:
    """The text with a space for each character that has no glyph, such as a line break."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_title(axes, text: str) -> None:
    axes.set_title(printable(text), fontsize=TEXT, parse_math=False)  # a "$" is a dollar sign


def write_below(axes, text: str, completion: bool = False) -> None:
    """Text below a picture, with the line breaks that it has."""
    style = dict(family="monospace", multialignment="left") if completion else {}
    axes.set_xlabel(text, fontsize=TEXT, parse_math=False, **style)


# ----------------------------------------------------------------------------------------------
# Figures of answers
# ----------------------------------------------------------------------------------------------


def groups(batch: list, texts: list[list[str]], scores, columns: int = 4) -> Figure:
    """Each sample's truth and, beside it, its completions with mask, prompt, reward and text.

    batch:   B samples.
    texts:   B lists of G completions.
    scores:  reward.Scores with masks.
    columns: completions in a row; a group takes as many rows as it needs.
    """
    G = len(texts[0])
    columns = min(columns, G)
    rows = -(-G // columns)  # of a group
    size = (2.7 * (1 + columns), 3.4 * rows * len(batch))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(rows * len(batch), 1 + columns, squeeze=False)
    for b, one in enumerate(batch):
        group = grid[b * rows : (b + 1) * rows]
        cells = group[:, 1:].ravel()
        draw_mask(group[0, 0], one.image, one.mask, TRUTH)
        write_title(group[0, 0], "true mask")
        write_below(group[0, 0], textwrap.fill(printable(one.query)[:160], 34))
        for g, axes in enumerate(cells[:G]):
            draw_mask(axes, one.image, scores.overlap.masks[b][g].cpu().numpy(), FOUND)
            draw_prompt(axes, scores.prompts[b][g])
            write_title(axes, f"reward {scores.reward[b, g]:.3g}, IoU {scores.iou[b, g]:.2f}")
            write_below(axes, wrap(texts[b][g], 32), completion=True)
        for axes in [*group[1:, 0], *cells[G:]]:
            axes.set_axis_off()
    draw_legend(figure)
    return figure


def sheet(rows: dict[str, list[tuple]]) -> Figure:
    """A row of pictures for each title, from tuples (sample, prompt, mask (H, W) bool, IoU)."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(3 * columns, 3.3 * len(rows)), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, answers) in zip(grid, rows.items(), strict=True):
        for axes in line[len(answers) :]:
            axes.set_axis_off()
        for axes, (one, prompt, mask, iou) in zip(line, answers, strict=False):
            draw_mask(axes, one.image, mask, FOUND)
            draw_outline(axes, one.mask, TRUTH)
            draw_prompt(axes, prompt)
            write_title(axes, f"{title}: IoU {iou:.2f}")
            write_below(axes, textwrap.fill(printable(one.query)[:160], 38))
    draw_legend(figure)
    return figure


def evaluation_sheet(rows: list[dict], scorer, dataset, prompt_type, count: int = 4) -> Figure:
    """The best, median and worst answers of an evaluation, `count` of each, by IoU.

    rows:        of samr1_mini.evaluate; row k is about dataset[k]. Rows with "skipped" are ignored,
                 at least one must have been scored.
    scorer:      reward.SamScorer, which makes the masks again.
    prompt_type: reward.SamPrompt.
    """
    scored = (k for k, row in enumerate(rows) if "skipped" not in row)
    order = sorted(scored, key=lambda k: -rows[k]["iou"])
    middle = max(0, len(order) // 2 - count // 2)
    picks = {
        "best": order[:count],
        "median": order[middle : middle + count],
        "worst": order[-count:],
    }
    chosen = sorted({k for part in picks.values() for k in part})  # encode each image once
    batch = [dataset[k] for k in chosen]
    prompts = [prompt_type(rows[k]["box"], rows[k]["points"]) for k in chosen]
    masks = scorer.score(batch, [[prompt] for prompt in prompts], keep_masks=True).masks
    drawn = {
        k: (one, prompt, mask[0].cpu().numpy(), rows[k]["iou"])
        for k, one, prompt, mask in zip(chosen, batch, prompts, masks, strict=True)
    }
    return sheet({title: [drawn[k] for k in part] for title, part in picks.items()})


def found(image: Image.Image, query: str, mask: np.ndarray, prompt, said: str) -> Figure:
    """One picture with the mask of a query (H, W) bool, the prompt, and the policy's reasoning."""
    size = (7, 7 * image.height / image.width + 1.2)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    draw_mask(axes, image, mask, FOUND)
    draw_prompt(axes, prompt)
    axes.set_title(textwrap.fill(printable(query)[:240], 60), parse_math=False)
    write_below(axes, textwrap.fill(printable(said)[:800], 90))
    return figure


# ----------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------


def smooth(axes, rows: list[dict], name: str, colour: str, label: str | None = "") -> None:
    """One metric over the steps: the values (faint) and their centred running mean (bold).

    rows:  of metrics.jsonl. A value that is missing, None or not finite is left out.
    label: of the mean; "" takes the metric's name, None gives no label.
    """
    steps = np.array([row["step"] for row in rows])
    values = np.array([row.get(name) for row in rows], float)  # None becomes NaN
    values[~np.isfinite(values)] = np.nan
    marker = "." if len(rows) < 3 else None
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker=marker)
    label = name.replace("_", " ") if label == "" else label
    axes.plot(*running_mean(steps, values), color=colour, label=label)
    axes.set_xlabel("step", fontsize=TEXT)


def running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred means (N,), (N,) -> (M,), (M,), over all steps at which a whole window fits.

    A trailing mean would lag behind the values. The window is an eighth of the run, at most WINDOW
    steps, and odd. NaN counts in no mean.
    """
    half = min(WINDOW, len(values) // 8) // 2
    window = np.ones(2 * half + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "valid")
    count = np.convolve(known.astype(float), window, "valid")
    means = np.where(count > 0.5, total / np.maximum(count, 1), np.nan)
    return steps[half : len(steps) - half], means


def curves(rows: list[dict], columns: int = 3) -> Figure:
    """Reward and its parts, IoU, KL, entropy, length and clipped share over the steps of
    metrics.jsonl (at least one). `columns`: panels in a row."""
    lines = -(-len(PANELS) // columns)
    figure = Figure(figsize=(11 / 3 * columns, 3 * lines), dpi=100, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (title, names) in zip(grid.flat, PANELS.items(), strict=False):
        for k, name in enumerate(names):
            smooth(axes, rows, name, f"C{k}")
        axes.set_title(title, fontsize=10)
        if len(names) > 1:  # the legend stands above the curves
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.3 * (high - low))
            axes.legend(fontsize=TEXT, loc="upper center", ncols=2)
        if names == ("kl",):  # k3 has no bound: one improbable token makes a spike
            axes.set_yscale("symlog", linthresh=1e-3)
    return figure


# ----------------------------------------------------------------------------------------------
# The record of a step's rollouts
# ----------------------------------------------------------------------------------------------


def record_rollouts(
    samples: list, completions, scores, tokenizer, advantages=None, clipped=None
) -> list[dict]:
    """Samples and their completions as plain data for a JSON file: a dict for each sample.

    samples:     B objects with `image` (PIL, W x H), `query`, `mask` (H, W) bool and `id`. The
                 other arguments may have more rows; the first B are recorded.
    completions: grpo.Completions (B, G, T).
    scores:      reward.Scores (B, G) of `score_completions(..., keep_masks=True)`.
    advantages:  (B, G) or None.
    clipped:     (B, G, T) int or None: -1 where the ratio was clipped below, 1 above, else 0.

    Boxes, points and "size" (W, H) are in image pixels. Pictures are data URIs, scaled down to
    LONGEST_SIDE; masks are 1-bit PNGs.
    """
    rows = []
    for b, one in enumerate(samples):
        scale = min(1, LONGEST_SIDE / max(one.image.size))
        small = tuple(max(1, round(side * scale)) for side in one.image.size)
        answers = []
        for g, prompt in enumerate(scores.prompts[b]):
            length = int(completions.mask[b, g].sum())
            ids = completions.ids[b, g, :length].tolist()
            answer = {
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": token_texts(ids, tokenizer),
                "clipped": None if clipped is None else clipped[b, g, :length].tolist(),
            }
            answer |= {name: getattr(scores, name)[b, g].item() for name in NUMBERS}
            answer["advantage"] = None if advantages is None else advantages[b, g].item()
            answer |= {"box": prompt.box, "points": prompt.points}
            answer["mask"] = mask_uri(scores.overlap.masks[b][g].cpu().numpy(), small)
            answers.append(answer)
        picture = one.image.resize(small, Image.Resampling.LANCZOS) if scale < 1 else one.image
        image = data_uri(picture, "JPEG" if max(small) > PHOTOGRAPH else "PNG")
        row = {"id": one.id, "query": one.query, "image": image, "size": list(one.image.size)}
        rows.append(row | {"truth": mask_uri(one.mask, small), "completions": answers})
    return rows


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """The text of each token. Joined without the special tokens, they are the decoded text.

    A character may need several tokens (an emoji up to four): its last token shows it, the others
    are "". A token's spaces may depend on the token before it, so its text is what it adds to the
    text of the tokens before it.
    """
    special = set(tokenizer.all_special_ids)
    plain = [i for i in ids if i not in special]
    texts, first, shown = [], 0, 0  # plain[:shown] is written; plain[first:shown] is the context
    for k in range(1, len(plain) + 1):
        before = tokenizer.decode(plain[first:shown])
        added = tokenizer.decode(plain[first:k])[len(before) :]
        if added.endswith("\ufffd") and k < len(plain):  # not yet a whole character
            texts.append("")
        else:
            texts.append(added)
            first, shown = shown, k
    texts = iter(texts)
    return [tokenizer.decode([i]) if i in special else next(texts) for i in ids]


def mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """A mask (H, W) bool as a 1-bit PNG of this size (width, height)."""
    return data_uri(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), "PNG")


def data_uri(image: Image.Image, kind: str) -> str:
    """A picture as a data URI. kind: "PNG" or "JPEG"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

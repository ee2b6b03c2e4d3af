"""pictures.py - figures of runs and of answers, and the record of a step's rollouts.

The functions return matplotlib figures or draw on matplotlib axes; plumbing.runs.save_figure writes
a figure to a file. `record_rollouts` returns plain data for RUN/rollouts/step_*.json, which
`python -m tools.report RUN` shows as a page.
"""

import base64
import io
import re
import textwrap
import unicodedata
from functools import cache

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

TRUTH, FOUND = "lime", "magenta"  # colours of outlines; the drawn scenes use neither
EDGE = [withStroke(linewidth=3, foreground="black")]  # lines stay visible on any background
TEXT = 9  # points; smaller text cannot be read on a screen
LATIN = "DejaVu Sans"  # comes with matplotlib
# Names of fonts with other scripts, such as Chinese, as systems have them.
SCRIPTS = re.compile(
    "CJK|Noto Sans|Source Han|WenQuanYi|Fallback|Sim(Hei|Sun)|YaHei|PingFang|Hiragino|Heiti|Gothic|"
    "Malgun|Nanum|Arial Unicode|Unifont"
)
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
NUMBERS = ("reward", "accuracy", "think_format", "answer_format", "iou")
LONGEST_SIDE = 640  # pixels; recorded pictures are scaled down to this
DRAWN = 2048  # pixels; of a picture with a longer side, a smaller one is drawn, to save memory
TALLEST = 4  # height over width of `found`; drawing one of 200 x the width would take 12 GiB
PHOTOGRAPH = 256  # pixels; a picture with a longer side is stored as a JPEG, any other as a PNG

# ----------------------------------------------------------------------------------------------
# Parts of figures
# ----------------------------------------------------------------------------------------------


def draw_answer(axes, image: Image.Image, mask: np.ndarray, prompt, truth=None) -> None:
    """SAM's mask (H, W) bool, its reward.SamPrompt, and the outline of the true mask if known."""
    draw_mask(axes, image, mask, FOUND)
    if truth is not None:
        draw_outline(axes, truth, TRUTH)
    draw_prompt(axes, prompt)


def draw_mask(axes, image: Image.Image, mask: np.ndarray, colour: str) -> None:
    """The image, darkened outside of the mask (H, W) bool, and the mask's outline."""
    step = -(-max(image.size) // DRAWN)
    mask = mask[::step, ::step]
    pixels = np.asarray(image.reduce(step)) * np.where(mask[..., None], 1.0, 0.5)
    height, width = np.array(mask.shape) * step - 0.5  # in pixels of the image, like the prompt
    axes.imshow(pixels.astype(np.uint8), extent=(-0.5, width, height, -0.5))
    axes.autoscale(False)  # later drawings do not change the limits
    draw_outline(axes, mask, colour, step)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_outline(axes, mask: np.ndarray, colour: str, step: int = 1) -> None:
    """The outline of a mask (H, W) bool, with a dark edge. An empty mask has none.

    step: pixels of the image from one of the mask to the next.
    """
    if mask.any():
        height, width = mask.shape
        padded = np.pad(mask, 1)  # the outline is closed also where the mask meets the border
        x = np.arange(-1, width + 1) * step
        y = np.arange(-1, height + 1) * step
        lines = axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.5)
        lines.set_path_effects(EDGE)


def draw_prompt(axes, prompt) -> None:
    """The boxes and points of a reward.SamPrompt, in image pixels.

    Their coordinates start at the edge of the first pixel. Those of matplotlib start at its middle.
    """
    line = dict(fill=False, color="white", linewidth=1.5, clip_on=False, path_effects=EDGE)
    for one in prompt.objects:
        if one.box:
            x1, y1, x2, y2 = one.box
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **line))
        for x, y in one.points:
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
    """A completion as at most `lines` lines of at most `width` characters.

    The answer starts a line. Spaces after commas and colons are added, so that no number is cut. If
    thought or answer is too long, its end is left out.

    >>> print(wrap('<think>the red star</think><answer>{"bbox":[1,2,30,40],"points_1":[5,6]}', 28))
    <think>the red star</think>
    <answer>{"bbox": [1, 2, 30,
    40], "points_1": [5, 6]}
    """
    text = re.sub(r"([,:])(?=\S)", r"\1 ", printable(text))
    thought, tag, answer = text.partition("<answer>")
    options = dict(width=line_length(text, width), max_lines=lines // 2, break_on_hyphens=False)
    rows = textwrap.wrap(thought, **options) + textwrap.wrap(tag + answer, **options)
    return "\n".join(rows)


def printable(text: str) -> str:
    """The text with a space for each character that has no glyph, such as a line break, and "?" for
    each that no installed font has.
    """
    spaced = (c if c.isprintable() else " " for c in text)
    return "".join(c if font_of(c) else "?" for c in spaced)


def printable_query(query: str, characters: int, width: int) -> str:
    """The first characters of a query in lines of this width, or a note if no font has it."""
    if not all(font_of(c) for c in query if c.isprintable()):
        query = "(query in characters that no installed font has)"
    return textwrap.fill(printable(query)[:characters], line_length(query, width))


def line_length(text: str, width: int) -> int:
    """How many characters of a text fill `width` columns. Chinese ones are two columns wide."""
    return width // 2 if any(unicodedata.east_asian_width(c) in "WF" for c in text) else width


@cache
def font_of(character: str) -> str | None:
    """The family of an installed font that has a character.

    matplotlib itself would draw a box: it looks at no other font than those it is given.
    """
    others = sorted({font.name for font in fontManager.ttflist if SCRIPTS.search(font.name)})
    for family in (LATIN, *others):
        font = get_font(findfont(FontProperties(family=family)))
        if font.get_char_index(ord(character)):
            return family
    return None


def fonts(text: str, first: str = LATIN) -> list[str]:
    """The families that a text needs, in the order in which matplotlib looks for a character."""
    return list(dict.fromkeys([first, *filter(None, map(font_of, text.replace("\n", "")))]))


def write_title(axes, text: str, size: float = TEXT) -> None:
    axes.set_title(text, fontsize=size, family=fonts(text), parse_math=False)  # "$" is a dollar


def write_below(axes, text: str, completion: bool = False) -> None:
    """Text below a picture, with the line breaks that it has."""
    family = fonts(text, "DejaVu Sans Mono" if completion else LATIN)
    align = "left" if completion else "center"
    axes.set_xlabel(text, fontsize=TEXT, family=family, multialignment=align, parse_math=False)


# ----------------------------------------------------------------------------------------------
# Figures of answers
# ----------------------------------------------------------------------------------------------


def answer_picture(image, mask, prompt, truth=None, side: int = 320) -> Image.Image:
    """`draw_answer` as a picture. side: its longer side, in pixels."""
    scale = side / max(image.size) / 100  # inches
    figure = Figure(figsize=(image.width * scale, image.height * scale), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_frame_on(False)
    draw_answer(axes, image, mask, prompt, truth)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


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
        write_below(group[0, 0], printable_query(one.query, 160, 34))
        for g, axes in enumerate(cells[:G]):
            mask = scores.overlap.masks[b][g].cpu().numpy()
            draw_answer(axes, one.image, mask, scores.prompts[b][g])
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
            draw_answer(axes, one.image, mask, prompt, one.mask)
            write_title(axes, f"{title}: IoU {iou:.2f}")
            write_below(axes, printable_query(one.query, 160, 38))
    draw_legend(figure)
    return figure


def evaluation_sheet(rows: list[dict], scorer, dataset, prompt_type, count: int = 4) -> Figure:
    """The best, median and worst answers of an evaluation, `count` of each, by IoU.

    rows:        of samr1_mini.evaluate; row k is about dataset[k]. Rows with "skipped" are ignored,
                 at least one must have been scored.
    scorer:      reward.SamScorer, which makes the masks again.
    prompt_type: reward.SamPrompt.
    """
    scored = [k for k, row in enumerate(rows) if "skipped" not in row]
    order = sorted(scored, key=lambda k: -rows[k]["iou"])
    middle = max(0, len(order) // 2 - count // 2)
    median = order[middle : middle + count]
    picks = {"best": order[:count], "median": median, "worst": order[-count:]}
    chosen = sorted({k for row in picks.values() for k in row})  # encode each image once
    batch = [dataset[k] for k in chosen]
    prompts = []
    for k in chosen:
        others = [prompt_type(box, points) for box, points in rows[k].get("others", ())]
        prompts.append(prompt_type(rows[k]["box"], rows[k]["points"], tuple(others)))
    masks = scorer.score(batch, [[prompt] for prompt in prompts], keep_masks=True).masks
    drawn = {}
    for k, one, prompt, mask in zip(chosen, batch, prompts, masks, strict=True):
        drawn[k] = (one, prompt, mask[0].cpu().numpy(), rows[k]["iou"])
    return sheet({title: [drawn[k] for k in row] for title, row in picks.items()})


def found(image: Image.Image, query: str, mask: np.ndarray, prompt, said: str) -> Figure:
    """One picture with the mask of a query (H, W) bool, the prompt, and the policy's reasoning."""
    size = (7, 7 * min(image.height / image.width, TALLEST) + 1.2)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    draw_answer(axes, image, mask, prompt)
    write_title(axes, printable_query(query, 240, 60), size=12)
    write_below(axes, textwrap.fill(printable(said)[:800], line_length(said, 90)))
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
    values[np.isinf(values)] = np.nan
    marker = "." if len(rows) < 3 else None
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker=marker)
    label = name.replace("_", " ") if label == "" else label
    axes.plot(*running_mean(steps, values), color=colour, label=label)
    axes.set_xlabel("step", fontsize=TEXT)
    if name == "kl":  # k3 has no bound: one improbable token makes a spike
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.yaxis.get_major_locator().set_params(numticks=6)


def running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred means (N,), (N,) -> (M,), (M,), over all steps at which a whole window fits.

    A trailing mean would lag behind the values. The window is an eighth of the run, at most WINDOW
    steps, and odd. NaN counts in no mean.
    """
    half = min(WINDOW, len(values) // 8) // 2
    windows = np.lib.stride_tricks.sliding_window_view(values, 2 * half + 1)  # (M, window)
    means = np.ma.masked_invalid(windows).mean(1).filled(np.nan)
    return steps[half : len(steps) - half], means


def curves(rows: list[dict]) -> Figure:
    """The PANELS over the steps of metrics.jsonl, of which there must be one at least."""
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for k, name in enumerate(names):
            smooth(axes, rows, name, f"C{k}")
        axes.set_title(title, fontsize=10)
        if len(names) > 1:  # the legend stands above the curves
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.3 * (high - low))
            axes.legend(fontsize=TEXT, loc="upper center", ncols=2)
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

    Pictures are data URIs, scaled down to LONGEST_SIDE; masks are 1-bit PNGs. Boxes and points are
    in pixels of these pictures.
    """
    rows = []
    for b, one in enumerate(samples):
        picture = one.image.copy()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        scale = max(picture.size) / max(one.image.size)
        answers = []
        for g, prompt in enumerate(scores.prompts[b]):
            length = int(completions.mask[b, g].sum())
            ids = completions.ids[b, g, :length].tolist()
            answer = {name: getattr(scores, name)[b, g].item() for name in NUMBERS}
            answer["text"] = tokenizer.decode(ids, skip_special_tokens=True)
            answer["tokens"] = token_texts(ids, tokenizer)
            answer["clipped"] = None if clipped is None else clipped[b, g, :length].tolist()
            answer["advantage"] = None if advantages is None else advantages[b, g].item()
            answer["box"] = prompt.box and [v * scale for v in prompt.box]
            answer["points"] = [(x * scale, y * scale) for x, y in prompt.points]
            mask = scores.overlap.masks[b][g].cpu().numpy()
            answer["mask"] = mask_uri(mask, picture.size)
            answers.append(answer)
        row = {"id": one.id, "query": one.query, "completions": answers}
        rows.append(row | {"image": data_uri(picture), "truth": mask_uri(one.mask, picture.size)})
    return rows


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """The text of each token. Joined, they are the decoded text, special tokens included.

    A character may need several tokens (an emoji up to four): its last token shows it, the others
    are "". So a token's text is what it adds to the text of all tokens before it.
    """
    texts = []
    shown = ""
    for k in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:k])
        if k < len(ids):
            text = text.rstrip("\ufffd")  # the sign for a character that is not whole yet
        texts.append(text[len(shown) :])
        shown = text
    return texts


def mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """A mask (H, W) bool as a 1-bit PNG of this size (width, height)."""
    return data_uri(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI: masks and small pictures as PNG, any other as JPEG."""
    kind = "JPEG" if image.mode == "RGB" and max(image.size) > PHOTOGRAPH else "PNG"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

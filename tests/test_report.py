"""Figures of runs, the record of rollouts, and the report page of a run.

The last part opens the page in headless Chromium. It is skipped where there is none.
"""

import base64
import doctest
import html
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo import Completions
from plumbing import pictures
from reward import SamPrompt, score_completions
from tools import report

ROOT = Path(report.__file__).resolve().parent.parent
HOSTILE = '</script><script>alert(1)</script><img src="//x/y" onerror="alert(2)"><!-- <b> $name'
THOUGHT = "<think>the red circle is at the top left</think>"
ANSWER = '<answer>{"bbox":[%d,%d,%d,%d],"points_1":[%d,%d],"points_2":[%d,%d]}</answer>'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "vlm")


def answers_near(sample, shift: int) -> list[str]:
    """Four completions: the true box moved by `shift` policy pixels, a box alone, no answer, ""."""
    rows, columns = np.nonzero(sample.mask)
    ranges = zip((columns, rows), sample.image.size, strict=True)
    x, y = (np.array((v.min(), v.max() + 1)) * 64 / side for v, side in ranges)
    x, y = (np.clip(v.round().astype(int) + shift, 0, 64) for v in (x, y))
    middle = (x.sum() // 2, y.sum() // 2)
    good = THOUGHT + ANSWER % (x[0], y[0], x[1], y[1], *middle, *middle)
    return [good, good.split(',"points_1"')[0] + "}</answer>", "<think>the star</think>", ""]


def complete(tokenizer, texts: list[list[str]]) -> Completions:
    """The texts as tokens, each followed by the end-of-text token."""
    end = [tokenizer.eos_token_id]
    rows = [[tokenizer.encode(text) + end for text in group] for group in texts]
    T = max(len(ids) for group in rows for ids in group)
    mask = [[[k < len(ids) for k in range(T)] for ids in group] for group in rows]
    padded = [[ids + [0] * (T - len(ids)) for ids in group] for group in rows]
    return Completions(torch.tensor(padded), torch.tensor(mask))


@pytest.fixture(scope="module")
def rolled(samples, scorer, tokenizer):
    """Three scenes with four completions each. By shift: far from the truth, near, and on it."""

    def at(shift: int) -> SimpleNamespace:
        texts = [answers_near(one, shift) for one in samples[:3]]
        scores = score_completions(scorer, samples[:3], texts, 64, keep_masks=True)
        return SimpleNamespace(texts=texts, completions=complete(tokenizer, texts), scores=scores)

    return {shift: at(shift) for shift in (12, 4, 0)}


def decode(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_docstrings():
    failed, tried = doctest.testmod(pictures)
    assert tried and not failed


# ----------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------


def pixels_of(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("jump", [40, 100, 160])
def test_the_running_mean_does_not_lag(jump):
    """The drawn mean of a step function crosses one half at the step."""
    axes = Figure().add_subplot()
    rows = [{"step": step, "iou": float(step >= jump)} for step in range(1, 201)]
    pictures.smooth(axes, rows, "iou", "C0")
    _, mean = axes.lines
    assert len(mean.get_xdata()) == 200 - 14  # windows of 15 steps
    crossing = np.interp(0.5, mean.get_ydata(), mean.get_xdata())
    assert crossing == pytest.approx(jump - 0.5, abs=0.01)


def test_the_running_mean_leaves_out_missing_values():
    values = np.full(80, 3.0)
    values[[0, 20, 21, 79]] = np.nan
    _, means = pictures.running_mean(np.arange(80), values)
    assert np.allclose(means, 3)
    assert np.isnan(pictures.running_mean(np.arange(80), np.full(80, np.nan))[1]).all()
    for n in (1, 2, 7):  # a short run has no window: the values themselves
        at, means = pictures.running_mean(np.arange(n), np.arange(n) * 2.0)
        assert at.tolist() == list(range(n)) and np.allclose(means, at * 2)


def test_curves_are_drawn_from_incomplete_metrics():
    rows = [{"step": 1, "reward": float("nan")}, {"step": 2, "reward": None, "kl": float("inf")}]
    assert len(pictures.curves(rows).axes) == len(pictures.PANELS)
    assert pixels_of(pictures.curves(rows, columns=1)).shape[1] < 400


def drawn(draw) -> np.ndarray:
    """Pixels of a picture in the colour of the true masks' outlines, with something drawn on it."""
    figure = Figure(figsize=(2, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.full((40, 40, 3), (0, 255, 0), np.uint8))
    axes.set_axis_off()
    axes.autoscale(False)
    draw(axes)
    return pixels_of(figure)


@pytest.mark.parametrize("part", ["outline", "box", "points"])
def test_a_dark_edge_surrounds_what_is_drawn(part):
    """A green outline shows on a green shape, and white lines show on a white one."""
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    draw = {
        "outline": lambda axes: pictures.draw_outline(axes, mask, pictures.TRUTH),
        "box": lambda axes: pictures.draw_prompt(axes, SamPrompt((10, 10, 30, 30), ())),
        "points": lambda axes: pictures.draw_prompt(axes, SamPrompt(None, ((20, 20),))),
    }[part]
    line = drawn(draw)[100].astype(int)  # a horizontal line through the middle
    dark = np.flatnonzero(line.sum(1) < 150)
    borders = [100] if part == "points" else [50, 150]
    for border in borders:
        assert ((dark >= border - 8) & (dark < border)).any(), "no dark edge on the left"
        assert ((dark > border) & (dark <= border + 8)).any(), "no dark edge on the right"


def test_an_outline_closes_at_the_border_and_an_empty_mask_has_none():
    assert (drawn(lambda axes: None) == (0, 255, 0)).all()
    empty = drawn(lambda axes: pictures.draw_outline(axes, np.zeros((40, 40), bool), "magenta"))
    assert (empty == (0, 255, 0)).all()
    full = drawn(lambda axes: pictures.draw_outline(axes, np.ones((40, 40), bool), "magenta"))
    for side in (full[0], full[-1], full[:, 0], full[:, -1]):
        assert (side[2:-2] != (0, 255, 0)).any(1).all()


NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
TEXTS = {
    "compact": THOUGHT + ANSWER % (1, 20, 333, 444, 5, 66, 777, 8),
    "spaced": '<answer>\n{"bbox": [1.25, 20.5, 333.125, 444.0], "points_1": [5.5, 66.25]}',
    "quotes": "<answer>{'bbox':[1,20,333,444],'points_1':[5,66],'points_2':[777,8]}</answer>",
    "bare": "{bbox: [1, 20, 333, 444], points_1: [5, 66], points_2: [777, 8]}",
    "reasoning": "<think>" + "it is not the star, but $5 or $6, points_1 " * 9 + "</think>",
    "nested": '{"a":[[[1,2,3],[444,555,666]],{"points_2":"leftmost"}],"bbox":-12.5e-3}',
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("width", range(14, 41, 2))
def test_lines_never_end_within_a_key_or_a_number(name, width):
    text = TEXTS[name]
    lines = pictures.wrap(text, width, lines=100).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())  # nothing is lost
    whole = re.findall(rf"""["']\w+["']|</?\w+>|\w+|{NUMBER}""", text)
    parts = re.findall(rf"""["']\w+["']|</?\w+>|\w+|{NUMBER}""", "\n".join(lines))
    assert parts == whole


def test_long_completions_keep_their_first_and_last_lines():
    lines = pictures.wrap(TEXTS["reasoning"], 32, lines=7).split("\n")
    assert len(lines) == 7 and lines.count("...") == 1
    assert lines[0].startswith("<think>") and lines[-1].endswith("</think>")
    for width, text in ((5, "x" * 23), (10, '"' + "y" * 40), (3, "1" * 9 + "," * 9)):
        lines = pictures.wrap(text, width, lines=100).split("\n")
        assert max(map(len, lines)) <= width and "".join(lines) == text
    assert pictures.wrap("", 9) == "" and pictures.wrap("\ud800\x00\n", 9) == ""


def test_text_on_the_sample_sheets_is_large_enough(samples, rolled):
    """At least 8 points, in a figure that is not wider than a screen."""
    figure = pictures.groups(samples[:3], rolled[4].texts, rolled[4].scores)
    width, _ = figure.get_size_inches() * figure.dpi
    assert width <= 1400
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) * figure.dpi / 72 >= 8 * 96 / 72
    shown = "\n".join(t.get_text() for t in texts)
    for b, one in enumerate(samples[:3]):
        assert one.query in shown.replace("\n", " ")
        assert pictures.wrap(rolled[4].texts[b][0], 32) in shown
        reward, iou = rolled[4].scores.reward[b, 0], rolled[4].scores.iou[b, 0]
        assert f"reward {reward:.3g}, IoU {iou:.2f}" in shown
    pixels = pixels_of(figure)
    assert (pixels == (255, 0, 255)).all(2).sum() > 50 and (pixels == (0, 255, 0)).all(2).sum() > 50


def test_groups_of_any_size_have_a_place(samples, rolled):
    it = rolled[0]
    for G, cells in ((1, 2), (2, 3), (3, 4), (4, 5)):
        texts = [group[:G] for group in it.texts]
        figure = pictures.groups(samples[:2], texts, it.scores)
        assert len(figure.axes) == 2 * cells
    figure = pictures.groups(samples[:2], it.texts, it.scores, columns=3)  # 2 rows for a group
    assert len(figure.axes) == 2 * 2 * 4
    assert sum(axes.axison for axes in figure.axes) == 2 * (1 + 4)


def test_the_evaluation_sheet_shows_best_median_and_worst(samples, scorer):
    rng = np.random.default_rng(0)
    rows = [
        {"iou": iou, "box": (5.0, 5.0, 40.0, 40.0), "points": ()}
        for iou in rng.permutation(np.linspace(0, 1, 12))
    ]
    rows[3] = {"skipped": "unreadable"}
    ranked = sorted((row["iou"] for row in rows if "iou" in row), reverse=True)
    figure = pictures.evaluation_sheet(rows, scorer, samples * 2, SamPrompt, count=2)
    titles = [axes.get_title() for axes in figure.axes]
    picked = ("best", ranked[:2]), ("median", ranked[4:6]), ("worst", ranked[-2:])
    assert titles == [f"{name}: IoU {iou:.2f}" for name, part in picked for iou in part]
    one = pictures.evaluation_sheet(rows[:1], scorer, samples, SamPrompt)  # the same one each time
    assert len({axes.get_title().split()[-1] for axes in one.axes if axes.axison}) == 1


def test_a_found_mask_is_drawn_with_any_text(samples, rolled):
    mask = rolled[0].scores.overlap.masks[0][0].numpy()
    prompt = rolled[0].scores.prompts[0][0]
    figure = pictures.found(samples[0].image, "what costs $5 or $6?", mask, prompt, "$x_")
    assert figure.axes[0].get_title() == "what costs $5 or $6?"
    assert (pixels_of(figure) == (255, 0, 255)).all(2).any()


# ----------------------------------------------------------------------------------------------
# The record of rollouts
# ----------------------------------------------------------------------------------------------


def test_a_record_holds_what_was_scored(samples, rolled, tokenizer):
    it = rolled[0]
    advantages = torch.arange(12.0).view(3, 4) - 5.5
    sides = np.random.default_rng(0).integers(-1, 2, it.completions.ids.shape)
    clipped = torch.from_numpy(sides.astype(np.int8))
    record = pictures.record_rollouts(
        samples[:3], it.completions, it.scores, tokenizer, advantages, clipped
    )
    rows = json.loads(json.dumps(record))
    assert [row["id"] for row in rows] == [one.id for one in samples[:3]]
    for b, (row, one) in enumerate(zip(rows, samples, strict=False)):
        assert row["query"] == one.query and row["size"] == list(one.image.size)
        assert np.array_equal(np.asarray(decode(row["image"])), np.asarray(one.image))  # lossless
        assert np.array_equal(np.asarray(decode(row["truth"])), one.mask)
        for g, answer in enumerate(row["completions"]):
            assert answer["text"] == it.texts[b][g]
            for name in pictures.NUMBERS:
                assert answer[name] == getattr(it.scores, name)[b, g].item()
            prompt, length = it.scores.prompts[b][g], it.completions.mask[b, g].sum()
            box, points = answer["box"], tuple(map(tuple, answer["points"]))
            assert SamPrompt(box and tuple(box), points) == prompt
            assert answer["advantage"] == advantages[b, g]
            assert answer["clipped"] == clipped[b, g, :length].tolist()
            assert len(answer["tokens"]) == length and answer["tokens"][-1] == "<|im_end|>"
            assert "".join(answer["tokens"][:-1]) == answer["text"]
            mask = decode(answer["mask"])
            truth = it.scores.overlap.masks[b][g].numpy()
            assert mask.mode == "1" and np.array_equal(np.asarray(mask), truth)
            iou = (truth & one.mask).sum() / (truth | one.mask).sum()
            assert answer["iou"] == pytest.approx(iou, abs=1e-6)
    assert any(answer["iou"] > 0.8 for row in rows for answer in row["completions"])


def test_a_record_without_an_update_takes_the_first_rows(samples, rolled, tokenizer):
    it = rolled[0]
    (row,) = pictures.record_rollouts(samples[:1], it.completions, it.scores, tokenizer)
    assert [answer["text"] for answer in row["completions"]] == it.texts[0]
    for answer in row["completions"]:
        assert answer["advantage"] is None and answer["clipped"] is None


@pytest.mark.parametrize("size", [(1280, 960), (300, 1000), (500, 400), (2000, 1)])
def test_large_pictures_and_their_masks_are_scaled_down(rolled, tokenizer, size):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[: height // 2 + 1, : width // 2] = True
    sample = SimpleNamespace(id="a", query="q", image=Image.new("RGB", size, "navy"), mask=mask)
    it = rolled[0]
    masks = [torch.from_numpy(np.stack([mask, ~mask, mask, mask]))]
    scores = it.scores._replace(overlap=it.scores.overlap._replace(masks=masks))
    (row,) = pictures.record_rollouts([sample], it.completions, scores, tokenizer)
    uris = (row["image"], row["truth"], row["completions"][1]["mask"])
    image, truth, other = map(decode, uris)
    assert image.format == "JPEG" and image.size == truth.size == other.size
    assert max(image.size) == min(640, max(size)) and row["size"] == [width, height]
    assert np.asarray(truth).mean() == pytest.approx(mask.mean(), abs=0.01)
    assert np.array_equal(np.asarray(other), ~np.asarray(truth))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level like Qwen's, but without merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + k): byte for k, byte in enumerate(rest)}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.decoder = decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    assert tokens.eos_token_id == 256
    return tokens


def test_token_texts_join_to_the_completion():
    tokens = byte_tokenizer()
    ids = [*"née\U0001f600 ".encode(), tokens.eos_token_id]
    expected = ["n", "", "é", "e", "", "", "", "\U0001f600", " ", "<|im_end|>"]
    assert pictures.token_texts(ids, tokens) == expected
    assert pictures.token_texts([], tokens) == []
    rng = np.random.default_rng(0)
    alphabet = [*"aé\U0001f600 \n".encode(), 255, 256]
    for _ in range(200):  # invalid bytes, and characters that the end or a special token cuts off
        ids = rng.choice(alphabet, rng.integers(1, 30)).tolist()
        texts = pictures.token_texts(ids, tokens)
        assert len(texts) == len(ids)
        plain = [text for text, i in zip(texts, ids, strict=True) if i != 256]
        assert "".join(plain) == tokens.decode(ids, skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------


def make_run(run: Path, rolled, samples, tokenizer) -> Path:
    """A finished run of 100 steps with three logged steps, a NaN and hostile texts."""
    run.mkdir()
    config = {"vlm": "tiny", "sam": "tiny", "data": "shapes", "seed": 0, "note": HOSTILE}
    (run / "config.json").write_text(json.dumps(config))
    before, after = (
        {"giou": giou, "ciou": giou - 0.05, "format": 0.9, "box": 0.5, "n": 64}
        for giou in (0.5, 0.75)
    )
    results = {"before": before, "ceiling": {"giou": 0.9, "ciou": 0.85, "n": 64}, "after": after}
    (run / "eval.json").write_text(json.dumps(results))
    rows = []
    for step in range(1, 101):
        row = {"step": step, "reward": 2 + step / 40, "accuracy": step / 40, "iou": step / 120}
        row |= {"kl": step / 300, "clip_low": 0.001, "clip_high": 0.01, "length": 30.0}
        rows.append(row | {"think_format": None})
    rows[6]["kl"], rows[8]["reward"] = float("nan"), float("inf")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 101, "rew')  # is still being written
    (run / "rollouts").mkdir()
    for step, it in zip((1, 50, 100), rolled.values(), strict=True):
        clipped = torch.zeros(it.completions.ids.shape, dtype=torch.int8)
        clipped[0, 0, 4], clipped[0, 0, 6] = 1, -1
        advantages = it.scores.reward - it.scores.reward.mean(1, keepdim=True)
        rolls = (it.completions, it.scores, tokenizer)
        train = pictures.record_rollouts(samples[:2], *rolls, advantages, clipped)
        train[1] |= {"query": HOSTILE, "id": HOSTILE}
        tokens = re.findall(r"\W|\w+", HOSTILE)
        train[1]["completions"][0] |= {"text": HOSTILE, "tokens": tokens, "clipped": None}
        rollout = {"train": train, "heldout": pictures.record_rollouts(samples[:3], *rolls)}
        file = run / "rollouts" / f"step_{step:05d}.json"
        file.write_text(json.dumps(rollout | {"step": step}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, rolled, samples, tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", rolled, samples, tokenizer)


@pytest.fixture(scope="module")
def page(run) -> str:
    return report.report_html(run)


@pytest.fixture
def copy(tmp_path, run) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing takes a second: tests of other parts of the page leave it out."""
    monkeypatch.setattr(report, "curves", lambda rows, columns: Figure(figsize=(1, 1)))


def read_rollouts(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((run / "rollouts").iterdir())]


def text_of(markup: str) -> str:
    """The text that a browser shows for some markup without "<" in its texts."""
    return html.unescape(re.sub(r"<[^<>]*>", "", markup))


def test_every_rollout_is_on_the_page(page, run):
    """Steps in order, with the queries, numbers, texts and clipped tokens of the files."""
    sections = re.findall(r'<section class="step" id="step-(\d+)">(.*?)</section>', page, re.DOTALL)
    rollouts = read_rollouts(run)
    assert [int(step) for step, _ in sections] == [rollout["step"] for rollout in rollouts]
    for (_, section), rollout in zip(sections, rollouts, strict=True):
        scenes = re.findall(r"<h5>(.*?)</h5>\n<ul>(.*?)</ul>", section, re.DOTALL)
        expected = rollout["heldout"] + rollout["train"]
        for (title, cards), one in zip(scenes, expected, strict=True):
            means = [np.mean([a[name] for a in one["completions"]]) for name in ("reward", "iou")]
            said = "{}: mean reward {:.3g}, mean IoU {:.3g}".format(one["query"], *means)
            assert text_of(title) == said
            first, *cards = re.findall(r"<li>(.*?)</li>", cards, re.DOTALL)
            assert text_of(first).strip() == one["id"] and first.count("<use") == 2
            for card, answer in zip(cards, one["completions"], strict=True):
                check_card(card, answer)


def check_card(card: str, answer: dict) -> None:
    picture, line, text = re.fullmatch(
        r"(<svg.*</svg>)\n<p>(.*?)</p>\n<p class=\"text\" tabindex=\"0\">(.*)</p>", card, re.DOTALL
    ).groups()
    said = "reward {:.3g} = {:.3g} accuracy + {:.3g} think + {:.3g} answerIoU {:.3g}"
    said = said.format(*(answer[name] for name in pictures.NUMBERS))
    if answer["advantage"] is not None:
        said += f", advantage {answer['advantage']:+.3g}"
    if answer["clipped"] is not None:
        above, below = answer["clipped"].count(1), answer["clipped"].count(-1)
        said += f"clipped {above}\u25b2 {below}\u25bc of {len(answer['clipped'])}"
    assert text_of(line) == said
    marks = re.findall(r'<mark class="(\w+)" title="token (\d+), .*?">(.*?)<sup>(.*?)</sup>', text)
    sides = [(k, side) for k, side in enumerate(answer["clipped"] or [], 1) if side]
    assert [(int(k), {"above": 1, "below": -1}[name]) for name, k, _, _ in marks] == sides
    for name, k, token, sign in marks:
        assert text_of(token) == answer["tokens"][int(k) - 1]
        assert html.unescape(sign) == {"above": "\u25b2", "below": "\u25bc"}[name]
    text = re.sub(r"<sup>.*?</sup>", "", text)
    assert text_of(text) == "".join(answer["tokens"])
    assert text_of(re.sub(r"<i>.*?</i>", "", text)) == answer["text"]
    assert picture.count("<circle") == len(answer["points"])
    if answer["box"]:
        numbers = re.search(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', picture)
        x, y, width, height = map(float, numbers.groups())
        assert (x, y, x + width, y + height) == pytest.approx(answer["box"])
        assert re.findall(r'stroke="(\w+)"', picture)[:2] == ["black", "white"]  # a dark edge


def test_every_picture_is_stored_once(page, run):
    """Also those that several steps share. Each is used where its file has it."""
    stored = re.findall(r'<image id="(p\d+)" width="(\d+)" height="(\d+)" .*? href="(.*?)"/>', page)
    by_id = {name: (uri, [int(width), int(height)]) for name, width, height, uri in stored}
    uris = [uri for uri, _ in by_id.values()]
    assert len(set(uris)) == len(uris) and all(page.count(uri) == 1 for uri in uris)
    used = [[m.lstrip("#") for m in re.findall(r'<use href="(.*?)"', svg)]
            for svg in re.findall(r"<svg.*?viewBox.*?</svg>", page)]  # fmt: skip
    expected = []
    for rollout in read_rollouts(run):
        for one in rollout["heldout"] + rollout["train"]:
            image, truth, size = one["image"], one["truth"], one["size"]
            expected.append([(image, size), (truth, size)])
            for answer in one["completions"]:
                expected.append([(uri, size) for uri in (image, image, answer["mask"], truth)])
    assert [[by_id[name] for name in names] for names in used] == expected
    assert {uri for names in expected for uri, _ in names} == set(uris)


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_text_of_the_policy_never_becomes_markup(page):
    assert page.isascii() and HOSTILE not in page
    assert page.count(html.escape("<script>alert(1)")) >= 3  # in the query, the id and the settings
    tags = Tags(page).found
    counts = {name: sum(tag == name for tag, _ in tags) for name in ("script", "style", "img", "b")}
    assert counts["script"] == counts["style"] == counts["img"] == 1
    assert not [a for _, a in tags if any(name.startswith("on") for name in a)]
    addresses = [a[name] for _, a in tags for name in ("src", "href", "srcset") if name in a]
    assert all(address.startswith(("data:image/", "#p")) for address in addresses)
    policy = next(a["content"] for _, a in tags if "http-equiv" in a)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
    for name in ("style-src", "script-src"):
        assert re.fullmatch(r"'sha256-[\w+/]+='", directives[name])
    assert set(directives) == {"default-src", "img-src", "style-src", "script-src"}


def test_the_table_shows_eval_json(page):
    rows = re.findall(r"<tr>(.*)", page)
    cells = [[text_of(cell) for cell in re.split(r"</t[hd]>", row)[:-1]] for row in rows]
    dash = "\N{EN DASH}"
    assert cells == [
        ["", "gIoU", "cIoU", "format", "box@0.5", "samples"],
        ["before", "0.5", "0.45", "0.9", "0.5", "64"],
        ["after", "0.75", "0.7", "0.9", "0.5", "64"],
        ["ceiling", "0.9", "0.85", dash, dash, "64"],
    ]
    assert "Training closed 62 % of the gap" in page  # 0.25 of 0.4


def test_curves_get_the_rows_of_the_log(run, monkeypatch):
    seen = []

    def curves(rows, columns):
        seen.append(rows)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(report, "curves", curves)
    report.report_html(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    expected = [json.loads(line) for line in lines]
    for rows in seen:
        np.testing.assert_equal(rows, expected)  # NaN equals NaN here
    assert len(seen) == 2 and len(expected) == 100


@pytest.mark.parametrize("missing", ["rollouts", "metrics.jsonl", "eval.json", "all"])
def test_missing_parts_are_named(copy, missing, no_curves):
    notes = {"rollouts": "No rollouts were logged", "metrics.jsonl": "No step was logged yet",
             "eval.json": "No evaluation was written yet"}  # fmt: skip
    gone = [name for name in notes if missing in (name, "all")]
    for name in gone:
        shutil.rmtree(copy / name) if name == "rollouts" else (copy / name).unlink()
    page = report.report_html(copy)
    assert [name for name, note in notes.items() if note in page] == gone


def check_refusal(run: Path, name: str, capsys) -> None:
    """One line that names the file, and exit code 2. No page is written."""
    with pytest.raises(SystemExit) as stop:
        report.main([str(run)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and name in said.err
    assert not (run / "report.html").exists()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path, capsys):
    check_refusal(tmp_path, "config.json", capsys)
    check_refusal(tmp_path / "nowhere", "config.json", capsys)


DAMAGED = {
    "cut off": b'{"step": 1, "tra\n',
    "not text": b"\xff\xfe\x00\x81\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize(
    "name", ["config.json", "eval.json", "metrics.jsonl", "rollouts/step_00050.json"]
)
def test_a_damaged_file_is_named(copy, name, content, capsys, no_curves):
    (copy / name).write_bytes(DAMAGED[content])
    check_refusal(copy, name, capsys)


OTHER_FORM = {
    "eval.json": (
        "[1]", "7", '"x"', '{"a": 1}', '{"a": {"giou": "x"}}',
        '{"before": {}, "after": {}, "ceiling": {}}',
    ),
    "metrics.jsonl": (
        "{}", "null", "[1]", '{"step": "x"}', '{"step": NaN}', '{"step": 1, "kl": "0.5"}',
        '{"step": 1, "reward": [1]}', '{"step": 1, "iou": 1' + "0" * 400 + "}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORM)
def test_json_of_another_form_is_refused(copy, name, capsys, no_curves):
    for content in OTHER_FORM[name]:
        (copy / name).write_text(content + "\n")
        check_refusal(copy, name, capsys)


def first(rollout: dict) -> dict:
    return rollout["train"][0]["completions"][0]


@pytest.mark.parametrize("change", [
    lambda rollout: rollout.pop("heldout"),
    lambda rollout: rollout.pop("step"),
    lambda rollout: rollout.update(step="many"),
    lambda rollout: rollout.update(train=None, heldout=7),
    lambda rollout: rollout["train"].append("text"),
    lambda rollout: rollout["train"][0].update(query=["x"]),
    lambda rollout: rollout["train"][0].update(completions=[]),
    lambda rollout: rollout["heldout"][0].pop("size"),
    lambda rollout: rollout["heldout"][0].update(size=["a", "b"]),
    lambda rollout: rollout["heldout"][0].update(image="http://x/y.png"),
    lambda rollout: first(rollout).pop("mask"),
    lambda rollout: first(rollout).update(mask='data:image/png;base64,AA" onload="alert(1)'),
    lambda rollout: first(rollout).update(box=[1, 2, 3]),
    lambda rollout: first(rollout).update(box=["<b>", 2, 3, 4]),
    lambda rollout: first(rollout).update(points=[[1, "<b>"]]),
    lambda rollout: first(rollout).update(reward="<b>"),
    lambda rollout: first(rollout).update(text=None),
    lambda rollout: first(rollout).update(tokens=[1, 2], clipped=None),
    lambda rollout: first(rollout).update(clipped=[1]),
    lambda rollout: first(rollout).update(clipped=[2] * len(first(rollout)["tokens"])),
])  # fmt: skip
def test_a_rollout_of_another_form_is_refused(copy, change, capsys, no_curves):
    file = copy / "rollouts" / "step_00050.json"
    rollout = json.loads(file.read_text())
    change(rollout)
    file.write_text(json.dumps(rollout))
    check_refusal(copy, "step_00050.json", capsys)


def test_numbers_that_are_not_finite_become_dashes(copy, no_curves):
    file = copy / "rollouts" / "step_00050.json"
    rollout = json.loads(file.read_text())
    first(rollout).update(reward=float("nan"), advantage=float("inf"))
    file.write_text(json.dumps(rollout))
    page = html.unescape(report.report_html(copy))
    assert "reward <b>\N{EN DASH}</b>" in page and "advantage <b>\N{EN DASH}</b>" in page
    assert not re.search(r">[+-]?(nan|inf)<", page)


def test_the_command_writes_the_page(copy, capsys, page):
    report.main([str(copy)])
    assert str(copy / "report.html") in capsys.readouterr().out
    assert len((copy / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)


# ----------------------------------------------------------------------------------------------
# The page in a browser
# ----------------------------------------------------------------------------------------------

# The DevTools protocol uses two pipes, which the browser expects as its files 3 and 4.
START = """import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4), os.execvp(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One page of a headless Chromium. Call it with a method of the DevTools protocol."""

    def __init__(self, program: str, profile: Path):
        theirs_in, self.out = os.pipe()
        self.source, theirs_out = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
        flags += " --disable-breakpad --remote-debugging-pipe"
        ends = [str(theirs_in), str(theirs_out)]
        profile = f"--user-data-dir={profile}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *ends, program, *flags.split(), profile, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.sent, self.session, self.events = b"", 0, {}, []
        targets = self("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.source], [], [], 60)[0], "the browser does not answer"
            more = os.read(self.source, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **params) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (message := self.read()).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, address: str, width: int = 1280, scheme: str = "light") -> None:
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
        self("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=features)
        for each in ("about:blank", address):  # a change of the fragment alone loads nothing
            self.events.clear()
            self("Page.navigate", url=each)
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.events.append(self.read())

    def js(self, code: str):
        result = self("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
        for event in ("rawKeyDown", "keyUp"):
            keys = dict(key=key, code=key, windowsVirtualKeyCode=code)
            self("Input.dispatchKeyEvent", type=event, **keys)

    def screenshot(self, selector: str) -> np.ndarray:
        """Pixels (H, W, 3) of the first element that a CSS selector finds."""
        box = self.js(f"""(() => {{
            const box = document.querySelector({selector!r}).getBoundingClientRect();
            return [box.x + scrollX, box.y + scrollY, box.width, box.height];
        }})()""")
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
        shot = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def close(self) -> None:
        self.session = {}
        self("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.source)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program or os.name != "posix":
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address(run, page) -> str:
    (run / "report.html").write_text(page)
    yield (run / "report.html").as_uri()
    (run / "report.html").unlink()


SHOWN = """[...document.querySelectorAll(".step")].filter(one => one.checkVisibility())
    .map(one => Number(one.id.slice(5)))"""


@pytest.mark.slow
@pytest.mark.parametrize(("fragment", "step"), [("", 100), ("#step-50", 50), ("#step-7", 100)])
def test_the_page_asks_for_nothing_and_shows_one_step(browser, address, fragment, step):
    browser.open(address + fragment)
    assert browser.js(SHOWN) == [step]
    assert browser.js("document.querySelector('output').value") == str(step)
    assert browser.js("document.querySelector('.curves').naturalWidth > 500")
    requests = [e["params"]["request"]["url"] for e in browser.events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert [url for url in requests if not url.startswith("data:image/")] == [address]
    noise = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    noise.add("Page.javascriptDialogOpening")
    assert [event for event in browser.events if event["method"] in noise] == []


@pytest.mark.slow
def test_the_slider_goes_through_the_steps(browser, address):
    browser.open(address)
    browser.js("document.querySelector('#at').focus()")
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        browser.press(key)
        seen.append(browser.js(SHOWN))
    assert seen == [[1], [50], [100], [100], [50], [100]]
    assert browser.js("document.querySelector('#at').ariaValueText") == "100"


@pytest.mark.slow
def test_the_browser_shows_the_texts_of_the_files(browser, address, run):
    browser.open(address + "#step-50")
    shown = browser.js("""[...document.querySelectorAll("#step-50 .text")].map(one => {
        const copy = one.cloneNode(true);
        copy.querySelectorAll("sup, i").forEach(part => part.remove());
        return copy.textContent;
    })""")
    rollout = read_rollouts(run)[1]
    scenes = rollout["heldout"] + rollout["train"]
    assert shown == [answer["text"] for one in scenes for answer in one["completions"]]
    assert HOSTILE in shown
    config = json.loads(browser.js("document.querySelector('pre').textContent"))
    assert config["note"] == HOSTILE


@pytest.mark.slow
def test_outlines_are_drawn_with_a_dark_edge(browser, address):
    browser.open(address + "#step-1")  # where masks are far from the truth
    green, magenta = (0, 255, 0), (255, 0, 255)
    parts = {"#step-1 li svg": [green], "#step-1 li + li svg": [green, magenta]}
    for selector, colours in parts.items():
        pixels = browser.screenshot(selector).astype(int)
        dark = np.pad(pixels.sum(2) < 60, 3)
        steps = range(-3, 4)
        shifts = [np.roll(dark, (y, x), (0, 1)) for y in steps for x in steps]
        near = np.any(shifts, axis=0)[3:-3, 3:-3]  # within 3 pixels of a dark one
        for colour in colours:
            line = (abs(pixels - colour) < 8).all(2)
            assert line.sum() > 20, colour
            assert near[line].mean() > 0.8, colour


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_width_in_both_colour_schemes(browser, address, width):
    grounds = {}
    for scheme in ("light", "dark"):
        browser.open(address, width, scheme)
        browser.js("document.querySelector('details').open = true")
        assert browser.js("document.documentElement.scrollWidth") <= width, scheme
        grounds[scheme] = browser.screenshot("h1").astype(int)
    assert grounds["light"].max() - grounds["light"].min() > 200
    assert np.median(grounds["light"]) > 200 > 60 > np.median(grounds["dark"])
    narrow = browser.js("document.querySelector('.curves').currentSrc.length")
    assert narrow and browser.js("document.querySelector('.curves').naturalHeight > 1000") == (
        width == 360
    )


@pytest.mark.slow
def test_everything_on_the_page_has_a_name(browser, address):
    browser.open(address)
    nodes = [n for n in browser("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    named = {"image", "slider", "RootWebArea", "columnheader", "rowheader", "heading"}
    found = [(n["role"]["value"], n["name"]["value"]) for n in nodes if "name" in n]
    found = [pair for pair in found if pair[0] in named]
    assert {"image", "slider", "heading"} <= {role for role, _ in found}
    assert [pair for pair in found if not pair[1].strip() and pair[0] != "columnheader"] == []

"""Figures of runs, the record of rollouts, and the report page of a run."""

import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import refused
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from data import Sample
from grpo import Completions
from plumbing import evaluation, pictures
from reward import SamPrompt, score_completions
from tools import report

HOSTILE = '</pre><script>alert(1)</script><img src="http://x/y" onerror="alert(2)"><!-- <b> $name'
COMPACT = '<think>a star</think><answer>{"bbox":[1,20,333,444],"points_1":[5,66],"points_2":[7,8]}'


@pytest.fixture(scope="module")
def rolled(samples, scorer, policy_parts):
    """A scene and a photograph with four completions each: two boxes, a thought alone, nothing."""
    large = samples[0].image.resize((1280, 960))  # 10 times as large
    mask = samples[0].mask.repeat(10, 0).repeat(10, 1)
    batch = [samples[1], Sample(large, "query", mask, None, "id")]
    answer = '<think>the star</think><answer>{{"bbox":{},"points_1":[20,30]}}</answer>'
    group = [answer.format("[2,2,60,60]"), answer.format("[10,5,40,40]"), "<think>the star", ""]
    tokenizer = policy_parts.processor.tokenizer
    ended = [text + tokenizer.eos_token for text in group]
    rows = tokenizer(ended, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = (rows[name].expand(2, -1, -1) for name in ("input_ids", "attention_mask"))
    return SimpleNamespace(
        batch=batch,
        texts=[group, group],
        completions=Completions(ids, mask.bool()),
        scores=score_completions(scorer, batch, [group, group], 64, keep_masks=True),
        tokenizer=tokenizer,
    )


def test_the_running_mean_does_not_lag_and_leaves_out_missing_values():
    """The drawn mean of a step function crosses one half at the step."""
    axes = Figure().add_subplot()
    rows = [{"step": step, "iou": float(step >= 100)} for step in range(1, 201)]
    rows[20]["iou"] = None
    rows[160]["iou"] = float("inf")
    pictures.smooth(axes, rows, "iou", "C0")
    steps, mean = axes.lines[1].get_data()
    assert len(steps) == 200 - 14  # windows of 15 steps
    assert np.interp(0.5, mean, steps) == pytest.approx(99.5, abs=0.01)
    assert mean.min() == 0 and mean.max() == 1


@pytest.mark.parametrize("width", [20, 32])
def test_wrapped_answers_are_whole_and_no_number_is_cut(width):
    lines = pictures.wrap(COMPACT, width, lines=20).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(COMPACT.split())  # nothing is lost
    assert re.findall(r"\w+", "\n".join(lines)) == re.findall(r"\w+", COMPACT)
    lines = pictures.wrap("<think>" + "it is not the star, but $5 " * 30 + COMPACT, 32).split("\n")
    assert len(lines) <= pictures.LINES
    assert lines[0].startswith("<think>") and lines[-1].endswith("[7, 8]}")


def test_the_sample_sheets_show_queries_rewards_and_masks(rolled):
    """Their text has at least 8 points on a screen, in a figure that is not wider than one."""
    figure = pictures.groups(rolled.batch, rolled.texts, rolled.scores, columns=3)
    assert figure.get_figwidth() * figure.dpi <= 1400
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) * figure.dpi / 72 >= 8 * 96 / 72
    shown = " ".join(t.get_text().replace("\n", " ") for t in texts)
    for b, one in enumerate(rolled.batch):
        reward, iou = rolled.scores.reward[b, 0], rolled.scores.iou[b, 0]
        assert one.query in shown and f"reward {reward:.3g}, IoU {iou:.2f}" in shown
    figure.savefig(drawn := io.BytesIO())
    pixels = np.asarray(Image.open(drawn).convert("RGB"))
    for colour in ((255, 0, 255), (0, 255, 0)):  # SAM's mask and the true one
        assert (pixels == colour).all(2).sum() > 50


def test_the_evaluation_sheet_shows_best_median_and_worst(samples, scorer):
    ious = np.random.default_rng(0).permutation(np.linspace(0, 1, 12))
    rows = [{"iou": iou, "box": (5.0, 5.0, 40.0, 40.0), "points": ()} for iou in ious]
    rows[3] = {"skipped": "unreadable"}
    ranked = sorted((row["iou"] for row in rows if "iou" in row), reverse=True)
    figure = evaluation.evaluation_sheet(rows, scorer, samples * 2, SamPrompt, count=2)
    picked = ("best", ranked[:2]), ("median", ranked[4:6]), ("worst", ranked[-2:])
    expected = [f"{name}: IoU {iou:.2f}" for name, part in picked for iou in part]
    assert [axes.get_title() for axes in figure.axes] == expected


@pytest.mark.parametrize(
    "fonts, title, below",
    [
        ("STIXGeneral$", "\u2316 A", "\u2316 B"),
        ("none", "(query in characters that no installed font has)", "? B"),
    ],
)
def test_other_scripts_have_their_font_or_a_note(fonts, title, below, samples, monkeypatch):
    """matplotlib warns about a box in place of a character, and a warning fails this test.

    Of the fonts that it comes with, STIX has a character that the others lack.
    """
    assert pictures.SCRIPTS.search("WenQuanYi Zen Hei")
    monkeypatch.setattr(pictures, "SCRIPTS", re.compile(fonts))
    monkeypatch.setattr(pictures, "font_of", pictures.font_of.__wrapped__)  # without the cache
    image, mask = samples[0].image, samples[0].mask
    figure = evaluation.found(image, "\u2316 A", mask, SamPrompt(None, ()), "\u2316 B")
    figure.savefig(io.BytesIO())
    axes = figure.axes[0]
    assert (axes.get_title(), axes.get_xlabel()) == (title, below)


@pytest.mark.parametrize("size", [(190, 1), (10, 2000)])
def test_pictures_of_any_shape_are_drawn_with_any_text(size):
    """The figure of a tall one is bounded: otherwise drawing it takes 12 GiB."""
    image = Image.new("RGB", size)
    mask = np.ones(size[::-1], bool)
    prompt = SamPrompt((0, 0, 1, 1), ((1, 1),))
    assert max(pictures.answer_picture(image, mask, prompt, mask).size) == 320
    figure = evaluation.found(image, "is it $5 or $6?", mask, prompt, "$x_")
    width, height = figure.get_size_inches()
    assert figure.axes[0].get_title() == "is it $5 or $6?" and width == 7 and height <= 30
    figure.savefig(io.BytesIO())


def test_a_large_picture_is_drawn_small_in_its_own_pixels(monkeypatch):
    """The mask and the prompt stay where they are on the picture, on the same axes."""
    monkeypatch.setattr(pictures, "DRAWN", 100)
    image = Image.new("RGB", (300, 200), "navy")
    mask = np.zeros((200, 300), bool)
    mask[60:120, 90:180] = True
    axes = evaluation.found(image, "q", mask, SamPrompt(None, ()), "").axes[0]
    assert axes.images[0].get_array().shape[:2] == (67, 100)
    assert (*axes.get_xlim(), *axes.get_ylim()) == pytest.approx((-0.5, 299.5, 199.5, -0.5), abs=1)
    (outline,) = [c for c in axes.collections if isinstance(c, ContourSet)]
    corners = outline.get_paths()[0].get_extents().get_points().ravel()
    assert corners == pytest.approx([89.5, 59.5, 179.5, 119.5], abs=1.5)


def test_a_record_holds_what_was_scored(rolled):
    """The photograph has half of its size, and so have its masks, boxes and points."""
    completions, scores = rolled.completions, rolled.scores
    advantages = torch.arange(8.0).view(2, 4) - 3.5
    clipped = torch.randint(-1, 2, completions.ids.shape, dtype=torch.int8)
    rows = pictures.record_rollouts(
        rolled.batch, completions, scores, rolled.tokenizer, advantages, clipped
    )
    for b, row in enumerate(json.loads(json.dumps(rows))):
        one, step = rolled.batch[b], 1 + b
        truth = one.mask[::step, ::step]
        image = report.decode(row["image"])
        assert (row["id"], row["query"]) == (one.id, one.query)
        assert (image.format, image.size) == (("PNG", "JPEG")[b], truth.shape[::-1])
        difference = np.asarray(image, float) - np.asarray(one.image.reduce(step))
        assert abs(difference).mean() <= 3 * b
        assert np.array_equal(np.asarray(report.decode(row["truth"])), truth)
        for g, answer in enumerate(row["completions"]):
            length = completions.mask[b, g].sum()
            prompt = scores.prompts[b][g]
            assert answer["text"] == rolled.texts[b][g]
            assert "".join(answer["tokens"]) == answer["text"] + "<|im_end|>"
            assert answer["clipped"] == clipped[b, g, :length].tolist()
            assert answer["advantage"] == advantages[b, g]
            assert answer["box"] == (prompt.box and [v / step for v in prompt.box])
            assert answer["points"] == [[x / step, y / step] for x, y in prompt.points]
            mask = np.asarray(report.decode(answer["mask"]))
            iou = (mask & truth).sum() / (mask | truth).sum()
            assert answer["iou"] == pytest.approx(iou, abs=0.01 * b + 1e-6)
            for name in pictures.NUMBERS:
                assert answer[name] == getattr(scores, name)[b, g].item()


def test_token_texts_join_to_the_completion():
    """Every byte is a token, and characters need up to four of them."""
    bytewise = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", "replace"))
    texts = pictures.token_texts([*"née\U0001f600 ".encode()], bytewise)
    assert texts == ["n", "", "é", "e", "", "", "", "\U0001f600", " "]
    cut = [*"é\U0001f600".encode()[:4], 255]  # within a character
    assert "".join(pictures.token_texts(cut, bytewise)) == bytewise.decode(cut)


@pytest.fixture(scope="module")
def run(tmp_path_factory, rolled) -> Path:
    """A run with two logged steps and hostile texts; a third line of its log is being written."""
    run = tmp_path_factory.mktemp("report") / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"vlm": "tiny", "note": HOSTILE}))
    means = {"giou": 0.5, "ciou": 0.45, "format": 0.9, "box": 0.5, "n": 64}
    results = {"before": means, "ceiling": {"giou": 0.9, "ciou": 0.85, "n": 64}}
    results["after"] = means | {"giou": 0.75, "giou_95": [0.7, 0.8125]}
    (run / "eval.json").write_text(json.dumps(results))
    lines = '{"step": 1, "reward": 2.0, "kl": NaN}\n{"step": 2, "reward": null}\n{"step": 3, "rew'
    (run / "metrics.jsonl").write_text(lines)
    clipped = torch.zeros(rolled.completions.ids.shape, dtype=torch.int8)
    clipped[0, 0, 4:7] = torch.tensor([1, 0, -1])
    rolls = (rolled.completions, rolled.scores, rolled.tokenizer)
    heldout = pictures.record_rollouts(rolled.batch, *rolls)
    train = pictures.record_rollouts(rolled.batch, *rolls, rolled.scores.reward - 1, clipped)
    train[1] |= {"query": HOSTILE, "id": HOSTILE}
    tokens = re.findall(r"\W|\w+", HOSTILE)
    train[1]["completions"][0] |= {"text": HOSTILE, "tokens": tokens, "clipped": None}
    for step in (1, 2):
        record = json.dumps({"step": step, "train": train, "heldout": heldout})
        (run / "rollouts" / f"step_{step:05d}.json").write_text(record)
    return run


@pytest.fixture(scope="module")
def page(run) -> str:
    report.main([str(run)])
    return (run / "report.html").read_text()


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "", markup))


def test_every_rollout_is_on_the_page(page, run):
    """Steps in order, with the numbers, texts and clipped tokens of the files."""
    assert re.findall(r"<summary>Step (\d+)", page) == ["1", "2"]
    cards = re.findall(r"<li><img[^>]*><p>(reward.*?)</p><pre>(.*?)</pre>", page, re.DOTALL)
    records = [json.loads(file.read_text()) for file in sorted((run / "rollouts").iterdir())]
    scenes = [one for record in records for one in record["heldout"] + record["train"]]
    answers = [answer for one in scenes for answer in one["completions"]]
    for (line, text), answer in zip(cards, answers, strict=True):
        line = text_of(line)
        assert line.startswith(f"reward {answer['reward']:.3g} = {answer['accuracy']:.3g} accuracy")
        assert f"IoU {answer['iou']:.2f}" in line
        if answer["advantage"] is not None:
            assert f"advantage {answer['advantage']:+.3g}" in line
        sides = answer["clipped"] or [0] * len(answer["tokens"])
        marks = ({0: "", 1: "\u25b2", -1: "\u25bc"}[side] for side in sides)
        pairs = zip(answer["tokens"], marks, strict=True)
        assert text_of(text) == "".join(token + mark for token, mark in pairs)


def test_hostile_text_stays_text(page):
    """Also if an escape were missing, the page allows no script and no request."""
    elements = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.handle_comment = lambda comment: pytest.fail(comment)
    parser.feed(page)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy in [attributes.get("content") for _, attributes in elements]
    assert {tag for tag, _ in elements}.isdisjoint({"script", "iframe", "object", "link", "a"})
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert images and all(image["src"].startswith("data:image/") for image in images)
    assert not [name for _, attributes in elements for name in attributes if name[:2] == "on"]
    shown = text_of(page)
    assert shown.count(HOSTILE) == 2 * 3  # in two steps: as the id, the query and the text
    assert json.dumps(HOSTILE) in shown  # among the settings


def test_the_table_shows_eval_json(page):
    rows = re.findall(r"<tr>(.*)", re.sub("</t[hd]>", "|", page))
    assert [text_of(row) for row in rows] == [
        "|gIoU|cIoU|format|box@0.5|samples|",
        "before|0.5|0.45|0.9|0.5|64|",
        "after|0.75 (0.700 to 0.812)|0.45|0.9|0.5|64|",
        "ceiling|0.9|0.85|||64|",
    ]
    assert "Training closed 62 % of the gap" in page  # 0.25 of 0.4
    assert "Curves of 2 steps" in page


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run with the first of the two steps."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "rollouts" / "step_00002.json").unlink()
    return copy


DAMAGED = [
    ("eval.json", b"\xff"),
    ("eval.json", b"[" * 100_000),
    ("eval.json", b'{"before": {"giou": "high"}}'),
    ("metrics.jsonl", b'{"reward": 1}\n'),
    ("rollouts/step_00001.json", b"[]"),
]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(name, content, copy):
    (copy / name).write_bytes(content)
    message = refused(report.report_html, copy)
    assert f"{Path(name).name} is damaged, or not of a run" in message


def test_missing_parts_are_named(copy):
    (copy / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (copy / "rollouts" / "step_00001.json").unlink()
    page = report.report_html(copy)
    assert "Curves of 2 steps" in page and "No rollouts were logged" in page
    (copy / "eval.json").unlink()
    (copy / "metrics.jsonl").unlink()
    page = report.report_html(copy)
    assert "No evaluation was written yet" in page and "No step was logged yet" in page
    (copy / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # of a model
    assert "not the folder of a run: its config.json" in refused(report.report_html, copy)
    (copy / "config.json").unlink()
    assert "not the folder of a run: it has no config.json" in refused(report.report_html, copy)

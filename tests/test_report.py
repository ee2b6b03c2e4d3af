"""Figures of runs, the record of rollouts, and the report page of a run."""

import doctest
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
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo import Completions
from plumbing import pictures
from plumbing.errors import UserError
from reward import SamPrompt, score_completions
from tools import report

ROOT = Path(report.__file__).resolve().parent.parent
HOSTILE = '</pre><script>alert(1)</script><img src="http://x/y" onerror="alert(2)"><!-- <b> $name'
COMPACT = '<think>a star</think><answer>{"bbox":[1,20,333,444],"points_1":[5,66],"points_2":[7,8]}'


def test_docstrings():
    failed, tried = doctest.testmod(pictures)
    assert tried and not failed


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "vlm")


@pytest.fixture(scope="module")
def rolled(samples, scorer, tokenizer):
    """Two scenes with four completions each: two boxes, a thought alone, nothing."""
    boxes = ("[2,2,60,60]", "[10,5,40,40]")
    group = [f'<think>the star</think><answer>{{"bbox":{box}}}</answer>' for box in boxes]
    texts = [[*group, "<think>the star</think>", ""]] * 2
    rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts[0]]
    T = max(map(len, rows))
    ids = torch.tensor([[row + [0] * (T - len(row)) for row in rows]] * 2)
    mask = torch.tensor([[[t < len(row) for t in range(T)] for row in rows]] * 2)
    scores = score_completions(scorer, samples[:2], texts, 64, keep_masks=True)
    return SimpleNamespace(texts=texts, completions=Completions(ids, mask), scores=scores)


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def pixels_of(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


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


def test_an_outline_closes_at_the_border_and_an_empty_mask_has_none():
    image = Image.new("RGB", (40, 40), "lime")
    empty = np.zeros((40, 40), bool)
    none = SamPrompt(None, ())
    assert len(np.unique(np.asarray(pictures.answer_picture(image, empty, none)))) == 2  # 0, 127
    full = np.asarray(pictures.answer_picture(image, ~empty, none))
    for side in (full[0], full[-1], full[:, 0], full[:, -1]):
        assert (side[2:-2] != (0, 255, 0)).any(1).all()


@pytest.mark.parametrize("width", [20, 32])
def test_wrapped_answers_are_whole_and_no_number_is_cut(width):
    lines = pictures.wrap(COMPACT, width, lines=20).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(COMPACT.split())  # nothing is lost
    assert re.findall(r"\w+", "\n".join(lines)) == re.findall(r"\w+", COMPACT)
    lines = pictures.wrap("<think>" + "it is not the star, but $5 " * 30 + COMPACT, 32).split("\n")
    assert len(lines) <= pictures.LINES
    assert lines[0].startswith("<think>") and lines[-1].endswith("[7, 8]}")


def test_the_sample_sheets_show_queries_rewards_and_masks(samples, rolled):
    """Their text has at least 8 points on a screen, in a figure that is not wider than one."""
    figure = pictures.groups(samples[:2], rolled.texts, rolled.scores, columns=3)
    assert figure.get_figwidth() * figure.dpi <= 1400
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) * figure.dpi / 72 >= 8 * 96 / 72
    shown = "\n".join(t.get_text() for t in texts)
    for b, one in enumerate(samples[:2]):
        assert one.query in shown.replace("\n", " ")
        reward, iou = rolled.scores.reward[b, 0], rolled.scores.iou[b, 0]
        assert f"reward {reward:.3g}, IoU {iou:.2f}" in shown
    pixels = pixels_of(figure)
    for colour in ((255, 0, 255), (0, 255, 0)):  # SAM's mask and the true one
        assert (pixels == colour).all(2).sum() > 50


def test_the_evaluation_sheet_shows_best_median_and_worst(samples, scorer):
    ious = np.random.default_rng(0).permutation(np.linspace(0, 1, 12))
    rows = [{"iou": iou, "box": (5.0, 5.0, 40.0, 40.0), "points": ()} for iou in ious]
    rows[3] = {"skipped": "unreadable"}
    ranked = sorted((row["iou"] for row in rows if "iou" in row), reverse=True)
    figure = pictures.evaluation_sheet(rows, scorer, samples * 2, SamPrompt, count=2)
    picked = ("best", ranked[:2]), ("median", ranked[4:6]), ("worst", ranked[-2:])
    expected = [f"{name}: IoU {iou:.2f}" for name, part in picked for iou in part]
    assert [axes.get_title() for axes in figure.axes] == expected


def write_font(file: Path, characters: str, family: str) -> None:
    """A font in which each of these characters is a triangle."""
    names = {ord(c): f"u{ord(c):04X}" for c in characters}
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    pen.lineTo((450, 700))
    pen.lineTo((850, 0))
    pen.closePath()
    glyphs = [".notdef", *names.values()]
    font = FontBuilder(1000)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap(names)
    font.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)


@pytest.mark.parametrize("installed", [True, False])
def test_other_scripts_have_their_font_or_a_note(installed, samples, rolled, tmp_path, monkeypatch):
    """matplotlib warns about a box in place of a character, and a warning fails this test."""
    font = tmp_path / "font.ttf"
    write_font(font, "红色的圆形", "WenQuanYi Zen Hei" if installed else "Unknown")
    plain = [one for one in fontManager.ttflist if not pictures.SCRIPTS.search(one.name)]
    monkeypatch.setattr(fontManager, "ttflist", plain)
    fontManager.addfont(font)
    pictures.font_of.cache_clear()
    mask = rolled.scores.overlap.masks[0][0].numpy()
    figure = pictures.found(
        samples[0].image, "红色的圆形 A", mask, rolled.scores.prompts[0][0], "红 B"
    )
    pixels_of(figure)
    title, below = figure.axes[0].title, figure.axes[0].xaxis.label
    pictures.font_of.cache_clear()
    if installed:
        assert (title.get_text(), below.get_text()) == ("红色的圆形 A", "红 B")
        assert title.get_fontfamily() == ["DejaVu Sans", "WenQuanYi Zen Hei"]
    else:
        assert title.get_text() == "(query in characters that no installed font has)"
        assert below.get_text() == "? B"


@pytest.mark.parametrize("size", [(190, 1), (10, 2000)])
def test_pictures_of_any_shape_are_drawn_with_any_text(size):
    """The figure of a tall one is bounded: otherwise drawing it takes 12 GiB."""
    image = Image.new("RGB", size)
    mask = np.ones(size[::-1], bool)
    prompt = SamPrompt((0, 0, 1, 1), ((1, 1),))
    assert max(pictures.answer_picture(image, mask, prompt, mask).size) == 320
    figure = pictures.found(image, "is it $5 or $6?", mask, prompt, "$x_")
    width, height = figure.get_size_inches()
    assert figure.axes[0].get_title() == "is it $5 or $6?" and width == 7 and height <= 30
    assert pixels_of(figure).any()


# --------------------------------------------------------------------------------------------------
# The record of rollouts
# --------------------------------------------------------------------------------------------------


def test_a_record_holds_what_was_scored(samples, rolled, tokenizer):
    completions, scores = rolled.completions, rolled.scores
    advantages = torch.arange(8.0).view(2, 4) - 3.5
    clipped = torch.randint(-1, 2, completions.ids.shape, dtype=torch.int8)
    rows = pictures.record_rollouts(
        samples[:2], completions, scores, tokenizer, advantages, clipped
    )
    for b, row in enumerate(json.loads(json.dumps(rows))):
        assert (row["id"], row["query"]) == (samples[b].id, samples[b].query)
        assert np.array_equal(np.asarray(report.decode(row["image"])), np.asarray(samples[b].image))
        assert np.array_equal(np.asarray(report.decode(row["truth"])), samples[b].mask)
        for g, answer in enumerate(row["completions"]):
            length = completions.mask[b, g].sum()
            box = scores.prompts[b][g].box
            assert answer["text"] == rolled.texts[b][g]
            assert "".join(answer["tokens"]) == answer["text"] + "<|im_end|>"
            assert answer["clipped"] == clipped[b, g, :length].tolist()
            assert answer["advantage"] == advantages[b, g]
            assert answer["box"] == (list(box) if box else None)
            mask = np.asarray(report.decode(answer["mask"]))
            iou = (mask & samples[b].mask).sum() / (mask | samples[b].mask).sum()
            assert answer["iou"] == pytest.approx(iou, abs=1e-6)
            for name in pictures.NUMBERS:
                assert answer[name] == getattr(scores, name)[b, g].item()


def test_large_pictures_are_scaled_down_with_their_masks_and_boxes(rolled, tokenizer):
    mask = np.zeros((960, 1280), bool)
    mask[:481, :640] = True
    image = Image.new("RGB", (1280, 960), "navy")
    sample = SimpleNamespace(id="a", query="q", image=image, mask=mask)
    prompts = [[SamPrompt((0.0, 0.0, 640.0, 480.0), ((100.0, 50.0),))] * 4]
    overlap = rolled.scores.overlap._replace(masks=[torch.from_numpy(np.stack([mask] * 4))])
    scores = rolled.scores._replace(prompts=prompts, overlap=overlap)
    (row,) = pictures.record_rollouts([sample], rolled.completions, scores, tokenizer)
    answer = row["completions"][0]
    assert report.decode(row["image"]).format == "JPEG"
    for uri in (row["image"], row["truth"], answer["mask"]):
        assert report.decode(uri).size == (640, 480)
    assert np.asarray(report.decode(answer["mask"])).mean() == pytest.approx(0.25, abs=0.01)
    assert answer["box"] == [0, 0, 320, 240] and answer["points"] == [(50, 25)]


def test_token_texts_join_to_the_completion():
    """Byte-level like Qwen's, but without merges: every byte is a token."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet |= {chr(256 + k): byte for k, byte in enumerate(rest)}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.decoder = decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    ids = [*"née\U0001f600 ".encode(), tokens.eos_token_id]
    expected = ["n", "", "é", "e", "", "", "", "\U0001f600", " ", "<|im_end|>"]
    assert pictures.token_texts(ids, tokens) == expected
    cut = [*"é\U0001f600".encode()[:4], tokens.eos_token_id, 255]  # within a character
    assert "".join(pictures.token_texts(cut, tokens)) == tokens.decode(cut)


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, rolled, samples, tokenizer) -> Path:
    """A run with two logged steps and hostile texts; a third line of its log is being written."""
    run = tmp_path_factory.mktemp("report") / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"vlm": "tiny", "note": HOSTILE}))
    means = {"giou": 0.5, "ciou": 0.45, "format": 0.9, "box": 0.5, "n": 64}
    ceiling = {"giou": 0.9, "ciou": 0.85, "n": 64}
    after = means | {"giou": 0.75, "giou_95": [0.7, 0.8125]}
    results = {"before": means, "ceiling": ceiling, "after": after}
    (run / "eval.json").write_text(json.dumps(results))
    rows = [{"step": 1, "reward": 2.0, "kl": float("nan")}, {"step": 2, "reward": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 3, "rew')
    clipped = torch.zeros(rolled.completions.ids.shape, dtype=torch.int8)
    clipped[0, 0, 4] = 1
    clipped[0, 0, 6] = -1
    rolls = (rolled.completions, rolled.scores, tokenizer)
    for step in (1, 2):
        train = pictures.record_rollouts(samples[:2], *rolls, rolled.scores.reward - 1, clipped)
        train[1] |= {"query": HOSTILE, "id": HOSTILE}
        tokens = re.findall(r"\W|\w+", HOSTILE)
        train[1]["completions"][0] |= {"text": HOSTILE, "tokens": tokens, "clipped": None}
        heldout = pictures.record_rollouts(samples[:2], *rolls)
        record = json.dumps({"step": step, "train": train, "heldout": heldout})
        (run / "rollouts" / f"step_{step:05d}.json").write_text(record)
    report.main([str(run)])
    return run


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "report.html").read_text()


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "", markup))


def test_every_rollout_is_on_the_page(page, run):
    """Steps in order, with the numbers, texts and clipped tokens of the files."""
    cards = re.findall(r"<li><img[^>]*><p>(reward.*?)</p><pre>(.*?)</pre>", page, re.DOTALL)
    records = [json.loads(file.read_text()) for file in sorted((run / "rollouts").iterdir())]
    assert re.findall(r"<summary>Step (\d+)", page) == ["1", "2"]
    scenes = [one for record in records for one in record["heldout"] + record["train"]]
    answers = [answer for one in scenes for answer in one["completions"]]
    for (line, text), answer in zip(cards, answers, strict=True):
        line = text_of(line)
        assert line.startswith(f"reward {answer['reward']:.3g} = {answer['accuracy']:.3g} accuracy")
        assert f"IoU {answer['iou']:.2f}" in line
        if answer["advantage"] is not None:
            assert f"advantage {answer['advantage']:+.3g}" in line
        shown = ""
        sides = answer["clipped"] or [0] * len(answer["tokens"])
        for token, side in zip(answer["tokens"], sides, strict=True):
            shown += token + {0: "", 1: "\u25b2", -1: "\u25bc"}[side]
        assert text_of(text) == shown


def test_hostile_text_stays_text(page):
    """Also if an escape were missing, the page allows no script and no request."""
    elements = []
    texts = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.handle_comment = lambda comment: pytest.fail(comment)
    parser.handle_data = texts.append
    parser.feed(page)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy in [attributes.get("content") for _, attributes in elements]
    assert {tag for tag, _ in elements}.isdisjoint({"script", "iframe", "object", "link", "a"})
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert images and all(image["src"].startswith("data:image/") for image in images)
    assert not [name for _, attributes in elements for name in attributes if name[:2] == "on"]
    shown = "".join(texts)
    assert shown.count(HOSTILE) == 2 * 3  # in two steps: as the id, the query and the text
    assert json.dumps(HOSTILE) in shown  # among the settings


def test_the_table_shows_eval_json(page):
    rows = re.findall(r"<tr>(.*)", page)
    cells = [[text_of(cell) for cell in re.split(r"</t[hd]>", row)[:-1]] for row in rows]
    assert cells == [
        ["", "gIoU", "cIoU", "format", "box@0.5", "samples"],
        ["before", "0.5", "0.45", "0.9", "0.5", "64"],
        ["after", "0.75 (0.700 to 0.812)", "0.45", "0.9", "0.5", "64"],
        ["ceiling", "0.9", "0.85", "", "", "64"],
    ]
    assert "Training closed 62 % of the gap" in page  # 0.25 of 0.4
    assert "Curves of 2 steps" in page


@pytest.mark.parametrize(
    "name, note",
    [
        ("eval.json", "No evaluation was written yet"),
        ("metrics.jsonl", "No step was logged yet"),
        ("rollouts/step_00001.json", "No rollouts were logged"),
    ],
)
def test_missing_parts_and_damaged_files_are_named(name, note, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "rollouts" / "step_00002.json").unlink()
    file = copy / name
    file.write_bytes(b'{"step": 1, "tra\xff\n')
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        report.report_html(copy)
    file.unlink()
    assert note in report.report_html(copy)
    (copy / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # of a model
    with pytest.raises(UserError, match=r"not the folder of a run: its config\.json"):
        report.report_html(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"not the folder of a run: it has no config\.json"):
        report.report_html(copy)

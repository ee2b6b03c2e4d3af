"""The two ways to count an evaluation, its intervals over the images, and prompts and answers of
other systems' checkpoints."""

import json
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_reasonseg, read_rows, run
from PIL import Image

import samr1_mini
from data import Sample, messages
from plumbing import boxes, evaluation, intervals, pictures
from plumbing.errors import UserError
from plumbing.sam import load_sam
from plumbing.settings import parse_settings
from plumbing.sources import load_data
from reward import (
    Answer,
    Overlap,
    SamPrompt,
    SamScorer,
    intersection_and_union,
    parse_answer,
    sam_prompt,
    score_completions,
)

COUNTED = ("intersection", "union", "iou")


@pytest.mark.parametrize(
    "mask, truth, ignore, readable, lisa, segzero",
    [
        # lisa: of 0, 1, 2, 5 it finds 0 and 1; 5 is wrong. segzero: of the targets 0 to 4 it finds
        # 0, 1 and 3; 5 is wrong.
        ("110101", "111000", "000110", True, (2, 4, 0.5), (3, 6, 0.5)),
        ("1101", "1010", "0000", True, (1, 4, 0.25), (1, 4, 0.25)),
        # An unreadable answer has IoU 0 in segzero: the union is the target.
        ("11010", "11100", "00011", False, (2, 3, 2 / 3), (0, 5, 0)),
        # An empty union is 1 for lisa and 0 for segzero.
        ("000", "000", "000", True, (0, 0, 1), (0, 0, 0)),
        ("100", "000", "100", True, (0, 0, 1), (1, 1, 1)),
    ],
)
def test_the_counts_of_both_protocols(mask, truth, ignore, readable, lisa, segzero):
    """Pixels in one line. All three prompts get the same mask."""
    mask, truth, ignore = (np.array([list(line)]) == "1" for line in (mask, truth, ignore))
    masks = torch.from_numpy(mask).expand(3, -1, -1)
    counts = intersection_and_union(masks, torch.from_numpy(truth), torch.from_numpy(ignore))
    intersection, union = (x[None] for x in counts)  # (1, 3)
    overlap = Overlap(intersection, union, torch.ones(1, 3, dtype=torch.bool), [masks])
    sample = Sample(Image.new("RGB", (6, 1)), "q", truth, ignore if ignore.any() else None, "")
    row = {}
    for prefix in intervals.PREFIXES:
        for name in COUNTED:
            row[prefix + name] = getattr(overlap, name)[0, 0].item()
    for headline in ("lisa", "segzero"):
        s = parse_settings("eval", ["--protocol", headline])
        found = evaluation.count(row, masks, sample, readable, s)
        for name, expected in (("lisa", lisa), ("segzero", segzero)):
            assert counts_of(found[name], "") == pytest.approx(expected)
            assert counts_of(found[name], "boxonly_") == pytest.approx(expected)
        assert counts_of(found, "") == counts_of(found[headline], "")
    ceiling = counts_of(found["segzero"], "ceiling_")  # does not depend on the answer
    assert ceiling[0] == (mask & (truth | ignore)).sum()


def counts_of(columns, prefix):
    return tuple(columns[prefix + name] for name in COUNTED)


def answer_with(monkeypatch, texts):
    """Let the policy write these completions, one for each sample."""
    monkeypatch.setattr(samr1_mini.Policy, "texts", lambda *_: [[text] for text in texts])


def evaluate(out, *flags):
    """Rows and results of an evaluation."""
    run("eval --out", out, *flags)
    return read_rows(out / "answers.jsonl"), json.loads((out / "eval.json").read_text())


def wrap(body):
    return f"<think>t</think><answer>{body}</answer>"


def test_an_evaluation_on_reasonseg_has_both_columns(tmp_path, monkeypatch, capsys):
    full = '{"bbox": [8, 12, 34, 42], "points_1": [15, 20], "points_2": [25, 30]}'
    box_only = '{"bbox": [4, 4, 60, 60]}'
    answer_with(monkeypatch, map(wrap, [full, full, box_only, "no idea", full]))
    make_reasonseg(tmp_path, ["val"])
    spec = f"reasonseg:{tmp_path}/val"
    rows, results = evaluate(tmp_path / "run", "--data", spec, "--protocol", "segzero")
    scorer = SamScorer(load_sam("tiny"))
    pairs = {"lisa": [], "segzero": []}
    for sample, row in zip(load_data(spec, "heldout"), rows, strict=True):
        prompt = SamPrompt(row["box"] and tuple(row["box"]), tuple(map(tuple, row["points"])))
        mask = scorer.score([sample], [[prompt]], keep_masks=True).masks[0][0].numpy()
        ignore = np.zeros_like(mask) if sample.ignore is None else sample.ignore
        found, truth = mask[~ignore], sample.mask[~ignore]
        pairs["lisa"].append([(found & truth).sum(), (found | truth).sum()])
        found, truth = mask & row["format"], sample.mask | ignore
        pairs["segzero"].append([(found & truth).sum(), (found | truth).sum()])
    base = results["base"]
    for name, counted in pairs.items():
        assert [[row[name]["intersection"], row[name]["union"]] for row in rows] == counted
        intersection, union = np.array(counted).T
        assert base[f"{name}_giou"] == pytest.approx(np.mean(intersection / union))
        assert base[f"{name}_ciou"] == pytest.approx(intersection.sum() / union.sum())
    assert base["giou"] == base["segzero_giou"] != base["lisa_giou"]
    assert results["ceiling"]["protocol"] == "segzero"
    # The paper's figures stand beside their protocol only.
    paper = "gIoU 64.0, cIoU 55.8; probably"
    assert paper in capsys.readouterr().out
    evaluation.print_protocols(
        base | {"protocol": "lisa"}, rows, parse_settings("eval", ["--data", spec])
    )
    said = capsys.readouterr().out
    assert "probably counted by --protocol segzero" in said and paper not in said


def of_many_images() -> np.ndarray:
    generator = np.random.default_rng(0)
    union = generator.uniform(100, 10_000, 3000)
    iou = generator.beta(0.5, 0.4, 3000)
    return np.stack([iou, iou * union, union])


def test_large_samples_follow_the_normal_distribution():
    """gIoU is a mean; cIoU a ratio of means, whose error is that of (I - cIoU x U) / mean U."""
    counts = of_many_images()
    iou, intersection, union = counts
    ciou = intersection.sum() / union.sum()
    deviation = (intersection - ciou * union) / union.mean()
    found = intervals.bootstrap(counts)
    for name, mean, errors in (("giou", iou.mean(), iou), ("ciou", ciou, deviation)):
        half = 1.96 * errors.std() / 3000**0.5
        assert found[f"{name}_95"] == pytest.approx([mean - half, mean + half], abs=0.07 * half)


def test_a_paired_difference_leaves_out_what_the_images_share():
    counts = of_many_images()
    better = np.random.default_rng(1).normal(0.01, 0.02, 3000)
    improved = counts + np.stack([better, better * counts[2], np.zeros(3000)])
    half = 1.96 * better.std() / 3000**0.5
    expected = [better.mean() - half, better.mean() + half]
    found = intervals.bootstrap(improved, counts)
    assert found["giou_95"] == pytest.approx(expected, abs=0.07 * half)
    low, high = intervals.bootstrap(counts)["giou_95"]
    assert high - low > 10 * 2 * half


def test_what_was_counted_otherwise_is_refused():
    rows = [{"id": "1", "query": "it", "segzero": {}}]
    with pytest.raises(UserError, match="--against a.jsonl.*not counted by --protocol l"):
        evaluation.compare(rows, rows, "lisa", "a.jsonl")


@pytest.mark.parametrize(
    "style, query, points",
    [("full", "The {red} Thing", 2), ("segzero", "the {red} thing", 2)]
    + [("visionreasoner", "the {red} thing", 1)],
)
def test_the_example_of_a_prompt_is_a_valid_answer(style, query, points):
    *system, user = messages("The {red} Thing.", style, "pixels", 840)
    assert user["role"] == "user" and len(system) == (style == "full")
    image, text = user["content"]
    assert image == {"type": "image"} and query in text["text"]  # braces of a query are kept
    assert "in pixels of the 840 x 840 image" in text["text"] and "{{" not in text["text"]
    example = re.search("<think>your.*", text["text"])[0]
    example = example.replace("x1, y1, x2, y2", "1, 2, 3, 4").replace("x, y", "2, 3")
    answer = parse_answer(example, style)
    assert answer.think_format and answer.answer_format and len(answer.points) == points
    assert "thousandths" in messages("it", style, "thousandths", 840)[-1]["content"][1]["text"]


ONE = '{"bbox_2d": [1, 2, 30, 40], "point_2d": [5, 6]}'
SECOND = '{"bbox_2d": [50, 50, 60, 62], "point_2d": [55, 56]}'
SWAPPED = '{"bbox_2d": [60, 50, 50, 62]}'
BOX = (1, 2, 30, 40)
POINT = ((5, 6),)
OTHER = ((50, 50, 60, 62), ((55, 56),))


@pytest.mark.parametrize(
    "body, valid, box, points, others",
    [
        (f"```json\n[{ONE},]\n```".replace('"', "'"), True, BOX, POINT, ()),
        (f"[{ONE}, {SECOND}, {SECOND}]", True, BOX, POINT, (OTHER, OTHER)),
        # Valid objects stay, and the format is that of a list without errors.
        (f"[{ONE}, 5, {SWAPPED}, {SECOND}]", False, BOX, POINT, (OTHER,)),
        (f"[{ONE}, [{SECOND}]]", False, BOX, POINT, ()),
        ('[{"bbox_2d": [1, 2, 30, 40]}]', False, BOX, (), ()),
        (f"[{ONE}]".replace("1,", "NaN,"), False, None, POINT, ()),
        (ONE, False, BOX, POINT, ()),
        (f"So: [{ONE}].", False, BOX, POINT, ()),
        ("[]", False, None, (), ()),
    ],
)
def test_a_list_of_objects_is_read(body, valid, box, points, others):
    found = parse_answer(wrap(body), "visionreasoner")
    assert found == Answer(True, valid, box, points, "t", others)
    for style in ("full", "brief"):
        assert parse_answer(wrap(body), style) == Answer(True, False, None, (), "t")


def test_a_list_may_be_long():
    """VisionReasoner's longest answers: 120 objects, each with the query as its label."""
    item = SECOND[:-1] + ', "label": "' + "something that grows in the garden " * 6 + '"}'
    answer = parse_answer(wrap("[" + ", ".join([ONE] + [item] * 119) + "]"), "visionreasoner")
    assert answer == Answer(True, True, BOX, POINT, "t", (OTHER,) * 119)
    prompt = sam_prompt(answer, 64, 128, 64)
    assert prompt.objects[0] == SamPrompt((2, 2, 60, 40), ((10, 6),), prompt.others)
    assert prompt.others == (SamPrompt((100, 50, 120, 62), ((110, 56),)),) * 119


KEYS = '"bbox": [1, 2, 30, 40], "points_1": [5, 6], "points_2": [7, 8]}'
QUOTED = '{"bbox": ["1", "2", "30", "40"], "points_1": ["5", 6], "points_2": [7, "8.0"]}'
TWO = ((5, 6), (7, 8))


@pytest.mark.parametrize(
    "text, valid, box, points",
    [
        (wrap(QUOTED), True, BOX, TWO),
        (wrap(QUOTED.replace("30", "thirty")), False, None, TWO),
        (wrap("{" + KEYS.replace("bbox", "BBox_2d").replace("points", "point")), True, BOX, TWO),
        (wrap('[{"point_count": 2, ' + KEYS + "]"), True, BOX, TWO),
        ("{} It is {" + KEYS + ", not {" + KEYS.replace("1", "9"), True, BOX, TWO),
        # Its first {...} has no box: as in our own form.
        ('<think>{"a": 1}</think>' + wrap('{"a": {}, ' + KEYS)[16:], True, BOX, TWO),
        ("{" + KEYS[:-1], False, None, ()),
    ],
)
def test_segzeros_answers_are_read_as_in_its_evaluation(text, valid, box, points):
    assert parse_answer(text, "segzero")[1:4] == (valid, box, points)


@pytest.mark.parametrize(
    "style, body, readable",
    [
        ("full", 'So: {"bbox": [1, 2, 30, 40], "points_1": [5, 6], "points_2": [7, 8]}', True),
        ("full", '{"bbox": [1, 2, 30, 40], "points_1": [5, 6]}', False),
        ("visionreasoner", f"[{SWAPPED}, {ONE}]", True),
        ("visionreasoner", f"[{SWAPPED}]", False),
    ],
)
def test_what_seg_zeros_protocol_counts(style, body, readable):
    assert evaluation.is_readable(parse_answer(wrap(body), style), style) == readable


@pytest.mark.filterwarnings("ignore:invalid")  # pytest forgets the filter of answers.py
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.text("[]{}\"':,0123456789.-+eNaI bbox_2dpoint\\"))
def test_no_list_makes_the_reader_raise(body):
    for text in (body, f"[{ONE}{body}]", f"[{{'bbox_2d': {body}}}]"):
        for style in ("full", "segzero", "visionreasoner"):
            assert parse_answer(wrap(text), style).think_format


FLAGS = ("--prompt", "visionreasoner", "--max_new_tokens", "2")


def test_eval_with_visionreasoners_prompt(tmp_path, monkeypatch, capsys):
    """The first object is the target, the second one another place. Their masks are united."""
    scenes = [load_data("shapes", "heldout")[i] for i in range(2)]
    second = {"bbox_2d": [5, 30, 25, 60], "point_2d": [15, 45]}
    lists = []
    for scene in scenes:
        scale = 64 / np.array(scene.image.size)
        point = (np.argwhere(scene.mask)[0, ::-1] + 0.5) * scale
        box = np.multiply(boxes.true_box(scene.mask), np.tile(scale, 2))
        lists.append([{"bbox_2d": list(box), "point_2d": list(point)}, second])
    answer_with(monkeypatch, [wrap(json.dumps(objects)) for objects in lists])
    drawn = Mock(wraps=pictures.draw_answer)
    monkeypatch.setattr(pictures, "draw_answer", drawn)
    rows, results = evaluate(tmp_path / "run", "--limit", "2", *FLAGS)
    assert [row["box_iou"] for row in rows] == pytest.approx([1, 1])
    texts = [[wrap(json.dumps([one])) for one in objects] for objects in lists]
    options = dict(keep_masks=True, style="visionreasoner")
    alone = score_completions(SamScorer(load_sam("tiny")), scenes, texts, 64, **options)
    sheet = [mask for _, _, mask, _, _ in (call.args for call in drawn.call_args_list)]
    for b, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
        union = alone.overlap.masks[b].any(0).numpy()
        assert row["intersection"] == (union & scene.mask).sum() > 0
        assert row["union"] == (union | scene.mask).sum() > alone.overlap.union[b, 0]
        assert row["boxonly_union"] > scene.mask.sum() * 1.2  # both boxes
        assert any(np.array_equal(mask, union) for mask in sheet)
    assert results["base"]["format"] == results["base"]["points"] == 1


def test_segment_and_train_read_the_form_that_they_asked_for(tmp_path, monkeypatch, capsys):
    answer = wrap(f"[{ONE}]")
    monkeypatch.setattr(samr1_mini.Policy, "texts", lambda _, c: [[answer] * 2] * len(c.ids))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    files = ["--image", f"{tmp_path}/a.png", "--out", f"{tmp_path}/b.png"]
    run("segment --query it", *FLAGS, *files)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["bbox"] == [1, 2, 30, 40] and printed["points"] == [[5, 6]]
    quick = "--steps 1 --prompts_per_step 2 --group_size 2"
    run(f"train {quick} --out", tmp_path / "run", *FLAGS)
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["answer_format"] == 1

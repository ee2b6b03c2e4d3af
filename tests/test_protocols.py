"""The two ways to count an evaluation, and prompts and answers of other systems' checkpoints."""

import doctest
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_reasonseg
from PIL import Image

import reward
import samr1_mini
from data import Sample, messages
from plumbing import answers, prompts, protocols
from plumbing.photos import load_data
from plumbing.sam import load_sam
from reward import Answer, SamPrompt, SamScorer, parse_answer, score_completions

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.mark.parametrize("module", [protocols, prompts, answers])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


# --------------------------------------------------------------------------------------------------
# Protocols
# --------------------------------------------------------------------------------------------------


def settings_of(*flags: str):
    return samr1_mini.parse_settings("eval", list(flags))


@pytest.fixture
def count(scorer, monkeypatch):
    """A function count(mask, truth, ignore, readable) -> columns. SAM finds `mask`, one line."""
    real = reward.intersection_and_union

    def count(mask, truth, ignore, readable=True, *flags):
        truth, ignore = (np.array([line], bool) for line in (truth, ignore))
        found = torch.tensor([[mask]] * 3, dtype=torch.bool)
        patched = lambda masks, *others: real(found, *others)  # noqa: E731
        monkeypatch.setattr(reward, "intersection_and_union", patched)
        image = Image.new("RGB", truth.shape[::-1])
        sample = Sample(image, "q", truth, ignore if ignore.any() else None, "")
        overlap = scorer.score([sample], [[SamPrompt(None, ((1.0, 0.5),))] * 3])
        return protocols.count_both(overlap, 0, sample, readable, settings_of(*flags))

    return count


def counts_of(columns: dict, prefix: str = "") -> tuple:
    return tuple(columns[prefix + name] for name in ("intersection", "union", "iou"))


def test_ignored_pixels_leave_the_count_or_are_target(count):
    """Pixels 0, 1, 2 are target, 3 and 4 ignored, 5 neither. The mask holds 0, 1, 3 and 5.

    lisa: of 0, 1, 2, 5 it finds 0 and 1; 5 is wrong: 2 / 4. segzero: of the targets 0 to 4 it finds
    0, 1 and 3; 5 is wrong: 3 / 6.
    """
    found = count([1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0])
    for prefix in protocols.PREFIXES:
        assert counts_of(found["lisa"], prefix) == (2, 4, 0.5)
        assert counts_of(found["segzero"], prefix) == (3, 6, 0.5)
    found = count([1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0])
    assert counts_of(found["lisa"]) == (2, 3, pytest.approx(2 / 3))
    assert counts_of(found["segzero"]) == (4, 5, 0.8)


def test_without_ignored_pixels_both_count_the_same(count):
    found = count([1, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0])
    assert counts_of(found["lisa"]) == counts_of(found["segzero"]) == (1, 4, 0.25)


def test_an_unreadable_answer_has_iou_0_in_segzero_only(count):
    """LISA's counts what SAM made of the valid part. The ceiling does not depend on the answer."""
    found = count([1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], False)
    assert counts_of(found["lisa"]) == (2, 3, pytest.approx(2 / 3))
    for prefix in ("", "boxonly_"):
        assert counts_of(found["segzero"], prefix) == (0, 5, 0)  # the union is the target
    assert counts_of(found["segzero"], "ceiling_") == (3, 5, 0.6)


def test_an_empty_union_is_1_for_lisa_and_0_for_segzero(count):
    found = count([0, 0, 0], [0, 0, 0], [0, 0, 0])
    assert counts_of(found["lisa"]) == (0, 0, 1) and counts_of(found["segzero"]) == (0, 0, 0)
    # Everything is ignored: empty for LISA, a target of one pixel for Seg-Zero.
    found = count([1, 0, 0], [0, 0, 0], [1, 0, 0])
    assert counts_of(found["lisa"]) == (0, 0, 1) and counts_of(found["segzero"]) == (1, 1, 1)


def test_the_headline_is_the_protocol_of_the_flag(count):
    line = ([1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0])
    for name in ("lisa", "segzero"):
        found = count(*line, True, "--protocol", name)
        assert counts_of(found) == counts_of(found[name])
    assert protocols.protocols(samr1_mini.parse_settings("train", [])) == ("lisa", "segzero")
    with pytest.raises(SystemExit):
        samr1_mini.parse_settings("train", ["--protocol", "segzero"])


TEXTS = {  # answers to the five images of makers.REASONSEG, in policy pixels
    "right": '{"bbox": [8, 12, 34, 42], "points_1": [15, 20], "points_2": [25, 30]}',
    "wide": '{"bbox": [5, 6, 50, 60], "points_1": [30, 30], "points_2": [20, 20]}',
    "box only": '{"bbox": [4, 4, 60, 60]}',
    "no box": '{"points_1": [30, 30], "points_2": [20, 20]}',
    "unreadable": "no idea",
}


@pytest.fixture
def scripted(monkeypatch):
    """The policy answers with `TEXTS`. Returns a list that receives each call of SAM."""
    texts = [[f"<think>t</think><answer>{body}</answer>"] for body in TEXTS.values()]
    monkeypatch.setattr(samr1_mini.Policy, "texts", lambda self, completions: texts)
    score, calls = SamScorer.score, []

    def noted(self, samples, prompts, keep_masks=False):
        calls.append(len(samples) * len(prompts[0]))
        return score(self, samples, prompts, keep_masks)

    monkeypatch.setattr(SamScorer, "score", noted)
    return calls


def evaluate(tmp_path, *flags: str) -> tuple[list[dict], dict]:
    """The rows and results of an evaluation on a miniature ReasonSeg."""
    make_reasonseg(tmp_path / "set", ("val",))
    out = tmp_path / "-".join(("eval", *flags))
    data = ["--data", f"reasonseg:{tmp_path}/set/val"]
    samr1_mini.main(["eval", "--out", str(out), *data, *flags])
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return rows, json.loads((out / "eval.json").read_text())


def test_one_run_on_reasonseg_gives_both_columns(tmp_path, scripted, capsys):
    pytest.importorskip("cv2")
    rows, results = evaluate(tmp_path, "--protocol", "segzero")
    said = capsys.readouterr().out
    assert scripted == [15, 5]  # three prompts of each image, then the pictures of the sheet
    dataset, scorer = (
        load_data(f"reasonseg:{tmp_path}/set/val", "heldout"),
        SamScorer(load_sam("tiny")),
    )
    expected = {"lisa": [], "segzero": []}
    for one, row, name in zip(dataset, rows, TEXTS, strict=True):
        prompt = SamPrompt(row["box"] and tuple(row["box"]), tuple(map(tuple, row["points"])))
        mask = scorer.score([one], [[prompt]], keep_masks=True).masks[0][0].numpy()
        ignore = np.zeros_like(mask) if one.ignore is None else one.ignore
        counted = mask[~ignore], one.mask[~ignore]
        expected["lisa"].append(((counted[0] & counted[1]).sum(), (counted[0] | counted[1]).sum()))
        target = one.mask | ignore
        mask = mask if name in ("right", "wide") else np.zeros_like(mask)
        expected["segzero"].append(((mask & target).sum(), (mask | target).sum()))
    assert sum(one.ignore is not None for one in dataset) == 2
    for name, pairs in expected.items():
        assert [(row[name]["intersection"], row[name]["union"]) for row in rows] == pairs
        giou = np.mean([i / u for i, u in pairs])
        ciou = sum(i for i, u in pairs) / sum(u for i, u in pairs)
        assert results["base"][f"{name}_giou"] == pytest.approx(giou)
        assert results["base"][f"{name}_ciou"] == pytest.approx(ciou)
        assert f"--protocol {name}" in said and f"gIoU {giou:.3f}, cIoU {ciou:.3f}" in said
    assert (
        results["base"]["giou"] == results["base"]["segzero_giou"] != results["base"]["lisa_giou"]
    )
    assert results["ceiling"]["segzero_giou"] != results["ceiling"]["lisa_giou"]
    assert "gIoU 64.0, cIoU 55.8; probably" in said
    # A resumed evaluation keeps its protocol.
    out = ["--resume", "--out", str(tmp_path / "eval---protocol-segzero")]
    assert samr1_mini.parse_settings("eval", out).protocol == "segzero"
    with pytest.raises(SystemExit):
        samr1_mini.parse_settings("eval", [*out, "--protocol", "lisa"])
    assert "--protocol" in capsys.readouterr().err


def test_the_papers_figures_stand_beside_their_protocol_only(tmp_path, scripted, capsys):
    pytest.importorskip("cv2")
    rows, results = evaluate(tmp_path)
    said = capsys.readouterr().out
    assert results["base"]["protocol"] == "lisa" and rows[0]["iou"] == rows[0]["lisa"]["iou"]
    assert "64.0" not in said and "probably counted by --protocol segzero" in said
    for spec in ("shapes", "reasonseg:data/train", "refcocog:data"):
        assert not protocols.paper_results(spec)
    assert protocols.paper_results("refcocog:data/test") == "gIoU 75.4, cIoU 73.1"


# --------------------------------------------------------------------------------------------------
# Prompts of other systems
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style, keys", [("segzero", 2), ("visionreasoner", 1)])
def test_the_example_of_a_prompt_is_a_valid_answer(style, keys):
    (user,) = messages("The {red} Thing.", style, "pixels", 840)  # without a system message
    image, text = user["content"]
    assert image == {"type": "image"} and user["role"] == "user"
    text = text["text"]
    assert "the {red} thing\n" in text and "{{" not in text and "{query}" not in text
    assert "in pixels of the 840 x 840 image" in text
    answer = parse_answer(re.search("<think>your.*", text)[0], style)
    assert answer.think_format and answer.answer_format and len(answer.points) == keys
    for other in {"full", "segzero", "visionreasoner"} - {style}:
        valid = {style, other} == {"full", "segzero"}
        assert parse_answer(re.search("<think>your.*", text)[0], other).answer_format == valid
    assert "thousandths" in messages("it", style, "thousandths", 840)[0]["content"][1]["text"]


ONE = '{"bbox_2d": [1, 2, 30, 40], "point_2d": [5, 6]}'
OTHER = '{"bbox_2d": [50, 50, 60, 60], "point_2d": [55, 55]}'
NESTED = "[" * 900 + "]" * 900


def listed(body: str) -> Answer:
    return parse_answer(f"<think>t</think><answer>{body}</answer>", "visionreasoner")


@pytest.mark.parametrize(
    "body", [f"[{ONE}]", f"```json\n[{ONE}]\n```", f"[{ONE},]".replace('"', "'")]
)
def test_a_list_of_one_object_is_read(body):
    assert listed(body) == Answer(True, True, (1, 2, 30, 40), ((5, 6),), "t", 1)


def test_the_first_of_several_objects_counts_and_their_number_is_kept():
    assert listed(f"[{ONE}, {OTHER}, {OTHER}]") == (True, True, (1, 2, 30, 40), ((5, 6),), "t", 3)
    assert listed(f"[{OTHER}, 5]") == (True, True, (50, 50, 60, 60), ((55, 55),), "t", 2)


def test_the_parts_of_an_object_are_judged_separately():
    assert listed('[{"bbox_2d": [1, 2, 30, 40]}]')[1:4] == (False, (1, 2, 30, 40), ())
    assert listed('[{"point_2d": [5, 6]}]')[1:4] == (False, None, ((5, 6),))
    for box in (
        "[30, 2, 1, 40]",
        "[1, 2, 3]",
        "[1, 2, NaN, 4]",
        "[1, 2, 1e99, 4]",
        "[true, 2, 3, 4]",
    ):
        found = listed(f'[{{"bbox_2d": {box}, "point_2d": [5, 6]}}]')
        assert found[1:4] == (False, None, ((5, 6),)), box


HOSTILE = ("", "[]", "{}", "5", "[5]", "[[]]", "[null]", ONE, f"[[{ONE}]]", f"[5, {ONE}]", NESTED)


@pytest.mark.parametrize(
    "body", [*HOSTILE, f"[{ONE}, " + f"{OTHER}, " * 99 + "]", '[{"bbox_2d": {}}]']
)
def test_anything_else_is_no_answer(body):
    found = listed(body)
    assert (found.think_format, found.answer_format, found.box, found.points) == (
        True,
        False,
        None,
        (),
    )


@settings(max_examples=100, deadline=None)
@given(st.text("[]{}\"':,0123456789.-+eNaI bbox_2dpoint\\"))
def test_no_list_makes_the_reader_raise(body):
    for text in (body, f"[{ONE}{body}]", f"[{{'bbox_2d': {body}}}]"):
        for style in ("visionreasoner", "segzero"):
            answer = parse_answer(f"<think>t</think><answer>{text}</answer>", style)
            assert isinstance(answer.objects, int) and answer.think_format


def test_other_styles_do_not_read_a_list_nor_its_keys(scorer, samples):
    text = f"<think>t</think><answer>[{ONE}]</answer>"
    for style in ("full", "brief", "segzero"):
        assert parse_answer(text, style) == (True, False, None, (), "t", 1)
    injected = parse_answer('<answer>{"objects": "many"}</answer>', "segzero")
    assert injected.objects == 1
    for style, expected in (("visionreasoner", 1), ("full", 0)):
        scores = score_completions(scorer, samples[:1], [[text]], 64, style=style)
        assert scores.answer_format.item() == expected


def test_eval_with_visionreasoners_prompt_counts_longer_lists(tmp_path, monkeypatch, capsys):
    """The point of the first object lies on the target of its scene."""
    texts, scenes = [], load_data("shapes", "heldout")
    for one in (scenes[0], scenes[1]):
        (y, x), (height, width) = np.argwhere(one.mask)[0] + 0.5, one.mask.shape
        first = {"bbox_2d": [1, 2, 30, 40], "point_2d": [x * 64 / width, y * 64 / height]}
        texts.append([f"<think>t</think><answer>[{json.dumps(first)}, {OTHER}]</answer>"])
    monkeypatch.setattr(samr1_mini.Policy, "texts", lambda self, completions: texts)
    flags = ["--prompt", "visionreasoner", "--limit", "2", "--max_new_tokens", "4"]
    samr1_mini.main(["eval", "--out", str(tmp_path / "eval"), *flags])
    assert "2 answers list several objects" in capsys.readouterr().out
    lines = (tmp_path / "eval" / "answers.jsonl").read_text().splitlines()
    for one, row in zip((scenes[0], scenes[1]), map(json.loads, lines), strict=True):
        scale = np.array(one.image.size * 2) / 64
        assert row["box"] == pytest.approx(list(scale * (1, 2, 30, 40)))
        assert row["format"] and row["objects"] == 2 and row["points_inside"] == 1


def test_segment_reads_the_form_that_it_asked_for(tmp_path, monkeypatch, capsys):
    body = f"<think>t</think><answer>[{ONE}]</answer>"
    monkeypatch.setattr(samr1_mini.Policy, "texts", lambda self, completions: [[body]])
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    flags = ["--prompt", "visionreasoner", "--max_new_tokens", "2", "--query", "it"]
    files = ["--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    samr1_mini.main(["segment", *flags, *files])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["bbox"] == [1, 2, 30, 40] and printed["points"] == [[5, 6]]


@pytest.mark.slow
def test_train_rewards_the_form_that_it_asked_for(tmp_path, monkeypatch):
    body = f"<think>t</think><answer>[{ONE}]</answer>"

    def texts(self, completions):
        return [[body] * completions.ids.shape[1]] * completions.ids.shape[0]

    monkeypatch.setattr(samr1_mini.Policy, "texts", texts)
    quick = "--steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 1 --max_new_tokens 2"
    out = tmp_path / "run"
    samr1_mini.main(["train", *quick.split(), "--prompt", "visionreasoner", "--out", str(out)])
    assert json.loads((out / "metrics.jsonl").read_text())["answer_format"] == 1
    rollouts = json.loads((out / "rollouts" / "step_00001.json").read_text())
    samples = rollouts["train"] + rollouts["heldout"]
    assert samples and all(answer["box"] for one in samples for answer in one["completions"])

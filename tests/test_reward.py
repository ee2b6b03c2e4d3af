"""Tests of reward.py, plumbing/answers.py, plumbing/sam.py and plumbing/segzero.py against
SamPredictor, pycocotools, a regular expression, and numbers worked out by hand."""

import copy
import dataclasses
import importlib
import json
import math
import re
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

import reward
from data import Shapes
from plumbing import answers, segzero
from plumbing.boxes import box_ious, true_box
from plumbing.errors import UserError
from plumbing.sam import load_sam
from plumbing.scenes import interior_points
from plumbing.segzero import segzero_reward
from plumbing.settings import ACCURACY
from reward import Answer, Overlap, SamPrompt, SamScorer, parse_answer, score_completions

# --------------------------------------------------------------------------------------------------
# Text to prompts
# --------------------------------------------------------------------------------------------------

BODY = '{"bbox":[1,2,30,40],"points_1":[5,6],"points_2":[7,8]}'
OTHER = '{"bbox":[11,12,13,14],"points_1":[15,16],"points_2":[17,18]}'
BOX = (1.0, 2.0, 30.0, 40.0)
POINTS = ((5.0, 6.0), (7.0, 8.0))
OTHER_ORDER = '{ "points_2" : [7, 8],\n "bbox" : [ 1, 2,\t30, 40 ], "points_1" : [5, 6] }'
OTHER_KEYS = BODY[:-1] + ',"label":"it\'s \\"red\\"","extra":[[1,{"a":null}],true]}'
APOSTROPHE = BODY.replace('"', "'")[:-1] + ", 'label': \"the dog's\", 'none': None, 'yes': True}"


def wrap(body, thought="the red one"):
    return f"<think>{thought}</think><answer>{body}</answer>"


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "text",
    [
        wrap(BODY),
        f" \n<think>\nthe red one\n</think>\n\n<answer>\n{OTHER_ORDER}\n</answer>\u00a0\u2003",
        wrap('{"bbox":[1.0,2e0,3.0E+1,40],"points_1":[5.0,6],"points_2":[7,8.000]}'),
        wrap(OTHER_KEYS),
        wrap(APOSTROPHE),
        wrap(BODY.replace("]", ",]").replace("}", ",}")),  # trailing commas
        wrap(BODY.replace("1,2,30", "1.,+2,3_0.")),  # Python's numbers
        wrap(f"(\n{BODY})  # done"),
        wrap(f"```python\n{APOSTROPHE}"),  # a fence that is not closed
        wrap("\u00a0```\ufeff" + BODY.replace(",", ",\u00a0") + "\n```\u00a0"),
    ],
)
def test_all_ways_to_write_an_answer_are_accepted(text):
    assert parse_answer(text) == Answer(True, True, BOX, POINTS, "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "part, value",
    [
        *(("bbox", "[30,2,1,40]"), ("bbox", "[1,40,30,2]")),  # swapped corners
        *(("bbox", "[1,2,1,40]"), ("bbox", "[1,2,30,2]")),  # no width, no height
        *(("bbox", "[NaN,2,30,40]"), ("bbox", "[1,2,1e999,40]"), ("bbox", "[1,2,30,1000001]")),
        *(("bbox", "[true,2,30,40]"), ("bbox", "[1,2,30]"), ("bbox", '"1,2,30,40"')),
        *(("points_1", "[5]"), ("points_1", '["5",6]'), ("points_2", "[7,-Infinity]")),
        *(("points_2", "null"), ("bbox", "missing"), ("points_1", "missing")),
    ],
)
def test_an_invalid_part_is_dropped_and_the_others_stay(part, value):
    data = json.loads(BODY)
    data[part] = "HERE"
    if value == "missing":
        del data[part]
    found = parse_answer(wrap(json.dumps(data).replace('"HERE"', value)))
    box = None if part == "bbox" else BOX
    points = {"bbox": POINTS, "points_1": POINTS[1:], "points_2": POINTS[:1]}[part]
    assert found == Answer(True, False, box, points, "the red one")


CLEAR = [  # and yet not in the asked form
    *(f"```json\n[\n{BODY}\n]\n```", f"the answer is {BODY}</answer> and that is all"),
    BODY.replace("[", "(").replace("]", ")"),
    BODY.replace("[", "[[").replace("]", "]]"),
    BODY.replace(",", "，").replace(":", "：").replace("[", "【").replace('"', "”"),
    BODY.replace("[1,", '[ // the "box"\n1, /* {2} */'),
]
NO_OBJECT = [  # with these keys
    *("", "null", "7", "[1,2,30,40]", "{", f'{{"answer":{BODY}}}', "{[1]: 2}", "}{", "\0"),
    *(BODY + BODY, f"{BODY}, {OTHER}", f"[{BODY}, {OTHER}]"),  # two, and one was asked for
    *(BODY.replace("1,2", "01,2"), BODY.replace("1,2", "f(1),2"), BODY.replace("1,2", "1,,2")),
    # Nested deeper than the stack of Python or of its two parsers.
    *("/*" * 990, "//" * 990, "{" + "/*" * 990 + "}"),
    *('{"a":' * 390, "[" * 995 + "]" * 995, "(" * 1990, "-" * 1990 + "1", "1+" * 990 + "1"),
    BODY + " " * 2000,  # longer than LONGEST_ANSWER
]


@pytest.mark.exercise_1
@pytest.mark.parametrize("body", CLEAR + NO_OBJECT, ids=lambda body: body[:25])
def test_an_answer_that_is_not_in_the_asked_form_earns_no_format(body):
    found = (BOX, POINTS) if body in CLEAR else (None, ())
    assert parse_answer(wrap(body)) == Answer(True, False, *found, "the red one")


@pytest.mark.exercise_1
def test_the_answer_format_does_not_judge_the_quality_of_a_box_or_point():
    """A box smaller than a pixel, and the same point twice outside of it."""
    data = {"bbox": (0.1, 0.2, 0.3, 0.4), "points_1": (7e2, 1e6), "points_2": (7e2, 1e6)}
    found = parse_answer(wrap(json.dumps(data)))
    assert found.answer_format and (found.box, *found.points) == tuple(data.values())


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "text, think, answer",
    [
        (f"<answer>{BODY}</answer>", False, True),
        (f"<think>why</think>{BODY}", False, False),
        (f"<think>why</think><answer>{BODY}", False, False),  # not closed
        (f"<think> \n</think><answer>{BODY}</answer>", False, True),  # no reasoning in it
        (f"<think>why<answer>{BODY}</answer>", False, True),  # not closed
        (f"<think>why</think></answer>{BODY}<answer>", False, False),  # wrong order
        (f"<think>a <think> b</think><answer>{BODY}</answer>", False, True),  # repeated
        (f"<think>a <answer> b</answer> c</think><answer>{BODY}</answer>", True, True),
        ("<think>a</think><answer></answer></answer>", True, False),
        (f"Sure! {wrap(BODY)}", False, True),  # text outside of the blocks
        (f"<think>a</think> so <answer>{BODY}</answer>", False, True),
        (f"<Think>why</Think><answer>{BODY}</answer>", False, True),
        # The last answer counts, and it must come after the thought. Otherwise a policy could
        # guess first and reason afterwards.
        (f"<think>a</think><answer>{OTHER}</answer> no: <answer>{BODY}</answer>", False, True),
        (f"<answer>{BODY}</answer><think>why</think>", False, False),
        (f"<think>why<answer>{BODY}</answer></think>", False, False),
        (f"<answer>{OTHER}</answer><think>why</think><answer>{BODY}</answer>", False, True),
    ],
)
def test_the_two_formats_are_judged_separately(text, think, answer):
    found = parse_answer(text)
    assert (found.think_format, found.answer_format) == (think, answer)
    assert (found.box, found.points) == ((BOX, POINTS) if answer else (None, ()))


def test_an_odd_escape_prints_no_warning(recwarn):
    importlib.reload(answers)  # pytest has replaced the warning filter that the first import set
    assert answers.read_literal(r"{'a': '\d'}") == {"a": r"\d"}
    assert not recwarn.list


def prompt_of(box, points, extent, width, height):
    return reward.sam_prompt(Answer(True, True, box, points, ""), extent, width, height)


@pytest.mark.exercise_2
def test_coordinates_are_scaled_once_and_each_axis_by_its_own_factor():
    # From 840 to 1680 x 420, x doubles and y halves.
    found = prompt_of((100, 200, 300, 400), ((10, 20), (830, 840)), 840, 1680, 420)
    assert found == SamPrompt((200, 100, 600, 200), ((20, 10), (1660, 420)))
    # Thousandths of a 50 x 2000 image.
    found = prompt_of((100, 200, 300, 400), ((500, 1000),), 1000, 50, 2000)
    assert found.box == pytest.approx((5, 400, 15, 800))
    assert found.points[0] == pytest.approx((25, 2000))


@pytest.mark.exercise_2
@pytest.mark.parametrize(
    "box, clipped",
    [
        *(((-10, -20, 110, 120), (0, 0, 200, 50)), ((50, -1, 1e6, 50), (100, 0, 200, 25))),
        *(((-20, 10, -1, 20), None), ((10, -20, 20, -1), None), ((-5, 0, 0, 10), None)),
        *(((100, 10, 120, 20), None), ((10, 100, 20, 120), None)),
    ],
)
def test_a_box_is_clipped_to_the_image_and_what_lies_outside_is_dropped(box, clipped):
    points = ((0, 0), (100, 100), (-0.1, 5), (5, 100.1))
    assert prompt_of(box, points, 100, 200, 50) == SamPrompt(clipped, ((0, 0), (200, 50)))


# --------------------------------------------------------------------------------------------------
# Prompts to masks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, message",
    [
        ("vit_x:a.pth", "no SAM is called 'vit_x': use tiny, vit_b:FILE"),
        ("vit_b", "write vit_b:FILE"),
        ("tiny:nothing.pth", "there is no file nothing.pth"),
        ("tiny:page.pth", "page.pth cannot be read as weights .*fetch it again"),
        ("sam2:sam2_hiera_large.pt", "the original checkpoint is not read.*facebook/sam2"),
    ],
)
def test_a_sam_that_cannot_be_loaded_is_refused(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    with pytest.raises(UserError, match=message):
        load_sam(spec)


@pytest.fixture(scope="module")
def scenes(samples):
    """The samples, and two flat and tall copies with ignored pixels. SAM scales their axes by
    different factors: 90 x 23 becomes 128 x 33."""
    scenes = list(samples)
    for size in ((90, 23), (21, 120)):
        image = samples[0].image.resize(size)
        mask = np.array(Image.fromarray(samples[0].mask).resize(size))
        ignore = np.random.default_rng(0).random(mask.shape) < 0.3
        scenes.append(SimpleNamespace(image=image, mask=mask, ignore=ignore))
    return scenes


@pytest.fixture(scope="module")
def mixed(scenes):
    """Six prompts for each scene, one of each sort. Their order differs between the scenes."""
    rng = np.random.default_rng(0)
    prompts = []
    for b, scene in enumerate(scenes):
        box = tuple(true_box(scene.mask) + rng.uniform(-2, 2, 4))
        p, q, r = (tuple(map(float, yx[::-1])) for yx in rng.choice(np.argwhere(scene.mask), 3))
        group = [SamPrompt(box, (p, q)), SamPrompt(box, (r,)), SamPrompt(box, ())]
        group += [SamPrompt(None, (q, r)), SamPrompt(None, (p,)), SamPrompt(None, ())]
        prompts.append(group[b:] + group[:b])
    return prompts


@pytest.mark.exercise_4
@pytest.mark.parametrize("favourite", [0, 1, 2])  # of SAM's three masks for each prompt
def test_masks_and_counts_equal_those_of_sam_predictor(
    favourite, scenes, mixed, sam, scorer, monkeypatch
):
    last = sam.mask_decoder.iou_prediction_head.layers[-1]
    rated = last.bias.detach().clone()
    rated[1 + favourite] += 10  # the first of the four is the mask for a single output
    monkeypatch.setattr(last.bias, "data", rated)
    overlap = scorer.score(scenes, mixed, keep_masks=True)
    original = copy.deepcopy(sam)  # with segment_anything's own attention
    for block in original.image_encoder.blocks:
        del block.attn.forward
    predictor = SamPredictor(original)
    for b, scene in enumerate(scenes):
        predictor.set_image(np.asarray(scene.image))
        for g, prompt in enumerate(mixed[b]):
            mask = overlap.masks[b][g].numpy()
            assert mask.shape == scene.mask.shape
            assert overlap.prompted[b, g] == (prompt != SamPrompt(None, ()))
            if not overlap.prompted[b, g]:
                assert not mask.any() and overlap.iou[b, g] == 0
                continue
            logits, ratings, _ = predictor.predict(
                point_coords=np.array(prompt.points) if prompt.points else None,
                point_labels=np.ones(len(prompt.points)) if prompt.points else None,
                box=None if prompt.box is None else np.array(prompt.box),
                return_logits=True,
            )
            assert ratings.argmax() == favourite
            clear = np.abs(logits[favourite]) > 1e-4  # closer to 0, rounding decides
            assert clear.mean() > 0.999
            same = mask == (logits[favourite] > 0)
            assert same[clear].all(), f"the mask of {prompt} is not SamPredictor's"
            counted = True if scene.ignore is None else ~scene.ignore
            assert overlap.intersection[b, g] == (mask & scene.mask & counted).sum()
            assert overlap.union[b, g] == ((mask | scene.mask) & counted).sum()
    assert overlap.iou.max() > 0.5  # so the masks are not arbitrary


def test_the_tiny_sam_takes_its_prompt_literally(scorer):
    """So that the reward has a reason to ask for good boxes and points."""
    scenes, prompts = [], []
    for index in range(24):
        sample = Shapes("heldout")[index]
        x1, y1, x2, y2 = map(int, true_box(sample.mask))
        outside = np.argwhere(~sample.mask[y1:y2, x1:x2])
        if not len(outside):  # a square
            continue
        first, second = interior_points(sample.mask)
        y, x = outside[0] + (y1, x1)
        shift = (x2 - x1) / 2
        good = SamPrompt((x1, y1, x2, y2), (first, second))
        shifted = SamPrompt((x1 + shift, y1, x2 + shift, y2), (first, second))
        scenes.append(sample)
        prompts.append([good, shifted, good._replace(points=(first, (x, y)))])
    good, shifted, astray = scorer.score(scenes, prompts).iou.mean(0)
    assert good > 0.88 and max(shifted, astray) < good - 0.2


@pytest.mark.parametrize("size", [(480, 640), (640, 640), (1000, 1), (1, 1000), (2000, 1333)])
def test_cropping_the_padding_first_does_not_change_the_masks(size):
    """With the numbers of an official SAM: 1024 pixels, logits of 256 x 256."""
    logits = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)) * 20
    input_size = ResizeLongestSide.get_preprocess_shape(*size, 1024)
    official = SimpleNamespace(image_encoder=SimpleNamespace(img_size=1024))
    expected = Sam.postprocess_masks(official, logits[:, None], input_size, size)[:, 0]
    found = reward.upsample_masks(logits, 1024, input_size, size)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.exercise_4
@pytest.mark.parametrize("has_box, has_points", [(True, True), (True, False), (False, True)])
def test_decoding_together_equals_decoding_one_by_one(sam, has_box, has_points):
    """One by one: with SAM's own prompt encoder, and each image as the decoder expects it."""
    torch.manual_seed(0)
    embeddings = torch.randn(3, 64, 16, 16)
    image_index = torch.tensor([2, 0, 0, 1, 2])
    boxes = torch.rand(5, 4) * 60 + torch.tensor([0, 0, 60, 60]) if has_box else None
    points = torch.rand(5, 2, 2) * 128 if has_points else None
    logits, ratings = reward.decode_masks(sam, embeddings, image_index, boxes, points)
    assert logits.shape == (5, 4, 64, 64) and ratings.shape == (5, 4)
    for n in range(5):
        sparse, dense = sam.prompt_encoder(
            points=(points[n : n + 1], torch.ones(1, 2)) if has_points else None,
            boxes=boxes[n : n + 1] if has_box else None,
            masks=None,
        )
        image = embeddings[image_index[n]][None]
        position = sam.prompt_encoder.get_dense_pe()
        expected = sam.mask_decoder.predict_masks(image, position, sparse, dense)
        assert torch.allclose(logits[n], expected[0][0], atol=1e-3)
        assert torch.allclose(ratings[n], expected[1][0], atol=1e-4)


@pytest.mark.exercise_4
def test_batches_of_images_and_prompts(scenes, mixed, scorer, monkeypatch):
    """Without limits, each image is encoded once and each sort of prompt decoded in one call."""
    encode = Mock(wraps=scorer.sam.encode)
    decode = Mock(wraps=scorer.sam.decode)
    monkeypatch.setattr(scorer.sam, "encode", encode)
    monkeypatch.setattr(scorer.sam, "decode", decode)
    whole = scorer.score(scenes, mixed, keep_masks=True)
    assert [len(call.args[0]) for call in encode.mock_calls] == [8]
    # SAM does not get the sixth sort, the empty prompts.
    assert [len(call.args[1]) for call in decode.mock_calls] == [8] * 5
    encode.reset_mock()
    decode.reset_mock()
    monkeypatch.setattr(scorer, "encoder_batch", 2)
    monkeypatch.setitem(reward.DECODER_BYTES, "cpu", 4 * 2**16)  # an embedding has 64 KiB
    parts = scorer.score(scenes, mixed, keep_masks=True)
    assert [len(call.args[0]) for call in encode.mock_calls] == [2] * 4
    assert [len(call.args[1]) for call in decode.mock_calls] == [4, 4] * 5
    for a, b in zip(whole.masks, parts.masks, strict=True):
        assert (a != b).float().mean() < 1e-4


def test_the_masks_of_several_objects_are_united_in_the_same_calls(
    scenes, mixed, scorer, monkeypatch
):
    decode = Mock(wraps=scorer.sam.decode)
    monkeypatch.setattr(scorer.sam, "decode", decode)
    alone = scorer.score(scenes, mixed, keep_masks=True)
    calls = decode.call_count
    lists = []  # of three objects, one, two; an object may be an empty prompt
    for p in mixed:
        lists.append([p[0]._replace(others=(p[1], p[2])), p[3], p[4]._replace(others=(p[5],))])
    overlap = scorer.score(scenes, lists, keep_masks=True)
    assert decode.call_count == 2 * calls
    for b, scene in enumerate(scenes):
        masks = alone.masks[b]
        expected = torch.stack([masks[0] | masks[1] | masks[2], masks[3], masks[4] | masks[5]])
        assert torch.equal(overlap.masks[b], expected)
        ignore = None if scene.ignore is None else torch.from_numpy(scene.ignore)
        counts = reward.intersection_and_union(expected, torch.from_numpy(scene.mask), ignore)
        assert torch.equal(overlap.intersection[b], counts[0])
        assert torch.equal(overlap.union[b], counts[1])
    assert overlap.prompted[:, ::2].all()


def test_sam_in_host_memory_gives_the_same_masks_and_stays_frozen(scenes, mixed, sam, scorer):
    other = copy.deepcopy(sam).train()
    host = [weight.data_ptr() for weight in other.parameters()]
    found = SamScorer(other, offload=True).score(scenes, mixed)
    assert torch.equal(found.iou, scorer.score(scenes, mixed).iou)
    assert [weight.data_ptr() for weight in other.parameters()] == host  # nothing was copied back
    assert all(map(torch.equal, other.state_dict().values(), sam.state_dict().values()))
    assert not any(weight.requires_grad for weight in other.parameters())


# --------------------------------------------------------------------------------------------------
# Masks to IoU to reward
# --------------------------------------------------------------------------------------------------


@pytest.mark.exercise_3
def test_pixels_are_counted_as_in_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 33, 7), (33, 7), (33, 7))
    masks, truth, ignore = (torch.rand(size, generator=generator) > 0.4 for size in sizes)
    arguments = masks.clone(), truth.clone(), ignore.clone()
    intersection, union = reward.intersection_and_union(*arguments)
    assert all(map(torch.equal, arguments, (masks, truth, ignore))), "changed in place"
    assert intersection.dtype == union.dtype == torch.float32

    def encode(mask):
        return coco.encode(np.asfortranarray((mask & ~ignore).numpy().astype(np.uint8)))

    expected = coco.iou([encode(mask) for mask in masks], [encode(truth)], [False])
    assert (intersection / union).tolist() == pytest.approx(expected[:, 0])


def ious(truth, ignore, masks):
    """IoU of each mask with the truth; all are lists of 0 and 1."""
    truth = torch.tensor([truth], dtype=torch.bool)
    ignore = None if ignore is None else torch.tensor([ignore], dtype=torch.bool)
    masks = torch.tensor(masks, dtype=torch.bool)[:, None]
    intersection, union = reward.intersection_and_union(masks, truth, ignore)
    return Overlap(intersection, union, prompted=None, masks=None).iou.tolist()


@pytest.mark.exercise_3
def test_ignored_pixels_count_neither_as_right_nor_as_wrong():
    truth = [1, 1, 1, 0, 0, 0]
    masks = [
        [1, 0, 0, 0, 0, 0],  # 1 of the 2 true pixels that count
        [1, 1, 0, 0, 1, 0],  # both, and one false pixel
        [1, 1, 1, 1, 0, 1],  # both; the false ones are ignored
        [0, 0, 1, 1, 0, 1],  # only ignored pixels
    ]
    assert ious(truth, [0, 0, 1, 1, 0, 1], masks) == pytest.approx([1 / 2, 2 / 3, 1, 0])
    assert ious(truth, None, masks) == pytest.approx([1 / 3, 2 / 4, 3 / 5, 1 / 5])


@pytest.mark.exercise_3
def test_iou_is_one_for_two_empty_masks():
    assert ious([0, 0], None, [[0, 0], [1, 0]]) == [1, 0]
    assert ious([1, 0, 0], [1, 1, 0], [[0, 1, 0]]) == [1]  # both hold only ignored pixels


@pytest.fixture(scope="module")
def empty(samples):
    """A sample without a target."""
    return dataclasses.replace(samples[0], mask=np.zeros_like(samples[0].mask))


def test_a_completion_without_a_prompt_scores_zero_even_if_the_true_mask_is_empty(scorer, empty):
    scores = score_completions(scorer, [empty], [[wrap("{}"), ""]], extent=64, keep_masks=True)
    assert not scores.overlap.masks[0].any()
    assert scores.iou.tolist() == [[0, 0]] and scores.reward.tolist() == [[1, 0]]


THOUSANDTHS = [0, 499, 500, 501, 699, 700, 701, 799, 800, 801, 1000]


@pytest.mark.parametrize(
    "kind, expected",
    [
        pytest.param("tiered", [0, 0, 0, 2, 2, 2, 3, 3, 3, 4, 4], marks=pytest.mark.exercise_5),
        ("0.5", [0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4]),
        ("0.7", [0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4]),
        ("0.8", [0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4]),
    ],
)
def test_iou_must_exceed_a_threshold(kind, expected):
    for scale in (1, 7, 333):  # the IoU is a quotient of two pixel counts
        iou = torch.tensor(THOUSANDTHS).float() * scale / torch.tensor(1000.0 * scale)
        before = iou.clone()
        hint = "float32 rounds the IoU and the threshold: compare tensors"
        assert reward.accuracy_reward(iou, kind).tolist() == expected, hint
        assert torch.equal(iou, before), "the IoU is logged: it must not be changed in place"


def true_answer(sample, extent=64):
    """A completion with the true box of a sample and two good points."""
    scale = extent / np.array(sample.image.size)
    first, second = (list(point * scale) for point in interior_points(sample.mask))
    box = list(true_box(sample.mask) * np.tile(scale, 2))
    return wrap(json.dumps({"bbox": box, "points_1": first, "points_2": second}))


@pytest.mark.parametrize("kind", ACCURACY)
def test_the_reward_is_the_sum_of_its_parts(scorer, samples, kind):
    completions = []
    for right in map(true_answer, samples):
        answer_only = right[right.index("<answer>") :]
        completions.append([right, answer_only, right.replace("points_2", "?"), "no idea"])
    scores = score_completions(scorer, samples, completions, extent=64, accuracy=kind)
    assert scores.think_format.tolist() == [[1, 0, 1, 0]] * 6
    assert scores.answer_format.tolist() == [[1, 1, 0, 0]] * 6
    if kind == "box":
        expected = reward.tiered_reward(box_ious(samples, scores.prompts))
    elif kind.startswith("segzero"):
        expected = segzero_reward(samples, scores.prompts, 64, kind == "segzero_mask")
    else:
        expected = reward.accuracy_reward(scores.iou, kind)
    assert torch.equal(scores.accuracy, expected)
    assert torch.equal(scores.reward, scores.accuracy + scores.think_format + scores.answer_format)
    assert 5 < scores.reward.max() <= 6 and scores.reward.min() == 0


TRUE_BOX = (200, 100, 600, 300)  # in pixels of 840 x 840, as Seg-Zero counts


def drawn(target=True):
    """A blank image of 210 x 840. Its true mask is TRUE_BOX without its middle, or empty."""
    mask = np.zeros((840, 210), bool)
    mask[100:300, 50:150] = target
    mask[150:250, 63:138] = False
    return SimpleNamespace(image=Image.new("RGB", (210, 840)), mask=mask)


def prompt_in_840(box, points=()):
    """The prompt for that image, in which x counts four times."""
    box = box and tuple(np.divide(box, (4, 1, 4, 1)))
    return SamPrompt(box, tuple((x / 4, y) for x, y in points))


def test_box_ious_by_hand():
    # The true one, half of it, 200 x 100 of 140,000 pixels shared, an edge shared, 9.5 more, none.
    boxes = [TRUE_BOX, (200, 100, 400, 300), (400, 200, 800, 400), (600, 100, 840, 300)]
    boxes += [(190.5, 100, 600, 300), None]
    prompts = [prompt_in_840(box) for box in boxes]
    found = box_ious([drawn(), drawn(target=False)], [prompts, prompts])
    assert found[0].tolist() == pytest.approx([1, 1 / 2, 1 / 7, 0, 400 / 409.5, 0])
    assert found[1].tolist() == [0] * 6  # nothing is there: also without a box


def thirds(box, points=(), extent=840, in_mask=False):
    """How many of the three parts of Seg-Zero's reward a prompt earns; each is worth 4/3."""
    empty, asked = SamPrompt(None, ()), prompt_in_840(box, points)
    samples = [drawn(target=False), drawn()]
    earned = segzero_reward(samples, [[asked, empty], [empty, asked]], extent, in_mask)
    assert earned.dtype == torch.float32 and earned[0].tolist() == [0, 0] and earned[1, 0] == 0
    return pytest.approx(earned[1, 1].item() * 3 / 4)


@pytest.mark.parametrize(
    "box, extent, expected",
    [
        *((TRUE_BOX, 840, 2), (None, 840, 0)),
        # Half of the true box has IoU 0.5, and is 50 pixels away: the mean of 0, 0, 200 and 0.
        *(((200, 100, 400, 300), 840, 0), ((200, 100, 401, 300), 840, 1)),
        *(((209.9, 109.9, 609.9, 309.9), 840, 2), ((210, 110, 610, 310), 840, 1)),
        *(((219.9, 100, 619.9, 300), 840, 2), ((220, 100, 620, 300), 840, 1)),
        # Two pixels of a policy image of 64 are 26.25 of 840. With thousandths the limit is 10.
        *(((226, 126, 626, 326), 64, 2), ((226.25, 126.25, 626.25, 326.25), 64, 1)),
        ((210, 110, 610, 310), 1000, 1),
    ],
)
def test_segzero_rewards_the_overlap_and_the_distance_of_the_box(box, extent, expected):
    assert thirds(box, extent=extent) == expected


@pytest.mark.parametrize(
    "points, near, in_mask",
    [
        (((500, 270), (300, 130)), True, True),  # the labels in the other order
        (((399, 130), (401, 270)), True, True),  # 99 pixels each
        (((401, 130), (399, 270)), False, True),  # 101 each; in the other order 171
        (((300, 100), (600, 270)), True, False),  # on the border of the true box
        (((300, 99), (500, 270)), False, False),  # outside of it
        (((300, 130), (500, 249.9)), True, False),  # the pixel is y = 249, in the hole
        (((300, 130),), False, False),  # one point
        ((), False, False),
    ],
)
def test_segzero_rewards_points_near_the_labels_or_in_the_mask(monkeypatch, points, near, in_mask):
    labels = prompt_in_840(None, ((300, 130), (500, 270))).points
    monkeypatch.setattr(segzero, "interior_points", lambda mask: labels)
    assert thirds(TRUE_BOX, points) == 2 + near
    assert thirds(TRUE_BOX, points, in_mask=True) == 2 + in_mask


# --------------------------------------------------------------------------------------------------
# Hostile completions
# --------------------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SYMBOLS = [*"[]{}()'\":,-+.0\\ \n\0\ud800\ufeff\u2028٣", "```json", '{"bbox":', "1e6", "why", BODY]
NUMBERS = st.sampled_from("NaN -Infinity 1e999 1e-320 -0.0 0x10 true '7' ٣".split())
NUMBERS |= st.integers(-100, 200).map(str) | st.floats(allow_subnormal=False).map(repr)
ANSWER = '{{"bbox":[{},{},{},{}],"points_1":[{},{}],"points_2":[{},{}]}}'
HOSTILE = st.one_of(
    st.lists(st.sampled_from(TAGS + SYMBOLS)).map("".join),
    st.lists(st.sampled_from(SYMBOLS)).map("".join).map(wrap),
    st.lists(NUMBERS, min_size=8, max_size=8).map(lambda numbers: wrap(ANSWER.format(*numbers))),
)


def right_format(text):
    """The think format, read by a regular expression."""
    once = text.count("<think>") == text.count("</think>") == 1
    pattern = r"\s*<think>(.*)</think>\s*<answer>(?:(?!<answer>).)*</answer>\s*"
    found = re.fullmatch(pattern, text, re.DOTALL)
    return bool(once and found and found[1].strip())


@pytest.fixture(scope="module")
def quick_scorer(sam, empty):
    """It has encoded the only image already."""
    scorer = SamScorer(sam)
    embeddings = scorer.encode([empty.image, empty.image])
    scorer.encode = lambda images: embeddings
    return scorer


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(HOSTILE, min_size=8, max_size=8))
def test_hostile_completions_are_scored_in_range(quick_scorer, samples, empty, texts):
    halves = [texts[:4], texts[4:]]
    scores = score_completions(quick_scorer, [samples[0], empty], halves, extent=64)
    assert set(scores.accuracy.flatten().tolist()) <= {0, 2, 3, 4}
    assert ((scores.iou >= 0) & (scores.iou <= 1)).all()  # so it is not NaN
    assert scores.think_format.flatten().tolist() == list(map(right_format, texts))
    for answer in sum(scores.answers, []):
        x1, y1, x2, y2 = answer.box or (0, 0, 1, 1)
        assert x1 < x2 and y1 < y2
        assert not answer.answer_format or (answer.box and len(answer.points) == 2)


@pytest.mark.parametrize("style", ["full", "segzero", "visionreasoner"])
@pytest.mark.parametrize("piece", ["<think>", "<", "\u2003", "<answer></answer>", "{", "{}", "/*"])
def test_megabytes_of_text_take_linear_time(piece, style):
    n = 300_000
    start = time.process_time()  # milliseconds, and minutes in quadratic time
    assert not parse_answer(piece * n, style).answer_format
    valid = parse_answer(wrap(piece * n + BODY), style).answer_format
    assert valid == (style == "segzero" and piece != "{")  # Seg-Zero's first {...}, anywhere
    assert not parse_answer(wrap(piece * 10_000), style).answer_format  # a list may be this long
    assert parse_answer(wrap(BODY, "x" * n))[:3] == (True, True, BOX)
    assert time.process_time() - start < 2


ODD_NUMBERS = ["\u0661", "\uff11", "\u00b2", "1_000", "0x10", "inf", "nan", "1e400", "\ud800"]
BRACKETS = [*(bracket * 10**5 for bracket in "[]{}()"), "[" * 900 + "]" * 900]


@pytest.mark.parametrize("style", ["full", "segzero", "visionreasoner"])
@pytest.mark.parametrize("text", [*ODD_NUMBERS, "1" + "0" * 400, *BRACKETS])
def test_odd_numbers_and_brackets_give_finite_prompts_at_once(text, style):
    box = f'"bbox": [{text}, 2, 60, 60], "bbox_2d": ["{text}", 2, 60, 60]'
    started = time.perf_counter()
    answer = parse_answer(f"<think>a</think><answer>[{{{box}}}]</answer>{text}", style)
    assert time.perf_counter() - started < 0.5  # one core of a busy machine
    assert all(math.isfinite(x) for x in answer.box or ())

"""Tests of reward.py and plumbing/sam.py against SamPredictor, pycocotools, a second reading of the
formats, and numbers worked out by hand."""

import copy
import json
import random
import re
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention
from segment_anything.utils.transforms import ResizeLongestSide

import reward
from plumbing.sam import (
    build_sam,
    decode_masks,
    embed_prompts,
    folded_attention,
    load_sam,
    upsample_masks,
)
from plumbing.scenes import interior_points
from reward import (
    ACCURACY_REWARDS,
    Answer,
    Overlap,
    SamPrompt,
    SamScorer,
    accuracy_reward,
    box_ious,
    intersection_and_union,
    parse_answer,
    sam_prompt,
    score_completions,
    segzero_reward,
    tiered_reward,
    true_box,
)

# --------------------------------------------------------------------------------------------------
# Text to numbers
# --------------------------------------------------------------------------------------------------

BODY = '{"bbox":[1,2,30,40],"points_1":[5,6],"points_2":[7,8]}'
OTHER = '{"bbox":[11,12,13,14],"points_1":[15,16],"points_2":[17,18]}'
BOX, POINTS = (1.0, 2.0, 30.0, 40.0), ((5.0, 6.0), (7.0, 8.0))
SINGLE_QUOTES = BODY.replace('"', "'")
OTHER_ORDER = '{ "points_2" : [7, 8],\n "bbox" : [ 1, 2,\t30, 40 ], "points_1" : [5, 6] }'
DECIMALS = '{"bbox":[1.0,2e0,3.0E+1,40],"points_1":[5.0,6],"points_2":[7,8.000]}'
OTHER_KEYS = BODY[:-1] + ',"label":"it\'s \\"red\\"","extra":[[1,{"a":null}],true]}'
APOSTROPHE = SINGLE_QUOTES[:-1] + ", 'label': \"the dog's\", 'none': None, 'yes': True}"
TRAILING_COMMAS = BODY.replace("]", ",]").replace("}", ",}")
PYTHON_NUMBERS = BODY.replace("1,2,30", "1.,+2,3_0.").replace("5,6", "0x5,6.e0")
NO_BREAK = "\ufeff" + BODY.replace(",", ",\u00a0").replace(":", "\u00a0:")


def wrap(body, thought="the red one"):
    return f"<think>{thought}</think><answer>{body}</answer>"


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "text",
    [
        wrap(BODY),
        f" \n{wrap(BODY)}\n\t ",
        f"<think>\nthe red one\n</think>\n\n<answer>\n{BODY}\n</answer>",
        wrap(OTHER_ORDER),
        wrap(DECIMALS),
        wrap(SINGLE_QUOTES),
        wrap(f"```json\n{BODY}\n```"),
        wrap(f"```{BODY}```"),
        wrap(f"\n  ```json{SINGLE_QUOTES}```  \n"),
        wrap(OTHER_KEYS),
        wrap(APOSTROPHE),
        wrap(TRAILING_COMMAS),
        wrap(PYTHON_NUMBERS),
        wrap(f"({BODY})"),
        wrap(f"(\n({SINGLE_QUOTES}))"),
        wrap(f"{BODY}  # done"),
        wrap(SINGLE_QUOTES[:-1] + r", 'odd escape': '\d'}"),
        *(wrap(f"```{name}\n{BODY}\n```") for name in ("JSON", "python", "json5", "")),
        wrap(f"```python\n{APOSTROPHE}"),  # a fence that is not closed
        wrap(NO_BREAK),
        wrap(f"\u00a0```json\ufeff\n{NO_BREAK}\n```\u00a0"),
        wrap(BODY) + "\u00a0\u2003",  # white space of Unicode
    ],
)
def test_all_ways_to_write_an_answer_are_accepted(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_answer(text) == Answer(True, True, BOX, POINTS, "the red one")


LAST = [
    f"<think>the red one</think><answer>[1]</answer><answer>{BODY}</answer>",
    f"<think>the red one</think><answer>{OTHER}</answer> no: <answer>{BODY}</answer>",
    f"<think>the red one</think><answer><answer>{BODY}</answer>",  # opened twice
]


@pytest.mark.exercise_1
@pytest.mark.parametrize("text", LAST)
def test_last_answer_after_the_thought_counts(text):
    assert parse_answer(text) == Answer(False, True, BOX, POINTS, "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "before, thought",
    [
        (f"<answer>{BODY}</answer>", "why"),
        ("", f"why <answer>{BODY}</answer>"),
        (f"<answer>{BODY}</answer>", f"why <answer>{BODY}</answer>"),
    ],
)
def test_answer_before_or_in_the_thought_never_counts(before, thought):
    """Otherwise a policy could guess first and reason afterwards."""
    begin = f"{before}<think>{thought}</think>"
    assert parse_answer(begin) == Answer(False, False, None, (), thought)
    found = parse_answer(f"{begin}<answer>{OTHER}</answer>")
    assert found == Answer(not before, True, (11, 12, 13, 14), ((15, 16), (17, 18)), thought)


@pytest.mark.exercise_1
@pytest.mark.parametrize("tags", ["<answer>", "</answer>", "</answer> <answer>", "<answer> a"])
def test_reasoning_may_mention_the_tags_of_the_answer(tags):
    thought = f"then {tags} follows"
    assert parse_answer(wrap(BODY, thought)) == Answer(True, True, BOX, POINTS, thought)


def answer_without(part):
    """The answer that BODY gives without one of its parts."""
    points = {"bbox": POINTS, "points_1": POINTS[1:], "points_2": POINTS[:1]}[part]
    return Answer(True, False, None if part == "bbox" else BOX, points, "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize("part", ["bbox", "points_1", "points_2"])
def test_missing_part_leaves_the_others(part):
    data = json.loads(BODY)
    del data[part]
    assert parse_answer(wrap(json.dumps(data))) == answer_without(part)


NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1000001", "-1e7", "1" * 400]
NO_NUMBERS += ["true", "false", "null", '"7"', '"५"', "[1]", "{}"]


@pytest.mark.exercise_1
@pytest.mark.parametrize("part", ["bbox", "points_1", "points_2"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: value[:9])
def test_invalid_number_invalidates_only_its_own_part(part, value):
    for place in range(len(json.loads(BODY)[part])):
        data = json.loads(BODY)
        data[part][place] = "HERE"
        body = json.dumps(data).replace('"HERE"', value)
        assert parse_answer(wrap(body)) == answer_without(part)


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "value",
    [
        *([30, 2, 1, 40], [1, 40, 30, 2], [30, 40, 1, 2]),  # swapped corners
        *([1, 2, 1, 40], [1, 2, 30, 2]),  # no width, no height
        *([], [1, 2, 30], [1, 2, 30, 40, 50], [[1, 2, 30, 40]], [[1, 2], [30, 40]]),
        *("1,2,30,40", 7, None, True, {"x1": 1, "y1": 2, "x2": 30, "y2": 40}),
    ],
)
def test_invalid_box_is_dropped(value):
    body = json.dumps({"bbox": value, "points_1": [5, 6], "points_2": [7, 8]})
    assert parse_answer(wrap(body)) == Answer(True, False, None, POINTS, "the red one")


NO_POINTS = [[], [5], [5, 6, 7], [[5, 6]], [[5], [6]], "5,6", 5, None, {"x": 5, "y": 6}]


@pytest.mark.exercise_1
@pytest.mark.parametrize("value", NO_POINTS)
def test_invalid_point_is_dropped(value):
    body = json.dumps({"bbox": [1, 2, 30, 40], "points_1": value, "points_2": [7, 8]})
    assert parse_answer(wrap(body)) == Answer(True, False, BOX, POINTS[1:], "the red one")


SYNTAX_ERRORS = [("1,2", "1,,2"), ("1,2", "01,2"), ("1,2", "1 2"), ("1,2", "१,2"), (":", "=")]
SYNTAX_ERRORS += [("1,2", "0+1,2"), ("1,2", "f(1),2"), ("1,2", "x,2"), ("1,2", "*[1,2]")]
SYNTAX_ERRORS += [('"', ""), ("}", ""), ("{", "("), ("}", "}}"), ("]", ",,]")]
NO_OBJECTS = ["", "null", "[]", "[1,2,30,40]", '"text"', "7", "{}", "{", BODY + BODY, f"[{BODY}]"]
NO_OBJECTS += [f'{{"answer":{BODY}}}', f"the answer is {BODY}", f"{BODY} that is all"]
NO_OBJECTS += [f"({BODY},)", f"dict({BODY})", BODY.upper(), "{[1]: 2}", "{{}: 1}", "{**{}}"]
NO_OBJECTS += [f"``{BODY}``", f"```json {BODY} ``` or", "\0", "\ud800", "'", "{'a': '\\d'}"]
# Nested deeper than the stack of Python or of its two parsers.
TOO_DEEP = ['{"a":' * 390 + "1" + "}" * 39, "[" * 1990, "[" * 995 + "]" * 995]
TOO_DEEP += ["(" * 995 + ")" * 995, "-" * 1990 + "1", "1+" * 990 + "1", "{1:" * 600, "f'" * 900]
TOO_DEEP += ["not " * 490 + "1", "a" + ".a" * 900, "lambda:" * 280 + "1", "\\\n" * 990 + "1"]


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "body",
    [
        *NO_OBJECTS,
        *(BODY.replace(old, new) for old, new in SYNTAX_ERRORS),
        *TOO_DEEP,
        BODY + " " * 2000,  # longer than LONGEST_ANSWER
    ],
    ids=lambda body: body[:25],
)
def test_answer_that_is_no_json_object_with_these_keys_gives_nothing(body):
    assert parse_answer(wrap(body)) == Answer(True, False, None, (), "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "text, think, answer",
    [
        (BODY, False, False),
        (f"<answer>{BODY}</answer>", False, True),
        (f"<think>why</think>{BODY}", False, False),
        ("<think>why</think>", False, False),
        (f"<think></think><answer>{BODY}</answer>", False, True),  # no reasoning in it
        (f"<think> \n</think><answer>{BODY}</answer>", False, True),
        (f"<think>why<answer>{BODY}</answer>", False, True),  # not closed
        (f"why</think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think><answer>{BODY}", False, False),
        (f"<think>why</think>{BODY}</answer>", False, False),
        (f"<answer>{BODY}</answer><think>why</think>", False, False),  # wrong order
        (f"</think>why<think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think></answer>{BODY}<answer>", False, False),
        (f"<think>why</think></answer><answer>{BODY}", False, False),
        (f"<think>why<answer>{BODY}</answer></think>", False, False),  # nested
        (f"<answer><think>why</think>{BODY}</answer>", False, False),
        (f"<think>why<answer></think>{BODY}</answer>", False, False),
        (f"<think>a</think><think>b</think><answer>{BODY}</answer>", False, True),  # repeated
        (f"<think><think>a</think><answer>{BODY}</answer>", False, True),
        (f"<think>a</think><answer>{BODY}</answer><answer>{BODY}</answer>", False, True),
        (f"<think>a</think><answer>{BODY}</answer></answer>", True, False),
        (f"<think>a <answer> b</think><answer>{BODY}</answer>", True, True),
        (f"<think>a <think> b</think><answer>{BODY}</answer>", False, True),
        (f"Sure! {wrap(BODY)}", False, True),  # text outside of the blocks
        (f"{wrap(BODY)} Done.", False, True),
        (f"<think>a</think> so <answer>{BODY}</answer>", False, True),
        (f"<Think>why</Think><answer>{BODY}</answer>", False, True),
        (f"< think>why</think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think><ANSWER>{BODY}</ANSWER>", False, False),
        ("<think>why</think><answer></answer>", True, False),
        ("<think>why</think><answer>no idea</answer>", True, False),
        ("", False, False),
    ],
)
def test_the_two_formats_are_judged_separately(text, think, answer):
    found = parse_answer(text)
    assert (found.think_format, found.answer_format) == (think, answer)
    assert (found.box, found.points) == ((BOX, POINTS) if answer else (None, ()))


# --------------------------------------------------------------------------------------------------
# Policy pixels to image pixels
# --------------------------------------------------------------------------------------------------


def answer_with(box=None, points=()):
    return Answer(True, True, box, points, "")


def test_coordinates_are_scaled_once_and_each_axis_by_its_own_factor():
    # From 840 to 1680 x 420, x doubles and y halves.
    answer = answer_with((100, 200, 300, 400), ((10, 20), (830, 840)))
    prompt = sam_prompt(answer, frame=840, width=1680, height=420)
    assert prompt == SamPrompt((200, 100, 600, 200), ((20, 10), (1660, 420)))
    # Thousandths of a 50 x 2000 image.
    answer = answer_with((100, 200, 300, 400), ((500, 1000),))
    prompt = sam_prompt(answer, frame=1000, width=50, height=2000)
    assert prompt.box == pytest.approx((5, 400, 15, 800))
    assert prompt.points[0] == pytest.approx((25, 2000))


def test_box_is_clipped_to_the_image_and_dropped_outside():
    def clip(*box):
        return sam_prompt(answer_with(box), frame=100, width=200, height=50).box

    assert clip(-10, -20, 110, 120) == (0, 0, 200, 50)
    assert clip(50, -1, 1e6, 50) == (100, 0, 200, 25)
    outside = [(-20, 10, -1, 20), (10, -20, 20, -1), (100, 10, 120, 20), (10, 100, 20, 120)]
    for box in (*outside, (-5, 0, 0, 10)):
        assert clip(*box) is None


def test_points_outside_are_dropped_and_the_others_stay():
    answer = answer_with(None, ((0, 0), (100, 100), (-0.1, 5), (5, 100.1)))
    prompt = sam_prompt(answer, frame=100, width=200, height=50)
    assert prompt == SamPrompt(None, ((0, 0), (200, 50)))


# --------------------------------------------------------------------------------------------------
# SAM: loading and attention
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original_sam(sam):
    """The same weights with segment_anything's own attention."""
    plain = copy.deepcopy(sam)
    for block in plain.image_encoder.blocks:
        del block.attn.forward
    return plain


def small_sam():
    """The smallest SAM that the classes allow: 32 pixels, random weights."""
    torch.manual_seed(0)
    return build_sam(
        width=16,
        depth=1,
        heads=2,
        global_blocks=(0,),
        image_size=32,
        patch=8,
        window=2,
        prompt_width=16,
        mlp=16,
        decoder_heads=2,
    )


def damaged_file(folder, kind):
    """A file that is not a checkpoint of the tiny SAM."""
    weights = small_sam().state_dict()
    file = folder / ("sam.safetensors" if "safetensors" in kind else "sam.pth")
    if file.suffix == ".pth":
        content = [1, 2] if "list" in kind else {"model": weights} if "nested" in kind else weights
        torch.save(content, file, _use_new_zipfile_serialization="old" not in kind)
    else:
        safetensors.torch.save_file(weights, file)
    whole = file.read_bytes()
    if "truncated" in kind:
        file.write_bytes(whole[: len(whole) // 2])
    elif "empty" in kind:
        file.write_bytes(b"")
    elif "web page" in kind:
        file.write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    elif "text" in kind:
        file.write_bytes(b"hello, this is a README and no checkpoint")
    return file


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated safetensors", "empty safetensors", "web page safetensors"),
        *("truncated pth", "truncated old pth", "empty pth", "web page pth", "text pth"),
        *("another model safetensors", "another model pth", "list pth", "nested pth"),
    ],
)
def test_invalid_checkpoint_is_refused_in_one_line(tmp_path, kind):
    file = damaged_file(tmp_path, kind)
    with pytest.raises(ValueError) as error:
        load_sam(f"tiny:{file}")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, text",
    [("vit_x:a.pth", "vit_x"), ("", "''"), ("vit_b", "vit_b:FILE"), ("vit_h:", "vit_h:FILE")],
)
def test_unknown_name_is_refused_in_one_line(spec, text):
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_sam(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nothing.pth", "."])
def test_missing_checkpoint_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))) as error:
        load_sam(f"tiny:{tmp_path / path}")
    assert "\n" not in str(error.value)


def test_pth_checkpoint_is_loaded_frozen(tmp_path, sam):
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    again = load_sam(f"tiny:{tmp_path / 'sam.pth'}")
    for name, weight in sam.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert not any(p.requires_grad for p in again.parameters())
    assert not any(m.training for m in again.modules())


@pytest.mark.parametrize("size", [(14, 14), (6, 17)], ids=str)
def test_folded_attention_equals_the_original_at_the_width_of_vit_b(size):
    torch.manual_seed(0)
    options = {"qkv_bias": True, "use_rel_pos": True, "input_size": size}
    attention = Attention(768, num_heads=12, **options)
    # They start at zero, which would hide swapped rows and columns.
    torch.nn.init.normal_(attention.rel_pos_h)
    torch.nn.init.normal_(attention.rel_pos_w)
    x = torch.randn(3, *size, 768)
    with torch.no_grad():
        difference = folded_attention(attention, x) - Attention.forward(attention, x)
    assert difference.abs().max() < 1e-5


def test_folded_attention_equals_the_original_in_the_trained_encoder(sam, original_sam):
    pixels = torch.randn(2, 3, 128, 128)
    shapes = []

    def record(attention, args):
        shapes.append(tuple(args[0].shape[:3]))

    pairs = zip(sam.image_encoder.blocks, original_sam.image_encoder.blocks, strict=True)
    for block, plain in pairs:
        assert "forward" in vars(block.attn) and "forward" not in vars(plain.attn)
        plain.attn.register_forward_pre_hook(record)
    with torch.no_grad():
        difference = sam.image_encoder(pixels) - original_sam.image_encoder(pixels)
    assert shapes == [(8, 8, 8), (2, 16, 16), (2, 16, 16)]  # one windowed block, two global ones
    assert difference.abs().max() < 1e-4


# --------------------------------------------------------------------------------------------------
# Prompts to masks to IoU
# --------------------------------------------------------------------------------------------------


def random_point(mask, rng):
    y, x = rng.choice(np.argwhere(mask))
    return float(x), float(y)


@pytest.fixture(scope="module")
def scenes(samples):
    """The samples, and a crop whose axes SAM scales differently: 90 x 23 becomes 128 x 33."""
    image, mask = samples[0].image, samples[0].mask
    y, x = np.argwhere(mask).mean(0).astype(int)
    top = max(0, min(y - 11, image.height - 23))
    left = max(0, min(x - 45, image.width - 90))
    image = image.crop((left, top, left + 90, top + 23))
    mask = mask[top : top + 23, left : left + 90]
    return [*samples, SimpleNamespace(image=image, mask=mask, ignore=None)]


@pytest.fixture(scope="module")
def mixed(scenes):
    """Six prompts for each sample, one of each sort. Their order differs between the samples."""
    rng, prompts = np.random.default_rng(0), []
    for b, sample in enumerate(scenes):
        y, x = np.nonzero(sample.mask)
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) + rng.uniform(-2, 2, 4)
        box = tuple(box)
        p, q, r = (random_point(sample.mask, rng) for _ in range(3))
        group = [SamPrompt(box, (p, q)), SamPrompt(box, (r,)), SamPrompt(box, ())]
        group += [SamPrompt(None, (q, r)), SamPrompt(None, (p,)), SamPrompt(None, ())]
        prompts.append(group[b:] + group[:b])
    return prompts


@pytest.fixture(scope="module")
def predicted(scenes, mixed, original_sam):
    """SamPredictor's logits for them: B lists of G arrays (H, W), None for an empty prompt."""
    predictor, logits = SamPredictor(original_sam), []
    for sample, group in zip(scenes, mixed, strict=True):
        predictor.set_image(np.asarray(sample.image))
        logits.append([predict(predictor, prompt) for prompt in group])
    return logits


def predict(predictor, prompt):
    if prompt == SamPrompt(None, ()):
        return None
    points = np.array(prompt.points) if prompt.points else None
    labels = np.ones(len(prompt.points)) if prompt.points else None
    box = None if prompt.box is None else np.array(prompt.box)
    options = {"multimask_output": True, "return_logits": True}
    logits, ratings, _ = predictor.predict(points, labels, box, **options)
    return logits[ratings.argmax()]


def encode(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.exercise_3
def test_masks_equal_those_of_sam_predictor(scenes, mixed, predicted, scorer):
    overlap = scorer.score(scenes, mixed, keep_masks=True)
    for b, sample in enumerate(scenes):
        for g, logits in enumerate(predicted[b]):
            mask = overlap.masks[b][g].numpy()
            assert mask.shape == sample.mask.shape
            assert overlap.prompted[b, g] == (logits is not None)
            if logits is None:
                assert not mask.any() and overlap.iou[b, g] == 0
                continue
            clear = np.abs(logits) > 1e-3  # closer to 0, rounding decides
            assert clear.mean() > 0.999
            same = mask == (logits > 0)
            assert same[clear].all(), f"the mask of {mixed[b][g]} is not SamPredictor's"
            expected = coco.iou([encode(logits > 0)], [encode(sample.mask)], [0])[0, 0]
            assert abs(overlap.iou[b, g].item() - expected) < 1e-4
    assert overlap.iou.max() > 0.5  # so the masks are not arbitrary


@pytest.mark.exercise_3
def test_iou_equals_that_of_pycocotools(scenes, mixed, scorer):
    overlap = scorer.score(scenes, mixed, keep_masks=True)
    for b, sample in enumerate(scenes):
        masks = [encode(mask.numpy()) for mask in overlap.masks[b]]
        expected = coco.iou(masks, [encode(sample.mask)], [0])[:, 0]
        assert overlap.iou[b].numpy() == pytest.approx(expected, abs=1e-6)


SHAPES = [(480, 640), (640, 427), (640, 640), (683, 1024)]
SHAPES += [(7, 1000), (1000, 1), (2000, 1333), (384, 513)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_cropping_the_padding_first_does_not_change_the_masks(size):
    """With the numbers of an official SAM: 1024 pixels, logits of 256 x 256."""
    logits = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)) * 20
    input_size = ResizeLongestSide.get_preprocess_shape(*size, 1024)
    official = SimpleNamespace(image_encoder=SimpleNamespace(img_size=1024))
    expected = Sam.postprocess_masks(official, logits[:, None], input_size, size)[:, 0]
    assert torch.allclose(upsample_masks(logits, 1024, input_size, size), expected, atol=1e-4)


@pytest.mark.exercise_3
def test_decoding_together_equals_decoding_one_by_one(sam):
    torch.manual_seed(0)
    embeddings, image_index = torch.randn(3, 64, 16, 16), torch.tensor([2, 0, 0, 1, 2])
    boxes = torch.rand(5, 4) * 60 + torch.tensor([0, 0, 60, 60])
    points = torch.rand(5, 2, 2) * 128
    encoder = sam.prompt_encoder
    position, no_mask = encoder.get_dense_pe(), encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    dense = no_mask.expand(1, 64, 16, 16)
    for b, p in ((boxes, points), (boxes, None), (None, points)):
        logits, rating = decode_masks(sam, embeddings, image_index, b, p)
        assert logits.shape == (5, 4, 64, 64) and rating.shape == (5, 4)
        for n in range(5):
            one = (None if x is None else x[n : n + 1] for x in (b, p))
            sparse, image = embed_prompts(encoder, *one), embeddings[image_index[n]][None]
            expected = sam.mask_decoder.predict_masks(image, position, sparse, dense)
            assert torch.allclose(logits[n], expected[0][0], atol=1e-3)
            assert torch.allclose(rating[n], expected[1][0], atol=1e-4)


@pytest.mark.exercise_3
def test_batch_sizes_do_not_change_the_masks(scenes, mixed, sam, scorer):
    whole = scorer.score(scenes, mixed, keep_masks=True)
    small = SamScorer(sam, encoder_batch=2)
    small.decoder_bytes = 4 * 2**16  # 4 prompts: an embedding has 64 KiB
    parts = small.score(scenes, mixed, keep_masks=True)
    for a, b in zip(whole.masks, parts.masks, strict=True):
        assert (a != b).float().mean() < 1e-4
    assert torch.allclose(whole.iou, parts.iou, atol=1e-3)


@pytest.mark.parametrize("larger, expected", [(1, [4, 4, 2]), (2, [2] * 5), (8, [1] * 10)])
def test_prompts_in_a_decoder_call_follow_from_the_bytes_of_the_embeddings(sam, larger, expected):
    calls = []

    def decode(embeddings, image_index, boxes, points):
        calls.append(len(image_index))
        return torch.zeros(calls[-1], 3, 512, 512), torch.zeros(calls[-1], 3)

    other = copy.deepcopy(sam)
    other.decode = decode
    # 4 MiB an image, as in an official SAM 1, and a level of several times as much.
    embeddings = [torch.zeros(2, 64 * larger, 128, 128), torch.zeros(2, 64, 128, 128)]
    prompts = [SamPrompt((1.0, 1.0, 9.0, 9.0), ())] * 10
    SamScorer(other)._best_logits(embeddings, torch.ones(2, 2), prompts)
    assert calls == expected


def test_single_mask_output_is_never_chosen(scenes, mixed, sam, scorer):
    other = copy.deepcopy(sam)
    # Its mask 0 rates itself above the three others.
    other.mask_decoder.iou_prediction_head.layers[-1].bias[0] += 100
    found = SamScorer(other).score(scenes, mixed).iou
    assert torch.equal(found, scorer.score(scenes, mixed).iou)


@pytest.mark.exercise_3
def test_each_image_is_encoded_once_and_each_sort_of_prompt_decoded_in_one_call(
    scenes, mixed, scorer, monkeypatch
):
    images, prompts = [], []
    encoder, decoder = scorer.sam.image_encoder, scorer.sam.mask_decoder
    forward, predict_masks = encoder.forward, decoder.predict_masks

    def count_images(x):
        images.append(len(x))
        return forward(x)

    def count_prompts(*args, **inputs):
        prompts.append(len(args[2] if len(args) > 2 else inputs["sparse_prompt_embeddings"]))
        return predict_masks(*args, **inputs)

    monkeypatch.setattr(encoder, "forward", count_images)
    monkeypatch.setattr(decoder, "predict_masks", count_prompts)
    scorer.score(scenes, mixed)
    assert images == [len(scenes)]
    assert prompts == [len(scenes)] * 5  # SAM does not get the sixth sort, the empty prompts


def test_sam_stays_frozen(sam, scenes, mixed):
    before = {name: weight.clone() for name, weight in sam.state_dict().items()}
    scorer = SamScorer(sam.train())
    scorer.score(scenes, mixed)
    assert not any(p.requires_grad for p in sam.parameters())
    assert not any(module.training for module in sam.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in sam.state_dict().items())


@pytest.fixture
def score_masks(scorer, monkeypatch):
    """A function score_masks(truth, ignore, masks) -> Overlap for one image. SAM finds `masks`."""

    def decode(embeddings, image_index, boxes, points):
        N, (h, w) = len(image_index), embeddings[0].shape[2:]
        return torch.zeros(N, 3, 4 * h, 4 * w), torch.zeros(N, 3)

    def score_masks(truth, ignore, masks):
        height, width = np.shape(truth)
        found = torch.tensor(masks).float() - 0.5
        monkeypatch.setattr(scorer.sam, "decode", decode)
        monkeypatch.setattr(scorer.sam, "upsample", lambda *_: found)
        sample = SimpleNamespace(
            image=Image.new("RGB", (width, height)),
            mask=np.array(truth, bool),
            ignore=None if ignore is None else np.array(ignore, bool),
        )
        return scorer.score([sample], [[SamPrompt(None, ((1.0, 1.0),))] * len(masks)])

    return score_masks


@pytest.mark.exercise_2
@pytest.mark.parametrize("shape", [(5, 7), (33, 1), (1, 200)])
def test_pixels_are_counted_as_in_pycocotools(shape):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, *shape), shape, shape)
    masks, truth, some = (torch.rand(*size, generator=generator) > 0.4 for size in sizes)
    for ignore in (some, None):
        intersection, union = intersection_and_union(masks, truth, ignore)
        assert intersection.dtype == union.dtype == torch.float32
        assert intersection.shape == union.shape == (4,)
        counts = torch.ones(shape, dtype=torch.bool) if ignore is None else ~ignore
        for g, mask in enumerate(masks):
            pair = [encode((x & counts).numpy()) for x in (mask, truth)]
            assert intersection[g] == coco.area(coco.merge(pair, intersect=True))
            assert union[g] == coco.area(coco.merge(pair))


@pytest.mark.exercise_2
def test_large_masks_are_counted_exactly_and_the_arguments_are_unchanged():
    masks = torch.ones(2, 301, 301, dtype=torch.bool)
    truth, one_pixel = masks[0].clone(), torch.zeros_like(masks[0])
    one_pixel[0, 0] = True
    for ignore, pixels in ((one_pixel, 90_600), (None, 90_601)):
        intersection, union = intersection_and_union(masks, truth, ignore)
        assert intersection.tolist() == union.tolist() == [pixels] * 2
    unchanged = masks.all() and truth.all() and one_pixel.sum() == 1
    assert unchanged, "the arguments must not be changed in place"


@pytest.mark.exercise_2
def test_iou_is_a_quotient_and_one_for_two_empty_masks():
    counts = torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[4.0, 2.0], [5.0, 0.0]])
    overlap = Overlap(*counts, torch.ones(2, 2, dtype=torch.bool), None)
    assert overlap.iou.tolist() == [[0.75, 0], [1, 1]]


@pytest.mark.exercise_2
def test_ignored_pixels_count_neither_as_right_nor_as_wrong(score_masks):
    truth, ignore = [[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 1]]
    masks = [
        [[1, 0, 0, 0], [0, 0, 0, 0]],  # 1 of the 2 true pixels that count
        [[1, 1, 0, 0], [1, 0, 0, 0]],  # both, and one false pixel
        [[1, 1, 1, 1], [0, 0, 0, 1]],  # both; the false ones are ignored
        [[0, 0, 1, 1], [0, 0, 0, 1]],  # only ignored pixels
    ]
    overlap = score_masks(truth, ignore, masks)
    assert overlap.intersection.tolist() == [[1, 2, 2, 0]]
    assert overlap.union.tolist() == [[2, 3, 2, 2]]
    assert overlap.iou.tolist() == [pytest.approx([1 / 2, 2 / 3, 1, 0])]
    overlap = score_masks(truth, None, masks)
    assert overlap.iou.tolist() == [pytest.approx([1 / 3, 2 / 4, 3 / 5, 1 / 5])]


@pytest.mark.exercise_2
def test_empty_union_gives_one(score_masks):
    empty, wrong = [[0, 0], [0, 0]], [[1, 0], [0, 0]]
    assert score_masks(empty, None, [empty, wrong]).iou.tolist() == [[1, 0]]
    # Truth and mask hold only ignored pixels.
    truth, ignore, mask = [[1, 0], [0, 0]], [[1, 1], [0, 0]], [[0, 1], [0, 0]]
    assert score_masks(truth, ignore, [mask]).iou.tolist() == [[1]]


def test_completion_without_a_prompt_scores_zero_even_if_the_true_mask_is_empty(scorer, samples):
    empty = np.zeros_like(samples[0].mask)
    nothing = SimpleNamespace(image=samples[0].image, mask=empty, ignore=None)
    texts = ["<think>why</think><answer>{}</answer>", ""]
    scores = score_completions(scorer, [nothing], [texts], frame=64, keep_masks=True)
    assert not scores.overlap.masks[0].any()
    assert scores.iou.tolist() == [[0, 0]] and scores.reward.tolist() == [[1, 0]]


# --------------------------------------------------------------------------------------------------
# IoU to reward
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, steps",
    [
        pytest.param("tiered", ((5, 2), (7, 3), (8, 4)), marks=pytest.mark.exercise_4),
        *(("0.5", ((5, 4),)), ("0.7", ((7, 4),)), ("0.8", ((8, 4),))),
    ],
)
def test_iou_must_exceed_a_threshold(kind, steps):
    # (IoU in thousandths, reward). The IoU is a quotient of two pixel counts.
    cases, below = [(0, 0), (1000, steps[-1][1])], 0
    for tenths, value in steps:
        cases += [(100 * tenths - 1, below), (100 * tenths, below), (100 * tenths + 1, value)]
        below = value
    expected = [value for _, value in cases]
    for scale in (1, 7, 333):
        iou = torch.tensor([n * scale for n, _ in cases]).float() / torch.tensor(1000.0 * scale)
        hint = "float32 rounds the IoU and the threshold: compare tensors"
        assert accuracy_reward(iou, kind).tolist() == expected, hint
    above = torch.nextafter(torch.tensor([t / 10 for t, _ in steps]), torch.tensor(2.0))
    assert accuracy_reward(above, kind).tolist() == [value for _, value in steps]


@pytest.mark.exercise_4
def test_tiers_of_a_whole_step():
    iou = torch.tensor([[0.0, 0.6, 1.0], [0.75, 0.5, 0.3]])
    rewards = tiered_reward(iou)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[0, 2, 4], [3, 0, 0]]
    assert iou[0, 1] == 0.6, "the IoU is logged: it must not be changed in place"


def test_raw_iou_reward_has_the_same_range():
    rewards = accuracy_reward(torch.tensor([[0.0, 0.25], [0.8, 1.0]]), "iou")
    assert rewards.flatten().tolist() == pytest.approx([0, 1, 3.2, 4])


# Rewards without SAM. The true box of `scene` is 400 x 200 pixels in an image of 840 x 840.


def scene(width=840, height=840, box=(200, 100, 600, 300)):
    """A blank image whose true mask is a box, with a hole in its middle."""
    x1, y1, x2, y2 = box
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    mask[y1 + 50 : y2 - 50, x1 + 50 : x2 - 50] = False
    return SimpleNamespace(image=Image.new("RGB", (width, height)), mask=mask)


def nothing_in_it():
    image = Image.new("RGB", (840, 840))
    return SimpleNamespace(image=image, mask=np.zeros((840, 840), bool))


def test_box_ious_by_hand():
    found = [
        (200, 100, 600, 300),  # the true box
        (200, 100, 400, 300),  # half of it
        (400, 200, 800, 400),  # 200 x 100 of 140,000 pixels are shared
        (600, 100, 840, 300),  # they only touch
        (190.5, 100, 600, 300),
    ]
    expected = [1, 1 / 2, 1 / 7, 0, 400 / 409.5]
    prompts = [SamPrompt(box, ((1.0, 1.0),)) for box in found] + [SamPrompt(None, ())]
    ious = box_ious([scene(), nothing_in_it()], [prompts, prompts])
    assert ious.dtype == torch.float32 and ious.shape == (2, 6)
    assert ious[0].tolist() == pytest.approx([*expected, 0])
    assert ious[1].tolist() == [0] * 6  # nothing is there: also without a box


def test_true_box_is_the_tightest_one():
    assert true_box(scene().mask) == (200, 100, 600, 300)
    assert true_box(nothing_in_it().mask) is None
    one = np.zeros((10, 20), bool)
    one[3, 7] = True
    assert true_box(one) == (7, 3, 8, 4)


@pytest.fixture
def labels(monkeypatch):
    """The two labelled points of Seg-Zero's reward, for every mask."""
    labels = ((300.0, 130.0), (500.0, 270.0))
    monkeypatch.setattr(reward, "interior_points", lambda mask: labels)
    return labels


def thirds(sample, box, points=(), frame=840, in_mask=False):
    """How many of the three parts of Seg-Zero's reward a prompt earns; each is worth 4/3."""
    earned = segzero_reward([sample], [[SamPrompt(box, tuple(points))]], frame, in_mask)
    assert earned.shape == (1, 1) and earned.dtype == torch.float32
    number = earned.item() * 3 / 4
    assert number == pytest.approx(round(number))
    return round(number)


def shifted(right, down, box=(200, 100, 600, 300)):
    return (box[0] + right, box[1] + down, box[2] + right, box[3] + down)


def test_segzero_rewards_the_overlap_of_the_boxes(labels):
    # Half of the true box has IoU 0.5, and its right edge is 200 pixels away: 50 on average.
    assert thirds(scene(), (200, 100, 400, 300)) == 0
    assert thirds(scene(), (200, 100, 401, 300)) == 1
    assert thirds(scene(), None, labels) == 0
    assert thirds(nothing_in_it(), (200, 100, 600, 300), labels) == 0


@pytest.mark.parametrize(
    "size, frame, right, down, close",
    [
        *(((840, 840), 840, 9.9, 9.9, True), ((840, 840), 840, 10, 10, False)),
        *(((840, 840), 840, 19.9, 0, True), ((840, 840), 840, 20, 0, False)),  # a mean of four
        *(((420, 420), 840, 4.9, 4.9, True), ((420, 420), 840, 5, 5, False)),  # 2 : 1
        # Each axis has its own scale: here x counts four times and y once.
        *(((210, 840), 840, 4.9, 0, True), ((210, 840), 840, 5, 0, False)),
        *(((210, 840), 840, 0, 19.9, True), ((210, 840), 840, 0, 20, False)),
        # A policy image of 64 pixels: two of them are 26.25. Of 168: the limit is 10.
        *(((840, 840), 64, 26, 26, True), ((840, 840), 64, 26.25, 26.25, False)),
        *(((840, 840), 168, 9.9, 9.9, True), ((840, 840), 168, 10, 10, False)),
        *(((840, 840), 1000, 9.9, 9.9, True), ((840, 840), 1000, 10, 10, False)),
    ],
)
def test_segzero_rewards_a_box_below_ten_pixels_away(labels, size, frame, right, down, close):
    box = (100, 100, 200, 500) if size == (210, 840) else (100, 100, 400, 400)
    sample = scene(*size, box=box)
    assert thirds(sample, shifted(right, down, box), frame=frame) == 1 + close


SHIFTED_POINTS = [  # (the points, whether they are in the true box and near the labels)
    (((300, 130), (500, 270)), True),
    (((500, 270), (300, 130)), True),  # in the other order
    (((399, 130), (401, 270)), True),  # 99 pixels each
    (((401, 130), (399, 270)), False),  # 101 each; in the other order 171
    (((300, 130), (301, 270)), True),  # 0 and 199
    (((300, 130), (299, 270)), False),  # 0 and 201
    (((300, 100), (600, 270)), True),  # on the border of the true box
    (((300, 99), (500, 270)), False),  # outside of it
    (((300, 130), (601, 270)), False),
    (((300, 130),), False),  # one point
    ((), False),
]


@pytest.mark.parametrize("points, near", SHIFTED_POINTS)
def test_segzero_rewards_points_near_the_labels(labels, points, near):
    assert thirds(scene(), (200, 100, 600, 300), points) == 2 + near


def test_segzero_measures_the_distance_of_points_in_pixels_of_840(monkeypatch):
    monkeypatch.setattr(reward, "interior_points", lambda mask: ((100.0, 150.0), (100.0, 250.0)))
    sample, box = scene(420, 840, box=(20, 100, 380, 300)), (20, 100, 380, 300)
    assert thirds(sample, box, ((149, 150), (149, 250))) == 3  # 98 pixels to the right
    assert thirds(sample, box, ((151, 150), (151, 250))) == 2  # 102
    # 52 and 48 pixels down. Scaled like x, they would be 100 on average.
    assert thirds(sample, box, ((100, 202), (100, 298))) == 3


def test_the_labels_of_segzero_are_interior_points():
    sample = scene()
    assert thirds(sample, (200, 100, 600, 300), interior_points(sample.mask)) == 3
    assert all(sample.mask[int(y), int(x)] for x, y in interior_points(sample.mask))


@pytest.mark.parametrize(
    "points, inside",
    [
        (((201, 101), (599, 299)), True),  # however far from the labels
        (((300, 130), (500, 270)), True),
        (((300, 130), (500, 200)), False),  # one in the hole
        (((500, 200), (300, 130)), False),
        (((300, 130), (700, 130)), False),  # one outside
        (((300, 130), (500, 249.9)), False),  # the pixel is y = 249, in the hole
        (((300, 130), (500, 250)), True),
        (((300, 130),), False),
    ],
)
def test_segzero_mask_rewards_points_in_the_mask(labels, points, inside):
    assert thirds(scene(), (200, 100, 600, 300), points, in_mask=True) == 2 + inside


def test_a_point_on_the_far_edge_of_the_image_is_in_its_last_pixel(labels):
    sample, box = scene(840, 840, box=(440, 540, 840, 840)), (440, 540, 840, 840)
    assert thirds(sample, box, ((840, 840), (840.0, 600)), in_mask=True) == 3


def test_segzero_scores_each_completion_of_each_sample(labels):
    samples = [scene(), scene(box=(0, 0, 400, 200)), nothing_in_it()]
    exact = SamPrompt((200, 100, 600, 300), labels)
    no_points = SamPrompt((0, 0, 400, 200), ())
    earned = segzero_reward(samples, [[exact, no_points]] * 3, 840, in_mask=False)
    assert earned.flatten().tolist() == pytest.approx([4, 0, 0, 8 / 3, 0, 0])


def true_answer(sample, think=True, points=True, frame=64):
    """A completion with the true box of a sample and two good points, or only one."""
    y, x = np.nonzero(sample.mask)
    to_x, to_y = frame / sample.image.width, frame / sample.image.height
    box = [x.min() * to_x, y.min() * to_y, (x.max() + 1) * to_x, (y.max() + 1) * to_y]
    first, second = ([x * to_x, y * to_y] for x, y in interior_points(sample.mask))
    answer = {"bbox": box, "points_1": first} | ({"points_2": second} if points else {})
    return wrap(json.dumps(answer)) if think else f"<answer>{json.dumps(answer)}</answer>"


@pytest.mark.parametrize("kind", ACCURACY_REWARDS)
def test_reward_is_the_sum_of_its_parts(scorer, samples, kind):
    options = ({}, {"think": False}, {"points": False})
    completions = [[*(true_answer(s, **o) for o in options), "no idea"] for s in samples]
    scores = score_completions(scorer, samples, completions, frame=64, accuracy=kind)
    B = len(samples)
    assert scores.think_format.tolist() == [[1, 0, 1, 0]] * B
    assert scores.answer_format.tolist() == [[1, 1, 0, 0]] * B
    frame, in_mask = 64, kind == "segzero_mask"
    if kind == "box":
        expected = tiered_reward(box_ious(samples, scores.prompts))
    elif kind.startswith("segzero"):
        expected = segzero_reward(samples, scores.prompts, frame, in_mask)
    else:
        expected = accuracy_reward(scores.iou, kind)
    assert torch.equal(scores.accuracy, expected)
    total = scores.accuracy + scores.think_format + scores.answer_format
    assert torch.equal(scores.reward, total)
    assert 5 < scores.reward.max() <= 6 and scores.reward.min() == 0


@pytest.mark.parametrize("kind, in_mask", [("segzero", False), ("segzero_mask", True)])
def test_segzero_gets_the_frame_of_the_answers(scorer, samples, monkeypatch, kind, in_mask):
    calls = []

    def noted(samples, prompts, frame, in_mask):
        calls.append((frame, in_mask))
        return torch.zeros(len(samples), len(prompts[0]))

    monkeypatch.setattr(reward, "segzero_reward", noted)
    scores = score_completions(scorer, samples[:1], [["", ""]], frame=70, accuracy=kind)
    assert calls == [(70, in_mask)] and scores.accuracy.tolist() == [[0, 0]]


def test_frame_must_be_that_of_the_answers(scorer, samples):
    def iou(written_in, read_in):
        completions = [[true_answer(sample, frame=written_in)] for sample in samples]
        return score_completions(scorer, samples, completions, frame=read_in).iou

    assert iou(64, 64).mean() > 0.6  # with images that are not square
    assert torch.allclose(iou(1000, 1000), iou(64, 64), atol=1e-3)
    assert iou(1000, 64).mean() < 0.3


# --------------------------------------------------------------------------------------------------
# Hostile completions
# --------------------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:0x[0-9]+|(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"


def find_answer(text):
    """(thought, the text outside of the two blocks, the text inside the answer), None if missing.

    `parts` holds texts and tags in turn. The answer is the last one after the thought, if there is
    one thought.
    """
    parts = re.split("(</?(?:think|answer)>)", text)
    opened, closed = ([k for k, p in enumerate(parts) if p == t] for t in ("<think>", "</think>"))
    thought, outside, first = None, "", 0
    if len(opened) == len(closed) == 1 and opened < closed:
        thought = "".join(parts[opened[0] + 1 : closed[0]])
        outside, first = "".join(parts[: opened[0]]), closed[0] + 1
    ends = [k for k in range(first, len(parts)) if parts[k] == "</answer>"]
    starts = [k for k in range(first, ends[-1] if ends else 0) if parts[k] == "<answer>"]
    if not starts:
        return thought, None, None
    outside += "".join(parts[first : starts[-1]] + parts[ends[-1] + 1 :])
    return thought, outside, "".join(parts[starts[-1] + 1 : ends[-1]])


def read_formats(text):
    """(think, answer): the two formats, read with regular expressions and not with a parser.

    `think` is exact. `answer` is necessary for the reward: braces that hold a box with ordered
    corners and two points, in ASCII numbers.
    """
    thought, outside, body = find_answer(text)
    if body is None:
        return False, False
    think = bool(thought and thought.strip() and not outside.strip())
    if len(body) > 2000:  # longer answers are not read
        return think, False

    def value(number):
        return float(int(number, 16)) if "x" in number else float(number)

    def lists(key, count):
        inner = r"\s*,\s*".join([f"({NUMBER})"] * count)
        pattern = rf"""["']{key}["']\s*:\s*\[\s*{inner}\s*,?\s*\]"""
        found = [tuple(map(value, m.groups())) for m in re.finditer(pattern, body)]
        return [numbers for numbers in found if max(map(abs, numbers)) <= 1e6]

    boxes = [box for box in lists("bbox", 4) if box[0] < box[2] and box[1] < box[3]]
    points = [lists(key, 2) for key in ("points_1", "points_2")]
    braces = re.fullmatch(r"(```\w*)?[\s(]*\{.*\}[\s)]*(```)?", body.strip(), re.DOTALL)
    return think, bool(braces and boxes and all(points))


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ODD = ["", "-", "٣٢", "½", "²", r"\uff11", "0x10", "1_0", "07", "+3", ".5", "5.", "'7'"]
ODD += ["9" * 5000, "\0", "\ud800", "1e6", "1e-320", "-0.0", "63.999", "3,4"]
SYMBOLS = (*map(chr, range(128)), *"\u00a0\u2003\u2028\ufeff\ud800\udcff٣½é中😀")
PIECES = (*TAGS, *TAGS, BODY, BODY, *" \n\u2028{}<", "why", "```json")
REPEATED = (*TAGS, BODY, "[", "<", "'", "é", "\0")
CHANGES = ("drop", "double", "swap", "quotes", "fence", "parentheses")
NESTED = (("[", "]"), ('{"a":', "}"), ("[[],", "]"), ("(", ")"), ("-", ""), ("f(", ")"))


def any_value(rng):
    """What may stand in place of a coordinate."""
    number = struct.unpack("d", rng.randbytes(8))[0]  # of any size, also NaN and infinity
    choices = (str(rng.randint(-100, 200)), rng.choice(NO_NUMBERS + ODD), repr(number))
    return rng.choice((*choices, repr(rng.uniform(-100, 200))))


def changed_answer(rng):
    """A completion in the right format with up to two other values and up to two changes.

    A change drops, doubles, moves or fences a piece of the text, or changes all quotes.
    """
    x, y, w, h = rng.randint(0, 40), rng.randint(0, 40), rng.randint(1, 40), rng.randint(1, 40)
    values = [str(v) for v in (x, y, x + w, y + h, x + w // 2, y + h // 2, x + 1, y + 1)]
    for _ in range(rng.randint(0, 2)):
        values[rng.randrange(8)] = any_value(rng)
    box, first, second = (",".join(values[place]) for place in (slice(4), slice(4, 6), slice(6, 8)))
    pieces = ["<think>", "red", "</think>", "<answer>", "{", f'"bbox":[{box}]', ","]
    pieces += [f'"points_1":[{first}]', ",", f'"points_2":[{second}]', "}", "</answer>"]
    for _ in range(rng.randint(0, 2)):
        place, other, change = rng.randrange(12), rng.randrange(12), rng.choice(CHANGES)
        if change == "quotes":
            pieces = [piece.replace('"', "'") for piece in pieces]
        elif change in ("fence", "parentheses"):
            before, after = ("```json", "```") if change == "fence" else ("(", ")")
            pieces[place] = before + pieces[place] + after
        elif change == "swap":
            pieces[place], pieces[other] = pieces[other], pieces[place]
        else:
            pieces[place] *= 2 * (change == "double")
    return rng.choice(("", "\n ")).join(pieces)


def nested(rng):
    """Brackets nested also deeper than Python's stack, closed or not, as the answer or in it."""
    depth = rng.choice((rng.randint(1, 20), rng.randint(1, 1990)))
    opening, closing = rng.choice(NESTED)
    deep = opening * depth + closing * rng.choice((0, depth - 1, depth))
    valid = '{{"bbox":[1,2,3,4],"points_1":[1,2],"points_2":[3,4],"x":{}}}'
    body = rng.choice(("{}", '{{"bbox":{}}}', valid, valid.replace('"', "'")))
    return f"<think>x</think><answer>{body.format(deep)}</answer>"


def hostile_texts(count, seed=0):
    """`count` completions, the same ones each time."""
    rng = random.Random(seed)

    def text(parts, most):
        return "".join(rng.choices(parts, k=rng.randint(0, most)))

    kinds = (
        *[lambda: changed_answer(rng)] * 4,
        lambda: nested(rng),
        lambda: text(PIECES, 8),
        lambda: rng.choice(REPEATED) * rng.randint(2, 300),
        lambda: text(SYMBOLS, 8),
        lambda: wrap(text(SYMBOLS, 8)),
    )
    return [rng.choice(kinds)() for _ in range(count)]


@pytest.fixture(scope="module")
def small():
    """A scorer with random weights and two scenes: one whose mask a box gives, and an empty one."""
    scorer = SamScorer(small_sam())
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, empty = Image.fromarray(noise), np.zeros((20, 30), bool)
    scene = SimpleNamespace(image=image, mask=empty, ignore=None)
    overlap = scorer.score([scene], [[SamPrompt((10, 5, 20, 15), ())]], keep_masks=True)
    truth = overlap.masks[0][0].numpy()
    return scorer, [SimpleNamespace(image=image, mask=truth, ignore=None), scene]


def check_scores(scores, completions):
    allowed = {"accuracy": {0, 2, 3, 4}, "think_format": {0, 1}, "answer_format": {0, 1}}
    for name, values in allowed.items():
        assert set(getattr(scores, name).flatten().tolist()) <= values
    assert ((scores.iou >= 0) & (scores.iou <= 1)).all()  # so it is not NaN
    total = scores.accuracy + scores.think_format + scores.answer_format
    assert torch.equal(scores.reward, total)
    for b, group in enumerate(completions):
        for g, text in enumerate(group):
            think, answer = read_formats(text)
            assert scores.think_format[b, g] == think, text[:300]
            assert scores.answer_format[b, g] <= answer, text[:300]


def test_hostile_completions_are_scored_in_range(small):
    texts = hostile_texts(1000)
    scorer, scenes = small
    completions = [texts[:500], texts[500:]]
    check_scores(score_completions(scorer, scenes, completions, frame=64), completions)


@pytest.mark.slow
def test_100_000_hostile_completions_are_scored_in_range(small):
    """All are read. Of those that say the same, one is scored."""
    scorer, scenes = small
    distinct, formats = {}, set()
    for text in hostile_texts(100_000, seed=1):
        answer = parse_answer(text)
        think, valid = read_formats(text)
        assert answer.think_format == think and answer.answer_format <= valid, text[:300]
        formats.add((think, answer.answer_format))
        distinct.setdefault(answer[:4], text)
    texts = list(distinct.values())
    assert len(formats) == 4 and len(texts) > 20_000
    for start in range(0, len(texts) - 1, 2000):
        chosen = texts[start : start + 2000]
        chosen = [chosen[0::2][: len(chosen) // 2], chosen[1::2]]
        check_scores(score_completions(scorer, scenes, chosen, frame=64), chosen)


@pytest.mark.slow
def test_megabytes_of_text_are_scored(small):
    n = 300_000  # with quadratic time this takes minutes
    texts = [
        wrap("[" * n),
        wrap(BODY, "x" * n),
        "<think>" * n,
        "<" * n,
        "</answer>" * n,
        wrap(" " * n + BODY),
        " " * n + wrap(BODY),
        "<think>" + "</think" * n,
        wrap('{"bbox":[' + "1" * n),
        wrap("```" * n),
        wrap("-" * n),
        "<answer>" * n + "</answer>",
        "<think>x</think>" + "<answer></answer>" * (n // 4),
        wrap('"' * n),
        "\u2003" * n,
    ]
    scorer, scenes = small
    scores = score_completions(scorer, scenes[:1], [texts], frame=64)
    check_scores(scores, [texts])
    assert scores.think_format[0, 1] == scores.answer_format[0, 1] == 1  # a long thought is valid
    assert scores.answer_format[0, 5] == 0  # a long answer is not


COORDINATES = st.floats(-1e6, 1e6, allow_subnormal=False) | st.integers(-(10**6), 10**6)


@pytest.mark.exercise_1
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(
    st.lists(COORDINATES, min_size=8, max_size=8),
    st.permutations(("bbox", "points_1", "points_2")),
    st.sampled_from((None, 2)),
)
def test_output_of_json_dumps_is_read_back(values, order, indent):
    x1, y1 = map(min, values[:2], values[2:4])
    x2, y2 = map(max, values[:2], values[2:4])
    data = {"bbox": [x1, y1, x2, y2], "points_1": values[4:6], "points_2": values[6:]}
    body = json.dumps({key: data[key] for key in order}, indent=indent)
    answer = parse_answer(wrap(body))
    valid = x1 < x2 and y1 < y2
    assert answer.box == (tuple(data["bbox"]) if valid else None)
    assert answer.points == (tuple(values[4:6]), tuple(values[6:]))
    assert answer.answer_format == valid

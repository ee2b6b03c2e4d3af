"""The reward, checked against SamPredictor, pycocotools, a second reading of the format, and numbers worked by hand."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention
from segment_anything.utils.transforms import ResizeLongestSide

import reward
from reward import (
    ACCURACY_REWARDS,
    SAM_SIZES,
    Answer,
    Overlap,
    SamPrompt,
    SamScorer,
    accuracy_reward,
    build_sam,
    decode_masks,
    embed_prompts,
    folded_attention,
    intersection_and_union,
    load_sam,
    parse_answer,
    sam_prompt,
    score_completions,
    tiered_reward,
    trl_reward,
    upsample_masks,
)

# ---------------------------------------------------------------------------------------------------------------------
# Text to numbers
# ---------------------------------------------------------------------------------------------------------------------

BODY = '{"bbox":[1,2,30,40],"points_1":[5,6],"points_2":[7,8]}'
BOX, POINTS = (1.0, 2.0, 30.0, 40.0), ((5.0, 6.0), (7.0, 8.0))


def wrap(body, thought="the red one"):
    return f"<think>{thought}</think><answer>{body}</answer>"


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "text",
    [
        wrap(BODY),
        f" \n{wrap(BODY)}\n\t ",
        f"<think>\nthe red one\n</think>\n\n<answer>\n{BODY}\n</answer>",
        wrap('{ "points_2" : [7, 8],\n "bbox" : [ 1, 2,\t30, 40 ], "points_1" : [5, 6] }'),
        wrap('{"bbox":[1.0,2e0,3.0E+1,40],"points_1":[5.0,6],"points_2":[7,8.000]}'),
        wrap(BODY.replace('"', "'")),
        wrap(f"```json\n{BODY}\n```"),
        wrap(f"```{BODY}```"),
        wrap(f"\n  ```json{BODY.replace(chr(34), chr(39))}```  \n"),
        wrap(BODY[:-1] + ',"label":"it\'s \\"red\\"","extra":[[1,{"a":null}],true]}'),
        wrap(BODY, "the red one") + "\u00a0\u2003",  # Unicode's white space is white space
    ],
)
def test_what_a_reader_would_accept_is_accepted(text):
    assert parse_answer(text) == Answer(True, True, BOX, POINTS, "the red one")


def without(part):
    """What is left of BODY without one of its parts."""
    points = {"bbox": POINTS, "points_1": POINTS[1:], "points_2": POINTS[:1]}[part]
    return Answer(True, False, None if part == "bbox" else BOX, points, "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize("part", ["bbox", "points_1", "points_2"])
def test_a_missing_part_leaves_the_others(part):
    data = json.loads(BODY)
    del data[part]
    assert parse_answer(wrap(json.dumps(data))) == without(part)


NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1000001", "-1e7", "1" * 400]
NO_NUMBERS += ["true", "false", "null", '"7"', '"५"', "[1]", "{}"]


@pytest.mark.exercise_1
@pytest.mark.parametrize("part", ["bbox", "points_1", "points_2"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: value[:9])
def test_what_is_no_number_spoils_its_own_part_only(part, value):
    data = json.loads(BODY)
    for place in range(len(data[part])):
        spoilt = json.loads(BODY)
        spoilt[part][place] = "HERE"
        assert parse_answer(wrap(json.dumps(spoilt).replace('"HERE"', value))) == without(part)


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
def test_a_bad_box_is_no_box(value):
    body = json.dumps({"bbox": value, "points_1": [5, 6], "points_2": [7, 8]})
    assert parse_answer(wrap(body)) == Answer(True, False, None, POINTS, "the red one")


@pytest.mark.exercise_1
@pytest.mark.parametrize("value", [[], [5], [5, 6, 7], [[5, 6]], [[5], [6]], "5,6", 5, None, {"x": 5, "y": 6}])
def test_a_bad_point_is_no_point(value):
    body = json.dumps({"bbox": [1, 2, 30, 40], "points_1": value, "points_2": [7, 8]})
    assert parse_answer(wrap(body)) == Answer(True, False, BOX, POINTS[1:], "the red one")


SLIPS = [("1,2", "1,,2"), ("1,2", "01,2"), ("1,2", "0x1,2"), ("1,2", "+1,2"), ("1,2", "1.,2"), ("1,2", "1_0,2")]
SLIPS += [("1,2", "१,2"), ("]", ",]"), (":", "="), ('"', ""), ("}", ""), ("{", "("), ("}", "}}")]


@pytest.mark.exercise_1
@pytest.mark.parametrize(
    "body",
    [
        *("", "null", "[]", "[1,2,30,40]", '"text"', "7", "{}", "{", BODY + BODY, f"[{BODY}]", f'{{"answer":{BODY}}}'),
        *(f"the answer is {BODY}", f"{BODY} that is all", f"({BODY})", BODY.upper()),
        *(BODY.replace(old, new) for old, new in SLIPS),
        *('{"a":' * 390 + "1" + "}" * 39, "[" * 1990, "[" * 995 + "]" * 995),  # deeper than Python's stack
        BODY + " " * 2000,  # too long to be looked at
    ],
    ids=lambda body: body[:25],
)
def test_an_answer_that_is_no_json_object_with_these_keys_gives_nothing(body):
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
        (f"<think>why<answer>{BODY}</answer>", False, True),  # unclosed
        (f"why</think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think><answer>{BODY}", False, False),
        (f"<think>why</think>{BODY}</answer>", False, False),
        (f"<answer>{BODY}</answer><think>why</think>", False, True),  # wrong order
        (f"</think>why<think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think></answer>{BODY}<answer>", False, False),
        (f"<think>why</think></answer><answer>{BODY}", False, False),
        (f"<think>why<answer>{BODY}</answer></think>", False, True),  # one in the other
        (f"<answer><think>why</think>{BODY}</answer>", False, False),
        (f"<think>why<answer></think>{BODY}</answer>", False, False),
        (f"<think>a</think><think>b</think><answer>{BODY}</answer>", False, True),  # repeated
        (f"<think><think>a</think><answer>{BODY}</answer>", False, True),
        (f"<think>a</think><answer>{BODY}</answer><answer>{BODY}</answer>", False, False),
        (f"<think>a</think><answer>{BODY}</answer></answer>", False, False),
        (f"<think>a <answer> b</think><answer>{BODY}</answer>", False, False),
        (f"Sure! {wrap(BODY)}", False, True),  # text around
        (f"{wrap(BODY)} Done.", False, True),
        (f"<think>a</think> so <answer>{BODY}</answer>", False, True),
        (f"<Think>why</Think><answer>{BODY}</answer>", False, True),
        (f"< think>why</think><answer>{BODY}</answer>", False, True),
        (f"<think>why</think><ANSWER>{BODY}</ANSWER>", False, False),
        ("<think>why</think><answer></answer>", True, False),  # the two rewards are apart
        ("<think>why</think><answer>no idea</answer>", True, False),
        ("", False, False),
    ],
)
def test_formats_are_judged_each_on_its_own(text, think, answer):
    found = parse_answer(text)
    assert (found.think_format, found.answer_format) == (think, answer)
    assert (found.box, found.points) == ((BOX, POINTS) if answer else (None, ()))


# ---------------------------------------------------------------------------------------------------------------------
# Policy pixels to image pixels
# ---------------------------------------------------------------------------------------------------------------------


def answered(box=None, points=()):
    return Answer(True, True, box, points, "")


def test_coordinates_are_scaled_once_and_each_axis_by_its_own_factor():
    # 840 -> 1680 x 420: x doubles, y halves. Swapped axes, an inverse or a second scaling would all show.
    prompt = sam_prompt(answered((100, 200, 300, 400), ((10, 20), (830, 840))), frame=840, width=1680, height=420)
    assert prompt == SamPrompt((200, 100, 600, 200), ((20, 10), (1660, 420)))
    # Thousandths of a 50 x 2000 image.
    prompt = sam_prompt(answered((100, 200, 300, 400), ((500, 1000),)), frame=1000, width=50, height=2000)
    assert prompt.box == pytest.approx((5, 400, 15, 800)) and prompt.points[0] == pytest.approx((25, 2000))


def test_a_box_is_cut_to_the_image_and_dropped_outside():
    def clip(*box):
        return sam_prompt(answered(box), frame=100, width=200, height=50).box

    assert clip(-10, -20, 110, 120) == (0, 0, 200, 50)
    assert clip(50, -1, 1e6, 50) == (100, 0, 200, 25)
    for outside in ((-20, 10, -1, 20), (10, -20, 20, -1), (100, 10, 120, 20), (10, 100, 20, 120), (-5, 0, 0, 10)):
        assert clip(*outside) is None


def test_points_outside_are_dropped_and_the_rest_stay():
    points = ((0, 0), (100, 100), (-0.1, 5), (5, 100.1))
    assert sam_prompt(answered(None, points), frame=100, width=200, height=50) == SamPrompt(None, ((0, 0), (200, 50)))


# ---------------------------------------------------------------------------------------------------------------------
# SAM: loading and attention
# ---------------------------------------------------------------------------------------------------------------------


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
    encoder = {"width": 16, "depth": 1, "heads": 2, "global_blocks": (0,), "image_size": 32, "patch": 8, "window": 2}
    return build_sam(**encoder, prompt_width=16, mlp=16, decoder_heads=2)


def damaged(folder, kind):
    """A file that is no checkpoint of the tiny SAM."""
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
        *("truncated safetensors", "empty safetensors", "web page safetensors", "another model safetensors"),
        *("truncated pth", "truncated old pth", "empty pth", "web page pth", "text pth"),
        *("another model pth", "list pth", "nested pth"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line(tmp_path, kind):
    file = damaged(tmp_path, kind)
    with pytest.raises(ValueError) as error:
        load_sam(f"tiny:{file}")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, names", [("vit_x:a.pth", "vit_x"), ("", "''"), ("vit_b", "vit_b:FILE"), ("vit_h:", "vit_h:FILE")]
)
def test_a_wrong_name_is_refused_in_one_line(spec, names):
    with pytest.raises(ValueError, match=re.escape(names)) as error:
        load_sam(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nothing.pth", "."])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))) as error:
        load_sam(f"tiny:{tmp_path / path}")
    assert "\n" not in str(error.value)


def test_an_official_style_checkpoint_loads_frozen(tmp_path, sam):
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    again = load_sam(f"tiny:{tmp_path / 'sam.pth'}")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in sam.state_dict().items())
    assert not any(p.requires_grad for p in again.parameters()) and not any(m.training for m in again.modules())


@pytest.mark.parametrize("size", [(14, 14), (6, 17)], ids=str)
def test_folded_attention_is_the_original_at_the_width_of_vit_b(size):
    torch.manual_seed(0)
    attention = Attention(768, num_heads=12, qkv_bias=True, use_rel_pos=True, input_size=size)
    torch.nn.init.normal_(attention.rel_pos_h)  # they start at zero, and would hide a swap of rows and columns
    torch.nn.init.normal_(attention.rel_pos_w)
    x = torch.randn(3, *size, 768)
    with torch.no_grad():
        assert (folded_attention(attention, x) - Attention.forward(attention, x)).abs().max() < 1e-5


def test_folded_attention_is_the_original_in_the_trained_encoder(sam, original_sam):
    pixels = torch.randn(2, 3, 128, 128)
    shapes = []
    for block, plain in zip(sam.image_encoder.blocks, original_sam.image_encoder.blocks, strict=True):
        assert "forward" in vars(block.attn) and "forward" not in vars(plain.attn)  # folded and original
        plain.attn.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:3])))
    with torch.no_grad():
        difference = sam.image_encoder(pixels) - original_sam.image_encoder(pixels)
    assert shapes == [(8, 8, 8), (2, 16, 16), (2, 16, 16)]  # one windowed block, two global ones
    assert difference.abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Prompts to masks to IoU
# ---------------------------------------------------------------------------------------------------------------------


def inside(mask, rng):
    y, x = rng.choice(np.argwhere(mask))
    return float(x), float(y)


@pytest.fixture(scope="module")
def scenes(samples):
    """The samples, and one of which each axis is scaled by a factor of its own: 90 x 23 pixels become 128 x 33."""
    y, x = np.argwhere(samples[0].mask).mean(0).astype(int)
    top, left = max(0, min(y - 11, samples[0].image.height - 23)), max(0, min(x - 45, samples[0].image.width - 90))
    image, mask = (
        samples[0].image.crop((left, top, left + 90, top + 23)),
        samples[0].mask[top : top + 23, left : left + 90],
    )
    return [*samples, SimpleNamespace(image=image, mask=mask, ignore=None)]


@pytest.fixture(scope="module")
def mixed(scenes):
    """For each sample six prompts, of every make-up, in an order that differs from sample to sample."""
    rng, prompts = np.random.default_rng(0), []
    for b, sample in enumerate(scenes):
        y, x = np.nonzero(sample.mask)
        box = tuple(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) + rng.uniform(-2, 2, 4))
        p, q, r = (inside(sample.mask, rng) for _ in range(3))
        group = [
            SamPrompt(box, (p, q)),
            SamPrompt(box, (r,)),
            SamPrompt(box, ()),
            SamPrompt(None, (q, r)),
            SamPrompt(None, (p,)),
        ]
        group.append(SamPrompt(None, ()))
        prompts.append(group[b:] + group[:b])
    return prompts


@pytest.fixture(scope="module")
def predicted(scenes, mixed, original_sam):
    """What SamPredictor makes of them: B lists of G full-size logits (H, W), None where there is no prompt."""
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
    logits, ratings, _ = predictor.predict(points, labels, box, multimask_output=True, return_logits=True)
    return logits[ratings.argmax()]


@pytest.mark.exercise_2
def test_masks_are_those_of_sam_predictor(scenes, mixed, predicted, scorer):
    overlap = scorer.score(scenes, mixed, keep_masks=True)
    for b, sample in enumerate(scenes):
        for g, logits in enumerate(predicted[b]):
            mask = overlap.masks[b][g].numpy()
            assert mask.shape == sample.mask.shape
            assert overlap.asked[b, g] == (logits is not None)
            if logits is None:
                assert not mask.any() and overlap.iou[b, g] == 0
                continue
            clear = np.abs(logits) > 1e-3  # in between, rounding decides; that is hardly ever
            assert clear.mean() > 0.999
            assert (mask == (logits > 0))[clear].all(), f"the mask of {mixed[b][g]} is not SamPredictor's"
            expected = coco.iou([encode(logits > 0)], [encode(sample.mask)], [0])[0, 0]
            assert abs(overlap.iou[b, g].item() - expected) < 1e-4
    assert overlap.iou.max() > 0.5  # the comparison is about real masks


def encode(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.exercise_3
def test_iou_is_that_of_pycocotools(scenes, mixed, scorer):
    overlap = scorer.score(scenes, mixed, keep_masks=True)
    for b, sample in enumerate(scenes):
        masks = [encode(mask.numpy()) for mask in overlap.masks[b]]
        assert overlap.iou[b].numpy() == pytest.approx(coco.iou(masks, [encode(sample.mask)], [0])[:, 0], abs=1e-6)


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (640, 640), (683, 1024), (7, 1000), (1000, 1), (2000, 1333), (384, 513)])
def test_padding_left_out_of_the_upsampling_changes_nothing(size):
    """Official geometry: 1024 pixels, logits of 256 x 256. Whatever lies in the padding must not shine through."""
    logits = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)) * 20
    input_size = ResizeLongestSide.get_preprocess_shape(*size, 1024)
    wanted = Sam.postprocess_masks(SimpleNamespace(image_encoder=SimpleNamespace(img_size=1024)), logits[:, None], input_size, size)
    assert torch.allclose(upsample_masks(logits, 1024, input_size, size), wanted[:, 0], atol=1e-4)


@pytest.mark.exercise_2
def test_prompts_decoded_together_are_those_decoded_one_by_one(sam):
    torch.manual_seed(0)
    embeddings, image_index = torch.randn(3, 64, 16, 16), torch.tensor([2, 0, 0, 1, 2])  # unsorted, unequally many
    boxes, points = torch.rand(5, 4) * 60 + torch.tensor([0, 0, 60, 60]), torch.rand(5, 2, 2) * 128
    dense_pe, no_mask = sam.prompt_encoder.get_dense_pe(), sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    for b, p in ((boxes, points), (boxes, None), (None, points)):
        logits, rating = decode_masks(sam, embeddings, image_index, b, p)
        assert logits.shape == (5, 4, 64, 64) and rating.shape == (5, 4)
        for n in range(5):
            sparse = embed_prompts(sam.prompt_encoder, *(None if x is None else x[n : n + 1] for x in (b, p)))
            one = embeddings[image_index[n]][None]
            wanted = sam.mask_decoder.predict_masks(one, dense_pe, sparse, no_mask.expand(1, 64, 16, 16))
            assert torch.allclose(logits[n], wanted[0][0], atol=1e-3) and torch.allclose(rating[n], wanted[1][0], atol=1e-4)


@pytest.mark.exercise_2
def test_batch_sizes_do_not_change_the_masks(scenes, mixed, sam, scorer):
    whole = scorer.score(scenes, mixed, keep_masks=True)
    parts = SamScorer(sam, encoder_batch=2, decoder_batch=4).score(scenes, mixed, keep_masks=True)
    for a, b in zip(whole.masks, parts.masks, strict=True):
        assert (a != b).float().mean() < 1e-4
    assert torch.allclose(whole.iou, parts.iou, atol=1e-3)


def test_a_cpu_decodes_what_fits_its_cache(sam):
    large = build_sam(**SAM_SIZES["tiny"] | {"image_size": 1024})  # embeddings of 64 x 128 x 128, as large as official ones: 4 MiB
    assert SamScorer(large).decoder_batch == 4 and SamScorer(large, decoder_batch=3).decoder_batch == 3
    assert SamScorer(sam).decoder_batch == 64


def test_the_single_mask_is_no_candidate(scenes, mixed, sam, scorer):
    vain = copy.deepcopy(sam)
    vain.mask_decoder.iou_prediction_head.layers[-1].bias[0] += 100  # its mask 0 rates itself above the other three
    assert torch.equal(SamScorer(vain).score(scenes, mixed).iou, scorer.score(scenes, mixed).iou)


@pytest.mark.exercise_2
def test_each_image_is_encoded_once_and_each_make_up_decoded_in_one_call(scenes, mixed, scorer, monkeypatch):
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
    assert prompts == [len(scenes)] * 5  # the sixth make-up holds nothing: SAM is not asked


def test_sam_stays_frozen(sam, scenes, mixed):
    before = {name: weight.clone() for name, weight in sam.state_dict().items()}
    scorer = SamScorer(sam.train())  # a caller's slip
    scorer.score(scenes, mixed)
    assert not any(p.requires_grad for p in sam.parameters())
    assert not any(module.training for module in sam.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in sam.state_dict().items())


@pytest.fixture
def drawn(scorer, monkeypatch):
    """Have SAM 'find' given masks: score_drawn(truth, ignore, masks) -> Overlap for one image and these masks."""

    def score_drawn(truth, ignore, masks):
        H, W = np.shape(truth)
        found = torch.tensor(masks).float() - 0.5
        monkeypatch.setattr(reward, "upsample_masks", lambda *_: found)
        sample = SimpleNamespace(
            image=Image.new("RGB", (W, H)),
            mask=np.array(truth, bool),
            ignore=None if ignore is None else np.array(ignore, bool),
        )
        return scorer.score([sample], [[SamPrompt(None, ((1.0, 1.0),))] * len(masks)])

    return score_drawn


@pytest.mark.exercise_3
@pytest.mark.parametrize("shape", [(5, 7), (33, 1), (1, 200)])
def test_pixels_are_counted_as_pycocotools_counts_them(shape):
    generator = torch.Generator().manual_seed(0)
    masks, truth, ignore = (torch.rand(*n, *shape, generator=generator) > 0.4 for n in ((4,), (), ()))
    for left_out in (ignore, None):
        intersection, union = intersection_and_union(masks, truth, left_out)
        assert intersection.dtype == union.dtype == torch.float32 and intersection.shape == union.shape == (4,)
        counts = torch.ones(shape, dtype=torch.bool) if left_out is None else ~left_out
        for g, mask in enumerate(masks):
            pair = [encode((x & counts).numpy()) for x in (mask, truth)]
            assert intersection[g] == coco.area(coco.merge(pair, intersect=True))
            assert union[g] == coco.area(coco.merge(pair))


@pytest.mark.exercise_3
def test_large_masks_are_counted_exactly_and_nothing_is_overwritten():
    masks, truth = torch.ones(2, 301, 301, dtype=torch.bool), torch.ones(301, 301, dtype=torch.bool)
    ignore = torch.zeros(301, 301, dtype=torch.bool)
    ignore[0, 0] = True
    for left_out, pixels in ((ignore, 90_600), (None, 90_601)):
        intersection, union = intersection_and_union(masks, truth, left_out)
        assert intersection.tolist() == union.tolist() == [pixels] * 2
    assert masks.all() and truth.all() and ignore.sum() == 1, "the arguments belong to the caller: nothing in place"


@pytest.mark.exercise_3
def test_iou_of_a_step_is_a_quotient_and_one_for_nothing_with_nothing():
    counts = torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[4.0, 2.0], [5.0, 0.0]])
    assert Overlap(*counts, torch.ones(2, 2, dtype=torch.bool), None).iou.tolist() == [[0.75, 0], [1, 1]]


@pytest.mark.exercise_3
def test_ignored_pixels_count_neither_for_nor_against(drawn):
    truth, ignore = [[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 1]]
    masks = [
        [[1, 0, 0, 0], [0, 0, 0, 0]],  # 1 of the 2 true pixels that count
        [[1, 1, 0, 0], [1, 0, 0, 0]],  # both, and one false
        [[1, 1, 1, 1], [0, 0, 0, 1]],  # both; the false ones are ignored
        [[0, 0, 1, 1], [0, 0, 0, 1]],  # ignored pixels alone
    ]
    with_ignore, without = drawn(truth, ignore, masks), drawn(truth, None, masks)
    assert with_ignore.intersection.tolist() == [[1, 2, 2, 0]] and with_ignore.union.tolist() == [[2, 3, 2, 2]]
    assert with_ignore.iou.tolist() == [pytest.approx([1 / 2, 2 / 3, 1, 0])]
    assert without.iou.tolist() == [pytest.approx([1 / 3, 2 / 4, 3 / 5, 1 / 5])]


@pytest.mark.exercise_3
def test_an_empty_union_scores_one(drawn):
    assert drawn([[0, 0], [0, 0]], None, [[[0, 0], [0, 0]], [[1, 0], [0, 0]]]).iou.tolist() == [[1, 0]]
    assert drawn([[1, 0], [0, 0]], [[1, 1], [0, 0]], [[[0, 1], [0, 0]]]).iou.tolist() == [[1]]  # empty once ignored


def test_saying_nothing_scores_zero_even_where_nothing_is_there(scorer, samples):
    nothing = SimpleNamespace(image=samples[0].image, mask=np.zeros_like(samples[0].mask), ignore=None)
    scores = score_completions(
        scorer, [nothing], [["<think>why</think><answer>{}</answer>", ""]], frame=64, keep_masks=True
    )
    assert not scores.overlap.masks[0].any()
    assert scores.iou.tolist() == [[0, 0]] and scores.reward.tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# IoU to reward
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, steps",
    [
        pytest.param("tiered", ((5, 2), (7, 3), (8, 4)), marks=pytest.mark.exercise_4),
        *(("0.5", ((5, 4),)), ("0.7", ((7, 4),)), ("0.8", ((8, 4),))),
    ],
)
def test_a_threshold_must_be_exceeded(kind, steps):
    # IoU as it arises: a quotient of two pixel counts. (numerator of a thousand parts, reward)
    cases = [(0, 0), (1000, steps[-1][1])]
    below = 0
    for tenths, value in steps:
        cases += [(100 * tenths - 1, below), (100 * tenths, below), (100 * tenths + 1, value)]
        below = value
    for scale in (1, 7, 333):
        iou = torch.tensor([n * scale for n, _ in cases]).float() / torch.tensor(1000.0 * scale)
        wanted = [value for _, value in cases]
        assert accuracy_reward(iou, kind).tolist() == wanted, "at a threshold itself, which float32 rounds: compare tensors"
    one_up = torch.nextafter(torch.tensor([t / 10 for t, _ in steps]), torch.tensor(2.0))
    assert accuracy_reward(one_up, kind).tolist() == [value for _, value in steps]


@pytest.mark.exercise_4
def test_tiers_of_a_whole_step():
    iou = torch.tensor([[0.0, 0.6, 1.0], [0.75, 0.5, 0.3]])
    rewards = tiered_reward(iou)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[0, 2, 4], [3, 0, 0]]
    assert iou[0, 1] == 0.6, "the IoU must not be changed in place: it is logged"


def test_the_raw_iou_spans_the_same_range():
    assert accuracy_reward(torch.tensor([[0.0, 0.25], [0.8, 1.0]]), "iou").flatten().tolist() == pytest.approx(
        [0, 1, 3.2, 4]
    )


def say(sample, think=True, points=True, frame=64):
    """A completion with the true box of a sample, and its middle for the points."""
    y, x = np.nonzero(sample.mask)
    to_x, to_y = frame / sample.image.width, frame / sample.image.height
    box = [x.min() * to_x, y.min() * to_y, (x.max() + 1) * to_x, (y.max() + 1) * to_y]
    middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    body = json.dumps({"bbox": box, "points_1": middle} | ({"points_2": middle} if points else {}))
    return wrap(body) if think else f"<answer>{body}</answer>"


@pytest.mark.parametrize("kind", ACCURACY_REWARDS)
def test_a_reward_is_the_sum_of_its_parts(scorer, samples, kind):
    completions = [[say(s), say(s, think=False), say(s, points=False), "no idea"] for s in samples]
    scores = score_completions(scorer, samples, completions, frame=64, accuracy=kind)
    B = len(samples)
    assert scores.think_format.tolist() == [[1, 0, 1, 0]] * B
    assert scores.answer_format.tolist() == [[1, 1, 0, 0]] * B
    assert torch.equal(scores.accuracy, accuracy_reward(scores.iou, kind))
    assert torch.equal(scores.reward, scores.accuracy + scores.think_format + scores.answer_format)
    assert 5 < scores.reward.max() <= 6 and scores.reward.min() == 0


def test_the_frame_is_that_of_the_answers(scorer, samples):
    def iou(written_in, read_in):
        return score_completions(scorer, samples, [[say(s, frame=written_in)] for s in samples], frame=read_in).iou

    assert iou(64, 64).mean() > 0.6  # the right box, well prompted, also where the image is not square
    assert torch.allclose(iou(1000, 1000), iou(64, 64), atol=1e-3)  # thousandths mean the same to SAM
    assert iou(1000, 64).mean() < 0.3


def test_trl_gets_the_same_rewards_in_its_own_order(scorer, samples, monkeypatch):
    first, second, third = samples[:3]
    negative = SimpleNamespace(image=first.image.point(lambda v: 255 - v), mask=first.mask, ignore=None)
    rows = [third, first, second, first, third, third, negative]  # groups of unequal length, mixed; one mask twice
    texts = [say(third), say(first), "no idea", say(first, think=False), say(second), "<think>", say(first)]
    wanted = [
        score_completions(scorer, [row], [[text]], 64).reward.item() for row, text in zip(rows, texts, strict=True)
    ]
    assert len(set(wanted)) > 2
    encoded, encode_images = [], scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda images: encoded.extend(images) or encode_images(images))
    columns = {"photo": [row.image for row in rows], "mask": [row.mask for row in rows], "query": texts}
    assert trl_reward(scorer, 64)(texts, **columns) == wanted
    assert len(encoded) == 4
    assert trl_reward(scorer, 64)([[{"role": "assistant", "content": text}] for text in texts], **columns) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Hostile completions
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"


def well_formed(text):
    """(think, answer): a second reading of the two formats, with regular expressions instead of a JSON parser. `think`
    is exact; `answer` is what a paid answer must at least be: between its only tags, in braces, a box with ordered
    corners and two points, of plain ASCII numbers."""
    parts = re.split("(</?(?:think|answer)>)", text)
    tags = parts[1::2]
    thought = tags == ["<think>", "</think>", "<answer>", "</answer>"] and parts[2].strip()
    think = bool(thought and not (parts[0] + parts[4] + parts[8]).strip())
    if tags.count("<answer>") != 1 or tags.count("</answer>") != 1 or tags.index("<answer>") > tags.index("</answer>"):
        return think, False
    body = text[text.index("<answer>") + 8 : text.index("</answer>")]

    def lists(key, count):
        inner = r"\s*,\s*".join([f"({NUMBER})"] * count)
        return [tuple(map(float, m.groups())) for m in re.finditer(rf"""["']{key}["']\s*:\s*\[\s*{inner}\s*\]""", body)]

    boxes = [box for box in lists("bbox", 4) if box[0] < box[2] and box[1] < box[3] and max(map(abs, box)) <= 1e6]
    points = [[p for p in lists(key, 2) if max(map(abs, p)) <= 1e6] for key in ("points_1", "points_2")]
    braces = re.fullmatch(r"\s*(```(json)?)?\s*\{.*\}\s*(```)?\s*", body, re.DOTALL)
    return think, bool(braces and boxes and all(points))


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ODD = ["", "-", "٣٢", "½", "²", r"\uff11", "0x10", "1_0", "07", "+3", ".5", "5.", "'7'", "9" * 5000, "\0", "\ud800"]
ODD += ["1e6", "1e-320", "-0.0", "63.999"]
VALUES = st.one_of(
    st.integers(-100, 200).map(str),
    st.sampled_from(NO_NUMBERS + ODD),
    st.floats(allow_subnormal=False).map(repr),  # hypothesis cannot make subnormal ones while torch flushes them to 0
)
HARMS = st.tuples(
    st.integers(0, 11), st.integers(0, 11), st.sampled_from(("drop", "double", "swap", "quotes", "fence"))
)


@st.composite
def answers(draw):
    """A completion in the right format, then up to two of its values changed, and up to two of its pieces dropped,
    doubled, moved, fenced, or all put in other quotes."""
    x, y, w, h = draw(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)))
    values = [str(v) for v in (x, y, x + w, y + h, x + w // 2, y + h // 2, x + 1, y + 1)]
    for place, value in draw(st.lists(st.tuples(st.integers(0, 7), VALUES), max_size=2)):
        values[place] = value
    box, first, second = (",".join(values[place]) for place in (slice(0, 4), slice(4, 6), slice(6, 8)))
    pieces = ["<think>", "red", "</think>", "<answer>", "{", f'"bbox":[{box}]', ",", f'"points_1":[{first}]', ","]
    pieces += [f'"points_2":[{second}]', "}", "</answer>"]
    for place, other, harm in draw(st.lists(HARMS, max_size=2)):
        if harm == "quotes":
            pieces = [piece.replace('"', "'") for piece in pieces]
        elif harm == "fence":
            pieces[place] = f"```json{pieces[place]}```"
        elif harm == "swap":
            pieces[place], pieces[other] = pieces[other], pieces[place]
        else:
            pieces[place] *= 2 * (harm == "double")
    return draw(st.sampled_from(("", "\n "))).join(pieces)


@st.composite
def nested(draw):
    """Deep nesting, also deeper than Python's stack, closed or not, as the answer or as a part of it."""
    depth = draw(st.integers(1, 1990))
    opening, closing = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ("[[],", "]"), ("(", ")"))))
    deep = opening * depth + closing * draw(st.sampled_from((0, depth - 1, depth)))
    body = draw(
        st.sampled_from(("{}", '{{"bbox":{}}}', '{{"bbox":[1,2,3,4],"points_1":[1,2],"points_2":[3,4],"x":{}}}'))
    )
    return f"<think>x</think><answer>{body.format(deep)}</answer>"


SOUP = st.lists(st.sampled_from((*TAGS, *TAGS, BODY, BODY, *" \n\u2028{}<", "why", "```json")), max_size=8).map("".join)
REPEATED = st.builds(str.__mul__, st.sampled_from((*TAGS, BODY, "[", "<", "'", "é", "\0")), st.integers(2, 3000))
TEXT = st.text(max_size=8)
HOSTILE = st.one_of(answers(), answers(), answers(), nested(), SOUP, REPEATED, TEXT, TEXT.map(wrap))


@pytest.fixture(scope="module")
def small():
    """A scorer of random weights and two scenes: one that a certain box segments rightly, and an empty one."""
    scorer, noise = SamScorer(small_sam()), np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    scene = SimpleNamespace(image=Image.fromarray(noise), mask=np.zeros((20, 30), bool), ignore=None)
    truth = scorer.score([scene], [[SamPrompt((10, 5, 20, 15), ())]], keep_masks=True).masks[0][0].numpy()
    return scorer, [SimpleNamespace(image=scene.image, mask=truth, ignore=None), scene]


def check_scores(scores, completions):
    for name, allowed in (("accuracy", {0, 2, 3, 4}), ("think_format", {0, 1}), ("answer_format", {0, 1})):
        assert set(getattr(scores, name).flatten().tolist()) <= allowed
    assert ((scores.iou >= 0) & (scores.iou <= 1)).all()  # and so not NaN
    assert torch.equal(scores.reward, scores.accuracy + scores.think_format + scores.answer_format)
    for b, group in enumerate(completions):
        for g, text in enumerate(group):
            think, answer = well_formed(text)
            assert scores.think_format[b, g] == think, text[:300]
            assert scores.answer_format[b, g] <= answer, text[:300]


@settings(
    max_examples=320,
    phases=[Phase.generate],  # a failure names its text: no need for minutes of shrinking
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(HOSTILE, min_size=64, max_size=64, unique=True))
def test_20_000_hostile_completions_are_scored_in_range(small, texts):
    scorer, scenes = small
    completions = [texts[:32], texts[32:]]
    check_scores(score_completions(scorer, scenes, completions, frame=64), completions)


def test_megabytes_of_text_are_read(small):
    # Quadratic time would take hours here.
    n = 3_000_000
    texts = [
        wrap("[" * n),
        wrap(BODY, "x" * n),
        "<think>" * n,
        "<" * n,
        "</answer>" * n,
        wrap(" " * n + BODY),
        " " * n + wrap(BODY),
    ]
    texts += ["<think>" + "</think" * n, wrap('{"bbox":[' + "1" * n), wrap("```" * n), wrap('"' * n), "\u2003" * n]
    scorer, scenes = small
    scores = score_completions(scorer, scenes[:1], [texts], frame=64)
    check_scores(scores, [texts])
    assert scores.think_format[0, 1] == scores.answer_format[0, 1] == 1  # a long thought is fine, a long answer is not
    assert scores.answer_format[0, 5] == 0


@pytest.mark.exercise_1
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False) | st.integers(-(10**6), 10**6), min_size=8, max_size=8),
    st.permutations(("bbox", "points_1", "points_2")),
    st.sampled_from((None, 2)),
)
def test_whatever_json_writes_is_read_back(values, order, indent):
    x1, y1, x2, y2 = *map(min, values[:2], values[2:4]), *map(max, values[:2], values[2:4])
    data = {"bbox": [x1, y1, x2, y2], "points_1": values[4:6], "points_2": values[6:]}
    answer = parse_answer(wrap(json.dumps({key: data[key] for key in order}, indent=indent)))
    proper = x1 < x2 and y1 < y2
    assert answer.box == (tuple(data["bbox"]) if proper else None)
    assert answer.points == (tuple(values[4:6]), tuple(values[6:])) and answer.answer_format == proper

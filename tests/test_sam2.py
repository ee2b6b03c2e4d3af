"""Tests of plumbing/sam2.py with a SAM 2 of random weights: masks against transformers' own model
and processor, the scorer, the commands, and what `--sam sam2:...` refuses."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
)

import samr1_mini
from data import Sample, Shapes
from plumbing import runs
from plumbing.sam import load_sam
from plumbing.vlm import vlm_path
from reward import SamPrompt, SamScorer, score_completions

SIDE = 128  # of the square that the encoder sees, pixels
SIZES = ((96, 96), (150, 60), (40, 110), (128, 128))  # W, H of the images; the last needs no resize


def parts():
    """The smallest config that the classes allow: embeddings of 8 x 8 places, 16 channels."""
    backbone = dict(
        model_type="sam2_hiera_det_model",
        hidden_size=8,
        num_attention_heads=1,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = dict(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[SIDE // n, SIDE // n] for n in (4, 8, 16)],
        fpn_hidden_size=16,
    )
    prompts = dict(hidden_size=16, image_size=SIDE, patch_size=16, mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return dict(zip(names, (vision, prompts, decoder), strict=True))


def save(model, folder):
    """Give a model random weights that make its masks depend on the prompts, and save it.

    As it is built, all logits are near 0.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                embedding = "embed" in name or "token" in name
                std = 1.0 if embedding else weight[0].numel() ** -0.5
                weight.normal_(std=std, generator=generator)
    sizes = dict(size=dict(height=SIDE, width=SIDE), mask_size=dict(height=32, width=32))
    model.save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save(Sam2Model(Sam2Config(**parts())), tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def sam2(folder):
    return load_sam(f"sam2:{folder}")


@pytest.fixture(scope="module")
def scorer2(sam2):
    return SamScorer(sam2)


@pytest.fixture(scope="module")
def photos():
    """Four images of noise and blocks, with an ellipse as their true masks."""
    rng, found = np.random.default_rng(0), []
    for k, (width, height) in enumerate(SIZES):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((width, height))
        y, x = np.mgrid[:height, :width]
        mask = ((x / width - 0.5) ** 2 + (y / height - 0.4) ** 2) < 0.08
        found.append(Sample(image, "", mask, rng.random((height, width)) < 0.1, str(k)))
    return found


def prompts_on(sample, seed):
    """Prompts of each sort: box and two points, box and one, box only, points only, none."""
    rng = np.random.default_rng(seed)
    size = np.array(sample.image.size)

    def prompt(box, points):
        first = rng.uniform(0, 0.5, 2) * size
        corners = (*first, *(first + rng.uniform(0.2, 0.5, 2) * size))
        places = tuple(tuple(rng.uniform(0, 1, 2) * size) for _ in range(points))
        return SamPrompt(tuple(map(float, corners)) if box else None, places)

    return [prompt(*sort) for sort in ((1, 2), (1, 2), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0))]


@pytest.fixture(scope="module")
def mixed(photos):
    return [prompts_on(sample, k) for k, sample in enumerate(photos)]


@torch.no_grad()
def predict(model, processor, image, prompt):
    """Logits of the three masks at full size and their ratings, by transformers' model alone."""
    inputs = {}
    if prompt.box:
        inputs["input_boxes"] = [[list(prompt.box)]]
    if prompt.points:
        inputs["input_points"] = [[[list(point) for point in prompt.points]]]
        inputs["input_labels"] = [[[1] * len(prompt.points)]]
    inputs = processor(images=image, return_tensors="pt", **inputs)
    output = model(**inputs)
    sizes = inputs["original_sizes"]
    masks = processor.post_process_masks(output.pred_masks, sizes, binarize=False)
    return masks[0][0], output.iou_scores[0, 0]


# --------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------


def test_masks_equal_those_of_the_models_own_processor(folder, scorer2, photos, mixed):
    model, processor = Sam2Model.from_pretrained(folder), Sam2Processor.from_pretrained(folder)
    overlap = scorer2.score(photos, mixed, keep_masks=True)
    chosen = set()
    for b, sample in enumerate(photos):
        for g, prompt in enumerate(mixed[b][:-1]):
            logits, ratings = predict(model, processor, sample.image, prompt)
            best = ratings.argmax()
            mask = overlap.masks[b][g]
            assert mask.shape == sample.mask.shape
            clear = logits[best].abs() > 1e-5  # closer to 0, rounding decides
            assert clear.float().mean() > 0.9
            assert torch.equal(mask[clear], logits[best][clear] > 0), (b, prompt)
            others = [not torch.equal(mask, logits[k] > 0) for k in range(3) if k != best]
            assert all(others), "the three masks differ, so the choice shows"
            chosen.add(int(best))
        distances = (overlap.masks[b][:-1, None] != overlap.masks[b][:-1]).float().mean((2, 3))
        assert ((distances > 0.001) | torch.eye(6, dtype=torch.bool)).all(), "each prompt counts"
    assert len(chosen) > 1, chosen


def test_the_choice_follows_the_models_own_score(sam2, photos, mixed, scorer2):
    """A bias on the score of one mask makes it the best. Score 0 is that of the single mask."""
    expected = scorer2.score(photos, mixed, keep_masks=True)
    scored = []
    for number in range(4):
        other = copy.deepcopy(sam2)
        other.mask_decoder.iou_prediction_head.proj_out.bias.data[number] += 1e4
        scored.append(SamScorer(other).score(photos, mixed, keep_masks=True))
    assert all(map(torch.equal, scored[0].masks, expected.masks))
    for one, other in ((1, 2), (2, 3), (1, 3)):
        pairs = zip(scored[one].masks, scored[other].masks, strict=True)
        assert all((a != b)[:-1].flatten(1).any(1).all() for a, b in pairs)


def test_empty_prompts_get_empty_masks(scorer2, photos, mixed):
    overlap = scorer2.score(photos, mixed, keep_masks=True)
    assert overlap.prompted.tolist() == [[True] * 6 + [False]] * len(photos)
    assert not any(masks[-1].any() for masks in overlap.masks)
    assert (overlap.iou[:, -1] == 0).all() and (overlap.iou[:, :-1] > 0).any()
    nothing = scorer2.score(photos[:1], [[SamPrompt(None, ())] * 2])
    assert nothing.iou.tolist() == [[0, 0]] and not nothing.prompted.any()


def test_scores_together_equal_scores_one_by_one(scorer2, photos, mixed):
    together = scorer2.score(photos, mixed, keep_masks=True)
    for b, sample in enumerate(photos):
        for g, prompt in enumerate(mixed[b]):
            alone = scorer2.score([sample], [[prompt]], keep_masks=True)
            assert (alone.masks[0][0] != together.masks[b][g]).float().mean() < 1e-3
            assert alone.iou.item() == pytest.approx(together.iou[b, g].item(), abs=1e-3)


@pytest.mark.parametrize("prompts", [1, 3])
def test_chunks_do_not_change_the_masks(sam2, scorer2, photos, mixed, prompts):
    """The largest level holds 2 x 32 x 32 numbers an image."""
    whole = scorer2.score(photos, mixed, keep_masks=True)
    small, calls = SamScorer(sam2, encoder_batch=3), []
    small.decoder_bytes = prompts * 4 * 2 * 32 * 32
    hook = sam2.mask_decoder.register_forward_pre_hook(
        lambda module, args, inputs: calls.append(len(inputs["sparse_prompt_embeddings"])),
        with_kwargs=True,
    )
    parts = small.score(photos, mixed, keep_masks=True)
    hook.remove()
    assert sum(calls) == 6 * len(photos) and max(calls) == prompts
    for a, b in zip(whole.masks, parts.masks, strict=True):
        assert (a != b).float().mean() < 1e-3
    assert torch.allclose(whole.iou, parts.iou, atol=1e-3)


def test_each_image_is_encoded_once_and_each_sort_of_prompt_decoded_in_one_call(
    sam2, scorer2, photos, mixed
):
    images, calls = [], []
    hooks = [
        sam2.vision_encoder.register_forward_pre_hook(lambda _, x: images.append(len(x[0]))),
        sam2.mask_decoder.register_forward_pre_hook(lambda *_: calls.append(1)),
    ]
    scorer2.score(photos, mixed)
    for hook in hooks:
        hook.remove()
    assert images == [len(photos)] and len(calls) == 5  # not for the empty prompts


def test_each_axis_has_its_own_factor_and_long_images_are_read(scorer2):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 200, 3), np.uint8))
    levels, factors = scorer2.encode([image])
    assert factors.tolist() == [[SIDE / 200, SIDE / 3]]
    shapes = [(1, 2, 32, 32), (1, 4, 16, 16), (1, 16, 8, 8)]
    assert [tuple(level.shape) for level in levels] == shapes
    sample = Sample(image, "", np.ones((3, 200), bool), None, "")
    masks = scorer2.score([sample], [[SamPrompt((5.0, 0.0, 90.0, 3.0), ())]], keep_masks=True).masks
    assert masks[0].shape == (1, 3, 200)


def test_sam2_in_host_memory_gives_the_same_masks_and_stays_frozen(folder, photos, mixed, scorer2):
    expected, sam = scorer2.score(photos, mixed), load_sam(f"sam2:{folder}")
    before = {name: weight.clone() for name, weight in sam.state_dict().items()}
    host = [weight.data_ptr() for weight in sam.parameters()]
    scored = SamScorer(sam.train(), offload=True).score(photos, mixed)
    assert torch.equal(scored.intersection, expected.intersection)
    assert [weight.data_ptr() for weight in sam.parameters()] == host  # nothing was copied back
    assert all(torch.equal(weight, before[name]) for name, weight in sam.state_dict().items())
    assert not any(weight.requires_grad for weight in sam.parameters())
    assert not any(module.training for module in sam.modules())


def test_only_the_encoder_runs_in_16_bits(scorer2, photos, mixed, monkeypatch):
    """The same autocast as on CUDA. Embeddings and masks stay float32, and the IoU moves little."""
    autocast, seen = torch.autocast, []
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, _: autocast(device, dtype, True))
    hooks = [
        scorer2.sam.vision_encoder.backbone.blocks[0].mlp.proj_in.register_forward_hook(
            lambda _, args, output: seen.append(("encoder", output.dtype))
        ),
        scorer2.sam.mask_decoder.register_forward_hook(
            lambda _, args, output: seen.append(("decoder", output[0].dtype))
        ),
    ]
    levels, _ = scorer2.encode([sample.image for sample in photos])
    scorer2.score(photos, mixed)
    for hook in hooks:
        hook.remove()
    assert {level.dtype for level in levels} == {torch.float32}
    assert set(seen) == {("encoder", torch.bfloat16), ("decoder", torch.float32)}


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def test_weights_are_float32_and_those_of_the_folder(folder, sam2, tmp_path):
    model = Sam2Model.from_pretrained(folder)
    assert {weight.dtype for weight in sam2.parameters()} == {torch.float32}
    assert all(map(torch.equal, sam2.state_dict().values(), model.state_dict().values()))
    half = save(Sam2Model(Sam2Config(**parts())).bfloat16(), tmp_path / "half")
    assert {weight.dtype for weight in load_sam(f"sam2:{half}").parameters()} == {torch.float32}


def test_a_model_for_videos_is_loaded_without_a_warning(tmp_path, photos, mixed, capfd):
    """The hub's folders hold these."""
    torch.manual_seed(0)
    memories = dict(memory_encoder_hidden_size=16, memory_encoder_output_channels=8)
    video = Sam2VideoModel(Sam2VideoConfig(**parts(), **memories))
    folder = save(video, tmp_path / "video")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sam2_video"
    capfd.readouterr()
    sam = load_sam(f"sam2:{folder}")
    assert "sam2_video" not in "".join(capfd.readouterr())
    names = sam.state_dict().keys()
    assert all(torch.equal(sam.state_dict()[name], video.state_dict()[name]) for name in names)
    processor = Sam2Processor.from_pretrained(folder)
    image, prompt = photos[1].image, mixed[1][0]
    scored = SamScorer(sam).score(photos[1:2], [[prompt]], keep_masks=True).masks[0][0]
    logits, ratings = predict(sam, processor, image, prompt)
    assert (scored != (logits[ratings.argmax()] > 0)).float().mean() < 1e-3


def test_the_older_file_of_the_preprocessor_is_read(folder, tmp_path):
    """Folders on the hub have preprocessor_config.json beside processor_config.json."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    old = config.pop("image_processor") | {"image_processor_type": "Sam2ImageProcessorFast"}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert load_sam(f"sam2:{tmp_path}").image_processor.size.height == SIDE


def spoil(folder, kind):
    """Change one file of a folder with a SAM 2."""
    config, processor = folder / "config.json", folder / "processor_config.json"
    weights, settings = folder / "model.safetensors", json.loads(config.read_text())
    if kind == "another model":
        shutil.copy(f"{vlm_path('tiny')}/config.json", config)
    elif kind == "another size":
        settings["mask_decoder_config"]["hidden_size"] = 32
        config.write_text(json.dumps(settings))
    elif kind == "config not JSON":
        config.write_text("{")
    elif kind == "config incomplete":
        del settings["vision_config"]
        config.write_text(json.dumps(settings))
    elif kind == "other weights":
        shutil.copy(f"{vlm_path('tiny')}/model.safetensors", weights)
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "another square":
        processor.write_text(processor.read_text().replace(str(SIDE), "96"))
    else:
        files = {"no config": config, "no weights": weights, "no preprocessor": processor}
        files[kind].unlink()


SPOILED = {
    "another model": "qwen2_5_vl",
    "another size": "in another size",
    "config not JSON": "JSON",
    "config incomplete": "lacks",
    "other weights": "lacks",
    "truncated weights": "header",
    "another square": "preprocessor_config.json says 96 x 96",
    "no config": "model_type",
    "no weights": "model.safetensors",
    "no preprocessor": "preprocessor_config.json",
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(folder, tmp_path, kind):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    spoil(broken, kind)
    with pytest.raises(ValueError) as error:
        load_sam(f"sam2:{broken}")
    message = str(error.value)
    assert str(broken) in message and SPOILED[kind] in message and "\n" not in message
    assert re.search("fetch|use sam2:|use a hub name", message), "a remedy"


@pytest.mark.parametrize("name", ["", "/no/such/folder", "no-one/no-such-model"])
def test_a_missing_model_gets_one_line_that_names_the_flag(capsys, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for long
    for command in ("train", "eval", "segment"):
        with pytest.raises(SystemExit) as stopped:
            samr1_mini.main([command, "--sam", f"sam2:{name}"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        if command != "segment":  # that needs --image first
            assert "--sam sam2:" in error and "facebook/sam2-hiera-large" in error


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def run(command, *paths):
    samr1_mini.main([*command.split(), *map(str, paths)])


@pytest.mark.slow
def test_train_and_eval_with_sam2(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "save_figure", lambda *_: None)  # takes most of the time
    sizes = "--steps 3 --prompts_per_step 2 --group_size 2 --eval_samples 2 --save_every 3"
    flags = ("--sam", f"sam2:{folder}", "--out", tmp_path / "run")
    run(f"train {sizes}", *flags)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(0 <= json.loads(line)["iou"] <= 1 for line in lines)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"segmenter in the reward: sam2:{folder} (frozen)" in card
    flags = ("--sam", f"sam2:{folder}", "--out", tmp_path / "eval")
    run("eval --limit 3 --adapter", tmp_path / "run" / "adapter", *flags)
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())
    # The same numbers from the scorer alone.
    scenes = [Shapes("heldout")[i] for i in range(3)]
    rows = map(json.loads, (tmp_path / "eval" / "answers.jsonl").read_text().splitlines())
    texts = [[row["answer"]] for row in rows]
    scores = score_completions(SamScorer(load_sam(f"sam2:{folder}")), scenes, texts, 64)
    assert results["run"]["giou"] == pytest.approx(scores.iou.mean().item(), abs=1e-3)


def test_segment_with_sam2(folder, tmp_path, capsys):
    Shapes("heldout")[0].image.save(tmp_path / "scene.png")
    flags = ("--sam", f"sam2:{folder}", "--out", tmp_path / "found.png", "--save_memory", "3")
    run("segment --query circle --image", tmp_path / "scene.png", *flags)
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["mask_pixels"] >= 0 and (tmp_path / "found.png").is_file()

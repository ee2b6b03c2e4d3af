"""Tests of plumbing/transformers_sam.py with a SAM 2 and a SAM 3 of random weights: masks against
transformers' own model and processor, the scorer, the commands, and what `--sam sam2:...` and
`--sam sam3:...` refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3ImageProcessor,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerProcessor,
    Sam3VideoConfig,
    Sam3VideoModel,
)

import reward
import samr1_mini
from data import Sample, Shapes
from plumbing.errors import UserError
from plumbing.sam import load_sam
from plumbing.vlm import vlm_path
from reward import SamPrompt, SamScorer, score_completions

SIDE = 128  # of the square that the encoder sees, pixels
# W, H of the images: the last but one needs no resize, the last is tiny.
SIZES = ((96, 96), (150, 60), (40, 110), (128, 128), (31, 17))
BACKBONE = dict(
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
BACKBONE3 = dict(
    model_type="sam3_vit_model",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=16,
    window_size=4,
    global_attn_indexes=[1],
    pretrain_image_size=64,
)
LEVELS = dict(
    backbone_feature_sizes=[[SIDE // n, SIDE // n] for n in (4, 8, 16)], fpn_hidden_size=16
)
VISION = dict(backbone_config=BACKBONE, backbone_channel_list=[64, 32, 16, 8], **LEVELS)
VISION3 = dict(model_type="sam3_vision_model", backbone_config=BACKBONE3, **LEVELS)
# The smallest configs that the classes allow: embeddings of 8 x 8 places, 16 channels.
PARTS = dict(
    prompt_encoder_config=dict(
        hidden_size=16, image_size=SIDE, patch_size=16, mask_input_channels=4
    ),
    mask_decoder_config=dict(
        hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
    ),
)


def save(model, folder, seed=0):
    """Give a model random weights that make its masks depend on the prompts, and save it.

    As it is built, all logits are near 0.
    """
    generator = torch.Generator().manual_seed(seed)
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
    if model.config.model_type.startswith("sam3"):
        Sam3TrackerProcessor(Sam3ImageProcessor(**sizes)).save_pretrained(folder)
    else:
        Sam2Processor(Sam2ImageProcessor(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["sam2", "sam3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    torch.manual_seed(0)  # of the positional embedding, which is a buffer
    if name == "sam2":
        model = Sam2Model(Sam2Config(vision_config=VISION, **PARTS))
    else:
        vision = VISION3 | dict(scale_factors=[4.0, 2.0, 1.0])
        model = Sam3TrackerModel(Sam3TrackerConfig(vision_config=vision, **PARTS))
    # With these seeds the model rates not always the same of its three masks best.
    return save(model, tmp_path_factory.mktemp(name), seed={"sam2": 0, "sam3": 2}[name])


@pytest.fixture(scope="module")
def sam(name, folder):
    return load_sam(f"{name}:{folder}")


@pytest.fixture(scope="module")
def scorer(sam):
    return SamScorer(sam)


@pytest.fixture(scope="module")
def photos():
    """Four images of coloured blocks, with an ellipse as their true masks."""
    rng = np.random.default_rng(0)
    samples = []
    for width, height in SIZES:
        blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        y, x = np.mgrid[:height, :width]
        mask = ((x / width - 0.5) ** 2 + (y / height - 0.4) ** 2) < 0.08
        ignore = rng.random((height, width)) < 0.1
        samples.append(Sample(blocks.resize((width, height)), "", mask, ignore, f"{width}"))
    return samples


@pytest.fixture(scope="module")
def mixed(photos):
    """Prompts of each sort: box and two points, box and one, box only, points only, none."""
    rng = np.random.default_rng(0)
    prompts = []
    for sample in photos:
        size = np.array(sample.image.size)
        group = []
        for has_box, count in ((1, 2), (1, 2), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0)):
            first = rng.uniform(0, 0.5, 2)
            corners = np.concatenate([first, first + rng.uniform(0.2, 0.5, 2)]) * np.tile(size, 2)
            points = rng.uniform(0, 1, (count, 2)) * size
            box = tuple(corners.tolist()) if has_box else None
            group.append(SamPrompt(box, tuple(map(tuple, points.tolist()))))
        prompts.append(group)
    return prompts


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


OWN = {"sam2": (Sam2Model, Sam2Processor), "sam3": (Sam3TrackerModel, Sam3TrackerProcessor)}


# --------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------


def test_masks_equal_those_of_the_models_own_processor(name, folder, scorer, photos, mixed):
    own_model, own_processor = OWN[name]
    model = own_model.from_pretrained(folder)
    processor = own_processor.from_pretrained(folder)
    overlap = scorer.score(photos, mixed, keep_masks=True)
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
    assert overlap.prompted.tolist() == [[True] * 6 + [False]] * len(photos)
    assert not any(masks[-1].any() for masks in overlap.masks)  # of the empty prompts


def test_chunks_do_not_change_the_masks(sam, scorer, photos, mixed, monkeypatch):
    whole = scorer.score(photos, mixed, keep_masks=True)
    sizes = []
    hook = sam.model.mask_decoder.register_forward_pre_hook(
        lambda _, x, inputs: sizes.append(len(inputs["sparse_prompt_embeddings"])),
        with_kwargs=True,
    )
    # The largest level holds 2 x 32 x 32 numbers an image.
    monkeypatch.setitem(reward.DECODER_BYTES, "cpu", 3 * 4 * 2 * 32 * 32)
    parts = SamScorer(sam, encoder_batch=3).score(photos, mixed, keep_masks=True)
    hook.remove()
    assert sizes == [3, 3, 3, 1] + [3, 2] * 4  # not for the empty prompts
    for a, b in zip(whole.masks, parts.masks, strict=True):
        assert (a != b).float().mean() < 1e-3


def test_only_the_encoder_runs_in_16_bits(sam, scorer, photos, mixed, monkeypatch):
    """The same autocast as on CUDA. Embeddings and masks stay float32."""
    autocast = torch.autocast
    seen = {}
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, _: autocast(device, dtype, True))
    linears = [m for m in sam.model.vision_encoder.modules() if isinstance(m, torch.nn.Linear)]
    modules = {
        "encoder": linears[0],
        "decoder": sam.model.mask_decoder.output_hypernetworks_mlps[0],
    }
    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
        for name, module in modules.items()
    ]
    scorer.score(photos, mixed)
    for hook in hooks:
        hook.remove()
    assert seen == {"encoder": torch.bfloat16, "decoder": torch.float32}


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


MEMORY = dict(memory_encoder_hidden_size=16, memory_encoder_output_channels=8)


def test_a_model_for_videos_in_16_bits_is_loaded_in_float32_without_a_warning(tmp_path, capfd):
    """The hub's folders hold models for videos."""
    video = Sam2VideoModel(Sam2VideoConfig(vision_config=VISION, **PARTS, **MEMORY)).bfloat16()
    save(video, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2_video"
    capfd.readouterr()
    sam = load_sam(f"sam2:{tmp_path}")
    assert "sam2_video" not in "".join(capfd.readouterr())
    weights = video.float().state_dict()
    assert all(
        torch.equal(weight, weights[name]) for name, weight in sam.model.state_dict().items()
    )


@torch.no_grad()
def test_the_tracker_of_a_whole_sam_3_is_loaded(tmp_path, photos):
    """The hub's folder holds detector and tracker. They share the encoder."""
    small = dict(hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(model_type="clip_text_model", vocab_size=20, projection_dim=16)
    text |= dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(bos_token_id=0, eos_token_id=1)
    detector = dict(
        model_type="sam3",
        vision_config=VISION3,
        text_config=text,
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small | dict(num_queries=4),
        mask_decoder_config=dict(hidden_size=16, num_attention_heads=2),
    )
    tracker = dict(model_type="sam3_tracker_video", vision_config=VISION3, image_size=SIDE)
    tracker |= PARTS | MEMORY
    tracker |= {
        f"memory_attention_{key}": 16 for key in ("hidden_size", "feed_forward_hidden_size")
    }
    tracker |= dict(memory_attention_num_layers=1)
    whole = Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker)).eval()
    save(whole, tmp_path)
    # This version of transformers writes "tracker_model." twice. The hub's file has it once.
    held = {key: weight.clone() for key, weight in whole.state_dict().items()}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    sam = load_sam(f"sam3:{tmp_path}")
    pixels = torch.stack([sam.prepare(sample.image)[0] for sample in photos])
    maps, _ = whole.get_vision_features_for_tracker(whole.detector_model.vision_encoder(pixels))
    maps[-1] = maps[-1] + whole.tracker_model.no_memory_embedding  # of images, as in SAM 2
    for level, expected in zip(sam.encode(list(pixels)), maps, strict=True):
        torch.testing.assert_close(level.flatten(2), expected.permute(1, 2, 0))
    others = whole.tracker_model.state_dict()
    own = {k: v for k, v in sam.model.state_dict().items() if not k.startswith("vision_encoder.")}
    assert own and all(torch.equal(weight, others[key]) for key, weight in own.items())


def test_the_older_file_of_the_preprocessor_is_read(name, folder, tmp_path):
    """Folders on the hub have preprocessor_config.json beside processor_config.json."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    old = config.pop("image_processor")
    old["image_processor_type"] += "Fast"
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert load_sam(f"{name}:{tmp_path}").image_processor.size.height == SIDE


@pytest.mark.parametrize(
    "file, wrong, message",
    [
        ("config.json", "missing", "use a hub name such as facebook/sam"),
        ("config.json", "another model", "it holds a qwen2_5_vl, not a sam"),
        ("model.safetensors", "another model", "it lacks"),
        ("model.safetensors", "cut short", "model.safetensors is damaged or truncated"),
        ("model.safetensors", "not finite", "1 weights are not finite"),
        ("model.safetensors", "pointer", "model.safetensors is a git-lfs pointer"),
        ("processor_config.json", "another square", "preprocessor_config.json says 96 x 96"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    name, folder, tmp_path, file, wrong, message
):
    broken = shutil.copytree(folder, tmp_path / "broken")
    if wrong == "missing":
        (broken / file).unlink()
    elif wrong == "another model":
        shutil.copy(f"{vlm_path('tiny')}/{file}", broken)
    elif wrong == "cut short":
        (broken / file).write_bytes((broken / file).read_bytes()[:1000])
    elif wrong == "not finite":
        weights = load_file(broken / file)
        weights[min(weights)] /= 0
        save_file(weights, broken / file, {"format": "pt"})
    elif wrong == "pointer":
        (broken / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        (broken / file).write_text((broken / file).read_text().replace(str(SIDE), "96"))
    with pytest.raises(UserError, match=f"^--sam {name}:{broken}: .*{message}.*$"):
        load_sam(f"{name}:{broken}")


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_eval_and_segment(name, folder, tmp_path):
    def run(command, *flags):
        paths = ["--sam", f"{name}:{folder}", "--out", str(tmp_path / command), *map(str, flags)]
        samr1_mini.main([command, *paths])

    run("train", *"--steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 2".split())
    adapter = tmp_path / "train" / "adapter"
    card = (adapter / "README.md").read_text()
    assert f"segmenter in the reward: {name}:{folder} (frozen)" in card
    run("eval", "--limit", 3, "--adapter", adapter, "--save_memory", 3)
    rows = map(json.loads, (tmp_path / "eval" / "answers.jsonl").read_text().splitlines())
    texts = [[row["answer"]] for row in rows]
    scenes = [Shapes("heldout")[i] for i in range(3)]
    scores = score_completions(SamScorer(load_sam(f"{name}:{folder}")), scenes, texts, extent=64)
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert results["train"]["giou"] == pytest.approx(scores.iou.mean().item(), abs=1e-3)
    scenes[0].image.save(tmp_path / "scene.png")
    picture = tmp_path / "found.png"
    run("segment", "--query", "circle", "--image", tmp_path / "scene.png", "--out", picture)
    assert picture.is_file()

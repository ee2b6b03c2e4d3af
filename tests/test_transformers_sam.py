"""Tests of plumbing/transformers_sam.py with a SAM 2 and a SAM 3 of random weights: masks against
transformers' own model and processor, the scorer, the commands, and what `--sam sam2:...` and
`--sam sam3:...` refuse."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from makers import read_rows, run
from PIL import Image
from safetensors.torch import load_file, save_file

import reward
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
    image_size=[SIDE, SIDE],
    blocks_per_stage=[1, 1, 2, 1],
    embed_dim_per_stage=[8, 16, 32, 64],
    num_attention_heads_per_stage=[1, 1, 2, 2],
    window_size_per_stage=[4, 4, 4, 2],
    global_attention_blocks=[3],
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
)
SIZES_OF_LEVELS = [[SIDE // n, SIDE // n] for n in (4, 8, 16)]
LEVELS = dict(backbone_feature_sizes=SIZES_OF_LEVELS, fpn_hidden_size=16)
VISION = dict(backbone_config=BACKBONE, backbone_channel_list=[64, 32, 16, 8], **LEVELS)
VISION3 = dict(model_type="sam3_vision_model", backbone_config=BACKBONE3, **LEVELS)
PARTS = dict(
    prompt_encoder_config=dict(hidden_size=16, image_size=SIDE, patch_size=16),
    mask_decoder_config=dict(hidden_size=16, num_attention_heads=2, mlp_dim=16),
)

SQUARE = dict(size=dict(height=SIDE, width=SIDE), mask_size=dict(height=32, width=32))
PROCESSORS = {
    "sam2": transformers.Sam2Processor(transformers.Sam2ImageProcessor(**SQUARE)),
    "sam3": transformers.Sam3TrackerProcessor(transformers.Sam3ImageProcessor(**SQUARE)),
}


def randomise(model, seed=0):
    """Give a model larger weights than it is built with, so that its masks depend on prompts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                embedding = "embed" in name or "token" in name
                std = 1.0 if embedding else weight[0].numel() ** -0.5
                weight.normal_(std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=["sam2", "sam3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def own_model(name):
    """With these seeds the model rates not always the same of its three masks best."""
    torch.manual_seed(0)  # of the positional embedding, which is a buffer
    if name == "sam2":
        config = transformers.Sam2Config(vision_config=VISION, **PARTS)
        return randomise(transformers.Sam2Model(config), seed=0)
    vision = VISION3 | dict(scale_factors=[4.0, 2.0, 1.0])
    config = transformers.Sam3TrackerConfig(vision_config=vision, **PARTS)
    return randomise(transformers.Sam3TrackerModel(config), seed=5)


@pytest.fixture(scope="module")
def folder(name, own_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    own_model.save_pretrained(folder)
    PROCESSORS[name].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam(name, folder):
    return load_sam(f"{name}:{folder}")


@pytest.fixture(scope="module")
def photos():
    """Images of coloured blocks. Their true masks do not matter."""
    rng = np.random.default_rng(0)
    samples = []
    for size in SIZES:
        blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size)
        samples.append(Sample(blocks, "", np.zeros(size[::-1], bool), ignore=None, id=""))
    return samples


@pytest.fixture(scope="module")
def mixed(photos):
    """Prompts of each sort: box and two points, box and one, box only, points only."""
    rng = np.random.default_rng(0)
    prompts = []
    for sample in photos:
        size = np.array(sample.image.size)
        group = []
        for has_box, count in ((1, 2), (1, 2), (1, 1), (1, 0), (0, 2), (0, 1)):
            first = rng.uniform(0, 0.5, 2) * size
            last = first + rng.uniform(0.2, 0.5, 2) * size
            points = rng.uniform(0, 1, (count, 2)) * size
            box = (*first.tolist(), *last.tolist()) if has_box else None
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


def test_masks_equal_those_of_the_models_own_processor(
    name, own_model, sam, photos, mixed, monkeypatch
):
    """With at most three images in a call of the encoder, and three prompts in one of the decoder.

    The largest level of an image's embeddings has 2 x 32 x 32 numbers of 4 bytes.
    """
    encode = Mock(wraps=sam.encode)
    decode = Mock(wraps=sam.decode)
    monkeypatch.setattr(sam, "encode", encode)
    monkeypatch.setattr(sam, "decode", decode)
    monkeypatch.setitem(reward.DECODER_BYTES, "cpu", 3 * 2 * 32 * 32 * 4)
    overlap = SamScorer(sam, encoder_batch=3).score(photos, mixed, keep_masks=True)
    assert [len(call.args[0]) for call in encode.mock_calls] == [3, 2]
    # Five sorts of prompts: ten with a box and two points, then five of each.
    assert [len(call.args[1]) for call in decode.mock_calls] == [3, 3, 3, 1] + [3, 2] * 4
    chosen = set()
    for b, sample in enumerate(photos):
        for g, prompt in enumerate(mixed[b]):
            logits, ratings = predict(own_model, PROCESSORS[name], sample.image, prompt)
            best = ratings.argmax()
            mask = overlap.masks[b][g]
            assert mask.shape == sample.mask.shape
            clear = logits[best].abs() > 1e-5  # closer to 0, rounding decides
            assert clear.float().mean() > 0.9
            assert torch.equal(mask[clear], logits[best][clear] > 0), (b, prompt)
            chosen.add(int(best))
        different = {mask.numpy().tobytes() for mask in overlap.masks[b]}
        assert len(different) == len(mixed[b]), "each prompt counts"
    assert len(chosen) > 1, chosen


def test_only_the_encoder_runs_in_16_bits(sam, photos, mixed, monkeypatch):
    """The same autocast as on CUDA."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, **_: autocast(device, dtype))
    dtypes = []

    def note(module, inputs, output):
        dtypes.append(output.dtype)

    linears = [m for m in sam.model.vision_encoder.modules() if isinstance(m, torch.nn.Linear)]
    mlp = sam.model.mask_decoder.output_hypernetworks_mlps[0]
    with linears[0].register_forward_hook(note), mlp.register_forward_hook(note):
        SamScorer(sam).score(photos[:1], mixed[:1])
    assert dtypes[0] == torch.bfloat16 and set(dtypes[1:]) == {torch.float32}


def save_as_on_the_hub(model, name, folder):
    """With the older preprocessor_config.json in place of processor_config.json."""
    model.save_pretrained(folder)
    PROCESSORS[name].image_processor.save_pretrained(folder)


def test_a_model_for_videos_in_16_bits_is_loaded_in_float32_without_a_warning(tmp_path, capfd):
    """The hub's folders hold models for videos."""
    config = transformers.Sam2VideoConfig(vision_config=VISION, **PARTS)
    video = randomise(transformers.Sam2VideoModel(config)).bfloat16()
    save_as_on_the_hub(video, "sam2", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2_video"
    capfd.readouterr()
    sam = load_sam(f"sam2:{tmp_path}")
    assert "sam2_video" not in "".join(capfd.readouterr())
    weights = video.float().state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in sam.model.state_dict().items())


@torch.no_grad()
def test_the_tracker_of_a_whole_sam_3_is_loaded(tmp_path, photos):
    """The hub's folder holds detector and tracker. They share the encoder."""
    small = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_attention_heads=2)
    text = dict(model_type="clip_text_model", vocab_size=20, bos_token_id=0, eos_token_id=1)
    parts = ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
    detector = {f"{part}_config": small for part in parts}
    detector |= dict(model_type="sam3", vision_config=VISION3)
    detector["text_config"] = small | text | dict(num_hidden_layers=1)
    tracker = dict(model_type="sam3_tracker_video", vision_config=VISION3, image_size=SIDE, **PARTS)
    config = transformers.Sam3VideoConfig(detector_config=detector, tracker_config=tracker)
    whole = randomise(transformers.Sam3VideoModel(config))
    save_as_on_the_hub(whole, "sam3", tmp_path)
    # This version of transformers writes "tracker_model." twice. The hub's file has it once.
    held = {key: weight.clone() for key, weight in whole.state_dict().items()}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    sam = load_sam(f"sam3:{tmp_path}")
    pixels = torch.stack([sam.prepare(sample.image)[0] for sample in photos])
    maps, _ = whole.get_vision_features_for_tracker(whole.detector_model.vision_encoder(pixels))
    maps[-1] = maps[-1] + whole.tracker_model.no_memory_embedding  # of images, as in SAM 2
    for level, expected in zip(sam.encode(list(pixels)), maps, strict=True):
        torch.testing.assert_close(level.flatten(2), expected.permute(1, 2, 0))
    for part in ("prompt_encoder", "mask_decoder"):
        found = getattr(sam.model, part).state_dict()
        expected = getattr(whole.tracker_model, part).state_dict()
        assert all(torch.equal(x, expected[key]) for key, x in found.items())


def not_finite(file: Path) -> None:
    weights = load_file(file)
    weights[min(weights)] /= 0
    save_file(weights, file, {"format": "pt"})


def of_the_policy(file: Path) -> None:
    shutil.copy(Path(vlm_path("tiny"), file.name), file)


def of_another_side(file: Path) -> None:
    file.write_text(file.read_text().replace(str(SIDE), "96"))


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", Path.unlink, "use a hub name such as facebook/sam"),
        ("config.json", of_the_policy, "it holds a qwen2_5_vl, not a sam"),
        ("model.safetensors", of_the_policy, "it lacks"),
        ("model.safetensors", not_finite, "1 weights are not finite"),
        ("processor_config.json", of_another_side, "preprocessor_config.json says 96 x 96"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    name, folder, tmp_path, file, change, message
):
    broken = shutil.copytree(folder, tmp_path / "broken")
    change(broken / file)
    with pytest.raises(UserError, match=f"^--sam {name}:{broken}: .*{message}.*$"):
        load_sam(f"{name}:{broken}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam2"], indirect=True)
def test_train_and_eval(name, folder, tmp_path):
    spec = f"{name}:{folder}"
    quick = "--steps 1 --prompts_per_step 2 --group_size 2"
    run(f"train {quick} --sam", spec, "--out", tmp_path / "train")
    adapter = tmp_path / "train" / "adapter"
    assert f"segmenter in the reward: {spec} (frozen)" in (adapter / "README.md").read_text()
    flags = ["--adapter", adapter, "--sam", spec, "--out", tmp_path / "eval"]
    run("eval --limit 3 --save_memory 3", *flags)
    texts = [[row["answer"]] for row in read_rows(tmp_path / "eval" / "answers.jsonl")]
    scenes = [Shapes("heldout")[i] for i in range(3)]
    scores = score_completions(SamScorer(load_sam(spec)), scenes, texts, extent=64)
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert results["train"]["giou"] == pytest.approx(scores.iou.mean().item(), abs=1e-3)

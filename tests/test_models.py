"""Tests with a Qwen3-VL of random weights, and of the coordinates that each model uses."""

import dataclasses
import json

import pytest
import torch
from torchvision.ops import box_iou
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import samr1_mini
from data import Shapes, messages
from grpo import Completions, group_logprobs, rollout
from plumbing.scenes import interior_points
from plumbing.vlm import load_vlm, vlm_path
from reward import parse_answer, sam_prompt


@pytest.fixture(scope="module")
def qwen3vl(tmp_path_factory):
    """A folder with a Qwen3-VL of 0.1 million random weights and the tiny model's tokenizer."""
    tiny = AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = tiny.tokenizer
    special = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokens),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=16,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
            eos_token_id=tokens.eos_token_id,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=48,
            intermediate_size=64,
            num_heads=3,
            patch_size=16,
            spatial_merge_size=2,
            out_hidden_size=48,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **{name: tokens.convert_tokens_to_ids(token) for name, token in special.items()},
    )
    torch.manual_seed(0)
    patches = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    patches["size"] = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokens,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=tiny.chat_template,
    )
    folder = tmp_path_factory.mktemp("qwen3vl")
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def separate_forward(policy, sample, completion):
    """Log-probs (T,) of one completion (T,) of a Qwen3-VL, from an ordinary forward pass."""
    chat = [messages(sample.query, "brief", "thousandths", 96)]
    text = policy.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    image = sample.image.resize((96, 96))
    inputs = policy.processor(text=text, images=[image], return_tensors="pt")
    ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    P = len(ids)
    ids = torch.cat([ids, completion])[None]
    types = torch.cat([types, torch.zeros_like(completion, dtype=types.dtype)])[None]
    with torch.no_grad():
        logits = policy.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0, P - 1 : -1]
    logits[:, policy.banned] = -torch.inf
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def test_qwen3vl_logprobs_equal_a_separate_forward(qwen3vl):
    """Its vision tower feeds several layers (deepstack). Slicing prompts must slice all of them."""
    policy = load_vlm(str(qwen3vl), "cpu", 96, "brief")
    assert policy.coordinates == "thousandths" and policy.extent == 1000
    batch = [Shapes("heldout")[i] for i in range(3)]
    prompts = policy.read(batch)
    generator = torch.Generator().manual_seed(0)
    limits = (7, policy.end, policy.banned)
    completions = rollout(policy.model, prompts, 3, *limits, generator=generator)
    completions.mask[0, 0, 4:] = False  # unequal lengths
    whole, _ = group_logprobs(policy.model, prompts, completions, policy.banned)
    part = slice(1, 3)
    sliced, _ = group_logprobs(policy.model, prompts[part], completions[part], policy.banned)
    assert torch.allclose(whole[part], sliced, atol=1e-5)
    for b, one in enumerate(batch):
        for g in range(3):
            completion = completions.ids[b, g][completions.mask[b, g]]
            expected = separate_forward(policy, one, completion)
            assert torch.allclose(whole[b, g, : len(completion)], expected, atol=1e-4)


@pytest.mark.slow
def test_qwen3vl_trains_from_the_command_line(qwen3vl, tmp_path):
    flags = "--side 96 --steps 1 --eval_samples 2 --prompts_per_step 2 --group_size 2"
    flags += " --max_new_tokens 6 --save_memory 2"
    run = tmp_path / "run"
    command = ["train", "--vlm", str(qwen3vl), *flags.split(), "--out", str(run)]
    samr1_mini.main(command)
    assert json.loads((run / "config.json").read_text())["side"] == 96


def test_a_small_model_takes_one_thread_under_any_name():
    """On two busy cores, two threads make a step of such a model many times slower."""
    torch.set_num_threads(2)
    try:
        load_vlm(vlm_path("tiny"), "cpu", 64, "brief")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("coordinates", ["pixels", "thousandths"])
def test_true_boxes_in_the_coordinates_of_the_policy_are_found(coordinates, scorer, monkeypatch):
    """A stand-in policy writes the true box of scenes that are not square.

    SAM finds the object only if the box is scaled exactly once, each axis by its own factor.
    """
    policy = load_vlm("tiny", "cpu", 64, "brief")
    assert policy.coordinates == "pixels" and policy.extent == 64
    policy = dataclasses.replace(policy, coordinates=coordinates)
    scenes = [Shapes("heldout")[i] for i in range(60)]
    batch = [one for one in scenes if one.image.width != one.image.height][:12]
    far = {"pixels": 64, "thousandths": 1000}[coordinates]  # the number of the image's far edge

    def true_answers(_):
        texts = []
        for one in batch:
            scale = far / one.image.width, far / one.image.height
            box = samr1_mini.true_box(one.mask)
            x1, y1, x2, y2 = (round(v * scale[k % 2]) for k, v in enumerate(box))
            points = [[x * scale[0], y * scale[1]] for x, y in interior_points(one.mask)]
            body = {"bbox": [x1, y1, x2, y2], "points_1": points[0], "points_2": points[1]}
            body = json.dumps(body)
            texts.append([f"<think>t</think><answer>{body}</answer>"])
        return texts

    monkeypatch.setattr(policy, "texts", true_answers)
    nothing = Completions(None, None)
    monkeypatch.setattr(samr1_mini, "sample_completions", lambda *_, **__: nothing)
    rows = samr1_mini.evaluate_batch(policy, scorer, batch, None)
    metrics = samr1_mini.compute_metrics(rows)
    ceiling = samr1_mini.compute_metrics(rows, "ceiling_")["giou"]  # the same, not rounded
    assert abs(metrics["giou"] - ceiling) < 0.02 and ceiling > 0.8
    assert metrics["box"] == 1 and metrics["format"] == 1
    assert metrics["points"] == 1
    # The same answer in a wrong frame gives a wrong box.
    wrong = sam_prompt(parse_answer(rows[0]["answer"]), policy.extent * 2, *batch[0].image.size)
    boxes = torch.tensor([[wrong.box], [samr1_mini.true_box(batch[0].mask)]])
    assert box_iou(*boxes) < 0.5

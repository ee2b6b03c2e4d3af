"""Tests with a Qwen3-VL of random weights, and of the coordinates that each model uses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import samr1_mini
from data import Shapes, messages
from grpo import Completions, group_logprobs
from plumbing.boxes import true_box
from plumbing.scenes import interior_points
from plumbing.vlm import Policy, load_vlm, vlm_path
from reward import parse_answer


def separate_forward(policy, sample, completion):
    """Log-probs (T,) of one completion (T,) of a Qwen3-VL, from an ordinary forward pass."""
    chat = [messages(sample.query, "brief", "thousandths", 96)]
    text = policy.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    image = sample.image.resize((96, 96))
    inputs = policy.processor(text=text, images=[image], return_tensors="pt")
    row = torch.cat([inputs["input_ids"], completion[None]], 1)
    longer = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "mm_token_type_ids": F.pad(inputs["mm_token_type_ids"], (0, len(completion))),
    }
    with torch.no_grad():
        logits = policy.model(**inputs | longer).logits[0, -len(completion) - 1 : -1]
    logits[:, policy.banned] = -torch.inf
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def test_qwen3vl_logprobs_equal_a_separate_forward(thinking_qwen3vl):
    """Its vision tower feeds several layers (deepstack). Slicing prompts must slice all of them."""
    policy = load_vlm(str(thinking_qwen3vl), device="cpu", side=96, prompt="brief")
    assert policy.units == "thousandths" and policy.extent == 1000
    batch = [Shapes("heldout")[i] for i in range(3)]
    prompts = policy.read(batch)
    ids = torch.randint(10, 40, (3, 3, 7), generator=torch.Generator().manual_seed(0))
    assert not torch.isin(ids, policy.banned).any()
    completions = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
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


def test_think_opened_by_the_chat_template_is_judged_with_the_completion(thinking_qwen3vl):
    said = "the red</think><answer>{}</answer>"
    for name, side, opening in ((str(thinking_qwen3vl), 96, "<think>"), ("tiny", 64, "")):
        policy = load_vlm(name, "cpu", side, "brief")
        ids = torch.tensor(policy.processor.tokenizer(said)["input_ids"])[None, None]
        texts = policy.texts(Completions(ids, torch.ones_like(ids, dtype=torch.bool)))
        assert policy.opening == opening and texts == [[opening + said]]
        assert parse_answer(texts[0][0]).think_format == bool(opening)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "4bit"])
def test_qwen3vl_trains_from_the_command_line(dtype, thinking_qwen3vl, tmp_path):
    if dtype == "4bit":
        pytest.importorskip("bitsandbytes")
    flags = "--side 96 --steps 1 --prompts_per_step 2 --group_size 2"
    flags += f" --max_new_tokens 6 --save_memory 2 --dtype {dtype} --out {tmp_path}/run"
    samr1_mini.main(["train", "--vlm", str(thinking_qwen3vl), *flags.split()])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_small_model_takes_one_thread_under_any_name(monkeypatch):
    """On two busy cores, two threads make a step of such a model many times slower."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    load_vlm(vlm_path("tiny"), device="cpu", side=64, prompt="brief")
    assert threads == [1]


@pytest.mark.parametrize("units, extent", [("pixels", 64), ("thousandths", 1000)])
def test_true_boxes_in_the_coordinates_of_the_policy_are_found(
    units, extent, scorer, samples, monkeypatch
):
    """A stand-in policy writes the true box of scenes, of which some are not square.

    SAM finds the object only if the box is scaled exactly once, each axis by its own factor.
    """
    policy = load_vlm("tiny", device="cpu", side=64, prompt="brief")
    policy = dataclasses.replace(policy, units=units)
    assert policy.extent == extent
    texts = []
    for one in samples:
        scale = extent / np.array(one.image.size)
        box = np.round(true_box(one.mask) * np.tile(scale, 2))
        points = np.array(interior_points(one.mask)) * scale
        body = {"bbox": list(box), "points_1": list(points[0]), "points_2": list(points[1])}
        texts.append([f"<think>t</think><answer>{json.dumps(body)}</answer>"])
    monkeypatch.setattr(Policy, "texts", lambda *_: texts)
    s = samr1_mini.parse_settings("eval", ["--max_new_tokens", "1"])
    rows = samr1_mini.evaluate_batch(policy, scorer, samples, s)
    metrics = samr1_mini.compute_metrics(rows)
    ceiling = samr1_mini.compute_metrics(rows, "ceiling_")["giou"]  # the same, not rounded
    assert abs(metrics["giou"] - ceiling) < 0.02 and ceiling > 0.8
    assert metrics["box"] == metrics["format"] == metrics["points"] == 1

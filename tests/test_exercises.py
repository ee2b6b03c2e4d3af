"""Tests of the exercises that need several scripts: the paper's idea, and a step of training."""

import json

import pytest

import samr1_mini
from assignment.two_answers import two_answers
from data import Shapes
from reward import score_completions


@pytest.mark.exercise_6
def test_a_box_reward_cannot_tell_the_two_answers_apart_and_a_mask_reward_can(scorer):
    texts = list(two_answers())
    scenes = [Shapes("heldout")[0]]
    box, mask = (
        score_completions(scorer, scenes, [texts], extent=64, accuracy=name).reward[0].tolist()
        for name in ("box", "tiered")
    )
    assert box == [6, 6], "both must earn the highest box reward, 4, and both formats"
    assert mask[0] - mask[1] >= 2, f"the mask reward pays {mask[0]:g} and {mask[1]:g}"


# What `train` writes in two steps with the flags below and seed 0, on a CPU.
EXPECTED = {
    "reward": [2.53703, 1.93515],
    "iou": [0.212381, 0.140038],
    "length": [28.375, 27.5],
    "skipped": [0, 0],
    "kl": [0.000377842, 0.000955308],
    "entropy": [0.87554, 0.885555],
    "ratio": [0.999245, 0.999859],
    "clip_low": [0.00220264, 0],
    "grad_norm": [0.189912, 0.201822],
}


@pytest.mark.exercise_13
def test_the_metrics_of_two_steps_equal_those_of_the_reference(tmp_path, monkeypatch):
    def advantages(rewards):  # so that a student's own standard deviation changes nothing
        return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)

    monkeypatch.setattr(samr1_mini, "group_advantages", advantages)
    flags = "--steps 2 --eval_samples 1 --prompts_per_step 4 --group_size 4"
    flags += " --accuracy iou --lr 3e-3"
    samr1_mini.main(["train", *flags.split(), "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {name: [row[name] for row in rows] for name in EXPECTED}
    for name, values in EXPECTED.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-6), name

"""Tests of the exercises that need several scripts: the paper's idea, and a step of training."""

import json

import pytest

import samr1_mini
from assignment.step import EXPECTED, two_steps
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


@pytest.mark.exercise_13
def test_the_metrics_of_two_steps_equal_those_of_the_reference(tmp_path, monkeypatch):
    def advantages(rewards):  # so that a student's own standard deviation changes nothing
        return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)

    monkeypatch.setattr(samr1_mini, "group_advantages", advantages)
    found = two_steps(tmp_path / "run")
    for name, values in json.loads(EXPECTED.read_text()).items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-6), name

"""The example with TRL: its reward is the repository's, and two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationMixin

import samr1_mini
from data import BadSample, Shapes
from examples import trl_grpo
from grpo import group_advantages
from reward import score_completions
from tests.makers import IMAGES, make_refcocog

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64
POLICY = SimpleNamespace(side=SIDE, frame=SIDE, prompt="brief", coordinates="pixels", opening="")
ANSWER = '<answer>{{"bbox":[{},{},{},{}],"points_1":[{},{}],"points_2":[{},{}]}}</answer>'


def answer(sample, think=True):
    """A completion with the true box and its centre twice, in policy pixels."""
    rows, columns = sample.mask.nonzero()
    x, y = SIDE / sample.image.width, SIDE / sample.image.height
    x1, x2 = columns.min() * x, (columns.max() + 1) * x
    y1, y2 = rows.min() * y, (rows.max() + 1) * y
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    return "<think>this one</think>" * think + ANSWER.format(x1, y1, x2, y2, *centre, *centre)


class Broken:
    """Four scenes. The second and the third cannot be used."""

    def __init__(self, samples):
        self.samples = samples[:4]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index in (1, 2):
            raise BadSample(f"photograph {index} is missing")
        return self.samples[index]


def test_trl_reward_equals_the_reward_in_any_order(scorer, samples, monkeypatch):
    first, second, third = samples[:3]
    index = [2, 0, 1, 0, 2, 2]  # groups of different sizes, mixed
    texts = [answer(third), answer(first), "no idea", answer(first, think=False)]
    texts += [answer(second), "<think>"]
    pairs = [(samples[k], text) for k, text in zip(index, texts, strict=True)]
    alone = [score_completions(scorer, [sample], [[text]], SIDE) for sample, text in pairs]
    expected = [score.reward.item() for score in alone]
    assert len(set(expected)) > 2
    encoded, encode = [], scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda images: encoded.extend(images) or encode(images))
    reward = trl_grpo.trl_reward(scorer, trl_grpo.Samples(samples, POLICY, 6), "tiered")
    means, columns = {}, {}
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    logs = {"log_metric": means.__setitem__, "log_extra": columns.__setitem__}
    assert reward(conversations, index, prompts=index, **logs) == expected
    assert len(encoded) == 3
    assert columns["index"] == index
    ious = torch.tensor([score.iou.item() for score in alone])
    torch.testing.assert_close(torch.tensor(columns["iou"]), ious, atol=1e-3, rtol=0)
    for name in ("iou", "accuracy", "think_format", "answer_format"):
        mean = sum(getattr(score, name).item() for score in alone) / len(alone)
        assert means[name] == pytest.approx(mean, abs=1e-3), name
    assert reward(texts, index) == expected


def test_a_thinking_models_opening_counts(scorer, samples):
    """Its template writes <think> at the end of the prompt, so the completion does not hold it."""
    policy = SimpleNamespace(**(vars(POLICY) | {"opening": "<think>"}))
    text = answer(samples[0])
    reward = trl_grpo.trl_reward(scorer, trl_grpo.Samples(samples, policy, 2), "tiered")
    (with_opening,) = reward([text.removeprefix("<think>")], [0])
    assert with_opening == score_completions(scorer, [samples[0]], [[text]], SIDE).reward.item()


def test_the_reward_reads_the_form_that_the_prompt_asks_for(scorer, samples):
    policy = SimpleNamespace(**(vars(POLICY) | {"prompt": "visionreasoner"}))
    text = '<think>it</think><answer>[{"bbox_2d": [8, 8, 40, 40], "point_2d": [20, 20]}]</answer>'
    rewards = {}
    for one in (POLICY, policy):
        reward = trl_grpo.trl_reward(scorer, trl_grpo.Samples(samples, one, 2), "tiered")
        (rewards[one.prompt],) = reward([text], [0])
    assert rewards["visionreasoner"] >= rewards["brief"] + 1  # at least the answer format
    text = text.replace("[{", "{").replace("}]", "}")  # no list: nobody's form
    assert trl_grpo.trl_reward(scorer, trl_grpo.Samples(samples, policy, 2), "tiered")(
        [text], [0]
    ) == [1.0]


def test_a_bad_sample_is_replaced_and_counted(scorer, samples, capsys):
    source = trl_grpo.Samples(Broken(samples), POLICY, 4)
    rows = source.rows([{"index": 1}, {"index": 0}, {"index": 1}])
    assert [row["index"] for row in rows] == [1, 0, 1]
    assert [row["image"].size for row in rows] == [(SIDE, SIDE)] * 3
    texts = [row["prompt"][-1]["content"][-1]["text"] for row in rows]
    assert texts == [f"find {samples[k].query}" for k in (3, 0, 3)]
    said = capsys.readouterr().err
    assert said.count("photograph 1 is missing") == said.count("photograph 2 is missing") == 1
    means = {}
    reward = trl_grpo.trl_reward(scorer, source, "tiered")
    assert reward([answer(samples[3])], [1], log_metric=means.__setitem__)[0] >= 2
    assert means["skipped"] == 2
    reward([answer(samples[3])], [1], log_metric=means.__setitem__)
    assert means["skipped"] == 0


def test_flags_are_those_of_train(capsys):
    s = trl_grpo.parse_settings("--preset qwen3b --lr 0.5".split())
    train = samr1_mini.parse_settings("train", "--preset qwen3b --lr 0.5".split())
    assert vars(s).items() <= vars(train).items()
    left_out = {"device", "load_in_4bit", "rollout_prompts", "eval_samples"}
    assert set(vars(train)) - set(vars(s)) == left_out
    for flag in left_out:
        with pytest.raises(SystemExit) as refused:
            trl_grpo.parse_settings([f"--{flag}", "1"])
        said = capsys.readouterr().err
        assert refused.value.code == 2 and said.count("\n") == 1 and f"--{flag}" in said


@pytest.mark.parametrize("save_memory", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_completions_of_a_step(processes, save_memory, tmp_path):
    flags = "--prompts_per_step 8 --group_size 6 --minibatches 2 --epochs 3 --steps 5"
    s = trl_grpo.parse_settings([*flags.split(), "--save_memory", str(save_memory)])
    weights = SimpleNamespace(dtype=torch.float32)
    policy = SimpleNamespace(model=weights, device=torch.device("cpu"), banned=torch.tensor([7]))
    made = trl_grpo.trl_arguments(s, tmp_path, policy, processes)
    at_once = made["per_device_train_batch_size"] * processes
    assert at_once * made["steps_per_generation"] == 8 * 6
    assert at_once * made["gradient_accumulation_steps"] * 2 == 8 * 6
    assert made["max_steps"] == 5 * 2 * 3 and made["num_iterations"] == 3
    if save_memory:
        assert made["per_device_train_batch_size"] <= 6
    with pytest.raises(ValueError, match="5 processes x 2 mini-batches"):
        trl_grpo.trl_arguments(s, tmp_path, policy, 5)


def test_missing_trl_gets_a_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as refused:
        trl_grpo.main(["--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.count("\n") == 1 and "pip install trl" in said


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def replay(monkeypatch, steps: list[list[str]]) -> None:
    """Let `generate` return these texts, those of a step in each call."""
    tokenizer, steps = AutoTokenizer.from_pretrained(ROOT / "tiny" / "vlm"), iter(steps)

    def generate(self, input_ids, **_):
        texts = [text + tokenizer.eos_token for text in next(steps)]
        rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, rows["input_ids"]], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)


@pytest.mark.slow
def test_two_processes_do_what_one_does(scorer, tmp_path, monkeypatch):
    """Three groups of four, so that the second group is split between the two processes.

    One process, which gets the completions of the two, must get the same samples, rewards and
    statistics, and train the same adapter.
    """
    pytest.importorskip("trl")
    import pandas

    flags = "--steps 2 --prompts_per_step 3 --group_size 4 --minibatches 1 --epochs 1 --lr 0.01"
    both, one = tmp_path / "both", tmp_path / "one"
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    command = f"{sys.executable} -m {launch} -m examples.trl_grpo {flags} --out {both}"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command.split(), **options)
    assert not done.returncode, done.stderr[-3000:]

    tables = sorted((both / "checkpoint" / "completions").iterdir())
    tables = [pandas.read_parquet(file) for file in tables]
    steps = [[talk[-1]["content"] for talk in table["completion"]] for table in tables]
    scenes = Shapes("train", 0)
    for table, texts, row in zip(tables, steps, metrics(both), strict=True):
        index = table["index"].tolist()
        assert index == [k for k in index[::4] for _ in range(4)] and len(set(index)) == 3
        batch = [scenes[k] for k in index[::4]]
        groups = [texts[k : k + 4] for k in (0, 4, 8)]
        scores = score_completions(scorer, batch, groups, SIDE)
        assert table["sam_reward"].tolist() == scores.reward.flatten().tolist()
        advantages = torch.tensor(table["advantage"]).view(3, 4)
        torch.testing.assert_close(advantages.float(), group_advantages(scores.reward))
        assert row["reward"] == pytest.approx(scores.reward.mean().item())
    assert any(table["sam_reward"].nunique() > 1 for table in tables)

    replay(monkeypatch, steps)
    trl_grpo.main([*flags.split(), "--out", str(one)])
    again = sorted((one / "checkpoint" / "completions").iterdir())
    for table, same in zip(tables, map(pandas.read_parquet, again), strict=True):
        for name in ("index", "sam_reward"):
            assert same[name].tolist() == table[name].tolist()
    for ours, theirs in zip(metrics(one), metrics(both), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    trained = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, both)]
    moved = 0.0
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], atol=1e-4, rtol=0)
        moved = max(moved, weight.abs().max().item() if "lora_B" in name else 0.0)
    assert moved > 5e-4  # zero before training

    samr1_mini.main(f"eval --adapter {both}/adapter --limit 2 --out {tmp_path}/eval".split())
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["both"]["n"] == 2


@pytest.mark.slow
def test_a_resumed_run_continues(tmp_path):
    """On photographs, one of which is missing. On a CPU the two parts give exactly the whole."""
    pytest.importorskip("trl")
    made = make_refcocog(tmp_path / "data")
    sorted((made.root / IMAGES).glob("*.jpg"))[0].unlink()  # of two objects
    flags = f"--data refcocog:{made.root} --prompts_per_step 2 --group_size 4 --minibatches 1"
    flags += " --save_memory 2 --lr 0.01 --lr_decay constant --save_every 1"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trl_grpo.main(f"{flags} --steps 2 --out {whole}".split())
    trl_grpo.main(f"{flags} --steps 1 --out {parts}".split())
    trl_grpo.main(f"--steps 2 --resume --out {parts}".split())
    assert metrics(parts) == metrics(whole)
    assert [row["step"] for row in metrics(parts)] == [1, 2]
    assert sum(row["skipped"] for row in metrics(parts)) and metrics(parts)[1]["grad_norm"]
    trained = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())

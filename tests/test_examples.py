"""The example with TRL: its reward is the repository's, and two processes do what one does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from makers import IMAGES, make_refcocog, read_rows, refused
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationMixin

import samr1_mini
from data import BadSample, Shapes
from examples import trl_grpo
from grpo import group_advantages
from reward import score_completions

LOG = "metrics.jsonl"
ROOT = Path(__file__).resolve().parent.parent
SIDE = 64
POLICY = SimpleNamespace(side=SIDE, extent=SIDE, style="brief", units="pixels", opening="")
ANSWER = '<answer>{{"bbox":[{},{},{},{}],"points_1":[{},{}],"points_2":[{},{}]}}</answer>'
SMALL = "--prompts_per_step 2 --group_size 4 --minibatches 1 --save_memory 2 --lr 0.01"


def answer(sample, think=True) -> str:
    """A completion with the true box and its centre twice, in policy pixels."""
    rows, columns = sample.mask.nonzero()
    x, y = SIDE / sample.image.width, SIDE / sample.image.height
    x1, x2 = columns.min() * x, (columns.max() + 1) * x
    y1, y2 = rows.min() * y, (rows.max() + 1) * y
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    return "<think>this one</think>" * think + ANSWER.format(x1, y1, x2, y2, *centre, *centre)


def paid(scorer, source, texts: list[str], index: list[int]) -> tuple[list[float], dict]:
    """The rewards that TRL gets for completions of these samples, and the logged means."""
    means = {}
    reward = trl_grpo.trl_reward(scorer, source, "tiered")
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return reward(completions, index, log_metric=means.__setitem__), means


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_trl_reward_equals_the_reward_in_any_order(scorer, samples, monkeypatch):
    first, second, third = samples[:3]
    index = [2, 0, 1, 0, 2, 2]  # groups of different sizes, mixed
    texts = [answer(third), answer(first), "no idea", answer(first, think=False)]
    texts += [answer(second), "<think>"]
    pairs = zip(index, texts, strict=True)
    alone = [score_completions(scorer, [samples[k]], [[text]], SIDE) for k, text in pairs]
    expected = [score.reward.item() for score in alone]
    assert len(set(expected)) > 2
    encoded, encode = [], scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda images: encoded.extend(images) or encode(images))
    rewards, means = paid(scorer, trl_grpo.Samples(samples, POLICY, 6), texts, index)
    assert rewards == expected
    assert len(encoded) == 3  # each image once
    for name in ("iou", "accuracy", "think_format", "answer_format"):
        mean = sum(getattr(score, name).item() for score in alone) / len(alone)
        assert means[name] == pytest.approx(mean, abs=1e-3), name


def test_the_reward_reads_the_prompts_form_and_a_thinking_models_opening(scorer, samples):
    """A thinking model's template writes <think> at the end of the prompt."""
    policy = SimpleNamespace(**vars(POLICY) | {"style": "visionreasoner", "opening": "<think>"})
    text = 'it</think><answer>[{"bbox_2d": [8, 8, 40, 40], "point_2d": [20, 20]}]</answer>'
    sources = (trl_grpo.Samples(samples, one, 2) for one in (POLICY, policy))
    rewards = [paid(scorer, source, [text], [0])[0][0] for source in sources]
    assert rewards[0] == 0 and rewards[1] >= 2  # two formats


def test_a_bad_sample_is_replaced_and_counted(scorer, samples, capsys):
    class Broken(list):
        def __getitem__(self, index):
            if index in (1, 2):
                raise BadSample(f"photograph {index} is missing")
            return super().__getitem__(index)

    source = trl_grpo.Samples(Broken(samples[:4]), POLICY, 4)
    rows = source.rows([{"index": 1}, {"index": 0}, {"index": 1}])
    assert [row["index"] for row in rows] == [1, 0, 1]
    texts = [row["prompt"][-1]["content"][-1]["text"] for row in rows]
    assert texts == [f"find {samples[k].query}" for k in (3, 0, 3)]
    assert capsys.readouterr().err.count("photograph 1 is missing") == 1
    rewards, means = paid(scorer, source, [answer(samples[3])], [1])
    assert rewards[0] >= 2 and means["skipped"] == 2
    assert paid(scorer, source, ["", ""], [0, 1])[1]["skipped"] == 0  # each is counted once


def test_flags_are_those_of_train_and_missing_trl_gets_a_hint(monkeypatch):
    flags = "--preset qwen3b --lr 0.5".split()
    assert trl_grpo.parse_settings(flags) == samr1_mini.parse_settings("train", flags)
    for flag, value in {"--device": "cpu", "--track": "wandb", "--dtype": "4bit"}.items():
        assert flag in refused(trl_grpo.parse_settings, [f"{flag}={value}"])
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install trl" in refused(trl_grpo.main, [])


@pytest.mark.parametrize("processes, save_memory", [(1, 0), (4, 2)])
def test_processes_share_the_completions_of_a_step(processes, save_memory):
    flags = "--prompts_per_step 8 --group_size 6 --minibatches 2 --epochs 3 --steps 5"
    s = trl_grpo.parse_settings([*flags.split(), "--save_memory", str(save_memory)])
    weights = SimpleNamespace(dtype=torch.float32)
    policy = SimpleNamespace(model=weights, device=torch.device("cpu"), banned=torch.tensor([7]))
    made = trl_grpo.trl_arguments(s, policy, processes)
    at_once = made["per_device_train_batch_size"] * processes
    assert at_once * made["steps_per_generation"] == 8 * 6
    assert at_once * made["gradient_accumulation_steps"] * 2 == 8 * 6
    assert made["max_steps"] == 5 * 2 * 3 and made["num_iterations"] == 3
    if save_memory:
        assert made["per_device_train_batch_size"] <= 6
    assert "5 processes x 2 mini-batches" in refused(trl_grpo.trl_arguments, s, policy, 5)


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
    for table, texts, row in zip(tables, steps, read_rows(both / LOG), strict=True):
        index = table["index"].tolist()
        assert index == [k for k in index[::4] for _ in range(4)] and len(set(index)) == 3
        batch = [scenes[k] for k in index[::4]]
        groups = [texts[k : k + 4] for k in (0, 4, 8)]
        reward = score_completions(scorer, batch, groups, SIDE).reward
        assert table["sam_reward"].tolist() == reward.flatten().tolist()
        advantages = torch.tensor(table["advantage"]).view(3, 4).float()
        torch.testing.assert_close(advantages, group_advantages(reward))
        assert row["reward"] == pytest.approx(reward.mean().item())
    assert any(table["sam_reward"].nunique() > 1 for table in tables)

    tokenizer, batches = AutoTokenizer.from_pretrained(ROOT / "tiny" / "vlm"), iter(steps)

    def replay(self, input_ids, **_):
        """In place of `generate`: the completions of the two processes, those of a step a call."""
        texts = [text + tokenizer.eos_token for text in next(batches)]
        rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, rows["input_ids"]], 1)

    monkeypatch.setattr(GenerationMixin, "generate", replay)
    trl_grpo.main([*flags.split(), "--out", str(one)])
    for ours, theirs in zip(read_rows(one / LOG), read_rows(both / LOG), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    trained = adapter(both)
    torch.testing.assert_close(adapter(one), trained, atol=1e-4, rtol=0)
    moved = [weight.abs().max() for name, weight in trained.items() if "lora_B" in name]
    assert max(moved) > 5e-4  # zero before training


@pytest.mark.slow
def test_an_interrupted_run_continues_and_a_finished_one_does_not(tmp_path, monkeypatch):
    """On photographs, one of which is missing. On a CPU the two parts give exactly the whole."""
    pytest.importorskip("trl")
    made = make_refcocog(tmp_path / "data")
    sorted((made.root / IMAGES).glob("*.jpg"))[0].unlink()  # of two objects
    flags = f"--data refcocog:{made.root} {SMALL} --steps 2"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(samr1_mini, "SAVE_EVERY", 1)
    trl_grpo.main(f"{flags} --out {whole}".split())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trl_grpo.MetricsFile, "on_save", interrupt)  # after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            trl_grpo.main(f"{flags} --out {parts}".split())
    assert len(read_rows(parts / LOG)) == 1
    trl_grpo.main(f"--resume --out {parts}".split())
    assert read_rows(parts / LOG) == read_rows(whole / LOG)
    rows = read_rows(parts / LOG)
    assert [row["step"] for row in rows] == [1, 2]
    assert sum(row["skipped"] for row in rows) and rows[1]["grad_norm"]
    torch.testing.assert_close(adapter(parts), adapter(whole), atol=0, rtol=0)

    # Interrupted after the last checkpoint; and one that was cut short later.
    monkeypatch.setattr(GenerationMixin, "generate", lambda *_, **__: pytest.fail("it trains"))
    shutil.rmtree(parts / "adapter")
    (parts / "checkpoint" / "checkpoint-99").mkdir()
    trl_grpo.main(f"--resume --out {parts}".split())  # nothing is left to train
    message = refused(trl_grpo.main, f"--resume --steps 1 --out {parts}".split())
    assert "--steps 1: " in message and "has done 2" in message
    assert read_rows(parts / LOG) == rows
    assert len({file.stat().st_mode for file in (parts / "adapter").iterdir()}) == 1
    torch.testing.assert_close(adapter(parts), adapter(whole), atol=0, rtol=0)


@pytest.mark.parametrize("name, fp16", [("grad_norm", False), ("kl", False), ("kl", True)])
def test_training_that_diverges_ends_before_it_is_saved(name, fp16, tmp_path):
    callback = trl_grpo.MetricsFile(tmp_path / LOG, updates=1)
    args = SimpleNamespace(fp16=fp16, learning_rate=0.1)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    logs = {"reward": 1.0, "grad_norm": float("inf") if fp16 else 1.0, "kl": 0.0}
    callback.on_log(args, state, None, logs=logs)
    message = refused(callback.on_log, args, state, None, logs=logs | {name: float("nan")})
    assert f"--lr 0.1: the training diverged ({name} is nan)" in message
    assert len(read_rows(tmp_path / LOG)) == 1

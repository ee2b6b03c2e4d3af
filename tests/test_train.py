"""The command `train`: what a run writes, resuming, interruptions, and what a step does."""

import copy
import dataclasses
import doctest
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from segment_anything.modeling import MaskDecoder
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import samr1_mini
from data import Shapes
from plumbing import runs
from plumbing.scenes import interior_points
from plumbing.vlm import load_vlm, vlm_path
from reward import SamPrompt

ROOT = Path(samr1_mini.__file__).parent
SMALL = "--eval_samples 8 --prompts_per_step 4 --group_size 4"
QUICK = f"train --steps 6 {SMALL} --save_every 100"
TINY = "--eval_samples 1 --prompts_per_step 2 --group_size 2 --minibatches 1"
NOT_REPEATABLE = ("seconds_", "tokens_per_second", "peak_mib")


def run(command: str, *more: object) -> None:
    samr1_mini.main([*command.split(), *map(str, more)])


def refused(capsys, command: str, *more: object) -> str:
    """Run a command that must exit with code 2 and one line, and return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(command, *more)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("samr1_mini.py")]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def read_metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPEATABLE)} for row in rows]


def state(out: Path) -> dict:
    return torch.load(out / "checkpoint" / "state.pt", weights_only=True)


def largest_difference(ours: dict, theirs: dict) -> float:
    pairs = zip(ours.values(), theirs.values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """An uninterrupted run. Tests read it; those that change it work on a copy."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(QUICK, "--out", out)
    return out


@pytest.fixture
def copied_run(whole_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def interrupt_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""
    describe, steps = runs.describe, []

    def describe_and_signal(*args):
        steps.append(len(steps) + 1)
        if steps[-1] == step:
            signal.raise_signal(number)
        return describe(*args)

    monkeypatch.setattr(runs, "describe", describe_and_signal)


# --------------------------------------------------------------------------------------------------
# What a run writes
# --------------------------------------------------------------------------------------------------


def test_a_run_writes_its_files(whole_run, scorer):
    files = """config.json metrics.jsonl eval.json curves.png samples/step_00001.png
        samples/step_00006.png rollouts/step_00006.json adapter/adapter_config.json
        adapter/adapter_model.safetensors adapter/README.md checkpoint/state.pt"""
    for name in files.split():
        assert (whole_run / name).stat().st_size > 0, name
    assert not list(whole_run.rglob("*.tmp*"))
    assert {file.name for file in whole_run.iterdir()} <= {runs.MARK, *runs.RUN_FILES}
    results = json.loads((whole_run / "eval.json").read_text())
    assert set(results) == {"before", "after", "ceiling"}
    for name in ("before", "after"):
        assert set(results[name]) >= {"giou", "ciou", "format", "box", "points", "boxonly", "n"}
    # The ceiling is SAM with the true box and good points.
    batch = [Shapes("heldout")[i] for i in range(8)]
    prompts = [
        [SamPrompt(samr1_mini.true_box(one.mask), interior_points(one.mask))] for one in batch
    ]
    ceiling = scorer.score(batch, prompts).iou.mean().item()
    assert results["ceiling"]["giou"] == pytest.approx(ceiling, abs=1e-5) and ceiling > 0.8


def test_the_metrics_of_a_run_are_complete_and_consistent(whole_run):
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    columns = """reward accuracy think_format answer_format iou tier_0 tier_2 tier_3 tier_4
        equal_groups length truncated skipped kl entropy ratio clip_low clip_high grad_norm lr
        seconds_rollout seconds_reward seconds_logprobs seconds_update tokens_per_second peak_mib"""
    for row in rows:
        assert set(columns.split()) <= set(row)
        assert np.isfinite(list(row.values())).all()
        parts = row["accuracy"] + row["think_format"] + row["answer_format"]
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
        tiers = row["tier_0"] + row["tier_2"] + row["tier_3"] + row["tier_4"]
        assert tiers == pytest.approx(1)


def test_the_model_card_is_true(whole_run):
    """It names base model, data and settings, holds the metrics, and no path of the machine."""
    card = (whole_run / "adapter" / "README.md").read_text()
    config = (whole_run / "adapter" / "adapter_config.json").read_text()
    for part in ("tiny/vlm", "shapes", "step 6 of 6", "seed 0", "tiered", "4 completions"):
        assert part in card, part
    for name, row in json.loads((whole_run / "eval.json").read_text()).items():
        assert f"| {name} | {row['giou']:.3f} | {row['ciou']:.3f} | {row['n']} |" in card
    assert json.loads(config)["base_model_name_or_path"] == "tiny/vlm"
    assert "More Information Needed" not in card  # peft's template
    for path in (ROOT, whole_run, Path.home()):
        assert f"{path}/" not in card + config


def test_the_model_card_says_how_to_load_the_adapter(whole_run):
    card = (whole_run / "adapter" / "README.md").read_text()
    lines = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    folders = {"BASE_MODEL": vlm_path("tiny"), "THIS_FOLDER": str(whole_run / "adapter")}
    scope = {}
    exec("\n".join(lines), folders, scope)
    assert any("lora_A" in name for name, _ in scope["model"].named_parameters())


def test_saving_an_adapter_asks_no_server(tmp_path, monkeypatch):
    """peft looks for the config of the base model online if it finds no such folder."""
    from peft.utils import save_and_load

    def fail(*args, **options):
        raise AssertionError(f"asked the hub: {args}")

    monkeypatch.chdir(tmp_path)  # there is no folder tiny/vlm here
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", fail)
    model = samr1_mini.add_lora(load_vlm("tiny", "cpu", 64, "brief").model, 4, seed=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    s = samr1_mini.parse_settings("train", [])
    optimizer, generator = torch.optim.AdamW(weights), torch.Generator()
    runs.save_checkpoint(tmp_path / "run", 1, s, model, optimizer, generator, {})
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------
# Interruption and resuming
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_finishes_and_saves_the_current_step(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run(f"train --steps 4 {TINY} --out", tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGINT
    assert len(read_metrics(tmp_path / "run")) == state(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_ends_bit_for_bit_like_a_whole_one(
    whole_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            run(QUICK, "--out", out)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"--resume --out {out}" in capsys.readouterr().out
    assert len(read_metrics(out)) == 3  # the current step was finished
    assert state(out)["step"] == 3
    # What a kill -9 between two checkpoints leaves: more lines than steps in the checkpoint.
    with open(out / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 4, "reward": 99.0}) + '\n{"step": 5, "half a li')
    run("train --resume", "--out", out)
    assert read_metrics(out) == read_metrics(whole_run)
    ours, theirs = state(out), state(whole_run)
    assert ours["adapter"].keys() == theirs["adapter"].keys()
    assert all(torch.equal(ours["adapter"][k], theirs["adapter"][k]) for k in ours["adapter"])
    moments = [one["optimizer"]["state"].values() for one in (ours, theirs)]
    for mine, other in zip(*moments, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    results = [json.loads((folder / "eval.json").read_text()) for folder in (out, whole_run)]
    assert results[0] == results[1]


def test_resuming_a_finished_run_changes_nothing(whole_run, copied_run):
    before = state(copied_run)["adapter"]
    with open(copied_run / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "half a li')
    run("train --resume", "--out", copied_run)
    assert read_metrics(copied_run) == read_metrics(whole_run)
    assert largest_difference(before, state(copied_run)["adapter"]) == 0


def test_a_run_that_was_killed_while_saving_can_be_resumed(whole_run, copied_run):
    """The checkpoint is complete, but the files that are written after it are missing."""
    (copied_run / "eval.json").unlink()
    shutil.rmtree(copied_run / "adapter")
    run("train --resume", "--out", copied_run)
    for name in ("eval.json", "adapter/adapter_model.safetensors"):
        assert (copied_run / name).read_bytes() == (whole_run / name).read_bytes()


def test_a_resumed_run_has_no_result_until_it_ends(copied_run, monkeypatch):
    """A finished run that trains on: the table would show the metrics of the old last step."""
    before = json.loads((copied_run / "eval.json").read_text())
    seen = []

    def evaluate(policy, scorer, heldout, s, count, title):
        seen.append((title, json.loads((copied_run / "eval.json").read_text())))
        seen.append((copied_run / "adapter" / "README.md").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(samr1_mini, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stopped:
        run("train --resume --steps 7 --out", copied_run)
    (title, results), card = seen
    assert stopped.value.code == 130 and title == "after"
    assert results == {name: before[name] for name in ("before", "ceiling")}
    assert "| ceiling |" in card and "| after |" not in card
    assert state(copied_run)["step"] == 7 and "after" not in state(copied_run)["results"]


@pytest.mark.slow
def test_a_save_that_is_interrupted_leaves_the_old_checkpoint(copied_run, monkeypatch):
    def interrupted(state, file):
        Path(file).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run("train --resume --steps 7 --out", copied_run)
    assert stopped.value.code == 130
    assert state(copied_run)["step"] == 6
    assert not list(copied_run.rglob("*.tmp*"))


@pytest.mark.slow
def test_a_full_disk_gets_one_line_and_loses_nothing(copied_run, monkeypatch, capsys):

    def fail(*args):
        raise RuntimeError("No space")  # torch's way to say it

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        line = refused(capsys, "train --resume --steps 7 --out", copied_run)
    assert "No space" in line and "--resume" in line and str(copied_run) in line
    run("train --resume --steps 7 --out", copied_run)  # now there is room
    assert [row["step"] for row in read_metrics(copied_run)] == list(range(1, 8))


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    """Nothing was saved that --resume could continue, and no message says so."""
    small, out = f"--steps 1 {TINY}", tmp_path / "run"

    def fail(state, file):
        raise OSError(28, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        line = refused(capsys, f"train {small} --out", out)
    assert "No space" in line and "--overwrite" in line and "--resume" not in line
    for flags in (small, "--resume"):
        line = refused(capsys, f"train {flags} --out", out)
        assert "start again with --overwrite" in line or "replace it with --overwrite" in line
    run(f"train {small} --overwrite --out", out)
    assert state(out)["step"] == 1


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_like_a_whole_one(whole_run, tmp_path):
    out = tmp_path / "run"
    flags = QUICK.replace("--save_every 100", "--save_every 1").split()
    command = [sys.executable, str(ROOT / "samr1_mini.py"), *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "checkpoint" / "state.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere in the next step, or while it is saved
    process.kill()
    process.wait()
    assert state(out)["step"] >= 1
    run("train --resume --save_every 100", "--out", out)
    assert read_metrics(out) == read_metrics(whole_run)


def test_a_resumed_run_keeps_its_own_settings(copied_run, capsys):
    for flags in ("--lr 0.5", "--lora_rank 4", "--data_seed 3", "--overwrite"):
        line = refused(capsys, f"train --resume {flags} --out", copied_run)
        assert flags.split()[0] in line
    assert len(read_metrics(copied_run)) == 6 and state(copied_run)["step"] == 6


def test_a_truncated_checkpoint_is_refused(copied_run, capsys):
    file = copied_run / "checkpoint" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert "state.pt" in refused(capsys, "train --resume --out", copied_run)
    assert len(read_metrics(copied_run)) == 6


def test_a_checkpoint_of_another_model_is_refused(copied_run, capsys):
    config = json.loads((copied_run / "config.json").read_text()) | {"lora_rank": 4}
    (copied_run / "config.json").write_text(json.dumps(config))
    assert "state.pt" in refused(capsys, "train --resume --out", copied_run)


def test_a_run_without_a_checkpoint_cannot_be_resumed(copied_run, capsys):
    shutil.rmtree(copied_run / "checkpoint")
    line = refused(capsys, "train --resume --out", copied_run)
    assert "no checkpoint" in line and "--overwrite" in line


@pytest.mark.slow
def test_an_existing_run_is_replaced_only_on_request(copied_run, capsys):
    log = (copied_run / "metrics.jsonl").read_bytes()
    line = refused(capsys, QUICK, "--out", copied_run)
    assert "--resume" in line and "--overwrite" in line
    assert (copied_run / "metrics.jsonl").read_bytes() == log
    run(f"train --steps 1 {TINY} --overwrite --out", copied_run)
    assert len(read_metrics(copied_run)) == 1
    assert not (copied_run / "samples" / "step_00006.png").exists()


# --------------------------------------------------------------------------------------------------
# What a step does
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_raises_any_reward(tmp_path, monkeypatch):
    """Here the reward is 1 for completions that contain "left". No other code knows about it."""
    score = samr1_mini.score_completions

    def reward_left(scorer, samples, completions, *args, **options):
        rewards = [[float(" left" in text) for text in group] for group in completions]
        scores = score(scorer, samples, completions, *args, **options)
        return scores._replace(reward=torch.tensor(rewards))

    monkeypatch.setattr(samr1_mini, "score_completions", reward_left)
    monkeypatch.setattr(samr1_mini, "WARMUP", 2)
    out = tmp_path / "run"
    flags = "--steps 12 --prompts_per_step 4 --eval_samples 1 --save_every 100 --lr 3e-3"
    run(f"train {flags} --lr_decay constant --max_new_tokens 16 --out", out)
    rewards = [row["reward"] for row in read_metrics(out)]
    assert np.mean(rewards[:2]) < 0.6
    assert np.mean(rewards[-4:]) > 0.9


def test_only_the_adapter_on_the_language_model_is_trained(whole_run):
    trained = load_vlm("tiny", "cpu", 64, "brief", str(whole_run / "adapter")).model
    assert isinstance(trained, PeftModel)
    names = {n.split(".lora_")[0] for n, _ in trained.named_parameters() if "lora_" in n}
    layers = trained.get_base_model().model.language_model.layers
    modules = [m for layer in layers for m in layer.modules() if not hasattr(m, "lora_A")]
    linears = sum(isinstance(m, torch.nn.Linear) for m in modules)
    assert len(names) == 7 * len(layers)
    assert linears == 7 * len(layers) + 2 * len(names)  # each one wrapped, with its two factors
    assert not any("visual" in name for name in names)
    untrained = AutoModelForImageTextToText.from_pretrained(vlm_path("tiny")).state_dict()
    inner = trained.get_base_model().state_dict().items()
    inner = {n.replace(".base_layer", ""): p for n, p in inner if "lora_" not in n}
    assert all(torch.equal(inner[name], weight) for name, weight in untrained.items())
    changed = [p for n, p in trained.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in changed)


def test_the_base_model_has_no_adapter_until_it_is_added():
    policy = load_vlm("tiny", "cpu", 64, "brief")
    assert not [name for name, _ in policy.model.named_parameters() if "lora" in name]
    assert not any(p.requires_grad for p in policy.model.parameters())
    model = samr1_mini.add_lora(policy.model, rank=4, seed=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert all((p == 0).all() for name, p in trainable.items() if "lora_B" in name)
    config = model.peft_config["default"]
    assert config.lora_alpha == 2 * config.r == 8 and not config.lora_dropout


@pytest.mark.slow
def test_the_number_of_passes_does_not_change_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr(samr1_mini, "WARMUP", 1)
    weights = []
    for level in (1, 0):  # four passes, or one
        out = tmp_path / str(level)
        flags = "--steps 1 --eval_samples 4 --prompts_per_step 4 --group_size 4 --lr 1e-3"
        run(f"train {flags} --save_memory", level, "--out", out)
        weights.append(state(out)["adapter"])
    # Adam turns a rounding error of a near-zero gradient into a fraction of a step (lr 1e-3).
    assert largest_difference(*weights) < 2e-4
    assert max(w.abs().max().item() for n, w in weights[0].items() if "lora_B" in n) > 5e-4


def test_passes_are_slices_of_each_mini_batch():
    def passes(B, minibatches, level):
        flags = f"--prompts_per_step {B} --minibatches {minibatches} --save_memory {level}"
        parts = samr1_mini.passes(samr1_mini.parse_settings("train", flags.split()))
        return [[(rows.start, rows.stop) for rows in part] for part in parts]

    assert passes(8, 2, 0) == [[(0, 4)], [(4, 8)]]
    assert passes(4, 2, 1) == passes(4, 2, 3) == [[(0, 1), (1, 2)], [(2, 3), (3, 4)]]
    assert passes(2, 2, 1) == passes(2, 2, 0) == [[(0, 1)], [(1, 2)]]
    assert passes(6, 1, 0) == [[(0, 6)]]


@pytest.fixture(scope="module")
def sampled():
    """A policy with a random adapter, eight prompts, and two completions for each."""
    policy = load_vlm("tiny", "cpu", 64, "brief")
    policy.model = samr1_mini.add_lora(policy.model, 4, seed=0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    scenes = [Shapes("train")[i] for i in range(8)]
    s = samr1_mini.parse_settings("train", "--group_size 2 --temperature 1.5".split())
    prompts = policy.read(scenes)
    assert len(set(prompts.mask.sum(1).tolist())) > 1  # so passes pad to different lengths
    generator = torch.Generator().manual_seed(0)
    return policy, scenes, samr1_mini.sample_completions(policy, prompts, s, generator)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ratio_of_the_first_update_is_exactly_one(sampled, monkeypatch, dtype, level):
    """Old and new log-probs come from the same passes, so not even rounding differs.

    Otherwise ratios in bfloat16 would be off by percents before anything is learned. On a CPU,
    passes of other sizes happen to round alike, so this also compares the passes.
    """
    policy, scenes, completions = sampled
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model).to(dtype))
    prompts = policy.read(scenes)
    flags = f"--group_size 2 --temperature 1.5 --minibatches 2 --save_memory {level}"
    s = samr1_mini.parse_settings("train", flags.split())
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer, differences, steps = torch.optim.AdamW(weights, 1e-2), [], []
    loss, step, passes = samr1_mini.grpo_loss, optimizer.step, []
    forward = samr1_mini.group_logprobs

    def noted_pass(model, prompts, *args):
        passes.append((len(steps), prompts.ids.tolist()))
        return forward(model, prompts, *args)

    monkeypatch.setattr(samr1_mini, "group_logprobs", noted_pass)

    def noted(new, old, *args):
        differences.append((len(steps), (new - old).abs().max().item()))
        return loss(new, old, *args)

    monkeypatch.setattr(samr1_mini, "grpo_loss", noted)
    monkeypatch.setattr(optimizer, "step", lambda: (steps.append(1), step()))
    old, reference = samr1_mini.fixed_logprobs(policy, prompts, completions, s)
    assert (old - reference).abs().max() > 0.01  # the adapter has an effect
    fixed = [ids for _, ids in passes]  # of the reference and the old policy in turn
    passes.clear()
    advantages = torch.tensor([[1.0, -1.0]]).expand(8, 2)
    samr1_mini.update(policy, optimizer, prompts, completions, advantages, old, reference, s)
    assert len(passes) == len(fixed) == 16 // (1 if level else 4)  # 2 policies; 2 epochs
    assert [ids for _, ids in passes[: len(fixed) // 2]] == fixed[::2] == fixed[1::2]
    first = [difference for count, difference in differences if count == 0]
    assert len(first) == 4 // (1 if level else 4) and first == [0] * len(first)
    assert len(steps) == 4 and min(d for count, d in differences if count) > 0


def test_the_learning_rate_rises_then_decays():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    s = samr1_mini.parse_settings("train", "--steps 100 --lr 2e-3".split())
    rates = [samr1_mini.set_learning_rate(optimizer, s, step) for step in range(100)]
    assert rates[0] == pytest.approx(2e-3 / 10)
    assert rates[50] == pytest.approx(1e-3) and rates[99] == pytest.approx(2e-5)
    assert optimizer.param_groups[0]["lr"] == rates[99]
    s.lr_decay = "constant"
    assert samr1_mini.set_learning_rate(optimizer, s, 99) == pytest.approx(2e-3)


class Calls:
    """Counts the calls of the models in each step, from `load_samples` to `describe`."""

    def __init__(self, monkeypatch):
        self.counts, self.forms, self.steps = Counter(), [], []
        tower = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
        text, scorer = modeling_qwen2_5_vl.Qwen2_5_VLTextModel, samr1_mini.SamScorer
        places = [(tower, "forward", self.vision), (text, "forward", self.text)]
        places += [(scorer, "encode", self.encode), (scorer, "_best_logits", self.best_logits)]
        places += [(MaskDecoder, "predict_masks", self.decode)]
        places += [(runs, "load_samples", self.begin), (runs, "describe", self.end)]
        for owner, name, note in places:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), note))

    @staticmethod
    def wrap(original, note):
        def noted(*args, **options):
            note(*args, **options)
            return original(*args, **options)

        return noted

    def vision(self, tower, pixels, grid_thw, **options):
        self.counts["vision calls"] += 1
        self.counts["vision images"] += len(grid_thw)

    def text(self, model, *args, inputs_embeds, **options):
        rows, length = inputs_embeds.shape[:2]
        if length == 1:
            self.counts["decode steps"] += 1
        else:
            self.counts["full passes"] += 1
            self.counts["tokens in full passes"] += rows * length

    def encode(self, scorer, images):
        self.counts["SAM images"] += len(images)

    def best_logits(self, scorer, embeddings, factors, prompts):
        forms = {(prompt.box is not None, len(prompt.points)) for prompt in prompts}
        self.forms.append(forms - {(False, 0)})

    def decode(self, *args, **options):
        self.counts["SAM decoder calls"] += 1

    def begin(self, *args):
        self.counts.clear()
        self.forms.clear()

    def end(self, scores, completions, end):
        self.steps.append((dict(self.counts), self.forms[0], completions))


@pytest.mark.slow
def test_a_step_computes_nothing_twice(tmp_path, monkeypatch):
    """Counts calls for 3 prompts of 4 completions and 2 updates.

    The vision tower and SAM's encoder see each image once. SAM's decoder is called once for each
    form of prompt (box and points, box, points). The language model reads each prompt once to
    sample, and once for the reference, the old policy and each epoch, but not per completion.
    """
    calls = Calls(monkeypatch)
    flags = "--steps 2 --eval_samples 1 --prompts_per_step 3 --group_size 4 --save_memory 1"
    run(f"train {flags} --minibatches 1 --epochs 2 --out", tmp_path / "run")
    steps = list(calls.steps)
    assert len(steps) == 2
    samples, policy = Shapes("train"), load_vlm("tiny", "cpu", 64, "brief")
    for step, (counts, forms, completions) in enumerate(steps):
        chosen = runs.indices(step, 3, len(samples), seed=0)
        prompts = policy.read([samples[i] for i in chosen])
        prompt_tokens, tokens = int(prompts.mask.sum()), int(completions.mask.sum())
        assert counts == {
            "vision calls": 1,
            "vision images": 3,
            "SAM images": 3,
            "SAM decoder calls": len(forms),
            "decode steps": completions.ids.shape[-1] - 1,
            "full passes": 1 + 4 * 3,  # prefill; reference, old and two epochs, prompt by prompt
            "tokens in full passes": prompts.ids.numel() + 4 * (prompt_tokens + tokens),
        }


def test_docstring_examples():
    failed, tried = doctest.testmod(samr1_mini)
    assert tried and not failed

"""benchmarks/: sweeps and their tables, how speed is measured, and how a thought is forced."""

import doctest
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import samr1_mini
from benchmarks import gpu_24gb, meter, sweep, thoughts
from data import Shapes
from grpo import Completions, group_logprobs
from plumbing.errors import UserError
from plumbing.scenes import interior_points
from plumbing.settings import parse_settings
from plumbing.vlm import load_vlm
from tiny.make_vlm import write_answer

QUICK = "--prompts_per_step 2 --group_size 4 --max_new_tokens 32"
RISE = [(step - 0.5) / 100 for step in range(1, 101)]  # its centred mean is the curve itself


def finish(run: Path, ious: list[float], giou: float) -> None:
    """Write the files of a finished run whose sampled IoU has these values."""
    run.mkdir(parents=True)
    metrics = dict.fromkeys(("giou", "ciou"), giou)
    results = dict.fromkeys(("before", "after", "ceiling"), metrics)
    (run / "eval.json").write_text(json.dumps(results))
    rows = [{"step": k, "iou": iou, "kl": 0.1, "entropy": 0.2} for k, iou in enumerate(ious, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_until_a_mark():
    assert sweep.steps_until(RISE, 0.65) == 66
    assert sweep.steps_until(RISE[::-1], 0.65) == 6  # the first step at which the window fits
    assert sweep.steps_until([0.3] * 20 + [1.0] + [0.3] * 20, 0.65) == math.inf  # a lucky step
    failed, tried = doctest.testmod(sweep)
    assert tried and not failed


def test_the_table_and_the_picture_of_finished_runs(tmp_path, capsys):
    """One seed passes the mark at step 66, one at its start, one never."""
    figure = tmp_path / "figure.png"
    argv = ["ablations", "--table", "--out", str(tmp_path), "--figure", str(figure)]
    with pytest.raises(UserError, match="has no finished run"):
        sweep.main(argv)
    for name in sweep.SWEEPS["ablations"].settings:
        for seed, curve in enumerate((RISE, RISE[::-1], [0.1] * 100)):
            finish(sweep.run_folder(tmp_path, name, seed), curve, giou=0.5 + seed / 10)
    sweep.main(argv)
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("| raw IoU"))
    cells = [cell.strip() for cell in line.split("|")][2:-1]
    assert cells[0] == cells[1] == "0.600 ± 0.100"
    assert cells[2:4] == ["median 66", "0.367 ± 0.231"]  # of areas 0.5, 0.5, 0.1
    assert cells[-1] == "0.500, 0.600, 0.700"
    assert Image.open(figure).width > 500
    figure.write_bytes(b"the whole picture")
    for seed in range(3):
        shutil.rmtree(sweep.run_folder(tmp_path, "no KL", seed))
    sweep.main(argv)
    assert "| no KL | not run |" in capsys.readouterr().out
    assert figure.read_bytes() == b"the whole picture"


def test_settings_are_flags_and_a_name_means_the_same_in_two_sweeps():
    flags = {}
    for name in ("mask_or_box", "ablations"):  # as long as each other, so they share runs
        for setting, value in sweep.SWEEPS[name].settings.items():
            assert flags.setdefault(setting, value) == value
    for one in sweep.SWEEPS.values():
        for value in one.settings.values():
            parse_settings("train", value.split())  # raises if they are no flags


def test_a_run_that_fails_is_named_and_an_interrupted_one_resumes(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=7, stderr="noise\nthe reason")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"mask-0: exit code 7, .*the reason"):
        sweep.train(tmp_path / "mask-0", "mask", "--steps 5")
    assert commands[-1][-2:] == ["--steps", "5"]
    (tmp_path / "mask-0" / "checkpoint").mkdir(parents=True)
    (tmp_path / "mask-0" / "checkpoint" / "state.pt").write_text("")
    with pytest.raises(UserError):
        sweep.train(tmp_path / "mask-0", "mask", "--steps 5")
    assert commands[-1][-1] == "--resume"


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    """Three runs are finished. The fourth was killed before its first checkpoint."""
    monkeypatch.setattr(sweep, "SCENES", 24)
    settings = {
        name: QUICK + f" --accuracy {a}" for name, a in (("mask", "tiered"), ("box", "box"))
    }
    short = sweep.Sweep(settings, "giou box", seeds=1, steps=2)
    monkeypatch.setitem(sweep.SWEEPS, "mask_or_box", short)
    finished, killed = tmp_path / "mask-0", tmp_path / "box-0"
    sweep.train(finished, "mask", f"--steps 2 {QUICK}")
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    figure = tmp_path / "figure.png"
    sweep.main(["mask_or_box", "--out", str(tmp_path), "--figure", str(figure)])
    assert before == (finished / "metrics.jsonl").stat().st_mtime_ns
    assert json.loads((killed / "config.json").read_text())["accuracy"] == "box"
    printed = capsys.readouterr().out
    assert "not run" not in printed and Image.open(figure).width > 500
    assert printed.count(" hard | ") == printed.count(" plain | ") == 2


@pytest.mark.slow
def test_the_run_with_wrong_coordinates_reads_thousandths(tmp_path):
    run = tmp_path / "wrong"
    sweep.train(run, "wrong coordinates", f"--steps 1 {QUICK}")
    before = sweep.read_run(run)["before"]
    assert before["format"] > 0.5 and before["box"] == 0  # all boxes lie in a corner


def test_ways_take_turns_and_the_first_turn_warms_up():
    order = []
    times = {"ours": [9.0, 1.0, 5.0, 3.0], "theirs": [9.0, 2.0, 2.0, 8.0]}

    def measure(way: str) -> dict[str, float]:
        order.append(way)
        return {"seconds": times[way].pop(0)}

    rows = meter.take_turns(measure, ("ours", "theirs"), repeats=3)
    assert rows == {"ours": {"seconds": 3.0}, "theirs": {"seconds": 2.0}}
    assert order == ["ours", "theirs"] * 4


def allocate(mib: int) -> None:
    torch.ones(mib * 2**18)


@pytest.mark.slow
def test_the_meter_sees_the_memory_of_a_call():
    assert 60 < meter.in_new_process(meter.added_mib, allocate, 64) < 80


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_size():
    found = gpu_24gb.run_part("qwen2b", toy=True)
    assert found["ratio"] == 1 and found["packed"] < 1e-5 and found["graph"] < 1e-5
    table = gpu_24gb.markdown({"qwen2b": found, "qwen3b": {"skipped": "why"}}).splitlines()
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_our_side_of_the_comparison_with_trl_trains(tmp_path):
    """vs_trl.py replaces functions of samr1_mini, so their signatures must agree."""
    from benchmarks import vs_trl

    flags = f"{vs_trl.ALWAYS} {vs_trl.FLAGS['small']} {QUICK} --steps 3 --out {tmp_path / 'run'}"
    result = vs_trl.train_ours(parse_settings("train", flags.split()), "small")
    assert len(result["reward"]) == 3 and result["MiB added"] >= 0


def test_forced_tokens_are_computed_like_sampled_ones():
    """After its own thought the policy gives its own answer. A token's log-prob after a forced
    thought is that of a forward pass over the whole completion."""
    s = parse_settings("train", [])
    policy = load_vlm("tiny", "cpu", s.side, s.prompt)
    samples = [Shapes("heldout")[i] for i in range(12)]
    prompts = policy.read(samples)
    completions = samr1_mini.sample_completions(policy, prompts, s, greedy=True)
    last = policy.processor.tokenizer.convert_tokens_to_ids("</think>")
    starts = []  # most end after the thought; others are longer or empty, so that they are padded
    for b, row in enumerate(completions.ids[:, 0].tolist()):
        end = row.index(last) + 1 if last in row else 0
        starts.append(row[: (end + 3, end, 0, end)[b % 4]])
    assert len({len(start) for start in starts}) >= 3

    texts = policy.processor.batch_decode(starts)
    expected = [group[0] for group in policy.texts(completions)]
    assert thoughts.complete(policy, samples, texts, s) == expected
    full, _ = group_logprobs(policy.model, prompts, completions, policy.banned)
    forced = policy.read(samples, texts)
    for b, start in enumerate(starts):
        ids, mask = (x[b : b + 1, :, len(start) :] for x in (completions.ids, completions.mask))
        answer = Completions(ids, mask)
        after, _ = group_logprobs(policy.model, forced[b : b + 1], answer, policy.banned)
        torch.testing.assert_close(after[0], full[b, :, len(start) :], atol=1e-4, rtol=0)


def test_cases_have_another_thing_that_looks_different():
    cases = thoughts.find_cases(60)
    assert 40 < len(cases) <= 60 and 10 < sum(case.shared for case in cases) < 50
    for case in cases:
        assert (case.target.kind, case.target.colour) != (case.other.kind, case.other.colour)
        image, things, _, _ = Shapes("heldout").scene(int(case.sample.id.split("-")[1]))
        near = [max(abs(np.subtract(case.target.box, thing.box))) <= 3 for thing in things]
        assert sum(near) == (2 if case.shared else 1)  # such a thing is preferred
        taught = write_answer(case.other, image.size, case.other.box, (case.other.centre,) * 2)
        assert taught.startswith(case.start("other") + "<answer>")


def test_a_reply_is_on_the_thing_that_box_points_and_mask_name():
    case = next(case for case in thoughts.find_cases(60) if case.shared)
    prompt = thoughts.SamPrompt(case.other.box, interior_points(case.other.mask))
    reply = thoughts.Reply(None, prompt, torch.from_numpy(case.other.mask))
    assert reply.on(case.other) == (1.0, 1.0, 1.0)
    assert reply.on(case.target) == (1.0, 0.0, 0.0)  # the box cannot tell them apart


@pytest.mark.slow
def test_an_untrained_adapter_has_the_base_models_table(tmp_path, capsys):
    s = parse_settings("train", [])
    base = load_vlm("tiny", "cpu", s.side, s.prompt)
    samr1_mini.add_lora(base.model, rank=2, seed=0).save_pretrained(tmp_path / "adapter")
    figure = tmp_path / "figure.png"
    thoughts.main([str(tmp_path), "--scenes", "24", "--figure", str(figure)])
    _, first, second = capsys.readouterr().out.split("written to")[0].split(" model ")
    rows = [[line for line in part.splitlines() if " thought " in line] for part in (first, second)]
    assert len(rows[0]) == 8 and rows[0] == rows[1]
    assert Image.open(figure).height > 500

"""benchmarks/: how speed is measured, what a table without runs does, and how a thought is forced.

Sweeps that train are in test_tutorial.py.
"""

import doctest
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samr1_mini
from benchmarks import ablations, mask_or_box, sweep, thoughts
from data import Shapes
from grpo import Completions, group_logprobs
from plumbing.scenes import interior_points
from plumbing.vlm import Prompts, append_tokens, load_vlm
from tiny.make_vlm import write_answer

SWEEPS = {"ablations": ablations, "mask_or_box": mask_or_box}


def call(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def finish(run: Path, ious: list[float], giou: float = 0.5) -> None:
    """Write the files of a finished run whose sampled IoU has these values."""
    run.mkdir(parents=True)
    names = ("giou", "ciou", "format", "box", "points", "boxonly")
    results = {name: dict.fromkeys(names, giou) for name in ("before", "after", "ceiling")}
    (run / "eval.json").write_text(json.dumps(results))
    rows = [{"step": k, "iou": iou, "kl": 0.1, "entropy": 0.2} for k, iou in enumerate(ious, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Sweeps
# --------------------------------------------------------------------------------------------------


def test_steps_until_a_mark():
    rise = [(step - 0.5) / 100 for step in range(1, 101)]  # its centred mean is the curve itself
    assert ablations.steps_until(rise, 0.65) == 66
    assert ablations.steps_until(rise[::-1], 0.65) == 6  # the first step at which the window fits
    assert ablations.steps_until([0.6] * 100, 0.65) == math.inf
    assert ablations.steps_until([0.9] * 10, 0.65) == math.inf  # shorter than the window
    assert ablations.steps_until([0.9] * 11, 0.65) == 6


def test_one_lucky_step_does_not_pass_a_mark():
    curve = [0.3] * 20 + [1.0] + [0.3] * 20 + [0.9] * 20
    assert ablations.steps_until(curve, 0.65) > 40


def test_area_is_larger_for_the_run_that_learns_earlier():
    early, late = [0.2] * 50 + [0.8] * 150, [0.2] * 150 + [0.8] * 50
    assert ablations.area(early) == pytest.approx(0.65)
    assert ablations.area(late) == pytest.approx(0.35)


def test_examples_of_the_speed_measures():
    failed, tried = doctest.testmod(ablations)
    assert tried and not failed


def test_the_table_shows_the_speed_of_each_seed(tmp_path, monkeypatch, capsys):
    """One seed passes the mark at step 66, one at its start, one never."""
    rise = [(step - 0.5) / 100 for step in range(1, 101)]
    for seed, curve in enumerate((rise, rise[::-1], [0.1] * 100)):
        finish(sweep.run_folder(tmp_path, "raw IoU", seed), curve)
    figure = tmp_path / "figure.png"
    call(monkeypatch, ablations, "--table", "--out", tmp_path, "--figure", figure)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("raw IoU"))
    assert line.endswith("66 (66, 6, never)")
    assert "0.367 ± 0.231" in line  # areas 0.5, 0.5, 0.1
    assert [line.split()[-2:] for line in lines if line.startswith("tiers")] == [["not", "run"]]
    assert Image.open(figure).width > 500


def test_both_scripts_share_the_runs_of_the_papers_setting():
    """Same name, so same folder, and same flags. No other name is in both."""
    both = set(ablations.SETTINGS) & set(mask_or_box.SETTINGS)
    assert both == {sweep.PAPER}
    flags = {script.SETTINGS[sweep.PAPER] for script in SWEEPS.values()}
    assert flags == {""}
    assert sweep.run_folder(Path("runs"), sweep.PAPER, 3) == Path("runs/mask-3")


@pytest.mark.parametrize("name", SWEEPS)
def test_settings_are_flags_and_folders_differ(name):
    settings = SWEEPS[name].SETTINGS
    for flags in settings.values():
        samr1_mini.parse_settings("train", flags.split())  # exits if they are no flags
    assert len({sweep.run_folder(Path(), setting, 0) for setting in settings}) == len(settings)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_table_without_runs_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"the committed figure")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, SWEEPS[name], "--table", "--out", tmp_path, "--figure", figure)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert len(printed.err.splitlines()) == 1 and f"--out {tmp_path}" in printed.err
    assert figure.read_bytes() == b"the committed figure"


@pytest.mark.parametrize("name", SWEEPS)
def test_runs_of_another_length_are_refused(name, tmp_path, monkeypatch, capsys):
    """A short trial in the shared folder must not become a point of the long sweep."""
    finish(sweep.run_folder(tmp_path, sweep.PAPER, 0), [0.5] * 20)
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("it must not train"))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, SWEEPS[name], "--out", tmp_path, "--figure", tmp_path / "figure.png")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert "--steps 200" in error and "mask-0 was trained with 20 steps" in error


# --------------------------------------------------------------------------------------------------
# Thoughts
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings():
    return samr1_mini.parse_settings("train", [])


@pytest.fixture(scope="module")
def policy(settings):
    return load_vlm("tiny", "cpu", settings.side, settings.prompt)


@pytest.fixture(scope="module")
def own(policy, settings):
    """Samples, their prompts, greedy completions (12, 1, T), and the tokens where each one starts.

    Most starts end after the thought. Each third one is longer or empty, so that they are padded.
    """
    samples = [Shapes("heldout")[i] for i in range(12)]
    prompts = policy.read(samples)
    completions = samr1_mini.sample_completions(policy, prompts, settings, greedy=True)
    last = policy.processor.tokenizer.convert_tokens_to_ids("</think>")
    starts = []
    for b, row in enumerate(completions.ids[:, 0].tolist()):
        end = row.index(last) + 1 if last in row else 0  # 0: a completion without a thought
        starts.append(row[: (end + 3, end, 0, end)[b % 4]])
    assert sum(start[-1:] == [last] for start in starts) >= 3
    assert len({len(start) for start in starts}) >= 3
    return samples, prompts, completions, starts


def test_after_its_own_thought_the_policy_gives_its_own_answer(policy, settings, own):
    samples, _, completions, starts = own
    texts = policy.processor.batch_decode(starts)
    expected = [group[0] for group in policy.texts(completions)]
    assert thoughts.complete(policy, samples, texts, settings) == expected


def test_forced_tokens_are_computed_like_sampled_ones(policy, own):
    """A token's log-prob after a forced thought is that of a forward pass over the completion."""
    _, prompts, completions, starts = own
    full, _ = group_logprobs(policy.model, prompts, completions, policy.banned)
    forced = append_tokens(prompts, starts)
    for b, start in enumerate(starts):
        rest = (x[b : b + 1, :, len(start) :] for x in (completions.ids, completions.mask))
        prompt, answer = forced[b : b + 1], Completions(*rest)
        after, _ = group_logprobs(policy.model, prompt, answer, policy.banned)
        torch.testing.assert_close(after[0], full[b, :, len(start) :], atol=1e-4, rtol=0)


def test_appended_tokens():
    """Two prompts, one of them padded. Two tokens and one continue after the largest position."""
    ids = torch.tensor([[0, 7, 8], [4, 5, 6]])
    positions = torch.tensor([[[1, 0, 3], [0, 1, 2]]] * 3)
    prompts = Prompts(ids, ids > 0, positions, "vision")
    found = append_tokens(prompts, [[9, 9], [9]])
    assert found.ids.tolist() == [[7, 8, 9, 9], [4, 5, 6, 9]]
    assert found.mask.all() and found.vision == "vision"
    assert found.positions[2].tolist() == [[0, 3, 4, 5], [0, 1, 2, 3]]
    found = append_tokens(prompts, [[], [9]])
    assert found.mask.tolist() == [[False, False, True, True], [True] * 4]
    assert found.ids[0, 2:].tolist() == [7, 8] and found.positions[0, 0, 2:].tolist() == [0, 3]


def test_thoughts_are_worded_as_the_policy_was_taught():
    for index in range(40):
        image, things, _, _ = Shapes("heldout").scene(index)
        for thing in things:
            taught = write_answer(thing, image.size, thing.box, (thing.centre, thing.centre))
            assert taught.startswith(thoughts.thought(thing, image.size) + "<answer>")


def test_cases_have_another_thing_that_looks_different():
    cases = thoughts.find_cases(60)
    assert 40 < len(cases) <= 60
    assert 10 < sum(case.shared for case in cases) < 50
    for case in cases:
        assert (case.target.kind, case.target.colour) != (case.other.kind, case.other.colour)
        assert not (case.target.mask & case.other.mask).any()
        things = Shapes("heldout").scene(int(case.sample.id.split("-")[1]))[1]
        near = [max(abs(np.subtract(case.target.box, thing.box))) <= 3 for thing in things]
        assert sum(near) == (2 if case.shared else 1)  # such a thing is preferred


def test_a_reply_is_on_the_thing_that_box_points_and_mask_name():
    case = next(case for case in thoughts.find_cases(60) if case.shared)
    prompt = thoughts.SamPrompt(case.other.box, interior_points(case.other.mask))
    mask = torch.from_numpy(case.other.mask)
    reply = thoughts.Reply(thoughts.parse_answer(""), prompt, mask)
    assert reply.on(case.other) == (1.0, 1.0, 1.0)
    assert reply.on(case.target) == (1.0, 0.0, 0.0)  # the box cannot tell them apart


def test_a_run_without_an_adapter_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, thoughts, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and str(tmp_path) in error


@pytest.mark.slow
def test_an_untrained_adapter_has_the_base_models_table(settings, tmp_path, monkeypatch, capsys):
    base = load_vlm("tiny", "cpu", settings.side, settings.prompt)
    samr1_mini.add_lora(base.model, rank=2, seed=0).save_pretrained(tmp_path / "adapter")
    figure = tmp_path / "figure.png"
    call(monkeypatch, thoughts, tmp_path, "--scenes", 24, "--figure", figure)
    printed = capsys.readouterr().out
    _, first, second = printed.split("written to")[0].split(" model ")
    rows = [[line for line in part.splitlines() if " thought " in line] for part in (first, second)]
    assert len(rows[0]) == 8 and rows[0] == rows[1]
    assert Image.open(figure).height > 500


@pytest.mark.slow
def test_our_side_of_the_comparison_with_trl_trains(tmp_path, monkeypatch):
    """vs_trl.py replaces functions of samr1_mini, so their signatures must agree."""
    vs_trl = pytest.importorskip("benchmarks.vs_trl")
    small = "--group_size 4 --prompts_per_step 2 --max_new_tokens 8"
    flags = f"{vs_trl.ALWAYS} {vs_trl.FLAGS['small']} --steps 3 {small} --out {tmp_path / 'run'}"
    result = vs_trl.train_ours(samr1_mini.parse_settings("train", flags.split()), "small")
    assert len(result["length"]) == 3 and all(0 < length <= 8 for length in result["length"])

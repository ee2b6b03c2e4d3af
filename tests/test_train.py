"""samr1_mini.py from its command line, in process: runs, resumes, interruptions, and what is said to bad input."""

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
from PIL import Image
from segment_anything.modeling import MaskDecoder
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import reward
import samr1_mini
from data import Shapes

ROOT = Path(samr1_mini.__file__).parent
QUICK = "train --steps 6 --eval_samples 8 --prompts_per_step 4 --group_size 4 --sample_every 100 --save_every 2"
NOT_REPEATABLE = ("seconds_", "tokens_per_second", "peak_mib")


def run(command: str, *more: object) -> None:
    samr1_mini.main([*command.split(), *map(str, more)])


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPEATABLE)} for row in rows]


def state(out: Path) -> dict:
    return torch.load(out / "checkpoint" / "state.pt", weights_only=True)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(QUICK, "--out", out)
    return out


def interrupt_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""
    describe = samr1_mini.describe

    def describe_and_signal(current, *args):
        if current == step:
            signal.raise_signal(number)
        return describe(current, *args)

    monkeypatch.setattr(samr1_mini, "describe", describe_and_signal)


def test_a_run_writes_what_the_readme_says(whole_run):
    for name in ("config.json", "metrics.jsonl", "curves.png", "eval.json", "samples/step_00001.png", "samples/step_00006.png",
                 "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "checkpoint/state.pt"):  # fmt: skip
        assert (whole_run / name).stat().st_size > 0, name
    assert not list(whole_run.rglob("*.tmp*"))
    results = json.loads((whole_run / "eval.json").read_text())
    assert set(results) == {"before", "after", "ceiling"}
    assert all(set(results[name]) >= {"giou", "ciou", "format", "n"} for name in ("before", "after"))
    assert results["ceiling"]["giou"] > 0.85  # the tiny SAM with the true box
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    wanted = """reward accuracy think_format answer_format iou tier_0 tier_2 tier_3 tier_4 equal_groups length truncated kl
        entropy ratio clip_low clip_high grad_norm lr seconds_rollout seconds_reward seconds_logprobs seconds_update
        tokens_per_second peak_mib"""
    for row in rows:
        assert set(wanted.split()) <= set(row)
        assert np.isfinite(list(row.values())).all()
        assert row["reward"] == pytest.approx(row["accuracy"] + row["think_format"] + row["answer_format"], abs=1e-5)
        assert row["tier_0"] + row["tier_2"] + row["tier_3"] + row["tier_4"] == pytest.approx(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_and_resumed_ends_bit_for_bit_like_one_that_is_not(whole_run, tmp_path, monkeypatch, capsys, number):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, number)
        with pytest.raises(SystemExit) as stopped:
            run(QUICK, "--out", out)
    assert stopped.value.code == 128 + number
    assert f"--resume --out {out}" in capsys.readouterr().out
    assert len(metrics(out)) == 3  # the step in hand was finished
    assert state(out)["step"] == 3
    run("train --resume", "--out", out)
    assert metrics(out) == metrics(whole_run)
    ours, theirs = state(out), state(whole_run)
    assert ours["adapter"].keys() == theirs["adapter"].keys()
    assert all(torch.equal(ours["adapter"][name], theirs["adapter"][name]) for name in ours["adapter"])
    for mine, other in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert json.loads((out / "eval.json").read_text()) == json.loads((whole_run / "eval.json").read_text())


def test_steps_after_the_last_checkpoint_are_done_again(whole_run, tmp_path):
    """What a kill -9 between two checkpoints leaves: more lines in the log than steps in the checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    before = state(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "half a li')
    run("train --resume", "--out", out)
    assert metrics(out) == metrics(whole_run)
    assert all(torch.equal(a, b) for a, b in zip(before["adapter"].values(), state(out)["adapter"].values(), strict=True))


def test_a_save_that_dies_halfway_leaves_the_old_checkpoint(whole_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)

    def dies(state, file):
        Path(file).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(SystemExit):
        run("train --resume --steps 8 --out", out)
    assert state(out)["step"] == 6
    assert not list(out.rglob("*.tmp*"))


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(whole_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SystemExit) as stopped:
            run("train --resume --steps 8 --out", out)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("samr1_mini.py")]
    assert stopped.value.code == 2 and len(said) == 1 and "No space left" in said[0] and "--resume" in said[0]
    run("train --resume --steps 8 --out", out)  # room was made
    assert [row["step"] for row in metrics(out)] == list(range(1, 9))


def test_a_file_is_exchanged_and_never_written_into(tmp_path):
    """Whoever holds the old file keeps all of it: at no moment is there half of one under the name."""
    file = tmp_path / "file.json"
    samr1_mini.write_text(file, "old")
    with open(file) as held:
        samr1_mini.write_text(file, "new, and longer")
        assert held.read() == "old"
    assert file.read_text() == "new, and longer" and len(list(tmp_path.iterdir())) == 1


def test_kill_9_then_resume(whole_run, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "samr1_mini.py"), *QUICK.replace("--save_every 2", "--save_every 1").split(), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere in the next step, or in its saving
    process.kill()
    process.wait()
    assert state(out)["step"] >= 1
    run("train --resume", "--out", out)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_there_is_not_overwritten_unasked(whole_run, tmp_path, capsys):
    log = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as refused:
        run(QUICK, "--out", whole_run)
    assert refused.value.code == 2
    assert "--resume" in (said := capsys.readouterr().err) and "--overwrite" in said
    assert (whole_run / "metrics.jsonl").read_bytes() == log
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        run(QUICK, "--overwrite", "--out", tmp_path)  # not a run: not ours to delete
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_overwrite_starts_afresh(whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    run("train --steps 1 --eval_samples 4 --prompts_per_step 2 --group_size 2 --minibatches 1 --overwrite --out", out)
    assert len(metrics(out)) == 1


def test_the_loop_climbs_whatever_it_is_paid_for(tmp_path, monkeypatch):
    """The reward is swapped for the share of completions that say "left": nothing else in the loop knows."""
    score = samr1_mini.score_completions

    def paid_for_left(scorer, samples, completions, *args, **options):
        paid = torch.tensor([[float(" left" in text) for text in group] for group in completions])
        return score(scorer, samples, completions, *args, **options)._replace(reward=paid)

    monkeypatch.setattr(samr1_mini, "score_completions", paid_for_left)
    out = tmp_path / "run"
    run("train --steps 16 --prompts_per_step 4 --warmup 2 --eval_samples 4 --sample_every 100 --lr_decay constant --lr 2e-3 --out", out)
    rewards = [row["reward"] for row in metrics(out)]
    assert np.mean(rewards[:2]) < 0.6
    assert np.mean(rewards[-4:]) > 0.9


def test_only_the_adapter_on_the_language_model_learns(whole_run):
    s = samr1_mini.parse_settings("eval", ["--adapter", str(whole_run / "adapter")])
    trained = samr1_mini.load_policy(s).model
    names = {n.split(".lora_")[0] for n, _ in trained.named_parameters() if "lora_" in n}
    layers = trained.get_base_model().model.language_model.layers
    linears = sum(isinstance(m, torch.nn.Linear) for layer in layers for m in layer.modules() if not hasattr(m, "lora_A"))
    assert len(names) == 7 * len(layers)
    assert linears == 7 * len(layers) + 2 * len(names)  # each one wrapped, with its two low-rank factors
    assert not any("visual" in name for name in names)
    pristine = samr1_mini.AutoModelForImageTextToText.from_pretrained(ROOT / "tiny" / "vlm").state_dict()
    inner = {n.replace(".base_layer", ""): p for n, p in trained.get_base_model().state_dict().items() if "lora_" not in n}
    assert all(torch.equal(inner[name], weight) for name, weight in pristine.items())
    moved = [p for n, p in trained.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved)


def test_the_number_of_passes_does_not_change_an_update(tmp_path):
    weights = []
    for passes in (1, 4):
        out = tmp_path / str(passes)
        run("train --steps 1 --eval_samples 4 --prompts_per_step 4 --group_size 4 --sample_every 100 --warmup 1", "--prompts_per_pass", passes, "--out", out)
        weights.append(state(out)["adapter"])
    change = max((a - b).abs().max().item() for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert change < 2e-4  # Adam turns a rounding error of a near-zero gradient into a fraction of a step (lr 2e-3)


def test_a_step_computes_nothing_twice(tmp_path, monkeypatch):
    """For 3 prompts of 4 completions and 2 updates: the vision tower and SAM's encoder see each image once; SAM's decoder is
    called once for each make-up of prompt (box and points, box, points); the language model reads each prompt once to sample, and
    once for the reference, for the policy that sampled, and in each epoch: never once for each completion."""
    counts, steps, makeups = Counter(), [], []
    tower, text = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel, modeling_qwen2_5_vl.Qwen2_5_VLTextModel
    look, read, decode = tower.forward, text.forward, MaskDecoder.predict_masks
    encode, best = samr1_mini.SamScorer.encode, samr1_mini.SamScorer._best_logits
    describe, load = samr1_mini.describe, samr1_mini.load_samples

    def counted_look(self, pixels, grid_thw, **more):
        counts["vision calls"] += 1
        counts["vision images"] += len(grid_thw)
        return look(self, pixels, grid_thw=grid_thw, **more)

    def counted_read(self, *args, inputs_embeds, **more):
        if inputs_embeds.shape[1] > 1:
            counts["tokens in full passes"] += inputs_embeds.shape[0] * inputs_embeds.shape[1]
            counts["full passes"] += 1
        else:
            counts["decode steps"] += 1
        return read(self, *args, inputs_embeds=inputs_embeds, **more)

    def counted_encode(self, images):
        counts["SAM images"] += len(images)
        return encode(self, images)

    def counted_decode(self, *args, **more):
        counts["SAM decoder calls"] += 1
        return decode(self, *args, **more)

    def noted_best(self, embeddings, scales, prompts):
        makeups.append({(p.box is not None, len(p.points)) for p in prompts} - {(False, 0)})
        return best(self, embeddings, scales, prompts)

    def begin(*args):
        counts.clear()
        makeups.clear()
        return load(*args)

    def end(done, scores, completions, policy):
        row = describe(done, scores, completions, policy)
        steps.append((dict(counts), makeups[0], completions))
        return row

    monkeypatch.setattr(tower, "forward", counted_look)
    monkeypatch.setattr(text, "forward", counted_read)
    monkeypatch.setattr(samr1_mini.SamScorer, "encode", counted_encode)
    monkeypatch.setattr(samr1_mini.SamScorer, "_best_logits", noted_best)
    monkeypatch.setattr(MaskDecoder, "predict_masks", counted_decode)
    monkeypatch.setattr(samr1_mini, "load_samples", begin)
    monkeypatch.setattr(samr1_mini, "describe", end)
    run("train --steps 2 --eval_samples 1 --prompts_per_step 3 --group_size 4 --minibatches 1 --epochs 2 --prompts_per_pass 1 --out", tmp_path / "run")
    assert len(steps) == 2
    for step, (count, kinds, completions) in enumerate(steps):
        samples = Shapes("train")
        policy = samr1_mini.load_policy(samr1_mini.Settings())
        prompts = policy.read([samples[i] for i in samr1_mini.indices(step, 3, len(samples), seed=0)])
        once, said = int(prompts.mask.sum()), int(completions.mask.sum())
        assert count == {
            "vision calls": 1,
            "vision images": 3,
            "SAM images": 3,
            "SAM decoder calls": len(kinds),
            "decode steps": completions.ids.shape[-1] - 1,
            "full passes": 1 + 4 * 3,  # prefill; then reference, old and two epochs, a prompt at a time
            "tokens in full passes": prompts.ids.numel() + 4 * (once + said),
        }


def test_groups_of_equal_rewards_are_passed_over_without_a_kl_term_and_nothing_else_changes(tmp_path, monkeypatch):
    """A weight of 1e-12 for the KL term changes no number but forbids the short cut: both ways must end with the same weights.
    Step 1 has one such group in four, step 2 nothing else; there AdamW's averages move the weights on."""
    score = samr1_mini.score_completions
    weights, rows, seen = [], [], []
    logprobs = samr1_mini.group_logprobs
    for beta in ("0", "1e-12"):
        calls = []

        def levelled(scorer, samples, *args, **more):
            rewards = torch.arange(4.0).repeat(4, 1)
            rewards[1 if not calls else slice(0, 4)] = 3.0
            calls.append(0)
            return score(scorer, samples, *args, **more)._replace(reward=rewards)

        def counted(model, prompts, *args):
            seen.append((beta, len(prompts)))
            return logprobs(model, prompts, *args)

        monkeypatch.setattr(samr1_mini, "score_completions", levelled)
        monkeypatch.setattr(samr1_mini, "group_logprobs", counted)
        out = tmp_path / beta
        run("train --steps 2 --eval_samples 1 --prompts_per_step 4 --group_size 4 --minibatches 2 --epochs 2 --warmup 1 --lr_decay constant --beta", beta, "--out", out)
        weights.append(state(out)["adapter"])
        rows.append(metrics(out))
    assert sum(n for beta, n in seen if beta == "0") == 3 * 3  # 3 groups, in a pass of their own and in two epochs; then none
    assert sum(n for beta, n in seen if beta != "0") == 2 * 4 * 4  # with the reference's
    moved = max((a - b).abs().max().item() for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert moved < 2e-4  # of some 4e-3; Adam turns a rounding error of a near-zero gradient into a fraction of a step
    assert max(w.abs().max().item() for name, w in weights[0].items() if "lora_B" in name) > 1e-3
    assert rows[0][0]["equal_groups"] == 0.25 and rows[0][1]["equal_groups"] == 1
    for name in ("ratio", "clip_low", "clip_high", "grad_norm"):
        assert rows[0][1][name] == pytest.approx(rows[1][1][name], abs=1e-4 if name != "ratio" else 0.1)
    assert rows[0][1]["entropy"] is None  # nothing was computed that it could be taken from


def test_every_epoch_takes_every_sample_once_in_an_order_of_its_own():
    taken = [i for step in range(10) for i in samr1_mini.indices(step, 4, 20, seed=0)]
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20))
    assert taken[:20] != taken[20:]
    assert taken[:4] != samr1_mini.indices(0, 4, 20, seed=1)


def test_eval_of_an_adapter_repeats_the_runs_own_figures(whole_run, tmp_path, capsys):
    out = tmp_path / "eval"
    run("eval --limit 8 --adapter", whole_run / "adapter", "--out", out)
    figures = json.loads((out / "eval.json").read_text())
    assert figures["run"] == json.loads((whole_run / "eval.json").read_text())["after"]
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 8
    assert figures["run"]["giou"] == pytest.approx(np.mean([row["iou"] for row in rows]))
    assert Image.open(out / "sheet.png").width > 500
    assert "gIoU" in capsys.readouterr().out


def test_eval_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("eval --limit 6 --eval_batch 2 --out", whole)
    shutil.copytree(whole, cut)
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed in the middle of a line
    judged = []
    judge = samr1_mini.judge
    monkeypatch.setattr(samr1_mini, "judge", lambda *a: judged.extend(a[2]) or judge(*a))
    run("eval --resume --out", cut)
    assert len(judged) == 4  # the first two were not judged again
    assert (cut / "answers.jsonl").read_text() == "".join(lines)
    assert (cut / "eval.json").read_text() == (whole / "eval.json").read_text()


def test_docstring_examples():
    failed, tried = doctest.testmod(samr1_mini)
    assert tried == 4 and not failed


def test_a_sample_that_cannot_be_judged_keeps_its_place(scorer):
    class Holed(Shapes):
        def __getitem__(self, index):
            if index % 3 == 1:
                raise samr1_mini.BadSample(f"{index} is broken")
            return super().__getitem__(index)

    s = samr1_mini.parse_settings("eval", ["--eval_samples", "7", "--eval_batch", "4"])
    policy = samr1_mini.load_policy(s)
    rows = samr1_mini.evaluate(policy, scorer, Holed("heldout"), s, "")
    assert [row.get("id", "skipped") for row in rows] == [
        "skipped" if k % 3 == 1 else f"shapes-heldout-0-{k}" for k in range(7)
    ]
    ours, ceiling = samr1_mini.summary(rows)
    assert ours["n"] == ceiling["n"] == 5


def test_figures_with_ignored_pixels_and_an_empty_truth_by_hand(scorer, monkeypatch):
    """Three samples. IoU by hand: 4 x 4 found of 8 x 4, half of the rest ignored: 16 / 24; nothing found of 10: 0 / 10;
    nothing found and nothing there: 1."""
    truth = np.zeros((3, 16, 16), bool)
    truth[0, :8, :4] = truth[1, :5, :2] = True
    ignore = np.zeros((16, 16), bool)
    ignore[4:6, :4] = True
    found = np.zeros((16, 16), bool)
    found[:4, :4] = True
    rows = []
    for k in range(3):
        mask = found if k == 0 else np.zeros_like(found)
        meet, join = (mask & truth[k]), (mask | truth[k])
        one = samr1_mini.Sample(Image.new("RGB", (16, 16)), "q", truth[k], ignore if k == 0 else None, str(k))
        logits = torch.full((1, 16, 16), -1.0)
        monkeypatch.setattr(scorer, "_best_logits", lambda *_, x=logits: (x, torch.tensor([True])))
        monkeypatch.setattr(reward, "upsample_masks", lambda *_, m=mask: torch.from_numpy(m)[None].float())
        overlap = scorer.score([one], [[samr1_mini.SamPrompt(None, ())]])
        rows.append({"iou": overlap.iou.item(), "intersection": overlap.intersection.item(), "union": overlap.union.item(),
                     "format": True, "box_iou": 0.0})  # fmt: skip
        assert k == 0 or (meet.sum(), join.sum()) == (overlap.intersection.item(), overlap.union.item())
    assert (rows[0]["intersection"], rows[0]["union"]) == (16, 24)
    figures = samr1_mini.figures(rows)
    assert figures["giou"] == pytest.approx((16 / 24 + 0 + 1) / 3)
    assert figures["ciou"] == pytest.approx(16 / (24 + 10))


def test_segment_draws_and_prints(tmp_path, capsys):
    image, things, query, target = Shapes("heldout").scene(1)
    image.save(tmp_path / "scene.png")
    run("segment --image", tmp_path / "scene.png", "--query", query, "--out", tmp_path / "found.png")
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["query"] == query and "mask_pixels" in found and "completion" in found
    assert Image.open(tmp_path / "found.png").width > 300


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp / "deep.png")
    (tmp / "empty").mkdir()
    torch.save({"weight": torch.zeros(3)}, tmp / "other.pth")
    (tmp / "cut.safetensors").write_bytes((ROOT / "tiny" / "sam.safetensors").read_bytes()[:5000])
    (tmp / "other_adapter").mkdir()
    (tmp / "other_adapter" / "adapter_config.json").write_text("{}")
    return tmp


BAD = {  # what is wrong: (command line, what the message must name)
    "flag": ("train --stepz 3", "--stepz"),
    "value": ("train --steps many", "--steps"),
    "choice": ("train --accuracy best", "--accuracy"),
    "negative steps": ("train --steps -3", "--steps"),
    "out is a folder": ("segment --query star --image {root}/assets/readme.png --out {tmp}", "--out"),
    "16-bit image": ("segment --query star --image {tmp}/deep.png", "deep.png"),
    "group of one": ("train --group_size 1", "--group_size"),
    "command": ("trian", "trian"),
    "data": ("train --data imagenet", "--data imagenet"),
    "sam": ("train --sam vit_x:y", "--sam vit_x:y"),
    "sam file": ("train --sam vit_b:{tmp}/none.pth", "none.pth"),
    "sam of another size": ("train --sam vit_b:{tmp}/other.pth", "other.pth"),
    "sam cut short": ("train --sam vit_b:{tmp}/cut.safetensors", "cut.safetensors"),
    "vlm": ("train --vlm {tmp}/none", "none"),
    "vlm folder": ("train --vlm {tmp}/empty", "empty"),
    "side": ("train --side 70", "--side"),
    "device": ("train --device abacus", "abacus"),
    "adapter": ("eval --adapter {tmp}/empty", "adapter_config.json"),
    "adapter of another model": ("eval --adapter {tmp}/other_adapter", "other_adapter"),
    "no image": ("segment --query star", "--image"),
    "no query": ("segment --image {tmp}/broken.png", "--query"),
    "missing image": ("segment --query star --image {tmp}/none.png", "none.png"),
    "broken image": ("segment --query star --image {tmp}/broken.png", "broken.png"),
    "nothing to merge": ("merge", "--adapter"),
    "nothing to resume": ("train --resume --out {tmp}/none", "--resume"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(wrong, bad_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, named = BAD[wrong]
    with pytest.raises(SystemExit) as refused:
        run(command.format(tmp=bad_files, root=ROOT))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("samr1_mini.py")]
    assert refused.value.code == 2 and len(said) == 1 and named in said[0]
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_a_merged_model_loads_with_plain_transformers_and_answers_the_same(whole_run, tmp_path):
    run("merge --adapter", whole_run / "adapter", "--out", tmp_path / "merged")
    merged = samr1_mini.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    run("eval --limit 8 --vlm", tmp_path / "merged", "--out", tmp_path / "a")
    run("eval --limit 8 --adapter", whole_run / "adapter", "--out", tmp_path / "b")
    assert (tmp_path / "a" / "answers.jsonl").read_text() == (tmp_path / "b" / "answers.jsonl").read_text()


def expected_parts(*flags: str) -> dict:
    s = samr1_mini.parse_settings("train", list(flags))
    return samr1_mini.expected_memory(s, samr1_mini.vlm_folder(s), samr1_mini.LORA_TARGETS)


def test_dry_run_adds_up_and_downloads_nothing(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("train --preset qwen3b --dry-run")
    said = capsys.readouterr().out
    assert "3.75e9 weights x 2 bytes" in said  # the published size of the 3B model, vision tower included
    parts = expected_parts("--preset", "qwen7b")
    weights, _ = parts["update"]["policy weights"]
    assert weights == pytest.approx(8.29e9 * 2, rel=0.01)
    assert all(sum(size for size, _ in phase.values()) < 24 * 2**30 for phase in parts.values())


def test_expected_adapter_is_the_adapter_that_is_built(whole_run):
    expected, _ = expected_parts()["update"]["adapter"]
    assert expected == 16 * sum(weight.numel() for weight in state(whole_run)["adapter"].values())


def test_a_resumed_run_keeps_its_own_settings(whole_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    for flags in ("--lr 0.5", "--lora_rank 4", "--overwrite"):
        with pytest.raises(SystemExit) as refused:
            run(f"train --resume {flags} --out", out)
        assert refused.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert len(metrics(out)) == 6 and state(out)["step"] == 6


def test_a_checkpoint_that_is_cut_short_is_refused(whole_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    (out / "checkpoint" / "state.pt").write_bytes((out / "checkpoint" / "state.pt").read_bytes()[:1000])
    with pytest.raises(SystemExit) as refused:
        run("train --resume --out", out)
    assert refused.value.code == 2 and "state.pt" in capsys.readouterr().err
    assert len(metrics(out)) == 6


def test_a_checkpoint_of_another_model_is_refused(whole_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    config = json.loads((out / "config.json").read_text()) | {"lora_rank": 4}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as refused:
        run("train --resume --out", out)
    assert refused.value.code == 2 and "state.pt" in capsys.readouterr().err

"""The commands eval and segment, tools.merge, bad input, and folders that must not be deleted.

Real formats are miniatures: RefCOCOg, ReasonSeg, a policy in a local folder, and a SAM checkpoint
of an official size.
"""

import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_reasonseg, make_refcocog
from PIL import Image
from segment_anything import sam_model_registry

import reward
import samr1_mini
from data import BadSample, Sample, Shapes
from plumbing import runs
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.scenes import interior_points
from plumbing.vlm import load_vlm, vlm_path
from reward import SamPrompt
from tools import merge

ROOT = Path(samr1_mini.__file__).parent
QUICK = "--steps 2 --prompts_per_step 2 --group_size 2 --eval_samples 3 --save_every 100"


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


def answers(out: Path) -> str:
    return (out / "answers.jsonl").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "local-vlm"
    shutil.copytree(vlm_path("tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short run on drawn scenes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(f"train {QUICK} --out", out)
    return out


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """An evaluation of the base model on six drawn scenes."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    run("eval --limit 6 --rollout_prompts 2 --out", out)
    return out


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory) -> Iterator[Path]:
    """A ViT-B checkpoint as its authors publish it, with random weights. It is deleted: 375 MB."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("sam") / "sam_vit_b_01ec64.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), file)
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def refcocog(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("refcocog")
    make_refcocog(root)
    return root


# --------------------------------------------------------------------------------------------------
# eval
# --------------------------------------------------------------------------------------------------


def test_eval_of_an_adapter_repeats_the_metrics_of_its_run(trained, tmp_path, capsys):
    out = tmp_path / "eval"
    run("eval --limit 3 --adapter", trained / "adapter", "--out", out)
    results = json.loads((out / "eval.json").read_text())
    after = json.loads((trained / "eval.json").read_text())["after"]
    assert {name: results["run"][name] for name in after} == after
    assert results["run"]["protocol"] == "lisa" and after["giou"] == results["run"]["lisa_giou"]
    rows = [json.loads(line) for line in answers(out).splitlines()]
    assert len({row["id"] for row in rows}) == 3
    assert results["run"]["giou"] == pytest.approx(np.mean([row["iou"] for row in rows]))
    assert Image.open(out / "sheet.png").width > 500
    assert {file.name for file in out.iterdir()} <= {runs.MARK, *runs.RUN_FILES}
    assert "gIoU" in capsys.readouterr().out


def test_an_interrupted_eval_continues(evaluated, tmp_path, monkeypatch):
    cut = Path(shutil.copytree(evaluated, tmp_path / "cut"))
    lines = answers(evaluated).splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed within a line
    evaluate_batch, indices = samr1_mini.evaluate_batch, []

    def noted(policy, scorer, batch, s):
        indices.extend(int(one.id.rsplit("-", 1)[1]) for one in batch)
        return evaluate_batch(policy, scorer, batch, s)

    monkeypatch.setattr(samr1_mini, "evaluate_batch", noted)
    run("eval --resume --out", cut)
    assert indices == [2, 3, 4, 5]
    assert answers(cut) == answers(evaluated)
    assert (cut / "eval.json").read_text() == (evaluated / "eval.json").read_text()


def test_a_skipped_sample_keeps_its_place_and_counts_in_no_metric(scorer):
    class Broken(Shapes):
        def __getitem__(self, index):
            if index % 3 == 1:
                raise BadSample(f"{index} is broken")
            return super().__getitem__(index)

    s = samr1_mini.parse_settings("eval", ["--rollout_prompts", "4"])
    policy = load_vlm("tiny", "cpu", 64, "brief")
    rows = samr1_mini.evaluate(policy, scorer, Broken("heldout"), s, 7, "")
    names = [f"shapes-heldout-0-{k}" if k % 3 != 1 else "skipped" for k in range(7)]
    assert [row.get("id", "skipped") for row in rows] == names
    assert [row["skipped"] for row in rows if "id" not in row] == ["1 is broken", "4 is broken"]
    for prefix in ("", "ceiling_"):
        assert samr1_mini.compute_metrics(rows, prefix)["n"] == 5


def test_metrics_of_no_sample_are_zero():
    metrics = samr1_mini.compute_metrics([{"skipped": "it is broken"}])
    names = ("giou", "ciou", "format", "box", "points", "boxonly", "n")
    assert metrics == dict.fromkeys(names, 0)


def test_metrics_with_ignored_pixels_and_an_empty_truth_by_hand(scorer, monkeypatch):
    """Three samples with these IoU.

    4 x 4 pixels found of 8 x 4, half of the others are ignored: 16 / 24. Nothing found of 10
    pixels: 0 / 10. Nothing found where nothing is: 1.
    """
    truth = np.zeros((3, 16, 16), bool)
    truth[0, :8, :4] = truth[1, :5, :2] = True
    ignore = np.zeros((16, 16), bool)
    ignore[4:6, :4] = True
    found = np.zeros((3, 16, 16), bool)
    found[0, :4, :4] = True
    rows = []
    for k in range(3):
        hidden = ignore if k == 0 else None
        one = Sample(Image.new("RGB", (16, 16)), "q", truth[k], hidden, str(k))
        best = (torch.full((1, 16, 16), -1.0), torch.tensor([True]))
        monkeypatch.setattr(scorer, "_best_logits", lambda *args, best=best: best)
        mask = torch.from_numpy(found[k])[None].float()
        monkeypatch.setattr(scorer.sam, "upsample", lambda *args, mask=mask: mask)
        overlap = scorer.score([one], [[SamPrompt(None, ())]])
        numbers = {key: getattr(overlap, key).item() for key in ("iou", "intersection", "union")}
        rows.append(numbers | {"format": True, "box_iou": 0.0})
        rows[-1] |= {"points_inside": k / 2, "boxonly_iou": k / 4}
    assert [(row["intersection"], row["union"]) for row in rows] == [(16, 24), (0, 10), (0, 0)]
    metrics = samr1_mini.compute_metrics(rows)
    assert metrics["giou"] == pytest.approx((16 / 24 + 0 + 1) / 3)
    assert metrics["ciou"] == pytest.approx(16 / (24 + 10))
    assert metrics["points"] == 0.5 and metrics["boxonly"] == 0.25


def test_three_prompts_are_scored_for_each_sample(scorer, monkeypatch):
    """The policy's; the true box with good points; the policy's box without its points."""
    policy, batch = load_vlm("tiny", "cpu", 64, "brief"), [Shapes("heldout")[i] for i in range(3)]
    box = '"bbox": [8, 8, 56, 56], "points_1": [10, 10]'
    y, x = np.argwhere(batch[0].mask)[0]
    width, height = batch[0].image.size
    inside = f'"points_2": [{(x + 0.5) * 64 / width}, {(y + 0.5) * 64 / height}]'
    answers = [f"{{{box}, {inside}}}", f"{{{box}}}", "no idea"]
    texts = [[f"<think>t</think><answer>{body}</answer>"] for body in answers]
    monkeypatch.setattr(policy, "texts", lambda _: texts)
    monkeypatch.setattr(samr1_mini, "sample_completions", lambda *_, **__: None)
    score, scored = scorer.score, []

    def noted(samples, prompts, keep_masks=False):
        scored.append((prompts, score(samples, prompts, keep_masks)))
        return scored[-1][1]

    monkeypatch.setattr(scorer, "score", noted)
    rows = samr1_mini.evaluate_batch(policy, scorer, batch, None)
    ((prompts, overlap),) = scored  # all in one call
    for b, (one, group) in enumerate(zip(batch, prompts, strict=True)):
        ours, ceiling, box_only = group
        assert ceiling == SamPrompt(reward.true_box(one.mask), interior_points(one.mask))
        assert box_only == SamPrompt(ours.box, ())
        assert (rows[b]["box"], rows[b]["points"]) == (ours.box, ours.points)
        for k, prefix in enumerate(("", "ceiling_", "boxonly_")):
            for name in ("intersection", "union", "iou"):
                assert rows[b][prefix + name] == getattr(overlap, name)[b, k].item()
    assert [len(row["points"]) for row in rows] == [2, 1, 0] and rows[2]["box"] is None
    for one, row in zip(batch, rows, strict=True):
        inside = sum(one.mask[int(y), int(x)] for x, y in row["points"])
        assert row["points_inside"] == inside / 2
    assert rows[0]["points_inside"] >= 0.5 and rows[2]["points_inside"] == 0
    assert [row["format"] for row in rows] == [True, False, False]
    scale = np.array(batch[0].image.size * 2) / 64
    assert rows[0]["box"] == pytest.approx(tuple(scale * (8, 8, 56, 56)))
    assert rows[2]["box_iou"] == 0 < rows[0]["box_iou"]


def test_the_true_box_is_the_tightest_one():
    mask = np.zeros((10, 20), bool)
    assert samr1_mini.true_box(mask) is None
    mask[3:5, 7:12] = True
    assert samr1_mini.true_box(mask) == (7, 3, 12, 5)


# --------------------------------------------------------------------------------------------------
# segment and merge
# --------------------------------------------------------------------------------------------------


def test_segment_draws_and_prints(tmp_path, capsys):
    image, _, query, _ = Shapes("heldout").scene(1)
    image.save(tmp_path / "scene.png")
    run("segment --image", tmp_path / "scene.png", "--query", query, "--out", tmp_path / "out.png")
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["query"] == query and "mask_pixels" in printed and "completion" in printed
    assert Image.open(tmp_path / "out.png").width > 300


def test_segment_rotates_a_picture_as_its_exif_data_say(evaluated, tmp_path, capsys):
    """A camera stores a picture on its side. SAM and the policy must see it upright."""
    image, exif = Shapes("heldout")[0].image, Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    row = json.loads(answers(evaluated).splitlines()[0])
    flags = ["--query", row["query"], "--out", tmp_path / "out.png"]
    run("segment --image", tmp_path / "stored.png", *flags)
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["completion"] == row["answer"] and printed["bbox"] == row["box"]


def test_segment_answers_as_eval_does(evaluated, tmp_path, capsys):
    rows = [json.loads(line) for line in answers(evaluated).splitlines()]
    Shapes("heldout")[0].image.save(tmp_path / "scene.png")
    flags = ["--query", rows[0]["query"], "--out", tmp_path / "out.png"]
    run("segment --image", tmp_path / "scene.png", *flags)
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["completion"] == rows[0]["answer"] and printed["bbox"] == rows[0]["box"]


# --------------------------------------------------------------------------------------------------
# --overwrite and --resume never touch other files
# --------------------------------------------------------------------------------------------------


def test_overwrite_never_deletes_a_model(policy_folder, tmp_path, capsys):
    model, link = tmp_path / "M", tmp_path / "link"
    shutil.copytree(policy_folder, model)
    link.symlink_to(model)
    before = contents(model)
    for vlm in (model, link):
        for out in (model, link):
            line = refused(capsys, "eval --limit 2 --overwrite --vlm", vlm, "--out", out)
            assert "--out" in line and str(vlm) in line
    for out in (model, link):  # here the model is not an input
        assert "other files" in refused(capsys, "eval --limit 2 --overwrite --out", out)
    assert contents(model) == before


def test_overwrite_never_deletes_a_folder_that_holds_more_than_a_run(
    policy_folder, evaluated, tmp_path, capsys
):
    both = tmp_path / "both"
    shutil.copytree(policy_folder, both)
    shutil.copytree(evaluated, both, dirs_exist_ok=True)
    before = contents(both)
    assert runs.MARK in before and "model.safetensors" in before
    line = refused(capsys, "eval --limit 2 --overwrite --out", both)
    assert "also holds" in line
    line = refused(capsys, "eval --limit 2 --overwrite --vlm", both, "--out", both)
    assert str(both) in line
    assert contents(both) == before


def test_overwrite_never_deletes_the_adapter_that_it_reads(trained, tmp_path, capsys):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    before = contents(copy)
    adapter = copy / "adapter"
    for out in (copy, adapter, tmp_path, copy / ".." / "run"):
        line = refused(capsys, "eval --limit 2 --overwrite --adapter", adapter, "--out", out)
        assert str(adapter) in line
    assert contents(copy) == before


def test_overwrite_never_deletes_data_or_weights(refcocog, tmp_path, capsys):
    root = Path(shutil.copytree(refcocog, tmp_path / "data"))
    weights = root / "sam.safetensors"
    shutil.copy(ROOT / "tiny" / "sam.safetensors", weights)
    (root / runs.MARK).write_text("eval")
    before = contents(root)
    for flags in (["--data", f"refcocog:{root}"], ["--data", f"refcocog:{root}/test"]):
        refused(capsys, "eval --overwrite", *flags, "--out", root)
    assert "sam.safetensors" in refused(
        capsys, "eval --overwrite --limit 2 --sam", f"tiny:{weights}", "--out", root
    )
    assert contents(root) == before


def test_only_a_marked_folder_is_replaced(evaluated, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("three years")
    refused(capsys, "eval --overwrite --limit 2 --out", tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"thesis.txt": b"three years"}
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    (copy / runs.MARK).unlink()  # then it is a folder with files like those of a run
    refused(capsys, "eval --overwrite --limit 2 --out", copy)
    assert answers(copy) == answers(evaluated)
    (copy / runs.MARK).write_text("eval")
    run("eval --overwrite --limit 2 --out", copy)
    assert len(answers(copy).splitlines()) == 2


def test_resume_needs_a_run_of_the_same_command(trained, evaluated, capsys):
    before = contents(trained), contents(evaluated)
    for command, out in (("train", evaluated), ("eval", trained)):
        assert str(out) in refused(capsys, f"{command} --resume --out", out)
    assert (contents(trained), contents(evaluated)) == before


@pytest.mark.parametrize("change", ["list", "unknown key", "missing key", "type", "cut", "no file"])
def test_a_damaged_config_is_reported(change, evaluated, tmp_path, capsys):
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    texts = {
        "list": "[{}]",
        "unknown key": json.dumps(config | {"colour": "red"}),
        "missing key": json.dumps({k: v for k, v in config.items() if k != "vlm"}),
        "type": json.dumps(config | {"limit": ["many"]}),
        "cut": json.dumps(config)[:50],
    }
    (copy / "config.json").unlink()
    if change in texts:
        (copy / "config.json").write_text(texts[change])
    assert "config.json" in refused(capsys, "eval --resume --out", copy)
    assert answers(copy) == answers(evaluated)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and holds hardly any."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp / "deep.png")
    (tmp / "empty").mkdir()
    torch.save({"weight": torch.zeros(3)}, tmp / "other.pth")
    weights = (ROOT / "tiny" / "sam.safetensors").read_bytes()
    (tmp / "cut.safetensors").write_bytes(weights[:5000])
    (tmp / "other_adapter").mkdir()
    (tmp / "other_adapter" / "adapter_config.json").write_text("{}")
    (tmp / "list_adapter").mkdir()
    (tmp / "list_adapter" / "adapter_config.json").write_text("[]")
    Image.new("RGB", (201, 1)).save(tmp / "thin.png")
    (tmp / "bomb.png").write_bytes(bomb(100_000, 100_000))
    return tmp


SEGMENT = "segment --query star --image {root}/assets/tiers.png"
BAD = {  # what is wrong: (command line, what the message must name)
    "flag": ("train --stepz 3", "--stepz"),
    "value": ("train --steps many", "--steps"),
    "choice": ("train --accuracy best", "--accuracy"),
    "preset": ("train --preset qwen72b", "--preset"),
    "stray word": ("train quickly", "quickly"),
    "flag of another command": ("eval --steps 3", "--steps"),
    "negative steps": ("train --steps -3", "--steps"),
    "negative seed": ("train --seed -1", "--seed"),
    "negative data seed": ("train --data_seed -1", "--data_seed"),
    "huge seed": ("train --seed 123456789012345678901234567890", "--seed"),
    "data seed of 70 bits": ("train --data_seed 1180591620717411303424", "--data_seed"),
    "seed of 70 bits": ("train --seed 1180591620717411303424", "--seed"),
    "huge side": ("train --side 1000000", "--side"),
    "huge side of segment": ("segment --side 1000000 --query star", "--side"),
    "huge rank": ("train --lora_rank 5000", "--lora_rank"),
    "huge limit": ("eval --max_new_tokens 5000", "--max_new_tokens"),
    "nan": ("train --lr nan", "--lr"),
    "infinity": ("train --beta inf", "--beta"),
    "no learning rate": ("train --lr 0", "--lr"),
    "temperature": ("train --temperature 0", "--temperature"),
    "nucleus": ("train --top_p 1.5", "--top_p"),
    "clip": ("train --eps_low 2", "--eps_low"),
    "group of one": ("train --group_size 1", "--group_size"),
    "mini-batches": ("train --prompts_per_step 8 --minibatches 3", "--minibatches"),
    "no mini-batch": ("train --minibatches 0", "--minibatches"),
    "no held-out samples": ("train --eval_samples 0", "--eval_samples"),
    "negative limit": ("eval --limit -1", "--limit"),
    "no batch": ("eval --rollout_prompts 0", "--rollout_prompts"),
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
    "out is a file": ("eval --limit 1 --out {tmp}/broken.png", "broken.png"),
    "out is a folder": ("segment --query x --image {root}/assets/tiers.png --out {tmp}", "--out"),
    "out without a suffix": (f"{SEGMENT} --out {{tmp}}/noext", "name the picture"),
    "out with another suffix": (f"{SEGMENT} --out {{tmp}}/out.txt", "name the picture"),
    "adapter that is a list": ("eval --adapter {tmp}/list_adapter", "list_adapter"),
    "image token": ("segment --image {root}/assets/tiers.png --query <|image_pad|>", "--query"),
    "lone surrogate": ("segment --image {root}/assets/tiers.png --query \udcff", "--query"),
    "thin image": ("segment --query star --image {tmp}/thin.png", "201 x 1"),
    "decompression bomb": ("segment --query star --image {tmp}/bomb.png", "too many pixels"),
    "16-bit image": ("segment --query star --image {tmp}/deep.png", "deep.png"),
    "no image": ("segment --query star", "--image"),
    "no query": ("segment --image {tmp}/broken.png", "--query"),
    "missing image": ("segment --query star --image {tmp}/none.png", "none.png"),
    "broken image": ("segment --query star --image {tmp}/broken.png", "broken.png"),
    "nothing to resume": ("train --resume --out {tmp}/none", "--resume"),
    "resume what": ("train --resume", "--out"),
    "resume and overwrite": ("eval --resume --overwrite --out {tmp}", "--overwrite"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(wrong, bad_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, named = BAD[wrong]
    assert named in refused(capsys, command.format(tmp=bad_files, root=ROOT))
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_help_lists_the_commands_and_the_settings(capsys):
    run("--help")
    assert "python samr1_mini.py segment" in capsys.readouterr().out
    for command in samr1_mini.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            run(f"{command} --help")
        printed = capsys.readouterr().out
        assert stopped.value.code == 0 and "--vlm" in printed
        assert ("--eps_high" in printed) == (command == "train")
        assert "models and device" in printed  # the settings come in groups


# --------------------------------------------------------------------------------------------------
# Real formats
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_eval_merge_on_refcocog(refcocog, policy_folder, tmp_path, capsys):
    data, run_folder = f"refcocog:{refcocog}", tmp_path / "run"
    run(f"train {QUICK} --vlm", policy_folder, "--data", data, "--out", run_folder)
    results = json.loads((run_folder / "eval.json").read_text())
    assert results["after"]["n"] == results["ceiling"]["n"] > 0
    test = ["--data", f"{data}/test", "--protocol", "segzero"]
    adapter = ["--adapter", run_folder / "adapter"]
    run("eval --vlm", policy_folder, *test, *adapter, "--out", tmp_path / "eval")
    printed = capsys.readouterr().out
    assert "gIoU 75.4, cIoU 73.1" in printed and "in the paper" in printed
    merge.main(["--adapter", str(run_folder / "adapter"), "--out", str(tmp_path / "merged")])
    run("eval --vlm", tmp_path / "merged", *test, "--out", tmp_path / "again")
    assert answers(tmp_path / "eval") == answers(tmp_path / "again")


@pytest.mark.slow
def test_bad_samples_are_skipped_and_counted(refcocog, policy_folder, tmp_path, capsys):
    root, out = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(refcocog, root)
    images = sorted(root.rglob("*.jpg"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    images[1].unlink()
    data = ["--data", f"refcocog:{root}"]
    run(f"train {QUICK} --steps 8 --vlm", policy_folder, *data, "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and sum(row["skipped"] for row in rows) > 0
    assert "skipped: " in capsys.readouterr().err


def test_eval_reports_skipped_samples(refcocog, policy_folder, tmp_path, capsys):
    root, out = Path(shutil.copytree(refcocog, tmp_path / "damaged")), tmp_path / "eval"
    heldout = samr1_mini.load_data(f"refcocog:{root}/test", "heldout")
    file_name = heldout.expressions[0].image[0]
    (heldout.folder / file_name).unlink()
    run("eval --vlm", policy_folder, "--data", f"refcocog:{root}/test", "--out", out)
    rows = [json.loads(line) for line in answers(out).splitlines()]
    skipped = [row for row in rows if "skipped" in row]
    assert skipped and len(skipped) < len(rows) == len(heldout)
    assert all(file_name in row["skipped"] for row in skipped)
    assert f"{len(skipped)} samples could not be used" in capsys.readouterr().out
    results = json.loads((out / "eval.json").read_text())
    assert {row["n"] for row in results.values()} == {len(rows) - len(skipped)}


@pytest.mark.slow
def test_eval_on_reasonseg_with_an_official_size_sam(policy_folder, tmp_path, capsys, monkeypatch):
    """ViT-B with two of its twelve layers: without and with global attention."""
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path / "reasonseg")
    size = dict(SAM_SIZES["vit_b"], depth=2, global_blocks=(1,))
    monkeypatch.setitem(SAM_SIZES, "vit_b", size)
    torch.save(build_sam(**size).state_dict(), tmp_path / "vit_b.pth")
    data = ["--data", f"reasonseg:{tmp_path / 'reasonseg'}/val"]
    data += ["--sam", f"vit_b:{tmp_path / 'vit_b.pth'}"]
    options = ["--out", tmp_path / "eval", "--protocol", "segzero"]
    run("eval --limit 1 --vlm", policy_folder, *data, *options)
    rows = [json.loads(line) for line in answers(tmp_path / "eval").splitlines()]
    columns = {"id", "query", "answer", "box", "points", "intersection", "union", "iou"}
    assert rows and all(columns <= set(row) for row in rows)
    assert "gIoU 64.0, cIoU 55.8" in capsys.readouterr().out


@pytest.mark.slow
def test_segment_with_an_official_size_sam(policy_folder, vit_b, tmp_path, capsys):
    photo, out = tmp_path / "photo.jpg", tmp_path / "out.png"
    noise = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo)
    flags = ["--vlm", policy_folder, "--sam", f"vit_b:{vit_b}", "--out", out]
    run("segment --query thing --image", photo, *flags)
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["picture"] == str(out) and out.is_file()


@pytest.mark.slow
def test_an_official_checkpoint_gives_the_model_that_the_package_builds(vit_b):
    """Every weight is in its place. test_reward.py shows that the attention is the same."""
    ours, theirs = load_sam(f"vit_b:{vit_b}"), sam_model_registry["vit_b"](checkpoint=str(vit_b))
    assert repr(ours).split()[1:] == repr(theirs).split()[1:]  # without "Sam1(" and "Sam("
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.slow
def test_bad_official_checkpoints_get_one_line(vit_b, tmp_path, capsys):
    (tmp_path / "sam_vit_b.pth").write_bytes(vit_b.read_bytes()[:1_000_000])
    assert "sam_vit_b.pth" in refused(capsys, "eval --sam", f"vit_b:{tmp_path}/sam_vit_b.pth")
    assert "vit_l" in refused(capsys, "eval --sam", f"vit_l:{vit_b}")


# --------------------------------------------------------------------------------------------------
# README and benchmarks
# --------------------------------------------------------------------------------------------------


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    tests = [line.strip() for line in readme.splitlines() if "-m pytest -q -n 2" in line]
    assert len(tests) == 1 and tests[0] in ci


def test_the_flags_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"samr1_mini\.py (train|eval|segment)([^\n`|]*)", readme)
    assert lines
    for command, rest in lines:
        fields = samr1_mini.parse_settings(command, []).__dataclass_fields__
        assert set(re.findall(r"--([a-z_]+)", rest)) <= {*fields, "help"}, rest


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_size_and_reports_a_missing_gpu(monkeypatch, capsys):
    from benchmarks import gpu_24gb

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_24gb.py"])
    gpu_24gb.main()
    assert "no CUDA device" in capsys.readouterr().out
    measured = gpu_24gb.run_part("qwen2b", steps=1, toy=True)
    last = measured["last_step"]
    assert 0 < last["length"] <= 8 and last["answer_format"] == 1  # the answers are fixed
    assert measured["first_ratio"] == 1 and measured["decoder_difference"] < 1e-4
    assert not measured["graph"] and not measured["waits"]
    result = {"device": "CPU", "torch": "2", "found": "toy", "parts": {"qwen2b": measured}}
    table = gpu_24gb.markdown(result).splitlines()
    assert table[-1].startswith("| qwen2b | ") and table[-1].count("|") == table[2].count("|")

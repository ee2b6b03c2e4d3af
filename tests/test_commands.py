"""Train, eval, segment and merge on real formats: miniature RefCOCOg and ReasonSeg, a policy in a local folder, an official-size
SAM checkpoint; and what the README shows beside its commands."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_reasonseg, make_refcocog
from PIL import Image
from segment_anything import sam_model_registry

import samr1_mini
from reward import load_sam

ROOT = Path(samr1_mini.__file__).parent
QUICK = "--steps 2 --prompts_per_step 2 --group_size 2 --eval_samples 3 --sample_every 100"


def run(command: str, *more: object) -> None:
    samr1_mini.main([*command.split(), *map(str, more)])


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "local-vlm"
    shutil.copytree(ROOT / "tiny" / "vlm", folder)
    return folder


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory) -> Iterator[Path]:
    """A ViT-B checkpoint as the authors publish them, but for its weights, which are random. 375 MB, so it goes afterwards."""
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


def test_train_eval_merge_on_refcocog(refcocog, policy_folder, tmp_path, capsys):
    data = f"refcocog:{refcocog}"
    run(f"train {QUICK} --vlm", policy_folder, "--data", data, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["after"]["n"] == results["ceiling"]["n"] > 0
    run("eval --vlm", policy_folder, "--data", f"{data}/test", "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "eval")
    said = capsys.readouterr().out
    assert "gIoU 75.4, cIoU 73.1" in said and "in the paper" in said  # the paper's row, and named as such
    run("merge --vlm", policy_folder, "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "merged")
    run("eval --vlm", tmp_path / "merged", "--data", f"{data}/test", "--out", tmp_path / "again")
    assert (tmp_path / "eval" / "answers.jsonl").read_text() == (tmp_path / "again" / "answers.jsonl").read_text()


def test_samples_that_cannot_be_used_are_skipped_and_counted(refcocog, policy_folder, tmp_path, capsys):
    root = tmp_path / "spoilt"
    shutil.copytree(refcocog, root)
    images = sorted(root.rglob("*.jpg"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    images[1].unlink()
    run(f"train {QUICK} --vlm", policy_folder, "--data", f"refcocog:{root}", "--steps", 8, "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and sum(row["skipped"] for row in rows) > 0
    assert "skipped: " in capsys.readouterr().err


def test_eval_on_reasonseg_with_an_official_size_sam(policy_folder, vit_b, tmp_path, capsys):
    make_reasonseg(tmp_path / "reasonseg")
    data = f"reasonseg:{tmp_path / 'reasonseg'}/val"
    run("eval --limit 1 --threads 2 --vlm", policy_folder, "--sam", f"vit_b:{vit_b}", "--data", data, "--out", tmp_path / "eval")
    rows = [json.loads(line) for line in (tmp_path / "eval" / "answers.jsonl").read_text().splitlines()]
    assert all({"id", "query", "answer", "box", "points", "intersection", "union", "iou"} <= set(row) for row in rows)
    assert "gIoU 64.0, cIoU 55.8" in capsys.readouterr().out


def test_segment_with_an_official_size_sam(policy_folder, vit_b, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    run("segment --threads 2 --query thing --image", tmp_path / "photo.jpg", "--vlm", policy_folder, "--sam", f"vit_b:{vit_b}", "--out", tmp_path / "o.png")
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["picture"] == str(tmp_path / "o.png")
    assert (tmp_path / "o.png").is_file()


def test_an_official_checkpoint_gives_the_model_that_the_package_builds(vit_b):
    """Every weight in its place; that the attention computes the same is shown at its true width in test_reward.py."""
    ours, theirs = load_sam(f"vit_b:{vit_b}"), sam_model_registry["vit_b"](checkpoint=str(vit_b))
    assert repr(ours).split() == repr(theirs).split()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_truncated_official_checkpoint_is_one_line(vit_b, tmp_path, capsys):
    (tmp_path / "sam_vit_b.pth").write_bytes(vit_b.read_bytes()[:1_000_000])
    with pytest.raises(SystemExit) as refused:
        run("eval --sam", f"vit_b:{tmp_path}/sam_vit_b.pth")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("samr1_mini.py")]
    assert refused.value.code == 2 and len(said) == 1 and "sam_vit_b.pth" in said[0]


def test_the_wrong_size_of_an_official_checkpoint_is_one_line(vit_b, capsys):
    with pytest.raises(SystemExit):
        run("eval --sam", f"vit_l:{vit_b}")
    assert "vit_l" in capsys.readouterr().err


def readme_block(language: str, holding: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if holding in block)


def test_the_readmes_trl_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    scope = {}
    exec(readme_block("python", "GRPOTrainer").replace("max_steps=100", "max_steps=2"), scope)
    log = scope["trainer"].state.log_history
    assert 0 < log[0]["rewards/sam_reward/mean"] <= 6


def test_the_readmes_peft_example_loads_an_adapter(tmp_path, monkeypatch):
    run("train --steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 2 --sample_every 9 --out", tmp_path / "runs" / "shapes-tiny-0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    scope = {}
    exec(readme_block("python", "PeftModel"), scope)
    assert any("lora_A" in name for name, _ in scope["model"].named_parameters())


def test_ci_runs_the_readmes_test_command():
    command = next(line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_gpu_benchmark_runs_at_toy_size_and_without_a_gpu_says_so(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_24gb", ROOT / "benchmarks" / "gpu_24gb.py")
    gpu_24gb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_24gb)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_24gb.py"])
    gpu_24gb.main()
    assert "no CUDA device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_24gb.py", "--toy", "--steps", "1"])
    gpu_24gb.main()
    measured = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert measured["length"] == 8 and measured["toy"]  # a random policy does not stop by itself

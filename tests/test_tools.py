"""Tests of tools/merge.py and tools/memory.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import samr1_mini
from plumbing.errors import UserError
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.transformers_sam import FAMILIES
from plumbing.vlm import load_vlm
from tools import memory, merge

ROOT = Path(merge.__file__).parent.parent


def run_module(*command: object) -> str:
    """Run a module as a user does. Returns what it prints."""
    arguments = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------------------------------
# merge
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(policy_parts, tmp_path) -> Path:
    """A random adapter of the tiny model, in the folder of a run."""
    policy_parts.model.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"vlm": "tiny"}))
    return tmp_path / "run" / "adapter"


def test_a_merged_model_has_the_logits_of_the_adapter(policy_parts, samples, adapter, tmp_path):
    out = tmp_path / "new" / "merged"
    printed = run_module("tools.merge", "--adapter", adapter, "--out", out)
    assert str(out) in printed and [file.name for file in out.parent.iterdir()] == ["merged"]
    merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert AutoProcessor.from_pretrained(out).chat_template
    inputs = policy_parts.read(samples[:2])
    with torch.no_grad():
        expected = policy_parts.model(**inputs).logits
        with policy_parts.model.disable_adapter():
            base = policy_parts.model(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-3, rtol=1e-3)
    assert (expected - base).abs().max() > 0.1


def test_a_merge_that_cannot_be_written_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge.os, "replace", full)  # its last step
    with pytest.raises(UserError, match=r"--out .*No space left"):
        merge.main(["--adapter", str(adapter), "--out", str(tmp_path / "out")])
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_bad_arguments_of_merge_are_named(adapter, tmp_path):
    def refused(adapter: Path, out: str, *more: str) -> str:
        with pytest.raises(UserError) as error:
            merge.main(["--adapter", str(adapter), "--out", str(tmp_path / out), *more])
        return str(error.value)

    assert "adapter_config.json" in refused(adapter.parent, "out", "--vlm", "tiny")
    assert "name a new folder" in refused(adapter, "run")
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "is damaged or truncated" in refused(adapter, "out")
    (adapter.parent / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # of a model
    assert "name the --vlm" in refused(adapter, "out")
    (adapter.parent / "config.json").unlink()
    assert "name the --vlm" in refused(adapter, "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# memory
# --------------------------------------------------------------------------------------------------

# Peaks of torch's caching allocator in GiB: real code at true sizes on a stubbed CUDA runtime, no
# kernel ran. Second of two steps of `python -m benchmarks.gpu_24gb`.
PEAKS = {
    "qwen2b": dict(rollout=8.56, reward=5.53, update=6.18),
    "qwen3b": dict(rollout=11.88, reward=10.96, update=10.20),
    "qwen3b --dtype 4bit": dict(rollout=7.93, reward=7.00, update=6.22),
    "qwen7b": dict(rollout=19.68, reward=19.60, update=20.10),
    "qwen7b --dtype 4bit": dict(rollout=10.65, reward=10.58, update=11.04),
}


def expected(flags: str) -> dict[str, memory.Parts]:
    return memory.expected_memory(parse_settings("train", flags.split()))


def total(parts: memory.Parts) -> int:
    return sum(size for size, _ in parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("flags", list(PEAKS))
def test_expected_memory_agrees_with_torchs_allocator(flags):
    phases = expected(f"--preset {flags}").items()
    peaks = {phase: total(parts) / 2**30 for phase, parts in phases}
    assert peaks == pytest.approx(PEAKS[flags], rel=0.05)


@pytest.mark.slow
def test_memory_prints_its_parts_and_downloads_nothing(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = run_module("tools.memory", "--preset", "qwen3b")
    assert "3.75e9 weights x 2 bytes" in printed  # the published size, vision tower included
    assert "expected peak: 12.0 GiB" in printed  # as README says


@pytest.mark.parametrize("vlm, published", [("2.5-VL-7B", 8.29e9), ("3-VL-2B", 2.13e9)])
def test_weights_of_the_policy_are_the_published_ones(vlm, published):
    size, _ = expected(f"--vlm Qwen/Qwen{vlm}-Instruct --side 840 --dtype float32")["update"][
        "policy weights"
    ]
    assert size == pytest.approx(4 * published, rel=0.01)


def test_memory_refuses_a_model_of_another_family(tmp_path):
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="llava"):
        memory.main(["--vlm", str(tmp_path)])


def test_the_expected_adapter_is_the_adapter_of_a_run():
    size, _ = expected("--lora_rank 5")["update"]["adapter"]
    model = samr1_mini.add_lora(load_vlm("tiny", device="cpu", side=64, prompt="brief").model, 5, 0)
    assert size == 16 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    "sam, prompts", [("tiny", 64), ("vit_b:FILE", 16), ("sam2:FOLDER", 8), ("sam3:FOLDER", 6)]
)
def test_sizes_of_the_segmenter_are_those_of_the_model(sam, prompts, tmp_path):
    size, _, _ = sam.partition(":")
    with torch.device("meta"):
        if size in FAMILIES:
            config = FAMILIES[size].config()
            config.save_pretrained(tmp_path)
            model = FAMILIES[size].model(config)
        else:
            model = build_sam(**SAM_SIZES[size])
    parts = expected(f"--sam {sam.replace('FOLDER', str(tmp_path))}")["reward"]
    # The fourth level of a SAM 3 is not loaded.
    used = [
        w for name, w in model.named_parameters() if ".fpn_layers.3." not in name or size != "sam3"
    ]
    assert parts["SAM weights"][0] == sum(weight.nbytes for weight in used)
    # The largest level of an official SAM has 4 MiB, that of a SAM 2 has 8, of a SAM 3 10.
    assert parts["SAM decoder"][1].startswith(f"{prompts} prompts x ")


@pytest.mark.parametrize(
    "flags",
    [
        "--vlm /no/folder",
        "--sam vit_x:FILE",
        "--sam sam2:/none",
        "--sam vit_b",
        "--side 70",
        "--dtype 4bit",
        "--device cuba",
        "--device meta",
        "--vlm ~/none",
        "--data refcocoh:data",
        "--data refcocog:data/val",
    ],
)
def test_memory_names_the_flag_that_cannot_be_used(flags):
    with pytest.raises(UserError, match=flags):
        memory.main(flags.split())

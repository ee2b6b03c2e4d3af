"""Tests of tools/merge.py and tools/memory.py."""

import json
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from makers import refused
from transformers import AutoModelForImageTextToText, AutoProcessor

import samr1_mini
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.transformers_sam import FAMILIES
from plumbing.vlm import load_vlm
from tools import memory, merge


@pytest.fixture
def adapter(policy_parts, tmp_path) -> Path:
    """A random adapter of the tiny model, in the folder of a run."""
    policy_parts.model.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"vlm": "tiny"}))
    return tmp_path / "run" / "adapter"


@pytest.fixture
def run_module(monkeypatch, capsys):
    """A function that runs a module as `python -m` does, here, and returns what it prints."""

    def run(name: str, *flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.delitem(sys.modules, name)  # else runpy warns
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


def test_a_merged_model_has_the_logits_of_the_adapter(
    policy_parts, samples, adapter, tmp_path, run_module
):
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


def test_a_merge_that_cannot_be_done_is_named_and_leaves_nothing(adapter, tmp_path, monkeypatch):
    run_folder, new = adapter.parent, f"--out={tmp_path / 'out'}"

    def said(*flags: object) -> str:
        return refused(merge.main, [*map(str, flags)])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge.os, "replace", full)  # its last step
        assert "--out" in (message := said("--adapter", adapter, new)) and "No space" in message
    assert "adapter_config.json" in said("--adapter", run_folder, new, "--vlm=tiny")
    assert "name a new folder" in said("--adapter", adapter, "--out", run_folder)
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "is damaged or truncated" in said("--adapter", adapter, new)
    (run_folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # of a model
    assert "name the --vlm" in said("--adapter", adapter, new)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


# Peaks of torch's caching allocator in GiB: real code at true sizes on a stubbed CUDA runtime, no
# kernel ran. Second of two steps of `python -m benchmarks.gpu_24gb`.
PEAKS = {
    "qwen2b": dict(rollout=8.49, reward=5.46, update=6.24),
    "qwen3b": dict(rollout=11.95, reward=10.89, update=10.22),
    "qwen3b --dtype 4bit": dict(rollout=7.93, reward=7.00, update=6.22),
    "qwen7b": dict(rollout=19.64, reward=19.53, update=20.14),
    "qwen7b --dtype 4bit": dict(rollout=10.62, reward=10.50, update=11.08),
}


def expected(flags: str) -> dict[str, memory.Parts]:
    return memory.expected_memory(parse_settings("train", flags.split()))


@pytest.mark.slow
@pytest.mark.parametrize("flags", list(PEAKS))
def test_expected_memory_agrees_with_torchs_allocator(flags):
    for phase, parts in expected(f"--preset {flags}").items():
        peak = sum(size for size, _ in parts.values()) / 2**30
        assert peak == pytest.approx(PEAKS[flags][phase], rel=0.05)


def test_memory_prints_its_parts_and_downloads_nothing(monkeypatch, run_module):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a download"))
    printed = run_module("tools.memory", "--preset", "qwen3b")
    assert "3.75e9 weights x 2 bytes" in printed  # the published size, vision tower included
    assert "expected peak: 12.0 GiB" in printed  # as README says


@pytest.mark.parametrize("vlm, published", [("2.5-VL-7B", 8.29e9), ("3-VL-2B", 2.13e9)])
def test_weights_of_the_policy_are_the_published_ones(vlm, published):
    parts = expected(f"--vlm Qwen/Qwen{vlm}-Instruct --side 840 --dtype float32")["update"]
    assert parts["policy weights"][0] == pytest.approx(4 * published, rel=0.01)


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
    unused = ".fpn_layers.3." if size == "sam3" else "none"
    used = sum(weight.nbytes for name, weight in model.named_parameters() if unused not in name)
    assert parts["SAM weights"][0] == used
    # The largest level of an official SAM has 4 MiB, that of a SAM 2 has 8, of a SAM 3 10.
    assert parts["SAM decoder"][1].startswith(f"{prompts} prompts x ")


UNUSABLE = "--vlm ~/none, --sam vit_x:FILE, --sam sam2:/none, --sam vit_b, --side 70"
UNUSABLE += ", --dtype 4bit, --device meta, --data refcocog:data/val"


@pytest.mark.parametrize("flags", UNUSABLE.split(", "))
def test_memory_names_the_flag_that_cannot_be_used(flags):
    assert flags in refused(memory.main, flags.split())


def test_memory_refuses_a_model_of_another_family(tmp_path):
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "llava" in refused(memory.main, ["--vlm", str(tmp_path)])

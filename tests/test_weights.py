"""Weights that do not fit are refused in one line, at each door; what fits is used whole."""

import json
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from makers import refused
from peft import LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import samr1_mini
from plumbing import runs
from plumbing.errors import UserError
from plumbing.foreign import continue_adapter, load_adapter
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.vlm import load_vlm, vlm_path
from tools import merge

TINY = Path(vlm_path("tiny"))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7e7e\nsize 356176\n"
QUICK = "--prompts_per_step 2 --group_size 2"


def edit(file: Path, *path: str, value: object) -> None:
    """Set one value in a JSON file."""
    config = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))


def rewrite(file: Path, change) -> None:
    """Apply a function of {key: tensor} to a safetensors file."""
    save_file(change(load_file(file)), file, {"format": "pt"})


def spoil(file: Path, change) -> None:
    """Apply one of the changes of the tables below to a file."""
    if callable(change):
        rewrite(file, change)
    elif isinstance(change, tuple):
        edit(file, *change[:-1], value=change[-1])
    elif change == "delete":
        file.unlink()
    elif change == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "zero":
        file.write_bytes(file.read_bytes()[:-5000] + bytes(5000))
    else:
        file.write_text(change)


@pytest.fixture
def vlm(tmp_path) -> Path:
    """A copy of the tiny VLM."""
    return Path(shutil.copytree(TINY, tmp_path / "vlm"))


def open_tiny(folder: Path = TINY, **options: object):
    common = {"name": str(folder), "device": "cpu", "side": 64, "prompt": "brief"}
    return load_vlm(**common | options)


def not_finite(held: dict) -> dict:
    return {key: held[key] / 0 for key in held}


def old_names(held: dict) -> dict:
    return {key.replace("model.language_model.layers", "model.layers"): held[key] for key in held}


MODEL = "model.safetensors"
CONFIG = "config.json"
NORM = "model.norm.weight"
SPOILED_VLMS = [  # file, change, what the message must match
    (MODEL, lambda w: {f"module.{key}": w[key] for key in w}, "lacks .*has 68 that .*module.model"),
    (MODEL, lambda w: w | {NORM: torch.full((96,), torch.nan)}, "1 weights are not finite .*norm"),
    (MODEL, lambda w: w | {NORM: torch.ones(95)}, "norm.weight: 95 in place of 96"),
    (MODEL, lambda w: {k: w[k].to(torch.int8) for k in w}, "holds quantised weights"),
    (MODEL, POINTER, "model.safetensors is a git-lfs pointer"),
    (MODEL, "delete", "model.safetensors"),
    (MODEL, "", "model.safetensors is empty"),
    (MODEL, "truncate", "model.safetensors is damaged or truncated"),
    (MODEL, "zero", "model.safetensors ends in zeros"),
    ("tokenizer.json", "delete", "tokenizer"),
    ("tokenizer_config.json", "delete", "tokenizer_config.json is missing"),
    ("chat_template.jinja", "delete", "chat template"),
    ("chat_template.jinja", "{{ messages[0].content[-1].text }}", "template leaves the image out"),
    ("processor_config.json", "delete", "image processor"),
    # What would be used wrongly.
    (CONFIG, ("model_type", "qwen2_vl"), "it is a qwen2_vl: use a Qwen2.5-VL or a"),
    (CONFIG, ("text_config", "layer_types", 0, "linear_attention"), "linear_attention"),
    (CONFIG, ("image_token_id", 6), "of another model"),
    ("generation_config.json", ("eos_token_id", [1, 151645]), "of another model"),
    (CONFIG, ("quantization_config", {"quant_method": "awq", "bits": 4}), r"\(awq\)"),
    ("processor_config.json", ("image_processor", "patch_size", 14), "of another model"),
]


@pytest.mark.parametrize("name, change, message", SPOILED_VLMS)
def test_a_model_that_is_not_whole_is_refused(name, change, message, vlm):
    spoil(vlm / name, change)
    with pytest.raises(UserError, match=f"--vlm .*{message}"):
        open_tiny(vlm)


def test_code_in_the_folder_of_a_model_does_not_run(vlm, tmp_path):
    edit(vlm / CONFIG, "model_type", value="own")
    edit(vlm / CONFIG, "auto_map", value={"AutoConfig": "own.Config"})
    (vlm / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(open_tiny, vlm)
    assert not (tmp_path / "ran").exists()


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / MODEL), folder / "pytorch_model.bin")
    (folder / MODEL).unlink()


def write_head(folder: Path) -> None:
    rewrite(folder / MODEL, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 0})


def leave_pointer(folder: Path) -> None:
    (folder / "tf_model.h5").write_text(POINTER)


@pytest.mark.parametrize("change", [to_bin, write_head, leave_pointer])
def test_a_model_that_fits_is_loaded(change, vlm, monkeypatch):
    monkeypatch.setenv("HOME", str(vlm.parent))
    change(vlm)
    weight = open_tiny(Path("~/vlm")).model.lm_head.weight
    torch.testing.assert_close(weight, open_tiny().model.lm_head.weight, atol=0.02, rtol=0.02)


def test_weights_that_overflow_in_float16_name_the_dtype(vlm):
    rewrite(vlm / MODEL, lambda w: w | {NORM: torch.full((96,), 1e5)})
    open_tiny(vlm)
    assert "use --dtype bfloat16 or float32" in refused(open_tiny, vlm, dtype="float16")


def missing(request, response):
    return response(404, headers={"X-Error-Code": "RepoNotFound"})


def gated(request, response):
    """As for facebook/sam3: all may see the page, few may fetch the files."""
    if request.url.path == "/api/models/owner/model":
        return response(200, json={"id": "owner/model", "gated": "manual"})
    return response(401, headers={"X-Error-Code": "GatedRepo"})


def offline(request, response):
    raise OSError("no network")


@pytest.mark.parametrize("flag", ["--vlm=owner/model", "--sam=sam3:owner/model"])
@pytest.mark.parametrize(
    "answer, message",
    [
        (missing, "the hub has no model of this name"),
        (gated, "access on https://huggingface.co/owner/model, then run `hf auth login`"),
        (offline, "it cannot be loaded"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_at_once(flag, answer, message, monkeypatch):
    """Without a network, transformers would ask for each file again and again."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP package of this version of huggingface_hub.
    package = __import__(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    transport = package.MockTransport(lambda request: answer(request, package.Response))
    client = package.Client(transport=transport)
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", client)
    started = time.perf_counter()
    said = refused(samr1_mini.evaluate_adapter, samr1_mini.parse_settings("eval", [flag]))
    assert said.startswith(flag.replace("=", " ")) and message in said
    assert time.perf_counter() - started < 10


def test_a_side_that_the_processor_changes_is_refused(vlm):
    """Every box would be scaled wrongly: gIoU 0.076 in place of 0.481."""
    message = "makes 64 x 64 pixels of it: use --side 64"
    assert message in refused(open_tiny, vlm, side=128)
    assert message in refused(open_tiny, vlm, side=50)
    size = {"shortest_edge": 256, "longest_edge": 2304}
    edit(vlm / "processor_config.json", "image_processor", "size", value=size)
    assert open_tiny(vlm, side=48).extent == 48


def lora(**options: object) -> LoraConfig:
    common = {"r": 4, "target_modules": samr1_mini.LORA_TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**common | options)


def save_adapter(folder: Path, config=None, **options: object) -> torch.Tensor:
    """Write an adapter of the tiny model, and return its logits of one prompt."""
    policy = open_tiny("tiny")
    with warnings.catch_warnings(action="ignore"):  # peft's, about tied weights
        model = get_peft_model(policy.model, config or lora())
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn_like(weight))
        model.save_pretrained(folder, **options)
    return merge.logits(model.get_base_model(), merge.one_prompt(policy.processor))


FILE = "adapter_model.safetensors"
SPOILED_ADAPTERS = [
    (FILE, old_names, "lacks 42 .*has 42 .*model.layers.*trained on tiny/vlm"),
    (FILE, not_finite, "42 weights are not finite"),
    (FILE, lambda w: {k: w[k].repeat(2, 2) for k in w}, "42 in another size .* in pl"),
    (FILE, "truncate", f"{FILE} is damaged or truncated"),
    (FILE, "delete", f"there is no {FILE}"),
    ("adapter_config.json", POINTER, "adapter_config.json is a git-lfs pointer"),
    ("adapter_config.json", "truncate", "adapter_config.json is damaged"),
]


@pytest.mark.parametrize("name, change, message", SPOILED_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(name, change, message, tmp_path):
    """By the one function that eval, segment, the demo and tools.merge load adapters with."""
    save_adapter(tmp_path)
    spoil(tmp_path / name, change)
    with pytest.raises(UserError, match=f"--adapter .*{message}"):
        open_tiny("tiny", adapter=str(tmp_path))


def test_an_adapter_that_our_passes_would_leave_out_is_refused(tmp_path):
    """Virtual tokens are added by peft's wrapper, which rollout and log-probs do not call."""
    model = open_tiny().model
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompt).save_pretrained(tmp_path)
    assert "it holds a prompt" in refused(open_tiny, adapter=str(tmp_path))


FITTING = {
    "bin": (lora(), {"safe_serialization": False}),
    "modules_to_save": (lora(modules_to_save=["norm"]), {}),
    "dora": (lora(use_dora=True), {}),
    "rslora": (lora(use_rslora=True), {}),
    "patterns": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}), {}),
    "biases": (lora(bias="lora_only"), {}),
    "pissa": (lora(init_lora_weights="pissa"), {}),
    "tokens": (lora(trainable_token_indices=[3, 5]), {}),
    "parameters": (lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]), {}),
    "head": (lora(target_modules=["lm_head"]), {"save_embedding_layers": True}),
    "some layers": (lora(target_modules=["q_proj"], layers_to_transform=[0, 2]), {}),
}


@pytest.mark.parametrize("kind", FITTING)
def test_an_adapter_that_fits_is_used_whole(kind, tmp_path):
    config, options = FITTING[kind]
    expected = save_adapter(tmp_path, config, **options)
    policy = open_tiny()
    inputs = merge.one_prompt(policy.processor)
    base = merge.logits(policy.model, inputs)
    found = merge.logits(load_adapter(policy.model, str(tmp_path)), inputs)
    torch.testing.assert_close(found, expected)
    assert (found - base).abs().max() > 0.1


NOT_CONTINUED = {
    "rank": (lora(r=8), "its rank is 8: use --lora_rank 8"),
    "fewer layers": (lora(target_modules=["q_proj"]), "lacks 36 of its weights.*tiny/vlm"),
    "dora": (lora(use_dora=True), "it is a variant of LoRA"),
    "rslora": (lora(use_rslora=True), "it is a variant of LoRA"),
    "pissa": (lora(init_lora_weights="pissa"), "it is a variant of LoRA"),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "a prompt"),
    "layer norms": (LNTuningConfig(target_modules=["norm"]), "not LoRA"),
}


@pytest.mark.parametrize("kind", NOT_CONTINUED)
def test_an_adapter_that_training_cannot_continue_is_refused(kind, tmp_path):
    config, message = NOT_CONTINUED[kind]
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(open_tiny().model, config).save_pretrained(tmp_path)
    model = samr1_mini.add_lora(open_tiny().model, rank=4, seed=0)
    with pytest.raises(UserError, match=f"--adapter .*{message}"):
        continue_adapter(model, str(tmp_path))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_cannot_be_merged_is_refused(target, tmp_path):
    """Of tied weights: the lm_head's would change the input embeddings too."""
    save_adapter(tmp_path / "adapter", lora(target_modules=[target, "q_proj"]))
    message = refused(merge.merge, "tiny", tmp_path / "adapter", tmp_path / "out")
    assert "cannot be merged" in message and "tied lm_head" in message
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_rounding_is_no_reason_to_refuse_a_merge(vlm, tmp_path):
    rewrite(vlm / MODEL, lambda w: {key: tensor.bfloat16() for key, tensor in w.items()})
    edit(vlm / "config.json", "dtype", value="bfloat16")
    save_adapter(tmp_path / "adapter")
    merge.merge(str(vlm), tmp_path / "adapter", tmp_path / "out")
    assert open_tiny(tmp_path / "out").model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_training_that_diverges_keeps_the_last_checkpoint(passes, tmp_path, monkeypatch):
    """With one update a step, the next rollout notices it; with more, the next update does."""
    monkeypatch.setattr(samr1_mini, "set_learning_rate", diverge_at_step_2)
    monkeypatch.setattr(samr1_mini, "SAVE_EVERY", 1)
    flags = f"{QUICK} --steps 4 --epochs {passes} --minibatches {passes} --out"
    message = refused(samr1_mini.main, ["train", *flags.split(), str(tmp_path)])
    assert "--lr" in message and "the last checkpoint stays" in message
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(weight.isfinite().all() for weight in state["adapter"].values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def diverge_at_step_2(optimizer, s, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = 1e20 if step == 2 else 1e-3
    return 1e-3


def checkpoint(folder: Path, scale: float = 1.0) -> runs.Checkpoint:
    model = samr1_mini.add_lora(open_tiny().model, rank=4, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", scale)
    return runs.Checkpoint(folder, model, optimizer, torch.Generator(), scaler)


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    spoiled = checkpoint(tmp_path / "run")
    with torch.no_grad():
        next(p for p in spoiled.model.parameters() if p.requires_grad)[0, 0] = torch.inf
    message = refused(spoiled.save, 3, samr1_mini.parse_settings("train", []), {})
    assert "step 3: 1 weights are not finite" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval --limit 2", f"train {QUICK} --steps 1"])
def test_logits_that_overflow_are_refused(command, vlm, tmp_path):
    """Finite weights, whose products float16 cannot hold. Greedy: a table of zeros."""
    large = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate")]
    rewrite(vlm / MODEL, lambda w: w | {name: w[name] * 2000 for name in large})
    flags = ["--vlm", str(vlm), "--dtype", "float16", "--out", str(tmp_path / "out")]
    assert "not finite in torch.float16" in refused(samr1_mini.main, [*command.split(), *flags])
    assert not (tmp_path / "out" / "eval.json").exists()


def test_the_scale_of_float16_is_resumed(tmp_path):
    """An older checkpoint has none."""
    results = {"before": METRICS, "ceiling": METRICS}
    checkpoint(tmp_path, scale=64.0).save(1, samr1_mini.parse_settings("train", []), results)
    file = tmp_path / "checkpoint" / "state.pt"
    state = torch.load(file, weights_only=True)
    for expected in (64, 2):
        other = checkpoint(tmp_path, scale=2.0)
        other.load()
        assert other.scaler.get_scale() == expected
        state.pop("scaler", None)
        torch.save(state, file)


def prefixed(held: dict, prefix: str) -> dict:
    return {prefix + key: held[key] for key in held}


WRAPPED = {
    "model": lambda w: {"model": w, "optimizer": {"state": {}}, "epoch": 3},
    "state_dict": lambda w: {"state_dict": prefixed(w, "model."), "epoch": 3},
    "module.model": lambda w: prefixed(w, "module.model."),
    "buffers": lambda w: prefixed(w | {"pixel_mean": torch.zeros(3), "pixel_std": 1}, "module."),
    "half": lambda w: {key: w[key].half() for key in w},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_checkpoint_of_sam_is_unwrapped(kind, sam, tmp_path):
    file = tmp_path / "sam.pth"
    torch.save(WRAPPED[kind](sam.state_dict()), file)
    model = load_sam(f"tiny:{file}")
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    found = model.state_dict()
    for key, tensor in sam.state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-3, rtol=1e-3)


def other_sam(held: dict) -> dict:
    return build_sam(**SAM_SIZES["tiny"] | {"mlp": 64}).state_dict()


SPOILED_SAMS = [
    (lambda w: dict(list(w.items())[:50]), r"lacks \d+ .*name the size"),
    (lambda w: w | {"hf_token": torch.ones(1)}, r"does not have \(hf_token\)"),
    (not_finite, "not finite.*fetch it again"),
    (list, "holds a list"),
    (other_sam, "64 in place of 128"),
]


@pytest.mark.parametrize("change, message", SPOILED_SAMS)
def test_a_checkpoint_that_is_not_this_sam_is_refused(change, message, sam, tmp_path):
    torch.save(change(sam.state_dict()), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=f"--sam tiny:.*sam.pth.*{message}"):
        load_sam(f"tiny:{tmp_path / 'sam.pth'}")


def to_int8(held: dict) -> dict:
    return {key: (held[key] * 10).to(torch.int8) for key in held}


@pytest.mark.parametrize(
    "change, message",
    [
        (to_int8, r"\(torch.int8\) holds no floating"),
        (lambda w: {key: w[key].to("meta") for key in w}, "holds no floating"),
        (lambda w: w | {3: torch.ones(1), "b": torch.ones(1)}, r"does not have \(3\)"),
        (lambda w: {"model": w | {3: torch.ones(1), "b": torch.ones(1)}}, r"does not have \(3\)"),
    ],
)
def test_a_pickle_of_sam_that_holds_other_things_is_refused(change, message, sam, tmp_path):
    torch.save(change(sam.state_dict()), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=f"--sam .*{message}"):
        load_sam(f"tiny:{tmp_path / 'sam.pth'}")


@pytest.mark.parametrize(
    "change, message",
    [
        (to_int8, "holds quantised weights"),
        (lambda w: w | {"epoch": 3}, r"epoch \(int\) holds no floating"),
        (lambda w: w | {3: torch.ones(1)}, "cannot be loaded"),
    ],
)
def test_a_pickle_of_an_adapter_that_holds_other_things_is_refused(change, message, tmp_path):
    save_adapter(tmp_path)
    torch.save(change(load_file(tmp_path / FILE)), tmp_path / "adapter_model.bin")
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match=f"--adapter .*{message}"):
        open_tiny("tiny", adapter=str(tmp_path))


def test_a_pickle_of_a_model_with_quantised_weights_is_refused(vlm):
    torch.save(to_int8(load_file(vlm / MODEL)), vlm / "pytorch_model.bin")
    open_tiny(vlm)  # the other file is read
    (vlm / MODEL).unlink()
    assert "pytorch_model.bin holds quantised weights" in refused(open_tiny, vlm)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("use_new_method", True, "this peft does not know its use_new_method"),
        ("use_new_method", False, ""),
        ("new_method_config", {}, ""),
        ("init_lora_weights", "pissa_niter_4", "found at random"),
        ("alora_invocation_tokens", [1, 2], "acts after some tokens only"),
        ("lora_alpha", 0, "it does nothing"),
    ],
)
def test_what_peft_or_our_passes_would_leave_out_is_refused(key, value, message, tmp_path):
    save_adapter(tmp_path)
    edit(tmp_path / "adapter_config.json", key, value=value)
    if message:
        assert message in refused(open_tiny, adapter=str(tmp_path))
    else:
        open_tiny(adapter=str(tmp_path))


METRICS = {"giou": 0.5, "ciou": 0.5, "n": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"results": {}},  # the trained policy would be evaluated as the one before training
        {"results": {"before": METRICS}},
        {"results": {"before": METRICS, "ceiling": METRICS | {"giou": "0.5"}}},
    ],
)
def test_a_checkpoint_of_another_form_is_refused(change, tmp_path):
    before = checkpoint(tmp_path)
    results = {"before": METRICS, "ceiling": METRICS}
    before.save(1, samr1_mini.parse_settings("train", []), results)
    assert checkpoint(tmp_path).load() == (1, results)
    torch.save(torch.load(before.file, weights_only=True) | change, before.file)
    assert "does not fit" in refused(checkpoint(tmp_path).load)

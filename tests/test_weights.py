"""Weights that do not fit are refused in one line, at each door; what fits is used whole."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from makers import refused
from peft import LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import samr1_mini
from plumbing import runs
from plumbing.errors import UserError
from plumbing.foreign import continue_adapter, load_adapter
from plumbing.sam import load_sam
from plumbing.vlm import load_vlm, vlm_path
from tools import merge

TINY = Path(vlm_path("tiny"))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7e7e\nsize 356176\n"


def spoil(file: Path, change) -> None:
    """Change a file: the weights by a function, a value of JSON by a tuple (key, ..., value). Or
    "delete", "truncate", "zero" it, or write any other text.

    A .bin is made of the safetensors in its folder, and replaces it.
    """
    if callable(change):
        (held,) = file.parent.glob("*.safetensors")
        weights = change(load_file(held))
        held.unlink()
        if file.suffix == ".bin":
            torch.save(weights, file)
        else:
            save_file(weights, file, {"format": "pt"})
    elif isinstance(change, tuple):
        *path, key, value = change
        config = inner = json.loads(file.read_text())
        for outer in path:
            inner = inner[outer]
        inner[key] = value
        file.write_text(json.dumps(config))
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


def to_int8(held: dict) -> dict:
    return {key: (held[key] * 10).to(torch.int8) for key in held}


def to_float8(held: dict) -> dict:
    return {key: held[key].to(torch.float8_e4m3fn) for key in held}


MODEL = "model.safetensors"
CONFIG = "config.json"
NORM = "model.norm.weight"
SPOILED_VLMS = [  # file, change, what the message must match
    (MODEL, lambda w: {f"module.{key}": w[key] for key in w}, "lacks .*has 68 that .*module.model"),
    (MODEL, lambda w: w | {NORM: torch.full((96,), torch.nan)}, "1 weights are not finite .*norm"),
    (MODEL, lambda w: w | {NORM: torch.ones(95)}, "norm.weight: 95 in place of 96"),
    (MODEL, to_int8, "model.safetensors holds quantised weights"),
    (MODEL, to_float8, "model.safetensors holds quantised weights"),
    ("pytorch_model.bin", to_int8, "pytorch_model.bin holds quantised weights"),
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
    spoil(vlm / CONFIG, ("model_type", "own"))
    spoil(vlm / CONFIG, ("auto_map", {"AutoConfig": "own.Config"}))
    (vlm / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(open_tiny, vlm)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [MODEL, "pytorch_model.bin"])
def test_a_model_that_fits_is_loaded(name, vlm, monkeypatch):
    """With a copy of the weight that lm_head shares, and beside files that are not read."""
    monkeypatch.setenv("HOME", str(vlm.parent))
    for other in {"tf_model.h5", "pytorch_model.bin"} - {name}:
        (vlm / other).write_text(POINTER)
    spoil(vlm / name, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 0})
    found = open_tiny(Path("~/vlm")).model.state_dict()
    assert all(torch.equal(found[key], x) for key, x in open_tiny().model.state_dict().items())


def test_weights_that_overflow_in_float16_name_the_dtype(vlm):
    spoil(vlm / MODEL, lambda w: w | {NORM: torch.full((96,), 1e5)})
    open_tiny(vlm)
    assert "use --dtype bfloat16 or float32" in refused(open_tiny, vlm, dtype="float16")


@pytest.mark.parametrize("flag", ["--vlm=owner/model", "--sam=sam3:owner/model"])
@pytest.mark.parametrize(
    "code, message",
    [
        ("RepoNotFound", "the hub has no model of this name"),
        ("GatedRepo", "access on https://huggingface.co/owner/model, then run `hf auth login`"),
        ("", "it cannot be loaded"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_at_once(flag, code, message, monkeypatch):
    """Without a network, transformers would ask for each file again and again."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP package of this version of huggingface_hub.
    package = __import__(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    asked = []

    def answer(request):
        asked.append(request.url.path)
        if not code:
            raise OSError("no network")
        if code == "GatedRepo" and request.url.path == "/api/models/owner/model":
            return package.Response(200, json={"id": "owner/model"})  # all may see the page
        return package.Response(401, headers={"X-Error-Code": code})

    client = package.Client(transport=package.MockTransport(answer))
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", client)
    said = refused(samr1_mini.evaluate_adapter, samr1_mini.parse_settings("eval", [flag]))
    assert said.startswith(flag.replace("=", " ")) and message in said
    assert code or len(asked) == 1


def test_a_side_that_the_processor_changes_is_refused(vlm):
    """Every box would be scaled wrongly: gIoU 0.076 in place of 0.481."""
    message = "makes 64 x 64 pixels of it: use --side 64"
    assert message in refused(open_tiny, vlm, side=128)
    assert message in refused(open_tiny, vlm, side=50)
    size = {"shortest_edge": 256, "longest_edge": 2304}
    spoil(vlm / "processor_config.json", ("image_processor", "size", size))
    assert open_tiny(vlm, side=48).extent == 48


def lora(**options: object) -> LoraConfig:
    common = {"r": 4, "target_modules": samr1_mini.LORA_TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**common | options)


def one_prompt(processor) -> dict[str, torch.Tensor]:
    image = Image.linear_gradient("L").convert("RGB")
    text = f"{processor.image_token}find the red square"
    return processor(text=[text], images=[image], return_tensors="pt")


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
    return merge.logits(model.get_base_model(), one_prompt(policy.processor))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder)
    return folder


FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
SPOILED_ADAPTERS = [
    (FILE, old_names, "lacks 42 .*has 42 .*model.layers.*trained on tiny/vlm"),
    (FILE, lambda w: {}, "lacks 42 of its weights"),
    (FILE, lambda w: {k: w[k].repeat(2, 2) for k in w}, "42 in another size .* in pl"),
    (FILE, not_finite, "42 weights are not finite"),
    (FILE, "truncate", f"{FILE} is damaged or truncated"),
    (FILE, "delete", f"there is no {FILE}"),
    (PICKLE, to_int8, "holds quantised weights"),
    (PICKLE, to_float8, "holds quantised weights"),
    (PICKLE, lambda w: w | {"epoch": 3}, r"epoch \(int\) holds no floating"),
    (PICKLE, lambda w: w | {3: torch.ones(1)}, "cannot be loaded"),
    (ADAPTER_CONFIG, POINTER, "adapter_config.json is a git-lfs pointer"),
    (ADAPTER_CONFIG, "truncate", "adapter_config.json is damaged"),
    # What peft or our passes would leave out.
    (ADAPTER_CONFIG, ("use_new_method", True), "this peft does not know its use_new_method"),
    (ADAPTER_CONFIG, ("lora_alpha", 0), "it would do nothing"),
    (ADAPTER_CONFIG, ("lora_alpha", None), "it would do nothing"),
    (ADAPTER_CONFIG, ("alpha_pattern", {"q_proj": 0}), "it would do nothing"),
    (ADAPTER_CONFIG, ("init_lora_weights", "pissa_niter_4"), "found at random"),
    (ADAPTER_CONFIG, ("alora_invocation_tokens", [1, 2]), "acts after some tokens only"),
]


@pytest.mark.parametrize("name, change, message", SPOILED_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(name, change, message, trained, tmp_path):
    """By the one function that eval, segment, the demo and tools.merge load adapters with."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / name, change)
    with pytest.raises(UserError, match=f"--adapter .*{message}"):
        open_tiny("tiny", adapter=str(tmp_path))


FITTING = {
    "bin": (lora(bias="lora_only"), {"safe_serialization": False}),
    "some layers": (lora(target_modules=["q_proj"], layers_to_transform=[0, 2]), {}),
    "modules_to_save": (lora(modules_to_save=["norm"]), {}),
    "dora": (lora(use_dora=True), {}),
    "rslora": (lora(use_rslora=True), {}),
    "patterns": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}), {}),
    "pissa": (lora(init_lora_weights="pissa"), {}),
    "tokens": (lora(trainable_token_indices=[3, 5]), {}),
    "parameters": (lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]), {}),
    "head": (lora(target_modules=["lm_head"]), {"save_embedding_layers": True}),
}


@pytest.mark.parametrize("kind", FITTING)
def test_an_adapter_that_fits_is_used_whole(kind, tmp_path):
    config, options = FITTING[kind]
    expected = save_adapter(tmp_path, config, **options)
    # A newer version of peft writes the methods that it did not use, too.
    spoil(tmp_path / ADAPTER_CONFIG, ("use_new_method", False))
    spoil(tmp_path / ADAPTER_CONFIG, ("new_method_config", {}))
    policy = open_tiny()
    inputs = one_prompt(policy.processor)
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


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    """An lm_head that shares its weight: the input embeddings would change too."""
    save_adapter(tmp_path / "adapter", lora(target_modules=["lm_head", "q_proj"]))
    message = refused(merge.merge, "tiny", tmp_path / "adapter", tmp_path / "out")
    assert "cannot be merged" in message and "tied lm_head" in message
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_rounding_is_no_reason_to_refuse_a_merge(trained, vlm, tmp_path):
    spoil(vlm / MODEL, lambda w: {key: tensor.bfloat16() for key, tensor in w.items()})
    spoil(vlm / CONFIG, ("dtype", "bfloat16"))
    merge.merge(str(vlm), trained, tmp_path / "out")
    assert open_tiny(tmp_path / "out").model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_training_that_diverges_keeps_the_last_checkpoint(passes, tmp_path, monkeypatch):
    """With one update a step, the next rollout notices it; with more, the next update does."""
    monkeypatch.setattr(samr1_mini, "set_learning_rate", diverge_in_the_second_step)
    monkeypatch.setattr(samr1_mini, "SAVE_EVERY", 1)
    monkeypatch.setattr(runs, "save_figure", lambda *_: None)  # to save time
    flags = "--steps 3 --prompts_per_step 2 --group_size 2"
    flags = f"{flags} --epochs {passes} --minibatches {passes} --out {tmp_path}"
    message = refused(samr1_mini.main, ["train", *flags.split()])
    assert "--lr" in message and "the last checkpoint stays" in message
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 1
    assert all(weight.isfinite().all() for weight in state["adapter"].values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def diverge_in_the_second_step(optimizer, s, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = 1e20 if step == 1 else 1e-3
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


def test_logits_that_overflow_are_refused(vlm, tmp_path):
    """Finite weights, whose products float16 cannot hold. Greedy: a table of zeros."""
    large = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate")]
    spoil(vlm / MODEL, lambda w: w | {name: w[name] * 2000 for name in large})
    flags = ["--vlm", str(vlm), "--dtype", "float16", "--out", str(tmp_path / "out")]
    assert "not finite in torch.float16" in refused(samr1_mini.main, ["eval", *flags])
    assert not (tmp_path / "out" / "eval.json").exists()


METRICS = {"giou": 0.5, "ciou": 0.5, "n": 2}
RESULTS = {"before": METRICS, "ceiling": METRICS}


def test_the_scale_of_float16_is_resumed(tmp_path):
    """An older checkpoint has none."""
    saved = checkpoint(tmp_path, scale=64.0)
    saved.save(1, samr1_mini.parse_settings("train", []), RESULTS)
    state = torch.load(saved.file, weights_only=True)
    for expected in (64, 2):
        other = checkpoint(tmp_path, scale=2.0)
        assert other.load() == (1, RESULTS)
        assert other.scaler.get_scale() == expected
        state.pop("scaler", None)
        torch.save(state, saved.file)


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    """Without results, the trained policy would be evaluated as the one before training."""
    saved = checkpoint(tmp_path)
    saved.save(1, samr1_mini.parse_settings("train", []), RESULTS)
    state = torch.load(saved.file, weights_only=True)
    for change in ({"step": None}, {"results": {}}, {"results": {"before": METRICS}}):
        torch.save(state | change, saved.file)
        assert "does not fit" in refused(saved.load)


def prefixed(held: dict, prefix: str) -> dict:
    return {prefix + key: held[key] for key in held}


WRAPPED = [
    lambda w: {"model": w, "optimizer": {"state": {}}, "epoch": 3},
    lambda w: {"state_dict": prefixed(w, "model."), "epoch": 3},
    lambda w: prefixed({key: w[key].half() for key in w}, "module.model."),
    lambda w: prefixed(w | {"pixel_mean": torch.zeros(3), "pixel_std": 1}, "_orig_mod.module."),
]


@pytest.mark.parametrize("change", WRAPPED)
def test_a_checkpoint_of_sam_is_unwrapped(change, sam, tmp_path):
    file = tmp_path / "sam.pth"
    torch.save(change(sam.state_dict()), file)
    found = load_sam(f"tiny:{file}").state_dict()
    torch.testing.assert_close(found, sam.state_dict(), atol=1e-3, rtol=1e-3)


NECK = "image_encoder.neck.1.weight"
SPOILED_SAMS = [
    (lambda w: dict(list(w.items())[:50]), r"lacks \d+ .*name the size"),
    (lambda w: w | {"hf_token": torch.ones(1)}, r"does not have \(hf_token\)"),
    (lambda w: {"model": w | {3: torch.ones(1), "b": torch.ones(1)}}, r"does not have \(3\)"),
    (lambda w: w | {NECK: torch.ones(63)}, "neck.1.weight: 63 in place of 64"),
    (not_finite, "not finite.*fetch it again"),
    (to_int8, r"\(torch.int8\) holds no floating"),
    (to_float8, r"\(torch.float8_e4m3fn\) holds no floating"),
    (lambda w: {key: w[key].to("meta") for key in w}, "holds no floating"),
    (list, "holds a list"),
]


@pytest.mark.parametrize("change, message", SPOILED_SAMS)
def test_a_checkpoint_that_is_not_this_sam_is_refused(change, message, sam, tmp_path):
    torch.save(change(sam.state_dict()), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=f"--sam tiny:.*sam.pth.*{message}"):
        load_sam(f"tiny:{tmp_path / 'sam.pth'}")

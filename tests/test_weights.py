"""Weights that do not fit are refused in one line, at each door; what fits is used whole."""

import doctest
import json
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import samr1_mini
from examples import trl_grpo
from plumbing import runs, sam, weights
from plumbing.errors import UserError
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.vlm import continue_adapter, load_adapter, load_vlm, vlm_path
from tools import merge

TINY = Path(vlm_path("tiny"))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7e7e\nsize 356176\n"
QUICK = "--prompts_per_step 2 --group_size 2 --eval_samples 2 --save_every 1"


def refused(action, *arguments: object, **named: object) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    if change == "delete":
        file.unlink()
    elif change == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "zero":
        file.write_bytes(file.read_bytes()[:-5000] + bytes(5000))
    elif isinstance(change, str):
        file.write_text(change)
    else:
        rewrite(file, change)


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


@pytest.mark.parametrize("module", [weights, sam])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


# --------------------------------------------------------------------------------------------------
# --vlm
# --------------------------------------------------------------------------------------------------

MODEL = "model.safetensors"
NORM = "model.norm.weight"
SPOILED_VLMS = [  # file, change, what the message must match
    (MODEL, lambda w: dict(sorted(w.items())[:34]), "lacks 34 of its"),
    (MODEL, lambda w: {f"module.{key}": w[key] for key in w}, "lacks .*has 68 that .*module.model"),
    (MODEL, lambda w: w | {"v_head": torch.ones(1)}, "v_head"),
    (MODEL, lambda w: w | {NORM: torch.full((96,), torch.nan)}, "1 weights are not finite .*norm"),
    (MODEL, lambda w: w | {NORM: torch.ones(95)}, "norm.weight: 95 in place of 96"),
    (MODEL, lambda w: {k: w[k].to(torch.int8) for k in w}, "holds quantised weights"),
    (MODEL, POINTER, "model.safetensors is a git-lfs pointer"),
    (MODEL, "delete", "model.safetensors"),
    (MODEL, "", "model.safetensors is empty"),
    (MODEL, "truncate", "model.safetensors is damaged or truncated"),
    (MODEL, "zero", "model.safetensors ends in zeros"),
    ("tokenizer.json", "truncate", "tokenizer.json is damaged"),
    ("tokenizer.json", "delete", "tokenizer"),
    ("tokenizer_config.json", "delete", "tokenizer_config.json is missing"),
    ("chat_template.jinja", POINTER, "chat_template.jinja is a git-lfs"),
    ("chat_template.jinja", "delete", "chat template"),
    ("chat_template.jinja", "{{ messages[0].content[-1].text }}", "template leaves the image out"),
    ("processor_config.json", "delete", "image processor"),
]


@pytest.mark.parametrize("name, change, message", SPOILED_VLMS)
def test_a_model_that_is_not_whole_is_refused(name, change, message, vlm):
    spoil(vlm / name, change)
    with pytest.raises(UserError, match=f"--vlm .*{message}"):
        open_tiny(vlm)


@pytest.mark.parametrize(
    "file, path, value, message",
    [
        ("config.json", ["model_type"], "qwen2_vl", "it is a qwen2_vl: use a Qwen2.5-VL or a"),
        ("config.json", ["model_type"], "llava", "it is a llava: use"),
        ("config.json", ["text_config", "layer_types", 0], "linear_attention", "linear_attention"),
        ("config.json", ["text_config", "num_hidden_layers"], 2, "layer"),
        ("config.json", ["image_token_id"], 6, "of another model"),
        ("config.json", ["quantization_config"], {"quant_method": "awq", "bits": 4}, "(awq)"),
        ("config.json", ["auto_map"], {"AutoConfig": "own.Config"}, ""),
        ("processor_config.json", ["image_processor", "patch_size"], 14, "of another model"),
    ],
)
def test_a_model_that_would_be_used_wrongly_is_refused(file, path, value, message, vlm, tmp_path):
    if "auto_map" in path:  # code of the folder must not run, and nobody be asked
        edit(vlm / file, "model_type", value="own")
        (vlm / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(vlm / file, *path, value=value)
    assert message in refused(open_tiny, vlm)
    assert not (tmp_path / "ran").exists()


def halve(folder: Path) -> None:
    rewrite(folder / MODEL, lambda w: {key: tensor.bfloat16() for key, tensor in w.items()})


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / MODEL), folder / "pytorch_model.bin")
    (folder / MODEL).unlink()


def write_head(folder: Path) -> None:
    rewrite(folder / MODEL, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 0})


def leave_pointer(folder: Path) -> None:
    (folder / "tf_model.h5").write_text(POINTER)


@pytest.mark.parametrize("change", [halve, to_bin, write_head, leave_pointer])
def test_a_model_that_fits_is_loaded(change, vlm, monkeypatch):
    monkeypatch.setenv("HOME", str(vlm.parent))
    change(vlm)
    weight = open_tiny(Path("~/vlm")).model.lm_head.weight
    torch.testing.assert_close(weight, open_tiny().model.lm_head.weight, atol=0.02, rtol=0.02)


def test_weights_that_overflow_in_float16_name_the_dtype(vlm):
    rewrite(vlm / MODEL, lambda w: w | {NORM: torch.full((96,), 1e5)})
    open_tiny(vlm)
    assert "use --dtype bfloat16 or float32" in refused(open_tiny, vlm, dtype="float16")


@pytest.mark.parametrize("flags", [{"vlm": "no-one/no-model"}, {"sam": "sam2:no-one/no-model"}])
@pytest.mark.parametrize("error", [OSError("no network"), None])
def test_a_mistyped_name_is_refused_at_once(flags, error, monkeypatch):
    """Without a network, transformers would ask for each file again and again."""

    def model_info(self, name, timeout):
        assert timeout <= 10
        if error:
            raise error
        response = httpx_response(404)
        raise weights.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    started = time.perf_counter()
    s = samr1_mini.parse_settings("eval", [f"--{key}={value}" for key, value in flags.items()])
    message = refused(samr1_mini.evaluate_adapter, s)
    assert f"--{next(iter(flags))} {next(iter(flags.values()))}" in message
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("flags", [{"vlm": "owner/gated"}, {"sam": "sam3:owner/gated"}])
def test_a_model_without_access_says_how_to_get_it(flags, monkeypatch):
    """As the hub answers for facebook/sam3: all may see the page, few may fetch the files."""
    client = __import__(type(httpx_response(401)).__module__.partition(".")[0])
    page = {"id": "owner/gated", "gated": "manual"}

    def answer(request):
        if request.url.path == "/api/models/owner/gated":
            return client.Response(200, json=page)
        return client.Response(401, headers={"X-Error-Code": "GatedRepo"})

    hub = client.Client(transport=client.MockTransport(answer))
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", hub)
    s = samr1_mini.parse_settings("eval", [f"--{key}={value}" for key, value in flags.items()])
    message = refused(samr1_mini.evaluate_adapter, s)
    assert message.startswith(f"--{next(iter(flags))} {next(iter(flags.values()))}: ")
    assert message.endswith(
        "ask for access on https://huggingface.co/owner/gated, then run `hf auth login`"
    )


def httpx_response(status: int):
    """A response of the HTTP package that this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    module = __import__(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return module.Response(status, request=module.Request("GET", "https://huggingface.co"))


def test_a_side_that_the_processor_changes_is_refused(vlm):
    """Every box would be scaled wrongly: gIoU 0.076 in place of 0.481."""
    for side in (128, 48, 50):
        message = "makes 64 x 64 pixels of it: use --side 64"
        assert message in refused(open_tiny, vlm, side=side)
    size = {"shortest_edge": 256, "longest_edge": 2304}
    edit(vlm / "processor_config.json", "image_processor", "size", value=size)
    assert "--side 64: " in refused(open_tiny, vlm)
    assert open_tiny(vlm, side=48).extent == 48


# --------------------------------------------------------------------------------------------------
# --adapter
# --------------------------------------------------------------------------------------------------


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
    (FILE, lambda w: {k: w[k] for k in w if "lora_A" in k}, "lacks 21 of its weights"),
    (FILE, lambda w: w | {"x.lora_A.weight": torch.ones(1)}, "has 1 that the"),
    (FILE, not_finite, "42 weights are not finite"),
    (FILE, lambda w: {k: w[k].repeat(2, 2) for k in w}, "42 in another size .* in pl"),
    (FILE, POINTER, f"{FILE} is a git-lfs pointer"),
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
    "vision tower": (lora(target_modules=r".*visual.*\.qkv"), "has .* that the model does not"),
    "dora": (lora(use_dora=True), "it is a variant of LoRA"),
    "rslora": (lora(use_rslora=True), "it is a variant of LoRA"),
    "pissa": (lora(init_lora_weights="pissa"), "it is a variant of LoRA"),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "not LoRA"),
}


@pytest.mark.parametrize("kind", NOT_CONTINUED)
def test_an_adapter_that_training_cannot_continue_is_refused(kind, tmp_path):
    config, message = NOT_CONTINUED[kind]
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(open_tiny().model, config).save_pretrained(tmp_path)
    model = samr1_mini.add_lora(open_tiny().model, rank=4, seed=0)
    with pytest.raises(UserError, match=f"--adapter .*{message}"):
        continue_adapter(model, str(tmp_path))


# --------------------------------------------------------------------------------------------------
# tools.merge
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ["embed_tokens"]])
def test_an_adapter_that_cannot_be_merged_is_refused(targets, tmp_path):
    """Of tied weights: the lm_head's would change the input embeddings too."""
    save_adapter(tmp_path / "adapter", lora(target_modules=targets))
    message = refused(merge.merge, "tiny", tmp_path / "adapter", tmp_path / "out")
    assert "cannot be merged" in message and "tied lm_head" in message
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse_a_merge(dtype, vlm, tmp_path):
    rewrite(vlm / MODEL, lambda w: {key: tensor.to(dtype) for key, tensor in w.items()})
    edit(vlm / "config.json", "dtype", value=str(dtype).removeprefix("torch."))
    save_adapter(tmp_path / "adapter")
    merge.merge(str(vlm), tmp_path / "adapter", tmp_path / "out")
    assert open_tiny(tmp_path / "out").model.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# --resume, and training that diverges
# --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [(old_names, "lacks 42 .*has 42 "), (not_finite, "not finite"), (None, "git-lfs pointer")],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_stays(change, message, tmp_path):
    out = tmp_path / "run"
    samr1_mini.main(["train", *QUICK.split(), "--steps", "1", "--out", str(out)])
    file = out / "checkpoint" / "state.pt"
    state = torch.load(file, weights_only=True)
    if change:
        torch.save(state | {"adapter": change(state["adapter"])}, file)
    else:
        file.write_text(POINTER)
    before = contents(out)
    with pytest.raises(UserError, match=f"--resume: .*{message}"):
        samr1_mini.main(["train", "--resume", "--steps", "2", "--out", str(out)])
    assert contents(out) == before


def test_a_resume_of_trl_checks_the_adapter(tmp_path):
    model = get_peft_model(open_tiny("tiny").model, lora())
    model.save_pretrained(tmp_path)
    trl_grpo.check_checkpoint(tmp_path, model)
    rewrite(tmp_path / FILE, old_names)
    assert "lacks 42" in refused(trl_grpo.check_checkpoint, tmp_path, model)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_training_that_diverges_keeps_the_last_checkpoint(passes, tmp_path, monkeypatch):
    """With one update a step, the next rollout notices it; with more, the next update does."""
    monkeypatch.setattr(samr1_mini, "set_learning_rate", diverge_at_step_2)
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
    checkpoint(tmp_path, scale=64.0).save(1, samr1_mini.parse_settings("train", []), {})
    file = tmp_path / "checkpoint" / "state.pt"
    state = torch.load(file, weights_only=True)
    for expected in (64, 2):
        other = checkpoint(tmp_path, scale=2.0)
        other.load()
        assert other.scaler.get_scale() == expected
        state.pop("scaler", None)
        torch.save(state, file)


# --------------------------------------------------------------------------------------------------
# --sam
# --------------------------------------------------------------------------------------------------


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
    found = load_sam(f"tiny:{file}").state_dict()
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


def test_the_original_file_of_sam_2_is_refused(tmp_path):
    message = refused(load_sam, f"sam2:{tmp_path}/sam2_hiera_large.pt")
    assert "the original checkpoint is not read" in message and "facebook/sam2" in message

"""Tests of what only matters on a GPU: devices, dtypes, 4 bit, waits and memory.

They need no GPU. Where the code asks torch about one, the answer is replaced.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.integrations import sdpa_attention

import samr1_mini
from data import Shapes
from grpo import Completions, group_logprobs, rollout
from plumbing import devices, runs
from plumbing.sam import grid_positions, load_sam
from plumbing.settings import parse_settings
from plumbing.vlm import load_vlm, vlm_path
from reward import SamPrompt, SamScorer, parse_answer
from tools import figures

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch):
    """torch believes in two CUDA cards. Returns what it was told, and their capability."""
    seen = SimpleNamespace(current=None, capability=(8, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(seen, "current", index))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: seen.capability)
    monkeypatch.setattr(devices.torch, "zeros", lambda *_, **__: None)
    return seen


def build_qwen3vl(folder: Path, template: str) -> Path:
    """Save a small random Qwen3-VL whose widths 4 bit can divide, with the tiny tokenizer."""
    tiny = AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = tiny.tokenizer
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names = ("image", "video", "vision_start", "vision_end")
    ids = {
        f"{name}_token_id": tokens.convert_tokens_to_ids(special.get(name, f"<|{name}|>"))
        for name in names
    }
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    text = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, head_dim=16)
    text |= dict(num_attention_heads=8, num_key_value_heads=2, vocab_size=len(tokens))
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=16)
    vision |= dict(out_hidden_size=128, deepstack_visual_indexes=[0, 1], spatial_merge_size=2)
    config = Qwen3VLConfig(
        text_config=text | dict(rope_parameters=rope, eos_token_id=tokens.eos_token_id),
        vision_config=vision | dict(num_position_embeddings=64),
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    patches = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    patches["size"] = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokens,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=template,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A Qwen3-VL whose chat template opens <think>, as those of the thinking variants do."""
    template = AutoProcessor.from_pretrained(vlm_path("tiny")).chat_template
    opened = template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert opened != template
    return build_qwen3vl(tmp_path_factory.mktemp("thinking"), opened)


# --------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------


def test_only_copies_to_cuda_do_not_wait():
    """From ordinary memory an asynchronous copy to MPS can read what was overwritten since."""
    calls = {}

    class Tensor:
        def to(self, device, non_blocking):
            calls[device.type] = non_blocking

    for name in ("cuda", "cuda:1", "mps", "cpu"):
        devices.to_device(Tensor(), torch.device(name))
    assert calls == {"cuda": True, "mps": False, "cpu": False}
    scripts = [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")]
    assert not [f.name for f in scripts if "non_blocking=True" in f.read_text()]


def test_another_card_becomes_the_current_one(two_cards):
    """Streams, graphs and memory statistics are those of the current device."""
    assert devices.choose_device("cuda:1").index == 1 and two_cards.current == 1
    devices.choose_device("auto")
    assert two_cards.current == 0
    with pytest.raises(ValueError, match="2 CUDA devices"):
        devices.choose_device("cuda:2")


@pytest.mark.parametrize("name", ["meta", "nonsense", "cuda:0", "cuda", "xpu"])
def test_a_device_that_cannot_be_used_is_one_line(name, capsys):
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is such a device here")
    with pytest.raises(SystemExit) as error:
        load_vlm("tiny", name, 64, "brief")
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and f"--device {name}" in said and "\n" not in said


# --------------------------------------------------------------------------------------------------
# Dtypes
# --------------------------------------------------------------------------------------------------


def test_dtypes_follow_the_device(two_cards, capsys):
    cuda, choose = torch.device("cuda"), devices.choose_dtype
    assert choose("auto", CPU, tiny=False) == torch.float32
    assert choose("auto", cuda, tiny=False) == torch.bfloat16
    assert choose("float16", cuda, tiny=False) == torch.float16
    assert choose("bfloat16", CPU, tiny=False) == torch.bfloat16
    assert devices.half_precision(cuda) == torch.bfloat16
    assert not capsys.readouterr().err


def test_an_old_card_is_told_so_once(two_cards, capsys):
    two_cards.capability = (7, 5)
    cuda, choose = torch.device("cuda"), devices.choose_dtype
    assert choose("auto", cuda, tiny=True) == torch.float32
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "7.5" in said and "float32" in said
    for name in ("auto", "bfloat16"):
        with pytest.raises(ValueError, match="float16.*float32"):
            choose(name, cuda, tiny=False)
    assert choose("float32", cuda, tiny=False) == torch.float32
    assert choose("float16", cuda, tiny=False) == torch.float16
    assert devices.half_precision(cuda) == torch.float16


def train_once(out: Path, *flags: str) -> dict:
    """Train for one step of two updates. Returns its metrics."""
    sizes = "--steps 1 --eval_samples 1 --prompts_per_step 2 --group_size 2 --max_new_tokens 6"
    samr1_mini.main(["train", *sizes.split(), "--out", str(out), *flags])
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_adapter_stays_float32_and_its_gradients_above_zero(dtype, tmp_path, monkeypatch):
    models, scales = [], []
    add_lora, step = samr1_mini.add_lora, samr1_mini.clipped_step

    def keep(*args):
        models.append(add_lora(*args))
        return models[-1]

    def noted(optimizer, scaler, limit):
        scales.append(scaler.get_scale())
        return step(optimizer, scaler, limit)

    monkeypatch.setattr(samr1_mini, "add_lora", keep)
    monkeypatch.setattr(samr1_mini, "clipped_step", noted)
    rewards = torch.tensor([[1.0, 3.0], [4.0, 2.0]])  # not all equal
    monkeypatch.setattr(
        samr1_mini, "group_advantages", lambda _: rewards - rewards.mean(1, keepdim=True)
    )
    row = train_once(tmp_path / "run", "--dtype", dtype, "--save_memory", "1")
    kinds = {"lora": set(), "base": set()}
    for name, p in models[0].named_parameters():
        kinds["lora" if "lora_" in name else "base"].add(p.dtype)
    assert kinds == {"lora": {torch.float32}, "base": {getattr(torch, dtype)}}
    assert scales[0] == (4096 if dtype == "float16" else 1)
    assert 0 < row["grad_norm"] < 100
    assert any(p.abs().max() > 0 for name, p in models[0].named_parameters() if "lora_B" in name)


def test_scaled_gradients_give_the_update_of_unscaled_ones():
    """One step of AdamW after clipping, with the loss scaled by 4,096 and not scaled."""
    updated = []
    for enabled in (True, False):
        weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", 2.0**12, enabled=enabled)
        scaler.scale(weight.square().sum()).backward()
        norm = devices.clipped_step(optimizer, scaler, 1.0)
        assert norm.item() == pytest.approx(10.0) and weight.grad is None
        updated.append(weight.detach())
    assert torch.allclose(*updated) and updated[0][0] == pytest.approx(3.0 - 0.06)


def test_banned_tokens_are_never_sampled_in_float16(policy_parts, samples, monkeypatch):
    """-1e9 does not fit into float16."""
    policy = load_vlm("tiny", "cpu", 64, "brief", dtype="float16")
    completions = rollout(policy.model, policy.read(samples[:1]), 2, 4, policy.end, policy.banned)
    assert not torch.isin(completions.ids, policy.banned).any()


# --------------------------------------------------------------------------------------------------
# 4 bit
# --------------------------------------------------------------------------------------------------


def test_4bit_without_bitsandbytes_names_the_package(monkeypatch, capsys):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as error:
        load_vlm("/no/folder", "cpu", 64, "brief", load_in_4bit=True)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "--load_in_4bit: " in said
    assert "pip install bitsandbytes" in said
    with pytest.raises(SystemExit):
        load_vlm("tiny", "cpu", 64, "brief", load_in_4bit=True)
    assert "64" in capsys.readouterr().err


def random_adapter(model):
    """Add an adapter that does something, the same for each model."""
    model = samr1_mini.add_lora(model, 4, 0)
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_B" in name:
                p.normal_(std=0.5)
    return model, trained


def test_4bit_has_the_gradients_of_its_dequantised_weights(thinking):
    """The adapter is float32, and with it switched off the policy is the 4-bit base again."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policies = [load_vlm(str(thinking), "cpu", 96, "brief", load_in_4bit=b) for b in (True, False)]
    four, plain = (dict(policy.model.named_modules()) for policy in policies)
    linears = {name for name, module in plain.items() if isinstance(module, torch.nn.Linear)}
    quantised = {n for n in linears if isinstance(four[n], bitsandbytes.nn.Linear4bit)}
    assert quantised == {name for name in linears if ".language_model.layers." in name}
    for name in quantised:
        weight = four[name].weight
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        dequantised = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert not torch.equal(dequantised, plain[name].weight)
        plain[name].weight.data = dequantised.float()

    ids = torch.tensor([[[50, 51, 52], [53, 54, 50]]])
    completions = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
    results = []
    for policy in policies:
        with torch.no_grad():  # in eval mode, as a rollout
            prompts = policy.read([Shapes("heldout")[0]])
            before = group_logprobs(policy.model, prompts, completions, policy.banned)[0]
        model, trained = random_adapter(policy.model)
        assert all("lora_" in name for name in trained)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        after = group_logprobs(model, prompts, completions, policy.banned)[0]
        after.sum().backward()
        with torch.no_grad(), model.disable_adapter():
            reference = group_logprobs(model, prompts, completions, policy.banned)[0]
        assert torch.allclose(reference, before, atol=1e-6)
        assert not torch.allclose(after, before, atol=1e-3)
        results.append([after.detach(), *(p.grad for p in trained.values())])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.slow
def test_4bit_trains_from_the_command_line(thinking, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ["--vlm", str(thinking), "--side", "96", "--load_in_4bit", "--save_memory", "2"]
    train_once(tmp_path / "run", *flags)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16


def test_figures_load_the_base_model_as_the_run_did(tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*args):
        raise Loaded(args)

    s = parse_settings("train", ["--dtype", "float16", "--load_in_4bit", "--side", "96"])
    runs.save_settings(tmp_path, s)
    monkeypatch.setattr(figures, "load_vlm", load)
    for trained, adapter in ((True, str(tmp_path / "adapter")), (False, "none")):
        with pytest.raises(Loaded) as loaded:
            figures.answer(tmp_path, trained, [])
        assert loaded.value.args[0] == ("tiny", "auto", 96, "brief", adapter, "float16", True)


# --------------------------------------------------------------------------------------------------
# A thinking model
# --------------------------------------------------------------------------------------------------


def test_think_opened_by_the_chat_template_is_judged_with_the_completion(thinking):
    answer = '{"bbox":[1,2,3,4],"points_1":[1,2],"points_2":[2,3]}'
    said = f"the red</think><answer>{answer}</answer>"
    opened, plain = (load_vlm(name, "cpu", 96, "brief") for name in (str(thinking), "tiny"))
    assert opened.opening == "<think>" and plain.opening == ""
    assert opened.texts(tokens_of(opened, said)) == [["<think>" + said]]
    assert plain.texts(tokens_of(plain, said)) == [[said]]
    assert parse_answer("<think>" + said).think_format and not parse_answer(said).think_format
    assert not parse_answer("<think><think>" + said).think_format


def tokens_of(policy, text: str) -> Completions:
    ids = torch.tensor(policy.processor.tokenizer(text)["input_ids"])[None, None]
    return Completions(ids, torch.ones_like(ids, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------
# Waits and copies
# --------------------------------------------------------------------------------------------------


def test_relative_positions_are_those_of_segment_anything(sam):
    from segment_anything.modeling.image_encoder import get_rel_pos

    for block in sam.image_encoder.blocks:
        n = (len(block.attn.rel_pos_h) + 1) // 2
        rows, columns, _ = grid_positions(n, n, CPU, torch.float32)
        for table, index in ((block.attn.rel_pos_h, rows), (block.attn.rel_pos_w, columns)):
            assert torch.equal(table[index], get_rel_pos(n, n, table))
    *_, one_hot = grid_positions(2, 3, CPU, torch.float32)
    assert one_hot[4].tolist() == [0, 1, 0, 1, 0]  # place 4 of 2 x 3: row 1, column 1


def test_the_second_image_computes_no_positions(scorer, samples):
    images = [sample.image for sample in samples]
    scorer.encode(images[:1])
    computed = grid_positions.cache_info().misses
    scorer.encode(images[1:2])
    assert grid_positions.cache_info().misses == computed


def test_sam_in_host_memory_gives_the_same_masks(samples):
    sam = load_sam("tiny")
    prompts = [[SamPrompt((10.0, 10.0, 60.0, 60.0), ())]] * 2
    expected = SamScorer(sam).score(samples[:2], prompts)
    host = [p.data_ptr() for p in sam.parameters()]
    scorer = SamScorer(sam, offload=True)
    scored = scorer.score(samples[:2], prompts)
    assert torch.equal(scored.intersection, expected.intersection)
    assert [p.data_ptr() for p in sam.parameters()] == host  # nothing was copied back


def test_decoding_does_not_copy_keys_to_all_heads(thinking, samples, monkeypatch):
    """Its 8 query heads share 2 key heads. Without `pack_gqa` each step would repeat the cache."""
    repeated = []
    repeat_kv = sdpa_attention.repeat_kv

    def noted(keys, n):
        repeated.append(n)
        return repeat_kv(keys, n)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", noted)
    policy = load_vlm(str(thinking), "cpu", 96, "brief")
    counts = []
    for steps in (2, 5):
        repeated.clear()
        prompts = policy.read(samples[:1])
        no_end = torch.tensor([-1])
        rollout(policy.model, prompts, 2, steps, no_end, policy.banned)
        counts.append(len(repeated))
    assert counts[0] == counts[1]  # only the prompt's pass repeats them
    bound = re.search(r"transformers>=(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text())
    assert tuple(map(int, bound.groups())) >= (5, 23)


def test_a_checkpoint_is_loaded_to_the_cpu(tmp_path, monkeypatch):
    """On a card, AdamW's step counters would make each update wait twice for every tensor."""
    train_once(tmp_path / "run")
    asked = []
    load = torch.load

    def noted(*args, **options):
        asked.append(options.get("map_location"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noted)
    model = samr1_mini.add_lora(load_vlm("tiny", "cpu", 64, "brief").model, 16, 0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    runs.load_checkpoint(tmp_path / "run", model, optimizer, torch.Generator())
    assert asked == ["cpu"]
    assert {state["step"].device for state in optimizer.state.values()} == {CPU}


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def test_each_level_of_save_memory_adds_one_saving():
    flags = ["--prompts_per_step", "8", "--minibatches", "2"]
    levels = [parse_settings("train", [*flags, "--save_memory", str(n)]) for n in range(4)]
    sizes = [[part.stop - part.start for part in samr1_mini.passes(s)[0]] for s in levels]
    assert sizes == [[4], [1] * 4, [1] * 4, [1] * 4]
    with pytest.raises(SystemExit):
        parse_settings("train", ["--save_memory", "4"])

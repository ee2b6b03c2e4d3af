"""Tests of what only matters on a GPU: the CUDA graph, devices, dtypes, 4 bit.

They need no GPU. Where the code asks torch about one, the answer is replaced.
"""

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import samr1_mini
from data import Shapes
from grpo import Completions, group_logprobs, rollout
from plumbing import decoding, devices, four_bit
from plumbing.decoding import StaticDecoder
from plumbing.errors import UserError
from plumbing.vlm import load_vlm

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


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


class Gpu(str):
    """The name of the CPU as a device of type "cuda", for which StaticDecoder records a graph."""

    type = "cuda"


@pytest.fixture(scope="module")
def policy():
    return load_vlm("tiny", "cpu", 64, "brief")


def sample(policy, prompts) -> torch.Tensor:
    return rollout(
        policy.model,
        prompts,
        G=3,
        max_new_tokens=8,
        end=torch.tensor([-1]),
        banned=policy.banned,
        temperature=3.0,
        generator=torch.Generator().manual_seed(0),
        decoder=StaticDecoder,
    ).ids


def test_a_replayed_graph_samples_the_same_tokens(policy, samples, monkeypatch):
    """A stand-in for a CUDA graph uses only the tensors that exist when it is recorded."""
    prompts = policy.read(samples[:2])
    expected = sample(policy, prompts)
    addresses = []

    def record_graph(forward):
        forward()  # the first run writes into the cache, as on a GPU
        recorded = copy.copy(forward.__self__)  # the same tensors, whatever the decoder does later
        logits = forward().clone()
        forward.__self__.forward = None  # from now on only the graph can compute

        def replay():
            addresses.append([layer.keys.data_ptr() for layer in recorded.cache.layers])
            return logits.copy_(recorded.forward())

        return replay

    monkeypatch.setattr(decoding, "record_graph", record_graph)
    monkeypatch.setattr(type(policy.model), "device", Gpu("cpu"))
    assert torch.equal(sample(policy, prompts), expected)
    assert len(addresses) == 7 and all(one == addresses[0] for one in addresses)


def test_decoding_continues_if_no_graph_can_be_recorded(policy, samples, monkeypatch):
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    error = RuntimeError("operation not permitted when stream is capturing")
    torch.cuda.graph.return_value.__exit__.side_effect = error
    prompts = policy.read(samples[:2])
    expected = sample(policy, prompts)
    monkeypatch.setattr(type(policy.model), "device", Gpu("cpu"))
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        assert torch.equal(sample(policy, prompts), expected)


def test_another_card_becomes_the_current_one(two_cards):
    """Streams, graphs and memory statistics are those of the current device."""
    assert devices.choose_device("cuda:1").index == 1 and two_cards.current == 1
    devices.choose_device("auto")
    assert two_cards.current == 0
    for name, reason in (("cuda:2", "there are 2 CUDA devices"), ("abacus", "")):
        with pytest.raises(UserError, match=f"--device {name}: {reason}"):
            devices.choose_device(name)


def test_only_copies_to_cuda_do_not_wait():
    """From ordinary memory, an asynchronous copy to MPS can read what was overwritten since."""
    tensor = SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    waits = {name: not devices.to_device(tensor, torch.device(name)) for name in ("cuda", "mps")}
    assert waits == {"cuda": False, "mps": True}


def test_dtypes_follow_the_device(two_cards, capsys):
    assert devices.choose_dtype("auto", CPU, tiny=False) == torch.float32
    assert devices.choose_dtype("bfloat16", CPU, tiny=False) == torch.bfloat16
    assert devices.choose_dtype("auto", CUDA, tiny=False) == torch.bfloat16
    assert devices.choose_dtype("4bit", CUDA, tiny=False) == torch.bfloat16
    assert devices.half_precision(CUDA) == torch.bfloat16
    two_cards.capability = (7, 5)  # a T4
    assert not capsys.readouterr().err
    assert devices.choose_dtype("auto", CUDA, tiny=True) == torch.float32
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "7.5" in said and "float32" in said
    for name in ("auto", "bfloat16", "4bit"):
        with pytest.raises(UserError, match=f"--dtype {name}: .*7.5.*use float16.*float32"):
            devices.choose_dtype(name, CUDA, tiny=name == "bfloat16")
    assert devices.choose_dtype("float32", CUDA, tiny=False) == torch.float32
    assert devices.half_precision(CUDA) == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_adapter_stays_float32_and_its_gradients_above_zero(dtype, samples):
    """Two updates, with advantages that do not depend on the random completions."""
    flags = f"--dtype {dtype} --prompts_per_step 2 --group_size 2 --max_new_tokens 6"
    s = samr1_mini.parse_settings("train", [*flags.split(), "--epochs", "1"])
    policy = samr1_mini.load_trainable_policy(s)
    trained = {name: p for name, p in policy.model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert policy.model.dtype == getattr(torch, dtype)
    prompts = policy.read(samples[:2])
    completions = samr1_mini.sample_completions(policy, prompts, s)
    optimizer = torch.optim.AdamW(trained.values())
    advantages = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    old, reference = samr1_mini.fixed_logprobs(policy, prompts, completions, s)
    _, statistics = samr1_mini.update(
        policy, optimizer, prompts, completions, advantages, old, reference, s
    )
    assert all(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    assert policy.scaler.get_scale() == (4096 if dtype == "float16" else 1)
    assert 0 < statistics["grad_norm"] < 100


def test_scaled_gradients_give_the_update_of_unscaled_ones():
    """One update after clipping, with the loss scaled by 4,096 and not scaled."""
    for enabled in (True, False):
        weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", 2.0**12, enabled=enabled)
        scaler.scale(weight.square().sum()).backward()  # the gradient is (6, -8)
        norm = devices.clipped_step(optimizer, scaler, 1.0)
        assert norm.item() == pytest.approx(10.0) and weight.grad is None
        assert weight.tolist() == pytest.approx([3 - 0.06, -4 + 0.08])


def test_4bit_without_bitsandbytes_names_the_package(monkeypatch):
    with pytest.raises(UserError, match="--dtype 4bit: .*64"):
        load_vlm("tiny", "cpu", 64, "brief", dtype="4bit")
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="--dtype 4bit: .*pip install bitsandbytes"):
        load_vlm("any/model", "cpu", 64, "brief", dtype="4bit")


def test_4bit_has_the_gradients_of_its_dequantised_weights(thinking_qwen3vl):
    """The adapter is float32, and with it switched off the policy is the 4-bit base again."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = str(thinking_qwen3vl)
    policies = [load_vlm(path, "cpu", 96, "brief", dtype=dtype) for dtype in ("4bit", "float32")]
    four, plain = (dict(policy.model.named_modules()) for policy in policies)
    linears = {name for name, module in plain.items() if isinstance(module, torch.nn.Linear)}
    quantised = {n for n in linears if isinstance(four[n], bitsandbytes.nn.Linear4bit)}
    assert quantised == {name for name in linears if ".language_model.layers." in name}
    for name in quantised:
        weight = four[name].weight
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        dequantised = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        plain[name].weight.data = dequantised.float()

    ids = torch.tensor([[[50, 51, 52], [53, 54, 50]]])
    completions = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
    results = []
    for policy in policies:
        prompts = policy.read([Shapes("heldout")[0]])
        with torch.no_grad():  # in eval mode, as a rollout
            before = group_logprobs(policy.model, prompts, completions, policy.banned)[0]
        model = samr1_mini.add_lora(policy.model, 4, seed=0)
        torch.manual_seed(1)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        for p in trained:
            torch.nn.init.normal_(p, std=0.2)  # the zeros of lora_B would do nothing
        after = group_logprobs(model, prompts, completions, policy.banned)[0]
        after.sum().backward()
        with torch.no_grad(), model.disable_adapter():
            reference = group_logprobs(model, prompts, completions, policy.banned)[0]
        assert torch.allclose(reference, before, atol=1e-6)
        assert not torch.allclose(after, before, atol=1e-3)
        results.append([after.detach(), *(p.grad for p in trained)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-3 * expected.norm()

"""Tests of grpo.py against transformers' `generate`, padded forward passes, TRL's published loss,
finite differences, and numbers worked out by hand."""

import contextlib
import doctest
import functools
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

import data
import grpo
import reward
from assignment.handout import EXERCISES
from grpo import (
    Completions,
    choose_token,
    group_advantages,
    group_logprobs,
    grpo_loss,
    head_logprobs,
    k3_kl,
    may_attend,
    pack,
    rollout,
    token_logprobs,
)
from plumbing.vlm import Prompts, encode_prompts


def docstring_examples():
    """The examples of the scripts. Those of a function with an exercise have its mark."""
    exercises = {name: n for n, one in EXERCISES.items() for name in one.functions}
    for module in (data, reward, grpo):
        for example in doctest.DocTestFinder().find(module):
            if not example.examples:  # a docstring without examples would always pass
                continue
            number = exercises.get(example.name.partition(".")[2])
            marks = [getattr(pytest.mark, f"exercise_{number}")] if number else []
            yield pytest.param(example, id=example.name, marks=marks)


@pytest.mark.parametrize("example", list(docstring_examples()))
def test_docstring_examples(example):
    try:
        doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    except doctest.DocTestFailure as error:
        source, expected = error.example.source.strip(), error.example.want
        pytest.fail(f"{source}\nreturns\n{error.got}and not\n{expected}")
    except doctest.UnexpectedException as error:
        raise error.exc_info[1] from None


# --------------------------------------------------------------------------------------------------
# Advantages and KL
# --------------------------------------------------------------------------------------------------


@pytest.mark.exercise_5
def test_advantages_by_hand():
    # Mean 3, deviations 3, -1, -2, 0, unbiased variance 14 / 3. Each group has its own mean.
    rewards = torch.tensor([[[6.0, 2.0, 1.0, 3.0]], [[0.0, 0.0, 4.0, 0.0]]], dtype=torch.float64)
    advantages = group_advantages(rewards)
    first = [d / (math.sqrt(14 / 3) + 1e-4) for d in (3, -1, -2, 0)]
    second = [d / (2 + 1e-4) for d in (-1, -1, 3, -1)]
    assert advantages[0, 0].tolist() == pytest.approx(first)
    assert advantages[1, 0].tolist() == pytest.approx(second)


@pytest.mark.exercise_5
@pytest.mark.parametrize("reward", [0.0, 5.0, 0.1, 4 / 3, 5.999999])
def test_equal_rewards_give_advantages_of_exactly_zero(reward):
    for G in range(2, 17):  # the mean of equal numbers can differ from them by rounding
        advantages = group_advantages(torch.full((2, G), reward))
        assert (advantages == 0).all(), f"{G} equal rewards of {reward} must give exactly 0"


@pytest.mark.exercise_5
def test_small_differences_count_and_the_rewards_are_unchanged():
    # Mean 0.3, unbiased standard deviation 0.00816.
    rewards = torch.tensor([[0.30, 0.31, 0.29, 0.30]])
    before = rewards.tolist()
    advantages = group_advantages(rewards)[0].tolist()
    assert advantages == pytest.approx([0, 1.2099, -1.2099, 0], abs=1e-3)
    advantages = group_advantages(rewards, eps=1.0)[0].tolist()
    assert advantages == pytest.approx([0, 0.00992, -0.00992, 0], abs=1e-4)
    assert rewards.tolist() == before, "rewards must not be changed in place"


@pytest.mark.exercise_6
def test_k3_by_hand():
    # q = reference / policy = 2, 1/2, 1. The estimate is q - log q - 1.
    kl = k3_kl(torch.tensor([0.25, 0.5, 0.3]).log(), torch.tensor([0.5, 0.25, 0.3]).log())
    assert kl.tolist() == pytest.approx([2 - math.log(2) - 1, 0.5 + math.log(2) - 1, 0], abs=1e-6)


@pytest.mark.exercise_6
def test_k3_is_not_negative_and_its_expectation_is_the_kl():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50).double().log_softmax(-1)
    assert k3_kl(policy, reference).min() >= 0
    mean = (policy.exp() * k3_kl(policy, reference)).sum()  # over tokens that the policy samples
    kl = (policy.exp() * (policy - reference)).sum()
    assert mean.item() == pytest.approx(kl.item())
    near = torch.randn(10_000) * 10 ** torch.empty(10_000).uniform_(-9, 1)
    assert k3_kl(torch.zeros(10_000), near).min() >= -1e-6  # rounding


@pytest.mark.exercise_6
def test_k3_far_from_the_reference_and_its_gradient():
    """By hand: log q = 8 gives e^8 - 9, log q = -1 gives e^-1. The derivative is 1 - q."""
    logprobs = torch.tensor([-9.0, -200.0, -1.0], requires_grad=True)
    kl = k3_kl(logprobs, torch.tensor([-1.0, -201.0, -1.0]))
    assert kl.tolist() == pytest.approx([math.exp(8) - 9, math.exp(-1), 0])
    assert kl.requires_grad, "the loss needs the gradient of the KL: no no_grad, no detach"
    kl.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1 - math.exp(8), 1 - math.exp(-1), 0])


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def problem(B=3, G=4, T=6):
    """Random inputs of the loss, float64: completions of 1 to T tokens, ratios from 0.4 to 2.7."""
    generator = torch.Generator().manual_seed(1)
    new, old, reference = -torch.rand(3, B, G, T, generator=generator, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=generator)
    advantages = torch.randn(B, G, generator=generator, dtype=torch.float64)
    tensors = {"new": new, "old": old, "reference": reference}
    return SimpleNamespace(**tensors, advantages=advantages, mask=mask)


def published_loss(p, loss_type, epsilon, epsilon_high, beta):
    """TRL's GRPO loss, one token at a time (its documentation, and Shao et al. 2024, eq. 3 and 4).

    loss_type: "grpo" is the mean over completions of the mean over tokens, "dapo" is the sum over
    tokens divided by their number, in each group.
    """
    losses = []
    for b in range(len(p.new)):
        rows = []
        for g in range(p.new.shape[1]):
            row = []
            for t in range(int(p.mask[b, g].sum())):
                new, old, ref = (x[b, g, t].item() for x in (p.new, p.old, p.reference))
                advantage = p.advantages[b, g].item()
                ratio = math.exp(new) / math.exp(old)
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
                kl = math.exp(ref) / math.exp(new) - (ref - new) - 1
                row.append(-min(ratio * advantage, clipped * advantage) + beta * kl)
            rows.append(row)
        if loss_type == "dapo":
            losses.append(sum(map(sum, rows)) / sum(map(len, rows)))
        else:
            losses.append(sum(sum(row) / len(row) for row in rows) / len(rows))
    return sum(losses) / len(losses)


@pytest.mark.exercise_7
@pytest.mark.parametrize("normalise, loss_type", [("token", "dapo"), ("sequence", "grpo")])
@pytest.mark.parametrize("B", [1, 3])
def test_loss_equals_the_published_one(normalise, loss_type, B):
    p = problem(B)
    tensors = (p.new, p.old, p.reference, p.advantages, p.mask)
    for eps_low, eps_high, beta in ((0.2, 0.3, 0.005), (0.1, 0.1, 1.0), (0.2, 0.5, 0.0)):
        loss, statistics = grpo_loss(*tensors, eps_low, eps_high, beta, normalise)
        expected = published_loss(p, loss_type, eps_low, eps_high, beta)
        assert loss.item() == pytest.approx(expected)
        assert statistics["clip_low"] > 0 and statistics["clip_high"] > 0  # both sides occur


@pytest.mark.exercise_7
def test_loss_by_hand():
    # Two prompts with two completions of one and two tokens. With advantage 1, ratio 2 counts as
    # 1.3. With advantage -2, ratio 0.5 counts as 0.8, and 0.9 as 0.9.
    ratio = torch.tensor([[[2.0, 7.0], [0.5, 0.9]], [[1.0, 7.0], [1.0, 1.0]]])
    advantages = torch.tensor([[1.0, -2.0], [1.0, -1.0]])
    mask = torch.tensor([[[True, False], [True, True]], [[True, False], [True, True]]])
    new, old = ratio.log(), torch.zeros(2, 2, 2)
    token = -((1.3 - 1.6 - 1.8) / 3 + (1 - 1 - 1) / 3) / 2
    sequence = -((1.3 - (1.6 + 1.8) / 2) / 2 + (1 - 1) / 2) / 2
    # The reference is half as likely for every token, so the mean KL is the same for both.
    reference, kl = new - math.log(2), 0.5 + math.log(2) - 1
    for normalise, expected in (("token", token), ("sequence", sequence)):
        rest = (advantages, mask)
        loss, _ = grpo_loss(new, old, None, *rest, beta=0, normalise=normalise)
        assert loss.item() == pytest.approx(expected)
        loss, _ = grpo_loss(new, old, reference, *rest, beta=0.1, normalise=normalise)
        assert loss.item() == pytest.approx(expected + 0.1 * kl)
    with pytest.raises(ValueError, match="batch"):
        grpo_loss(new, old, None, advantages, mask, beta=0, normalise="batch")


@pytest.mark.exercise_7
def test_all_four_cases_of_the_clip():
    # Columns: ratio 0.7, 0.9, 1.2, 1.5. Rows: advantage 1, -1. eps_low 0.2, eps_high 0.3.
    ratio = torch.tensor([0.7, 0.9, 1.2, 1.5], dtype=torch.float64)
    new = ratio.log().expand(1, 2, 4).clone().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    loss, statistics = grpo_loss(new, torch.zeros_like(new), None, advantages, mask, beta=0)
    loss.backward()
    # d(-ratio * A / 8) / d log-prob = -ratio * A / 8, or exactly 0 where the ratio is clipped.
    positive, negative = new.grad[0].tolist()
    assert positive == pytest.approx([-0.7 / 8, -0.9 / 8, -1.2 / 8, 0], abs=1e-12)
    assert negative == pytest.approx([0, 0.9 / 8, 1.2 / 8, 1.5 / 8], abs=1e-12)
    assert positive[3] == 0 and negative[0] == 0
    expected = -((0.7 + 0.9 + 1.2 + 1.3) - (0.8 + 0.9 + 1.2 + 1.5)) / 8
    assert loss.item() == pytest.approx(expected)
    high, low = statistics["clip_high"].item(), statistics["clip_low"].item()
    assert high == low == pytest.approx(1 / 8)
    assert statistics["ratio"].item() == pytest.approx(4.3 / 4) and statistics["kl"] == 0


@pytest.mark.exercise_7
def test_statistics_do_not_count_padding():
    ratio = torch.tensor([[[1.5, 1.5], [0.5, 9.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True], [True, False]]])
    reference = torch.full_like(ratio, 0.5).log() + ratio.log()  # half the policy
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    old = torch.zeros_like(ratio)
    _, statistics = grpo_loss(ratio.log(), old, reference, advantages, mask)
    kl = 0.5 + math.log(2) - 1
    expected = {"kl": kl, "ratio": 3.5 / 3, "clip_low": 1 / 3, "clip_high": 2 / 3}
    values = {name: value.item() for name, value in statistics.items()}
    assert values == pytest.approx(expected)
    assert not any(value.requires_grad or value.ndim for value in statistics.values())


@pytest.mark.exercise_7
@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_gradient_equals_finite_differences(normalise):
    p = problem(B=2, G=3, T=4)
    p.new.requires_grad_()
    rest = (p.old, p.reference, p.advantages, p.mask)

    def loss(new):
        return grpo_loss(new, *rest, beta=0.1, normalise=normalise)[0]

    assert torch.autograd.gradcheck(loss, p.new)
    (gradient,) = torch.autograd.grad(loss(p.new), p.new)
    assert (gradient[~p.mask] == 0).all()  # padding has no gradient
    assert gradient[p.mask].abs().min() > 0  # clipped tokens still have that of the KL


# --------------------------------------------------------------------------------------------------
# One token
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, 1.0, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),  # probabilities squared
        (2.0, 1.0, [p**0.5 / 1.9436 for p in (0.1, 0.4, 0.2, 0.3)]),  # their square roots
        (1.0, 0.95, [0.1, 0.4, 0.2, 0.3]),  # 0.4 + 0.3 + 0.2 = 0.9 is too little
        (1.0, 0.85, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 0.65, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 0.35, [0, 1, 0, 0]),
        (1.0, 1e-9, [0, 1, 0, 0]),
        (0.5, 0.8, [0, 0.16 / 0.25, 0, 0.09 / 0.25]),  # the temperature comes before top_p
    ],
)
def test_tokens_are_sampled_with_the_right_frequencies(temperature, top_p, expected):
    n, logits = 20_000, torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 7
    generator = torch.Generator().manual_seed(0)
    tokens = choose_token(logits.expand(n, -1), temperature, top_p, generator)
    frequencies = torch.bincount(tokens, minlength=4) / n
    assert ((frequencies == 0) == (torch.tensor(expected) == 0)).all()
    four_standard_errors = 4 * (0.25 / n) ** 0.5
    assert frequencies.tolist() == pytest.approx(expected, abs=four_standard_errors)


def test_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.9]])
    assert choose_token(logits, 0.0, 1.0, None).tolist() == [1, 0]


def test_logprobs_exclude_the_banned_tokens():
    torch.manual_seed(0)
    logits, banned, V = torch.randn(1, 12) * 3, torch.tensor([2, 7]), 12
    logits[0, banned] += 20  # the most likely ones
    allowed = [v for v in range(V) if v not in banned]
    for temperature in (0.7, 1.0):
        every = (logits.expand(V, -1), torch.arange(V))
        logprobs, entropy = token_logprobs(*every, temperature, banned)
        assert (logprobs[banned].exp() == 0).all()
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
        expected = torch.distributions.Categorical(logits=logits[0, allowed] / temperature)
        assert torch.allclose(logprobs[allowed], expected.logits, atol=1e-5)
        assert torch.allclose(entropy, expected.entropy().expand(V), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Rollout
# --------------------------------------------------------------------------------------------------

T = 12  # longest completion, tokens
HOT = 3.0  # a temperature at which samples differ, with any weights
NEVER = torch.tensor([-1])  # no token ends a completion


@pytest.fixture(scope="module")
def policy(policy_parts, samples):
    """The policy with the inputs and prompts of three images. The prompts differ in length."""
    inputs = policy_parts.read(samples[:3])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    vlm = policy_parts.model.get_base_model()
    prompts = encode_prompts(policy_parts.model, inputs)
    return SimpleNamespace(**vars(policy_parts), vlm=vlm, inputs=inputs, prompts=prompts)


def sample(policy, G=4, end=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    limits = (T, policy.end if end is None else end, policy.banned)
    return rollout(policy.model, policy.prompts, G, *limits, generator=generator, **options)


@contextlib.contextmanager
def recorded_logits(policy, change=None):
    """Collect the lm_head's outputs, one for each call. `change` may replace them."""
    calls = []

    def record(module, args, logits):
        calls.append(logits.detach())
        return change(logits) if change else None

    hook = policy.vlm.lm_head.register_forward_hook(record)
    try:
        yield calls
    finally:
        hook.remove()


def until_end(rows, end):
    """Cut each row of token ids (a list) after its first end token."""
    cut = []
    for row in rows:
        stops = [t for t, token in enumerate(row) if token in end.tolist()]
        cut.append(row[: stops[0] + 1] if stops else row)
    return cut


def without_padding(completions):
    """B * G lists of the token ids of each completion."""
    rows = zip(completions.ids.flatten(0, 1), completions.mask.flatten(0, 1), strict=True)
    return [ids[keep].tolist() for ids, keep in rows]


@pytest.fixture(scope="module")
def endless(policy):
    """A function that returns completions that nothing ends, and two tokens that would end some.

    It is a function because an unsolved exercise must fail in a test, not in a fixture.
    """

    @functools.cache
    def endless():
        completions = sample(policy, end=NEVER, temperature=HOT)
        assert completions.ids.shape == (3, 4, T) and completions.mask.all()
        rows = completions.ids.flatten(0, 1).tolist()
        for first in completions.ids[0, 0, 2:].tolist():
            for second in completions.ids[2, 3, 4:].tolist():
                end = torch.tensor([first, second])
                lengths = {len(row) for row in until_end(rows, end)}
                if T in lengths and len(lengths) > 2:
                    return completions, end
        raise AssertionError("no two tokens end some completions: are all samples the same?")

    return endless


@pytest.mark.exercise_8
def test_greedy_rollout_equals_generate(policy):
    def generate(end):
        out = policy.model.generate(
            **policy.inputs,
            do_sample=False,
            max_new_tokens=T,
            eos_token_id=end.tolist(),
            suppress_tokens=policy.banned.tolist(),
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[:, policy.inputs["input_ids"].shape[1] :].tolist(), out.logits

    tokens, logits = generate(torch.tensor([10**6]))
    with recorded_logits(policy) as calls:
        assert without_padding(sample(policy, 1, NEVER, temperature=0.0)) == tokens
    for found, expected in zip(calls, logits, strict=False):
        assert (found[:, -1] - expected).abs().max() < 1e-4
    assert len(calls) == T, "one call for the prompts, and one for each token but the last"
    for end in (policy.end, torch.tensor([tokens[0][4], tokens[1][7]])):
        expected = until_end(generate(end)[0], end)
        assert without_padding(sample(policy, 1, end, temperature=0.0)) == expected
        twice = [row for row in expected for _ in range(2)]
        assert without_padding(sample(policy, 2, end, temperature=0.0)) == twice
        most_likely = {"temperature": HOT, "top_p": 1e-9}
        assert without_padding(sample(policy, 1, end, **most_likely)) == expected


def decoder_tensors(decoder):
    tensors = [decoder.token, decoder.visible, decoder.positions]
    for layer in decoder.cache.layers:
        tensors += [layer.keys, layer.values, layer.cumulative_length]
    return tensors


def test_decoding_keeps_the_address_and_shape_of_every_tensor(policy):
    """A CUDA graph reads and writes the addresses that it was recorded with."""
    G, steps = 2, 5
    with torch.no_grad():
        decoder, _ = grpo.prefill(policy.vlm, policy.prompts, G, steps)
        before = [(t.data_ptr(), t.shape) for t in decoder_tensors(decoder)]
        for _ in range(steps):
            decoder.step(torch.full((G * len(policy.prompts),), 20))
    assert before == [(t.data_ptr(), t.shape) for t in decoder_tensors(decoder)]
    assert decoder.cache.layers[0].keys.shape[2] % 16 == 0  # so that memory is reused


class Gpu(str):
    """The name of the CPU as a device of type "cuda", for which `Decoder` records a graph."""

    type = "cuda"


class OnGpu:
    """The policy's VLM on the CPU, which says that it is on a GPU."""

    device = Gpu("cpu")

    def __init__(self, vlm):
        self.vlm = vlm

    def __getattr__(self, name):
        return getattr(self.vlm, name)

    def __call__(self, **inputs):
        return self.vlm(**inputs)


def on_gpu(policy):
    return SimpleNamespace(**vars(policy) | {"model": OnGpu(policy.vlm)})


def test_replayed_graph_samples_the_same_tokens(policy, monkeypatch):
    """A stand-in for a CUDA graph uses only the tensors that exist when it is recorded."""
    recorded = []

    def record_graph(forward):
        forward()  # the first run writes into the cache, as on a GPU
        decoder, logits = forward.__self__, forward().clone()
        inputs = {"input_ids": decoder.token, "attention_mask": decoder.visible}
        inputs |= {"position_ids": decoder.positions, "cache": decoder.cache}
        decoder.forward = None  # from now on only the graph can compute
        recorded.append(logits)
        return lambda: logits.copy_(policy.vlm(**inputs, use_cache=True).logits[:, -1])

    expected = sample(policy, end=NEVER, temperature=HOT)
    monkeypatch.setattr(grpo, "record_graph", record_graph)
    replayed = sample(on_gpu(policy), end=NEVER, temperature=HOT)
    assert len(recorded) == 1
    assert torch.equal(expected.ids, replayed.ids)


def test_decoding_continues_if_no_graph_can_be_recorded(policy, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    expected = sample(policy, end=NEVER, temperature=HOT)
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        found = sample(on_gpu(policy), end=NEVER, temperature=HOT)
    assert torch.equal(expected.ids, found.ids)


@pytest.mark.exercise_8
def test_first_end_token_ends_a_completion_and_changes_no_other(policy, endless):
    free, end = endless()
    ended = sample(policy, end=end, temperature=HOT)
    expected = until_end(free.ids.flatten(0, 1).tolist(), end)
    assert without_padding(ended) == expected
    assert (ended.mask.int().diff(dim=-1) <= 0).all()  # no gaps
    truncated = [row[-1] not in end.tolist() for row in expected]
    assert any(truncated) and not all(truncated)
    assert ended.truncated(end).flatten().tolist() == truncated
    assert free.truncated(NEVER).all()


@pytest.mark.exercise_8
def test_rollout_stops_when_all_are_finished(policy, endless):
    free, _ = endless()
    end = free.ids[:, :, 3].unique()
    lengths = [len(row) for row in until_end(free.ids.flatten(0, 1).tolist(), end)]
    assert sample(policy, end=end, temperature=HOT).ids.shape[-1] == max(lengths) <= 4


def test_truncated_checks_the_last_token():
    ids = torch.tensor([[[5, 9, 0], [9, 5, 5], [5, 5, 9], [8, 9, 9], [5, 5, 5]]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]]).bool()
    truncated = Completions(ids, mask).truncated(torch.tensor([8, 9]))
    assert truncated.tolist() == [[False, False, False, False, True]]


@pytest.mark.exercise_8
def test_samples_depend_on_the_seed_and_differ_within_a_group(policy, endless):
    free, _ = endless()
    again = sample(policy, end=NEVER, temperature=HOT)
    other = sample(policy, end=NEVER, temperature=HOT, seed=1)
    assert torch.equal(again.ids, free.ids)
    assert not torch.equal(other.ids, free.ids)
    assert all(len({tuple(row) for row in group}) == 4 for group in free.ids.tolist())


def sample_first_tokens(policy, n):
    """The first tokens (n,) of n completions of the second prompt, at temperature HOT."""
    generator = torch.Generator().manual_seed(0)
    limits = (1, policy.end, policy.banned, HOT)
    ids = rollout(policy.model, policy.prompts[1:2], n, *limits, generator=generator).ids
    assert ids.shape == (1, n, 1) and ids.dtype == torch.int64
    return ids.flatten()


def check_frequencies(tokens, probabilities):
    """Token frequencies within five standard errors of the probabilities (V,)."""
    n, p = len(tokens), probabilities
    frequencies = torch.bincount(tokens, minlength=len(p)) / n
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


@pytest.mark.exercise_8
def test_first_tokens_are_sampled_separately_and_at_the_temperature(policy):
    with recorded_logits(policy) as calls:
        tokens = sample_first_tokens(policy, 3000)
    logits = (calls[0][0, -1] / HOT).index_fill(0, policy.banned, -torch.inf)
    check_frequencies(tokens, logits.softmax(-1))


def test_samples_have_the_frequencies_that_the_logprobs_predict(policy):
    tokens, V = sample_first_tokens(policy, 3000), policy.vlm.lm_head.out_features
    allowed = torch.arange(V)[~torch.isin(torch.arange(V), policy.banned)]
    one_token = torch.ones(1, len(allowed), 1, dtype=torch.bool)
    every = Completions(allowed[None, :, None], one_token)
    with torch.no_grad():
        inputs = (policy.prompts[1:2], every, policy.banned, HOT)
        logprobs, entropy = group_logprobs(policy.model, *inputs)
    p = logprobs[0, :, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    check_frequencies(tokens, torch.zeros(V).index_copy(0, allowed, p))
    expected = -(p * logprobs[0, :, 0]).sum()
    assert torch.allclose(entropy, expected.expand_as(entropy), atol=1e-4)


@pytest.mark.exercise_8
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (2.0, 0.9)])
def test_banned_tokens_are_never_sampled(policy, temperature, top_p):
    with recorded_logits(policy, lambda logits: logits.index_fill(-1, policy.banned, 100.0)):
        ids = sample(policy, end=NEVER, temperature=temperature, top_p=top_p).ids
    assert not torch.isin(ids, policy.banned).any()


# --------------------------------------------------------------------------------------------------
# Log-probs
# --------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([[1, 4, 2], [9, 6, 6], [3, 1, 7]])  # the first row is not the longest


@pytest.fixture(scope="module")
def completions(policy):
    """Three completions of random tokens for each prompt, of different lengths from 1 to 9."""
    torch.manual_seed(0)
    V, longest = policy.vlm.lm_head.out_features, int(LENGTHS.max())
    allowed = torch.arange(V)[~torch.isin(torch.arange(V), policy.banned)]
    ids = allowed[torch.randint(len(allowed), (*LENGTHS.shape, longest))]
    return Completions(ids, torch.arange(longest) < LENGTHS[..., None])


@pytest.fixture(scope="module")
def weights(completions):
    """Factors of the log-probs, so that every token has another share in the gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(completions.mask.shape, generator=generator) * completions.mask


def padded_forward(policy, completions, temperature=1.0):
    """Log-probs and entropies (B, G, T), 0 on padding, from one ordinary forward pass.

    It has B * G rows: the prompts padded on the left, the completions padded on the right, each
    with its image. The model itself computes image features, positions and attention mask.
    """
    B, G, longest = completions.ids.shape
    inputs = policy.inputs
    P = inputs["input_ids"].shape[1]
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    ids, mask, types = (inputs[name].repeat_interleave(G, 0) for name in names)
    answers, keep = completions.ids.flatten(0, 1), completions.mask.flatten(0, 1)
    pixels = inputs["pixel_values"].unflatten(0, (B, -1))
    logits = policy.model(
        input_ids=torch.cat([ids, answers], 1),
        attention_mask=torch.cat([mask, keep.long()], 1),
        mm_token_type_ids=torch.cat([types, torch.zeros_like(answers)], 1),
        pixel_values=pixels.repeat_interleave(G, 0).flatten(0, 1),
        image_grid_thw=inputs["image_grid_thw"].repeat_interleave(G, 0),
        use_cache=False,
    ).logits[:, P - 1 : -1]
    logits = logits / temperature
    logits[..., policy.banned] = -torch.inf
    logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    return tuple(torch.where(keep, x, 0.0).view(B, G, longest) for x in (logprobs, entropy))


def lora_gradients(policy, logprobs, weights):
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return gradients


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.fixture(scope="module")
def expected(policy, completions, weights):
    """Log-probs, entropies and gradients of the padded forward pass."""
    logprobs, entropy = padded_forward(policy, completions)
    return logprobs.detach(), entropy, lora_gradients(policy, logprobs, weights)


@pytest.mark.exercise_10
def test_logprobs_and_gradients_equal_a_padded_forward(policy, completions, weights, expected):
    expected_logprobs, expected_entropy, expected_gradients = expected
    assert expected_gradients and all("lora_" in name for name in expected_gradients)
    inputs = (policy.prompts, completions, policy.banned)
    for chunk in (1, 7, 10_000):
        logprobs, entropy = group_logprobs(policy.model, *inputs, chunk=chunk)
        error = (logprobs - expected_logprobs).abs()
        hint = "first tokens: they are predicted at the prompt's last position"
        assert error[..., 0].max() < 1e-4, hint
        assert error.max() < 1e-4, "later tokens: look at sources, mask and positions"
        assert (entropy - expected_entropy).abs().max() < 1e-4
        padding = ~completions.mask
        assert (logprobs[padding] == 0).all() and (entropy[padding] == 0).all()
        assert not entropy.requires_grad
        assert_same_gradients(lora_gradients(policy, logprobs, weights), expected_gradients)


@pytest.mark.exercise_10
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_logprobs_use_the_temperature_of_sampling(policy, completions, temperature):
    inputs = (policy.prompts, completions, policy.banned, temperature)
    with torch.no_grad():
        found = group_logprobs(policy.model, *inputs)
        expected = padded_forward(policy, completions, temperature)
    for a, b in zip(found, expected, strict=True):  # log-probs, then entropies
        assert (a - b).abs().max() < 1e-4


def test_reference_logprobs_are_those_without_the_adapter(policy, completions, expected):
    with torch.no_grad(), policy.model.disable_adapter():
        inputs = (policy.prompts, completions, policy.banned)
        reference, _ = group_logprobs(policy.model, *inputs)
        without, _ = padded_forward(policy, completions)
    assert (reference - without).abs().max() < 1e-4
    assert (reference - expected[0]).abs().max() > 0.1  # the adapter has an effect


@pytest.mark.exercise_10
def test_activation_checkpointing_changes_nothing(
    policy, completions, weights, expected, monkeypatch
):
    calls = []
    model, language_model = policy.model, policy.vlm.model.language_model
    attention = type(language_model.layers[0].self_attn)
    forward = attention.forward

    def count(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", count)
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        logprobs, _ = group_logprobs(model, policy.prompts, completions, policy.banned)
        gradients = lora_gradients(policy, logprobs, weights)
    finally:
        model.eval()
        language_model.activation_checkpointing_disable()
    assert len(calls) == 2 * len(language_model.layers)  # again in the backward pass
    assert (logprobs - expected[0]).abs().max() < 1e-4
    assert_same_gradients(gradients, expected[2])


@pytest.mark.exercise_10
def test_slices_of_the_prompts_give_slices_of_the_logprobs(policy, completions, expected):
    with torch.no_grad():
        parts = [
            group_logprobs(policy.model, policy.prompts[rows], completions[rows], policy.banned)[0]
            for rows in (slice(0, 1), slice(1, 3))
        ]
    assert (torch.cat(parts) - expected[0]).abs().max() < 1e-4


@pytest.mark.exercise_10
def test_logits_are_computed_once_and_in_chunks(policy, completions):
    inputs = (policy.prompts, completions, policy.banned)
    with recorded_logits(policy) as calls:
        logprobs, _ = group_logprobs(policy.model, *inputs, chunk=16)
        lora_gradients(policy, logprobs, completions.mask)
    assert LENGTHS.sum() == 39  # so only tokens of completions
    assert [len(logits) for logits in calls] == [16, 16, 7], "not again in the backward pass"


def head_and_hidden(dtype, tokens=37, width=24, vocabulary=101):
    """A frozen lm_head, hidden states with gradient, tokens, and a weight for each log-prob."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    head.weight = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator) / 4)
    head = head.to(dtype).requires_grad_(False)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    chosen = torch.randint(20, vocabulary, (tokens,), generator=generator)
    return head, hidden, chosen, torch.randn(tokens, generator=generator)


@pytest.mark.parametrize("chunk", [1, 8, 37])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_gradient_equals_that_of_plain_autograd(dtype, temperature, chunk):
    """It is computed in the forward pass, and each log-prob has another weight in the loss."""
    head, hidden, tokens, weights = head_and_hidden(dtype)
    banned = torch.tensor([3, 11])
    plain, entropies = token_logprobs(head(hidden), tokens, temperature, banned)
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    pieces = zip(hidden.split(chunk), tokens.split(chunk), strict=True)
    parts = [head_logprobs(head, h, t, temperature, banned) for h, t in pieces]
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    assert logprobs.dtype == torch.float32 and logprobs.requires_grad
    assert not entropy.requires_grad
    if chunk == len(tokens):  # the same matrix product: "it changes no value"
        assert torch.equal(logprobs, plain) and torch.equal(entropy, entropies)
    assert (logprobs - plain).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    (found,) = torch.autograd.grad((logprobs * weights).sum(), hidden)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    for mine, theirs in zip(found.float(), expected.float(), strict=True):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


def test_the_head_has_no_gradient_and_keeps_no_logits():
    head, hidden, tokens, weights = head_and_hidden(torch.float32)
    logits = []
    hook = head.register_forward_hook(lambda *args: logits.append(weakref.ref(args[-1])))
    logprobs, _ = head_logprobs(head, hidden, tokens, 1.0, torch.tensor([3]))
    hook.remove()
    assert len(logits) == 1 and logits[0]() is None  # (N, V) is the largest tensor of a step
    (logprobs * weights).sum().backward()
    assert hidden.grad.abs().max() > 0 and head.weight.grad is None


def test_the_head_computes_no_gradient_that_nobody_needs(monkeypatch):
    head, hidden, tokens, _ = head_and_hidden(torch.float32)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("not needed"))
    with torch.no_grad():
        logprobs, _ = head_logprobs(head, hidden.detach(), tokens, 1.0, torch.tensor([3]))
    assert not logprobs.requires_grad


def test_logprobs_of_a_rollout_equal_those_it_was_sampled_with(policy, endless):
    """Cached decoding and packed rows give the sampled tokens the same probability."""
    free, _ = endless()
    with recorded_logits(policy) as calls:
        assert torch.equal(sample(policy, end=NEVER, temperature=HOT).ids, free.ids)
    calls[0] = calls[0].repeat_interleave(4, 0)  # the prompts, which run only once
    logits = torch.cat(calls, 1).view(3, 4, T, -1) / HOT
    logits[..., policy.banned] = -torch.inf
    sampled = logits.log_softmax(-1).gather(-1, free.ids[..., None])[..., 0]
    with torch.no_grad():
        logprobs, _ = group_logprobs(policy.model, policy.prompts, free, policy.banned, HOT)
    assert (logprobs - sampled).abs().max() < 1e-4


@pytest.fixture(scope="module")
def example():
    """Prompts of 3 and 5 tokens, with completions of 1, 4, 2 and of 2, 2, 3 tokens.

    All tokens and all positions differ. The largest position of the first prompt is that of a
    column, as with a wide image.
    """
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    positions = torch.arange(300, 330).view(3, 2, 5).flip(0)
    positions[2, 0, 3] = 500
    positions[1, 0, 0] = 900  # on padding, where it must not count
    prompts = Prompts(torch.arange(100, 110).view(2, 5), mask, positions, None)
    lengths = torch.tensor([[1, 4, 2], [2, 2, 3]])
    ids = torch.arange(200, 224).view(2, 3, 4)
    return prompts, Completions(ids, torch.arange(4) < lengths[..., None])


@pytest.mark.exercise_9
def test_packed_rows_by_hand(example):
    rows, _, segments, sources, targets = pack(*example)
    first = [200, 204, 205, 206, 207, 208, 209]
    second = [212, 213, 216, 217, 220, 221, 222]
    assert rows[0, :10].tolist() == [102, 103, 104, *first]
    assert rows[1].tolist() == [105, 106, 107, 108, 109, *second]
    assert segments[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert segments[1].tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    in_second_row = [12 + place for place in (4, 5, 4, 7, 4, 9, 10)]
    assert sources.tolist() == [2, 2, 4, 5, 6, 2, 8, *in_second_row]
    assert targets.tolist() == first + second


@pytest.mark.exercise_9
def test_every_completion_continues_after_the_largest_position_of_the_prompt(example):
    prompts, completions = example
    positions = pack(prompts, completions)[1]
    assert positions.shape == (3, 2, 12)
    assert torch.equal(positions[:, 0, :3], prompts.positions[:, 0, 2:])
    assert torch.equal(positions[:, 1, :5], prompts.positions[:, 1])
    for axis in range(3):
        assert positions[axis, 0, 3:10].tolist() == [501 + t for t in (0, 0, 1, 2, 3, 0, 1)]
        assert positions[axis, 1, 5:].tolist() == [330 + t for t in (0, 1, 0, 1, 0, 1, 2)]


@pytest.mark.exercise_9
def test_tokens_attend_to_the_prompt_and_their_own_completion():
    segments = torch.tensor([[0, 0, 1, 2, 2, 3, -1, -1], [0, 0, 0, 0, 1, 1, 2, 3]])
    attend = may_attend(segments)
    assert attend.dtype == torch.bool and attend.shape == (2, 8, 8)
    for b, row in enumerate(segments.tolist()):
        for query, own in enumerate(row):
            visible = attend[b, query].nonzero()[:, 0].tolist()
            if own >= 0:
                expected = [k for k, other in enumerate(row) if k <= query and other in (0, own)]
                assert visible == expected
            else:
                assert visible, "attention over nothing is NaN"


def test_vision_tower_runs_once(policy, completions, monkeypatch):
    calls = []
    visual = policy.vlm.model.visual
    forward = visual.forward

    def count(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(visual, "forward", count)
    prompts = encode_prompts(policy.model, policy.inputs)
    assert len(calls) == 1
    rollout(policy.model, prompts, 2, 3, policy.end, policy.banned)
    logprobs, _ = group_logprobs(policy.model, prompts, completions, policy.banned)
    lora_gradients(policy, logprobs, completions.mask.float())
    with torch.no_grad(), policy.model.disable_adapter():
        group_logprobs(policy.model, prompts[1:], completions[1:], policy.banned)
    assert len(calls) == 1


def test_encoded_prompts_have_no_gradient(policy):
    assert not any(feature.requires_grad for feature in policy.prompts.vision.pooler_output)
    assert len(policy.prompts) == 3 and len(policy.prompts[1:]) == 2

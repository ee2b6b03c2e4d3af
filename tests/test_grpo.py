"""Tests of grpo.py against transformers' `generate`, ordinary forward passes, and numbers worked
out by hand. test_unseen.py has those against published formulas."""

import contextlib
import doctest
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import grpo
import reward
import samr1_mini
from assignment.handout import EXERCISES
from grpo import (
    Completions,
    Decoder,
    group_advantages,
    group_logprobs,
    grpo_loss,
    head_logprobs,
    k3_kl,
    may_attend,
    pack,
    rollout,
)
from plumbing.decoding import StaticDecoder
from plumbing.vlm import Prompts, encode_prompts


def docstring_examples():
    """The examples of the scripts. Those of a function with an exercise have its mark."""
    exercises = {name: n for n, e in EXERCISES.items() if e.examples for name in e.functions}
    for module in (data, reward, grpo, samr1_mini):
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
        source = error.example.source.strip()
        pytest.fail(f"{source}\nreturns\n{error.got}and not\n{error.example.want}")
    except doctest.UnexpectedException as error:
        raise error.exc_info[1] from None


# --------------------------------------------------------------------------------------------------
# Advantages and KL
# --------------------------------------------------------------------------------------------------


def close_to_one_of(advantages, deviations, eps):
    """Whether the advantages of a group have one of the two standard deviations. The paper does
    not say which; our docstring does."""
    centred = torch.tensor(deviations)
    stds = [centred.std(unbiased=unbiased) for unbiased in (True, False)]
    return any(torch.allclose(advantages, centred / (std + eps), atol=1e-4) for std in stds)


@pytest.mark.exercise_7
def test_advantages_by_hand():
    # Means 3, 1 and 0.3. Each group has its own. In the last one eps matters.
    rewards = torch.tensor([[[6.0, 2.0, 1.0, 3.0]], [[0.0, 0.0, 4.0, 0.0]]])
    before = rewards.clone()
    advantages = group_advantages(rewards)
    assert close_to_one_of(advantages[0, 0], [3.0, -1.0, -2.0, 0.0], eps=1e-4)
    assert close_to_one_of(advantages[1, 0], [-1.0, -1.0, 3.0, -1.0], eps=1e-4)
    advantages = group_advantages(torch.tensor([0.30, 0.31, 0.29, 0.30]), eps=1.0)
    assert close_to_one_of(advantages, [0.0, 0.01, -0.01, 0.0], eps=1.0)
    assert torch.equal(rewards, before), "rewards must not be changed in place"


@pytest.mark.parametrize("largest", [pytest.param(0.01, marks=pytest.mark.exercise_7), 0.0])
@pytest.mark.parametrize("reward", [0.0, 0.1, 4 / 3, 5.999999])
def test_equal_rewards_give_advantages_of_zero(reward, largest):
    """The formula as published gives almost zero, and ours exactly zero."""
    for G in range(2, 17):  # the mean of equal numbers can differ from them by rounding
        assert group_advantages(torch.full((2, G), reward)).abs().max() <= largest


@pytest.mark.exercise_8
def test_k3_and_its_gradient_by_hand():
    """The reference is e^8, 1/e, 2 and 1 times as likely as the policy."""
    logprobs = torch.tensor([-9.0, -200.0, math.log(0.25), -1.0], requires_grad=True)
    kl = k3_kl(logprobs, torch.tensor([-1.0, -201.0, math.log(0.5), -1.0]))
    expected = [math.exp(8) - 9, math.exp(-1), 1 - math.log(2), 0]
    assert kl.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert kl.requires_grad, "the loss needs the gradient of the KL: no no_grad, no detach"
    kl.sum().backward()
    expected = [1 - math.exp(8), 1 - math.exp(-1), -1, 0]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


@pytest.mark.exercise_9
def test_loss_and_statistics_by_hand():
    # Two prompts with two completions of one and two tokens. With advantage 1, ratio 2 counts as
    # 1.3. With advantage -2, ratio 0.5 counts as 0.8, and 0.9 as 0.9. 7 is padding.
    ratio = torch.tensor([[[2.0, 7.0], [0.5, 0.9]], [[1.0, 7.0], [1.0, 1.0]]])
    mask = torch.tensor([[[True, False], [True, True]]] * 2)
    advantages = torch.tensor([[1.0, -2.0], [1.0, -1.0]])
    new = ratio.log()
    reference = new - math.log(2)  # half as likely for every token
    kl = 0.5 + math.log(2) - 1
    loss, statistics, side = grpo_loss(
        new, torch.zeros(2, 2, 2), reference, advantages, mask, beta=0.1
    )
    expected = -((1.3 - 1.6 - 1.8) / 3 + (1 - 1 - 1) / 3) / 2
    assert loss.item() == pytest.approx(expected + 0.1 * kl)
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(
        {"kl": kl, "ratio": (2 + 0.5 + 0.9 + 3) / 6, "clip_low": 1 / 6, "clip_high": 1 / 6}
    )
    assert side[mask].tolist() == [1, -1, 0, 0, 0, 0]


@pytest.mark.exercise_9
def test_all_four_cases_of_the_clip():
    # Columns: ratio 0.7, 0.9, 1.2, 1.5. Rows: advantage 1, -1. eps_low 0.2, eps_high 0.3.
    ratio = torch.tensor([0.7, 0.9, 1.2, 1.5], dtype=torch.float64)
    new = ratio.log().expand(1, 2, 4).clone().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    loss, _, side = grpo_loss(new, torch.zeros_like(new), None, advantages, mask, beta=0)
    loss.backward()
    # d(-ratio * A / 8) / d log-prob = -ratio * A / 8, or exactly 0 where the ratio is clipped.
    expected = [[-0.7 / 8, -0.9 / 8, -1.2 / 8, 0], [0, 0.9 / 8, 1.2 / 8, 1.5 / 8]]
    assert torch.allclose(new.grad[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert new.grad[0, 0, 3] == 0 and new.grad[0, 1, 0] == 0
    expected = -((0.7 + 0.9 + 1.2 + 1.3) - (0.8 + 0.9 + 1.2 + 1.5)) / 8
    assert loss.item() == pytest.approx(expected)
    assert side.tolist() == [[[0, 0, 0, 1], [-1, 0, 0, 0]]]


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
    return SimpleNamespace(
        **vars(policy_parts),
        vlm=policy_parts.model.get_base_model(),
        samples=samples[:3],
        inputs=inputs,
        prompts=encode_prompts(policy_parts.model, inputs),
    )


def sample(policy, seed=0, **changes):
    options = dict(
        prompts=policy.prompts,
        G=4,
        max_new_tokens=T,
        end=NEVER,
        banned=policy.banned,
        temperature=HOT,
        generator=torch.Generator().manual_seed(seed),
    )
    return rollout(policy.model, **options | changes)


@contextlib.contextmanager
def recorded_logits(policy, change=None):
    """Collect the lm_head's outputs, one for each call. `change` may replace them."""
    calls = []

    def record(module, args, logits):
        calls.append(logits.detach().clone())
        return change(logits) if change else None

    hook = policy.vlm.lm_head.register_forward_hook(record)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.exercise_10
@pytest.mark.parametrize("decoder", [Decoder, StaticDecoder])
def test_greedy_rollout_equals_generate(policy, decoder):
    out = policy.model.generate(
        **policy.inputs,
        do_sample=False,
        max_new_tokens=T,
        eos_token_id=10**6,
        suppress_tokens=policy.banned.tolist(),
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[:, policy.inputs["input_ids"].shape[1] :].repeat_interleave(2, 0)
    with recorded_logits(policy) as calls:
        found = sample(policy, G=2, temperature=0.0, decoder=decoder)
    assert found.mask.all() and torch.equal(found.ids.flatten(0, 1), tokens)
    assert len(calls) == T, "one call for the prompts, and one for each token but the last"
    calls[0] = calls[0].repeat_interleave(2, 0)  # the prompts, which run only once
    for ours, expected in zip(calls, out.logits, strict=True):
        assert (ours[:, -1] - expected.repeat_interleave(2, 0)).abs().max() < 1e-4


@pytest.mark.exercise_10
@pytest.mark.parametrize("decoder", [Decoder, StaticDecoder])
def test_first_end_token_ends_a_completion_and_changes_no_other(policy, decoder):
    free = sample(policy)
    assert free.mask.all() and free.truncated(NEVER).all()
    tokens = free.ids.unique().tolist()
    rare = sorted(tokens, key=lambda token: int((free.ids == token).any(-1).sum()))
    end = torch.tensor(rare[:2])
    ended = sample(policy, end=end, decoder=decoder)
    ends = torch.isin(free.ids, end)
    kept = ends.cumsum(-1) - ends.int() == 0  # no end token stands before these
    assert torch.equal(ended.mask, kept) and torch.equal(ended.ids[kept], free.ids[kept])
    truncated = ~ends.any(-1)
    assert truncated.any() and not truncated.all()
    assert torch.equal(ended.truncated(end), truncated)
    third = free.ids[:, :, 3].unique()
    assert sample(policy, end=third, decoder=decoder).ids.shape[-1] <= 4, "all are finished"


@pytest.mark.exercise_10
def test_samples_depend_on_the_seed_and_differ_within_a_group(policy):
    free = sample(policy)
    assert torch.equal(sample(policy).ids, free.ids)
    assert not torch.equal(sample(policy, seed=1).ids, free.ids)
    assert all(len({tuple(row) for row in group}) == 4 for group in free.ids.tolist())


@pytest.mark.exercise_10
def test_first_tokens_are_sampled_separately_and_at_the_temperature(policy):
    n = 3000
    with recorded_logits(policy) as calls:
        first = sample(policy, prompts=policy.prompts[1:2], G=n, max_new_tokens=1)
    p = (calls[0][0, -1] / HOT).index_fill(0, policy.banned, -torch.inf).softmax(-1)
    frequencies = torch.bincount(first.ids.flatten(), minlength=len(p)) / n
    five_standard_errors = 5 * (p * (1 - p) / n).sqrt() + 1 / n
    assert ((frequencies - p).abs() <= five_standard_errors).all()


@pytest.mark.exercise_10
@pytest.mark.parametrize("temperature, others", [(0.0, 0.0), (1.0, 0.0), (1e9, -1e11)])
def test_banned_tokens_are_never_sampled(policy, temperature, others):
    """At 1e9, a finite mask of -1e9 would be as likely as a logit of -1."""
    change = lambda logits: (logits + others).index_fill(-1, policy.banned, 100.0)  # noqa: E731
    with recorded_logits(policy, change):
        ids = sample(policy, temperature=temperature).ids
    assert not torch.isin(ids, policy.banned).any()


# --------------------------------------------------------------------------------------------------
# The packed row
# --------------------------------------------------------------------------------------------------


@pytest.mark.exercise_11
def test_packed_rows_by_hand():
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
    rows = pack(prompts, Completions(ids, torch.arange(4) < lengths[..., None]))

    first = [200, 204, 205, 206, 207, 208, 209]
    second = [212, 213, 216, 217, 220, 221, 222]
    assert rows.ids[0, :10].tolist() == [102, 103, 104, *first]
    assert rows.ids[1].tolist() == [105, 106, 107, 108, 109, *second]
    assert rows.segments[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert rows.segments[1].tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    in_second_row = [12 + place for place in (4, 5, 4, 7, 4, 9, 10)]
    assert rows.sources.tolist() == [2, 2, 4, 5, 6, 2, 8, *in_second_row]
    assert rows.targets.tolist() == first + second
    # Every completion continues after the largest position of its prompt.
    assert torch.equal(rows.positions[:, 0, :3], positions[:, 0, 2:])
    assert torch.equal(rows.positions[:, 1, :5], positions[:, 1])
    for axis in range(3):
        assert rows.positions[axis, 0, 3:10].tolist() == [501, 501, 502, 503, 504, 501, 502]
        assert rows.positions[axis, 1, 5:].tolist() == [330, 331, 330, 331, 330, 331, 332]


@pytest.mark.exercise_11
def test_tokens_attend_to_the_prompt_and_their_own_completion():
    segments = torch.tensor([[0, 0, 1, 2, 2, 3, -1, -1], [0, 0, 0, 0, 1, 1, 2, 3]])
    attend = may_attend(segments)
    assert attend.dtype == torch.bool and attend.shape == (2, 8, 8)
    for b, row in enumerate(segments.tolist()):
        for query, own in enumerate(row):
            visible = attend[b, query].nonzero()[:, 0].tolist()
            expected = [k for k, other in enumerate(row) if k <= query and other in (0, own)]
            assert visible == expected if own >= 0 else visible, "of nothing, attention is NaN"


# --------------------------------------------------------------------------------------------------
# Log-probs
# --------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([[1, 4, 2], [9, 6, 6], [3, 1, 7]])  # the first row is not the longest


@pytest.fixture(scope="module")
def completions(policy):
    """Three completions of random tokens for each prompt, of different lengths from 1 to 9."""
    torch.manual_seed(0)
    V = policy.vlm.lm_head.out_features
    longest = int(LENGTHS.max())
    allowed = torch.arange(V)[~torch.isin(torch.arange(V), policy.banned)]
    ids = allowed[torch.randint(len(allowed), (*LENGTHS.shape, longest))]
    return Completions(ids, torch.arange(longest) < LENGTHS[..., None])


def separate_forwards(policy, completions, temperature=1.0):
    """Log-probs and entropies (B, G, T), 0 on padding, from a forward pass for each completion.

    No row is padded. The model itself computes image features, positions and attention mask.
    """
    logprobs, entropies = [], []
    for b, one in enumerate(policy.samples):
        inputs = policy.read([one])
        for ids, keep in zip(completions.ids[b], completions.mask[b], strict=True):
            answer = ids[keep]
            row = torch.cat([inputs["input_ids"], answer[None]], 1)
            longer = {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                "mm_token_type_ids": F.pad(inputs["mm_token_type_ids"], (0, len(answer))),
            }
            logits = policy.model(**inputs | longer, use_cache=False).logits[0]
            logits = logits[-len(answer) - 1 : -1] / temperature
            logits = logits.index_fill(-1, policy.banned, -torch.inf)
            distribution = torch.distributions.Categorical(logits=logits)
            logprobs.append(distribution.log_prob(answer))
            entropies.append(distribution.entropy().detach())
    zeros = torch.zeros(completions.mask.shape)
    return [zeros.masked_scatter(completions.mask, torch.cat(x)) for x in (logprobs, entropies)]


def lora_gradients(policy, logprobs):
    """Gradients of a loss in which each log-prob has another weight."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return gradients


@pytest.mark.exercise_12
@pytest.mark.parametrize("temperature, chunk, sizes", [(1.0, None, [39]), (0.6, 16, [16, 16, 7])])
def test_logprobs_and_gradients_equal_those_of_separate_rows(
    policy, completions, temperature, chunk, sizes
):
    with recorded_logits(policy) as calls:
        logprobs, entropy = group_logprobs(
            policy.model, policy.prompts, completions, policy.banned, temperature, chunk
        )
        gradients = lora_gradients(policy, logprobs)
    assert [len(logits) for logits in calls] == sizes, "only tokens of completions, and once"
    expected, expected_entropy = separate_forwards(policy, completions, temperature)
    error = (logprobs - expected).abs()
    hint = "first tokens: they are predicted at the prompt's last position"
    assert error[..., 0].max() < 1e-4, hint
    assert error.max() < 1e-4, "later tokens: look at sources, mask and positions"
    assert (entropy - expected_entropy).abs().max() < 1e-4
    padding = ~completions.mask
    assert (logprobs[padding] == 0).all() and (entropy[padding] == 0).all()
    assert not entropy.requires_grad
    expected = lora_gradients(policy, expected)
    assert gradients.keys() == expected.keys() and all("lora_" in name for name in expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def head_and_hidden(dtype, tokens=37, width=24, vocabulary=101):
    """A frozen lm_head, hidden states with gradient, and the tokens that they predict."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).to(dtype).requires_grad_(False)
    hidden = (4 * torch.randn(tokens, width)).to(dtype).requires_grad_()
    return head, hidden, torch.randint(20, vocabulary, (tokens,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_heads_logprobs_and_gradient_equal_those_of_plain_autograd(dtype):
    """It is computed in the forward pass. Each log-prob has another weight in the loss."""
    temperature = 0.7
    head, hidden, tokens = head_and_hidden(dtype)
    weights = torch.randn(len(tokens))
    banned = torch.arange(20)  # about a fifth of all probability, and none of the tokens
    logits = (head(hidden).float() / temperature).index_fill(-1, banned, -torch.inf)
    plain = torch.distributions.Categorical(logits=logits)
    (expected,) = torch.autograd.grad((plain.log_prob(tokens) * weights).sum(), hidden)
    logprobs, entropy = head_logprobs(head, hidden, tokens, temperature, banned)
    (found,) = torch.autograd.grad((logprobs * weights).sum(), hidden)
    assert torch.allclose(logprobs, plain.log_prob(tokens), atol=1e-5)
    assert torch.allclose(entropy, plain.entropy(), atol=1e-5)
    assert logprobs.dtype == torch.float32 and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    difference = (found.float() - expected.float()).norm(dim=1)
    assert (difference < tolerance * expected.float().norm(dim=1)).all()


def test_the_head_keeps_no_logits():
    head, hidden, tokens = head_and_hidden(torch.float32)
    logits = []
    hook = head.register_forward_hook(lambda *args: logits.append(weakref.ref(args[-1])))
    logprobs, _ = head_logprobs(head, hidden, tokens, 1.0, torch.tensor([3]))
    hook.remove()
    assert len(logits) == 1 and logits[0]() is None  # (N, V) is the largest tensor of a step
    assert logprobs.requires_grad

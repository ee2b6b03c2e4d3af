"""GRPO, checked against transformers' generate and plain padded forward passes, TRL's formula, finite differences, and
numbers worked by hand."""

import contextlib
import doctest
import math
from types import SimpleNamespace

import pytest
import torch

import data
import grpo
import reward
from grpo import (
    Completions,
    Prompts,
    choose_token,
    encode_prompts,
    group_advantages,
    group_logprobs,
    grpo_loss,
    k3_kl,
    may_attend,
    pack,
    rollout,
    token_logprobs,
)

EXERCISES = {  # whose docstrings' examples need the exercise
    **{"reward.parse_answer": 1, "reward.intersection_and_union": 3, "reward.tiered_reward": 4, "grpo.group_advantages": 5},
    **{"grpo.k3_kl": 6, "grpo.grpo_loss": 7, "grpo.may_attend": 10, "grpo.pack": 10},
}


def docstring_examples():
    for module in (data, reward, grpo):
        for example in doctest.DocTestFinder(exclude_empty=True).find(module):
            number = EXERCISES.get(example.name)
            yield pytest.param(example, id=example.name, marks=[getattr(pytest.mark, f"exercise_{number}")] if number else [])


@pytest.mark.parametrize("example", list(docstring_examples()))
def test_docstring_examples(example):
    try:
        doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    except doctest.DocTestFailure as error:
        pytest.fail(f"{error.example.source.strip()}\ngives\n{error.got}and not\n{error.example.want}")
    except doctest.UnexpectedException as error:
        raise error.exc_info[1] from None


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and KL
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.exercise_5
def test_advantages_by_hand():
    # Mean 3, deviations 3, -1, -2, 0: unbiased variance 14 / 3. Each group is taken by itself.
    rewards = torch.tensor([[[6.0, 2.0, 1.0, 3.0]], [[0.0, 0.0, 4.0, 0.0]]], dtype=torch.float64)
    advantages = group_advantages(rewards)
    assert advantages[0, 0].tolist() == pytest.approx([d / (math.sqrt(14 / 3) + 1e-4) for d in (3, -1, -2, 0)])
    assert advantages[1, 0].tolist() == pytest.approx([d / (2 + 1e-4) for d in (-1, -1, 3, -1)])


@pytest.mark.exercise_5
@pytest.mark.parametrize("reward", [0.0, 5.0, 0.1, 4 / 3, 5.999999])
def test_equal_rewards_give_advantages_of_exactly_zero(reward):
    for G in range(2, 17):  # the mean of equal numbers is not always that number
        advantages = group_advantages(torch.full((2, G), reward))
        assert (advantages == 0).all(), f"{G} equal rewards of {reward} must give exactly 0, rounding or not"


@pytest.mark.exercise_5
def test_small_differences_count_and_the_rewards_stay():
    rewards = torch.tensor([[0.30, 0.31, 0.29, 0.30]])  # of raw IoU: mean 0.3, unbiased standard deviation 0.00816
    assert group_advantages(rewards)[0].tolist() == pytest.approx([0, 1.2099, -1.2099, 0], abs=1e-3)
    assert group_advantages(rewards, eps=1.0)[0].tolist() == pytest.approx([0, 0.00992, -0.00992, 0], abs=1e-4)
    assert rewards.tolist() == torch.tensor([[0.30, 0.31, 0.29, 0.30]]).tolist(), "rewards must not be changed in place"


@pytest.mark.exercise_6
def test_k3_by_hand():
    # q = reference / policy = 2, 1/2, 1: q - log q - 1.
    kl = k3_kl(torch.tensor([0.25, 0.5, 0.3]).log(), torch.tensor([0.5, 0.25, 0.3]).log())
    assert kl.tolist() == pytest.approx([2 - math.log(2) - 1, 0.5 + math.log(2) - 1, 0], abs=1e-6)


@pytest.mark.exercise_6
def test_k3_is_not_negative_and_averages_to_the_kl():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50).double().log_softmax(-1)
    assert k3_kl(policy, reference).min() >= 0
    mean = (policy.exp() * k3_kl(policy, reference)).sum()  # the expectation over tokens that the policy samples
    assert mean.item() == pytest.approx((policy.exp() * (policy - reference)).sum().item())
    near = torch.randn(10_000) * 10 ** torch.empty(10_000).uniform_(-9, 1)
    assert k3_kl(torch.zeros(10_000), near).min() >= -1e-6  # rounding


@pytest.mark.exercise_6
def test_k3_far_from_the_reference_and_its_gradient():
    """By hand: at log q = 8, e^8 - 9; at log-probs -200 and -201, 1 + e^-1 - 1. The derivative by the policy's log-prob is 1 - q."""
    logprobs = torch.tensor([-9.0, -200.0, -1.0], requires_grad=True)
    kl = k3_kl(logprobs, torch.tensor([-1.0, -201.0, -1.0]))
    assert kl.tolist() == pytest.approx([math.exp(8) - 9, math.exp(-1), 0])
    assert kl.requires_grad, "the loss takes the gradient of the KL: no no_grad, no detach"
    kl.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1 - math.exp(8), 1 - math.exp(-1), 0])


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def problem(B=3, G=4, T=6):
    """A random loss problem, float64: completions of 1 to T tokens, ratios from 0.4 to 2.7."""
    generator = torch.Generator().manual_seed(1)
    new, old, reference = -torch.rand(3, B, G, T, generator=generator, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=generator)
    advantages = torch.randn(B, G, generator=generator, dtype=torch.float64)
    return SimpleNamespace(new=new, old=old, reference=reference, advantages=advantages, mask=mask)


def published_loss(p, loss_type, epsilon, epsilon_high, beta):
    """TRL's GRPO loss (its documentation, and Shao et al. 2024, eq. 3 and 4), a token at a time, for each group alone.

    loss_type "grpo": mean over completions of the mean over tokens; "dapo": sum over tokens / number of tokens.
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
def test_loss_is_the_published_one(normalise, loss_type, B):
    p = problem(B)
    for eps_low, eps_high, beta in ((0.2, 0.3, 0.005), (0.1, 0.1, 1.0), (0.2, 0.5, 0.0)):
        loss, stats = grpo_loss(p.new, p.old, p.reference, p.advantages, p.mask, eps_low, eps_high, beta, normalise)
        assert loss.item() == pytest.approx(published_loss(p, loss_type, eps_low, eps_high, beta))
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0  # both sides take part


@pytest.mark.exercise_7
def test_loss_by_hand():
    # Two prompts, two completions of one and two tokens. At advantage 1 ratio 2 counts as 1.3; at -2, 0.5 counts as 0.8
    # and 0.9 as it is.
    ratio = torch.tensor([[[2.0, 7.0], [0.5, 0.9]], [[1.0, 7.0], [1.0, 1.0]]])
    advantages = torch.tensor([[1.0, -2.0], [1.0, -1.0]])
    mask = torch.tensor([[[True, False], [True, True]], [[True, False], [True, True]]])
    new, old = ratio.log(), torch.zeros(2, 2, 2)
    token = -((1.3 - 1.6 - 1.8) / 3 + (1 - 1 - 1) / 3) / 2
    sequence = -((1.3 - (1.6 + 1.8) / 2) / 2 + (1 - 1) / 2) / 2
    kl = 0.5 + math.log(2) - 1  # of every token, the reference being half as likely: with any normalisation its mean
    for normalise, gain in (("token", token), ("sequence", sequence)):
        assert grpo_loss(new, old, None, advantages, mask, beta=0, normalise=normalise)[0].item() == pytest.approx(gain)
        loss, _ = grpo_loss(new, old, new - math.log(2), advantages, mask, beta=0.1, normalise=normalise)
        assert loss.item() == pytest.approx(gain + 0.1 * kl)
    with pytest.raises(ValueError, match="batch"):
        grpo_loss(new, old, None, advantages, mask, beta=0, normalise="batch")


@pytest.mark.exercise_7
def test_the_four_sides_of_the_clip():
    # Columns: ratio 0.7, 0.9, 1.2, 1.5; rows: advantage +1, -1. eps_low 0.2, eps_high 0.3.
    ratio = torch.tensor([0.7, 0.9, 1.2, 1.5], dtype=torch.float64)
    new = ratio.log().expand(1, 2, 4).clone().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    loss, stats = grpo_loss(new, torch.zeros_like(new), None, advantages, torch.ones(1, 2, 4, dtype=torch.bool), beta=0)
    loss.backward()
    # d(-ratio * A / 8) / d log-prob = -ratio * A / 8 where the clip does not act, exactly nothing where it does.
    assert new.grad[0, 0].tolist() == pytest.approx([-0.7 / 8, -0.9 / 8, -1.2 / 8, 0], abs=1e-12)
    assert new.grad[0, 1].tolist() == pytest.approx([0, 0.9 / 8, 1.2 / 8, 1.5 / 8], abs=1e-12)
    assert new.grad[0, 0, 3] == 0 and new.grad[0, 1, 0] == 0
    assert loss.item() == pytest.approx(-((0.7 + 0.9 + 1.2 + 1.3) - (0.8 + 0.9 + 1.2 + 1.5)) / 8)
    assert stats["clip_high"].item() == stats["clip_low"].item() == pytest.approx(1 / 8)
    assert stats["ratio"].item() == pytest.approx(4.3 / 4) and stats["kl"] == 0


@pytest.mark.exercise_7
def test_statistics_count_real_tokens_only():
    ratio = torch.tensor([[[1.5, 1.5], [0.5, 9.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True], [True, False]]])
    reference = torch.full_like(ratio, 0.5).log() + ratio.log()  # half the policy
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    _, stats = grpo_loss(ratio.log(), torch.zeros_like(ratio), reference, advantages, mask)
    wanted = {"kl": 0.5 + math.log(2) - 1, "ratio": 3.5 / 3, "clip_low": 1 / 3, "clip_high": 2 / 3}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(wanted)
    assert not any(value.requires_grad or value.ndim for value in stats.values())


@pytest.mark.exercise_7
@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_gradient_is_that_of_finite_differences(normalise):
    p = problem(B=2, G=3, T=4)
    p.new.requires_grad_()

    def loss(new):
        return grpo_loss(new, p.old, p.reference, p.advantages, p.mask, beta=0.1, normalise=normalise)[0]

    assert torch.autograd.gradcheck(loss, p.new)
    (gradient,) = torch.autograd.grad(loss(p.new), p.new)
    assert (gradient[~p.mask] == 0).all() and gradient[
        p.mask
    ].abs().min() > 0  # padding pulls nowhere; the KL everywhere


# ---------------------------------------------------------------------------------------------------------------------
# One token
# ---------------------------------------------------------------------------------------------------------------------


def shares(logits, n=20_000, **how):
    """Relative frequencies of n draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = choose_token(logits.expand(n, -1), generator=generator, **how)
    return torch.bincount(tokens, minlength=len(logits)) / n


@pytest.mark.parametrize(
    "temperature, top_p, wanted",
    [
        (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, 1.0, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),  # probabilities squared
        (2.0, 1.0, [p**0.5 / sum(q**0.5 for q in (0.1, 0.4, 0.2, 0.3)) for p in (0.1, 0.4, 0.2, 0.3)]),
        (1.0, 0.95, [0.1, 0.4, 0.2, 0.3]),  # 0.4 + 0.3 + 0.2 = 0.9 do not suffice
        (1.0, 0.85, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 0.65, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 0.35, [0, 1, 0, 0]),
        (1.0, 1e-9, [0, 1, 0, 0]),
        (0.5, 0.8, [0, 0.16 / 0.25, 0, 0.09 / 0.25]),  # the nucleus is taken after the temperature
    ],
)
def test_tokens_are_drawn_with_the_right_shares(temperature, top_p, wanted):
    drawn = shares(torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 7, temperature=temperature, top_p=top_p)
    assert ((drawn == 0) == (torch.tensor(wanted) == 0)).all()
    assert drawn.tolist() == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)  # four standard errors


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.9]])
    assert choose_token(logits, 0.0, 1.0, None).tolist() == [1, 0]


def test_logprobs_leave_the_banned_tokens_out():
    torch.manual_seed(0)
    logits, banned, V = torch.randn(1, 12) * 3, torch.tensor([2, 7]), 12
    logits[0, banned] += 20  # they would take all of it
    allowed = [v for v in range(V) if v not in banned]
    for temperature in (0.7, 1.0):
        logprobs, entropy = token_logprobs(logits.expand(V, -1), torch.arange(V), temperature, banned)
        assert (logprobs[banned].exp() == 0).all()
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
        kept = torch.distributions.Categorical(logits=logits[0, allowed] / temperature)
        assert torch.allclose(logprobs[allowed], kept.logits, atol=1e-5)
        assert torch.allclose(entropy, kept.entropy().expand(V), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rollout
# ---------------------------------------------------------------------------------------------------------------------

T = 12  # tokens of a completion, at most
HOT = 3.0  # a temperature at which samples differ, whatever the weights
NEVER = torch.tensor([-1])  # no token ends a completion


@pytest.fixture(scope="module")
def policy(policy_parts, samples):
    """The policy with the inputs and prompts of three images, whose prompts differ in length."""
    inputs = policy_parts.read(samples[:3])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    vlm = policy_parts.model.get_base_model()
    return SimpleNamespace(
        **vars(policy_parts), vlm=vlm, inputs=inputs, prompts=encode_prompts(policy_parts.model, inputs)
    )


def draw(policy, G=4, end=None, seed=0, **how):
    generator = torch.Generator().manual_seed(seed)
    end = policy.end if end is None else end
    return rollout(policy.model, policy.prompts, G, T, end, policy.banned, generator=generator, **how)


@contextlib.contextmanager
def heard(policy, change=None):
    """Collects the logits that leave the lm_head, call by call; `change` may put others in their place."""
    calls = []

    def note(module, args, logits):
        calls.append(logits.detach())
        return change(logits) if change else None

    hook = policy.vlm.lm_head.register_forward_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def until_end(rows, end):
    """Rows of token ids (lists), each cut after its first end token."""
    cut = []
    for row in rows:
        stops = [t for t, token in enumerate(row) if token in end.tolist()]
        cut.append(row[: stops[0] + 1] if stops else row)
    return cut


def spoken(completions):
    """B * G lists of the tokens that count."""
    rows = zip(completions.ids.flatten(0, 1), completions.mask.flatten(0, 1), strict=True)
    return [ids[keep].tolist() for ids, keep in rows]


@pytest.fixture(scope="module")
def endless(policy):
    """Four samples a prompt, that no token ends; and two tokens that end some of them when asked to."""
    sampled = draw(policy, end=NEVER, temperature=HOT)
    assert sampled.ids.shape == (3, 4, T) and sampled.mask.all()
    for first in sampled.ids[0, 0, 2:].tolist():
        for second in sampled.ids[2, 3, 4:].tolist():
            ends = torch.tensor([first, second])
            lengths = {len(row) for row in until_end(sampled.ids.flatten(0, 1).tolist(), ends)}
            if T in lengths and len(lengths) > 2:
                return sampled, ends
    raise AssertionError("no two tokens end some completions and not all: are the samples of a group all the same?")


@pytest.mark.exercise_8
def test_greedy_rollout_is_generate(policy):
    def generate(ends):
        out = policy.model.generate(
            **policy.inputs,
            do_sample=False,
            max_new_tokens=T,
            eos_token_id=ends.tolist(),
            suppress_tokens=policy.banned.tolist(),
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[:, policy.inputs["input_ids"].shape[1] :].tolist(), out.logits

    tokens, logits = generate(torch.tensor([10**6]))
    with heard(policy) as calls:
        assert spoken(draw(policy, 1, NEVER, temperature=0.0)) == tokens
    for mine, wanted in zip(calls, logits, strict=False):  # tells more than the tokens where the weights are random
        assert (mine[:, -1] - wanted).abs().max() < 1e-4
    assert len(calls) == T, "one run of the model for the prompts and one for each token but the last"
    for end in (policy.end, torch.tensor([tokens[0][4], tokens[1][7]])):
        wanted = until_end(generate(end)[0], end)
        assert spoken(draw(policy, 1, end, temperature=0.0)) == wanted
        assert spoken(draw(policy, 2, end, temperature=0.0)) == [row for row in wanted for _ in range(2)]
        assert spoken(draw(policy, 1, end, temperature=HOT, top_p=1e-9)) == wanted  # the likeliest alone is left


def test_decode_steps_change_tensors_in_place_and_never_their_shape(policy):
    """A CUDA graph replays addresses: whatever a step reads or writes must lie where it lay."""
    vlm, prompts = policy.model.get_base_model(), policy.prompts
    with torch.no_grad():
        out = vlm(
            input_ids=prompts.ids, attention_mask=prompts.mask, position_ids=prompts.positions,
            mm_encoder_outputs={"image": prompts.vision}, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        decoder = grpo.Decoder(vlm, out.past_key_values, prompts, 2, 5)
        tensors = [decoder.token, decoder.visible, decoder.positions]
        tensors += [t for layer in decoder.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]
        places = [(t.data_ptr(), t.shape) for t in tensors]
        for _ in range(5):
            decoder.step(torch.full((2 * len(prompts),), 20))
    after = [decoder.token, decoder.visible, decoder.positions]
    after += [t for layer in decoder.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]
    assert places == [(t.data_ptr(), t.shape) for t in after]
    assert decoder.cache.layers[0].keys.shape[2] % 16 == 0  # lengths come in few sizes


def test_a_replayed_graph_gives_the_same_tokens(policy, monkeypatch):
    """A stand-in for a CUDA graph: recorded once, it sees new tokens only through the tensors that were there then."""
    recorded = []

    def record(self):
        self.forward()  # the warm-up writes into the cache, as on a GPU
        inputs = dict(input_ids=self.token, attention_mask=self.visible, position_ids=self.positions, past_key_values=self.cache)
        vlm, self.logits = self.vlm, self.forward().clone()
        recorded.append(self.logits)
        self.graph = SimpleNamespace(replay=lambda: self.logits.copy_(vlm(**inputs, use_cache=True).logits[:, -1]))
        self.forward = None  # from now on nothing but the graph can compute

    plain = draw(policy, end=NEVER, temperature=HOT)
    monkeypatch.setattr(grpo.Decoder, "record", record)
    replayed = draw(policy, end=NEVER, temperature=HOT)
    assert len(recorded) == 1
    assert torch.equal(plain.ids, replayed.ids)


def test_a_model_that_cannot_be_recorded_decodes_all_the_same(policy, monkeypatch):
    def refuse(self):
        self.forward()
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = draw(policy, end=NEVER, temperature=HOT)
    monkeypatch.setattr(grpo.Decoder, "record", refuse)
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        after = draw(policy, end=NEVER, temperature=HOT)
    assert torch.equal(plain.ids, after.ids)


@pytest.mark.exercise_8
def test_a_completion_ends_with_its_first_end_token_and_disturbs_no_other(policy, endless):
    free, ends = endless
    ended = draw(policy, end=ends, temperature=HOT)
    wanted = until_end(free.ids.flatten(0, 1).tolist(), ends)
    assert spoken(ended) == wanted
    assert (ended.mask.int().diff(dim=-1) <= 0).all()  # no gaps
    cut_off = [row[-1] not in ends.tolist() for row in wanted]
    assert any(cut_off) and not all(cut_off)
    assert ended.truncated(ends).flatten().tolist() == cut_off
    assert free.truncated(NEVER).all()


@pytest.mark.exercise_8
def test_rollout_stops_when_all_are_done(policy, endless):
    free, _ = endless
    ends = free.ids[:, :, 3].unique()
    lengths = list(map(len, until_end(free.ids.flatten(0, 1).tolist(), ends)))
    assert draw(policy, end=ends, temperature=HOT).ids.shape[-1] == max(lengths) <= 4


def test_truncated_looks_at_the_last_token_that_counts():
    ids = torch.tensor([[[5, 9, 0], [9, 5, 5], [5, 5, 9], [8, 9, 9], [5, 5, 5]]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]]).bool()
    assert Completions(ids, mask).truncated(torch.tensor([8, 9])).tolist() == [[False, False, False, False, True]]


@pytest.mark.exercise_8
def test_samples_follow_the_seed_and_differ_within_a_group(policy, endless):
    free, _ = endless
    again = draw(policy, end=NEVER, temperature=HOT)
    other = draw(policy, end=NEVER, temperature=HOT, seed=1)
    assert torch.equal(again.ids, free.ids)
    assert not torch.equal(other.ids, free.ids)
    assert all(len({tuple(row) for row in group}) == 4 for group in free.ids.tolist())


@pytest.mark.exercise_8
def test_first_tokens_are_drawn_for_each_completion_at_the_temperature(policy):
    n, V = 3000, policy.vlm.lm_head.out_features
    generator = torch.Generator().manual_seed(0)
    with heard(policy) as calls:
        ids = rollout(policy.model, policy.prompts[1:2], n, 1, policy.end, policy.banned, HOT, generator=generator).ids
    assert ids.shape == (1, n, 1) and ids.dtype == torch.int64
    p = (calls[0][0, -1] / HOT).index_fill(0, policy.banned, -torch.inf).softmax(-1)
    drawn = torch.bincount(ids.flatten(), minlength=V) / n
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all(), "shares of 3,000 draws, five standard errors"


def test_samples_come_from_the_distribution_of_the_logprobs(policy):
    # The first token of many samples of one prompt, against what group_logprobs says of every token.
    n, V = 3000, policy.vlm.lm_head.out_features
    one = policy.prompts[1:2]
    generator = torch.Generator().manual_seed(0)
    first = rollout(policy.model, one, n, 1, policy.end, policy.banned, HOT, generator=generator).ids[0, :, 0]
    every = torch.arange(V)[~torch.isin(torch.arange(V), policy.banned)]
    asked = Completions(every[None, :, None], torch.ones(1, len(every), 1, dtype=torch.bool))
    with torch.no_grad():
        logprobs, entropy = group_logprobs(policy.model, one, asked, policy.banned, HOT)
    p = logprobs[0, :, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    drawn = torch.bincount(first, minlength=V)[every] / n
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert torch.allclose(entropy, -(p * logprobs[0, :, 0]).sum().expand_as(entropy), atol=1e-4)


@pytest.mark.exercise_8
@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.9}], ids=str
)
def test_banned_tokens_never_come_out(policy, how):
    with heard(policy, lambda logits: logits.index_fill(-1, policy.banned, 100.0)):
        ids = draw(policy, end=NEVER, **how).ids
    assert not torch.isin(ids, policy.banned).any()


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([[1, 4, 2], [9, 6, 6], [3, 1, 7]])  # the first row is not the longest


@pytest.fixture(scope="module")
def completions(policy):
    """Three completions for each prompt, random tokens, every length from one to nine."""
    torch.manual_seed(0)
    V, longest = policy.vlm.lm_head.out_features, int(LENGTHS.max())
    allowed = torch.arange(V)[~torch.isin(torch.arange(V), policy.banned)]
    ids = allowed[torch.randint(len(allowed), (*LENGTHS.shape, longest))]
    return Completions(ids, torch.arange(longest) < LENGTHS[..., None])


@pytest.fixture(scope="module")
def weights(completions):
    """What the log-probs are multiplied with, so that every token matters differently to the gradient."""
    return torch.randn(completions.mask.shape, generator=torch.Generator().manual_seed(1)) * completions.mask


def padded_forward(policy, completions, temperature=1.0):
    """The ordinary way: B * G rows, prompts padded on the left, completions on the right, each with its image; vision,
    positions and causal masks are the model's own affair. Returns log-probs and entropies (B, G, T), 0 on padding."""
    B, G, longest = completions.ids.shape
    inputs = policy.inputs
    P = inputs["input_ids"].shape[1]
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    ids, mask, types = (inputs[name].repeat_interleave(G, 0) for name in names)
    answers, keep = completions.ids.flatten(0, 1), completions.mask.flatten(0, 1)
    logits = policy.model(
        input_ids=torch.cat([ids, answers], 1),
        attention_mask=torch.cat([mask, keep.long()], 1),
        mm_token_type_ids=torch.cat([types, torch.zeros_like(answers)], 1),
        pixel_values=inputs["pixel_values"].unflatten(0, (B, -1)).repeat_interleave(G, 0).flatten(0, 1),
        image_grid_thw=inputs["image_grid_thw"].repeat_interleave(G, 0),
        use_cache=False,
    ).logits[:, P - 1 : -1]
    logits = logits / temperature
    logits[..., policy.banned] = -torch.inf
    every = logits.log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    logprobs = every.gather(-1, answers[..., None])[..., 0]
    return tuple(torch.where(keep, x, 0.0).view(B, G, longest) for x in (logprobs, entropy))


def lora_gradients(policy, logprobs, weights):
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return gradients


def same_gradients(mine, wanted):
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (mine[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.fixture(scope="module")
def expected(policy, completions, weights):
    logprobs, entropy = padded_forward(policy, completions)
    return logprobs.detach(), entropy, lora_gradients(policy, logprobs, weights)


@pytest.mark.exercise_10
def test_logprobs_and_gradients_are_those_of_a_padded_forward(policy, completions, weights, expected):
    wanted, wanted_entropy, wanted_gradients = expected
    assert wanted_gradients and all("lora_" in name for name in wanted_gradients)
    for chunk in (1, 7, 10_000):
        logprobs, entropy = group_logprobs(policy.model, policy.prompts, completions, policy.banned, chunk=chunk)
        error = (logprobs - wanted).abs()
        assert error[..., 0].max() < 1e-4, "first tokens: those are predicted from the prompt's last position"
        assert error.max() < 1e-4, "later tokens: look at sources, mask and positions"
        assert (entropy - wanted_entropy).abs().max() < 1e-4
        assert (logprobs[~completions.mask] == 0).all() and (entropy[~completions.mask] == 0).all()
        assert not entropy.requires_grad
        same_gradients(lora_gradients(policy, logprobs, weights), wanted_gradients)


@pytest.mark.exercise_10
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_logprobs_are_taken_at_the_temperature_of_sampling(policy, completions, temperature):
    with torch.no_grad():
        logprobs, entropy = group_logprobs(policy.model, policy.prompts, completions, policy.banned, temperature)
        wanted, wanted_entropy = padded_forward(policy, completions, temperature)
    assert (logprobs - wanted).abs().max() < 1e-4 and (entropy - wanted_entropy).abs().max() < 1e-4


def test_logprobs_of_the_reference_are_those_without_the_adapter(policy, completions, expected):
    with torch.no_grad(), policy.model.disable_adapter():
        reference, _ = group_logprobs(policy.model, policy.prompts, completions, policy.banned)
        wanted, _ = padded_forward(policy, completions)
    assert (reference - wanted).abs().max() < 1e-4
    assert (reference - expected[0]).abs().max() > 0.1  # the adapter is not idle


@pytest.mark.exercise_10
def test_checkpointed_layers_change_nothing(policy, completions, weights, expected, monkeypatch):
    calls = []
    model, language_model = policy.model, policy.vlm.model.language_model
    attention = type(language_model.layers[0].self_attn)
    forward = attention.forward

    def count(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", count)
    language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        logprobs, _ = group_logprobs(model, policy.prompts, completions, policy.banned)
        gradients = lora_gradients(policy, logprobs, weights)
    finally:
        model.eval()
        language_model.gradient_checkpointing_disable()
    assert len(calls) == 2 * len(language_model.layers)  # each layer ran again in the backward pass
    assert (logprobs - expected[0]).abs().max() < 1e-4
    same_gradients(gradients, expected[2])


@pytest.mark.exercise_10
def test_a_slice_of_the_prompts_gives_its_share(policy, completions, expected):
    with torch.no_grad():
        parts = [
            group_logprobs(policy.model, policy.prompts[rows], completions[rows], policy.banned)[0]
            for rows in (slice(0, 1), slice(1, 3))
        ]
    assert (torch.cat(parts) - expected[0]).abs().max() < 1e-4


@pytest.mark.exercise_10
def test_logits_are_made_in_chunks_and_again_in_the_backward_pass(policy, completions):
    with heard(policy) as calls:
        logprobs, _ = group_logprobs(policy.model, policy.prompts, completions, policy.banned, chunk=16)
        assert list(map(len, calls)) == [16, 16, 7] and LENGTHS.sum() == 39  # tokens of completions, nothing else
        lora_gradients(policy, logprobs, completions.mask)
    assert sorted(map(len, calls[3:])) == [7, 16, 16]  # they were not kept


def test_logprobs_of_a_rollout_are_those_it_was_sampled_with(policy, endless):
    # The two halves of the file agree: cached decoding and packed rows give the sampled tokens the same probability.
    free, _ = endless
    with heard(policy) as calls:
        assert torch.equal(draw(policy, end=NEVER, temperature=HOT).ids, free.ids)
    calls[0] = calls[0].repeat_interleave(4, 0)  # the prefill, once a prompt
    logits = torch.cat(calls, 1).view(3, 4, T, -1) / HOT
    logits[..., policy.banned] = -torch.inf
    sampled = logits.log_softmax(-1).gather(-1, free.ids[..., None])[..., 0]
    with torch.no_grad():
        logprobs, _ = group_logprobs(policy.model, policy.prompts, free, policy.banned, HOT)
    assert (logprobs - sampled).abs().max() < 1e-4


@pytest.fixture(scope="module")
def odd():
    """Two prompts of 3 and 5 tokens with completions of 1, 4 and 2, then 2, 2 and 3 tokens; every token and every position differs.
    The largest position of the first prompt is that of a column, as with a wide image."""
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    positions = torch.arange(300, 330).view(3, 2, 5).flip(0)
    positions[2, 0, 3] = 500
    positions[1, 0, 0] = 900  # on padding, where it must not count
    prompts = Prompts(torch.arange(100, 110).view(2, 5), mask, positions, None)
    lengths = torch.tensor([[1, 4, 2], [2, 2, 3]])
    return prompts, Completions(torch.arange(200, 224).view(2, 3, 4), torch.arange(4) < lengths[..., None])


@pytest.mark.exercise_9
def test_packed_rows_by_hand(odd):
    rows, _, segments, sources, targets = pack(*odd)
    assert rows[0, :10].tolist() == [102, 103, 104, 200, 204, 205, 206, 207, 208, 209]
    assert rows[1].tolist() == [105, 106, 107, 108, 109, 212, 213, 216, 217, 220, 221, 222]
    assert segments.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, -1, -1], [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]]
    assert sources.tolist() == [2, 2, 4, 5, 6, 2, 8] + [12 + place for place in (4, 5, 4, 7, 4, 9, 10)]
    assert targets.tolist() == [200, 204, 205, 206, 207, 208, 209, 212, 213, 216, 217, 220, 221, 222]


@pytest.mark.exercise_9
def test_positions_go_on_after_the_largest_of_the_prompt_in_every_completion(odd):
    prompts, completions = odd
    positions = pack(prompts, completions)[1]
    assert positions.shape == (3, 2, 12)
    assert torch.equal(positions[:, 0, :3], prompts.positions[:, 0, 2:]) and torch.equal(positions[:, 1, :5], prompts.positions[:, 1])
    for axis in range(3):
        assert positions[axis, 0, 3:10].tolist() == [501 + t for t in (0, 0, 1, 2, 3, 0, 1)]
        assert positions[axis, 1, 5:].tolist() == [330 + t for t in (0, 1, 0, 1, 0, 1, 2)]


@pytest.mark.exercise_9
def test_who_sees_whom():
    segments = torch.tensor([[0, 0, 1, 2, 2, 3, -1, -1], [0, 0, 0, 0, 1, 1, 2, 3]])
    attend = may_attend(segments)
    assert attend.dtype == torch.bool and attend.shape == (2, 8, 8)
    for b in range(2):
        for query, own in enumerate(segments[b].tolist()):
            seen = [key for key, other in enumerate(segments[b].tolist()) if key <= query and other in (0, own)]
            if own >= 0:
                assert attend[b, query].nonzero()[:, 0].tolist() == seen
            else:
                assert attend[b, query].any()


def test_the_vision_tower_runs_once(policy, completions, monkeypatch):
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
    lora_gradients(
        policy, group_logprobs(policy.model, prompts, completions, policy.banned)[0], completions.mask.float()
    )
    with torch.no_grad(), policy.model.disable_adapter():
        group_logprobs(policy.model, prompts[1:], completions[1:], policy.banned)
    assert len(calls) == 1


def test_encoded_prompts_carry_no_gradient(policy):
    assert not any(feature.requires_grad for feature in policy.prompts.vision.pooler_output)
    assert len(policy.prompts) == 3 and len(policy.prompts[1:]) == 2

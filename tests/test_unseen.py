"""Tests of the exercises that students do not have, because they show the solution, or because a
look-up table of the visible cases must not pass. They are against published formulas."""

from types import SimpleNamespace

import pytest
import torch

from grpo import group_advantages, grpo_loss


@pytest.mark.exercise_7
def test_advantages_of_any_shape():
    for shape in ((3,), (2, 7), (2, 3, 5)):
        rewards = 6 * torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))
        advantages = group_advantages(rewards)
        assert advantages.shape == rewards.shape
        centred = rewards - rewards.mean(-1, keepdim=True)
        stds = [rewards.std(-1, unbiased=unbiased, keepdim=True) for unbiased in (True, False)]
        assert any(torch.allclose(advantages, centred / (std + 1e-4), atol=1e-4) for std in stds)


def some_completions(B):
    """G = 4 completions of 1 to 6 tokens for each of B prompts: new, old, reference, advantages and
    mask, as `grpo_loss` takes them."""
    generator = torch.Generator().manual_seed(1)
    new, old, reference = -torch.rand(3, B, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.randint(1, 7, (B, 4, 1), generator=generator)
    advantages = torch.randn(B, 4, generator=generator, dtype=torch.float64)
    new.requires_grad_()
    return SimpleNamespace(new=new, old=old, reference=reference, advantages=advantages, mask=mask)


def published_loss(loss_type, p, epsilon, epsilon_high, beta):
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
                new, old, ref = (x[b, g, t] for x in (p.new, p.old, p.reference))
                advantage = p.advantages[b, g]
                ratio = torch.exp(new) / torch.exp(old)
                clipped = torch.clip(ratio, 1 - epsilon, 1 + epsilon_high)
                kl = torch.exp(ref) / torch.exp(new) - (ref - new) - 1
                row.append(-torch.min(ratio * advantage, clipped * advantage) + beta * kl)
            rows.append(row)
        if loss_type == "dapo":
            losses.append(sum(map(sum, rows)) / sum(map(len, rows)))
        else:
            losses.append(sum(sum(row) / len(row) for row in rows) / len(rows))
    return sum(losses) / len(losses)


@pytest.mark.exercise_9
@pytest.mark.parametrize("normalise, loss_type", [("token", "dapo"), ("sequence", "grpo")])
@pytest.mark.parametrize("B", [1, 3])
def test_loss_and_gradient_equal_the_published_ones(normalise, loss_type, B):
    p = some_completions(B)
    for eps_low, eps_high, beta in ((0.2, 0.3, 0.005), (0.1, 0.1, 1.0), (0.2, 0.5, 0.0)):
        loss, statistics, side = grpo_loss(
            p.new, p.old, p.reference, p.advantages, p.mask, eps_low, eps_high, beta, normalise
        )
        expected = published_loss(loss_type, p, eps_low, eps_high, beta)
        assert loss.item() == pytest.approx(expected.item())
        gradients = [torch.autograd.grad(one, p.new)[0] for one in (loss, expected)]
        assert torch.allclose(*gradients)
        assert (gradients[0][~p.mask] == 0).all(), "padding has no gradient"
        assert statistics["clip_low"] > 0 and statistics["clip_high"] > 0  # both sides occur
        clipped = p.mask & (side != 0)
        assert ((gradients[0][clipped] != 0) == (beta > 0)).all()  # then that of the KL only

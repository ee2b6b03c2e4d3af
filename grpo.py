"""grpo.py - how the policy learns from its rewards: rollout -> advantages -> log-probs -> loss.

The objective is the paper's equation 4. For one query with completions o_1 .. o_G, let A_i be the
advantage of completion i, and r_it = pi(o_it) / pi_old(o_it) the ratio of a token's probability now
to its probability when it was sampled:

    J = 1 / sum_i |o_i| * sum_i sum_t [ min( r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i )
                                        - beta KL_it ]

pi is the policy as it is now, pi_old the policy when it sampled, and KL_it an estimate of how far
pi is from the reference, the base model, at this token. eps_low is 0.2; eps_high and beta are
settings.

The first half of the file is the mathematics: tensors in, tensors out, no model. The second half
runs the model: `rollout` (sampling), `group_logprobs` (log-probs in one packed row per prompt).

Where this departs from the paper, or from common practice:
  1. The KL term is the k3 estimator, *assumed*. The reference policy is the base model: the adapter
     is switched off.
  2. The standard deviation of a group is the unbiased one (divisor G - 1), as in TRL. *Assumed*.
  3. Vision tokens are never sampled: a sampled <|image_pad|> would ask for image features that do
     not exist. They are masked in every log-prob too, so that policy, old policy and reference are
     distributions over the same tokens.
  4. The prompt goes through the language model once per pass, not G times. Log-probs and gradients
     are the same.

Sizes: B prompts, G completions each, T sampled positions, P tokens of a (padded) prompt, L tokens
of a packed row, V tokens in the vocabulary, E end-of-text tokens. N is the number of rows that a
function works on: B x G sequences while sampling, all completion tokens of a pass in `pack` and
below.

Qwen-VL gives each token three position numbers, for time, row and column (M-RoPE), so positions
have the shape (3, B, P). An image token uses all three. A text token has the same number three
times, and text after an image continues from the largest number so far.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from plumbing.devices import to_device
from plumbing.errors import UserError
from plumbing.vlm import Prompts, unwrap

# --------------------------------------------------------------------------------------------------
# The mathematics
# --------------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """How much better than its group each completion is. rewards: (..., G) -> (..., G), G >= 2.

    The distance of a reward from the mean of its group, in standard deviations of the group (here
    the unbiased one, see 2. above), with eps added to the standard deviation. So no critic is
    needed. If all rewards of a group are equal, its advantages are 0.

    >>> group_advantages(torch.tensor([[6.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]]))
    tensor([[ 1.3907, -0.1987, -0.1987, -0.9934],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    # The mean of equal rewards can differ from them by a rounding error of about 1e-7. Divided by
    # eps = 1e-4 that is an advantage of 1e-3, not 0. With the group's first reward subtracted,
    # equal rewards are exact zeros, and so is their mean.
    rewards = rewards - rewards[..., :1]
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)


def k3_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference), from log-probs of tokens. Of any shape.

    The estimator k3 of Schulman, "Approximating KL divergence", 2020. For tokens that the policy
    sampled it is unbiased. It is never negative, and has less variance than the difference of the
    two log-probs. With gradient.

    >>> k3_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    tensor([0.0000, 0.1931])
    """
    log_ratio = reference - logprobs
    return log_ratio.expm1() - log_ratio


def grpo_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.3,
    beta: float = 0.005,
    normalise: str = "token",
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The negative of J, averaged over the prompts; statistics to log; `clip_side` of each token.

    logprobs, old, reference: (B, G, T) log-probs of the sampled tokens under the policy (with
                gradient), the policy that sampled them, and the reference (None if beta is 0).
    advantages: (B, G).
    mask:       (B, G, T) bool, True on a completion's tokens, its end-of-text token included.
    normalise:  "token": 1 / sum_i |o_i|, every token of a group has the same weight (the paper;
                DAPO, sec. 3.3). "sequence": 1/G sum_i 1/|o_i|, every completion has the same
                weight, so a long bad answer is penalised less per token (GRPO).

    Statistics: kl and ratio (means over the tokens), clip_low and clip_high (shares of them).
    Clip sides are (B, G, T) int32: -1 clipped below, 1 above, 0 not clipped.

    One prompt, completions of one and of three tokens. The first token's ratio is above 1.3:

    >>> old = torch.zeros(1, 2, 3)
    >>> new = torch.tensor([[[1.5, 1.0, 1.0], [0.9, 1.0, 1.1]]]).log()
    >>> mask = torch.tensor([[[True, False, False], [True, True, True]]])
    >>> advantages = torch.tensor([[1.0, -1.0]])
    >>> loss, statistics, side = grpo_loss(new, old, None, advantages, mask, beta=0.0)
    >>> loss  # -(1.3 - 0.9 - 1.0 - 1.1) / 4
    tensor(0.4250)
    >>> statistics["clip_high"].item()
    0.25
    >>> grpo_loss(new, old, None, advantages, mask, beta=0.0, normalise="sequence")[0]
    tensor(-0.1500)
    """
    ratio = (logprobs - old).exp()  # (B, G, T)
    advantage = advantages[..., None]  # (B, G, 1)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    kl = k3_kl(logprobs, reference) if beta > 0 else torch.zeros_like(surrogate)
    gain = (surrogate - beta * kl) * mask  # (B, G, T)
    if normalise == "token":
        objective = gain.sum((1, 2)) / mask.sum((1, 2))  # (B,)
    else:
        objective = (gain.sum(2) / mask.sum(2)).mean(1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum() / mask.sum()

    with torch.no_grad():
        side = clip_side(ratio, advantage, eps_low, eps_high)
        statistics = {
            "kl": mean(kl),
            "ratio": mean(ratio),
            "clip_low": mean(side == -1),
            "clip_high": mean(side == 1),
        }
    return -objective.mean(), statistics, side


def clip_side(
    ratio: torch.Tensor, advantages: torch.Tensor, eps_low: float = 0.2, eps_high: float = 0.3
) -> torch.Tensor:
    """Which tokens get no gradient because of the clip: 1 if the ratio is above the range, -1 if it
    is below, and 0 for every token with a gradient. int32; the arguments are broadcast.

    >>> clip_side(torch.tensor([0.7, 1.4, 0.7, 1.4]), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    tensor([ 0,  1, -1,  0], dtype=torch.int32)
    """
    # In the two other cases (a bad token has become more likely, a good one less likely) the
    # minimum takes the term that is not clipped, so the gradient still pulls the ratio back.
    above = (ratio > 1 + eps_high) & (advantages > 0)
    below = (ratio < 1 - eps_low) & (advantages < 0)
    return above.int() - below.int()


def choose_token(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Sample one token for each row: logits (N, V) -> (N,). At temperature 0 take the most likely.

    >>> choose_token(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0.0, generator=None)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    return probabilities.multinomial(1, generator=generator)[:, 0]


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, banned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the given tokens, and the entropies. logits (N, V), tokens (N,) -> (N,), (N,).

    The distribution is the one that tokens are sampled from: with the same temperature, and without
    the `banned` tokens.
    """
    logprobs = mask_banned(logits.float() / temperature, banned).log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def mask_banned(logits: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """Give the banned tokens probability zero. Not with -inf: 0 * -inf is NaN in the entropy."""
    return logits.index_fill(-1, banned, -1e9)


# --------------------------------------------------------------------------------------------------
# Running the model
# --------------------------------------------------------------------------------------------------


@dataclass
class Completions:
    """G completions for each of B prompts, in host memory."""

    ids: torch.Tensor  # (B, G, T) int64, padded on the right
    mask: torch.Tensor  # (B, G, T) bool, True up to and including the end-of-text token

    def __getitem__(self, rows: slice) -> "Completions":
        return Completions(self.ids[rows], self.mask[rows])

    def truncated(self, end: torch.Tensor) -> torch.Tensor:
        """(B, G) bool: cut off at the length limit. end: (E,) the end-of-text tokens."""
        last = self.ids.gather(-1, self.mask.sum(-1, keepdim=True) - 1)[..., 0]
        return ~torch.isin(last, end.to(last.device))


class Decoder:
    """Computes the logits of the next token for N = B x G rows, one step after the other.

    Keys and values of all tokens so far are in a cache that grows by one token in each step.
    `plumbing.decoding.StaticDecoder` does the same in memory of fixed size, which a GPU needs to be
    fast. The two take the same arguments, so `rollout` can use either. samr1_mini.py uses that one.
    """

    def __init__(self, vlm, cache: Cache, prompts: Prompts, G: int, max_new_tokens: int):
        """cache: keys and values of the B prompts. Each of them is repeated for G completions.
        max_new_tokens: not needed here, only by `StaticDecoder`."""
        cache.batch_repeat_interleave(G)
        # The largest position of each prompt, (N,): text continues after it.
        last = prompts.positions.amax((0, 2)).repeat_interleave(G)
        self.vlm = vlm
        self.cache = cache
        self.visible = prompts.mask.repeat_interleave(G, 0).to(vlm.device)  # (N, P), grows
        self.positions = last.expand(3, -1)[..., None].to(vlm.device)  # (3, N, 1)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Append one token to each row, (N,), and return the logits of the next, (N, V)."""
        self.visible = F.pad(self.visible, (0, 1), value=True)
        self.positions = self.positions + 1  # text has three equal numbers that count up
        out = self.vlm(
            input_ids=token[:, None],
            attention_mask=self.visible,
            position_ids=self.positions,
            cache=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]


@torch.no_grad()
def rollout(
    model: torch.nn.Module,
    prompts: Prompts,
    G: int,
    max_new_tokens: int,
    end: torch.Tensor,
    banned: torch.Tensor,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    decoder: type = Decoder,
) -> Completions:
    """Sample G completions for each prompt. The model must be in eval mode: gradient checkpointing
    in train mode would turn the cache off.

    end:     (E,) tokens that end a completion.
    banned:  tokens that are never sampled, at any temperature.
    decoder: the class that computes one step, see `Decoder`.

    It ends when every completion has ended: T is at most max_new_tokens, often less (on a GPU, up
    to 15 more than needed). What stands in ids after the end of a completion does not matter.

    Let 9 be the end. If row 1 samples tokens 5, 9 and row 2 samples 7, 7, 7, then ids are
    [[5, 9, any], [7, 7, 7]] and mask is [[1, 1, 0], [1, 1, 1]].
    """
    vlm = unwrap(model)
    prefilled = vlm(  # each prompt goes through the model once, not G times
        input_ids=prompts.ids.to(vlm.device),
        attention_mask=prompts.mask.to(vlm.device),
        position_ids=prompts.positions.to(vlm.device),
        mm_encoder_outputs={"image": prompts.vision},  # features in place of pixels
        use_cache=True,
        logits_to_keep=1,
    )
    decode = decoder(vlm, prefilled.cache, prompts, G, max_new_tokens)
    logits = prefilled.logits[:, -1].repeat_interleave(G, 0)  # (B * G, V)
    tokens, mask = [], []
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)  # (B * G,)
    finite = torch.ones_like(finished)  # (B * G,)
    for t in range(max_new_tokens):
        finite = finite & (finished | logits.isfinite().all(-1))
        logits = logits.nan_to_num()  # torch cannot sample from NaN: it would end the program
        # -inf, so that no temperature makes a banned token likely. `mask_banned` cannot use it,
        # because its log-probs also enter the entropy.
        allowed = logits.float().index_fill(-1, banned, -torch.inf)
        token = choose_token(allowed, temperature, generator)
        tokens.append(torch.where(finished, end[0], token))  # finished rows go on, but do not count
        mask.append(~finished)
        finished = finished | torch.isin(token, end)
        # finished.all() makes the CPU wait for the GPU, so look only every 16 tokens there.
        look = logits.device.type == "cpu" or t % 16 == 15
        if t + 1 == max_new_tokens or (look and finished.all()):
            break
        logits = decode.step(tokens[-1])
    # Checked after the loop: a check in each step would make the CPU wait for the GPU.
    if not finite.all():
        raise UserError(
            f"the policy's logits are not finite in {logits.dtype}: with float16, use another "
            "--dtype; in training, lower --lr: the last checkpoint stays"
        )
    return Completions(
        ids=torch.stack(tokens, -1).view(len(prompts), G, -1).cpu(),
        mask=torch.stack(mask, -1).view(len(prompts), G, -1).cpu(),
    )


class PackedRows(NamedTuple):
    """One row for each prompt: [prompt | o_1 | ... | o_G]. In host memory."""

    ids: torch.Tensor  # (B, L): prompt and completions without their padding, then padding
    positions: torch.Tensor  # (3, B, L) M-RoPE positions
    segments: torch.Tensor  # (B, L): 0 on the prompt, 1..G on the completions, -1 on padding
    sources: torch.Tensor  # (N,): where each of N completion tokens is predicted, see `pack`
    targets: torch.Tensor  # (N,): the completion tokens, prompt by prompt, one after the other


def pack(prompts: Prompts, completions: Completions) -> PackedRows:
    """Lay out one packed row for each prompt.

    The positions of each completion continue after the prompt's largest one. `sources` are indices
    into the flattened (B * L) hidden states. The token at place k of a row is predicted at k - 1,
    but the first token of every completion is predicted at the prompt's last place.

    A prompt of tokens 7 8 at positions 0 1, with completions 5 9 and 6:

    >>> two = torch.ones(1, 2, dtype=torch.bool)
    >>> prompts = Prompts(torch.tensor([[7, 8]]), two, torch.tensor([[[0, 1]]] * 3), None)
    >>> mask = torch.tensor([[[True, True], [True, False]]])
    >>> completions = Completions(torch.tensor([[[5, 9], [6, 0]]]), mask)
    >>> row = pack(prompts, completions)
    >>> row.ids, row.positions[0], row.segments
    (tensor([[7, 8, 5, 9, 6]]), tensor([[0, 1, 2, 3, 2]]), tensor([[0, 0, 1, 1, 2]]))
    >>> row.sources, row.targets
    (tensor([1, 2, 1]), tensor([5, 9, 6]))
    """
    B, G, T = completions.ids.shape
    place = torch.arange(T).expand(G, T)  # of a token in its completion
    number = torch.arange(1, G + 1)[:, None].expand(G, T)  # of its completion
    ids, positions, segments, sources = [], [], [], []
    for b in range(B):
        keep = completions.mask[b]  # (G, T); indexing with it concatenates the completions
        prompt = prompts.ids[b, prompts.mask[b]]  # (P,)
        prompt_positions = prompts.positions[:, b, prompts.mask[b]]  # (3, P)
        P = len(prompt)
        after = prompt_positions.max() + 1 + place[keep]
        row = torch.cat([prompt, completions.ids[b, keep]])
        ids.append(row)
        positions.append(torch.cat([prompt_positions, after.expand(3, -1)], 1))
        segments.append(torch.cat([torch.zeros_like(prompt), number[keep]]))
        one_before = torch.arange(P - 1, len(row) - 1)
        sources.append(torch.where(place[keep] == 0, P - 1, one_before))
    L = max(map(len, ids))
    return PackedRows(
        ids=pad_sequence(ids, batch_first=True),
        positions=torch.stack([F.pad(row, (0, L - row.shape[1])) for row in positions], 1),
        segments=pad_sequence(segments, batch_first=True, padding_value=-1),
        sources=torch.cat([b * L + source for b, source in enumerate(sources)]),
        targets=completions.ids[completions.mask],
    )


def may_attend(segments: torch.Tensor) -> torch.Tensor:
    """The attention mask of packed rows: (B, L) -> (B, L, L) bool, may this query see that key?

    Every token sees itself: attention over nothing would be NaN. A prompt and two completions, two
    tokens each:

    >>> may_attend(torch.tensor([[0, 0, 1, 1, 2, 2]])).int()
    tensor([[[1, 0, 0, 0, 0, 0],
             [1, 1, 0, 0, 0, 0],
             [1, 1, 1, 0, 0, 0],
             [1, 1, 1, 1, 0, 0],
             [1, 1, 0, 0, 1, 0],
             [1, 1, 0, 0, 1, 1]]], dtype=torch.int32)
    """
    same = segments[:, :, None] == segments[:, None, :]
    return ((segments == 0)[:, None, :] | same).tril()


def head_logprobs(
    lm_head: torch.nn.Module,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    banned: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` of tokens (N,) that are predicted from hidden states (N, width).

    The lm_head is frozen, so the backward pass needs one thing: the gradient of each log-prob with
    respect to its hidden state, (N, width). It is computed here, while the logits exist. So the
    (N, V) logits are neither kept nor computed again.
    """
    leaf = hidden.detach().requires_grad_(hidden.requires_grad)
    logprobs, entropy = token_logprobs(lm_head(leaf), tokens, temperature, banned)
    if hidden.requires_grad:
        # Log-prob i depends on row i of `leaf` only, so row i of the gradient of their sum is the
        # gradient of log-prob i. One backward pass computes all of them.
        (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
        # h - h.detach() is zero, so this changes no log-prob. But it depends on h, and so the
        # backward pass multiplies what arrives here by `gradient`, as through the lm_head itself.
        zero = (hidden - hidden.detach()).float()
        logprobs = logprobs.detach() + (gradient * zero).sum(-1)
    return logprobs, entropy


# Logits that are computed together. With V = 151,936 these are 256 positions, and the logits of all
# positions would be the largest tensor of the whole step.
LOGITS_AT_ONCE = 39_000_000


def group_logprobs(
    model: torch.nn.Module,
    prompts: Prompts,
    completions: Completions,
    banned: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of all completions, (B, G, T) each, 0 on padding. Only the log-probs
    have a gradient.

    Each prompt is computed once, in one packed row with its G completions. Two things make the row
    equal to G separate ones. The attention mask lets a completion see the prompt and itself, but no
    other completion. And the positions of each completion start again after the prompt.

    Only the completions' positions go through the lm_head, `chunk` at a time (default: as
    LOGITS_AT_ONCE allows), see `head_logprobs`.

    The model needs attn_implementation="sdpa": eager attention misreads a boolean mask.
    """
    vlm = unwrap(model)  # vlm.model returns hidden states (B, L, width), vlm.lm_head their logits
    packed = PackedRows(*(to_device(x, vlm.device) for x in pack(prompts, completions)))
    hidden = vlm.model(
        input_ids=packed.ids,
        attention_mask=may_attend(packed.segments)[:, None],
        position_ids=packed.positions,
        mm_encoder_outputs={"image": prompts.vision},  # features in place of pixels
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1)[packed.sources]  # (N, width) for N completion tokens

    chunk = chunk or max(1, LOGITS_AT_ONCE // vlm.lm_head.weight.shape[0])
    logprobs, entropies = [], []
    for part, tokens in zip(hidden.split(chunk), packed.targets.split(chunk), strict=True):
        logprob, entropy = head_logprobs(vlm.lm_head, part, tokens, temperature, banned)
        logprobs.append(logprob)
        entropies.append(entropy)
    # `targets` is in the order in which masked_scatter fills the places where mask is True.
    mask = to_device(completions.mask, vlm.device)
    zeros = torch.zeros(mask.shape, device=vlm.device)
    return (
        zeros.masked_scatter(mask, torch.cat(logprobs)),
        zeros.masked_scatter(mask, torch.cat(entropies)),
    )

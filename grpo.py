"""grpo.py - how the policy learns from its rewards: rollout -> advantages -> log-probs -> loss.

The objective is the paper's equation 4. For one query, with completions o_1 .. o_G, the ratio
s_it = pi(o_it) / pi_old(o_it) of a token's probability now and when it was sampled, and the advantage A_i:

    J = 1 / sum_i |o_i| * sum_i sum_t [ min( s_it A_i, clip(s_it, 1 - eps_low, 1 + eps_high) A_i ) - beta KL_it ]

The first half of the file is the mathematics: small functions, tensors in and tensors out, no model. The second half asks
a model for what they need: `encode_prompts` (vision tower and positions, once a step), `rollout` (sampling), and
`group_logprobs` (log-probs of G completions of one prompt in one packed row).

Where this departs from the paper or from common practice:
  1. The KL term is the k3 estimator, *assumed*; the reference policy is the base model with the adapter switched off.
  2. The std of a group is the unbiased one (divisor G - 1), as in TRL; the paper does not say.
  3. Vision tokens are never sampled: a sampled <|image_pad|> would ask for image features that do not exist. They are
     masked in every log-prob too, so that policy, old policy and reference are distributions over the same tokens.
  4. The prompt goes through the language model once a pass, not G times; log-probs and gradients are the same.

Sizes: B prompts, G completions each, T tokens of the longest completion, P prompt length, L packed row, V vocabulary.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Cache, StaticCache

# ---------------------------------------------------------------------------------------------------------------------
# The mathematics
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """A_i = (r_i - mean) / (std + eps) within each group, std with divisor G - 1. rewards: (..., G) -> (..., G).

    A group needs no critic: its own mean is the baseline. If all rewards are equal, all advantages are exactly 0.

    >>> group_advantages(torch.tensor([[6.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]]))
    tensor([[ 1.3907, -0.1987, -0.1987, -0.9934],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    # exercise 5: advantages within a group
    rewards = rewards - rewards[..., :1]  # the mean of equal numbers may miss them by a rounding error; of zeros it does not
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)
    # end of exercise 5


def k3_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled: q - log q - 1, q = ref / policy.

    Unbiased, never negative, and with less variance than -log q (Schulman, "Approximating KL divergence", 2020).

    >>> k3_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    tensor([0.0000, 0.1931])
    """
    # exercise 6: the KL estimate
    log_q = reference - logprobs
    return log_q.expm1() - log_q
    # end of exercise 6


def clip_side(ratio: torch.Tensor, advantages: torch.Tensor, eps_low: float = 0.2, eps_high: float = 0.3) -> torch.Tensor:
    """Which tokens get no gradient because of the clip: -1 below, 1 above, 0 not clipped; same shape as their product.

    A good token (advantage above 0) is not made likelier once its ratio exceeds 1 + eps_high, a bad one not less likely once
    it is under 1 - eps_low. On the two other sides the minimum in the objective keeps the gradient.

    >>> clip_side(torch.tensor([0.7, 1.4, 0.7, 1.4]), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    tensor([ 0,  1, -1,  0], dtype=torch.int32)
    """
    above, below = (ratio > 1 + eps_high) & (advantages > 0), (ratio < 1 - eps_low) & (advantages < 0)
    return above.int() - below.int()


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
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The negative of J, averaged over the prompts, and what to log about it.

    logprobs, old, reference: (B, G, T) log-probs of the sampled tokens under the policy (with gradient), under the policy
                that sampled them, and under the reference (None if beta is 0).
    advantages: (B, G).
    mask:       (B, G, T) bool, True on a completion's tokens, its end-of-text token included.
    normalise:  "token": 1 / sum_i |o_i|, every token of a group counts the same (the paper; DAPO, sec. 3.3).
                "sequence": 1/G sum_i 1/|o_i|, every completion counts the same, so a token of a long one less (GRPO).

    Statistics, 0-dimensional and detached: kl, ratio (means over tokens), clip_low and clip_high (shares, see `clip_side`).

    One prompt, two completions of one and three tokens; the first token's ratio is 1.5, beyond 1 + eps_high:

    >>> old = torch.zeros(1, 2, 3)
    >>> new = torch.tensor([[[1.5, 1.0, 1.0], [0.9, 1.0, 1.1]]]).log()
    >>> mask = torch.tensor([[[True, False, False], [True, True, True]]])
    >>> advantages = torch.tensor([[1.0, -1.0]])
    >>> loss, stats = grpo_loss(new, old, None, advantages, mask, beta=0.0)
    >>> loss  # -(1.3 - 0.9 - 1.0 - 1.1) / 4
    tensor(0.4250)
    >>> stats["clip_high"]
    tensor(0.2500)
    >>> grpo_loss(new, old, None, advantages, mask, beta=0.0, normalise="sequence")[0]  # -(1.3 - 3.0 / 3) / 2
    tensor(-0.1500)
    """
    if normalise not in ("token", "sequence"):
        raise ValueError(f"normalise is {normalise!r}: use 'token' or 'sequence'")
    # exercise 7: the clipped token-level loss
    ratio = (logprobs - old).exp()
    advantage = advantages[..., None]  # (B, G, 1)
    gain = torch.min(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    kl = torch.zeros_like(gain)
    if beta > 0:
        kl = k3_kl(logprobs, reference)
    value = (gain - beta * kl) * mask  # (B, G, T)
    if normalise == "token":
        value = value.sum((1, 2)) / mask.sum((1, 2))
    else:
        value = (value.sum(2) / mask.sum(2)).mean(1)
    # end of exercise 7: it leaves ratio and kl (B, G, T), advantage (B, G, 1) and value (B,), the J of each prompt

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum() / mask.sum()

    with torch.no_grad():
        side = clip_side(ratio, advantage, eps_low, eps_high)
        statistics = {"kl": mean(kl), "ratio": mean(ratio), "clip_low": mean(side == -1), "clip_high": mean(side == 1)}
    return -value.mean(), statistics


def choose_token(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Pick one token a row: logits (N, V) -> (N,). temperature 0 takes the likeliest.

    top_p < 1 samples from the smallest set of tokens whose probabilities sum to at least top_p (nucleus sampling).

    >>> choose_token(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0.0, top_p=1.0, generator=None)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)  # what came before it suffices
        return order.gather(-1, ranked.multinomial(1, generator=generator))[:, 0]
    return probabilities.multinomial(1, generator=generator)[:, 0]


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, banned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the given tokens, and the entropy of each distribution. logits (N, V), tokens (N,) -> (N,), (N,).

    The distribution is the one that was sampled from, but for top_p: at this temperature, without the `banned` tokens.
    """
    logprobs = mask_banned(logits.float() / temperature, banned).log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def mask_banned(logits: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """Give the banned tokens probability zero. (A large negative number: -inf times probability 0 is NaN in the entropy.)"""
    return logits.index_fill(-1, banned, -1e9)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of the model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Prompts:
    """B prompts, ready for the language model: their images have been through the vision tower.

    Token ids, masks and positions lie in the host's memory: they are small, and every row that is laid out from them would
    otherwise make the host wait for the GPU. The image features lie on the model's device.
    """

    ids: torch.Tensor  # (B, P) int64, padded on the left
    mask: torch.Tensor  # (B, P) bool, False on padding
    positions: torch.Tensor  # (3, B, P) M-RoPE positions: time, row, column
    vision: object  # the vision tower's output, its features as tuples with one tensor for each image

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | list[int]) -> "Prompts":
        """Some of the prompts, with their image features."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows
        vision = type(self.vision)(pooler_output=tuple(self.vision.pooler_output[b] for b in numbers))
        if deep := getattr(self.vision, "deepstack_features", None):  # Qwen3-VL: features for several layers
            vision.deepstack_features = [tuple(layer[b] for b in numbers) for layer in deep]
        return Prompts(self.ids[rows], self.mask[rows], self.positions[:, rows], vision)


@dataclass
class Completions:
    """G completions for each of B prompts, in the host's memory."""

    ids: torch.Tensor  # (B, G, T) int64, padded on the right
    mask: torch.Tensor  # (B, G, T) bool, True up to and including the end-of-text token

    def __getitem__(self, rows: slice | list[int]) -> "Completions":
        return Completions(self.ids[rows], self.mask[rows])

    def truncated(self, end: torch.Tensor) -> torch.Tensor:
        """(B, G) bool: cut off at the length limit. `end`: (E,) the end-of-text tokens."""
        last = self.ids.gather(-1, self.mask.sum(-1, keepdim=True) - 1)[..., 0]
        return ~torch.isin(last, end.to(last.device))


def base(model: torch.nn.Module) -> torch.nn.Module:
    """The VLM inside a peft wrapper (its LoRA layers stay in place and active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def encode_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prompts:
    """Run the vision tower and lay out the positions, once for rollout, reference and all updates: both are frozen.

    inputs: the processor's output for B prompts of one image each, padded on the left, in the host's memory.
    `mm_token_type_ids` must be in it: without them Qwen2.5-VL falls back to one-dimensional positions, silently.
    """
    inner, device = base(model).model, base(model).device
    vision = inner.get_image_features(inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device), return_dict=True)
    positions, _ = inner.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return Prompts(inputs["input_ids"], inputs["attention_mask"].bool(), positions, vision)


@torch.no_grad()
def rollout(
    model: torch.nn.Module,
    prompts: Prompts,
    G: int,
    max_new_tokens: int,
    end: torch.Tensor,
    banned: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Completions:
    """Sample G completions for each prompt. The model must be in eval mode, or gradient checkpointing drops the cache.

    end: (E,) tokens that end a completion. banned: tokens that are never sampled.

    If 9 ends a completion, and 5 9 is drawn for the first of two and 7 7 7 for the second, then their ids are
    [[5, 9, any], [7, 7, 7]] and their mask is [[1, 1, 0], [1, 1, 1]].
    """
    vlm = base(model)
    device = vlm.device
    B, P = prompts.ids.shape
    # Prefill: each prompt once. Its keys and values, and the logits for the first new token, then serve G completions.
    out = vlm(
        input_ids=prompts.ids.to(device),
        attention_mask=prompts.mask.to(device),
        position_ids=prompts.positions.to(device),
        mm_encoder_outputs={"image": prompts.vision},
        use_cache=True,
        logits_to_keep=1,
    )
    decoder = Decoder(vlm, out.past_key_values, prompts, G, max_new_tokens)
    logits = out.logits[:, -1].repeat_interleave(G, 0)  # (B * G, V)
    del out  # and with it the prompts' own keys and values
    # exercise 8: the sampling loop
    tokens, alive, done = [], [], torch.zeros(B * G, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token = choose_token(mask_banned(logits, banned), temperature, top_p, generator)
        tokens.append(torch.where(done, end[0], token))  # a finished row runs on with the others, its tokens unused
        alive.append(~done)
        done = done | torch.isin(token, end)
        # On a GPU asking whether all are done makes the host wait for the device: ask now and then.
        if t + 1 == max_new_tokens or ((device.type == "cpu" or t % 16 == 15) and done.all()):
            break
        logits = decoder.step(tokens[-1])
    # end of exercise 8: it leaves tokens and alive, lists with a tensor (B * G,) for each step
    return Completions(torch.stack(tokens, -1).view(B, G, -1).cpu(), torch.stack(alive, -1).view(B, G, -1).cpu())


class Decoder:
    """Gives N = B x G rows their next-token logits, (N,) tokens -> (N, V), one token after the other.

    All tensors of a step keep shape and place: the keys and values lie in a cache of their final length, of which a mask shows
    what is written. So nothing is copied when the cache grows, and a GPU can replay the step: 36 layers are 2,300 operations,
    each of which Python would have to launch, and a CUDA graph launches them all with one call (what that gains is not measured:
    no GPU was at hand). It is recorded anew for each rollout, which costs two steps, and freed with it, so that the update
    has the memory. Where a model cannot be recorded, or there is no GPU, the same step runs as it is.
    """

    def __init__(self, vlm: torch.nn.Module, prefilled: Cache, prompts: Prompts, G: int, max_new_tokens: int):
        (B, P), device = prompts.ids.shape, vlm.device
        length = -(-(P + max_new_tokens) // 16) * 16  # few different sizes, for the allocator to find again
        self.vlm, self.written, self.cache, self.graph = vlm, P, StaticCache(vlm.config, length), None
        for static, grown in zip(self.cache.layers, prefilled.layers, strict=True):
            static.update(grown.keys.repeat_interleave(G, 0), grown.values.repeat_interleave(G, 0))
        self.visible = F.pad(prompts.mask, (0, length - P)).repeat_interleave(G, 0)[:, None, None].to(device)  # (N, 1, 1, length)
        last = prompts.positions.amax((0, 2)).repeat_interleave(G)  # text goes on after the prompt's largest position
        self.positions = last.expand(3, -1)[..., None].contiguous().to(device)  # (3, N, 1)
        self.token = torch.zeros(B * G, 1, dtype=torch.int64, device=device)
        try:
            self.record()
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without a CUDA graph, slower: {error}", stacklevel=3)
        for layer in self.cache.layers:  # forget what the recording wrote
            layer.cumulative_length.fill_(P)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Write one token for each row, (N,), and return the logits of the next, (N, V), which the next step overwrites."""
        self.token.copy_(token[:, None])
        self.visible[..., self.written] = True
        self.positions += 1
        self.written += 1
        if self.graph is None:
            return self.forward()
        self.graph.replay()
        return self.logits

    def forward(self) -> torch.Tensor:
        return self.vlm(
            input_ids=self.token,
            attention_mask=self.visible,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def record(self) -> None:
        """On a GPU, record `forward` as a CUDA graph. It runs once beforehand, on a stream of its own, since libraries set
        themselves up at their first call; recording itself computes nothing."""
        if not self.token.is_cuda:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.forward()
        self.graph = graph


def pack(prompts: Prompts, completions: Completions) -> tuple[torch.Tensor, ...]:
    """Lay out the packed rows, in the host's memory. Returns

    rows      (B, L)    token ids: prompt, then the completions without padding; rows padded on the right
    positions (3, B, L) M-RoPE positions; every completion goes on after the largest of its prompt, over all three axes
    segments  (B, L)    0 on the prompt, 1..G on the completions, -1 on padding
    sources   (N,)      for each completion token the position, in the flattened (B * L), whose hidden state predicts it
    targets   (N,)      the completion tokens, prompt by prompt, completion by completion

    A completion's first token is predicted from the prompt's last position, all others from their neighbour on the left.

    A prompt of tokens 7 8 at positions 0 1, and completions 5 9 and 6:

    >>> prompts = Prompts(torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[[0, 1]]] * 3), None)
    >>> completions = Completions(torch.tensor([[[5, 9], [6, 0]]]), torch.tensor([[[True, True], [True, False]]]))
    >>> rows, positions, segments, sources, targets = pack(prompts, completions)
    >>> rows, positions[0], segments
    (tensor([[7, 8, 5, 9, 6]]), tensor([[0, 1, 2, 3, 2]]), tensor([[0, 0, 1, 1, 2]]))
    >>> sources, targets
    (tensor([1, 2, 1]), tensor([5, 9, 6]))
    """
    # exercise 9: rows, positions and segments
    B, G, T = completions.ids.shape
    step = torch.arange(T).expand(G, T)
    number = torch.arange(1, G + 1)[:, None].expand(G, T)
    rows, positions, segments, sources = [], [], [], []
    for b in range(B):
        keep = completions.mask[b]  # (G, T); indexing with it puts the completions one after the other
        prompt = prompts.ids[b][prompts.mask[b]]
        laid = prompts.positions[:, b][:, prompts.mask[b]]  # (3, P)
        P = len(prompt)
        rows.append(torch.cat([prompt, completions.ids[b][keep]]))
        positions.append(torch.cat([laid, (laid.max() + 1 + step[keep]).expand(3, -1)], 1).T)
        segments.append(torch.cat([torch.zeros_like(prompt), number[keep]]))
        left = torch.arange(P - 1, len(rows[-1]) - 1)
        sources.append(torch.where(step[keep] == 0, P - 1, left))
    L = max(map(len, rows))
    sources = torch.cat([b * L + source for b, source in enumerate(sources)])
    return (
        pad_sequence(rows, batch_first=True),
        pad_sequence(positions, batch_first=True).permute(2, 0, 1),
        pad_sequence(segments, batch_first=True, padding_value=-1),
        sources,
        completions.ids[completions.mask],
    )
    # end of exercise 9


def may_attend(segments: torch.Tensor) -> torch.Tensor:
    """The attention mask of packed rows, (B, L) as of `pack` -> (B, L, L) bool: may this query see that key?

    What padding sees does not matter as long as it is something: attention over nothing is NaN, and so are its gradients.
    A prompt and two completions of two tokens each; the fifth and the sixth token are the second completion:

    >>> may_attend(torch.tensor([[0, 0, 1, 1, 2, 2]])).int()
    tensor([[[1, 0, 0, 0, 0, 0],
             [1, 1, 0, 0, 0, 0],
             [1, 1, 1, 0, 0, 0],
             [1, 1, 1, 1, 0, 0],
             [1, 1, 0, 0, 1, 0],
             [1, 1, 0, 0, 1, 1]]], dtype=torch.int32)
    """
    # exercise 9: who sees whom in a packed row
    same = segments[:, :, None] == segments[:, None, :]
    return ((segments == 0)[:, None, :] | same).tril()
    # end of exercise 9


def group_logprobs(
    model: torch.nn.Module,
    prompts: Prompts,
    completions: Completions,
    banned: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all completions, each prompt computed once. Returns (B, G, T) log-probs and entropies, 0 on padding.

    One row for each prompt: [prompt | o_1 | ... | o_G]. Two things make it equal to G separate rows: the attention mask
    lets a completion see the prompt and itself but not its neighbours (the model takes it as (B, 1, L, L)), and its
    positions start again after the prompt. Only the completions' positions go through the lm_head, `chunk` at a time and
    recomputed in the backward pass: with V = 151,936 the logits would otherwise be the largest tensors of the whole step.

    Needs attn_implementation="sdpa": eager attention misreads a boolean mask.
    """
    vlm = base(model)  # vlm.model(...).last_hidden_state is (B, L, width), and vlm.lm_head makes logits of it
    # exercise 10: log-probs with a shared prompt
    rows, positions, segments, sources, targets = (x.to(vlm.device, non_blocking=True) for x in pack(prompts, completions))
    hidden = vlm.model(
        input_ids=rows,
        attention_mask=may_attend(segments)[:, None],
        position_ids=positions,
        mm_encoder_outputs={"image": prompts.vision},
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1)[sources]  # (N, width), N completion tokens of all prompts

    def through_head(h: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(vlm.lm_head(h), tokens, temperature, banned)

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        done = [checkpoint(through_head, h, tokens, use_reentrant=False) for h, tokens in pieces]
    else:
        done = [through_head(h, tokens) for h, tokens in pieces]
    logprobs, entropy = (torch.cat(parts) for parts in zip(*done, strict=True))
    mask = completions.mask.to(vlm.device, non_blocking=True)
    blank = torch.zeros(mask.shape, device=vlm.device)
    return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, entropy)
    # end of exercise 10

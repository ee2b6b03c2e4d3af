"""starts.py - prompts that are followed by the start of a completion, such as a forced thought."""

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.vlm import Policy, Prompts


def read_with_starts(policy: Policy, samples: list, starts: list[str]) -> Prompts:
    """`Policy.read`, and texts with which the completions begin: the policy continues after them.

    A thinking model's <think> may be part of a start: it stands in the prompt once.
    """
    starts = [start.removeprefix(policy.opening) for start in starts]
    tokens = policy.processor.tokenizer(starts, add_special_tokens=False)["input_ids"]
    return append_tokens(policy.read(samples), tokens)


def append_tokens(prompts: Prompts, tokens: list[list[int]]) -> Prompts:
    """B prompts, each followed by tokens that count as the start of its completion.

    Their positions continue after the prompt's largest one, as those of sampled tokens do.
    """
    ids, positions = [], []
    for b, more in enumerate(tokens):
        keep = prompts.mask[b]
        before = prompts.positions[:, b, keep]  # (3, P)
        after = before.max() + 1 + torch.arange(len(more))
        ids.append(torch.cat([prompts.ids[b, keep], torch.tensor(more, dtype=torch.int64)]))
        positions.append(torch.cat([before, after.expand(3, -1)], 1).T)
    left = {"batch_first": True, "padding_side": "left"}
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], **left)
    positions = pad_sequence(positions, **left).permute(2, 0, 1)
    return Prompts(pad_sequence(ids, **left), mask, positions, prompts.vision)

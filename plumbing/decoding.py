"""decoding.py - the decoding step of `grpo.rollout` in memory of fixed size, as a CUDA graph."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Cache, StaticCache

from plumbing.vlm import Prompts

# Tokens. A cache's length is rounded up to a multiple of this. So prompts of different steps often
# give the same length, and torch's allocator can reuse the memory of the last step.
BLOCK = 16


class StaticDecoder:
    """The same as `grpo.Decoder`: the logits of the next token for N = B x G rows, step by step.

    Keys and values are in a cache of the final length, and a mask marks the slots that are written.
    So every tensor of a step keeps its shape and its address, as a CUDA graph needs it.
    """

    def __init__(self, vlm, prefilled: Cache, prompts: Prompts, G: int, max_new_tokens: int):
        B, P = prompts.ids.shape
        device = vlm.device
        length = -(-(P + max_new_tokens) // BLOCK) * BLOCK  # rounded up to a multiple
        self.vlm = vlm
        self.cache = StaticCache(vlm.config, length)
        for static, grown in zip(self.cache.layers, prefilled.layers, strict=True):
            static.update(grown.keys.repeat_interleave(G, 0), grown.values.repeat_interleave(G, 0))
        self.written = P  # slots of the cache
        visible = F.pad(prompts.mask, (0, length - P)).repeat_interleave(G, 0)
        self.visible = visible[:, None, None].to(device)  # (N, 1, 1, length): the attention mask
        last = prompts.positions.amax((0, 2)).repeat_interleave(G)  # text continues after this one
        self.positions = last.expand(3, -1)[..., None].contiguous().to(device)  # (3, N, 1)
        self.token = torch.zeros(B * G, 1, dtype=torch.int64, device=device)
        self.replay = None
        if device.type == "cuda":
            self.replay = record_graph(self.forward)
            # StaticCache counts the tokens that it was given and writes the next one behind them.
            # The two runs of record_graph were counted too, so set the count back.
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(P)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Append one token to each row, (N,), and return the logits of the next, (N, V).

        The returned tensor is valid until the next step.
        """
        self.token.copy_(token[:, None])
        self.visible[..., self.written] = True
        self.positions += 1
        self.written += 1
        return self.replay() if self.replay else self.forward()

    def forward(self) -> torch.Tensor:
        return self.vlm(
            input_ids=self.token,
            attention_mask=self.visible,
            position_ids=self.positions,
            cache=self.cache,
            use_cache=True,
        ).logits[:, -1]


def record_graph(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    """Record `forward` as a CUDA graph, and return a function that replays it, or None on failure.

    Why: a decoding step of the 3B policy is 2,541 kernels and 757 matrix products (counted on a
    stubbed CUDA runtime), and to launch them takes longer than to run them (not measured on a GPU
    yet). A graph launches all of them with one call.

    `forward` must read and write the same tensors every time. It runs twice here: once on a side
    stream, because libraries set themselves up in their first call, and once to record it.
    """
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()
    except RuntimeError as error:
        warnings.warn(f"decoding continues without a CUDA graph, slower: {error}", stacklevel=4)
        return None

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay

"""gpu_24gb.py - does a training step fit this GPU, how long does it take, and is it right?

    python -m benchmarks.gpu_24gb [--parts qwen2b qwen3b qwen7b qwen7b-4bit]

One command for any CUDA card. Each part trains at the paper's size with a preset's architectures
and random weights, so nothing is downloaded. It runs in a process of its own, which may allocate
23 GiB (a 24 GB card without what CUDA itself needs), or 1 GiB less than the card has. A part that
cannot fit by the arithmetic of `python -m tools.memory` is skipped. A random policy never ends a
completion, so all have full length, the worst case. The reward reads fixed, valid answers.

It reports, for the last step, seconds and peak memory by phase and tokens per second, and checks

    ratio     of a step with learning rate 0: it should be exactly 1
    packed    mean difference of log-probs: the packed row, and each completion in its own row
    graph     mean difference of log-probs: decoding with and without a CUDA graph

Writes runs/gpu.json and prints a Markdown table. --toy checks the script itself on any device.
"""

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import grpo
import samr1_mini
from benchmarks.logprobs import plain_logprobs
from benchmarks.meter import DEVICE, in_new_process
from benchmarks.random_models import ANSWER, random_policy
from data import Shapes
from plumbing import decoding
from plumbing.errors import UserError
from plumbing.runs import PhaseTimer, write_text
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.vlm import vlm_path
from reward import SamScorer, score_completions
from tools.memory import expected_memory

GIB = 2**30
CARD = 23 * GIB
PARTS = ("qwen2b", "qwen3b", "qwen7b", "qwen3b-4bit", "qwen7b-4bit")
PHASES = ("rollout", "reward", "logprobs", "update")
TOY = """--vlm tiny --sam tiny --side 64 --max_new_tokens 8 --prompts_per_step 2 --group_size 2
    --save_memory 1 --dtype auto"""


def settings_of(part: str, flags: str):
    """Settings of `train` for a part, "qwen7b-4bit" for example."""
    preset, _, dtype = part.partition("-")
    argv = f"--preset {preset} --data shapes --dtype {dtype or 'auto'} {flags}"
    return parse_settings("train", argv.split())


def expected_gib(s) -> dict[str, float]:
    """Peak memory of each phase by the arithmetic of tools.memory."""
    return {
        phase: sum(size for size, _ in parts.values()) / GIB
        for phase, parts in expected_memory(s).items()
    }


def measure(s) -> dict:
    """Run the steps of `samr1_mini.train`, and return what was measured."""
    with random_policy(vlm_path(s.vlm), DEVICE):
        policy = samr1_mini.load_trainable_policy(s)
    sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
    scorer = SamScorer(sam, policy.device, encoder_batch=1, offload=s.save_memory >= 3)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(s.seed)
    batch = [Shapes("train")[i] for i in range(s.prompts_per_step)]
    G = s.group_size
    corner = policy.extent / (2 * G)
    texts = [[ANSWER.format(corner * g, corner * (g + G)) for g in range(G)]] * s.prompts_per_step
    rows = []
    for lr in (0.0, s.lr):  # the last step is reported
        optimizer.param_groups[0]["lr"] = lr
        timer = PhaseTimer(policy.device)
        prompts = policy.read(batch)
        completions = samr1_mini.sample_completions(policy, prompts, s, generator)
        timer.end("rollout")
        scores = score_completions(scorer, batch, texts, policy.extent, style=policy.style)
        advantages = grpo.group_advantages(scores.reward)
        timer.end("reward")
        old, reference = samr1_mini.fixed_logprobs(policy, prompts, completions, s)
        timer.end("logprobs")
        _, statistics = samr1_mini.update(
            policy, optimizer, prompts, completions, advantages, old, reference, s
        )
        timer.end("update")
        rows.append(timer.row(completions) | statistics)
    found = {"last_step": rows[-1], "ratio": rows[0]["ratio"], "expected_gib": expected_gib(s)}
    return found | check_logprobs(policy, s, texts[0])


@torch.no_grad()
def decode(policy, prompts, s, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs (G, T) that `rollout` finds for these tokens (G, T), which it takes as sampled."""
    logprobs = []

    def choose(logits, *options):
        token = tokens[:, len(logprobs)]
        logprobs.append(logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
        return token

    with mock.patch.object(grpo, "choose_token", choose):
        samr1_mini.sample_completions(policy, prompts, replace(s, max_new_tokens=tokens.shape[1]))
    return torch.stack(logprobs, 1)


@torch.no_grad()
def check_logprobs(policy, s, texts: list[str]) -> dict:
    """The last two checks of the module's docstring, on G texts, and whether a graph was used."""
    rows = policy.processor.tokenizer(texts)["input_ids"]
    T = min(map(len, rows))
    tokens = torch.tensor([row[:T] for row in rows])
    prompts = policy.read([Shapes("heldout")[0]])
    with warnings.catch_warnings(record=True) as failures:  # `record_graph` warns if it fails
        with_graph = decode(policy, prompts, s, tokens.to(policy.device))
    with mock.patch.object(decoding, "record_graph", lambda forward: None):
        without = decode(policy, prompts, s, tokens.to(policy.device))
    completions = grpo.Completions(tokens[None], torch.ones_like(tokens[None]).bool())
    none = policy.banned[:0]
    packed, _ = grpo.group_logprobs(policy.model, prompts, completions, none)
    plain = [plain_logprobs(policy.model, prompts, ids[None]) for ids in tokens]
    return {
        "graph_recorded": policy.device.type == "cuda" and not failures,
        "graph": (with_graph - without).abs().mean().item(),
        "packed": (packed[0] - torch.cat(plain)).abs().mean().item(),
    }


def run_part(part: str, toy: bool) -> dict:
    """What one part measures, or {"skipped": why}."""
    s = settings_of(part, TOY if toy else "")
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(CARD, total - GIB)
        torch.cuda.set_per_process_memory_fraction(limit / total)
        peak = max(expected_gib(s).values())
        if peak * GIB > limit:
            return {"skipped": f"needs {peak:.1f} GiB by arithmetic, may use {limit / GIB:.1f}"}
    try:
        return measure(s)
    except (torch.OutOfMemoryError, UserError) as error:  # no bitsandbytes for 4 bit
        return {"skipped": str(error).split(". ")[0]}


def markdown(parts: dict[str, dict]) -> str:
    """The table for benchmarks/README.md."""
    columns = [f"{phase}: s, GiB (expected)" for phase in PHASES]
    columns += ["tokens/s", "CUDA graph", "ratio", "packed", "graph"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for part, row in parts.items():
        if "skipped" in row:
            lines.append(f"| {part} | {row['skipped']} |" + " |" * (len(columns) - 1))
            continue
        last, cells = row["last_step"], []
        for phase in PHASES:
            expected = row["expected_gib"].get(phase)
            cell = f"{last[f'seconds_{phase}']:.1f}, {last[f'peak_mib_{phase}'] / 1024:.2f}"
            cells.append(cell + (f" ({expected:.2f})" if expected else ""))
        cells += [f"{last['tokens_per_second']:.0f}", "yes" if row["graph_recorded"] else "no"]
        cells += [f"{row['ratio']:.6f}", f"{row['packed']:.1e}", f"{row['graph']:.1e}"]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_24gb")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not options.toy:
        print("no CUDA device: nothing measured (--toy checks the script itself)")
        return
    name = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "CPU"
    parts = {}
    for part in options.parts:
        print(f"{part} ...", file=sys.stderr)
        threads = torch.get_num_threads()
        parts[part] = in_new_process(run_part, part, options.toy, threads=threads)
        result = {"device": name, "torch": torch.__version__, "toy": options.toy, "parts": parts}
        write_text(Path("runs/gpu.json"), json.dumps(result, indent=2))
    print(f"{name}, torch {torch.__version__}{', toy size' if options.toy else ''}\n")
    print(markdown(parts))


if __name__ == "__main__":
    main()

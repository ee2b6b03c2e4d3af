"""gpu_24gb.py - does a training step fit this GPU, how long does it take, and is it right?

    python -m benchmarks.gpu_24gb [--parts qwen2b qwen3b qwen7b qwen7b-4bit]

One command for any CUDA card. Each part trains at the paper's size with a preset's architectures
and random weights, so nothing is downloaded. It runs in a process of its own, which may allocate
23 GiB (a 24 GB card without what CUDA itself needs), or 1 GiB less than the card has. A part that
cannot fit by the arithmetic of `python -m tools.memory` is skipped.

A random policy never ends a completion, so all have full length, which is the worst case. It never
writes a valid answer either, so the reward reads fixed answers, and SAM decodes a prompt for each.

It reports, for the last step, seconds and peak memory by phase and tokens per second, and checks

    ratio     of a step with learning rate 0: it should be exactly 1
    packed    mean difference of log-probs: the packed row, and each completion in its own row
    graph     mean difference of log-probs: decoding with and without a CUDA graph

Writes all of it to --out as JSON, and prints a Markdown table. Without a CUDA device it stops.
--toy runs the same code at toy size on any device, to check the script itself.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

import grpo
import samr1_mini
from benchmarks.logprobs import plain_logprobs
from benchmarks.meter import DEVICE, in_new_process
from benchmarks.random_models import random_policy
from data import Shapes
from plumbing import decoding
from plumbing.errors import UserError
from plumbing.runs import PhaseTimer
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.vlm import vlm_path
from reward import SamScorer, score_completions
from tools.memory import expected_memory

GIB = 2**30
CARD = 23 * GIB
PARTS = ("qwen2b", "qwen3b", "qwen7b", "qwen3b-4bit", "qwen7b-4bit")
PHASES = ("rollout", "reward", "logprobs", "update")
STEPS = 2  # the first has learning rate 0, the last one is reported
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
TOY = """--vlm tiny --sam tiny --side 64 --max_new_tokens 8 --prompts_per_step 2 --group_size 2
    --save_memory 1 --dtype auto"""


def settings_of(part: str, flags: list[str]):
    """Settings of `train` for a part, "qwen7b-4bit" for example."""
    argv = ["--preset", part.removesuffix("-4bit"), "--data", "shapes"]
    if part.endswith("-4bit"):
        argv += ["--dtype", "4bit"]
    return parse_settings("train", argv + flags)


def expected_gib(s) -> dict[str, float]:
    """Peak memory of each phase by the arithmetic of tools.memory."""
    return {
        phase: sum(size for size, _ in parts.values()) / GIB
        for phase, parts in expected_memory(s).items()
    }


def measure(part: str, flags: list[str]) -> dict:
    """Run the steps of `samr1_mini.train`, and return what was measured."""
    s = settings_of(part, flags)
    with random_policy(vlm_path(s.vlm), DEVICE):
        policy = samr1_mini.load_policy(s)
    policy.model = samr1_mini.add_lora(policy.model, s.lora_rank, s.seed, s.save_memory >= 2)
    sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
    scorer = SamScorer(sam, policy.device, encoder_batch=1, offload=s.save_memory >= 3)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(s.seed)
    batch = [Shapes("train")[i] for i in range(s.prompts_per_step)]
    G = s.group_size
    ends = [(policy.extent * g / (2 * G), policy.extent * (g + G) / (2 * G)) for g in range(G)]
    texts = [[ANSWER.format(low, high) for low, high in ends]] * s.prompts_per_step
    rows = []
    for _ in range(STEPS):
        timer = PhaseTimer(policy.device)
        prompts = policy.read(batch)
        completions = samr1_mini.sample_completions(policy, prompts, s, generator)
        timer.end("rollout")
        scores = score_completions(scorer, batch, texts, policy.extent, style=policy.prompt)
        advantages = grpo.group_advantages(scores.reward)
        timer.end("reward")
        old, reference = samr1_mini.fixed_logprobs(policy, prompts, completions, s)
        timer.end("logprobs")
        _, statistics = samr1_mini.update(
            policy, optimizer, prompts, completions, advantages, old, reference, s
        )
        timer.end("update")
        rows.append(timer.row(completions) | statistics)
        optimizer.param_groups[0]["lr"] = s.lr  # the first step has 0, see `ratio` above
    found = {"last_step": rows[-1], "ratio": rows[0]["ratio"], "expected_gib": expected_gib(s)}
    if policy.device.type == "cuda":
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found | check_logprobs(policy, s)


# --------------------------------------------------------------------------------------------------
# Is it right on this card?
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(policy, prompts, s, forced: torch.Tensor | None = None):
    """Tokens (G, T) that `rollout` samples for one prompt, and their log-probs in these steps.

    forced: tokens (G, T) to take instead of sampling.
    """
    tokens, logprobs = [], []
    choose_token = grpo.choose_token

    def choose(logits, *options):
        token = choose_token(logits, *options)
        if forced is not None:
            token = forced[:, len(tokens)]
        tokens.append(token)
        logprobs.append(logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
        return token

    with mock.patch.object(grpo, "choose_token", choose):
        grpo.rollout(
            policy.model,
            prompts,
            s.group_size,
            min(64, s.max_new_tokens),
            policy.end,
            policy.banned,
            decoder=decoding.StaticDecoder,
        )
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


@torch.no_grad()
def check_logprobs(policy, s) -> dict:
    """The last two checks of the module's docstring, and whether a graph was recorded."""
    policy.model.eval()
    prompts = policy.read([Shapes("heldout")[0]])
    graphs = []

    def record(forward):
        graphs.append(record_graph(forward))
        return graphs[-1]

    record_graph = decoding.record_graph
    with mock.patch.object(decoding, "record_graph", record):
        tokens, with_graph = decode(policy, prompts, s)
    with mock.patch.object(decoding, "record_graph", lambda forward: None):
        _, without = decode(policy, prompts, s, forced=tokens)
    completions = grpo.Completions(tokens[None].cpu(), torch.ones_like(tokens[None].cpu()).bool())
    none = policy.banned[:0]
    packed, _ = grpo.group_logprobs(policy.model, prompts, completions, none)
    plain = [plain_logprobs(policy.model, prompts, ids[None]) for ids in completions.ids[0]]
    return {
        "graph_recorded": any(graph is not None for graph in graphs),
        "graph": (with_graph - without).abs().mean().item(),
        "packed": (packed[0] - torch.cat(plain)).abs().mean().item(),
    }


# --------------------------------------------------------------------------------------------------
# All parts, one process each, and the report
# --------------------------------------------------------------------------------------------------


def run_part(part: str, toy: bool) -> dict:
    """What one part measures, or {"skipped": why}."""
    flags = TOY.split() if toy else []
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(CARD, total - GIB)
        torch.cuda.set_per_process_memory_fraction(limit / total)
        peak = max(expected_gib(settings_of(part, flags)).values())
        if peak * GIB > limit:
            return {"skipped": f"needs {peak:.1f} GiB by arithmetic, may use {limit / GIB:.1f}"}
    try:
        return measure(part, flags)
    except (torch.OutOfMemoryError, UserError) as error:  # no bitsandbytes for 4 bit
        return {"skipped": str(error).split(". ")[0]}


def markdown(parts: dict[str, dict]) -> str:
    """The table for benchmarks/README.md."""
    columns = [*(f"{phase}: s, GiB (expected)" for phase in PHASES), "tokens/s", "CUDA graph"]
    columns += ["ratio", "packed", "graph"]
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
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not options.toy:
        print("no CUDA device: nothing measured (--toy checks the script itself)")
        return
    name = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "CPU"
    parts = {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        print(f"{part} ...", file=sys.stderr)
        threads = torch.get_num_threads()
        parts[part] = in_new_process(run_part, part, options.toy, threads=threads)
        result = {"device": name, "torch": torch.__version__, "toy": options.toy, "parts": parts}
        options.out.write_text(json.dumps(result, indent=2))
    print(f"{name}, torch {torch.__version__}{', toy size' if options.toy else ''}\n")
    print(markdown(parts))


if __name__ == "__main__":
    main()

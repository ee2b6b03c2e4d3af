"""gpu_24gb.py - does a training step fit this GPU, how long does it take, and is it right?

    python -m benchmarks.gpu_24gb [--parts qwen2b qwen3b qwen7b qwen7b-4bit tiny sam] [--steps 2]

One command for any CUDA card. Each part runs in a process of its own, which may allocate 23 GiB (a
24 GB card without what CUDA itself needs), or 1 GiB less than the card has:

    qwen2b, qwen3b, qwen7b   training steps at the paper's size with each preset's architectures and
    and -4bit                random weights, so nothing is downloaded. A part that cannot fit by the
                             arithmetic of `python -m tools.memory` is skipped.
    tiny                     60 steps of the embedded default: does the reward rise on this card?
    sam                      ViT-H: scoring 8 images x 8 completions against SamPredictor

A random policy never ends a completion, so all have full length, which is the worst case. It never
writes a valid answer either, so the reward reads fixed answers, and SAM decodes a prompt for each.

Of a training step it reports seconds and peak memory by phase, tokens per second, whether decoding
used a CUDA graph, the first update's ratio (it should be 1), the difference between log-probs of
decoding steps and of the packed row, and the lines of code at which the host waited for the GPU.

Writes all of it to --out as JSON, and prints Markdown tables for benchmarks/README.md. Without a
CUDA device it says so and stops. --toy runs the same code at toy size, to check the script itself.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor

import grpo
import samr1_mini
from benchmarks.random_models import random_policy
from data import Sample, Shapes
from plumbing.devices import choose_device
from plumbing.memory import expected_memory
from plumbing.runs import PhaseTimer
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.vlm import vlm_path
from reward import SamPrompt, SamScorer, score_completions

GIB = 2**30
CARD = 23 * GIB
POLICIES = ("qwen2b", "qwen3b", "qwen7b", "qwen3b-4bit", "qwen7b-4bit")
PARTS = ("qwen2b", "qwen3b", "qwen7b", "qwen7b-4bit", "tiny", "sam")
PHASES = ("rollout", "reward", "logprobs", "update")
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
TOY = """--vlm tiny --sam tiny --side 64 --max_new_tokens 8 --prompts_per_step 2 --group_size 2
    --rollout_prompts 2 --save_memory 1 --load_in_4bit false"""


# --------------------------------------------------------------------------------------------------
# Training steps at true size
# --------------------------------------------------------------------------------------------------


def settings_of(part: str, flags: list[str]):
    """Settings of `train` for a part, "qwen7b-4bit" for example."""
    preset, _, four_bit = part.partition("-")
    argv = f"--preset {preset} --data shapes --eval_samples 1 --save_every 1000000".split()
    return parse_settings("train", argv + ["--load_in_4bit"] * bool(four_bit) + flags)


def expected_gib(s) -> dict[str, float]:
    phases = expected_memory(s, vlm_path(s.vlm), samr1_mini.LORA_TARGETS).items()
    return {phase: sum(size for size, _ in parts.values()) / GIB for phase, parts in phases}


def score_fixed_answers(scorer, samples, completions, frame, *args, **options):
    """`score_completions` on valid answers instead of a random policy's text."""
    size = len(completions[0])
    boxes = [(frame * g / (2 * size), frame * (g + size) / (2 * size)) for g in range(size)]
    texts = [[ANSWER.format(*box) for box in boxes]] * len(samples)
    return score_completions(scorer, samples, texts, frame, *args, **options)


class Spy:
    """Notes what a run does: its models, use of the graph, the first ratio, and waits of a step."""

    def __init__(self, caught: list):
        self.caught = caught  # the warnings so far
        self.models, self.graphs, self.ratio, self.waits = None, [], None, Counter()

    def load_models(self, *args):
        self.models = load_models(*args)
        return self.models

    def record_graph(self, forward):
        replay = record_graph(forward)
        self.graphs.append(replay is not None)
        return replay

    def grpo_loss(self, *args):
        loss, statistics = grpo_loss(*args)
        if self.ratio is None:
            self.ratio = statistics["ratio"].item()
        return loss, statistics

    def phase_timer(self, device):
        """The timer of a step, which begins and ends the counting of waits."""
        timer = PhaseTimer(device)
        self.caught.clear()

        def row(completions):
            waits = [w for w in self.caught if "synchronizing" in str(w.message)]
            self.waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
            return PhaseTimer.row(timer, completions)

        timer.row = row
        return timer


load_models, record_graph, grpo_loss = samr1_mini.load_models, grpo.record_graph, grpo.grpo_loss


def measure(part: str, steps: int, flags: list[str]) -> dict:
    """Train for some steps and return what was measured. Peaks and seconds are of the last step."""
    s = settings_of(part, flags)
    s.steps = steps
    sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
    replaced = dict(load_sam=lambda _: sam, score_completions=score_fixed_answers)
    replaced |= dict(evaluate=lambda *_: [], log_samples=lambda *_: None)  # not measured here
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(io.StringIO()),
        random_policy(vlm_path(s.vlm), choose_device(s.device)),
        mock.patch.multiple(samr1_mini, **replaced),
        contextlib.ExitStack() as stack,
    ):
        warnings.simplefilter("always")
        spy = Spy(caught)
        watched = [(samr1_mini, "load_models"), (samr1_mini, "grpo_loss"), (grpo, "record_graph")]
        for module, name in watched:
            stack.enter_context(mock.patch.object(module, name, getattr(spy, name)))
        stack.enter_context(mock.patch.object(samr1_mini.runs, "PhaseTimer", spy.phase_timer))
        s.out = f"{folder}/run"
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        samr1_mini.train(s)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        lines = (Path(s.out) / "metrics.jsonl").read_text().splitlines()
        difference = decoder_difference(spy.models[0], s)
    return {
        "last_step": json.loads(lines[-1]),
        "expected_gib": expected_gib(s),
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0,
        "graph": bool(spy.graphs) and all(spy.graphs),
        "first_ratio": spy.ratio,
        "decoder_difference": difference,
        "waits": dict(spy.waits.most_common()),
    }


@torch.no_grad()
def decoder_difference(policy, s) -> float:
    """Mean |difference| of log-probs: of the decoding steps that sampled, and of the packed row."""
    sampled = []

    def choose(logits, *limits):
        token = choose_token(logits, *limits)
        sampled.append((logits / s.temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0])
        return token

    choose_token = grpo.choose_token
    prompts = policy.read([Shapes("heldout")[0]])
    limits = (s.group_size, min(64, s.max_new_tokens), policy.end, policy.banned, s.temperature)
    policy.model.eval()
    with mock.patch.object(grpo, "choose_token", choose):
        completions = grpo.rollout(policy.model, prompts, *limits)
    packed = grpo.group_logprobs(policy.model, prompts, completions, policy.banned, s.temperature)
    decoded = torch.stack(sampled, -1).view_as(packed[0])
    mask = completions.mask.to(decoded.device)
    return ((decoded - packed[0]).abs() * mask).sum().item() / max(1, mask.sum().item())


# --------------------------------------------------------------------------------------------------
# The tiny default, and SAM
# --------------------------------------------------------------------------------------------------


def measure_tiny(steps: int, flags: list[str]) -> dict:
    """The embedded default: mean reward of the first 5 and the last 20 steps, seconds a step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = ["--steps", str(steps), "--eval_samples", "8", "--out", f"{folder}/run", *flags]
        start = time.perf_counter()
        samr1_mini.train(parse_settings("train", argv))
        seconds = time.perf_counter() - start
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    first, last = float(np.mean(rewards[:5])), float(np.mean(rewards[-20:]))
    return {"steps": steps, "first": first, "last": last, "seconds_per_step": seconds / steps}


def measure_sam(size: str, device: torch.device) -> dict:
    """Seconds to score 8 images x 8 completions, and the largest difference of an IoU.

    SamPredictor encodes each image once. "after": from the embeddings on, that is decoder, masks
    and IoU. Both sides run a warm-up before.
    """
    rng = np.random.default_rng(0)
    samples, prompts = [], []
    scale = SAM_SIZES[size].get("image_size", 1024)
    for width, height in ((scale * 5 // 8, scale * 15 // 32), (scale * 15 // 32, scale // 2)) * 4:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), bool)
        mask[height // 4 : height // 2, width // 4 : width // 2] = True
        samples.append(Sample(Image.fromarray(noise), "", mask, None, ""))
        corners = rng.uniform(0, 0.4, (8, 2)) * (width, height)
        boxes = [(x, y, x + width / 2, y + height / 2) for x, y in corners]
        points = [((x + width / 8, y + height / 8), (x + width / 4, y + height / 3))
                  for x, y in corners]  # fmt: skip
        prompts.append([SamPrompt(*pair) for pair in zip(boxes, points, strict=True)])
    sam = build_sam(**SAM_SIZES[size])
    scorer, predictor = SamScorer(sam, device, encoder_batch=1), SamPredictor(sam)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def ours():
        start = now()
        encoded = scorer.encode([sample.image for sample in samples])
        between = now()
        with mock.patch.object(scorer, "encode", lambda _: encoded):
            iou = scorer.score(samples, prompts).iou.cpu()
        return between - start, now() - between, iou

    def theirs():
        encoder, after, ious = 0.0, 0.0, []
        for sample, group in zip(samples, prompts, strict=True):
            start = now()
            with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
                predictor.set_image(np.asarray(sample.image))
            predictor.features = predictor.features.float()
            encoder, start = encoder + now() - start, now()
            for prompt in group:
                chosen = dict(box=np.array(prompt.box), point_coords=np.array(prompt.points))
                masks, rating, _ = predictor.predict(point_labels=np.ones(2), **chosen)
                mask = masks[rating.argmax()]
                ious.append((mask & sample.mask).sum() / max(1, (mask | sample.mask).sum()))
            after += now() - start
        return encoder, after, torch.tensor(np.array(ious), dtype=torch.float32).view(8, 8)

    ours(), theirs()
    (encoder, after, iou), (their_encoder, their_after, their_iou) = ours(), theirs()
    result = dict(size=size, encoder=encoder, after=after, predictor_encoder=their_encoder)
    result |= dict(predictor_after=their_after, ratio_after=their_after / after)
    return result | {"largest_difference": (iou - their_iou).abs().max().item()}


# --------------------------------------------------------------------------------------------------
# All parts, one process each, and the report
# --------------------------------------------------------------------------------------------------


def card_limit() -> int:
    """Bytes that a process may allocate. Its caller sets this limit."""
    return min(CARD, torch.cuda.get_device_properties(0).total_memory - GIB)


def run_part(part: str, steps: int, toy: bool) -> dict:
    """What one part measures, or {"skipped": why}."""
    flags = TOY.split() if toy else []
    device = choose_device("auto")
    if device.type == "cuda":
        limit = card_limit()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        if part == "tiny":
            return measure_tiny(3 if toy else 60, TOY.split()[4:] if toy else [])
        if part == "sam":
            return measure_sam("tiny" if toy else "vit_h", device)
        if "4bit" in part and importlib.util.find_spec("bitsandbytes") is None:
            return {"skipped": "bitsandbytes is not installed"}
        peak = max(expected_gib(settings_of(part, flags)).values())
        if device.type == "cuda" and peak * GIB > limit:
            return {"skipped": f"needs {peak:.1f} GiB by arithmetic, may use {limit / GIB:.1f}"}
        return measure(part, steps, flags)
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {str(error).split('. ')[0]}"}


def in_own_process(part: str, steps: int, toy: bool) -> dict:
    """`run_part` in a new process, so that no part leaves memory behind for the next."""
    command = [sys.executable, "-m", "benchmarks.gpu_24gb", "--parts", part, "--child"]
    command += ["--steps", str(steps), *["--toy"] * toy]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        return {"skipped": f"failed with exit code {child.returncode}, see above"}
    return json.loads(child.stdout.splitlines()[-1])


def markdown(result: dict) -> str:
    """The tables for benchmarks/README.md."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['found']}", ""]
    lines += ["| | " + " | ".join(f"{phase}: s, GiB (expected)" for phase in PHASES)
              + " | tokens/s | graph | first ratio | decoder - packed | waits a step |",
              "|---" * (len(PHASES) + 6) + "|"]  # fmt: skip
    for part in (name for name in POLICIES if name in result["parts"]):
        row = result["parts"][part]
        if "skipped" in row:
            lines.append(f"| {part} | {row['skipped']} |" + " |" * (len(PHASES) + 4))
            continue
        last, cells = row["last_step"], []
        for phase in PHASES:
            expected = row["expected_gib"].get(phase)
            cell = f"{last[f'seconds_{phase}']:.1f}, {last[f'peak_mib_{phase}'] / 1024:.2f}"
            cells.append(cell + (f" ({expected:.2f})" if expected else ""))
        waits = sum(row["waits"].values())
        cells += [f"{last['tokens_per_second']:.0f}", "yes" if row["graph"] else "no"]
        cells += [f"{row['first_ratio']:.6f}", f"{row['decoder_difference']:.4f}", f"{waits}"]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    if tiny := result["parts"].get("tiny"):
        lines += ["", tiny.get("skipped") or "Tiny default, {steps} steps: mean reward {first:.2f} "
                  "-> {last:.2f}, {seconds_per_step:.2f} s a step.".format(**tiny)]  # fmt: skip
    if sam := result["parts"].get("sam"):
        text = (
            "SAM {size}, 8 images x 8 completions: encoder {encoder:.2f} s (SamPredictor "
            "{predictor_encoder:.2f}), after it {after:.3f} s ({predictor_after:.3f}), "
            "**{ratio_after:.1f}x**; largest difference of an IoU {largest_difference:.1e}."
        )
        lines += ["", sam.get("skipped") or text.format(**sam)]
    for part, row in result["parts"].items():
        for line, count in list(row.get("waits", {}).items())[:12]:
            lines.append(f"- {part}: {count} waits a step at {line}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_24gb", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=sorted({*POLICIES, *PARTS}), default=PARTS)
    parser.add_argument("--steps", type=int, default=2, help="of each preset; the last is reported")
    parser.add_argument("--out", default="runs/gpu.json")
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        print("no CUDA device: nothing measured (--toy checks the script itself)")
        return
    if options.child:
        print(json.dumps(run_part(options.parts[0], options.steps, options.toy)))
        return
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    found = "toy size: no figure means anything" if options.toy else "measured on this card"
    result = {"device": name, "torch": torch.__version__, "found": found, "parts": {}}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        print(f"{part} ...", file=sys.stderr)
        result["parts"][part] = in_own_process(part, options.steps, options.toy)
        Path(options.out).write_text(json.dumps(result, indent=2))
    print(markdown(result))


if __name__ == "__main__":
    main()

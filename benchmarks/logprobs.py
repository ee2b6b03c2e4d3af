"""logprobs.py - how much does it save to share the prompt when training on a group's log-probs?

    python -m benchmarks.logprobs --part layers          the language model's layers
    python -m benchmarks.logprobs --part checkpointed    recomputed in the backward pass
    python -m benchmarks.logprobs --part head            final norm and lm_head, 151,936 tokens

Runs forward and backward of the log-probs of G = 8 completions (200 tokens each) of one prompt
(1,050 tokens, 900 of which are an image of 840 x 840 pixels), in three ways:

    packed      grpo.group_logprobs: one row [prompt | o_1 | ... | o_G]
    padded      one batch of G rows [prompt | o_g] through the plain model, with logits at the
                completions' positions only
    row by row  the same, one row at a time, each with its own backward pass

The model is one layer of the size of Qwen2.5-VL-3B's, in float32, with random weights and LoRA of
rank 16 on every linear. A toy vision tower computes the image features once for all three ways, so
only the language model is compared. The head is measured without layers, and the layers have a
vocabulary of 154 only: beside a single layer, the head would hide what the layers save. The head
sees the same 1,600 positions in all three ways. Packed recomputes its logits in the backward pass
in chunks, and also returns entropies; the others keep all logits. All completions have the same
length, so the padded batch needs no padding and no mask.

Time and memory are measured in different processes. For the time, malloc keeps freed memory, else
page faults take much of the time. For the memory, malloc returns freed memory to the system, so
that the resident size is that of the existing tensors. The script saves each part to
runs/logprobs.json. From `checkpointed` and `head` it computes the 3B model (36 layers and head).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from grpo import Completions, group_logprobs
from plumbing.memory import published_config
from plumbing.vlm import Prompts, base, encode_prompts
from samr1_mini import LORA_TARGETS

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("packed", "padded", "row by row")
G, SIDE, TEXT, R = 8, 840, 148, 200  # completions, pixels, text tokens, tokens of a completion
P = (SIDE // 28) ** 2 + 2 + TEXT  # tokens of the prompt
HIDDEN, INNER, VOCABULARY = 2048, 11008, 151936  # of Qwen2.5-VL-3B
IMAGE, START, STOP, VIDEO = range(4)  # token ids
# On Linux, writing 5 to this file resets the peak memory of the process. On other systems, a pass
# that needs less memory than building the model shows the latter.
RESET_PEAK = Path("/proc/self/clear_refs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MALLOC_FOR_TIME = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
MALLOC_FOR_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}


# --------------------------------------------------------------------------------------------------
# The three ways
# --------------------------------------------------------------------------------------------------


def build(part: str):
    """One layer of the 3B model or its head, and a toy vision tower, ready to train."""
    config = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.vocab_size = (0, VOCABULARY) if part == "head" else (1, 154)
    vision.depth, vision.hidden_size, vision.intermediate_size = 1, 32, 32
    vision.num_heads, vision.fullatt_block_indexes = 1, [0]
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    config.vision_start_token_id, config.vision_end_token_id = START, STOP
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(DEVICE)
    if part == "head":
        model.requires_grad_(False)
        # The norm's gradient passes through the head, so it is compared between the ways.
        model.model.language_model.norm.requires_grad_(True)
        return model
    # LoRA starts with B = 0, where A has no gradient. Random weights are as after some training.
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, init_lora_weights=False)
    model = get_peft_model(model, lora)
    # The gradient passes through the whole layer, as in all but the first of 36 layers.
    model.enable_input_require_grads()
    if part == "checkpointed":
        layers = base(model).model.language_model
        layers.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()  # checkpointing needs train mode; there is no dropout


def make_case(
    model, G: int, side: int, text: int, R: int
) -> tuple[Prompts, Completions, torch.Tensor]:
    """A prompt with an image between random tokens, G random completions of R tokens, and the
    weights (1, G, R) of their log-probs in the loss."""
    torch.manual_seed(1)
    V, patches = base(model).lm_head.out_features, side // 14
    words = torch.randint(4, V, (text,)).split(text // 2)
    image = torch.tensor([START, *[IMAGE] * (side // 28) ** 2, STOP])
    ids = torch.cat([words[0], image, words[1]])[None]
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.randn(patches**2, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, patches, patches]]),
    )
    tokens, weights = torch.randint(4, V, (1, G, R)), torch.randn(1, G, R).to(DEVICE)
    completions = Completions(tokens, torch.ones_like(tokens).bool())
    return encode_prompts(model, inputs), completions, weights


def plain_logprobs(model, prompts: Prompts, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs (N, R) of N completions, each in its own row behind the prompt."""
    N, R = ids.shape
    P = prompts.ids.shape[1]
    text_positions = prompts.positions.max() + 1 + torch.arange(R)
    positions = [prompts.positions.expand(-1, N, -1), text_positions.expand(3, N, -1)]
    features = list(prompts.vision.pooler_output) * N
    logits = base(model)(
        input_ids=torch.cat([prompts.ids.expand(N, -1), ids], 1).to(DEVICE),
        position_ids=torch.cat(positions, 2).to(DEVICE),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
        use_cache=False,
        logits_to_keep=torch.arange(P - 1, P + R - 1, device=DEVICE),
    ).logits
    return logits.log_softmax(-1).gather(-1, ids.to(DEVICE)[..., None])[..., 0]


def forward_backward(
    way: str, model, prompts: Prompts, completions: Completions, weights: torch.Tensor
) -> torch.Tensor:
    """Compute the log-probs (G, R), and add the gradients of their weighted sum to the model."""
    if way == "packed":
        banned = torch.empty(0, dtype=torch.long, device=DEVICE)
        logprobs, _ = group_logprobs(model, prompts, completions, banned)
        (logprobs * weights).sum().backward()
        return logprobs[0].detach()
    N = weights.shape[1] if way == "padded" else 1
    result = []
    for ids, weight in zip(completions.ids[0].split(N), weights[0].split(N), strict=True):
        logprobs = plain_logprobs(model, prompts, ids)
        (logprobs * weight).sum().backward()
        result.append(logprobs.detach())
    return torch.cat(result)


# --------------------------------------------------------------------------------------------------
# Measuring in processes
# --------------------------------------------------------------------------------------------------


def run_worker(part: str, way: str, completions: int, file: str) -> None:
    """Run one way in this process: one pass for every line of stdin.

    Prints seconds and peak MiB of each pass as a line. Saves log-probs and gradients to `file`.
    """
    model = build(part)
    forward_backward(way, model, *make_case(model, 2, 56, 8, 4))  # loads kernels, starts threads
    case = make_case(model, completions, SIDE, TEXT, R)
    cuda = DEVICE == "cuda"
    for _ in sys.stdin:
        model.zero_grad()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        elif RESET_PEAK.exists():
            RESET_PEAK.write_text("5")  # building the model needs twice its weights
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        started = time.perf_counter()
        logprobs = forward_backward(way, model, *case)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peak = (torch.cuda.max_memory_allocated() if cuda else rss) - before
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save((logprobs, gradients), file)
        print(json.dumps([seconds, peak / 2**20]), flush=True)


def measure(part: str, threads: int, repetitions: int, folder: str) -> dict:
    """Seconds of the interleaved repetitions, peak MiB above the weights, and the largest
    differences between the three ways."""

    def start(way: str, malloc: dict[str, str], completions: int = G) -> subprocess.Popen:
        arguments = {"part": part, "way": way, "completions": completions}
        work = json.dumps(arguments | {"file": f"{folder}/{way}"})
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.logprobs"]
        return subprocess.Popen(
            [*command, "--part", part, "--worker", work],
            cwd=ROOT,
            env=os.environ | malloc | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_pass(worker: subprocess.Popen) -> list[float]:
        print(file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    mib, seconds = {}, {way: [] for way in WAYS}
    for way in WAYS:
        # For row by row, two rows suffice: the second one already finds the gradients of the first.
        with start(way, MALLOC_FOR_MEMORY, 2 if way == "row by row" else G) as worker:
            mib[way] = run_pass(worker)[1]
    workers = {way: start(way, MALLOC_FOR_TIME) for way in WAYS}
    for _ in range(repetitions):
        for way in WAYS:
            seconds[way].append(run_pass(workers[way])[0])
    for worker in workers.values():
        worker.communicate()
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    result = {"seconds": medians, "mib": mib, "repetitions": seconds}
    return result | compare([torch.load(f"{folder}/{way}") for way in WAYS])


def compare(results: list[tuple]) -> dict[str, float]:
    """Largest difference of a log-prob, and largest relative difference of a gradient, between
    packed and the others. results: (log-probs, gradients) of each way."""
    (logprobs, gradients), *others = results
    differences = [
        (gradients[name] - gradient).norm() / gradient.norm()
        for _, expected in others
        for name, gradient in expected.items()
    ]
    return {
        "logprobs": max((logprobs - expected).abs().max().item() for expected, _ in others),
        "gradients": max(difference.item() for difference in differences),
    }


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def print_work(part: str) -> None:
    """Print how many floating point operations the shapes imply."""
    print(f"P = {P}, R = {R}, G = {G}; from the shapes:")
    if part == "head":
        gflop = 2 * G * R * HIDDEN * VOCABULARY / 1e9
        print(f"  {gflop:.0f} GFLOP for the logits, and again for their gradient")
        print("  packed computes both in the forward pass, in chunks")
        return
    linears = 2 * HIDDEN * (2 * HIDDEN + 2 * 256 + 3 * INNER)  # FLOP per token
    for way, tokens, prompts in (("packed", P + G * R, 1), ("the others", G * (P + R), G)):
        pairs = prompts * P * (P + 1) // 2 + G * R * P + G * R * (R + 1) // 2  # of query and key
        gflop = f"{linears * tokens / 1e9:5.0f} GFLOP in the linears"
        gflop += f", {4 * HIDDEN * pairs / 1e9:3.0f} in attention"
        print(f"  {way:12}{tokens:6} positions; forward: {gflop}")


def print_result(result: dict) -> None:
    """Print the table of seconds and memory, and the differences."""
    print(f"  {'':12}{'seconds':>10}{'/ packed':>10}{'peak MiB':>10}{'/ packed':>10}")
    for way in WAYS:
        seconds, mib = result["seconds"][way], result["mib"][way]
        ratio, memory = seconds / result["seconds"]["packed"], mib / result["mib"]["packed"]
        print(f"  {way:12}{seconds:10.2f}{ratio:10.2f}{mib:10.0f}{memory:10.2f}")
    print(f"largest difference of a log-prob: {result['logprobs']:.0e}")
    print(f"largest relative difference of a gradient: {result['gradients']:.0e}")


def print_whole_model(layer: dict, head: dict) -> None:
    """Print the 3B model, computed from the measured parts."""
    print("\nthe 3B model, computed from the measured parts: 36 checkpointed layers and the head;")
    print("memory above 11.5 GiB of weights:")
    for way, tokens in zip(WAYS, (P + G * R, G * (P + R), P + R), strict=True):
        one, last = layer["seconds"][way], head["seconds"][way]
        inputs = 35 * tokens * HIDDEN * 4 / 2**20  # of the other layers
        most = max(layer["mib"][way], head["mib"][way])
        seconds = f"36 x {one:.2f} + {last:.2f} = {36 * one + last:5.0f} s"
        print(f"  {way:12}{seconds}   {inputs:.0f} + {most:.0f} = {inputs + most:5.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.logprobs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--part", choices=("layers", "checkpointed", "head"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # see `measure`
    s = parser.parse_args()
    if s.worker:
        return run_worker(**s.worker)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(s.part, s.threads, s.repetitions, folder)
    print_work(s.part)
    print(f"\n{s.part} on {DEVICE}, {s.threads} threads, memory above the weights,")
    print(f"median of {s.repetitions} interleaved repetitions:")
    print_result(result)
    file = ROOT / "runs" / "logprobs.json"
    known = (json.loads(file.read_text()) if file.exists() else {}) | {s.part: result}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(known, indent=1))
    if {"checkpointed", "head"} <= known.keys():
        print_whole_model(known["checkpointed"], known["head"])
    settings = {"part": s.part, "device": DEVICE, "threads": s.threads}
    print(json.dumps(settings | {"torch": torch.__version__} | result))


if __name__ == "__main__":
    main()

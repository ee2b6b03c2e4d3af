"""logprobs.py - what does sharing the prompt save where the log-probs of a group are trained on?

    python benchmarks/logprobs.py --part layers                          the language model's layers
    python benchmarks/logprobs.py --part checkpointed --repetitions 2    the same, recomputed in the backward pass
    python benchmarks/logprobs.py --part head                            the final norm and the lm_head over 151,936 tokens

Log-probs of the G = 8 completions (200 tokens each) of one prompt (1,050 tokens, 900 of them an image of 840 x 840 pixels), forward
and backward, three ways:

    packed      grpo.group_logprobs: one row [prompt | o_1 | ... | o_G]
    padded      one batch of G rows [prompt | o_g] through the plain model, logits at the completions' positions only
    row by row  the same, a row at a time, each with its own backward pass

One layer of the size of Qwen2.5-VL-3B's, in float32, with random weights and LoRA of rank 16 on every linear. The image's features
are computed beforehand, by a toy vision tower, and handed to all three: only the language model is compared. The head is a part of
its own, without layers (and they have a vocabulary of 154): it sees the same 1,600 positions in all three, and beside a single
layer it would hide what the layers save. Packed recomputes the head's logits in the backward pass, chunk by chunk, and also returns
entropies; the others keep all logits. All completions have the same length, so the padded batch needs no padding and no mask.

Seconds and memory come from different processes: for the clock malloc keeps what was freed, or page faults take much of the time;
for the memory it gives back what was freed, so that the resident size is that of the living tensors. Each part is kept in
runs/logprobs.json; from `checkpointed` and `head` the 3B model (36 layers and the head) is then printed as arithmetic.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory import published_config  # noqa: E402
from grpo import Completions, Prompts, base, encode_prompts, group_logprobs  # noqa: E402
from samr1_mini import LORA_TARGETS  # noqa: E402

WAYS = ("packed", "padded", "row by row")
G, SIDE, TEXT, R = 8, 840, 148, 200  # completions, pixels, text tokens of the prompt, tokens of a completion
P = (SIDE // 28) ** 2 + 2 + TEXT
IMAGE, START, STOP, VIDEO = range(4)  # token ids
FORGET = Path("/proc/self/clear_refs")  # Linux: a 5 resets the process's peak; elsewhere a pass below the peak of building is hidden
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def build(part: str):
    """One layer of the 3B architecture, or its head alone, and a toy vision tower, ready to train."""
    config = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    config.text_config.num_hidden_layers, config.text_config.vocab_size = (0, 151936) if part == "head" else (1, 154)
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.fullatt_block_indexes = 1, 32, 32, 1, [0]
    config.image_token_id, config.vision_start_token_id, config.vision_end_token_id, config.video_token_id = IMAGE, START, STOP, VIDEO
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(DEVICE)
    if part == "head":
        model.requires_grad_(False)
        model.model.language_model.norm.requires_grad_(True)  # a gradient to compare; it passes through the head
        return model
    # The adapter starts with B = 0, where A has no gradient: random weights, as after some training.
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, init_lora_weights=False))
    model.enable_input_require_grads()  # the gradient goes through the whole layer, as in all but the first of 36
    if part == "checkpointed":
        layers = base(model).model.language_model
        enable = getattr(layers, "activation_checkpointing_enable", None) or layers.gradient_checkpointing_enable  # renamed in 5.23
        enable({"use_reentrant": False})
    return model.train()  # checkpointing asks for it; there is no dropout


def problem(model, G: int, side: int, text: int, R: int) -> tuple[Prompts, Completions, torch.Tensor]:
    """A prompt of an image amid random words, its completions, and the weights (1, G, R) of their log-probs in the loss."""
    torch.manual_seed(1)
    V, patches = base(model).lm_head.out_features, side // 14
    words = torch.randint(4, V, (text,)).split(text // 2)
    ids = torch.cat([words[0], torch.tensor([START, *[IMAGE] * (side // 28) ** 2, STOP]), words[1]])[None]
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.randn(patches**2, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, patches, patches]]),
    )
    tokens, weights = torch.randint(4, V, (1, G, R)), torch.randn(1, G, R).to(DEVICE)
    return encode_prompts(model, inputs), Completions(tokens, torch.ones_like(tokens).bool()), weights


def plain_logprobs(model, prompts: Prompts, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs (N, R) of N completions with the prompt in front of each, as an un-shared forward computes them."""
    N, R = ids.shape
    P = prompts.ids.shape[1]
    following = prompts.positions.max() + 1 + torch.arange(R)
    logits = base(model)(
        input_ids=torch.cat([prompts.ids.expand(N, -1), ids], 1).to(DEVICE),
        position_ids=torch.cat([prompts.positions.expand(-1, N, -1), following.expand(3, N, -1)], 2).to(DEVICE),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(prompts.vision.pooler_output) * N)},
        use_cache=False,
        logits_to_keep=torch.arange(P - 1, P + R - 1, device=DEVICE),
    ).logits
    return logits.log_softmax(-1).gather(-1, ids.to(DEVICE)[..., None])[..., 0]


def train_on(way: str, model, prompts: Prompts, completions: Completions, weights: torch.Tensor) -> torch.Tensor:
    """Forward and backward; gradients add up in the model. Returns the log-probs (G, R)."""
    if way == "packed":
        logprobs, _ = group_logprobs(model, prompts, completions, banned=torch.empty(0, dtype=torch.long, device=DEVICE))
        (logprobs * weights).sum().backward()
        return logprobs[0].detach()
    N, done = weights.shape[1] if way == "padded" else 1, []
    for ids, weight in zip(completions.ids[0].split(N), weights[0].split(N), strict=True):
        logprobs = plain_logprobs(model, prompts, ids)
        (logprobs * weight).sum().backward()
        done.append(logprobs.detach())
    return torch.cat(done)


def work(part: str, way: str, completions: int, file: str) -> None:
    """One way in a process of its own: a pass for every line of stdin, its seconds and peak memory as a line on stdout."""
    model = build(part)
    train_on(way, model, *problem(model, 2, 56, 8, 4))  # loads kernels, starts threads
    case = problem(model, completions, SIDE, TEXT, R)
    cuda = DEVICE == "cuda"
    for _ in sys.stdin:
        model.zero_grad()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        elif FORGET.exists():
            FORGET.write_text("5")  # building the model took more than its weights: the head is made twice, then tied
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        started = time.perf_counter()
        logprobs = train_on(way, model, *case)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = (torch.cuda.max_memory_allocated() if cuda else high) - before
        torch.save((logprobs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), file)
        print(json.dumps([seconds, peak / 2**20]), flush=True)


def measure(part: str, threads: int, repetitions: int, folder: str) -> dict:
    """Seconds of interleaved repetitions, peak MiB above the weights, and how far the numbers of the three ways are apart."""

    def start(way: str, malloc: dict[str, str], completions: int = G) -> subprocess.Popen:
        arguments = json.dumps({"part": part, "way": way, "completions": completions, "file": f"{folder}/{way}"})
        env = os.environ | malloc | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", __file__, "--part", part, "--work", arguments]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(worker: subprocess.Popen) -> list[float]:
        print(file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    mib, seconds = {}, {way: [] for way in WAYS}
    for way in WAYS:  # two rows show what row by row takes: the second finds the gradients of the first
        with start(way, MEMORY, 2 if way == "row by row" else G) as worker:
            mib[way] = ask(worker)[1]
    workers = {way: start(way, CLOCK) for way in WAYS}
    for _ in range(repetitions):
        for way in WAYS:
            seconds[way].append(ask(workers[way])[0])
    for worker in workers.values():
        worker.communicate()
    (logprobs, gradients), *others = (torch.load(f"{folder}/{way}") for way in WAYS)
    return {
        "seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "mib": mib,
        "repetitions": seconds,
        "logprobs": max((logprobs - wanted).abs().max().item() for wanted, _ in others),
        "gradients": max(((gradients[name] - g).norm() / g.norm()).item() for _, wanted in others for name, g in wanted.items()),
    }


def print_whole(layer: dict, head: dict) -> None:
    print("\nthe 3B model by arithmetic from the measured parts, 36 checkpointed layers and the head; memory above 11.5 GiB of weights:")
    for way, tokens in zip(WAYS, (P + G * R, G * (P + R), P + R), strict=True):
        one, last = layer["seconds"][way], head["seconds"][way]
        inputs, most = 35 * tokens * 2048 * 4 / 2**20, max(layer["mib"][way], head["mib"][way])  # inputs: of the other layers
        print(f"  {way:12}36 x {one:.2f} + {last:.2f} = {36 * one + last:5.0f} s   {inputs:.0f} + {most:.0f} = {inputs + most:5.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("layers", "checkpointed", "head"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)  # of the processes that this one starts
    s = parser.parse_args()
    if s.work:
        return work(**s.work)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(s.part, s.threads, s.repetitions, folder)
    print(f"P = {P}, R = {R}, G = {G}; by the shapes alone:")
    if s.part == "head":
        print(f"  GFLOP to make the logits {2 * G * R * 2048 * 151936 / 1e9:.0f}; packed does so twice, and all once more for the gradient")
    else:
        linears = 2 * 2048 * (2 * 2048 + 2 * 256 + 3 * 11008)  # FLOP a token
        for way, tokens, prompts in (("packed", P + G * R, 1), ("the others", G * (P + R), G)):
            pairs = prompts * P * (P + 1) // 2 + G * R * P + G * R * (R + 1) // 2  # of query and key
            floor = f"{linears * tokens / 1e9:5.0f}, in attention {4 * 2048 * pairs / 1e9:3.0f}"
            print(f"  {way:12}{tokens:6} positions; forward GFLOP in the linears {floor}")
    print(f"\n{s.part} on {DEVICE}, {s.threads} threads, median of {s.repetitions} interleaved repetitions; memory above the weights:")
    print(f"  {'':12}{'seconds':>10}{'of packed':>10}{'peak MiB':>10}{'of packed':>10}")
    for way in WAYS:
        (t, t0), (m, m0) = ((result[kind][way], result[kind]["packed"]) for kind in ("seconds", "mib"))
        print(f"  {way:12}{t:10.2f}{t / t0:10.2f}{m:10.0f}{m / m0:10.2f}")
    print(f"largest difference of a log-prob {result['logprobs']:.0e}, of a gradient (relative) {result['gradients']:.0e}")
    kept = ROOT / "runs" / "logprobs.json"
    known = (json.loads(kept.read_text()) if kept.exists() else {}) | {s.part: result}
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(known, indent=1))
    if {"checkpointed", "head"} <= known.keys():
        print_whole(known["checkpointed"], known["head"])
    print(json.dumps({"part": s.part, "device": DEVICE, "threads": s.threads, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()

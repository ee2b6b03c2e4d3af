"""vs_trl.py - one whole GRPO step, ours compared with TRL's GRPOTrainer.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl small                    the embedded default: 8 prompts x 8
                                                         completions of at most 48 tokens
    python -m benchmarks.vs_trl middle                   8 layers of width 512, 840 x 840 pixels,
                                                         1 prompt x 8 completions of 64 tokens
    python -m benchmarks.vs_trl learn [--seeds 0 1 2]    training on the embedded default: do both
                                                         learn the same?

Both sides have the same weights, the same initial adapter, the same prompts in the same order, the
same objective, one AdamW update per step, and the same number of threads. Ours is samr1_mini.train
without the evaluation before and after. The time of a step is measured from one optimizer step to
the next, so it contains all work of the step. Every other step has format rewards only, which take
no time. The others use the tiny SAM: both sides call this repository's SamScorer. Each side is a
process, and the two take turns step by step. Memory is the peak of a process minus its memory
before the first step. At the end, the script compares TRL's log-probs and gradients with ours, on
the completions of TRL's last step.

Remaining differences: TRL gets drawn and resized scenes, ours are drawn during the step. TRL's
loss_type "dapo" gives all tokens of a step equal weight; ours gives the tokens of a group equal
weight, and then the groups. Ours excludes the vision tokens from the distribution; TRL does not
sample them, but includes them in the log-probs. By default TRL recomputes the layers in the
backward pass; here neither side does.

The middle model has random weights. It is forced to generate 64 tokens, and the rewards read fixed
answers instead of its text.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl import __version__ as trl_version
except ImportError as error:
    hint = "pip install -r benchmarks/requirements.txt"
    print(f"vs_trl.py: {error}: {hint}", file=sys.stderr)
    raise SystemExit(2) from error

import samr1_mini
from data import messages
from grpo import Completions, group_logprobs, grpo_loss
from plumbing.photos import load_data
from plumbing.runs import indices, peak_mib
from plumbing.sam import load_sam
from plumbing.settings import Settings, parse_settings
from plumbing.vlm import Policy, load_vlm, vlm_path
from reward import SamScorer, Scores, parse_answer, score_completions

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = "--epochs 1 --minibatches 1 --lr_decay constant --save_every 1000000"
# Where time is measured, the learning rate is so small that the policy, and so the length of its
# completions, stays the same.
FLAGS = {
    "small": "--lr 1e-6",
    "middle": "--lr 1e-6 --side 840 --prompt full --prompts_per_step 1 --max_new_tokens 64",
    "learn": "--lr 1e-3",
}
STEPS = {"small": 41, "middle": 6, "learn": 50}
THREADS = {"small": 1, "middle": 2, "learn": 1}
# The fixed answers instead of the middle model's text. Every other one has a <think> block.
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
ANSWERS = ["<think>x</think>" * (g % 2) + ANSWER.format(80 * g, 80 * g + 200) for g in range(8)]
ROWS = (
    "seconds, format reward",
    "CPU seconds, format reward",
    "seconds, with SAM",
    "CPU seconds, with SAM",
    "MiB that training adds",
    "tokens per completion",
)
CUDA = torch.cuda.is_available()

seconds = []  # of this process's steps so far: (wall clock, CPU)


def step_uses_sam(part: str) -> bool:
    return part == "learn" or len(seconds) % 2 == 0


def resident_mib() -> float:
    return (torch.cuda.memory_allocated() if CUDA else psutil.Process().memory_info().rss) / 2**20


def format_reward(text: str) -> float:
    answer = parse_answer(text)
    return float(answer.think_format) + float(answer.answer_format)


def save_middle_model(folder: str) -> None:
    """Save a Qwen2.5-VL of middle size with random weights and the tiny model's vocabulary. Its
    prompt has 1,084 tokens, 900 of which are the image."""
    tiny = vlm_path("tiny")
    config, processor = AutoConfig.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 8
    text.num_attention_heads, text.num_key_value_heads = 8, 2
    text.layer_types, text.rope_parameters["mrope_section"] = ["full_attention"] * 8, [8, 12, 12]
    text.max_position_embeddings, text.initializer_range = 4096, 0.02
    vision.hidden_size, vision.intermediate_size, vision.num_heads = 128, 256, 4
    vision.out_hidden_size, vision.patch_size, vision.window_size = 512, 14, 112
    vision.initializer_range = 0.02
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# The two sides, each in a process
# --------------------------------------------------------------------------------------------------


def train_ours(s: Settings, part: str) -> dict:
    """Run samr1_mini.train. Returns reward and length of each step, and the peak memory."""

    def score(scorer, samples, completions, frame, accuracy, keep_masks, style):
        if part == "middle":
            completions = [ANSWERS] * len(samples)
        if keep_masks or step_uses_sam(part):  # the first and the last step log masks
            options = (frame, accuracy, keep_masks, style)
            return score_completions(scorer, samples, completions, *options)
        rewards = torch.tensor([[format_reward(text) for text in group] for group in completions])
        zeros = torch.zeros_like(rewards)
        return Scores(rewards, zeros, rewards, zeros, zeros, [], [], None)

    def load(*args):
        policy = load_vlm(*args)
        if part == "middle":  # never ends a completion
            policy = replace(policy, banned=torch.cat([policy.banned, policy.end]))
        return policy

    def evaluate(*args, **options):
        before.append(resident_mib())
        return []

    before, replaced = [], {"score_completions": score, "load_vlm": load, "evaluate": evaluate}
    replaced |= {"log_samples": lambda *_: None, "WARMUP": 1}  # TRL does neither
    with mock.patch.multiple(samr1_mini, **replaced):
        samr1_mini.train(s)
    lines = (Path(s.out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    peak = max(row["peak_mib"] for row in rows) - before[0]
    return {name: [row[name] for row in rows] for name in ("reward", "length")} | {"peak": peak}


def trl_config(s: Settings, part: str, banned: list[int]) -> GRPOConfig:
    """TRL's arguments for our settings."""
    generation = {"suppress_tokens": banned}
    if part == "middle":
        generation["min_new_tokens"] = s.max_new_tokens
    return GRPOConfig(
        output_dir=s.out,
        max_steps=s.steps,
        seed=s.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=s.prompts_per_step * s.group_size,
        num_generations=s.group_size,
        max_completion_length=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        generation_kwargs=generation,
        loss_type="dapo",
        epsilon=s.eps_low,
        epsilon_high=s.eps_high,
        beta=s.beta,
        disable_dropout=True,
        learning_rate=s.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=CUDA,
        use_cpu=not CUDA,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )


class Trainer(GRPOTrainer):
    """Keeps the last batch, in the order of the prompts."""

    def _generate_and_score_completions(self, inputs):
        self.last_batch = super()._generate_and_score_completions(inputs)
        return self.last_batch


def train_trl(s: Settings, part: str) -> dict:
    """Train with GRPOTrainer. Returns the same as `train_ours`, and how much the two differ."""
    # Our policy, for its tokens and for the comparison. TRL gets a model of its own.
    policy = load_vlm(s.vlm, s.device, s.side, s.prompt)
    policy.model = samr1_mini.add_lora(policy.model, s.lora_rank, s.seed)
    samples = load_data(s.data, "train", s.data_seed)
    B, G = s.prompts_per_step, s.group_size
    order = [i for step in range(s.steps) for i in indices(step, B, len(samples), s.seed)]
    used = {index: samples[index] for index in order}
    scorer = SamScorer(load_sam(s.sam), policy.device)

    def row(index: int) -> dict:
        talk = messages(used[index].query, s.prompt, policy.coordinates, s.side)
        image = used[index].image.resize((s.side, s.side))
        return {"prompt": talk, "image": image, "index": index}

    def reward(completions, index, **_):
        texts = [completion[-1]["content"] for completion in completions]
        if part == "middle":
            texts = ANSWERS * B
        if not step_uses_sam(part):
            return [format_reward(text) for text in texts]
        batch = [used[i] for i in index[::G]]  # TRL repeats each prompt G times
        groups = [texts[start : start + G] for start in range(0, len(texts), G)]
        scores = score_completions(scorer, batch, groups, policy.frame)
        return scores.reward.flatten().tolist()

    folder, dtype = vlm_path(s.vlm), policy.model.dtype
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    vlm = AutoModelForImageTextToText.from_pretrained(folder, **options)
    torch.manual_seed(s.seed)  # for the adapter's weights, as in add_lora
    trainer = Trainer(
        model=vlm,
        processing_class=policy.processor,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([row(index) for index in order]),
        peft_config=LoraConfig(
            r=s.lora_rank,
            lora_alpha=2 * s.lora_rank,
            target_modules=samr1_mini.LORA_TARGETS,
            task_type="CAUSAL_LM",
        ),
        args=trl_config(s, part, policy.banned.tolist()),
    )
    ours, theirs = (get_peft_model_state_dict(model) for model in (policy.model, trainer.model))
    adapter = max((theirs[name] - weight).abs().max().item() for name, weight in ours.items())
    before, peaks = resident_mib(), []
    register_optimizer_step_post_hook(lambda *_: peaks.append(peak_mib(policy.device)))
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    result = {"reward": [row["reward"] for row in log], "peak": max(peaks) - before}
    result["length"] = [row["completions/mean_length"] for row in log]
    result["adapter_difference"] = adapter
    policy = replace(policy, model=trainer.model)
    return result | compare(trainer, policy, [used[index] for index in order[-B:]], s)


def compare(trainer: Trainer, policy: Policy, samples: list, s: Settings) -> dict[str, float]:
    """Compare both sides on TRL's last completions.

    Returns the largest difference of the reference's log-probs, and the difference of the loss's
    gradients relative to TRL's.
    """
    model, batch = trainer.model, trainer.last_batch
    shape = (s.prompts_per_step, s.group_size, -1)
    weights = [p for p in model.parameters() if p.requires_grad]
    ids, mask = (batch[name].view(shape).cpu() for name in ("completion_ids", "completion_mask"))
    completions, prompts = Completions(ids, mask.bool()), policy.read(samples)
    mask = batch["completion_mask"][None].bool()  # (1, B * G, T)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(loss, weights)
        return torch.cat([part.flatten().float() for part in parts])

    def logprobs() -> torch.Tensor:
        # As in TRL, no token is banned, and all completions form one group with equal weights of
        # all tokens: (1, B * G, T).
        banned = torch.tensor([], dtype=torch.long, device=policy.device)
        result = group_logprobs(model, prompts, completions, banned, s.temperature)[0]
        return result.flatten(0, 1)[None]

    theirs = gradient(trainer._compute_loss(model, batch))
    with torch.no_grad(), model.disable_adapter():
        reference = logprobs()
    new = logprobs()
    clip = (s.eps_low, s.eps_high, s.beta)
    loss, _ = grpo_loss(new, new.detach(), reference, batch["advantages"][None], mask, *clip)
    ours = gradient(loss)
    difference = reference[0] - batch["ref_per_token_logps"]
    return {
        "logprob_difference": difference[mask[0]].abs().max().item(),
        "gradient_difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def work(pipe, part: str, side: str, s: Settings) -> None:
    """Run one side in this process.

    Sends the seconds of each step and waits for a reply before the next one. Sends the result of
    `train_ours` or `train_trl` at the end.
    """
    started = time.perf_counter(), time.process_time()

    def end_step(*_):
        nonlocal started
        if CUDA:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        seconds.append((now[0] - started[0], now[1] - started[1]))
        if part != "learn":
            pipe.send(seconds[-1])
            pipe.recv()
        started = time.perf_counter(), time.process_time()

    register_optimizer_step_post_hook(end_step)
    with contextlib.redirect_stdout(io.StringIO()):
        pipe.send((train_ours if side == "ours" else train_trl)(s, part))


# --------------------------------------------------------------------------------------------------
# Measuring and output
# --------------------------------------------------------------------------------------------------


def start(part: str, s: Settings, folder: str) -> dict:
    """Start both sides. Returns a pipe to each."""
    os.environ |= {"OMP_NUM_THREADS": str(THREADS[part]), "TQDM_DISABLE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    pipes, spawn = {}, multiprocessing.get_context("spawn")
    for side in ("ours", "trl"):
        pipes[side], far = spawn.Pipe()
        arguments = (far, part, side, replace(s, out=f"{folder}/{side}{s.seed}"))
        spawn.Process(target=work, args=arguments, daemon=True).start()
        far.close()  # so that `recv` raises EOFError when the process ends
    return pipes


def run_in_turns(pipes: dict, steps: int) -> tuple[dict, dict]:
    """Let both sides take turns. Returns the seconds of their steps, and their results."""
    times = {side: [pipe.recv()] for side, pipe in pipes.items()}
    for _ in range(steps - 1):
        for side, pipe in pipes.items():
            pipe.send("continue")
            times[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("continue")
    return times, {side: pipe.recv() for side, pipe in pipes.items()}


def measure_steps(part: str, s: Settings, folder: str) -> dict:
    """Measure `small` or `middle`, and print the table.

    Leaves out the first two steps of each side: they warm up, and ours draws figures after the
    first.
    """
    if part == "middle":
        s.vlm = f"{folder}/middle"
        save_middle_model(s.vlm)
    times, results = run_in_turns(start(part, s, folder), s.steps)
    columns = {}
    for side, result in results.items():
        # Steps with an odd index have format rewards only. Kind 0 is wall clock, kind 1 is CPU.
        kinds = [(first, kind) for first in (3, 2) for kind in (0, 1)]
        values = [statistics.median(t[kind] for t in times[side][i::2]) for i, kind in kinds]
        columns[side] = [*values, result["peak"], statistics.mean(result["length"])]
    table = dict(zip(ROWS, zip(columns["ours"], columns["trl"], strict=True), strict=True))
    device = "CUDA" if CUDA else f"{THREADS[part]} CPU thread(s)"
    print(f"{part}: one whole step, {device}, TRL {trl_version}, median of {s.steps - 2} steps")
    print(f"{'':30}{'ours':>10}{'TRL':>10}{'TRL / ours':>12}")
    for label, (ours, trl) in table.items():
        print(f"{label:30}{ours:10.2f}{trl:10.2f}{trl / ours:12.2f}")
    print(f"TRL without SAM / ours with SAM: {table[ROWS[0]][1] / table[ROWS[2]][0]:.2f}")
    differences = {k: v for k, v in results["trl"].items() if k.endswith("difference")}
    print(", ".join(f"{name.replace('_', ' ')} {v:.1e}" for name, v in differences.items()))
    return table | differences


def measure_learning(seeds: list[int], s: Settings, folder: str) -> dict:
    """Print the mean rewards of the first and the last steps.

    Both sides run at the same time, since time is not measured.
    """
    result, last = {}, min(20, s.steps)
    print(f"learn: mean reward (of 6) of the first 5 and the last {last} of {s.steps} steps")
    print(f"{'seed':8}{'ours':>16}{'TRL':>16}")
    for seed in seeds:
        pipes = start("learn", replace(s, seed=seed), folder)
        rewards = {side: pipe.recv()["reward"] for side, pipe in pipes.items()}
        ends = {side: (values[:5], values[-last:]) for side, values in rewards.items()}
        means = {side: tuple(map(statistics.mean, parts)) for side, parts in ends.items()}
        cells = [f"{first:.2f} -> {final:.2f}" for first, final in means.values()]
        print(f"{seed:<8}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
        result[seed] = means
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_trl", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int, help=f"steps of each side, default {STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of `learn`")
    options = parser.parse_args()
    part, steps = options.part, options.steps or STEPS[options.part]
    if part != "learn" and steps < 4:
        parser.error("--steps must be at least 4: the first two are left out")
    s = parse_settings("train", f"{ALWAYS} {FLAGS[part]} --steps {steps}".split())
    with tempfile.TemporaryDirectory() as folder:
        if part == "learn":
            result = measure_learning(options.seeds, s, folder)
        else:
            result = measure_steps(part, s, folder)
    versions = {"trl_version": trl_version, "torch": torch.__version__}
    print(json.dumps({"part": part, "steps": steps} | versions | result))


if __name__ == "__main__":
    main()

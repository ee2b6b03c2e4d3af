"""vs_trl.py - one whole GRPO step, ours compared with the GRPOTrainer of TRL 1.16.0.

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
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForImageTextToText

import samr1_mini
from benchmarks.meter import DEVICE, now, print_table, resident_mib
from benchmarks.random_models import medium_vlm
from data import Shapes, messages
from grpo import Completions, group_logprobs, grpo_loss
from plumbing.errors import UserError, exit_with_one_line
from plumbing.runs import indices, peak_mib
from plumbing.sam import load_sam
from plumbing.settings import Settings, parse_settings
from plumbing.vlm import Policy, load_vlm, vlm_path
from reward import SamScorer, Scores, parse_answer, score_completions

ALWAYS = "--epochs 1 --minibatches 1 --save_every 1000000"
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

seconds = []  # of this process's steps so far


def step_uses_sam(part: str) -> bool:
    return part == "learn" or len(seconds) % 2 == 0


def format_reward(text: str) -> float:
    answer = parse_answer(text)
    return float(answer.think_format) + float(answer.answer_format)


# --------------------------------------------------------------------------------------------------
# The two sides, each in a process
# --------------------------------------------------------------------------------------------------


def train_ours(s: Settings, part: str) -> dict:
    """Run samr1_mini.train. Returns reward and length of each step, and the peak memory."""

    def score(scorer, samples, completions, *args, **options):
        if part == "middle":
            completions = [ANSWERS] * len(samples)
        if step_uses_sam(part):
            return score_completions(scorer, samples, completions, *args, **options)
        rewards = torch.tensor([[format_reward(text) for text in group] for group in completions])
        zeros = torch.zeros_like(rewards)
        return Scores(rewards, zeros, rewards, zeros, zeros, [], [], None)

    def load(*args, **options):
        policy = load_vlm(*args, **options)
        if part == "middle":  # never ends a completion
            policy = replace(policy, banned=torch.cat([policy.banned, policy.end]))
        return policy

    def evaluate(*args, **options):
        before.append(resident_mib())
        return []

    before = []
    replaced = {"score_completions": score, "load_vlm": load, "evaluate": evaluate}
    replaced |= {"log_samples": lambda *_, **__: None, "WARMUP": 1}  # TRL does neither
    with (
        mock.patch.multiple(samr1_mini, **replaced),
        mock.patch.object(samr1_mini.pictures, "record_rollouts", lambda *_, **__: []),
    ):
        samr1_mini.train(s)
    lines = (Path(s.out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    result = {name: [row[name] for row in rows] for name in ("reward", "length")}
    return result | {"peak": max(row["peak_mib"] for row in rows) - before[0]}


def make_trainer(s: Settings, part: str, policy: Policy, rows: list[dict], reward):
    """TRL's trainer with our settings. rows: prompts, images and indices of the samples.

    It keeps its last batch, in the order of the prompts, as `last_batch`.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.last_batch = super()._generate_and_score_completions(inputs)
            return self.last_batch

    generation = {"suppress_tokens": policy.banned.tolist()}
    if part == "middle":
        generation["min_new_tokens"] = s.max_new_tokens
    config = GRPOConfig(
        output_dir=s.out,
        max_steps=s.steps,
        seed=s.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=s.prompts_per_step * s.group_size,
        num_generations=s.group_size,
        max_completion_length=s.max_new_tokens,
        temperature=s.temperature,
        generation_kwargs=generation,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=s.eps_high,
        beta=s.beta,
        disable_dropout=True,
        learning_rate=s.lr,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type == "cpu",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    options = {"dtype": policy.model.dtype, "attn_implementation": "sdpa"}
    vlm = AutoModelForImageTextToText.from_pretrained(vlm_path(s.vlm), **options)
    torch.manual_seed(s.seed)  # for the adapter's weights, as in add_lora
    lora = LoraConfig(
        r=s.lora_rank,
        lora_alpha=2 * s.lora_rank,
        target_modules=samr1_mini.LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    return Trainer(
        model=vlm,
        processing_class=policy.processor,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        args=config,
    )


def train_trl(s: Settings, part: str) -> dict:
    """Train with GRPOTrainer. Returns the same as `train_ours`, and how much the two differ."""
    # Our policy, for its tokens and for the comparison. TRL gets a model of its own.
    policy = load_vlm(s.vlm, s.device, s.side, s.prompt)
    policy.model = samr1_mini.add_lora(policy.model, s.lora_rank, s.seed)
    samples = Shapes("train")
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
        return score_completions(scorer, batch, groups, policy.extent).reward.flatten().tolist()

    trainer = make_trainer(s, part, policy, [row(index) for index in order], reward)
    ours, theirs = (get_peft_model_state_dict(model) for model in (policy.model, trainer.model))
    adapter = max((theirs[name] - weight).abs().max().item() for name, weight in ours.items())
    before = resident_mib()
    peaks = []
    register_optimizer_step_post_hook(lambda *_: peaks.append(peak_mib(policy.device)))
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    result = {"reward": [row["reward"] for row in log], "peak": max(peaks) - before}
    result["length"] = [row["completions/mean_length"] for row in log]
    result["adapter difference"] = adapter
    policy.model = trainer.model
    return result | compare(trainer, policy, [used[index] for index in order[-B:]], s)


def compare(trainer, policy: Policy, samples: list, s: Settings) -> dict[str, float]:
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
        none = policy.banned[:0]
        result = group_logprobs(model, prompts, completions, none, s.temperature)[0]
        return result.flatten(0, 1)[None]

    theirs = gradient(trainer._compute_loss(model, batch))
    with torch.no_grad(), model.disable_adapter():
        reference = logprobs()
    new = logprobs()
    advantages = batch["advantages"][None]
    options = dict(eps_high=s.eps_high, beta=s.beta)
    loss, *_ = grpo_loss(new, new.detach(), reference, advantages, mask, **options)
    ours = gradient(loss)
    difference = reference[0] - batch["ref_per_token_logps"]
    return {
        "logprob difference": difference[mask[0]].abs().max().item(),
        "gradient difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def work(pipe, part: str, side: str, s: Settings) -> None:
    """Run one side in this process.

    Sends the seconds of each step and waits for a reply before the next one. Sends the result of
    `train_ours` or `train_trl` at the end.
    """
    started = now()

    def end_step(*_):
        nonlocal started
        seconds.append(now() - started)
        if part != "learn":
            pipe.send(seconds[-1])
            pipe.recv()
        started = now()

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
    for side in ("ours", "TRL"):
        pipes[side], far = spawn.Pipe()
        arguments = (far, part, side, replace(s, out=f"{folder}/{side}{s.seed}"))
        spawn.Process(target=work, args=arguments, daemon=True).start()
        far.close()  # so that `recv` raises EOFError when the process ends
    return pipes


def measure_steps(part: str, s: Settings, folder: str) -> None:
    """Measure `small` or `middle`, and print the table.

    Leaves out the first two steps of each side: they warm up.
    """
    if part == "middle":
        s.vlm = f"{folder}/middle"
        vision = dict(hidden_size=128, intermediate_size=256, num_heads=4)
        for one in medium_vlm(text=dict(intermediate_size=1408), vision=vision):
            one.save_pretrained(s.vlm)
    pipes = start(part, s, folder)
    times = {side: [] for side in pipes}
    for _ in range(s.steps):
        for side, pipe in pipes.items():
            if times[side]:
                pipe.send("continue")
            times[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("continue")
    results = {side: pipe.recv() for side, pipe in pipes.items()}
    rows = {}
    for side, result in results.items():
        row = {"s, format": statistics.median(times[side][3::2])}  # odd steps: format rewards only
        row["s, with SAM"] = statistics.median(times[side][2::2])
        rows[side] = row | {
            "MiB added": result["peak"],
            "tokens": statistics.mean(result["length"]),
        }
    print_table(f"{part}: one step, {DEVICE}, median of {s.steps - 2} steps, TRL 1.16.0", rows)
    differences = {k: v for k, v in results["TRL"].items() if k.endswith("difference")}
    print(", ".join(f"{name} {v:.1e}" for name, v in differences.items()))


def measure_learning(seeds: list[int], s: Settings, folder: str) -> None:
    """Print the mean rewards of the first and the last steps.

    Both sides run at the same time, since time is not measured.
    """
    last = min(20, s.steps)
    print(f"learn: mean reward (of 6) of the first 5 and the last {last} of {s.steps} steps")
    for seed in seeds:
        pipes = start("learn", replace(s, seed=seed), folder)
        for side, pipe in pipes.items():
            rewards = pipe.recv()["reward"]
            first, final = statistics.mean(rewards[:5]), statistics.mean(rewards[-last:])
            print(f"seed {seed}, {side}: {first:.2f} -> {final:.2f}", flush=True)


def main(argv: list[str]) -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl", description=about)
    parser.add_argument("part", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int, help=f"at least 4, default {STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of `learn`")
    options = parser.parse_args(argv)
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: pip install -r benchmarks/requirements.txt") from error
    part, steps = options.part, options.steps or STEPS[options.part]
    s = parse_settings("train", f"{ALWAYS} {FLAGS[part]} --steps {steps}".split())
    with tempfile.TemporaryDirectory() as folder:
        if part == "learn":
            measure_learning(options.seeds, s, folder)
        else:
            measure_steps(part, s, folder)


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

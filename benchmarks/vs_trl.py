"""vs_trl.py - one whole GRPO step, ours compared with the GRPOTrainer of TRL 1.16.0.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl small     the embedded default: 8 prompts x 8 completions of at most
                                          48 tokens
    python -m benchmarks.vs_trl middle    8 layers of width 512, 840 x 840 pixels, 1 prompt x 8
                                          completions of 64 tokens
    python -m benchmarks.vs_trl learn     training on the embedded default, three seeds: do both
                                          learn the same?

A flag of `samr1_mini.py train` may follow, such as --steps 4, the fewest that can be measured.

Both sides have the same weights, the same initial adapter, the same prompts in the same order, the
same objective, one AdamW update per step, and the same number of threads. Ours is samr1_mini.train
without the evaluation before and after. The time of a step is measured from one optimizer step to
the next, so it contains all work of the step. In every other step SAM is not asked, so the rewards
are those of the format, which take no time. In the others both sides call this repository's
SamScorer with the tiny SAM. Each side is a process, and the two take turns step by step. Memory is
the peak of a process minus its memory before the first step. At the end, the script compares TRL's
log-probs and gradients with ours, on the completions of TRL's last step.

Remaining differences: TRL gets drawn and resized scenes, ours are drawn during the step. TRL's
loss_type "dapo" gives all tokens of a step equal weight; ours gives the tokens of a group equal
weight, and then the groups. Ours excludes the vision tokens from the distribution; TRL does not
sample them, but includes them in the log-probs. By default TRL recomputes the layers in the
backward pass; here neither side does.

The middle model has random weights. The end token is banned, so it generates 64 tokens, and the
rewards read fixed answers instead of its text.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

import samr1_mini
from benchmarks.meter import DEVICE, THREADS, now, print_table, resident_mib
from benchmarks.random_models import medium_vlm
from data import Shapes, messages
from grpo import Completions, group_logprobs, grpo_loss
from plumbing.errors import exit_with_one_line
from plumbing.runs import indices, peak_mib
from plumbing.sam import load_sam
from plumbing.settings import Settings, parse_settings
from plumbing.vlm import Policy, load_vlm, vlm_path
from reward import Overlap, SamScorer, score_completions

ALWAYS = "--epochs 1 --minibatches 1"
# Where time is measured, the learning rate is so small that the policy, and so the length of its
# completions, stays the same.
FLAGS = {
    "small": "--lr 1e-6 --steps 41",
    "middle": """--lr 1e-6 --steps 6 --side 840 --prompt full --prompts_per_step 1
        --max_new_tokens 64""",
    "learn": "--lr 1e-3 --steps 50",
}
# The fixed answers instead of the middle model's text. Every other one has a <think> block.
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
ANSWERS = ["<think>x</think>" * (g % 2) + ANSWER.format(80 * g, 80 * g + 200) for g in range(8)]

seconds = []  # of this process's steps so far


class EveryOtherStep(SamScorer):
    """Asks SAM in every other step. In the others the IoU is 0, and only the format counts."""

    def score(self, samples: list, prompts: list[list], keep_masks=False) -> Overlap:
        if len(seconds) % 2 == 0:
            return super().score(samples, prompts)
        zeros = torch.zeros(len(samples), len(prompts[0]))
        return Overlap(intersection=zeros, union=zeros, prompted=zeros > 0, masks=None)


# --------------------------------------------------------------------------------------------------
# The two sides, each in a process
# --------------------------------------------------------------------------------------------------


def train_ours(s: Settings, part: str) -> dict:
    """Run samr1_mini.train. Returns the reward of each step, and the memory that training adds."""

    def load(*args, **options):
        policy = load_vlm(*args, **options)
        if part == "middle":
            policy.banned = torch.cat([policy.banned, policy.end])
            policy.texts = lambda completions: [ANSWERS]
        return policy

    def evaluate(*args, **options):
        before.append(resident_mib())
        return []

    before = []
    replaced = {"load_vlm": load, "evaluate": evaluate}
    replaced |= {"log_samples": mock.Mock(), "WARMUP": 1, "SAVE_EVERY": s.steps}  # TRL does neither
    if part != "learn":
        replaced["SamScorer"] = EveryOtherStep
    with (
        mock.patch.multiple(samr1_mini, **replaced),
        mock.patch.object(samr1_mini.pictures, "record_rollouts"),
    ):
        samr1_mini.train(s)
    lines = (Path(s.out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    peak = max(row["peak_mib"] for row in rows)
    return {"reward": [row["reward"] for row in rows], "MiB added": peak - before[0]}


class Trainer(GRPOTrainer):
    """Keeps its last batch, in the order of the prompts."""

    def _generate_and_score_completions(self, inputs):
        self.last_batch = super()._generate_and_score_completions(inputs)
        return self.last_batch


def make_trainer(s: Settings, part: str, policy: Policy, rows: list[dict], reward) -> Trainer:
    """TRL's trainer with our settings. rows: prompts, images and indices of the samples."""
    suppressed = policy.banned.tolist()
    if part == "middle":
        suppressed += policy.end.tolist()
    config = GRPOConfig(
        output_dir=s.out,
        max_steps=s.steps,
        seed=s.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=s.prompts_per_step * s.group_size,
        num_generations=s.group_size,
        max_completion_length=s.max_new_tokens,
        temperature=s.temperature,
        generation_kwargs={"suppress_tokens": suppressed},
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
    vlm = AutoModelForImageTextToText.from_pretrained(
        vlm_path(s.vlm), dtype=policy.model.dtype, attn_implementation="sdpa"
    )
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
    policy = load_vlm(s.vlm, s.device, s.side, s.prompt)  # for its tokens and for the comparison
    samples = Shapes("train")
    B, G = s.prompts_per_step, s.group_size
    order = [i for step in range(s.steps) for i in indices(step, B, len(samples), s.seed)]
    used = {index: samples[index] for index in order}
    scorer_class = SamScorer if part == "learn" else EveryOtherStep
    scorer = scorer_class(load_sam(s.sam), policy.device)
    peaks = []

    def row(index: int) -> dict:
        chat = messages(used[index].query, s.prompt, policy.coordinates, s.side)
        image = used[index].image.resize((s.side, s.side))
        return {"prompt": chat, "image": image, "index": index}

    def reward(completions, index, **_):
        texts = [completion[-1]["content"] for completion in completions]
        if part == "middle":
            texts = ANSWERS * B
        batch = [used[i] for i in index[::G]]  # TRL repeats each prompt G times
        groups = [texts[start : start + G] for start in range(0, len(texts), G)]
        return score_completions(scorer, batch, groups, policy.extent).reward.flatten().tolist()

    trainer = make_trainer(s, part, policy, [row(index) for index in order], reward)
    before = resident_mib()
    register_optimizer_step_post_hook(lambda *_: peaks.append(peak_mib(policy.device)))
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    result = {"reward": rewards, "MiB added": max(peaks) - before}
    policy.model = trainer.model
    return result | compare(trainer, policy, [used[index] for index in order[-B:]], s)


def compare(trainer, policy: Policy, samples: list, s: Settings) -> dict[str, float]:
    """Compare both sides on TRL's last completions.

    Returns the largest difference of the reference's log-probs, and the difference of the loss's
    gradients relative to TRL's.
    """
    model, batch = trainer.model, trainer.last_batch
    shape = (s.prompts_per_step, s.group_size, -1)
    completions = Completions(
        batch["completion_ids"].view(shape).cpu(), batch["completion_mask"].view(shape).cpu().bool()
    )
    prompts = policy.read(samples)
    # As in TRL, no token is banned, and all completions form one group with equal weights of all
    # tokens: (1, B * G, T).
    none = policy.banned[:0]
    mask = batch["completion_mask"][None].bool()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, weights)])

    def logprobs() -> torch.Tensor:
        result, _ = group_logprobs(model, prompts, completions, none, s.temperature)
        return result.flatten(0, 1)[None]

    with torch.no_grad(), model.disable_adapter():
        reference = logprobs()
    new = logprobs()
    loss, *_ = grpo_loss(
        new,
        old=new.detach(),
        reference=reference,
        advantages=batch["advantages"][None],
        mask=mask,
        eps_high=s.eps_high,
        beta=s.beta,
    )
    ours = gradient(loss)
    theirs = gradient(trainer._compute_loss(model, batch))
    difference = reference[0] - batch["ref_per_token_logps"]
    return {
        "log-probs": difference[mask[0]].abs().max().item(),
        "gradient": ((ours - theirs).norm() / theirs.norm()).item(),
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
    os.environ |= {"OMP_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1"}
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
    rows = {}
    for side, pipe in pipes.items():
        pipe.send("continue")
        result = pipe.recv()
        rows[side] = {
            "s, format": statistics.median(times[side][3::2]),  # odd steps: format rewards only
            "s, with SAM": statistics.median(times[side][2::2]),
            "MiB added": result["MiB added"],
        }
    print_table(f"{part}: one step, {DEVICE}, median of {s.steps - 2} steps, TRL 1.16.0", rows)
    for name in ("log-probs", "gradient"):  # TRL is the last side
        print(f"difference of the {name}: {result[name]:.1e}")


def measure_learning(s: Settings, folder: str) -> None:
    """Print the mean rewards of the first and the last steps.

    Both sides run at the same time, since time is not measured.
    """
    print(f"learn: mean reward (of 6) of the first 5 and the last 20 of {s.steps} steps")
    for seed in range(3):
        for side, pipe in start("learn", replace(s, seed=seed), folder).items():
            rewards = pipe.recv()["reward"]
            first, last = statistics.mean(rewards[:5]), statistics.mean(rewards[-20:])
            print(f"seed {seed}, {side}: {first:.2f} -> {last:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl")
    parser.add_argument("part", choices=tuple(FLAGS))
    options, flags = parser.parse_known_args()
    part = options.part
    s = parse_settings("train", [*ALWAYS.split(), *FLAGS[part].split(), *flags])
    with tempfile.TemporaryDirectory() as folder:
        if part == "learn":
            measure_learning(s, folder)
        else:
            measure_steps(part, s, folder)


if __name__ == "__main__":
    with exit_with_one_line():
        main()

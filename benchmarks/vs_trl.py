"""vs_trl.py - one whole GRPO step, ours compared with the GRPOTrainer of TRL 1.16.0.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl small     the embedded default: 8 prompts x 8 completions
    python -m benchmarks.vs_trl middle    8 layers of width 512, 840 x 840 pixels, 1 prompt x 8
    python -m benchmarks.vs_trl learn     do both learn the same? The default with three seeds

A flag of `samr1_mini.py train` may follow, such as --steps 4, the fewest that can be measured.

Ours is samr1_mini.train without the evaluation before and after, TRL's is examples.trl_grpo.train.
Both have the same initial adapter and prompts in the same order. Each is a process, and the two
take turns step by step. The time of a step is measured from one optimizer step to the next. In
every other step SAM is not asked, and only the format counts. Memory is the peak of a process minus
its memory before the first step.

Remaining differences: TRL gets drawn scenes, ours are drawn during the step. TRL's loss_type "dapo"
gives all tokens of a step equal weight; ours gives the tokens of a group equal weight, and then the
groups. Ours excludes the vision tokens from the distribution; TRL does not sample them, but
includes them in the log-probs. Neither side recomputes layers in the backward pass.

The middle model has random weights. The end token is banned, so it generates 64 tokens, and the
rewards read fixed answers instead of its text.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from trl import GRPOTrainer

import samr1_mini
from benchmarks.meter import DEVICE, THREADS, now, print_table, resident_mib
from benchmarks.random_models import ANSWER, medium_vlm
from data import Shapes
from examples import trl_grpo
from grpo import Completions, grpo_loss
from plumbing.errors import exit_with_one_line
from plumbing.runs import METRICS, indices, peak_mib, read_rows
from plumbing.settings import Settings, parse_settings
from plumbing.vlm import load_vlm
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
ANSWERS = ["<think>x</think>" * (g % 2) + ANSWER.format(80 * g, 80 * g + 200) for g in range(8)]

seconds = []  # of this process's steps so far


class EveryOtherStep(SamScorer):
    """Asks SAM in every other step. In the others the IoU is 0, and only the format counts."""

    def score(self, samples: list, prompts: list[list], keep_masks=False) -> Overlap:
        if len(seconds) % 2 == 0:
            return super().score(samples, prompts)
        zeros = torch.zeros(len(samples), len(prompts[0]))
        return Overlap(intersection=zeros, union=zeros, prompted=zeros > 0, masks=None)


def replacements(part: str) -> dict:
    """What both sides use in place of functions of their modules. See the end of the docstring."""
    if part != "middle":
        return {}

    def load(*args, **options):
        policy = load_vlm(*args, **options)
        policy.banned = torch.cat([policy.banned, policy.end])
        return policy

    def score(scorer, batch, texts, **options):
        return score_completions(scorer, batch, [ANSWERS], **options)

    return {"load_vlm": load, "score_completions": score}


def train_ours(s: Settings, part: str) -> dict:
    """Run samr1_mini.train. Returns the reward of each step, and the memory that training adds."""
    before = []

    def evaluate(*args):
        before.append(resident_mib())
        return []

    replaced = replacements(part) | {"evaluate": evaluate}
    replaced |= {"log_samples": mock.Mock(), "WARMUP": 1, "SAVE_EVERY": s.steps}  # TRL does neither
    with (
        mock.patch.multiple(samr1_mini, **replaced),
        mock.patch.object(samr1_mini.pictures, "record_rollouts"),
    ):
        samr1_mini.train(s)
    rows = read_rows(Path(s.out) / "metrics.jsonl", METRICS)
    added = max(row["peak_mib"] for row in rows) - before[0]
    return {"reward": [row["reward"] for row in rows], "MiB added": added}


class Trainer(GRPOTrainer):
    """Keeps its last batch, in the order of the prompts, and the memory that training adds."""

    def train(self, **options):
        Trainer.last = self
        before = resident_mib()
        super().train(**options)
        self.added_mib = peak_mib(DEVICE) - before

    def _generate_and_score_completions(self, inputs):
        self.last_batch = super()._generate_and_score_completions(inputs)
        return self.last_batch


def train_trl(s: Settings, part: str) -> dict:
    """Run examples.trl_grpo.train. Returns what `train_ours` does, and how the two differ."""
    dataset = Shapes("train")
    B = s.prompts_per_step
    order = [i for step in range(s.steps) for i in indices(step, B, len(dataset), s.seed)]
    samples = [dataset[i] for i in order]
    trl_arguments = trl_grpo.trl_arguments

    def arguments(*args) -> dict:
        changed = {"shuffle_dataset": False, "warmup_steps": 0}  # as ours here
        changed |= {"log_completions": False, "save_strategy": "no"}
        return trl_arguments(*args) | changed

    replaced = replacements(part) | {"trl_arguments": arguments}
    with (
        mock.patch.multiple(trl_grpo, load_data=lambda *_: samples, **replaced),
        mock.patch("trl.GRPOTrainer", Trainer),
    ):
        trl_grpo.train(s)
    rows = read_rows(Path(s.out) / "metrics.jsonl", METRICS)
    result = {"reward": [row["reward"] for row in rows], "MiB added": Trainer.last.added_mib}
    return result | compare(Trainer.last, samples[-B:], s)


def compare(trainer: Trainer, samples: list, s: Settings) -> dict[str, float]:
    """Compare both sides on TRL's last completions.

    Returns the largest difference of the reference's log-probs, and the difference of the loss's
    gradients relative to TRL's.
    """
    policy = load_vlm(s.vlm, s.device, s.side, s.prompt)
    policy.model = model = trainer.model
    policy.banned = policy.banned[:0]  # as in TRL
    prompts = policy.read(samples)
    batch = trainer.last_batch
    mask = batch["completion_mask"].bool()  # (B * G, T)
    shape = (s.prompts_per_step, s.group_size, -1)
    completions = Completions(batch["completion_ids"].view(shape).cpu(), mask.view(shape).cpu())

    def logprobs() -> torch.Tensor:
        """As in TRL, all completions form one group, (1, B * G, T): all tokens weigh the same."""
        found, _ = samr1_mini.completion_logprobs(policy, prompts, completions, s)  # (B, G, T)
        return found.flatten(0, 1)[None]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, weights)])

    with torch.no_grad(), model.disable_adapter():
        reference = logprobs()
    new = logprobs()
    loss, *_ = grpo_loss(
        new,
        old=new.detach(),
        reference=reference,
        advantages=batch["advantages"][None],
        mask=mask[None],
        eps_high=s.eps_high,
        beta=s.beta,
    )
    ours = gradient(loss)
    theirs = gradient(trainer._compute_loss(model, batch))
    difference = reference[0] - batch["ref_per_token_logps"]
    return {
        "log-probs": difference[mask].abs().max().item(),
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
    train = train_ours if side == "ours" else train_trl
    scorer = SamScorer if part == "learn" else EveryOtherStep
    with (
        mock.patch.object(samr1_mini, "SamScorer", scorer),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pipe.send(train(s, part))


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
    """Print the table of `small` or `middle`, without the first two steps, which warm up."""
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
    """Print the mean rewards of the first and the last steps. Both sides run at the same time."""
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

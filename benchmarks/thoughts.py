"""thoughts.py - does the policy use its thought? Force another one and see where the answer goes.

    python -m benchmarks.thoughts RUN [--scenes 400]        about a minute on one core

RUN is the folder of a run that was trained on the embedded default. The script takes the held-out
scenes with a second object of another kind or colour. It lets the policy answer the same query

    own      after its own thought
    other    after the thought that belongs to the other object
    right    after the thought that belongs to the target
    empty    after <think></think>

The thought is appended to the prompt, and the policy continues greedily. The table shows where the
answer goes, for the base model and for the trained one: the share of boxes with an IoU above 0.5,
the share of points inside, and the share of SAM's masks with an IoU above 0.5, with the target and
with the other object. Where the two objects share a box, only points and mask tell them apart.
"""

import argparse
import random
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import samr1_mini
from data import Sample, Shapes
from plumbing import pictures
from plumbing.boxes import box_ious
from plumbing.errors import UserError, exit_with_one_line
from plumbing.runs import save_figure
from plumbing.sam import load_sam
from plumbing.scenes import Thing, points_inside, taught_thought
from plumbing.settings import parse_settings
from plumbing.vlm import Policy, load_vlm
from reward import Answer, SamPrompt, SamScorer, score_completions

THOUGHTS = ("own", "other", "right", "empty")
GROUPS = {False: "the other object is elsewhere", True: "the two objects share a box"}


class Case(NamedTuple):
    """A held-out scene with a query, the thing it refers to, and another thing."""

    sample: Sample
    target: Thing
    other: Thing

    @property
    def shared(self) -> bool:
        """Whether the boxes overlap so much that a box on one thing can be on the other too."""
        return box_ious([self.target], [[SamPrompt(self.other.box, ())]]).item() > 0.5

    def start(self, name: str) -> str:
        """What the completion is made to begin with, by the name of the thought."""
        thing = {"other": self.other, "right": self.target}.get(name)
        thought = taught_thought(thing, self.sample.image.size) if thing else ""
        return "" if name == "own" else f"<think>{thought}</think>"


class Reply(NamedTuple):
    """A completion and what it leads to."""

    answer: Answer
    prompt: SamPrompt  # image pixels
    mask: torch.Tensor  # (H, W) bool, SAM's

    def on(self, thing: Thing) -> tuple[float, float, float]:
        """Whether the box is on a thing, which share of its points is, and whether the mask is."""
        box = box_ious([thing], [[self.prompt]]).item() > 0.5
        points = points_inside(self.prompt.points, thing.mask)
        mask = self.mask.numpy()
        iou = (mask & thing.mask).sum() / (mask | thing.mask).sum()
        return float(box), points, float(iou > 0.5)


def find_cases(count: int) -> list[Case]:
    """The first `count` held-out scenes, without those whose things are all of one kind and colour.

    If another thing shares the target's box, then it is the case's other thing.
    """
    rng = random.Random(0)
    heldout = Shapes("heldout")
    cases = []
    for index in range(count):
        image, things, query, k = heldout.scene(index)
        target = things[k]
        sample = Sample(image, query, target.mask, None, f"heldout-{index}")
        looks = (target.kind, target.colour)
        found = [Case(sample, target, t) for t in things if (t.kind, t.colour) != looks]
        if found:
            cases.append(rng.choice([case for case in found if case.shared] or found))
    return cases


def complete(policy: Policy, samples: list[Sample], starts: list[str], s) -> list[str]:
    """Greedy completions that begin with the given texts, one for each sample."""
    prompts = policy.read(samples, starts)
    completions = samr1_mini.sample_completions(policy, prompts, s, greedy=True)
    texts = policy.texts(completions)
    return [start + group[0] for start, group in zip(starts, texts, strict=True)]


def replies(policy: Policy, scorer: SamScorer, cases: list[Case], s) -> dict[str, list[Reply]]:
    """The replies to all cases, by the name of the thought."""
    samples = [case.sample for case in cases]
    found = {}
    for name in THOUGHTS:
        texts = complete(policy, samples, [case.start(name) for case in cases], s)
        groups = [[text] for text in texts]
        scores = score_completions(scorer, samples, groups, policy.extent, keep_masks=True)
        columns = (scores.answers, scores.prompts, scores.overlap.masks)
        found[name] = [Reply(a[0], p[0], m[0]) for a, p, m in zip(*columns, strict=True)]
    return found


def print_table(title: str, cases: list[Case], found: dict[str, list[Reply]]) -> None:
    """Print shares over the cases, in two groups: `Case.shared` or not."""
    print(f"\n{title:42}" + "".join(f"{name:>16}" for name in ("box", "points", "mask")))
    for shared, meaning in GROUPS.items():
        chosen = [k for k, case in enumerate(cases) if case.shared == shared]
        header = f"{meaning}, {len(chosen)} scenes"
        print(f"{header:42}" + f"{'target':>9}{'other':>7}" * 3)
        for name in THOUGHTS:
            target = np.mean([found[name][k].on(cases[k].target) for k in chosen], axis=0)
            other = np.mean([found[name][k].on(cases[k].other) for k in chosen], axis=0)
            cells = (f"{a:9.3f}{b:7.3f}" for a, b in zip(target, other, strict=True))
            print(f"  {name + ' thought':40}" + "".join(cells))


def draw(cases: list[Case], found: dict[str, list[Reply]]) -> Figure:
    """Two cases of each group, one in each column. Above: own thought. Below: the other object's.

    They are the first whose mask is on the target after the policy's own thought, and on the other
    object after that one's. The line below says in how many cases it is so.
    """
    right = [k for k, case in enumerate(cases) if found["own"][k].on(case.target)[2]]
    follows = [k for k in right if found["other"][k].on(cases[k].other)[2]]
    chosen, counts = [], []
    for shared, meaning in GROUPS.items():
        group = [k for k in follows if cases[k].shared == shared]
        chosen += group[:2]
        answered = sum(cases[k].shared == shared for k in right)
        counts.append(f"{len(group)} of {answered} where {meaning}")
    figure = Figure(figsize=(13.6, 8), dpi=100, layout="constrained")
    figure.supxlabel(f"The mask follows a forced thought in {', '.join(counts)}", fontsize=12)
    for axes, name in zip(figure.subplots(2, 4), ("own", "other"), strict=True):
        for cell, k in zip(axes, chosen, strict=False):
            sample, reply = cases[k].sample, found[name][k]
            pictures.draw_answer(cell, sample.image, reply.mask.numpy(), reply.prompt, sample.mask)
            pictures.write_title(cell, f"query: {sample.query}")
            title = "own" if name == "own" else "forced"
            text = f'{title} thought: "{reply.answer.thought}"'
            pictures.write_below(cell, textwrap.fill(text, 38))
    pictures.draw_legend(figure)
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thoughts")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a trained run")
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes to look at")
    parser.add_argument("--figure", type=Path, default="assets/thoughts.png", help="file to write")
    options = parser.parse_args(argv)
    if not 3 <= options.scenes <= 10_000:
        raise UserError(f"--scenes {options.scenes}: it must be from 3 to 10000")
    s = parse_settings("train", [])
    cases = find_cases(options.scenes)
    scorer = SamScorer(load_sam("tiny"))
    folders = {"base model": "none", "trained model": str(options.run / "adapter")}
    for title, folder in folders.items():
        policy = load_vlm("tiny", "cpu", s.side, s.prompt, folder)
        found = replies(policy, scorer, cases, s)
        print_table(title, cases, found)
    save_figure(draw(cases, found), options.figure)
    print(f"\nwritten to {options.figure}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

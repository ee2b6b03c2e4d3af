"""make_tiny.py - build the embedded models from nothing: tiny/sam.safetensors and tiny/vlm/.

    python -m tiny.make_tiny [--out tiny]

Both are the real classes at toy size, trained from random weights on the drawn scenes of
`data.Shapes` (split "warmup", which samr1_mini.py never reads). They know nothing about
photographs. At the end, this script prints what SAM reaches on held-out scenes. What the VLM
reaches, `python samr1_mini.py eval --vlm tiny/vlm` prints, and `--vlm tiny/vlm-clean` for its first
stage. A whole run takes 45 CPU minutes. Another processor rounds differently, and its models then
differ a little.

SAM   `segment_anything`'s Sam on 128 x 128 pixels. Supervised: from a jittered box, two points in
      the object, or both, to its mask. Where two objects share a box, it must follow the points.
      It takes prompts literally: it cuts at a wrong box, and adds the background in the box if a
      point lies there. So a mask reward has a reason to ask for good boxes and points.

VLM   `Qwen2_5_VLForConditionalGeneration` on 64 x 64 pixels (16 image tokens), with a word-level
      vocabulary in which every integer 0..64 is one token. Two stages:
      1. clean: supervised on right answers, first on scenes of one or two shapes, at last mostly
         about plain shapes. This is its "pre-training": the model learns to see, to read queries,
         and to write boxes and points.
      2. sloppy: a short fine-tuning on answers that are spoilt on purpose: boxes are shifted and
         have loose edges, points lie in the middle of the box, some answers are about the wrong
         object, some have a broken format. Each fault occurs in a share of the answers only, so
         the model still gives good answers, but rarely.
      Why spoil the model? RL shifts probability between answers that the policy already gives. A
      real base model can point at things, but it does so carelessly and in formats of its own. With
      stage 1 alone, the tiny model would leave nothing for GRPO to improve. So the headroom of the
      default run is made on purpose, and more of stage 1 would beat RL here. It would not on a real
      task, where nobody has the right reasoning to train on.
"""

import argparse
import sys
from pathlib import Path

import torch

from plumbing.errors import exit_with_one_line
from tiny.make_sam import report_sam, train_sam
from tiny.make_vlm import train_vlm


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tiny.make_tiny", description="Rebuild the models.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tiny matrices gain nothing, and the data worker needs a core
    torch.set_flush_denormal(True)
    train_sam(options.out)
    train_vlm(options.out)
    report_sam(options.out)


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

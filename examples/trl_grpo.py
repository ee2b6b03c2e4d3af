"""trl_grpo.py - train with this repository's reward in TRL's GRPOTrainer.

    pip install trl
    python -m examples.trl_grpo [--steps 100] [--out runs/trl]

This repository trains on one device. TRL adds accelerate, DeepSpeed and vLLM, and so several GPUs.
The example uses the embedded models and scenes on a CPU. For Qwen2.5-VL on RefCOCOg, change
  - SIDE to 840, the prompt style to "full", and both "tiny/vlm" to the model's name;
  - load_sam("tiny") to load_sam("vit_h:FILE"), load_data("shapes", ...) to "refcocog:ROOT";
  - the arguments `use_cpu` and `bf16` of GRPOConfig: remove them on a GPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from data import Sample, messages
from plumbing.photos import load_data
from plumbing.sam import load_sam
from plumbing.vlm import vlm_path
from reward import SamScorer, score_completions
from samr1_mini import LORA_TARGETS

SIDE = 64  # side of the square image that the policy sees, in pixels
SAMPLES = 64


def trl_reward(scorer: SamScorer, frame: float, accuracy: str = "tiered"):
    """`reward.score_completions` in the form that TRL's trainers call.

    frame, accuracy: see `reward.score_completions`.

    Returns a function reward(completions, photo, mask, **others) -> list of N rewards. TRL passes
    the columns of the data set with one entry per completion, so a sample occurs G times. The
    function encodes each image only once.

    completions: N texts, or N conversations that end with the completion.
    photo:       N images at their original size (PIL). TRL's own column `image` is resized.
    mask:        N masks (H, W) of bool, as arrays or nested lists.
    """

    def sam_reward(completions: list, photo: list, mask: list, **others) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        masks = [np.asarray(truth, bool) for truth in mask]
        groups: dict[tuple, list[int]] = {}  # equal samples: the numbers of their completions
        for k, (image, truth) in enumerate(zip(photo, masks, strict=True)):
            groups.setdefault((image.size, image.tobytes(), truth.tobytes()), []).append(k)
        firsts = [group[0] for group in groups.values()]
        samples = [Sample(photo[k], "", masks[k], None, str(k)) for k in firsts]
        # Groups may differ in size. Empty texts fill up the smaller ones: SAM skips them.
        G = max(map(len, groups.values()))
        rows = [[texts[k] for k in group] + [""] * (G - len(group)) for group in groups.values()]
        rewards = score_completions(scorer, samples, rows, frame, accuracy).reward.tolist()
        result = [0.0] * len(texts)
        for row, group in zip(rewards, groups.values(), strict=True):
            for k, reward in zip(group, row, strict=False):
                result[k] = reward
        return result

    return sam_reward


def training_rows(count: int) -> list[dict]:
    """The first `count` training samples as rows of a data set for TRL."""
    samples = load_data("shapes", "train")
    return [
        {
            "prompt": messages(one.query, "brief", "pixels", SIDE),
            "image": one.image.resize((SIDE, SIDE)),  # for the policy
            "photo": one.image,  # for SAM
            "mask": one.mask.tolist(),
        }
        for one in (samples[i] for i in range(count))
    ]


def train(steps: int, out: Path):
    """Train the embedded model with TRL for some steps. Returns the GRPOTrainer."""
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        print(f"trl_grpo.py: {error}: pip install trl", file=sys.stderr)
        raise SystemExit(2) from error
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(vlm_path("tiny")),
        processing_class=AutoProcessor.from_pretrained(vlm_path("tiny")),
        reward_funcs=trl_reward(SamScorer(load_sam("tiny")), frame=SIDE),
        train_dataset=Dataset.from_list(training_rows(SAMPLES)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS),
        args=GRPOConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=48,
            learning_rate=1e-3,
            epsilon=0.2,
            epsilon_high=0.3,
            beta=0.005,
            loss_type="dapo",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    return trainer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.trl_grpo", description="Train with SAM's reward in TRL."
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"), help="folder to write")
    options = parser.parse_args(argv)
    trainer = train(options.steps, options.out)
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"mean reward (of 6): {rewards[0]:.2f} -> {rewards[-1]:.2f} (first and last step)")


if __name__ == "__main__":
    main()

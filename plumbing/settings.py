"""settings.py - every setting of the commands, with its meaning and its source.

The defaults are those of the embedded models. A preset changes some of them, and a flag on the
command line wins over both. "Paper" is what SAM-R1 used, *Assumed* marks what it leaves open. What
nobody would change in a run of their own is a constant beside the code that uses it.
"""

import math
import operator
from dataclasses import dataclass

from plumbing.command_line import parse, setting

PRESETS = ("tiny", "qwen2b", "qwen3b", "qwen7b")
# See `reward.accuracy_reward`, `reward.box_ious` and `reward.segzero_reward`.
ACCURACY = ("tiered", "0.5", "0.7", "0.8", "iou", "box", "segzero", "segzero_mask")


@dataclass
class Models:
    _argument_group_name = "models and device"
    preset: str = setting(
        "tiny", "fills in others; for a GPU of 12, 16, 24 GB: qwen2b, qwen3b, qwen7b", PRESETS
    )
    vlm: str = setting("tiny", "policy: tiny, a hub name or a local folder. Paper: Qwen2.5-VL-7B")
    sam: str = setting(
        "tiny",
        "segmenter: tiny, vit_b|vit_l|vit_h:CHECKPOINT, or sam2:MODEL with a hub name or a local "
        "folder. Paper: SAM2-Large, sam2:facebook/sam2-hiera-large",
    )
    device: str = setting("auto", "auto takes cuda, then mps, then cpu; also cuda:N")
    dtype: str = setting(
        "auto",
        "of the policy; auto: bfloat16 on a GPU, else float32. The adapter is always float32",
        ("auto", "bfloat16", "float16", "float32"),
    )
    load_in_4bit: bool = setting(
        False, "hold the language model's frozen weights in 4 bit (NF4); needs bitsandbytes"
    )
    side: int = setting(64, "images are resized to this square, pixels. Paper: 840")
    prompt: str = setting(
        "brief",
        "full explains the task; brief is the query only, for a model that knows the task; segzero "
        "and visionreasoner ask as their checkpoints were trained, in other words",
        ("full", "brief", "segzero", "visionreasoner"),
    )
    max_new_tokens: int = setting(48, "longest completion, tokens; the tiny model needs 30")
    rollout_prompts: int = setting(64, "prompts that are decoded together, with all completions")
    save_memory: int = setting(
        0,
        "0: no; 1: one prompt in a forward and backward pass, not a whole mini-batch; 2: recompute "
        "the layers in the backward pass too; 3: keep SAM in host memory too while it is unused",
    )


@dataclass
class Data:
    _argument_group_name = "data and files"
    data: str = setting(
        "shapes",
        "shapes, refcocog|refcoco|refcoco+|reasonseg:ROOT[/SPLIT], or hub:NAME[@ROOT], a set of "
        "Hugging Face's hub or a local folder of parquet files. Paper: RefCOCOg",
    )
    out: str = setting("", "folder of the run (default: one in runs/)")
    resume: bool = setting(False, "continue the run in --out")
    overwrite: bool = setting(False, "delete an existing run in --out")


@dataclass
class Rollouts:
    _argument_group_name = "rollouts and reward"
    train_samples: int = setting(
        3000, "size of the subset of RefCOCO's training split. Paper: 3,000 of 104,560"
    )
    data_seed: int = setting(0, "seed for choosing the training samples: tools.fetch's --seed")
    seed: int = setting(0, "seed of the adapter's weights, the order of samples, and sampling")
    prompts_per_step: int = setting(8, "B, prompts in a step. *Assumed*: the paper does not say")
    group_size: int = setting(8, "G, completions for each prompt. Paper: 8")
    temperature: float = setting(
        1.0, "of sampling. *Assumed*; at 1 the policy is trained as it is sampled"
    )
    top_p: float = setting(1.0, "nucleus sampling, 1 is off. *Assumed*")
    accuracy: str = setting(
        "tiered",
        "accuracy reward: tiered (paper), 4 above a fixed IoU, or 4 x the IoU (Table 3); also, "
        "without SAM: tiers on the box's IoU, or Seg-Zero's reward, which has labels for points",
        ACCURACY,
    )


@dataclass
class Objective:
    _argument_group_name = "objective and optimisation"
    eps_low: float = setting(0.2, "clip ratios at 1 - eps_low. Paper: the usual 0.2")
    eps_high: float = setting(0.3, "clip ratios at 1 + eps_high. Paper: 0.3")
    beta: float = setting(
        0.005, "weight of the KL term. *Assumed* (Seg-Zero's); the paper keeps the term, Figure 4a"
    )
    normalise: str = setting(
        "token",
        "token: every token of a group counts the same (paper); sequence: every completion (GRPO)",
        ("token", "sequence"),
    )
    steps: int = setting(200, "rollouts to learn from; the tiny model has levelled off by then")
    epochs: int = setting(2, "passes over the completions of a step. *Assumed*")
    minibatches: int = setting(
        2, "updates in a pass, each on its share of the prompts. *Assumed*; one clips nothing"
    )
    lr: float = setting(1e-3, "learning rate of AdamW. Paper: 1e-6 for full fine-tuning")
    lr_decay: str = setting(
        "linear", "linear to zero at the last step. *Assumed*", ("linear", "constant")
    )
    lora_rank: int = setting(16, "rank of the adapter. Not in the paper, which trains all weights")
    eval_samples: int = setting(256, "held-out samples before and after training")
    save_every: int = setting(50, "steps between checkpoints and pictures")


@dataclass
class EvalFlags:
    _argument_group_name = "evaluation"
    adapter: str = setting("none", "folder of a trained adapter, or none for the base model")
    limit: int = setting(0, "first samples only; 0: all, of the drawn scenes 256")
    protocol: str = setting(
        "lisa",
        "what giou and ciou count. lisa: ignored pixels are left out; segzero: they are target, "
        "and an unreadable answer has IoU 0. The paper's figures are probably segzero's",
        ("lisa", "segzero"),
    )


@dataclass
class SegmentFlags:
    _argument_group_name = "picture"
    image: str = setting("", "the picture")
    query: str = setting("", "what to find in it")
    adapter: str = setting("none", "folder of a trained adapter, or none for the base model")
    out: str = setting("segmented.png", "picture to write")


@dataclass
class DemoFlags:
    _argument_group_name = "page"
    adapter: str = setting("none", "folder of a trained adapter, or none for the base model alone")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines ask too")
    port: int = setting(7860, "port to listen on")


@dataclass
class Settings(Models, Data, Rollouts, Objective):
    """Settings of `train`."""


@dataclass
class EvalSettings(Models, Data, EvalFlags):
    """Settings of `eval`."""


@dataclass
class SegmentSettings(Models, SegmentFlags):
    """Settings of `segment`."""


@dataclass
class DemoSettings(Models, DemoFlags):
    """Settings of `python -m tools.demo`."""


VIT_B = "vit_b:sam_vit_b_01ec64.pth"
# One GPU. Paper: side, G, eps, 3,000 samples (375 steps of 8 prompts). *Assumed*: the rest.
QWEN = dict(
    sam="vit_h:sam_vit_h_4b8939.pth", data="refcocog:data", side=840, prompt="full",
    max_new_tokens=512, steps=375, lr=1e-5, lr_decay="constant", epochs=1, lora_rank=32,
    rollout_prompts=8, save_memory=3, save_every=25,
)  # fmt: skip
PRESET_VALUES = {
    "tiny": {},
    "qwen2b": QWEN | dict(vlm="Qwen/Qwen3-VL-2B-Instruct", sam=VIT_B, rollout_prompts=3),
    "qwen3b": QWEN | dict(vlm="Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen7b": QWEN | dict(vlm="Qwen/Qwen2.5-VL-7B-Instruct", rollout_prompts=4),
}
# --resume may change how far a run goes, where things are, and how they are computed.
MAY_CHANGE = set(
    "steps vlm sam data device dtype out rollout_prompts save_memory save_every limit".split()
)


# Bounds of the numbers above. All of them must also be finite.
AT_LEAST = {
    0: "seed data_seed eps_low eps_high beta steps limit save_memory",
    1: """side max_new_tokens rollout_prompts train_samples prompts_per_step epochs minibatches
        lora_rank eval_samples save_every port""",
    2: "group_size",  # the advantage compares the completions of a group
}
ABOVE = {0: "temperature top_p lr"}
AT_MOST = {
    1: "eps_low top_p",
    3: "save_memory",
    1024: "lora_rank",
    4096: "side max_new_tokens",
    65535: "port",
    2**63 - 1: "seed data_seed",
}
CLASSES = {
    "train": (Settings, "Evaluate, train with GRPO, evaluate again."),
    "eval": (EvalSettings, "Compute the metrics of an adapter, or of the base model."),
    "segment": (SegmentSettings, "Segment what a query refers to in one picture."),
}


def parse_settings(command: str, argv: list[str]):
    """The settings of a command line. Bad values exit with code 2 and one line."""
    cls, about = CLASSES[command]
    return parse(cls, argv, f"samr1_mini.py {command}", about, PRESET_VALUES, MAY_CHANGE, problem)


def problem(s) -> str:
    """What is wrong with the values of some settings, or ""."""
    numbers = {k: v for k, v in vars(s).items() if type(v) in (int, float)}
    for name, value in numbers.items():
        if not math.isfinite(value):
            return f"--{name} must be a finite number"
    bounds = [(AT_LEAST, operator.ge, "at least"), (AT_MOST, operator.le, "at most")]
    bounds.append((ABOVE, operator.gt, "above"))
    for table, holds, words in bounds:
        for bound, names in table.items():
            for name in names.split():
                if name in numbers and not holds(numbers[name], bound):
                    return f"--{name} must be {words} {bound}"
    if isinstance(s, Settings) and s.prompts_per_step % s.minibatches:
        return f"--minibatches must divide --prompts_per_step, which is {s.prompts_per_step}"
    return ""

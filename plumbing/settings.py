"""settings.py - every setting of the commands, with its meaning, and the command line made of them.

The defaults are those of the embedded models. A preset changes some of them, and a flag on the
command line wins over both. "Paper" is what SAM-R1 used, *Assumed* marks what it leaves open. What
nobody would change in a run of their own is a constant beside the code that uses it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from plumbing.errors import UserError

PRESETS = ("tiny", "qwen2b", "qwen3b", "qwen7b")
# Accuracy rewards: names of `reward.accuracy_reward`, then rewards to compare it with. "box"
# is the paper's tiers on the IoU of the boxes. The others are Seg-Zero's, see plumbing/segzero.py.
ACCURACY = ("tiered", "0.5", "0.7", "0.8", "iou", "box", "segzero", "segzero_mask")


def setting(default, meaning: str, choices: tuple = ()):
    """A field of a settings class, with its line in --help."""
    return dataclasses.field(default=default, metadata=dict(help=meaning, choices=choices or None))


@dataclass
class Models:
    _argument_group_name = "models and device"
    preset: str = setting(
        "tiny", "fills in others; for a GPU of 12, 16, 24 GB: qwen2b, qwen3b, qwen7b", PRESETS
    )
    vlm: str = setting("tiny", "policy: tiny, a hub name or a local folder. Paper: Qwen2.5-VL-7B")
    sam: str = setting(
        "tiny",
        "segmenter: tiny, vit_b|vit_l|vit_h:CHECKPOINT, or sam2:MODEL, sam3:MODEL with a hub name "
        "or a local folder. Paper: SAM2-Large, sam2:facebook/sam2-hiera-large. Newer: "
        "sam3:facebook/sam3",
    )
    device: str = setting("auto", "auto takes cuda, then mps, then cpu; also cuda:N")
    dtype: str = setting(
        "auto",
        "of the policy; auto: bfloat16 on a GPU, else float32; 4bit: the language model's frozen "
        "weights in NF4, needs bitsandbytes. The adapter is always float32",
        ("auto", "bfloat16", "float16", "float32", "4bit"),
    )
    side: int = setting(64, "images are resized to this square, pixels. Paper: 840")
    prompt: str = setting(
        "brief",
        "full explains the task; brief is the query only, for a model that knows the task; segzero "
        "and visionreasoner: for the public checkpoints of these systems, in our own wording",
        ("full", "brief", "segzero", "visionreasoner"),
    )
    max_new_tokens: int = setting(48, "longest completion, tokens; the tiny model needs 30")
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
    out: str = setting("", "folder of the run (default: the next free one in runs/)")
    resume: bool = setting(False, "continue the run in --out")


@dataclass
class Rollouts:
    _argument_group_name = "rollouts and reward"
    train_samples: int = setting(
        3000, "scenes or expressions to train on. Paper: 3,000 of RefCOCOg's 104,560"
    )
    seed: int = setting(0, "seed of the adapter's weights, the order of samples, and sampling")
    prompts_per_step: int = setting(8, "B, prompts in a step. *Assumed*: the paper does not say")
    group_size: int = setting(8, "G, completions for each prompt. Paper: 8")
    temperature: float = setting(1.0, "of sampling and of the log-probs. *Assumed*")
    accuracy: str = setting(
        "tiered",
        "accuracy reward: tiered (paper), 4 above a fixed IoU, or 4 x the IoU (Table 3); also, "
        "without SAM: tiers on the box's IoU, or Seg-Zero's reward, which has labels for points",
        ACCURACY,
    )


@dataclass
class Objective:
    _argument_group_name = "objective and optimisation"
    eps_high: float = setting(0.3, "clip ratios above 1 + eps_high. Paper: 0.3, and 0.2 below")
    beta: float = setting(
        0.005, "weight of the KL term. *Assumed* (Seg-Zero's); the paper keeps the term, Figure 4a"
    )
    normalise: str = setting(
        "token",
        "token: every token of a group counts the same (paper); sequence: every completion (GRPO)",
        ("token", "sequence"),
    )
    steps: int = setting(200, "rollouts to learn from; the tiny model has levelled off by then")
    epochs: int = setting(2, "how often a step goes over its completions. *Assumed*")
    minibatches: int = setting(
        2, "updates in an epoch, each on its share of the prompts. *Assumed*; one clips nothing"
    )
    lr: float = setting(
        1e-3, "learning rate of AdamW. Paper: 1e-6 for full fine-tuning. It decays linearly"
    )
    lora_rank: int = setting(16, "rank of the adapter. Not in the paper, which trains all weights")
    adapter: str = setting("none", "folder of a trained adapter to start from, or none")
    track: str = setting(
        "none",
        "also log metrics and pictures with trackio or wandb, which pip installs",
        ("none", "trackio", "wandb"),
    )


@dataclass
class EvalFlags:
    _argument_group_name = "evaluation"
    adapter: str = setting("none", "folder of a trained adapter, or none for the base model")
    against: str = setting(
        "", "answers.jsonl of another evaluation of the same samples, to compare with, paired"
    )
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
class Settings(Models, Data, Rollouts, Objective):
    """Evaluate, train with GRPO, evaluate again."""


@dataclass
class EvalSettings(Models, Data, EvalFlags):
    """Compute the metrics of an adapter, or of the base model."""


@dataclass
class SegmentSettings(Models, SegmentFlags):
    """Segment what a query refers to in one picture."""


VIT_B = "vit_b:sam_vit_b_01ec64.pth"
# One GPU. Paper: side, G, eps, 3,000 samples (375 steps of 8 prompts). *Assumed*: the rest.
QWEN = dict(
    sam="vit_h:sam_vit_h_4b8939.pth", data="refcocog:data", side=840, prompt="full",
    max_new_tokens=512, steps=375, lr=1e-5, epochs=1, lora_rank=32, save_memory=3,
)  # fmt: skip
PRESET_VALUES = {
    "tiny": {},
    "qwen2b": QWEN | dict(vlm="Qwen/Qwen3-VL-2B-Instruct", sam=VIT_B),
    "qwen3b": QWEN | dict(vlm="Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen7b": QWEN | dict(vlm="Qwen/Qwen2.5-VL-7B-Instruct"),
}
# Prompts that are decoded together, with all of their completions: what the preset's card holds.
ROLLOUT_PROMPTS = {"tiny": 64, "qwen2b": 3, "qwen3b": 8, "qwen7b": 4}

# The smallest and the largest value of each number. All of them must also be finite.
LARGEST = 2**63 - 1
BOUNDS = {
    "side": (1, 4096),
    "max_new_tokens": (1, 4096),
    "save_memory": (0, 3),
    "train_samples": (1, 10**7),
    "seed": (0, LARGEST),
    "prompts_per_step": (1, 4096),
    "group_size": (2, 4096),  # the advantage compares the completions of a group
    "temperature": (1e-4, 100),
    "eps_high": (0, LARGEST),
    "beta": (0, 1000),
    "steps": (0, LARGEST),
    "epochs": (1, LARGEST),
    "minibatches": (1, LARGEST),
    "lr": (1e-12, 1),
    "lora_rank": (1, 1024),
    "limit": (0, LARGEST),
    "port": (1, 65535),
}

CLASSES = {"train": Settings, "eval": EvalSettings, "segment": SegmentSettings}
# --resume may change how far a run goes, where things are, and how they are computed. All answers
# of an evaluation go into one table, so there even the path of a set or a model stays.
MAY_CHANGE = {
    Settings: {*"steps vlm sam data device dtype out resume save_memory track".split()},
    EvalSettings: {*"limit against device out resume save_memory".split()},
}
MAY_MOVE = {"sam", "data"}  # to another path: another size or set would need another evaluation


def rollout_prompts(s) -> int:
    return ROLLOUT_PROMPTS[s.preset]


class Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def parse_settings(command: str, argv: list[str]):
    """The settings of a command of samr1_mini.py, see `parse`."""
    return parse(CLASSES[command], argv, program=f"samr1_mini.py {command}")


def parse(cls: type, argv: list[str], program: str):
    """An instance of the settings class `cls` from a command line. Raises UserError.

    The bases of `cls` are the groups in --help. Values come from the defaults, then from the preset
    (or, with --resume, from the run in --out), then from the flags.
    """
    parser = Parser(
        list(cls.__bases__),
        prog=program,
        usage="%(prog)s [--flag value ...]",
        description=cls.__doc__,
        allow_abbrev=False,
    )
    names = {field.name for field in dataclasses.fields(cls)}
    given = parser.parse_args(argv)  # for --preset and --resume only
    values = {k: v for k, v in PRESET_VALUES[given.preset].items() if k in names}
    saved = {}
    if getattr(given, "resume", False):
        saved = read_config(given.out, names) | {"out": given.out, "resume": True}
    parser.set_defaults(**(values | saved))
    settings = cls(**vars(parser.parse_args(argv)))
    now = vars(settings)
    changed = [name for name in saved if kept(cls, name, now[name]) != kept(cls, name, saved[name])]
    if changed:
        flags = ", ".join(f"--{name}" for name in changed)
        raise UserError(f"--resume continues with the run's own {flags}: leave out what differs")
    check(settings)
    return settings


def kept(cls: type, name: str, value):
    """What --resume keeps of a setting: all, nothing, or what stands before the colon."""
    if name not in MAY_CHANGE[cls]:
        return value
    return str(value).partition(":")[0] if name in MAY_MOVE else None


def read_config(out: str, names: set[str]) -> dict:
    """The settings in the folder of a run. Raises UserError if they are not those of `names`."""
    file = Path(out).expanduser() / "config.json"
    if not out or not file.is_file():
        given = out or "(not given)"
        raise UserError(f"--resume: there is no run in --out {given}: name its folder")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"--resume: {file} is damaged ({error}): start another run") from error
    different = names ^ config.keys() if isinstance(config, dict) else {"no settings"}
    if different:
        reason = f"is of another version or command ({', '.join(sorted(different))})"
        raise UserError(f"--resume: {file} {reason}: start another run")
    return config


def check(s) -> None:
    """Raise UserError if a number is outside its bounds, or a value of config.json is of no use.

    argparse checks what is on the command line, but not the defaults that --resume reads.
    """
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        choices = field.metadata["choices"] or (value,)
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or value not in choices:
            raise UserError(f"--{field.name} {value!r}: no such value (--help lists them)")
    for name, (least, most) in BOUNDS.items():
        value = getattr(s, name, least)
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"at least {least}" if most == LARGEST else f"from {least} to {most}"
            raise UserError(f"--{name} {value}: it must be {bounds}")
    if isinstance(s, Settings) and s.prompts_per_step % s.minibatches:
        raise UserError(f"--minibatches must divide --prompts_per_step, {s.prompts_per_step}")

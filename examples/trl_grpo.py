"""trl_grpo.py - train with this repository's reward in TRL's GRPOTrainer, on several GPUs.

    pip install trl
    python -m examples.trl_grpo                                         one process
    accelerate launch --num_processes 4 -m examples.trl_grpo --preset qwen3b --data refcocog:data
    accelerate launch --multi_gpu --num_processes 2 -m examples.trl_grpo        also without a GPU
    python samr1_mini.py eval --adapter RUN/adapter

samr1_mini.py trains on one device. TRL adds accelerate, and so several GPUs. Presets and flags are
those of `samr1_mini.py train`, without the few that accelerate and TRL decide (LEFT_OUT, below).
All processes together complete --prompts_per_step prompts in a step. Each has its own copy of the
policy and of SAM, on its own GPU.

TRL gets a data set of indices. A process reads a sample when a batch asks for it, and the reward
looks it up by its index. So no image and no mask is copied in advance. A sample that cannot be used
is reported, counted and replaced by the next one, as in samr1_mini.py.

A run has the files of README's table, without evaluation and pictures of samples. TRL's own files
are in RUN/checkpoint; checkpoint/completions holds every completion with its reward and advantage.
--resume continues from the last checkpoint. Ctrl-C loses the steps since then.

Different from samr1_mini.py: TRL computes the prompt again for every completion. All tokens of an
update have equal weight there; here, all tokens of a group. TRL does not sample the vision tokens,
but includes them in the log-probs.

DeepSpeed: pip install "trl[deepspeed]", then accelerate launch --use_deepspeed --zero_stage 2 ...
vLLM: pip install "trl[vllm]", then add use_vllm=True and vllm_mode="colocate" to `trl_arguments`,
and replace suppress_tokens, which vLLM does not have, by logit_bias={t: -100.0 for t in banned}.

Tried: TRL 1.16 with accelerate 1.15, in one and in two processes on a CPU. Not tried: GPUs,
DeepSpeed, vLLM, several machines.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import samr1_mini
from data import Sample, messages
from plumbing import pictures, runs
from plumbing.command_line import exit_on_error, parse
from plumbing.photos import load_data
from plumbing.sam import load_sam
from plumbing.settings import MAY_CHANGE, PRESET_VALUES, Settings, problem
from plumbing.vlm import Policy, load_vlm
from reward import SamScorer, score_completions

# Settings of `train` that do not apply here.
LEFT_OUT = ("device", "load_in_4bit", "rollout_prompts", "eval_samples")
# TRL's names of what metrics.jsonl holds, and ours. The reward logs the names of the first line;
# `skipped` is a mean over the processes.
METRICS = {
    **{name: name for name in ("iou", "accuracy", "think_format", "answer_format", "skipped")},
    **{name: name for name in ("reward", "kl", "entropy", "grad_norm")},
    "learning_rate": "lr",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "equal_groups",
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
}


def parse_settings(argv: list[str]):
    """The settings of `train`, without LEFT_OUT. Bad values exit with code 2 and one line."""
    groups = []
    for group in Settings.__bases__:
        fields = [
            (one.name, one.type, dataclasses.field(default=one.default, metadata=one.metadata))
            for one in dataclasses.fields(group)
            if one.name not in LEFT_OUT
        ]
        title = {"_argument_group_name": group._argument_group_name}
        groups.append(dataclasses.make_dataclass(group.__name__, fields, namespace=title))
    cls = dataclasses.make_dataclass("TrlSettings", [], bases=tuple(groups))
    about = "Train with SAM's reward in TRL's GRPOTrainer."
    program = "python -m examples.trl_grpo"
    return parse(cls, argv, program, about, PRESET_VALUES, MAY_CHANGE, problem)


class Samples:
    """The samples of a data set by index, and TRL's rows made from them.

    The last ones are kept: TRL asks for each sample once per completion, and so does the reward.
    """

    def __init__(self, dataset, policy: Policy, keep: int):
        self.dataset, self.policy = dataset, policy
        self.skipped = 0  # samples that could not be used
        self.read = lru_cache(keep)(self._read)

    def _read(self, index: int) -> Sample:
        (sample,), skipped = runs.load_samples(self.dataset, [index])
        self.skipped += skipped
        return sample

    def rows(self, batch: list[dict]) -> list[dict]:
        """Rows with an index, and the prompt and the resized image that TRL gives to the policy."""
        found, policy = [], self.policy
        for row in batch:
            sample = self.read(row["index"])
            chat = messages(sample.query, policy.prompt, policy.coordinates, policy.side)
            image = sample.image.resize((policy.side, policy.side))
            found.append({"index": row["index"], "prompt": chat, "image": image})
        return found


def trl_reward(scorer: SamScorer, samples: Samples, accuracy: str) -> Callable:
    """`reward.score_completions` in the form that TRL's trainers call.

    Returns a function that takes N completions (texts, or conversations that end with one) and
    their column `index`, and returns N rewards. A process gets a part of the global batch: its
    groups may be incomplete, and are scored together all the same. Each image is encoded once.
    """

    def sam_reward(completions, index, log_metric=None, log_extra=None, **_) -> list[float]:
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        texts = [samples.policy.opening + text for text in texts]
        groups: dict[int, list[int]] = {}  # index of a sample: the numbers of its completions
        for k, number in enumerate(index):
            groups.setdefault(number, []).append(k)
        # Groups may differ in size. Empty texts fill up the smaller ones: SAM skips them.
        G = max(map(len, groups.values()))
        rows = [[texts[k] for k in group] + [""] * (G - len(group)) for group in groups.values()]
        batch = [samples.read(number) for number in groups]
        policy = samples.policy
        options = (policy.frame, accuracy)
        scores = score_completions(scorer, batch, rows, *options, style=policy.prompt)
        order = torch.tensor(sum(groups.values(), [])).argsort()
        real = torch.tensor([[g < len(group) for g in range(G)] for group in groups.values()])

        def values(name: str) -> list[float]:
            return getattr(scores, name)[real][order].tolist()

        if log_metric:
            for name in ("iou", "accuracy", "think_format", "answer_format"):
                log_metric(name, sum(values(name)) / len(texts))
            log_metric("skipped", float(samples.skipped))
            samples.skipped = 0
        if log_extra:
            log_extra("index", index)
            log_extra("iou", values("iou"))
        return values("reward")

    return sam_reward


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl, one line for each step, with the names that samr1_mini.py uses."""

    def __init__(self, file: Path, updates: int):
        self.file, self.updates = file, updates

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if state.is_world_process_zero and "reward" in logs:
            row = {ours: logs[name] for name, ours in METRICS.items() if name in logs}
            runs.append_line(self.file, {"step": state.global_step // self.updates} | row)


def trl_arguments(s, out: Path, policy: Policy, processes: int) -> dict:
    """The arguments of GRPOConfig that follow from our settings.

    A step of ours is one generation of TRL's, with epochs x minibatches updates.
    """
    G, updates = s.group_size, s.epochs * s.minibatches
    share, rest = divmod(s.prompts_per_step * G, s.minibatches * processes)
    if rest:
        raise ValueError(
            f"{processes} processes x {s.minibatches} mini-batches cannot share the "
            f"{s.prompts_per_step} x {G} completions of a step: use a multiple"
        )
    rows = math.gcd(share, G) if s.save_memory else share  # of completions in a pass
    banned = policy.banned.tolist()
    return dict(
        output_dir=str(out / "checkpoint"),
        seed=s.seed,
        max_steps=s.steps * updates,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        steps_per_generation=s.minibatches * share // rows,
        num_iterations=s.epochs,
        num_generations=G,
        max_completion_length=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        generation_kwargs={"suppress_tokens": banned},
        loss_type={"token": "dapo", "sequence": "grpo"}[s.normalise],
        epsilon=s.eps_low,
        epsilon_high=s.eps_high,
        beta=s.beta,
        learning_rate=s.lr,
        lr_scheduler_type=s.lr_decay if s.lr_decay == "linear" else "constant_with_warmup",
        warmup_steps=samr1_mini.WARMUP * updates,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=samr1_mini.MAX_GRAD_NORM,
        activation_checkpointing=s.save_memory >= 2,
        ddp_find_unused_parameters=False,  # every weight of the adapter gets a gradient
        use_cpu=policy.device.type == "cpu",
        bf16=policy.model.dtype == torch.bfloat16,
        fp16=policy.model.dtype == torch.float16,
        logging_steps=updates,
        log_completions=True,  # all completions with their rewards, in checkpoint/completions
        num_completions_to_print=0,
        save_steps=s.save_every * updates,
        save_total_limit=1,
        report_to=[],
    )


def open_run(s, out: Path) -> str | None:
    """Prepare the folder of the run. Returns the checkpoint to continue from, or None."""
    checkpoint, steps = None, 0
    if s.resume:
        folder = out / "checkpoint"
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is None:
            raise ValueError("no checkpoint was saved there yet: start again with --overwrite")
        steps = int(checkpoint.rpartition("-")[2]) // (s.epochs * s.minibatches)
    if PartialState().is_main_process:
        runs.open_run(out, "trl", s.resume, s.overwrite, [s.vlm, s.sam, s.data])
        runs.start_metrics(out, s, steps)
    return checkpoint


def train(s) -> Path:
    """Train with TRL. Returns the folder of the run."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        print(f"trl_grpo.py: {error}: pip install trl", file=sys.stderr)
        raise SystemExit(2) from error
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    process = PartialState(cpu=not gpu)  # knows its device and the number of processes
    out = Path(s.out or f"runs/trl-{samr1_mini.run_name(s)}-{s.seed}")
    with exit_on_error(f"--data {s.data}"):
        dataset = load_data(s.data, "train", s.data_seed, s.train_samples)
    with exit_on_error(f"--sam {s.sam}"):
        sam = load_sam(s.sam)
    policy = load_vlm(s.vlm, str(process.device), s.side, s.prompt, dtype=s.dtype)
    with exit_on_error("--prompts_per_step"):
        arguments = trl_arguments(s, out, policy, process.num_processes)
    with exit_on_error(f"--out {out}"):
        checkpoint = open_run(s, out)
    encoder_batch = 8 if s.sam == "tiny" else 1  # images
    scorer = SamScorer(sam, policy.device, encoder_batch, offload=s.save_memory >= 3)
    samples = Samples(dataset, policy, keep=2 * s.prompts_per_step)  # accelerate reads ahead
    lora = dict(r=s.lora_rank, lora_alpha=2 * s.lora_rank, task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.processor,
        reward_funcs=trl_reward(scorer, samples, s.accuracy),
        train_dataset=Dataset.from_dict({"index": range(len(dataset))}),
        peft_config=LoraConfig(target_modules=samr1_mini.LORA_TARGETS, **lora),
        args=GRPOConfig(**arguments),
        callbacks=[MetricsFile(out / "metrics.jsonl", s.epochs * s.minibatches)],
    )
    trainer.data_collator = samples.rows  # TRL's own returns the rows of the data set as they are
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out / "adapter"))
    return out


def main(argv: list[str] | None = None) -> None:
    out = train(parse_settings(sys.argv[1:] if argv is None else argv))
    if PartialState().is_main_process:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        runs.save_figure(pictures.curves(metrics), out / "curves.png")
        first, last = (metrics[k]["reward"] for k in (0, -1))
        print(f"mean reward (of 6): {first:.2f} -> {last:.2f} (first and last step)")
        print(f"evaluate it: python samr1_mini.py eval --adapter {out}/adapter")


if __name__ == "__main__":
    main()

"""trl_grpo.py - train with this repository's reward in TRL's GRPOTrainer, on several GPUs.

    pip install trl
    python -m examples.trl_grpo                                         one process
    accelerate launch --num_processes 4 -m examples.trl_grpo --preset qwen3b --data refcocog:data
    accelerate launch --multi_gpu --num_processes 2 -m examples.trl_grpo        also without a GPU

Presets and flags are those of `samr1_mini.py train`, without --device, --adapter, --track and
--dtype 4bit. All processes together complete --prompts_per_step prompts in a step. Each has its own
copy of policy and SAM.

A run has the files of README's table, without evaluation and pictures of samples. TRL's own files
are in RUN/checkpoint; checkpoint/completions holds every completion with its reward and advantage.
--resume continues from the last checkpoint. Ctrl-C loses the steps since then.

Different from samr1_mini.py: TRL computes the prompt again for every completion. All tokens of an
update have equal weight there; here, all tokens of a group. TRL does not sample the vision tokens,
but includes them in the log-probs.

Not tried yet: GPUs and several machines.
DeepSpeed: pip install "trl[deepspeed]", then accelerate launch --use_deepspeed --zero_stage 2 ...
vLLM: pip install "trl[vllm]", then add use_vllm=True and vllm_mode="colocate" to `trl_arguments`,
and replace suppress_tokens, which vLLM does not have, by logit_bias={t: -100.0 for t in banned}.
"""

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import TrainerCallback

import samr1_mini
from data import Sample, messages
from plumbing import pictures, runs
from plumbing.errors import UserError, exit_with_one_line
from plumbing.foreign import continue_adapter
from plumbing.settings import Settings, parse
from plumbing.sources import load_data
from plumbing.vlm import Policy, load_vlm
from reward import SamScorer, score_completions

# Our names in metrics.jsonl, by TRL's. The first five are logged by the reward.
SAME = "iou accuracy think_format answer_format skipped reward kl entropy grad_norm".split()
METRICS = {name: name for name in SAME} | {
    "learning_rate": "lr",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "equal_groups",
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
}


def parse_settings(argv: list[str]) -> Settings:
    """The settings of `train`. Raises UserError if one is given that has no effect here."""
    s = parse(Settings, argv, program="python -m examples.trl_grpo")
    given = {argument.partition("=")[0] for argument in argv}
    if unused := given & {"--device", "--adapter", "--track"}:
        raise UserError(f"{', '.join(unused)}: no effect here: leave it out")
    if s.dtype == "4bit":
        raise UserError("--dtype 4bit: not here: use samr1_mini.py train")
    return s


class Samples:
    """The samples of a data set by index, and TRL's rows made from them.

    TRL gets a data set of indices. The last `keep` samples are kept, because TRL asks for each one
    once per completion. One that cannot be used is reported, counted and replaced by the next one.
    """

    def __init__(self, dataset, policy: Policy, keep: int):
        self.dataset = dataset
        self.policy = policy
        self.skipped = 0  # samples that could not be used
        self.read = lru_cache(keep)(self._read)

    def _read(self, index: int) -> Sample:
        (sample,), skipped = runs.load_samples(self.dataset, [index])
        self.skipped += skipped
        return sample

    def rows(self, batch: list[dict]) -> list[dict]:
        """Rows with an index, and the prompt and the resized image that TRL gives to the policy."""
        found = []
        side = self.policy.side
        for row in batch:
            sample = self.read(row["index"])
            chat = messages(sample.query, self.policy.style, self.policy.units, side)
            found.append(row | {"prompt": chat, "image": sample.image.resize((side, side))})
        return found


def trl_reward(scorer: SamScorer, samples: Samples, accuracy: str) -> Callable:
    """`reward.score_completions` in the form that TRL's trainers call.

    Returns a function from N completions (conversations that end with one) and their column `index`
    to N rewards. A process gets a part of the global batch, so its groups may be incomplete.
    """
    policy = samples.policy

    def sam_reward(completions, index, log_metric=None, log_extra=None, **_) -> list[float]:
        distinct = list(dict.fromkeys(index))  # B samples
        rows = [distinct.index(number) for number in index]
        columns = [rows[:k].count(row) for k, row in enumerate(rows)]
        # Groups may differ in size. Empty texts fill up the smaller ones: SAM skips them.
        texts = [[""] * (max(columns) + 1) for _ in distinct]
        for row, column, completion in zip(rows, columns, completions, strict=True):
            texts[row][column] = policy.opening + completion[-1]["content"]
        batch = [samples.read(number) for number in distinct]
        scores = score_completions(
            scorer, batch, texts, extent=policy.extent, accuracy=accuracy, style=policy.style
        )  # (B, G)

        def values(name: str) -> list[float]:
            return getattr(scores, name)[rows, columns].tolist()

        if log_metric:
            for name in ("iou", "accuracy", "think_format", "answer_format"):
                log_metric(name, sum(values(name)) / len(index))
            log_metric("skipped", float(samples.skipped))
            samples.skipped = 0
        if log_extra:
            log_extra("index", index)
        return values("reward")

    return sam_reward


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl, and ends a training that diverges before its step is saved.

    In float16 an update is skipped if its gradient overflows.
    """

    def __init__(self, file: Path, updates: int):
        self.file = file
        self.updates = updates

    def on_log(self, args, state, control, logs=None, **_) -> None:
        row = {ours: logs[name] for name, ours in METRICS.items() if name in logs}
        for name, value in row.items():
            if not math.isfinite(value) and not (name == "grad_norm" and args.fp16):
                raise UserError(
                    f"--lr {args.learning_rate:g}: the training diverged ({name} is {value}): "
                    "lower --lr; the last checkpoint stays"
                )
        if state.is_world_process_zero and "reward" in logs:
            runs.append_lines(self.file, [{"step": state.global_step // self.updates} | row])


def trl_arguments(s: Settings, policy: Policy, processes: int) -> dict:
    """The arguments of GRPOConfig, without its folder. Raises UserError.

    A step of ours is one generation of TRL's, with epochs x minibatches updates.
    """
    G = s.group_size
    updates = s.epochs * s.minibatches
    share, rest = divmod(s.prompts_per_step * G, s.minibatches * processes)
    if rest:
        raise UserError(
            f"--prompts_per_step: {processes} processes x {s.minibatches} mini-batches cannot "
            f"share {s.prompts_per_step} x {G} completions: use a multiple"
        )
    rows = math.gcd(share, G) if s.save_memory else share  # of completions in a pass
    return dict(
        seed=s.seed,
        max_steps=s.steps * updates,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        steps_per_generation=s.minibatches * share // rows,
        num_iterations=s.epochs,
        num_generations=G,
        max_completion_length=s.max_new_tokens,
        temperature=s.temperature,
        generation_kwargs={"suppress_tokens": policy.banned.tolist()},
        loss_type={"token": "dapo", "sequence": "grpo"}[s.normalise],
        epsilon=0.2,
        epsilon_high=s.eps_high,
        beta=s.beta,
        learning_rate=s.lr,
        lr_scheduler_type="linear",
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
        save_steps=samr1_mini.SAVE_EVERY * updates,
        save_total_limit=1,
        report_to=[],
    )


def open_run(s: Settings, process: PartialState) -> tuple[Path, str | None, int]:
    """The folder of the run, the checkpoint to continue from or None, and its steps."""
    out = [None]  # the main process chooses the folder
    if process.is_main_process:
        out = [runs.open_run(s, f"runs/trl-{samr1_mini.run_name(s)}-{s.seed}")]
    (out,) = broadcast_object_list(out)
    # TRL writes this file last. Without it, a kill or a full disk has cut the checkpoint short.
    complete = (out / "checkpoint").glob("checkpoint-*/trainer_state.json") if s.resume else ()
    by_updates = {int(file.parent.name.rpartition("-")[2]): str(file.parent) for file in complete}
    if s.resume and not by_updates:
        raise UserError(f"--resume: {out} has no checkpoint yet: start another run")
    updates = max(by_updates, default=0)
    steps = updates // (s.epochs * s.minibatches)
    if process.is_main_process:
        runs.start_metrics(out, s, steps)
    return out, by_updates.get(updates), steps


def train(s: Settings) -> None:
    """Train with TRL, and write the files of the run."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"{error}: pip install trl") from error
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    process = PartialState(cpu=not gpu)  # knows its device and the number of processes
    dataset = load_data(s.data, "train", s.train_samples)
    policy = load_vlm(s.vlm, str(process.device), side=s.side, prompt=s.prompt, dtype=s.dtype)
    scorer = samr1_mini.load_scorer(s, policy.device)
    arguments = trl_arguments(s, policy, process.num_processes)
    out, checkpoint, done = open_run(s, process)
    samples = Samples(dataset, policy, keep=2 * s.prompts_per_step)  # accelerate reads ahead
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.processor,
        reward_funcs=trl_reward(scorer, samples, s.accuracy),
        train_dataset=Dataset.from_dict({"index": range(len(dataset))}),
        peft_config=LoraConfig(
            r=s.lora_rank,
            lora_alpha=2 * s.lora_rank,
            target_modules=samr1_mini.LORA_TARGETS,
            task_type="CAUSAL_LM",
        ),
        args=GRPOConfig(output_dir=str(out / "checkpoint"), **arguments),
        callbacks=[MetricsFile(out / "metrics.jsonl", s.epochs * s.minibatches)],
    )
    trainer.data_collator = samples.rows  # TRL's own returns the rows of the data set as they are
    if checkpoint:  # TRL reads it too, but would train on without weights that do not fit
        continue_adapter(trainer.model, checkpoint)
    with runs.writing(out):
        if done < s.steps:
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(out / "adapter"))
    if process.is_main_process:
        runs.share_weights(out / "adapter")
        if metrics := runs.read_rows(out / "metrics.jsonl", runs.METRICS):
            runs.save_figure(pictures.curves(metrics), out / "curves.png")
            first, last = (metrics[k]["reward"] for k in (0, -1))
            print(f"mean reward (of 6): {first:.2f} -> {last:.2f} (first and last step)")
        print(f"evaluate it: python samr1_mini.py eval --adapter {out}/adapter")


def main(argv: list[str]) -> None:
    train(parse_settings(argv))


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

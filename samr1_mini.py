"""samr1_mini.py - SAM-R1 (arXiv 2505.22596) in one story: settings, policy, training, evaluation, segmentation.

    python samr1_mini.py train                                        the embedded default: minutes on a laptop
    python samr1_mini.py eval    --adapter RUN/adapter                gIoU and cIoU on held-out samples
    python samr1_mini.py segment --image FILE --query "..." --out out.png
    python samr1_mini.py report  RUN                                  curves, steps and rollouts as one web page
    python samr1_mini.py train --help                                 every setting, with its reason

What happens in a training step (paper, fig. 2), and where it is written:

    B samples                               data.py
    -> G completions each                   grpo.rollout
    -> masks, IoU, rewards                  reward.score_completions
    -> advantages within each group         grpo.group_advantages
    -> log-probs: policy, old, reference    grpo.group_logprobs
    -> clipped loss with KL term, AdamW     grpo.grpo_loss

Where this departs from the paper: LoRA on a small VLM in place of full fine-tuning of 7 billion weights on eight GPUs; SAM 1
in place of SAM 2; and what the paper leaves open, marked *assumed* beside each setting.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":  # during the imports below, which take seconds, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from assets import pictures, report
from benchmarks.memory import expected_memory, print_memory
from data import BadSample, Sample, load_data, messages
from grpo import Completions, Prompts, clip_side, encode_prompts, group_advantages, group_logprobs, grpo_loss, rollout
from reward import (
    ACCURACY_REWARDS,
    TIERS,
    SamPrompt,
    SamScorer,
    Scores,
    load_sam,
    parse_answer,
    sam_prompt,
    score_completions,
)

try:
    import resource  # peak memory of the process
except ImportError:  # Windows has no such module
    resource = None

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Defaults are those of the embedded models; a preset changes some; a flag given by hand wins.
# ---------------------------------------------------------------------------------------------------------------------


def setting(default, meaning: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": meaning} | ({"choices": list(choices)} if choices else {}))


@dataclass
class Settings:
    # What to run on
    preset: str = setting("tiny", "tiny, qwen3b or qwen7b: fills in the settings below", ("tiny", "qwen3b", "qwen7b"))
    vlm: str = setting("tiny", "the policy: tiny, a Hugging Face name, or a local folder. Paper: Qwen2.5-VL-7B")
    sam: str = setting("tiny", "the segmenter: tiny, or vit_b|vit_l|vit_h:CHECKPOINT. Paper: SAM2-Large")
    data: str = setting("shapes", "shapes, or refcocog|refcoco|refcoco+|reasonseg:ROOT[/SPLIT]. Paper: RefCOCOg")
    train_samples: int = setting(3000, "expressions to draw from RefCOCO's training split. Paper: 3,000 of 104,560")
    data_seed: int = setting(0, "of that draw, and of the drawn scenes; the --seed of data.py fetch")
    out: str = setting("", "train, eval, merge: folder to write (default: one in runs/); segment: the picture")
    seed: int = setting(0, "of the adapter's first weights, the order of the data, and sampling")
    device: str = setting("auto", "auto takes cuda, then mps, then cpu")
    # What the policy sees and says
    side: int = setting(64, "side of the square that each image is resized to for the policy, pixels. Paper: 840")
    prompt: str = setting("brief", "full explains the task; brief is the query alone, for a model that knows it", ("full", "brief"))
    coordinates: str = setting(
        "auto",
        "how the policy writes coordinates: pixels of the image it sees, or thousandths; auto: thousandths for Qwen3-VL, else pixels",
        ("auto", "pixels", "thousandths"),
    )
    # Rollout
    prompts_per_step: int = setting(8, "B, prompts in a step. *Assumed*: the paper does not say")
    group_size: int = setting(8, "G, completions for each prompt. Paper: 8")
    max_new_tokens: int = setting(48, "longest completion, tokens; a right answer of the tiny model takes 30")
    temperature: float = setting(1.0, "of sampling. *Assumed*; at 1 the sampled distribution is the trained one")
    top_p: float = setting(1.0, "nucleus sampling; 1 is off. *Assumed*")
    # Reward
    accuracy: str = setting("tiered", "accuracy reward: tiered (paper), 4 above a fixed IoU, or 4 x the IoU (Table 3)", ACCURACY_REWARDS)
    # Objective
    eps_low: float = setting(0.2, "clip below, 1 - eps_low. Paper: the usual 0.2")
    eps_high: float = setting(0.3, "clip above, 1 + eps_high. Paper: 0.3")
    beta: float = setting(0.005, "weight of the KL to the reference. *Assumed* (Seg-Zero's); the paper keeps the term, fig. 4a")
    normalise: str = setting("token", "token: every token of a group weighs the same (paper); sequence: GRPO's mean", ("token", "sequence"))
    # Optimisation
    steps: int = setting(200, "rollouts to learn from. Measured: the tiny model has levelled off by then")
    epochs: int = setting(2, "passes over a step's completions. *Assumed*; a second one gives the clip more to do")
    minibatches: int = setting(2, "updates a pass, each on its share of the prompts. With one update a step the clip never acts")
    lr: float = setting(1e-3, "AdamW's learning rate, of the adapter. Paper: 1e-6 for full fine-tuning")
    lr_decay: str = setting("linear", "linear (to zero at the last step) or constant. *Assumed*", ("linear", "constant"))
    warmup: int = setting(10, "steps over which the learning rate rises. *Assumed*")
    weight_decay: float = setting(0.0, "AdamW's. *Assumed*")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm. *Assumed*")
    lora_rank: int = setting(16, "rank of the adapter, on every linear of the language model. Not in the paper: it trains all weights")
    lora_alpha: int = setting(32, "its scale: the update counts alpha / rank. Not in the paper")
    # Memory against speed
    threads: int = setting(1, "CPU threads, 0 leaves it to torch. The tiny models' matrices are too small to be shared out")
    prompts_per_pass: int = setting(8, "prompts (each with its G completions) in one forward and backward pass")
    rollout_prompts: int = setting(64, "prompts decoded together, times G completions")
    checkpoint_layers: bool = setting(False, "recompute the language model's layers in the backward pass")
    sam_batch: int = setting(8, "images that SAM encodes at once")
    sam_prompts: int = setting(64, "prompts that SAM decodes in one call, at most: a CPU takes fewer of an official SAM")
    sam_offload: bool = setting(False, "keep SAM in the host's memory while it is not asked")
    logits_chunk: int = setting(4096, "token positions that go through the lm_head at once; 256 at a vocabulary of 151,936")
    # Evaluation and files
    eval_samples: int = setting(256, "held-out samples in the evaluation before and after training")
    eval_batch: int = setting(64, "of them at a time")
    sample_every: int = setting(50, "steps between pictures of the fixed held-out scenes, and redrawn curves")
    save_every: int = setting(25, "steps between checkpoints")
    resume: bool = setting(False, "go on from the checkpoint in --out, exactly")
    overwrite: bool = setting(False, "delete an existing run in --out")
    dry_run: bool = setting(False, "train: print the memory that is expected, by part, and stop; downloads no weights")
    adapter: str = setting("none", "eval, segment, merge: folder of a trained adapter, or none for the base model")
    limit: int = setting(0, "eval: only the first so many samples; 0 is all, of the drawn scenes --eval_samples")
    image: str = setting("", "segment: the picture")
    query: str = setting("", "segment: what to find in it")


# One 24 GB GPU. Paper: 840 x 840, G = 8, eps 0.2 / 0.3, 3,000 samples. *Assumed*: all else. 375 steps of 8 prompts are one pass.
QWEN = dict(
    sam="vit_h:sam_vit_h_4b8939.pth", data="refcocog:data", side=840, prompt="full", max_new_tokens=512, steps=375, lr=1e-5,
    lr_decay="constant", minibatches=2, epochs=1, lora_rank=32, lora_alpha=64, threads=0, prompts_per_pass=1,
    rollout_prompts=8, checkpoint_layers=True, logits_chunk=256, sam_batch=1, eval_batch=8, sample_every=25,
)  # fmt: skip
PRESETS = {
    "tiny": {},
    "qwen3b": QWEN | {"vlm": "Qwen/Qwen2.5-VL-3B-Instruct"},
    "qwen7b": QWEN | {"vlm": "Qwen/Qwen2.5-VL-7B-Instruct", "rollout_prompts": 4, "sam_offload": True, "sam_prompts": 16},
}


# What --resume may be given anew: how far, where things lie, and how they are computed. All else is the run's own.
MAY_CHANGE = """steps vlm sam data device out threads prompts_per_pass rollout_prompts checkpoint_layers sam_batch sam_prompts
    sam_offload logits_chunk eval_batch sample_every save_every limit""".split()


def parse_settings(command: str, argv: list[str]) -> Settings:
    """Settings of a command line: defaults, then the preset's or, with --resume, the run's own, then the flags."""

    class Parser(HfArgumentParser):
        def error(self, message: str):
            self.exit(2, f"samr1_mini.py {command}: {message} (--help lists the flags)\n")

    def parser() -> Parser:
        return Parser(
            Settings,
            prog=f"samr1_mini.py {command}",
            usage="%(prog)s [--flag value ...]",
            description=f"{COMMANDS[command].__doc__.strip()} Settings and their reasons:",
            allow_abbrev=False,
        )

    given = parser().parse_args(argv)
    filled = parser()
    filled.set_defaults(**PRESETS[given.preset])
    saved = {}
    if given.resume:
        with blame("--resume"):
            if not given.out or given.overwrite:
                raise ValueError("name the run with --out, and leave --overwrite out")
            saved = json.loads((Path(given.out) / "config.json").read_text()) | {"resume": True}
            filled.set_defaults(**saved)
    s = Settings(**vars(filled.parse_args(argv)))
    if changed := [f"--{name}" for name, value in saved.items() if getattr(s, name) != value and name not in MAY_CHANGE]:
        filled.error(f"--resume goes on with the run's own {', '.join(changed)}: leave that out, or start another run")
    for name in ("side", "prompts_per_step", "max_new_tokens", "epochs", "minibatches", "lora_rank", "prompts_per_pass",
                 "rollout_prompts", "logits_chunk", "train_samples", "sam_batch", "sam_prompts", "eval_samples", "eval_batch", "sample_every", "save_every"):  # fmt: skip
        if getattr(s, name) < 1:
            filled.error(f"--{name} must be at least 1")
    if s.steps < 0 or s.limit < 0:
        filled.error("--steps and --limit must not be negative")
    if s.group_size < 2:
        filled.error("--group_size must be at least 2: the advantage compares the completions of a group")
    if s.minibatches > s.prompts_per_step:
        filled.error("--minibatches must not exceed --prompts_per_step")
    if not (s.temperature > 0 and 0 < s.top_p <= 1 and s.lr > 0 and s.beta >= 0 and 0 <= s.eps_low < 1 and s.eps_high >= 0):
        filled.error("--temperature and --lr must be above 0, --top_p in (0, 1], --eps_low in [0, 1), --beta and --eps_high not negative")
    return s


@contextlib.contextmanager
def blame(flag: str, errors: tuple = (OSError, ValueError, KeyError, RuntimeError)):
    """Turn what goes wrong while a file is read or written into one line that names it, and exit code 2. Only around that: an
    error anywhere else is a bug and keeps its traceback."""
    try:
        yield
    except errors as error:
        tqdm.write(f"samr1_mini.py: {flag}: {' '.join(str(error).split())[:400]}", file=sys.stderr)  # not amid a bar
        raise SystemExit(2) from error


# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Policy:
    """A VLM with its processor, and what the rest must know about it."""

    model: torch.nn.Module
    processor: object
    device: torch.device
    side: int  # of the image it sees, pixels
    prompt: str  # "full" or "brief"
    coordinates: str  # "pixels" or "thousandths"
    end: torch.Tensor  # (E,) tokens that end a completion
    banned: torch.Tensor  # tokens that it must not write

    @property
    def frame(self) -> float:
        """The number that it writes for the far edge of the image."""
        return self.side if self.coordinates == "pixels" else 1000

    def read(self, samples: list[Sample]) -> Prompts:
        """Put images and queries to the vision tower and the tokenizer. Aspect ratio is not kept (paper, sec. 4.1)."""
        talks = [messages(one.query, self.prompt, self.coordinates, self.side) for one in samples]
        texts = self.processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        images = [one.image.resize((self.side, self.side)) for one in samples]
        inputs = self.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        return encode_prompts(self.model, inputs)

    def texts(self, completions: Completions) -> list[list[str]]:
        """Completions as B lists of G texts, without their end-of-text tokens."""
        tokens = zip(completions.ids.tolist(), completions.mask.sum(-1).tolist(), strict=True)
        rows = [[ids[:n] for ids, n in zip(group, lengths, strict=True)] for group, lengths in tokens]
        return [self.processor.batch_decode(group, skip_special_tokens=True) for group in rows]


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: leave the flag out")
    torch.zeros(1, device=name)  # any other unknown or missing device fails here
    torch.set_flush_denormal(True)  # on the CPU, vanishing probabilities would otherwise be computed at a snail's pace
    return torch.device(name)


LORA_TARGETS = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"  # every linear layer; never the vision tower


def vlm_folder(s: Settings) -> str:
    return str(HERE / "tiny" / "vlm") if s.vlm == "tiny" else s.vlm


def load_policy(s: Settings) -> Policy:
    """Load the VLM that the settings name, with a fresh adapter or, with --adapter, a trained one."""
    with blame(f"--device {s.device}"):
        device = choose_device(s.device)
    if s.threads:
        torch.set_num_threads(s.threads)
    folder = vlm_folder(s)
    with blame(f"--vlm {s.vlm}"):
        if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
            raise FileNotFoundError("there is no such folder: give one that save_pretrained wrote, or a Hugging Face name")
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation="sdpa",  # grpo.group_logprobs relies on its boolean masks
        ).to(device)
        patch = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    coordinates = s.coordinates
    if coordinates == "auto":
        coordinates = "thousandths" if model.config.model_type.startswith("qwen3_vl") else "pixels"
    with blame(f"--side {s.side}"):
        if coordinates == "pixels" and s.side % patch:
            raise ValueError(f"the model would see another size than this one: take a multiple of {patch}")
    torch.manual_seed(s.seed)  # of the adapter's weights
    if s.adapter == "none":
        lora = LoraConfig(
            r=s.lora_rank,
            lora_alpha=s.lora_alpha,
            target_modules=LORA_TARGETS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    else:
        with blame(f"--adapter {s.adapter}"):
            if not (Path(s.adapter) / "adapter_config.json").is_file():
                raise FileNotFoundError("no adapter there: name a folder with adapter_config.json, such as RUN/adapter")
            model = PeftModel.from_pretrained(model, s.adapter)
    if s.checkpoint_layers:
        layers = model.get_base_model().model.language_model
        enable = getattr(layers, "activation_checkpointing_enable", None) or layers.gradient_checkpointing_enable  # renamed in 5.23
        enable({"use_reentrant": False})
    tokens = processor.tokenizer
    ends = model.generation_config.eos_token_id or tokens.eos_token_id
    config = model.config
    vision = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    return Policy(
        model.eval(),
        processor,
        device,
        s.side,
        s.prompt,
        coordinates,
        torch.tensor([ends] if isinstance(ends, int) else ends, device=device),
        torch.tensor(vision, device=device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(s: Settings) -> None:
    """`train`: evaluation, GRPO, evaluation, table; README says what is written where."""
    if s.dry_run:
        with blame(f"--vlm {s.vlm}"):
            expected = expected_memory(s, vlm_folder(s), LORA_TARGETS)
        return print_memory(expected)
    out = Path(s.out or f"runs/{run_name(s)}-{s.seed}")
    policy, scorer, samples, heldout = load_all(s, out)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # and not None: AdamW's averages go on where no group teaches anything
    optimizer = torch.optim.AdamW(trained, s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay)
    generator = torch.Generator(policy.device).manual_seed(s.seed)  # of sampling; its state is part of a checkpoint
    metrics, results, first = [], {}, 0
    if s.resume:
        with blame(f"--resume {out}"):
            first = load_checkpoint(out, policy, optimizer, generator)
        save_settings(out, s)  # of what may change, the latest
        lines = (out / "metrics.jsonl").read_text().splitlines()[:first]  # steps after the checkpoint are done again
        metrics, results = [json.loads(line) for line in lines], json.loads((out / "eval.json").read_text())
        write_text(out / "metrics.jsonl", "".join(line + "\n" for line in lines))
    else:
        save_settings(out, s)
        write_text(out / "metrics.jsonl", "")
        results["before"], results["ceiling"] = summary(evaluate(policy, scorer, heldout, s, "before"))
        write_text(out / "eval.json", json.dumps(results, indent=2))

    def logprobs(prompts: Prompts, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        return group_logprobs(policy.model, prompts, completions, policy.banned, s.temperature, s.logits_chunk)

    unwritten = f"--out {out} cannot be written (what is there is whole: make room, then --resume)"
    stop = Stop()
    bar = tqdm(range(first, s.steps), desc="train", unit="step", initial=first, total=s.steps)
    for step in bar:
        started, phase, done = time.perf_counter(), Phases(policy.device), step + 1
        drawn = done % s.sample_every == 0 or done in (1, s.steps)  # its rollouts are logged, with their masks
        share = min(1.0, (step + 1) / max(s.warmup, 1)) * (1 - step / s.steps if s.lr_decay == "linear" else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * share

        # 1. Rollout: B prompts, G completions each. The images go through the vision tower here and nowhere else.
        batch, skipped = load_samples(samples, indices(step, s.prompts_per_step, len(samples), s.seed))
        policy.model.eval()
        prompts = policy.read(batch)
        completions = sample(policy, prompts, s, generator)
        phase.end("rollout")

        # 2. Reward and advantages.
        scores = score_completions(scorer, batch, policy.texts(completions), policy.frame, s.accuracy, keep_masks=drawn)
        advantages = group_advantages(scores.reward)  # (B, G)
        phase.end("reward")

        # 3. A group whose rewards are all equal has advantages of zero. Without a KL term it teaches nothing, and no pass is
        #    made for it; with one its tokens are still drawn back to the reference.
        teaches = advantages.any(1) if s.beta == 0 else torch.ones(len(batch), dtype=torch.bool)
        kept = teaches.nonzero()[:, 0].tolist()
        place = [0, *teaches.cumsum(0).tolist()]  # where prompt b, or the next that is kept, stands among the kept ones
        asked, told, gains = prompts[kept], completions[kept], advantages[kept].to(policy.device)
        mask = told.mask.to(policy.device)

        # 4. Log-probs that stay fixed during the updates: of the reference (the base model: adapter off), and of the
        #    policy as it sampled. With a single update the latter are the new ones, detached, and need no pass.
        minibatches = split(0, s.prompts_per_step, -(-s.prompts_per_step // s.minibatches)) * s.epochs
        reference, old, new = (torch.zeros(mask.shape, device=policy.device) for _ in range(3))
        with torch.no_grad():
            for rows in split(0, len(kept), s.prompts_per_pass):
                if s.beta > 0:
                    with policy.model.disable_adapter():
                        reference[rows] = logprobs(asked[rows], told[rows])[0]
                if len(minibatches) > 1:
                    old[rows] = logprobs(asked[rows], told[rows])[0]
        phase.end("logprobs")

        # 5. Updates. Gradients add up over the passes of a mini-batch, so the result does not depend on their number.
        policy.model.train()  # only for gradient checkpointing: there is no dropout
        log, weights, norms = [], [], []
        for minibatch in minibatches:
            for rows in split(place[minibatch.start], place[minibatch.stop], s.prompts_per_pass):
                now, entropy = logprobs(asked[rows], told[rows])
                new[rows] = now.detach()
                if len(minibatches) == 1:
                    old[rows] = now.detach()
                loss, statistics = grpo_loss(
                    now, old[rows], reference[rows], gains[rows], mask[rows], s.eps_low, s.eps_high, s.beta, s.normalise
                )
                weights.append((rows.stop - rows.start) / (minibatch.stop - minibatch.start))
                (loss * weights[-1]).backward()
                statistics["entropy"] = entropy.sum() / mask[rows].sum()
                log.append(torch.stack(list(statistics.values())) * weights[-1])
            norms.append(torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        phase.end("update")

        # 6. Log, save, draw.
        row = describe(done, scores, completions, policy) | {"skipped": skipped}
        means = (torch.stack(log).sum(0) / sum(weights)).tolist() if log else (0.0, 1.0, 0.0, 0.0, None)
        row |= dict(zip(("kl", "ratio", "clip_low", "clip_high", "entropy"), means, strict=True))
        row |= {"grad_norm": torch.stack(norms).mean().item(), "lr": s.lr * share}
        row |= {f"seconds_{name}": seconds for name, seconds in phase.seconds.items()}
        row |= {f"peak_mib_{name}": peak for name, peak in phase.peaks.items()}
        row |= {"tokens_per_second": completions.mask.sum().item() / (time.perf_counter() - started), "peak_mib": max(phase.peaks.values())}
        metrics.append(row)
        bar.set_postfix(reward=f"{row['reward']:.2f}", iou=f"{row['iou']:.2f}", kl=f"{row['kl']:.3f}")
        with blame(unwritten):
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if done % s.save_every == 0 or done == s.steps or stop.asked:
                save_checkpoint(out, done, policy, optimizer, generator)
        with blame(unwritten, (OSError,)):
            if drawn:
                clipped = torch.zeros(completions.ids.shape, dtype=torch.int32)  # in the last pass over each token
                clipped[kept] = clip_side((new - old).exp(), gains[..., None], s.eps_low, s.eps_high).cpu()
                taught = report.record(batch[:2], completions, scores, policy.processor.tokenizer, advantages, clipped)
                seen = look(policy, scorer, heldout, s)
                logged = {"step": done, "train": taught, "heldout": report.record(*seen, policy.processor.tokenizer)}
                write_text(out / "rollouts" / f"step_{done:05d}.json", json.dumps(logged))
                save_figure(pictures.groups(seen[0], policy.texts(seen[1]), seen[2]), out / "samples" / f"step_{done:05d}.png")
                save_figure(pictures.curves(metrics), out / "curves.png")
        if stop.asked and done < s.steps:
            bar.close()
            print(f"stopped after step {done}, all saved; go on with: python {os.path.relpath(__file__)} train --resume --out {out}")
            raise SystemExit(128 + stop.asked)

    results["after"], _ = summary(evaluate(policy, scorer, heldout, s, "after"))
    with blame(unwritten):
        write_text(out / "eval.json", json.dumps(results, indent=2))
    print_table(results, metrics, out)


def load_all(s: Settings, out: Path | None = None, training: bool = True):
    """Read everything that the settings name, and prepare the run's folder: whatever is wrong shows before any work."""
    with blame(f"--data {s.data}"):
        samples = load_data(s.data, "train", s.data_seed, s.train_samples) if training else None
        heldout = load_data(s.data, "heldout")
    with blame(f"--sam {s.sam}"):
        sam = load_sam(s.sam)
    policy = load_policy(s)
    if out:
        with blame(f"--out {out}"):
            open_run(out, s)
    return policy, SamScorer(sam, policy.device, s.sam_batch, s.sam_prompts, s.sam_offload), samples, heldout


def run_name(s: Settings) -> str:
    """<data>-<vlm>, fit for a file name."""
    return re.sub(r"[^\w.+]+", "-", f"{s.data}-{Path(s.vlm).name}")


def load_samples(dataset, chosen: list[int]) -> tuple[list[Sample], int]:
    """The chosen samples; one that cannot be used is told of and replaced by the next in the set. Returns how many were."""
    batch, skipped = [], 0
    for index in chosen:
        for attempt in range(100):
            try:
                batch.append(dataset[(index + attempt) % len(dataset)])
                break
            except BadSample as error:
                skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        else:
            raise SystemExit("samr1_mini.py: --data: 100 samples in a row cannot be used, see above; what is trained is saved")
    return batch, skipped


def open_run(out: Path, s: Settings) -> None:
    """Make the run's folder; never write over a run that is there unless asked to."""
    if s.resume:
        return
    if out.exists() and any(out.iterdir()):
        if not (out / "config.json").exists():
            raise ValueError("this folder holds other things than a run: name another one")
        if not s.overwrite:
            raise ValueError("a run is there already: go on with --resume, replace it with --overwrite, or name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def save_settings(out: Path, s: Settings) -> None:
    """What --resume goes on with."""
    write_text(out / "config.json", json.dumps(asdict(s) | {"out": str(out), "resume": False, "overwrite": False}, indent=2))


def split(start: int, stop: int, size: int) -> list[slice]:
    """Cut the rows start..stop into slices of `size`; the last one may be shorter."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(step: int, count: int, n: int, seed: int) -> list[int]:
    """Which `count` of n samples a step takes: every epoch in an order of its own, a function of its arguments alone (so
    that a resumed run goes on with the right ones)."""
    places = range(step * count, (step + 1) * count)
    return [int(permutation(seed, place // n, n)[place % n]) for place in places]


def sample(policy: Policy, prompts: Prompts, s: Settings, generator: torch.Generator | None = None, greedy: bool = False):
    """Complete all prompts, `rollout_prompts` at a time: G samples each, or the one greedy completion."""
    parts = [
        rollout(
            policy.model,
            prompts[start : start + s.rollout_prompts],
            1 if greedy else s.group_size,
            s.max_new_tokens,
            policy.end,
            policy.banned,
            0.0 if greedy else s.temperature,
            s.top_p,
            generator,
        )
        for start in range(0, len(prompts), s.rollout_prompts)
    ]
    longest = max(part.ids.shape[-1] for part in parts)
    ids = [F.pad(part.ids, (0, longest - part.ids.shape[-1])) for part in parts]
    mask = [F.pad(part.mask, (0, longest - part.mask.shape[-1])) for part in parts]
    return Completions(torch.cat(ids), torch.cat(mask))


class Stop:
    """Remembers that Ctrl-C or SIGTERM came, so that the step in hand can be finished. A second one ends the run at once."""

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.asked = number
        tqdm.write("stopping after this step (again: at once)")
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


class Phases:
    """Seconds and peak memory of each phase of a step. On a GPU the clock is read when the device is done."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.peaks, self.last = device, {}, {}, time.perf_counter()

    def end(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        self.peaks[name] = peak_mib(self.device)


def peak_mib(device: torch.device) -> float:
    """Peak memory, MiB: of the GPU since the last call, or of the process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def describe(step: int, scores: Scores, completions: Completions, policy: Policy) -> dict[str, float]:
    """What a step's rollouts were like, for the log."""
    lengths = completions.mask.sum(-1).float()
    row = {"step": step}
    for name in ("reward", "accuracy", "think_format", "answer_format", "iou"):
        row[name] = getattr(scores, name).mean().item()
    edges = [threshold for threshold, _ in TIERS] + [float("inf")]
    for (low, value), high in zip(TIERS, edges[1:], strict=True):
        row[f"tier_{value:.0f}"] = ((scores.iou > low) & (scores.iou <= high)).float().mean().item()
    row["tier_0"] = (scores.iou <= edges[0]).float().mean().item()
    row["equal_groups"] = (scores.reward.amax(1) == scores.reward.amin(1)).float().mean().item()
    row["length"] = lengths.mean().item()
    row["truncated"] = completions.truncated(policy.end).float().mean().item()
    return row


@contextlib.contextmanager
def whole_file(path: Path):
    """Write a file whole or not at all: under another name first, then renamed, which the file system does in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def save_figure(figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def look(policy: Policy, scorer: SamScorer, heldout, s: Settings, count: int = 4) -> tuple[list[Sample], Completions, Scores]:
    """A group of sampled completions for each of the same few held-out samples every time."""
    batch = load_samples(heldout, list(range(min(count, len(heldout)))))[0]
    policy.model.eval()
    dice = torch.Generator(policy.device).manual_seed(0)  # its own, so that looking does not disturb the run
    completions = sample(policy, policy.read(batch), s, dice)
    return batch, completions, score_completions(scorer, batch, policy.texts(completions), policy.frame, s.accuracy, keep_masks=True)


def save_checkpoint(out: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Save all that an exact resume needs as one file, and the adapter in peft's own format. The order of the data and the
    learning rate follow from the step."""
    weights = get_peft_model_state_dict(policy.model)
    state = {"step": step, "adapter": weights, "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    with whole_file(out / "checkpoint" / "state.pt") as temporary:
        torch.save(state, temporary)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # peft writes several files; each is put in its place whole
        policy.model.save_pretrained(folder)
        (out / "adapter").mkdir(exist_ok=True)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, out / "adapter" / file.name)


def load_checkpoint(out: Path, policy: Policy, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """Put a checkpoint's state in place and return its step."""
    file = out / "checkpoint" / "state.pt"
    if not file.is_file():
        raise FileNotFoundError("no checkpoint was saved there yet: start again with --overwrite")
    try:
        state = torch.load(file, map_location=policy.device, weights_only=True)
        set_peft_model_state_dict(policy.model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no checkpoint of this model and these settings: {error}") from error
    return state["step"]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def true_box(mask: np.ndarray) -> tuple[float, ...] | None:
    """The tightest box around a mask (H, W): x1, y1, x2, y2 in image pixels, x2 and y2 one past the last pixel."""
    if not mask.any():
        return None
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def judge(policy: Policy, scorer: SamScorer, batch: list[Sample], s: Settings) -> list[dict]:
    """Greedy answers to a batch, a row each: what was said, and how its mask and box meet the truth. `ceiling_*` is SAM
    prompted with the true box. Boxes and points in image pixels; intersection and union in pixels."""
    texts = [group[0] for group in policy.texts(sample(policy, policy.read(batch), s, greedy=True))]
    answers = [parse_answer(text) for text in texts]
    prompts = [sam_prompt(answer, policy.frame, *one.image.size) for answer, one in zip(answers, batch, strict=True)]
    truths = [SamPrompt(true_box(one.mask), ()) for one in batch]
    overlap = scorer.score(batch, [list(pair) for pair in zip(prompts, truths, strict=True)])
    numbers = [column.tolist() for column in (overlap.intersection, overlap.union, overlap.iou)]
    rows = []
    for one, text, answer, prompt, truth, meet, join, iou in zip(batch, texts, answers, prompts, truths, *numbers, strict=True):
        row = {"id": one.id, "query": one.query, "answer": text, "box": prompt.box, "points": prompt.points}
        row |= {"format": answer.think_format and answer.answer_format, "box_iou": box_iou(prompt.box, truth.box)}
        row |= {"intersection": meet[0], "union": join[0], "iou": iou[0]}
        rows.append(row | {"ceiling_intersection": meet[1], "ceiling_union": join[1], "ceiling_iou": iou[1]})
    return rows


def box_iou(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 if one is missing.

    >>> box_iou((0, 0, 4, 2), (2, 0, 6, 2))
    0.3333333333333333
    """
    if a is None or b is None:
        return 0.0
    meet = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return meet / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - meet)


def figures(rows: list[dict], of: str = "") -> dict[str, float]:
    """The paper's figures (sec. 4.1) from `judge`'s rows, of the policy or, with of="ceiling_", of SAM with the true box.

    giou: mean IoU of the samples. ciou: summed intersection / summed union. box: share of boxes with IoU above 0.5.

    >>> rows = [{"iou": 0.5, "intersection": 10, "union": 20, "format": True, "box_iou": 0.6}]
    >>> rows += [{"iou": 0.1, "intersection": 10, "union": 100, "format": False, "box_iou": 0.5}]
    >>> figures(rows)
    {'giou': 0.3, 'ciou': 0.16666666666666666, 'format': 0.5, 'box': 0.5, 'n': 2}
    """
    n = max(len(rows), 1)
    result = {"giou": sum(row[of + "iou"] for row in rows) / n}
    result["ciou"] = sum(row[of + "intersection"] for row in rows) / max(sum(row[of + "union"] for row in rows), 1)
    if not of:
        result |= {"format": sum(row["format"] for row in rows) / n, "box": sum(row["box_iou"] > 0.5 for row in rows) / n}
    return result | {"n": len(rows)}


def evaluate(policy: Policy, scorer: SamScorer, dataset, s: Settings, title: str, done: list[dict] = (), log=None) -> list[dict]:
    """`judge` on the first `eval_samples` of a data set; rows in `done` are not made again, new ones go to the file `log`.
    A sample that cannot be used gets a row that says why, and counts in no figure."""
    policy.model.eval()
    rows, n = list(done), min(s.eval_samples, len(dataset))
    for start in tqdm(range(len(rows), n, s.eval_batch), desc=f"eval {title}", unit="batch", leave=False):
        batch, fresh = [], []  # row k is about sample k, whether it could be used or not
        for index in range(start, min(start + s.eval_batch, n)):
            try:
                batch.append(dataset[index])
                fresh.append(None)
            except BadSample as error:
                fresh.append({"skipped": str(error)})
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        judged = iter(judge(policy, scorer, batch, s) if batch else [])
        fresh = [row or next(judged) for row in fresh]
        if log:
            log.write("".join(json.dumps(row) + "\n" for row in fresh))
            log.flush()
        rows += fresh
    return rows


def summary(rows: list[dict]) -> tuple[dict, dict]:
    """(figures of the policy, figures of the ceiling) over the rows that could be judged."""
    judged = [row for row in rows if "skipped" not in row]
    return figures(judged), figures(judged, "ceiling_")


def print_table(results: dict, metrics: list[dict], out: Path) -> None:
    """The figures of a run, side by side."""
    columns = {"giou": "gIoU", "ciou": "cIoU", "format": "format", "box": "box@0.5"}
    print(f"\n{'':12}{''.join(f'{title:>9}' for title in columns.values())}{'n':>7}")
    for name, row in sorted(results.items(), key=lambda item: item[0] == "ceiling"):  # the ceiling last
        print(f"{name:12}{''.join(f'{row[c]:9.3f}' if c in row else f'{chr(45):>9}' for c in columns)}{row['n']:7d}")
    if "before" in results and "after" in results:
        before, after, ceiling = (results[name]["giou"] for name in ("before", "after", "ceiling"))
        print(f"\ngap to the ceiling closed: {round(100 * (after - before) / max(ceiling - before, 1e-9))} %")
    if metrics:
        first = min(5, (len(metrics) + 1) // 2)
        last = min(20, max(1, len(metrics) - first))
        for name, label in (("reward", "mean reward (of 6)"), ("iou", "sampled mask IoU")):
            values = [row[name] for row in metrics]
            print(f"{label}: {np.mean(values[:first]):.2f} -> {np.mean(values[-last:]):.2f} (first {first} and last {last} steps)")
        print(f"ratio clipped below {np.mean([r['clip_low'] for r in metrics]):.2%}, above {np.mean([r['clip_high'] for r in metrics]):.2%} of tokens")
    print(f"written to {out}: {', '.join(sorted(p.name + '/' * p.is_dir() for p in out.iterdir()))}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


# What the paper reports (percent): policy Qwen2.5-VL-7B, segmenter SAM2-Large. Printed beside our figures, never mixed with them.
PAPER = {
    ("reasonseg", "val"): "gIoU 64.0, cIoU 55.8",
    ("reasonseg", "test"): "gIoU 60.2, cIoU 54.3",
    ("refcoco", "testA"): "cIoU 79.2",
    ("refcoco+", "testA"): "cIoU 74.7",
    ("refcocog", "test"): "gIoU 75.4, cIoU 73.1",
}


def evaluation(s: Settings) -> None:
    """`eval`: figures of an adapter, or of the base model, on a data set; a line a sample, and a sheet of pictures."""
    trained = "base" if s.adapter == "none" else re.sub(r"[^\w.+]+", "-", str(Path(s.adapter).resolve().parent.name))
    out = Path(s.out or f"runs/eval-{run_name(s)}-{trained}")
    policy, scorer, _, heldout = load_all(s, out, training=False)
    s.eval_samples = s.limit or len(heldout) if s.data != "shapes" else s.limit or s.eval_samples
    done = []
    if s.resume:
        lines = (out / "answers.jsonl").read_text().split("\n")[:-1]  # a line without an end was cut off
        done = [json.loads(line) for line in lines]
        write_text(out / "answers.jsonl", "".join(line + "\n" for line in lines))
    else:
        save_settings(out, s)
    with blame(f"--out {out} cannot be written (what is there is whole: make room, then --resume)", (OSError,)):
        with open(out / "answers.jsonl", "a") as log:
            rows = evaluate(policy, scorer, heldout, s, s.data, done, log)
        results = dict(zip((trained, "ceiling"), summary(rows), strict=True))
        write_text(out / "eval.json", json.dumps(results, indent=2))
        skipped = sum("skipped" in row for row in rows)
        if skipped < len(rows):
            save_figure(draw_sheet(rows, scorer, heldout), out / "sheet.png")
    print_table(results, [], out)
    if skipped:
        print(f"{skipped} samples could not be used and count in no figure")
    name, _, path = s.data.partition(":")
    if paper := PAPER.get((name, Path(path).name)):
        print(f"for comparison, SAM-R1 in the paper (7B policy, all weights trained, SAM2-Large), percent: {paper}")


def draw_sheet(rows: list[dict], scorer: SamScorer, dataset, count: int = 4):
    """A figure of the best, the median and the worst answers of an evaluation, `count` of each."""
    order = sorted((k for k, row in enumerate(rows) if "skipped" not in row), key=lambda k: -rows[k]["iou"])
    half = max(0, len(order) // 2 - count // 2)
    sheet = {"best": order[:count], "median": order[half : half + count], "worst": order[-count:]}
    chosen = sorted({k for picks in sheet.values() for k in picks})  # a sample may be in two rows, its image is encoded once
    batch = [dataset[k] for k in chosen]
    prompts = [SamPrompt(rows[k]["box"], rows[k]["points"]) for k in chosen]
    masks = scorer.score(batch, [[prompt] for prompt in prompts], keep_masks=True).masks
    drawn = {
        k: (one, prompt, mask[0].cpu().numpy(), rows[k]["iou"])
        for k, one, prompt, mask in zip(chosen, batch, prompts, masks, strict=True)
    }
    return pictures.sheet({title: [drawn[k] for k in picks] for title, picks in sheet.items()})


def segment(s: Settings) -> None:
    """`segment`: point out what a query means in one picture. Prints JSON, draws mask, box, points and reasoning."""
    with blame("--query"):
        if not s.query.strip():
            raise ValueError("say what to find in the image")
    with blame(f"--image {s.image}"):
        if not s.image:
            raise ValueError("name a picture")
        picture = Image.open(s.image)
        if picture.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel: convert it to 8 bits first")
        picture = picture.convert("RGB")
    out = Path(s.out or "segmented.png")
    with blame(f"--out {out}"):
        if out.is_dir():
            raise ValueError("this is a folder: name the picture to write")
    with blame(f"--sam {s.sam}"):
        sam = load_sam(s.sam)
    policy = load_policy(s)
    one = Sample(picture, s.query, np.zeros((picture.height, picture.width), bool), None, s.image)
    text = policy.texts(sample(policy, policy.read([one]), s, greedy=True))[0][0]
    scores = score_completions(SamScorer(sam, policy.device), [one], [[text]], policy.frame, keep_masks=True)
    answer, prompt, mask = scores.answers[0][0], scores.prompts[0][0], scores.overlap.masks[0][0].cpu().numpy()
    figure = pictures.found(picture, s.query, mask, prompt, answer.thought or text)
    with blame(f"--out {out}"):
        save_figure(figure, out)
    said = {"query": s.query, "bbox": prompt.box, "points": prompt.points, "mask_pixels": int(mask.sum()), "thought": answer.thought}
    print(json.dumps(said | {"completion": text, "picture": str(out)}))


def merge(s: Settings) -> None:
    """`merge`: write base model plus adapter as one model folder that plain transformers loads."""
    with blame("--adapter"):
        if s.adapter == "none":
            raise ValueError("name the adapter to merge, such as RUN/adapter")
    out = Path(s.out or f"runs/merged-{run_name(s)}")
    with blame(f"--out {out}"):
        if out.exists() and any(out.iterdir()):
            raise ValueError("this folder is not empty: name another one")
    policy = load_policy(s)
    original = AutoConfig.from_pretrained(vlm_folder(s)).dtype or torch.float32  # of the base model's file
    with blame(f"--out {out}"):
        policy.model.merge_and_unload().to(original).save_pretrained(out)
        policy.processor.save_pretrained(out)
    print(f"written to {out}: load it with AutoModelForImageTextToText.from_pretrained and AutoProcessor.from_pretrained")


def write_report(argv: list[str]) -> None:
    """`report RUN`: write RUN/report.html, one file with the run's curves, steps and rollouts, for any browser."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: samr1_mini.py report RUN\n\nwrites RUN/report.html: curves, steps and logged rollouts, in one file for any browser")
        raise SystemExit(argv not in (["-h"], ["--help"]) and 2)
    with blame(f"report {argv[0]}"):
        write_text(Path(argv[0]) / "report.html", report.report_html(Path(argv[0])))
    print(f"written to {Path(argv[0]) / 'report.html'}: open it in a browser")


COMMANDS = {"train": train, "eval": evaluation, "segment": segment, "merge": merge}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] == "report":  # the one command that takes a folder and no settings
        return write_report(argv[1:])
    if argv[0] not in COMMANDS:
        print(f"samr1_mini.py: no command is called {argv[0]!r}: use {', '.join(COMMANDS)}, report", file=sys.stderr)
        raise SystemExit(2)
    try:
        COMMANDS[argv[0]](parse_settings(argv[0], argv[1:]))
    except KeyboardInterrupt:  # outside of training steps, which `Stop` looks after
        print("samr1_mini.py: interrupted; eval goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1:])

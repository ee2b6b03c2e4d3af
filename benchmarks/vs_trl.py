"""vs_trl.py - one whole GRPO step, ours against TRL's GRPOTrainer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/vs_trl.py small                     the embedded default: 8 prompts x 8 completions of at most 48 tokens
    python benchmarks/vs_trl.py middle                    8 layers of width 512, 840 x 840 pixels, 1 prompt x 8 completions of 64 tokens
    python benchmarks/vs_trl.py learn [--seeds 0 1 2]     both train on the embedded default: do they learn the same?

Both sides get the same weights, the same first adapter, the same prompts in the same order, the same objective, one update a step with
AdamW, and as many threads. Ours is samr1_mini.train as it stands, without the evaluation before and after. A step's time is that from
one optimizer step to the next, so it holds all that is done for it. Rewards are by turns for the format alone, which costs nothing,
and through the tiny SAM, on both sides by this repository's SamScorer. Each side is a process of its own; they take a step in turns.
Memory is the most that a process held, less what it held before its first step. At last TRL's log-probs and gradients are compared
with ours, on the completions of its last step.

Where the two still differ: TRL finds its scenes drawn and resized, ours are drawn in the step. TRL's loss_type "dapo" weighs all
tokens of a step alike, ours those of a group and then the groups. We leave the vision tokens out of the distribution; TRL does
not sample them, but counts them. TRL by default recomputes the layers in the backward pass; here neither side does.

The middle model has random weights: it is made to write 64 tokens, and the rewards read fixed answers in place of its text.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import samr1_mini  # noqa: E402
from data import load_data, messages  # noqa: E402
from grpo import Completions, group_logprobs, grpo_loss  # noqa: E402
from reward import SamScorer, Scores, load_sam, parse_answer, score_completions, trl_reward  # noqa: E402

SAME = "--epochs 1 --minibatches 1 --warmup 1 --lr_decay constant --sample_every 1000000 --save_every 1000000"
# The rate is next to nothing where the clock runs: the policy, and so the length of its completions, stays what it is.
FLAGS = {
    "small": "--threads 1 --lr 1e-6",
    "middle": "--threads 2 --lr 1e-6 --side 840 --prompt full --prompts_per_step 1 --max_new_tokens 64",
    "learn": "--threads 1 --lr 1e-3",
}
STEPS = {"small": 41, "middle": 6, "learn": 50}
WRITTEN = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
WRITTEN = ["<think>x</think>" * (g % 2) + WRITTEN.format(80 * g, 80 * g + 200) for g in range(8)]  # "by" the middle model
ROWS = ("seconds, format reward", "processor, format reward", "seconds, with SAM", "processor, with SAM", "MiB it adds", "tokens each")
CUDA = torch.cuda.is_available()

seconds = []  # of this process's steps so far: on the clock, and of the processor


def sam_is_asked(part: str) -> bool:
    return part == "learn" or len(seconds) % 2 == 0


def resident_mib() -> float:
    return (torch.cuda.memory_allocated() if CUDA else psutil.Process().memory_info().rss) / 2**20


def format_reward(text: str) -> float:
    answer = parse_answer(text)
    return float(answer.think_format) + float(answer.answer_format)


def middle_model(folder: str) -> None:
    """Save a Qwen2.5-VL of middle size with random weights: the tiny one's words, the real ones' patches. The prompt has 1,084 tokens,
    900 of them the image."""
    config, processor = AutoConfig.from_pretrained(ROOT / "tiny" / "vlm"), AutoProcessor.from_pretrained(ROOT / "tiny" / "vlm")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.layer_types = 512, 1408, 8, ["full_attention"] * 8
    text.num_attention_heads, text.num_key_value_heads, text.rope_parameters["mrope_section"] = 8, 2, [8, 12, 12]
    text.max_position_embeddings, text.initializer_range = 4096, 0.02
    vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.out_hidden_size = 128, 256, 4, 512
    vision.patch_size, vision.window_size, vision.initializer_range = 14, 112, 0.02
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def train_ours(s: samr1_mini.Settings, part: str) -> dict:
    """Run samr1_mini.train, and return what it logged."""

    def score(scorer, samples, completions, frame, accuracy, keep_masks=False):
        if part == "middle":
            completions = [WRITTEN] * len(samples)
        if keep_masks or sam_is_asked(part):  # masks are kept where rollouts are drawn, in the first and last step
            return score_completions(scorer, samples, completions, frame, accuracy, keep_masks)
        rewards = torch.tensor([[format_reward(text) for text in group] for group in completions])
        nothing = torch.zeros_like(rewards)
        return Scores(rewards, nothing, rewards, nothing, nothing, [], [], None)

    def load_policy(settings):
        policy = real_load(settings)
        return replace(policy, banned=torch.cat([policy.banned, policy.end])) if part == "middle" else policy

    def evaluate(*_):
        before.append(resident_mib())
        return []

    def look(policy, scorer, heldout, settings):  # for the pictures of the first and the last step
        return real_look(policy, scorer, heldout, replace(settings, max_new_tokens=1), 1)

    before, real_load, real_look = [], samr1_mini.load_policy, samr1_mini.look
    with mock.patch.multiple(samr1_mini, score_completions=score, load_policy=load_policy, evaluate=evaluate, look=look):
        samr1_mini.train(s)
    rows = [json.loads(line) for line in (Path(s.out) / "metrics.jsonl").read_text().splitlines()]
    peak = max(row["peak_mib"] for row in rows) - before[0]
    return {name: [row[name] for row in rows] for name in ("reward", "length")} | {"peak": peak}


def train_trl(s: samr1_mini.Settings, part: str) -> dict:
    """The same with GRPOTrainer, and what comes out in the same form."""
    policy = samr1_mini.load_policy(s)  # for its tokens, and to compare with: TRL gets a model of its own
    samples = load_data(s.data, "train", s.data_seed)
    B, G = s.prompts_per_step, s.group_size
    order = [number for step in range(s.steps) for number in samr1_mini.indices(step, B, len(samples), s.seed)]
    drawn = {number: samples[number] for number in order}
    sam_reward = trl_reward(SamScorer(load_sam(s.sam), policy.device), policy.frame)
    peaks, batches = [], []

    def row(number: int) -> dict:
        image, talk = drawn[number].image, messages(drawn[number].query, s.prompt, policy.coordinates, s.side)
        return {"prompt": talk, "image": image.resize((s.side, s.side)), "number": number}

    def reward(completions, number, **_):
        texts = WRITTEN * B if part == "middle" else [completion[-1]["content"] for completion in completions]
        if not sam_is_asked(part):
            return [format_reward(text) for text in texts]
        return sam_reward(texts, photo=[drawn[n].image for n in number], mask=[drawn[n].mask for n in number])

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batches[:] = [super()._generate_and_score_completions(inputs)]  # still in the order of the prompts
            return batches[0]

    must = {"min_new_tokens": s.max_new_tokens} if part == "middle" else {}
    vlm = AutoModelForImageTextToText.from_pretrained(samr1_mini.vlm_folder(s), dtype=policy.model.dtype, attn_implementation="sdpa")
    torch.manual_seed(s.seed)  # of the adapter's weights
    trainer = Trainer(
        model=vlm, processing_class=policy.processor, reward_funcs=reward, train_dataset=Dataset.from_list([row(n) for n in order]),
        peft_config=LoraConfig(r=s.lora_rank, lora_alpha=s.lora_alpha, target_modules=samr1_mini.LORA_TARGETS, task_type="CAUSAL_LM"),
        args=GRPOConfig(
            output_dir=s.out, max_steps=s.steps, seed=s.seed, shuffle_dataset=False, per_device_train_batch_size=B * G, num_generations=G,
            max_completion_length=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p,
            generation_kwargs={"suppress_tokens": policy.banned.tolist()} | must,
            loss_type="dapo", epsilon=s.eps_low, epsilon_high=s.eps_high, beta=s.beta, disable_dropout=True,
            learning_rate=s.lr, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm,
            gradient_checkpointing=False, bf16=CUDA, use_cpu=not CUDA, logging_steps=1, report_to=[], save_strategy="no",
        ),
    )  # fmt: skip
    first = get_peft_model_state_dict(trainer.model)
    apart = max((first[name] - weight).abs().max().item() for name, weight in get_peft_model_state_dict(policy.model).items())
    before = resident_mib()
    register_optimizer_step_post_hook(lambda *_: peaks.append(samr1_mini.peak_mib(policy.device)))
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    result = {"reward": [row["reward"] for row in log], "length": [row["completions/mean_length"] for row in log]}
    result |= {"peak": max(peaks) - before, "adapter_difference": apart}
    return result | compare(trainer, replace(policy, model=trainer.model), [drawn[n] for n in order[-B:]], batches[0], s)


def compare(trainer: GRPOTrainer, policy: samr1_mini.Policy, samples: list, batch: dict, s: samr1_mini.Settings) -> dict:
    """On the same completions: largest difference of the reference's log-probs, and that of the loss's gradient as a share of it."""
    model, shape = trainer.model, (s.prompts_per_step, s.group_size, -1)
    weights = [p for p in model.parameters() if p.requires_grad]
    told = Completions(batch["completion_ids"].view(shape).cpu(), batch["completion_mask"].view(shape).bool().cpu())
    prompts, mask = policy.read(samples), batch["completion_mask"][None].bool()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten().float() for part in torch.autograd.grad(loss, weights)])

    def logprobs() -> torch.Tensor:  # no token is banned, as in TRL; all completions as one group, whose tokens weigh alike, as in "dapo"
        none = torch.tensor([], dtype=torch.long, device=policy.device)
        return group_logprobs(model, prompts, told, none, s.temperature, s.logits_chunk)[0].flatten(0, 1)[None]

    theirs = gradient(trainer._compute_loss(model, batch))
    with torch.no_grad(), model.disable_adapter():
        reference = logprobs()
    new = logprobs()
    ours = gradient(grpo_loss(new, new.detach(), reference, batch["advantages"][None], mask, s.eps_low, s.eps_high, s.beta)[0])
    return {
        "logprob_difference": (reference[0] - batch["ref_per_token_logps"])[mask[0]].abs().max().item(),
        "gradient_difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def work(pipe, part: str, side: str, s: samr1_mini.Settings) -> None:
    """A process of one side's own. It sends the seconds of each step, waits for an answer before the next, and at last sends its log."""
    started = time.perf_counter(), time.process_time()

    def end_step(*_):
        nonlocal started
        if CUDA:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        if part != "learn":
            pipe.send(seconds[-1])
            pipe.recv()
        started = time.perf_counter(), time.process_time()

    register_optimizer_step_post_hook(end_step)
    with contextlib.redirect_stdout(io.StringIO()):
        pipe.send((train_ours if side == "ours" else train_trl)(s, part))


def start(part: str, s: samr1_mini.Settings, folder: str) -> dict:
    """Start both sides; returns a pipe to each."""
    os.environ |= {"OMP_NUM_THREADS": str(s.threads), "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    pipes, spawn = {}, multiprocessing.get_context("spawn")
    for side in ("ours", "trl"):
        pipes[side], far = spawn.Pipe()
        spawn.Process(target=work, args=(far, part, side, replace(s, out=f"{folder}/{side}{s.seed}")), daemon=True).start()
        far.close()  # so that a worker's end is noticed
    return pipes


def measure_steps(part: str, s: samr1_mini.Settings, folder: str) -> dict:
    """A step of ours, one of TRL's, and so on. The first two of each are left out: they warm up, and ours draws pictures in between."""
    if part == "middle":
        s.vlm = f"{folder}/middle"
        middle_model(s.vlm)
    pipes = start(part, s, folder)
    times = {side: [pipe.recv()] for side, pipe in pipes.items()}
    for _ in range(s.steps - 1):
        for side, pipe in pipes.items():
            pipe.send("go on")
            times[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("go on")
    logs = {side: pipe.recv() for side, pipe in pipes.items()}
    columns = [
        [statistics.median(step[kind] for step in times[side][first::2]) for first in (3, 2) for kind in (0, 1)]
        + [log["peak"], statistics.mean(log["length"])]
        for side, log in logs.items()
    ]
    result = dict(zip(ROWS, zip(*columns, strict=True), strict=True))
    print(f"{part}: one whole step, {'CUDA' if CUDA else f'{s.threads} CPU thread(s)'}, TRL {trl_version}, median of {s.steps - 2} steps")
    print(f"{'':30}{'ours':>10}{'TRL':>10}{'TRL / ours':>12}")
    for label, (ours, trl) in result.items():
        print(f"{label:30}{ours:10.2f}{trl:10.2f}{trl / ours:12.2f}")
    print(f"TRL without SAM / ours with SAM: {result[ROWS[0]][1] / result[ROWS[2]][0]:.2f}")
    differences = {name: value for name, value in logs["trl"].items() if name.endswith("difference")}
    print(", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in differences.items()))
    return result | differences


def measure_learning(seeds: list[int], s: samr1_mini.Settings, folder: str) -> dict:
    """Mean rewards at both ends of the runs. The two sides run at the same time: no clock is read."""
    result, span = {}, min(20, s.steps)
    print(f"learn: mean reward (of 6) of the first 5 and the last {span} of {s.steps} steps, TRL {trl_version}")
    print(f"{'seed':8}{'ours':>16}{'TRL':>16}")
    for seed in seeds:
        rewards = {side: pipe.recv()["reward"] for side, pipe in start("learn", replace(s, seed=seed), folder).items()}
        result[seed] = {side: (statistics.mean(row[:5]), statistics.mean(row[-span:])) for side, row in rewards.items()}
        print(f"{seed:<8}" + "".join(f"{f'{first:.2f} -> {last:.2f}':>16}" for first, last in result[seed].values()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int, help=f"of each side, default {STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of learn")
    options = parser.parse_args()
    part, steps = options.part, options.steps or STEPS[options.part]
    s = samr1_mini.parse_settings("train", f"{SAME} {FLAGS[part]} --steps {steps}".split())
    with tempfile.TemporaryDirectory() as folder:
        result = measure_learning(options.seeds, s, folder) if part == "learn" else measure_steps(part, s, folder)
    print(json.dumps({"part": part, "steps": steps, "trl_version": trl_version, "torch": torch.__version__} | result))


if __name__ == "__main__":
    main()

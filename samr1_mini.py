"""samr1_mini.py - SAM-R1 (arXiv 2505.22596) as one story: policy, train, evaluate, segment.

    python samr1_mini.py train                            the embedded default: minutes on a laptop
    python samr1_mini.py eval --adapter RUN/adapter       gIoU and cIoU on held-out samples
    python samr1_mini.py segment --image FILE --query "..." --adapter RUN/adapter
    python samr1_mini.py train --help                     every setting, its meaning and its source

One training step (`train`, below), and where each part is written:

    B samples                               data.py
    -> G completions each                   grpo.rollout
    -> masks, IoU, rewards                  reward.score_completions
    -> advantages within each group         grpo.group_advantages
    -> log-probs: old policy, reference     grpo.group_logprobs
    -> clipped loss with KL term, AdamW     grpo.grpo_loss

Where this departs from the paper: LoRA on a small VLM in place of full fine-tuning of 7 billion
weights on eight GPUs; SAM 1 by default in place of SAM 2; and what the paper leaves open, which is
marked *assumed*. The settings `s`, with meaning and source, are in plumbing/settings.py.
"""

import json
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # the imports take seconds: until they are done, Ctrl-C just ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from data import BadSample, Sample
from grpo import Completions, clip_side, group_advantages, group_logprobs, grpo_loss, rollout
from plumbing import pictures, runs
from plumbing.command_line import exit_on_error
from plumbing.devices import clipped_step
from plumbing.photos import check_query, load_data, read_picture
from plumbing.prompts import points_asked
from plumbing.protocols import count_both, metrics_by_protocol, print_protocols
from plumbing.sam import load_sam
from plumbing.scenes import interior_points, points_inside
from plumbing.settings import EvalSettings, SegmentSettings, Settings, parse_settings
from plumbing.vlm import Policy, Prompts, load_vlm
from reward import (
    SamPrompt,
    SamScorer,
    box_ious,
    parse_answer,
    sam_prompt,
    score_completions,
    true_box,
)

# --------------------------------------------------------------------------------------------------
# The policy
# --------------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"  # not the vision tower


def load_models(s, out: Path, command: str) -> tuple[Policy, SamScorer]:
    """Load policy and SAM, then open the run's folder: bad input shows up before any work."""
    with exit_on_error(f"--sam {s.sam}"):
        sam = load_sam(s.sam)
    policy = load_policy(s)
    with exit_on_error(f"--out {out}"):
        inputs = [s.vlm, s.sam, s.data, getattr(s, "adapter", "none")]
        runs.open_run(out, command, s.resume, s.overwrite, inputs)
    encoder_batch = 8 if s.sam == "tiny" else 1  # images; one fills a GPU with an official SAM
    return policy, SamScorer(sam, policy.device, encoder_batch, offload=s.save_memory >= 3)


def load_policy(s) -> Policy:
    """The policy that the settings name, frozen. With an adapter if they name one."""
    adapter = getattr(s, "adapter", "none")
    return load_vlm(s.vlm, s.device, s.side, s.prompt, adapter, s.dtype, s.load_in_4bit)


def add_lora(model: torch.nn.Module, rank: int, seed: int, checkpoint_layers: bool = False):
    """Put an untrained adapter of scale alpha / rank = 2 on the language model's linear layers.

    The base model stays frozen. With the adapter switched off it is the reference policy.
    """
    torch.manual_seed(seed)
    lora = dict(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**lora))
    if checkpoint_layers:
        layers = model.get_base_model().model.language_model
        layers.activation_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def sample_completions(policy, prompts, s, generator=None, greedy=False) -> Completions:
    """Complete B prompts, `rollout_prompts` at a time: G samples each, or one greedy completion."""
    policy.model.eval()
    G, temperature, top_p = (1, 0.0, 1.0) if greedy else (s.group_size, s.temperature, s.top_p)
    limits = (s.max_new_tokens, policy.end, policy.banned, temperature, top_p, generator)
    rows = slices(0, len(prompts), s.rollout_prompts)
    parts = [rollout(policy.model, prompts[r], G, *limits) for r in rows]
    T = max(part.ids.shape[-1] for part in parts)
    ids = torch.cat([F.pad(part.ids, (0, T - part.ids.shape[-1])) for part in parts])
    mask = torch.cat([F.pad(part.mask, (0, T - part.mask.shape[-1])) for part in parts])
    return Completions(ids, mask)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Cut the rows start..stop into slices of `size`. The last one may be shorter."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def run_name(s) -> str:
    """<data>-<vlm> as part of a file name."""
    return re.sub(r"[^\w.+]+", "-", f"{s.data}-{Path(s.vlm).name}")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

WARMUP = 10  # steps in which the learning rate rises. *Assumed*
MAX_GRAD_NORM = 1.0  # *Assumed*


def train(s: Settings) -> None:
    """Evaluate, train with GRPO, evaluate again. README lists the files that a run writes."""
    out = Path(s.out or f"runs/{run_name(s)}-{s.seed}")
    with exit_on_error(f"--data {s.data}"):
        samples = load_data(s.data, "train", s.data_seed, s.train_samples)
        heldout = load_data(s.data, "heldout")
    policy, scorer = load_models(s, out, "train")
    policy.model = add_lora(policy.model, s.lora_rank, s.seed, s.save_memory >= 2)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(s.seed)  # of sampling
    first, results = 0, {}
    if s.resume:  # a resumed run has its first evaluation already
        with exit_on_error(f"--resume {out}"):
            first, results = runs.load_checkpoint(out, policy.model, optimizer, generator)
            results.pop("after", None)
    with runs.writing_to(out):
        metrics = runs.start_metrics(out, s, first)
    if not results:
        rows = evaluate(policy, scorer, heldout, s, s.eval_samples, "before")
        results = {"before": compute_metrics(rows), "ceiling": compute_metrics(rows, "ceiling_")}

    stop = runs.StopSignal()
    bar = tqdm(range(first, s.steps), desc="train", unit="step", initial=first, total=s.steps)
    for step in bar:
        timer, last = runs.PhaseTimer(policy.device), step + 1 == s.steps
        log_this_step = (step + 1) % s.save_every == 0 or step == 0 or last
        lr = set_learning_rate(optimizer, s, step)

        # 1. Rollout: G completions for each of B prompts. The vision tower runs only here.
        chosen = runs.indices(step, s.prompts_per_step, len(samples), s.seed)
        batch, skipped = runs.load_samples(samples, chosen)
        prompts = policy.read(batch)  # ids (B, P)
        completions = sample_completions(policy, prompts, s, generator)  # ids (B, G, T)
        timer.end("rollout")

        # 2. Reward: answer -> SAM -> mask -> IoU -> reward. Then advantages within each group.
        texts = policy.texts(completions)  # B lists of G strings
        options = (policy.frame, s.accuracy, log_this_step, policy.prompt)
        scores = score_completions(scorer, batch, texts, *options)
        advantages = group_advantages(scores.reward)  # (B, G)
        timer.end("reward")

        # 3. Log-probs that stay fixed during the updates, (B, G, T) each.
        old, reference = fixed_logprobs(policy, prompts, completions, s)
        timer.end("logprobs")

        # 4. Updates: `epochs` times over the completions, in `minibatches` parts (default 2 x 2).
        rollouts = (prompts, completions, advantages)
        clipped, statistics = update(policy, optimizer, *rollouts, old, reference, s)
        timer.end("update")

        # 5. Log and save.
        row = {"step": step + 1} | runs.describe(scores, completions, policy.end)
        row |= {"skipped": skipped} | statistics | {"lr": lr} | timer.row(completions)
        metrics.append(row)
        bar.set_postfix({name: f"{row[name]:.2f}" for name in ("reward", "iou", "kl")})
        with runs.writing_to(out):
            runs.append_line(out / "metrics.jsonl", row)
            if log_this_step:
                record = (batch[:2], completions, scores, policy.processor.tokenizer)
                logged = pictures.record_rollouts(*record, advantages, clipped)
                log_samples(out, step + 1, policy, scorer, heldout, s, logged, metrics)
            if log_this_step or stop.number:
                runs.save_checkpoint(out, step + 1, s, policy.model, optimizer, generator, results)
        if stop.number and not last:
            bar.close()
            stop.exit(out, step + 1)

    rows = evaluate(policy, scorer, heldout, s, s.eval_samples, "after")
    results["after"] = compute_metrics(rows)
    with runs.writing_to(out):
        runs.save_checkpoint(out, s.steps, s, policy.model, optimizer, generator, results)
    runs.print_table(results, metrics, out)


def set_learning_rate(optimizer: torch.optim.Optimizer, s: Settings, step: int) -> float:
    """Linear warm-up, then constant or a linear decay towards zero."""
    decay = 1 - step / s.steps if s.lr_decay == "linear" else 1.0
    lr = s.lr * (min(1.0, (step + 1) / WARMUP) * decay)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def logprobs(policy: Policy, prompts: Prompts, completions: Completions, s: Settings):
    """Log-probs and entropies of the completions, (B, G, T) each, under the policy as it is now."""
    return group_logprobs(policy.model, prompts, completions, policy.banned, s.temperature)


def passes(s: Settings) -> list[list[slice]]:
    """For each mini-batch of a step, the slices of prompts that go through the model together.

    All log-probs are computed in these same passes. So the first update's ratio is exactly 1.
    """
    size = s.prompts_per_step // s.minibatches
    starts = range(0, s.prompts_per_step, size)
    return [slices(start, start + size, 1 if s.save_memory else size) for start in starts]


@torch.no_grad()
def fixed_logprobs(policy: Policy, prompts: Prompts, completions: Completions, s: Settings):
    """Log-probs under the policy that sampled, and under the reference, (B, G, T) each.

    The old ones are None if the step has one update: they would equal the new ones. The reference,
    the base model with the adapter switched off, is None if beta is 0.
    """
    old, reference = [], []
    for rows in sum(passes(s), []):
        part = (policy, prompts[rows], completions[rows], s)
        if s.beta > 0:
            with policy.model.disable_adapter():
                reference.append(logprobs(*part)[0])
        if s.epochs * s.minibatches > 1:
            old.append(logprobs(*part)[0])
    return torch.cat(old) if old else None, torch.cat(reference) if reference else None


def update(policy, optimizer, prompts, completions, advantages, old, reference, s: Settings):
    """Update the adapter. Returns `clip_side` of each token, (B, G, T), and statistics to log.

    Gradients add up over the passes of a mini-batch, so their number does not change the result.
    """
    policy.model.train()  # only for gradient checkpointing: there is no dropout
    mask, advantages = completions.mask.to(policy.device), advantages.to(policy.device)
    clipped = torch.zeros(mask.shape, dtype=torch.int32, device=policy.device)
    clip = (s.eps_low, s.eps_high)
    log, norms = [], []
    for minibatch in passes(s) * s.epochs:
        for rows in minibatch:
            new, entropy = logprobs(policy, prompts[rows], completions[rows], s)  # (b, G, T)
            # With one update a step the policy has not changed since the rollout: old is new.
            before = new.detach() if old is None else old[rows]
            anchor = None if reference is None else reference[rows]
            group = (advantages[rows], mask[rows])
            loss, statistics = grpo_loss(new, before, anchor, *group, *clip, s.beta, s.normalise)
            # The loss is a mean over this pass. Weight it by the pass's share of the mini-batch.
            share = (rows.stop - rows.start) * s.minibatches / s.prompts_per_step
            policy.scaler.scale(loss * share).backward()
            statistics["entropy"] = entropy.sum() / mask[rows].sum()
            log.append({name: value * share for name, value in statistics.items()})
            ratio = (new.detach() - before).exp()
            clipped[rows] = clip_side(ratio, advantages[rows][..., None], *clip)
        norms.append(clipped_step(optimizer, policy.scaler, MAX_GRAD_NORM))
    names = ("kl", "ratio", "clip_low", "clip_high", "entropy")
    means = {name: torch.stack([row[name] for row in log]).sum() / len(norms) for name in names}
    means["grad_norm"] = torch.stack(norms).mean()
    values = torch.stack(list(means.values())).tolist()  # one wait for the GPU, not one for each
    return clipped.cpu(), dict(zip(means, values, strict=True))


def log_samples(out, step, policy, scorer, heldout, s, logged: list[dict], metrics) -> None:
    """Sample a group for the same held-out samples each time, and write what a run logs."""
    batch, _ = runs.load_samples(heldout, list(range(min(4, len(heldout)))))
    generator = torch.Generator(policy.device).manual_seed(0)  # its own: logging changes nothing
    completions = sample_completions(policy, policy.read(batch), s, generator)
    texts = policy.texts(completions)
    scores = score_completions(scorer, batch, texts, policy.frame, s.accuracy, True, policy.prompt)
    seen = pictures.record_rollouts(batch, completions, scores, policy.processor.tokenizer)
    record = json.dumps({"step": step, "train": logged, "heldout": seen})
    runs.write_text(out / "rollouts" / f"step_{step:05d}.json", record)
    figure = pictures.groups(batch, texts, scores)
    runs.save_figure(figure, out / "samples" / f"step_{step:05d}.png")
    runs.save_figure(pictures.curves(metrics), out / "curves.png")


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate_batch(policy: Policy, scorer: SamScorer, batch: list[Sample], s) -> list[dict]:
    """Greedy answers to a batch and their overlap with the truth, one row for each sample.

    Columns that begin with "ceiling_" are SAM with the true box and two good points as its prompt,
    those with "boxonly_" SAM with the policy's box but without its points. Boxes and points are in
    image pixels, intersection and union in pixels. See plumbing/protocols.py for how they count.
    """
    completions = sample_completions(policy, policy.read(batch), s, greedy=True)
    texts = [group[0] for group in policy.texts(completions)]
    answers = [parse_answer(text, policy.prompt) for text in texts]
    sizes = [one.image.size for one in batch]
    ours = [sam_prompt(a, policy.frame, *size) for a, size in zip(answers, sizes, strict=True)]
    truths = [SamPrompt(true_box(one.mask), interior_points(one.mask)) for one in batch]
    boxes = [SamPrompt(prompt.box, ()) for prompt in ours]
    overlap = scorer.score(batch, [list(three) for three in zip(ours, truths, boxes, strict=True)])
    ious = box_ious(batch, [[prompt] for prompt in ours])[:, 0].tolist()
    rows = []
    for b, (one, answer, prompt) in enumerate(zip(batch, answers, ours, strict=True)):
        row = {"id": one.id, "query": one.query, "answer": texts[b], "objects": answer.objects}
        row |= {"box": prompt.box, "points": prompt.points, "box_iou": ious[b]}
        row["format"] = answer.think_format and answer.answer_format
        asked = points_asked(policy.prompt)
        row["points_inside"] = points_inside(prompt.points, one.mask, asked)
        rows.append(row | count_both(overlap, b, one, answer.answer_format, s))
    return rows


def evaluate(policy, scorer, dataset, s, count: int, title: str, rows=(), log=None) -> list[dict]:
    """`evaluate_batch` on the first `count` samples. `rows` are done already; new ones go to `log`.

    A sample that cannot be used gets a row that says why. It counts in no metric.
    """
    policy.model.eval()
    rows, count = list(rows), min(count, len(dataset))
    starts = range(len(rows), count, s.rollout_prompts)
    for start in tqdm(starts, desc=f"eval {title}", unit="batch", leave=False):
        batch, new = [], {}  # index: row
        for index in range(start, min(start + s.rollout_prompts, count)):
            try:
                batch.append(dataset[index])
                new[index] = None
            except BadSample as error:
                new[index] = {"skipped": str(error)}
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        scored = iter(evaluate_batch(policy, scorer, batch, s) if batch else [])
        new = [row or next(scored) for row in new.values()]  # None: the next scored row
        rows += new
        if log:
            log.write("".join(json.dumps(row) + "\n" for row in new))
            log.flush()
    return rows


def compute_metrics(rows: list[dict], prefix: str = "") -> dict[str, float]:
    """The paper's metrics over the rows of `evaluate`; with prefix "ceiling_" those of the ceiling.

    giou: mean IoU of the samples. ciou: summed intersection / summed union. format: share of valid
    answers. box: share of boxes with IoU above 0.5. points: share of points in the true mask.
    boxonly: mean IoU of the masks that SAM makes of the box without the points.

    >>> row = {"iou": 0.5, "intersection": 10, "union": 20, "format": True, "box_iou": 0.6}
    >>> row |= {"points_inside": 0.5, "boxonly_iou": 0.2}
    >>> other = row | {"iou": 0.1, "union": 100, "format": False, "box_iou": 0.5}
    >>> compute_metrics([row, other, {"skipped": "no such file"}])  # doctest: +NORMALIZE_WHITESPACE
    {'giou': 0.3, 'ciou': 0.16666666666666666, 'format': 0.5, 'box': 0.5, 'points': 0.5,
     'boxonly': 0.2, 'n': 2}
    """
    rows = [row for row in rows if "skipped" not in row]
    n, union = max(len(rows), 1), sum(row[prefix + "union"] for row in rows)
    result = {"giou": sum(row[prefix + "iou"] for row in rows) / n}
    result["ciou"] = sum(row[prefix + "intersection"] for row in rows) / max(union, 1)
    if not prefix:
        result["format"] = sum(row["format"] for row in rows) / n
        result["box"] = sum(row["box_iou"] > 0.5 for row in rows) / n
        result["points"] = sum(row["points_inside"] for row in rows) / n
        result["boxonly"] = sum(row["boxonly_iou"] for row in rows) / n
    return result | {"n": len(rows)}


# --------------------------------------------------------------------------------------------------
# The two other commands, and the command line
# --------------------------------------------------------------------------------------------------


def evaluate_adapter(s: EvalSettings) -> None:
    """Compute the metrics of an adapter, or of the base model, on a data set."""
    trained = "base" if s.adapter == "none" else Path(s.adapter).resolve().parent.name
    out = Path(s.out or re.sub(r"[^\w./+]+", "-", f"runs/eval-{run_name(s)}-{trained}"))
    with exit_on_error(f"--data {s.data}"):
        heldout = load_data(s.data, "heldout")
    policy, scorer = load_models(s, out, "eval")
    count = s.limit or (256 if s.data == "shapes" else len(heldout))
    with runs.writing_to(out):
        done = runs.start_answers(out, s)
        with open(out / "answers.jsonl", "a") as log:
            rows = evaluate(policy, scorer, heldout, s, count, s.data, done, log)
        results = metrics_by_protocol(rows, compute_metrics, trained, s)
        runs.write_text(out / "eval.json", json.dumps(results, indent=2))
        if results[trained]["n"]:
            figure = pictures.evaluation_sheet(rows, scorer, heldout, SamPrompt)
            runs.save_figure(figure, out / "sheet.png")
    runs.print_table(results, [], out)
    print_protocols(results[trained], rows, s)


def segment(s: SegmentSettings) -> None:
    """Segment what a query refers to in one picture. Prints JSON and draws the answer."""
    with exit_on_error("--query"):
        query = check_query(s.query)
    with exit_on_error(f"--image {s.image}"):
        image = read_picture(s.image)
    out = Path(s.out)
    with exit_on_error(f"--out {out}"):
        if out.is_dir() or out.suffix not in (".png", ".jpg", ".pdf", ".svg"):
            raise ValueError("name the picture to write, such as found.png (or .jpg, .pdf, .svg)")
    with exit_on_error(f"--sam {s.sam}"):
        sam = load_sam(s.sam)
    policy = load_policy(s)
    one = Sample(image, query, np.zeros((image.height, image.width), bool), None, s.image)
    completions = sample_completions(policy, policy.read([one]), s, greedy=True)
    text = policy.texts(completions)[0][0]
    scorer = SamScorer(sam, policy.device, offload=s.save_memory >= 3)
    options = dict(keep_masks=True, style=policy.prompt)
    scores = score_completions(scorer, [one], [[text]], policy.frame, **options)
    answer, prompt = scores.answers[0][0], scores.prompts[0][0]
    mask = scores.overlap.masks[0][0].cpu().numpy()
    figure = pictures.found(image, query, mask, prompt, answer.thought or text)
    with exit_on_error(f"--out {out}"):
        runs.save_figure(figure, out)
    said = {"query": query, "bbox": prompt.box, "points": prompt.points}
    said |= {"mask_pixels": int(mask.sum()), "thought": answer.thought, "completion": text}
    print(json.dumps(said | {"picture": str(out)}))


COMMANDS = {"train": train, "eval": evaluate_adapter, "segment": segment}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"samr1_mini.py: there is no command {argv[0]!r}: use {known}", file=sys.stderr)
        raise SystemExit(2)
    try:
        COMMANDS[argv[0]](parse_settings(argv[0], argv[1:]))
    except KeyboardInterrupt:  # during training steps, StopSignal handles it
        print("samr1_mini.py: interrupted; continue eval with --resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1:])

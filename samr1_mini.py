"""samr1_mini.py - SAM-R1 (arXiv 2505.22596) as one story: policy, train, evaluate, segment.

    python samr1_mini.py train                            the embedded default: minutes on a laptop
    python samr1_mini.py eval --adapter RUN/adapter       gIoU and cIoU on held-out samples
    python samr1_mini.py segment --image FILE --query "..." --adapter RUN/adapter
    python samr1_mini.py train --help                     every setting and its meaning

One training step (`train`, below), and where each part is written:

    B samples                               data.py
    -> G completions each                   grpo.rollout
    -> masks, IoU, rewards                  reward.score_completions
    -> advantages within each group         grpo.group_advantages
    -> log-probs: old policy, reference     grpo.group_logprobs
    -> clipped loss with KL term, AdamW     grpo.grpo_loss

Where this departs from the paper: LoRA on a small VLM in place of full fine-tuning of 7 billion
weights on eight GPUs; SAM 1 by default in place of SAM 2; and what the paper leaves open, which is
marked *assumed*. The settings `s` are explained in plumbing/settings.py.
"""

import plumbing.interrupts  # noqa: F401  first: Ctrl-C is one line while torch is imported, too

# isort: split
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import BadSample, Sample
from grpo import Completions, group_advantages, group_logprobs, grpo_loss, rollout
from plumbing import boxes, intervals, pictures, runs, scenes
from plumbing.answers import points_asked
from plumbing.decoding import StaticDecoder
from plumbing.devices import clipped_step
from plumbing.errors import UserError, continued_by, exit_with_one_line
from plumbing.sam import load_sam
from plumbing.settings import Settings, parse_settings, rollout_prompts
from plumbing.sources import EVAL_SAMPLES, load_data
from plumbing.tracking import Tracker
from plumbing.vlm import Policy, Prompts, load_vlm
from reward import SamPrompt, SamScorer, parse_answer, sam_prompt, score_completions

# --------------------------------------------------------------------------------------------------
# The policy
# --------------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"  # not the vision tower


def load_policy(s, adapter: str = "none") -> Policy:
    """The policy that the settings name, frozen, with the adapter in a folder if one is given."""
    return load_vlm(
        s.vlm, device=s.device, side=s.side, prompt=s.prompt, adapter=adapter, dtype=s.dtype
    )


def load_scorer(s, device: torch.device) -> SamScorer:
    """The frozen SAM that the settings name. The encoder of an official SAM takes one image at a
    time, which already fills a GPU. The tiny one takes eight."""
    encoder_batch = 8 if s.sam == "tiny" else 1
    in_host_memory = s.save_memory >= 3
    return SamScorer(load_sam(s.sam), device, encoder_batch, offload=in_host_memory)


def add_lora(model: torch.nn.Module, rank: int, seed: int, recompute_layers: bool = False):
    """Put an untrained adapter of scale alpha / rank = 2 on the language model's linear layers.

    The base model stays frozen. With the adapter switched off it is the reference policy.
    """
    from peft import LoraConfig, get_peft_model  # after plumbing, see plumbing/__init__.py

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    if recompute_layers:  # in the backward pass, to save memory
        layers = model.get_base_model().model.language_model
        layers.activation_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def load_trainable_policy(s: Settings) -> Policy:
    """The policy with an adapter to train: a new one, or with the weights of --adapter."""
    policy = load_policy(s)
    policy.model = add_lora(policy.model, s.lora_rank, s.seed, recompute_layers=s.save_memory >= 2)
    if s.adapter != "none" and not s.resume:  # a checkpoint has its own weights
        from plumbing.foreign import continue_adapter  # only with this setting

        continue_adapter(policy.model, s.adapter)
    return policy


def sample_completions(
    policy: Policy,
    prompts: Prompts,
    s,
    generator: torch.Generator | None = None,
    greedy: bool = False,
) -> Completions:
    """Complete B prompts, some at a time: G samples each, or one greedy completion."""
    policy.model.eval()
    parts = [
        rollout(
            policy.model,
            prompts[rows],
            G=1 if greedy else s.group_size,
            max_new_tokens=s.max_new_tokens,
            end=policy.end,
            banned=policy.banned,
            temperature=0.0 if greedy else s.temperature,
            generator=generator,
            decoder=StaticDecoder,
        )
        for rows in slices(0, len(prompts), rollout_prompts(s))
    ]
    T = max(part.ids.shape[-1] for part in parts)
    ids = [F.pad(part.ids, (0, T - part.ids.shape[-1])) for part in parts]
    mask = [F.pad(part.mask, (0, T - part.mask.shape[-1])) for part in parts]
    return Completions(torch.cat(ids), torch.cat(mask))


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
SAVE_EVERY = 25  # steps between checkpoints and pictures


def train(s: Settings) -> None:
    """Evaluate, train with GRPO, evaluate again. README lists the files that a run writes."""
    samples = load_data(s.data, "train", s.train_samples)
    heldout = load_data(s.data, "heldout")
    policy = load_trainable_policy(s)
    scorer = load_scorer(s, policy.device)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(s.seed)  # of sampling
    out = runs.open_run(s, f"runs/{run_name(s)}-{s.seed}")
    checkpoint = runs.Checkpoint(out, policy.model, optimizer, generator, policy.scaler)
    first, results = checkpoint.load() if s.resume else (0, {})
    metrics = runs.start_metrics(out, s, first)
    tracker = Tracker(s, out)
    if not results:  # a resumed run has its first evaluation already
        rows = evaluate(policy, scorer, heldout, s, EVAL_SAMPLES, "before")
        results = {"before": compute_metrics(rows), "ceiling": compute_metrics(rows, "ceiling_")}

    stop = runs.StopSignal()
    bar = tqdm(range(first, s.steps), desc="train", unit="step", initial=first, total=s.steps)
    for step in bar:
        timer = runs.PhaseTimer(policy.device)
        log_this_step = (step + 1) % SAVE_EVERY == 0 or step + 1 in (1, s.steps)
        lr = set_learning_rate(optimizer, s, step)

        # 1. Rollout: G completions for each of B prompts.
        chosen = runs.indices(step, count=s.prompts_per_step, n=len(samples), seed=s.seed)
        batch, skipped = runs.load_samples(samples, chosen)  # B samples
        prompts = policy.read(batch)  # ids (B, P); the vision tower runs only here
        completions = sample_completions(policy, prompts, s, generator)  # ids (B, G, T)
        timer.end("rollout")

        # 2. Reward: answer -> SAM -> mask -> IoU -> reward. Then advantages within each group.
        scores = score_completions(
            scorer,
            batch,
            policy.texts(completions),  # B lists of G strings
            extent=policy.extent,
            accuracy=s.accuracy,
            keep_masks=log_this_step,
            style=policy.style,
        )  # reward (B, G)
        advantages = group_advantages(scores.reward)  # (B, G)
        timer.end("reward")

        # 3. Log-probs to compare with, (B, G, T) each. `update` fills in what is NaN in `old`.
        old, reference = fixed_logprobs(policy, prompts, completions, s)
        timer.end("logprobs")

        # 4. Updates: `epochs` times over the completions, in `minibatches` parts (default 2 x 2).
        clip_sides, statistics = update(  # (B, G, T), and numbers to log
            policy, optimizer, prompts, completions, advantages, old, reference, s
        )
        timer.end("update")

        # 5. Log and save.
        row = {"step": step + 1} | runs.describe(scores, completions, policy.end)
        row |= {"skipped": skipped} | statistics | {"lr": lr} | timer.row(completions)
        metrics.append(row)
        runs.append_lines(out / "metrics.jsonl", [row])
        bar.set_postfix({name: f"{row[name]:.2f}" for name in ("reward", "iou", "kl")})
        if log_this_step:
            logged = pictures.record_rollouts(
                batch[:2], completions, scores, policy.processor.tokenizer, advantages, clip_sides
            )
            log_samples(out, step + 1, policy, scorer, heldout, s, logged, metrics)
        tracker.log(row, out / "samples" / f"step_{step + 1:05d}.png")
        if log_this_step or stop.number:
            checkpoint.save(step + 1, s, results)
        if stop.number:
            bar.close()
            stop.exit(out, step + 1)

    with stop.ended(out):  # every step is saved: now a signal need not wait
        rows = evaluate(policy, scorer, heldout, s, EVAL_SAMPLES, "after")
    results["after"] = compute_metrics(rows)
    checkpoint.save(s.steps, s, results)
    tracker.finish()
    runs.print_table(results, metrics, out)


def set_learning_rate(optimizer: torch.optim.Optimizer, s: Settings, step: int) -> float:
    """Linear warm-up times a linear decay from 1 to 1 / steps. *Assumed*."""
    lr = s.lr * (min(1.0, (step + 1) / WARMUP) * (1 - step / s.steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def completion_logprobs(
    policy: Policy, prompts: Prompts, completions: Completions, s: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the completions, (B, G, T) each, under the policy as it is now."""
    return group_logprobs(policy.model, prompts, completions, policy.banned, s.temperature)


def prompts_per_pass(s: Settings) -> int:
    """Prompts that go through the model together when log-probs are computed.

    `fixed_logprobs` and `update` use passes of the same size, because the rounding of a matrix
    product depends on the size of the batch. So a ratio differs from 1 only by what was learnt.
    """
    return 1 if s.save_memory else s.prompts_per_step // s.minibatches


@torch.no_grad()
def fixed_logprobs(policy: Policy, prompts: Prompts, completions: Completions, s: Settings):
    """Log-probs under the policy that sampled, and under the reference, (B, G, T) each.

    The old ones of the first mini-batch are missing (NaN): `update` finds them when it computes
    that mini-batch for the first time, because nothing has been updated yet. The reference, the
    base model with the adapter switched off, is None if beta is 0.
    """
    old = torch.full(completions.mask.shape, torch.nan, device=policy.device)
    for rows in slices(
        s.prompts_per_step // s.minibatches, s.prompts_per_step, prompts_per_pass(s)
    ):
        old[rows], _ = completion_logprobs(policy, prompts[rows], completions[rows], s)
    if s.beta == 0:
        return old, None
    reference = []
    with policy.model.disable_adapter():
        for rows in slices(0, s.prompts_per_step, prompts_per_pass(s)):
            logprobs, _ = completion_logprobs(policy, prompts[rows], completions[rows], s)
            reference.append(logprobs)
    return old, torch.cat(reference)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    prompts: Prompts,
    completions: Completions,
    advantages: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    s: Settings,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Update the adapter. Returns `grpo.clip_side` of each token, (B, G, T), in the last epoch, and
    statistics to log.

    advantages: (B, G). old, reference: of `fixed_logprobs`, (B, G, T) each; what is NaN in `old` is
    filled in. A mini-batch is computed in one or more passes of b prompts (`prompts_per_pass`),
    whose gradients add up. The result does not depend on how many passes there are.
    """
    policy.model.train()  # only for gradient checkpointing: there is no dropout
    mask = completions.mask.to(policy.device)
    advantages = advantages.to(policy.device)
    clip_sides = torch.zeros(mask.shape, dtype=torch.int32, device=policy.device)
    log, norms = [], []
    minibatches = slices(0, s.prompts_per_step, s.prompts_per_step // s.minibatches)
    for number, minibatch in enumerate(minibatches * s.epochs):
        for rows in slices(minibatch.start, minibatch.stop, prompts_per_pass(s)):
            # (b, G, T) each
            new, entropy = completion_logprobs(policy, prompts[rows], completions[rows], s)
            if number == 0:  # no update yet: the policy is the one that sampled, every ratio is 1
                old[rows] = new.detach()
            loss, statistics, clip_sides[rows] = grpo_loss(
                new,
                old=old[rows],
                reference=None if reference is None else reference[rows],
                advantages=advantages[rows],
                mask=mask[rows],
                eps_high=s.eps_high,
                beta=s.beta,
                normalise=s.normalise,
            )
            # The loss is a mean over the prompts of this pass: weight it by their share of the
            # mini-batch. The statistics are means over its tokens: weight them by their number.
            share = (rows.stop - rows.start) * s.minibatches / s.prompts_per_step
            policy.scaler.scale(loss * share).backward()
            tokens = mask[rows].sum()
            sums = {name: value * tokens for name, value in statistics.items()}
            log.append(sums | {"entropy": entropy.sum()})
        norms.append(clipped_step(optimizer, policy.scaler, MAX_GRAD_NORM))
    # Means over the tokens of all passes. Each token was in one pass of each epoch.
    tokens = mask.sum() * s.epochs
    means = {name: torch.stack([row[name] for row in log]).sum() / tokens for name in log[0]}
    means["grad_norm"] = torch.stack(norms).mean()
    values = torch.stack(list(means.values())).tolist()  # one wait for the GPU, not one for each
    statistics = dict(zip(means, values, strict=True))
    skips = policy.scaler.is_enabled()  # it skips an update whose gradient overflowed
    for name, value in statistics.items():
        if not math.isfinite(value) and not (name == "grad_norm" and skips):
            raise UserError(
                f"--lr {s.lr:g}: the training diverged ({name} is {value}): lower --lr, or use "
                "another --dtype than float16; the last checkpoint stays"
            )
    return clip_sides.cpu(), statistics


def log_samples(out, step, policy, scorer, heldout, s, logged: list[dict], metrics) -> None:
    """Complete the first held-out queries, and write the pictures, rollouts and curves of a step.

    logged: `pictures.record_rollouts` of training prompts. metrics: the rows of metrics.jsonl.
    """
    batch, _ = runs.load_samples(heldout, list(range(min(4, len(heldout)))))
    generator = torch.Generator(policy.device).manual_seed(0)  # not that of training
    completions = sample_completions(policy, policy.read(batch), s, generator)
    texts = policy.texts(completions)
    scores = score_completions(
        scorer, batch, texts, policy.extent, s.accuracy, keep_masks=True, style=policy.style
    )
    seen = pictures.record_rollouts(batch, completions, scores, policy.processor.tokenizer)
    record = json.dumps({"step": step, "train": logged, "heldout": seen})
    runs.write_text(out / "rollouts" / f"step_{step:05d}.json", record)
    figure = pictures.groups(batch, texts, scores)
    runs.save_figure(figure, out / "samples" / f"step_{step:05d}.png")
    runs.save_figure(pictures.curves(metrics), out / "curves.png")


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate_batch(
    policy: Policy, scorer: SamScorer, batch: list[Sample], s, recount=None
) -> list[dict]:
    """Greedy answers to a batch and their overlap with the truth, one row for each sample.

    SAM gets three prompts for each sample: the policy's; the true box with two good points (columns
    that begin with "ceiling_"); and the policy's box without its points ("boxonly_"). Boxes and
    points are in image pixels, intersection and union in pixels.

    recount: None, or a function of a row, its masks (3, H, W), its sample and its `Answer`. The
             columns that it returns replace those of the same name. `eval` counts in two ways, see
             plumbing/evaluation.py.
    """
    completions = sample_completions(policy, policy.read(batch), s, greedy=True)
    texts = [group[0] for group in policy.texts(completions)]
    answers = [parse_answer(text, policy.style) for text in texts]
    prompts = []
    for one, answer in zip(batch, answers, strict=True):
        ours = sam_prompt(answer, policy.extent, *one.image.size)
        ceiling = SamPrompt(boxes.true_box(one.mask), scenes.interior_points(one.mask))
        others = tuple(SamPrompt(other.box, ()) for other in ours.others)
        box_only = SamPrompt(ours.box, (), others)
        prompts.append([ours, ceiling, box_only])  # in the order of intervals.PREFIXES
    overlap = scorer.score(batch, prompts, keep_masks=recount is not None)
    # (B, 3) each; one wait for the GPU, not one for each number
    counts = {name: getattr(overlap, name).tolist() for name in ("intersection", "union", "iou")}
    box_ious = boxes.box_ious(batch, prompts).tolist()
    asked = points_asked(policy.style)
    rows = []
    for b, (one, answer) in enumerate(zip(batch, answers, strict=True)):
        ours = prompts[b][0]
        row = {
            "id": one.id,
            "query": one.query,
            "answer": texts[b],
            "box": ours.box,
            "points": ours.points,
            "box_iou": box_ious[b][0],
            "format": answer.think_format and answer.answer_format,
            "points_inside": scenes.points_inside(ours.points, one.mask, asked),
        }
        if ours.others:
            row["others"] = [(other.box, other.points) for other in ours.others]
        for k, prefix in enumerate(intervals.PREFIXES):
            for name, values in counts.items():
                row[prefix + name] = values[b][k]
        if recount:
            row |= recount(row, overlap.masks[b], one, answer)
        rows.append(row)
    return rows


def evaluate(policy, scorer, dataset, s, count: int, title: str, answers=None) -> list[dict]:
    """`evaluate_batch` on the first `count` samples.

    A sample that cannot be used gets a row that says why. It counts in no metric.

    answers: None, or the `plumbing.evaluation.Answers` of `eval`: only the samples that are missing
             there are evaluated, and each batch is added to it.
    """
    policy.model.eval()
    indices = answers.missing() if answers else list(range(min(count, len(dataset))))
    rows = {}
    batches = slices(0, len(indices), rollout_prompts(s))
    for batch in tqdm(batches, desc=f"eval {title}", unit="batch", leave=False):
        usable = {}
        for index in indices[batch]:
            try:
                usable[index] = dataset[index]
            except BadSample as error:
                rows[index] = {"skipped": str(error)}
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        if usable:
            recount = answers.recount if answers else None
            scored = evaluate_batch(policy, scorer, list(usable.values()), s, recount)
            rows |= dict(zip(usable, scored, strict=True))  # the keys of `usable` are indices
        if answers:
            answers.add({index: rows[index] for index in indices[batch]})
    return answers.rows if answers else [rows[index] for index in indices]


def compute_metrics(rows: list[dict], prefix: str = "") -> dict[str, float]:
    """gIoU and cIoU as in the paper, and metrics of ours, over the rows of `evaluate`. With prefix
    "ceiling_" gIoU and cIoU of the ceiling.

    giou: mean IoU of the samples. ciou: summed intersection / summed union. format: share with
    both formats right. box: share of boxes with IoU above 0.5. points: share of points in the true
    mask. boxonly: mean IoU of the masks that SAM makes of the box without the points. giou_95,
    ciou_95: the intervals of plumbing/intervals.py.

    >>> row = {"iou": 0.5, "intersection": 10, "union": 20, "format": True, "box_iou": 0.6}
    >>> row |= {"points_inside": 0.5, "boxonly_iou": 0.2}
    >>> other = row | {"iou": 0.1, "union": 100, "format": False, "box_iou": 0.5}
    >>> compute_metrics([row, other, {"skipped": "no such file"}])  # doctest: +NORMALIZE_WHITESPACE
    {'giou': 0.3, 'ciou': 0.16666666666666666, 'format': 0.5, 'box': 0.5, 'points': 0.5,
     'boxonly': 0.2, 'giou_95': [0.1, 0.5], 'ciou_95': [0.1, 0.5], 'n': 2}
    """
    skipped = [row for row in rows if "skipped" in row]
    rows = [row for row in rows if "skipped" not in row]
    if skipped and not rows:
        raise UserError(f"--data: none of {len(skipped)} samples can be used: mend the files")
    n = max(len(rows), 1)
    union = sum(row[prefix + "union"] for row in rows)
    result = {"giou": sum(row[prefix + "iou"] for row in rows) / n}
    result["ciou"] = sum(row[prefix + "intersection"] for row in rows) / max(union, 1)
    if not prefix:
        result["format"] = sum(row["format"] for row in rows) / n
        result["box"] = sum(row["box_iou"] > 0.5 for row in rows) / n
        result["points"] = sum(row["points_inside"] for row in rows) / n
        result["boxonly"] = sum(row["boxonly_iou"] for row in rows) / n
    return result | intervals.bootstrap(intervals.counts_of(rows, prefix)) | {"n": len(rows)}


# --------------------------------------------------------------------------------------------------
# The two other commands, and the command line
# --------------------------------------------------------------------------------------------------


def evaluate_adapter(s) -> None:
    """Compute the metrics of an adapter, or of the base model, on a data set."""
    from plumbing import evaluation  # not for training

    heldout = load_data(s.data, "heldout")
    everything = EVAL_SAMPLES if s.data == "shapes" else len(heldout)
    count = min(s.limit or everything, len(heldout))  # limit 0: no limit
    other = evaluation.read_other(s.against, count)
    policy = load_policy(s, s.adapter)
    scorer = load_scorer(s, policy.device)
    trained = "base" if s.adapter == "none" else Path(s.adapter).resolve().parent.name
    out = runs.open_run(s, f"runs/eval-{run_name(s)}-{trained}")
    answers = evaluation.Answers(out, s, count, policy.style, heldout)
    with continued_by(runs.resume_command("eval", out)):
        rows = evaluate(policy, scorer, heldout, s, count, s.data, answers)
    results = evaluation.metrics(rows, compute_metrics, trained, s)
    if other:
        headline = results[trained]["protocol"]
        results[trained]["against"] = evaluation.compare(rows, other, headline, s.against)
    runs.write_text(out / "eval.json", json.dumps(results, indent=2))
    figure = evaluation.evaluation_sheet(rows, scorer, heldout, SamPrompt)
    runs.save_figure(figure, out / "sheet.png")
    runs.print_table(results, [], out)
    evaluation.print_protocols(results[trained], rows, s)


def segment(s) -> None:
    """Segment what a query refers to in one picture. Prints JSON and draws the answer."""
    from plumbing import evaluation, photos  # not for training

    query = photos.check_query(s.query)
    image = photos.read_picture(s.image)
    out = Path(s.out).expanduser()
    if out.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise UserError(f"--out {out}: name a picture, such as found.png (or .jpg, .pdf, .svg)")
    if out.exists() and out.samefile(Path(s.image).expanduser()):
        raise UserError(f"--out {out}: this is the --image itself: name another picture to write")
    policy = load_policy(s, s.adapter)
    scorer = load_scorer(s, policy.device)
    # The true mask is not known. An empty one stands in for it, and no score against it is used.
    one = Sample(image, query, np.zeros((image.height, image.width), bool), None, s.image)
    completions = sample_completions(policy, policy.read([one]), s, greedy=True)
    texts = policy.texts(completions)
    scores = score_completions(
        scorer, [one], texts, policy.extent, keep_masks=True, style=policy.style
    )
    answer = scores.answers[0][0]
    prompt = scores.prompts[0][0]
    mask = scores.overlap.masks[0][0].cpu().numpy()
    figure = evaluation.found(image, query, mask, prompt, answer.thought or texts[0][0])
    runs.save_figure(figure, out)
    said = {"query": query, "bbox": prompt.box, "points": prompt.points}
    said |= {"mask_pixels": int(mask.sum()), "thought": answer.thought, "completion": texts[0][0]}
    print(json.dumps(said | {"picture": str(out)}))


COMMANDS = {"train": train, "eval": evaluate_adapter, "segment": segment}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in COMMANDS:
        raise UserError(f"there is no command {argv[0]!r}: use {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](parse_settings(argv[0], argv[1:]))


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

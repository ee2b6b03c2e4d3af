"""make_sam.py - train the tiny SAM of tiny/make_tiny.py from random weights, and measure it."""

import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Sample, Shapes
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.scenes import Thing, interior_points
from reward import SamPrompt, SamScorer, decode_masks, sam_input

# SAM's lessons
SAM_STEPS, SAM_BATCH, SAM_PROMPTS = 2000, 8, 6  # scenes a step, prompts a scene
CLUSTER_LESSONS = 0.8  # share of scenes with a cluster in which both of its shapes are prompted
OUTER_BOX = 0.6  # share of these in which the upper shape comes with the lower one's box
TIGHT, LOOSE_BOX, LOOSE_SHARE = 0.08, 0.3, 0.3  # box jitter, over its size; share of loose boxes
GOOD_POINTS = 0.5  # share of point pairs near `interior_points`; the others are anywhere inside
HINTS = {"both": 0.67, "box": 0.13, "points": 0.2}  # what a step shows


def optimisers(model: torch.nn.Module, matrix_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for everything else.

    Muon is Keller Jordan's orthogonalised momentum, in torch since 2.9. With AdamW alone, neither
    model learns much within minutes.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not re.search("embed|token|rel_pos", name)
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(
    optimisers: list[torch.optim.Optimizer], steps: int
) -> list[torch.optim.lr_scheduler.LRScheduler]:
    """Fifty steps of warm-up, flat, and a linear decay to zero over the last 40 %."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))

    return [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimisers]


class SamLessons(Dataset):
    """Item i: the encoder's input for one scene, and SAM_PROMPTS boxes, point pairs and true masks
    on it.

    SAM ignores points as long as boxes suffice. So the two shapes of a cluster are prompted in the
    same scene with the same box and different points, and some boxes are loose.
    """

    def __init__(self, size: int):
        self.scenes = Shapes("warmup", seed=1, size=size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, things, *_ = self.scenes.scene(index)
        rng = random.Random(f"sam-{index}")
        side = SAM_SIZES["tiny"]["image_size"]
        pixels, scale = sam_input(image, side)
        boxes, points, masks = [], [], []
        for thing, boxed in choose_prompts(rng, things):
            boxes.append(torch.tensor(jitter_box(rng, boxed.box)))
            points.append(torch.tensor(choose_points(rng, thing.mask)))
            mask = torch.from_numpy(thing.mask)[None, None].float()
            mask = F.interpolate(mask, pixels.shape[-2:], mode="bilinear")[0, 0]
            masks.append(F.pad(mask, (0, side - mask.shape[1], 0, side - mask.shape[0])))
        return (
            F.pad(pixels, (0, side - pixels.shape[2], 0, side - pixels.shape[1])),
            (torch.stack(boxes) * scale.repeat(2)).float(),
            (torch.stack(points) * scale).float(),
            torch.stack(masks),
        )


def choose_prompts(rng: random.Random, things: list[Thing]) -> list[tuple[Thing, Thing]]:
    """SAM_PROMPTS pairs: the thing whose mask is asked for, and the thing whose box is shown."""
    pairs = []
    hard = next((thing for thing in things if thing.hard), None)
    if hard and rng.random() < CLUSTER_LESSONS:
        x, y = map(int, hard.centre)
        pairs = [(hard, hard)]
        pairs += [(t, hard if rng.random() < OUTER_BOX else t) for t in things if t.mask[y, x]]
    while len(pairs) < SAM_PROMPTS:
        thing = rng.choice(things)
        pairs.append((thing, thing))
    return pairs


def jitter_box(rng: random.Random, box: tuple[int, ...]) -> list[float]:
    x1, y1, x2, y2 = box
    share = LOOSE_BOX if rng.random() < LOOSE_SHARE else TIGHT
    sizes = (x2 - x1, y2 - y1) * 2
    return [v + rng.uniform(-share, share) * size for v, size in zip(box, sizes, strict=True)]


def choose_points(rng: random.Random, mask: np.ndarray) -> list[tuple[float, float]]:
    """Two points of the mask (H, W), x, y in image pixels: anywhere, or near the good ones."""
    rows, columns = mask.nonzero()
    picks = [rng.randrange(len(rows)) for _ in range(2)]
    points = [(float(columns[k]), float(rows[k])) for k in picks]
    if rng.random() < GOOD_POINTS:
        for k, (x, y) in enumerate(interior_points(mask)):
            column, row = int(x + rng.uniform(-2, 2)), int(y + rng.uniform(-2, 2))
            inside = 0 <= column < mask.shape[1] and 0 <= row < mask.shape[0]
            if inside and mask[row, column]:
                points[k] = (float(column), float(row))
    return points


def train_sam(out: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam(**SAM_SIZES["tiny"]).train().requires_grad_(True)
    opts = optimisers(sam, matrix_lr=0.02, lr=1e-3)
    plans = schedule(opts, SAM_STEPS)
    lessons = SamLessons(SAM_STEPS * SAM_BATCH)
    loader = DataLoader(lessons, SAM_BATCH, num_workers=1, prefetch_factor=8)
    image_index = torch.arange(SAM_BATCH).repeat_interleave(SAM_PROMPTS)
    bar = tqdm(loader, desc="SAM", unit="step")
    kinds = random.Random(0)
    for pixels, boxes, points, masks in bar:
        embeddings = sam.image_encoder(sam.preprocess(pixels))
        hint = kinds.choices(list(HINTS), list(HINTS.values()))[0]
        logits, estimate = decode_masks(
            sam,
            embeddings,
            image_index,
            None if hint == "points" else boxes.flatten(0, 1),
            None if hint == "box" else points.flatten(0, 1),
        )
        truth = F.adaptive_avg_pool2d(masks, logits.shape[-2:])  # (scenes, prompts, h, w)
        truth = truth.flatten(0, 1)[:, None].expand_as(logits)
        share = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth)
        overlap = (share * truth).sum((-2, -1))
        dice = 1 - (2 * overlap + 1) / (share.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
        guess, right = logits > 0, truth > 0.5
        iou = (guess & right).sum((-2, -1)) / (guess | right).sum((-2, -1)).clamp(min=1)
        loss = 5 * cross_entropy + dice.mean() + F.mse_loss(estimate, iou)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for step in (*opts, *plans):
            step.step()
        sam.zero_grad()
        mean_iou = iou[:, 1:].mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", iou=f"{mean_iou:.3f}", refresh=False)
    # Half precision loses nothing here: the reloaded model has the same IoU to the third digit.
    weights = {name: weight.half().contiguous() for name, weight in sam.state_dict().items()}
    save_file(weights, out / "sam.safetensors")


def middle_points(box: tuple[float, ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middle of a box x1, y1, x2, y2, and a point halfway between it and the lower edge."""
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return (x, y), (x, y + (y2 - y1) / 4)


def report_sam(out: Path, count: int = 192) -> None:
    """Print SAM's mean mask IoU on held-out scenes by kind of prompt and of target."""
    targets = []
    samples = []
    prompts = []
    for index in range(count):
        image, things, _, target = Shapes("heldout").scene(index)
        thing = things[target]
        points = interior_points(thing.mask)
        shown = {
            "true box, good points": SamPrompt(thing.box, points),
            "true box, points in its middle": SamPrompt(thing.box, middle_points(thing.box)),
            "true box alone": SamPrompt(thing.box, ()),
            "nearest other box, good points": SamPrompt(nearest_other(thing, things).box, points),
            "good points alone": SamPrompt(None, points),
        }
        targets.append(thing)
        samples.append(Sample(image, "", thing.mask, None, ""))
        prompts.append(list(shown.values()))
    scorer = SamScorer(load_sam(f"tiny:{out / 'sam.safetensors'}"))
    batches = [slice(start, start + 32) for start in range(0, count, 32)]
    iou = torch.cat([scorer.score(samples[rows], prompts[rows]).iou for rows in batches])
    groups = {
        "all": [True] * count,
        "hard": [thing.hard for thing in targets],
        "ring": [thing.kind == "ring" for thing in targets],
        "covered, inlay": [thing.hard and thing.kind != "ring" for thing in targets],
        "plain": [not thing.hard for thing in targets],
    }
    titles = [f"{name} ({sum(members)})" for name, members in groups.items()]
    print(f"SAM, mean mask IoU on {count} held-out scenes, by kind of target:")
    print(f"{'':32}{''.join(f'{title:>21}' for title in titles)}")
    for name, column in zip(shown, iou.T, strict=True):
        means = [column[torch.tensor(members)].mean() for members in groups.values()]
        print(f"{name:32}{''.join(f'{mean:21.3f}' for mean in means)}")


def nearest_other(thing: Thing, things: list[Thing]) -> Thing:
    """The thing whose middle lies nearest to that of `thing`; itself if it is alone."""
    others = [other for other in things if other is not thing]
    return min(others, key=lambda o: np.hypot(*np.subtract(o.centre, thing.centre)), default=thing)

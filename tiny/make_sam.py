"""make_sam.py - train the tiny SAM of tiny/make_tiny.py from random weights, and measure it."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Sample, Shapes
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.scenes import Thing, interior_points
from reward import SamPrompt, SamScorer, decode_masks, sam_input

# SAM's lessons
SAM_STEPS, SAM_BATCH, SAM_PROMPTS = 5200, 8, 6  # scenes a step, prompts a scene
CLUSTER_LESSONS = 0.8  # share of scenes with a cluster in which both of its shapes are prompted
OUTER_BOX = 0.6  # share of these in which the upper shape comes with the lower one's box
TIGHT = 0.08  # jitter of the edges of a good box, over its size
WRONG_BOX = 0.5  # share of boxes that are wrong:
SHIFT, LOOSE = 0.5, 0.2  # they are shifted by up to SHIFT of their size, their edges by up to LOOSE
MARGIN = 0.06  # SAM may look this far over the edge of a box, over its size
GOOD_POINTS = 0.5  # share of point pairs near `interior_points`; the others are anywhere inside
ASTRAY = 0.25  # share of prompts with points on the background:
WHICH_ASTRAY = {(0,): 0.4, (1,): 0.4, (0, 1): 0.2}  # the first, the second, or both
ROOM = 12  # fewest pixels that a part of an object or of the background must have
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


def schedule(optimisers: list[torch.optim.Optimizer], steps: int) -> list[LambdaLR]:
    """Fifty steps of warm-up, flat, and a linear decay to zero over the last 40 %."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))

    return [LambdaLR(optimiser, share) for optimiser in optimisers]


class SamLessons(Dataset):
    """Item i: the encoder's input for one scene, SAM_PROMPTS prompts on it, and their masks.

    SAM ignores points as long as boxes suffice. So the two shapes of a cluster are prompted in the
    same scene with the same box and different points.

    It also learns to take a prompt literally, because a policy can learn only what its reward
    notices. Where a box misses a part of the object, the mask to learn misses that part too. Where
    a point lies on the background, the mask to learn holds the background inside the box.

    An item is a dictionary of float tensors in the encoder's frame, with P = SAM_PROMPTS:
    "pixels" (3, side, side); "boxes" (P, 2, 2); "points" (P, 2, 2), some on the background;
    "good_points" (P, 2, 2), all of them on the object; and, (P, side, side) each, the masks
    "whole" (the object), "cut" (its part in the box), and "filled" (what the box and "points" ask
    for).
    """

    def __init__(self, size: int):
        self.scenes = Shapes("warmup", seed=1, size=size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, things, *_ = self.scenes.scene(index)
        rng = random.Random(f"sam-{index}")
        side = SAM_SIZES["tiny"]["image_size"]
        pixels, scale = sam_input(image, side)
        background = ~np.any([thing.mask for thing in things], axis=0)
        prompts = []
        for thing, boxed in choose_prompts(rng, things):
            box, cut = choose_box(rng, thing, boxed)
            good = choose_points(rng, cut)
            points, filled = lead_astray(rng, good, cut, cut_mask(background, box))
            shown = {"boxes": box, "points": points, "good_points": good}
            prompts.append(shown | {"whole": thing.mask, "cut": cut, "filled": filled})
        lesson = {"pixels": pixels}
        for name in ("boxes", "points", "good_points"):
            corners = torch.tensor([prompt[name] for prompt in prompts]).view(-1, 2, 2)
            lesson[name] = (corners * scale).float()
        for name in ("whole", "cut", "filled"):
            masks = torch.from_numpy(np.stack([prompt[name] for prompt in prompts]))
            resized = F.interpolate(masks[:, None].float(), pixels.shape[-2:], mode="bilinear")
            lesson[name] = resized[:, 0]
        below, right = side - pixels.shape[-2], side - pixels.shape[-1]
        for name in ("pixels", "whole", "cut", "filled"):
            lesson[name] = F.pad(lesson[name], (0, right, 0, below))
        return lesson


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


def choose_box(rng: random.Random, thing: Thing, boxed: Thing) -> tuple[list[float], np.ndarray]:
    """A box around `boxed`, good or wrong, and the part of the mask of `thing` that it holds."""
    for _ in range(20):
        shift, loose = (SHIFT, LOOSE) if rng.random() < WRONG_BOX else (0.0, TIGHT)
        x1, y1, x2, y2 = jitter_box(rng, boxed.box, shift, loose)
        box = [min(x1, x2 - 2), min(y1, y2 - 2), x2, y2]
        cut = cut_mask(thing.mask, box)
        if cut.sum() >= ROOM:
            return box, cut
    return [float(edge) for edge in boxed.box], thing.mask


def jitter_box(rng: random.Random, box: tuple, shift: float, loose: float) -> tuple[float, ...]:
    """A box shifted by up to `shift` of its size, and each edge by up to `loose` more."""
    sizes = (box[2] - box[0], box[3] - box[1]) * 2
    shifts = [rng.uniform(-shift, shift) if shift else 0.0 for _ in range(2)] * 2
    moved = zip(box, shifts, sizes, strict=True)
    return tuple(edge + (by + rng.uniform(-loose, loose)) * size for edge, by, size in moved)


def cut_mask(mask: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The part of a mask (H, W) inside a box in pixels, or less than MARGIN of its size outside."""
    x1, y1, x2, y2 = box
    across = MARGIN * (x2 - x1) + 0.5
    down = MARGIN * (y2 - y1) + 0.5
    rows = slice(max(0, round(y1 - down)), max(0, round(y2 + down)))
    columns = slice(max(0, round(x1 - across)), max(0, round(x2 + across)))
    part = np.zeros_like(mask)
    part[rows, columns] = mask[rows, columns]
    return part


def lead_astray(rng: random.Random, points: list, cut: np.ndarray, background: np.ndarray):
    """In a share ASTRAY of the prompts, move points from the object to the background.

    cut, background: the parts of the object and of the background in the box, (H, W) each.
    Returns the two points, and the mask they ask for: of the two parts, those with a point.
    """
    if rng.random() >= ASTRAY or background.sum() < ROOM:
        return points, cut
    rows, columns = background.nonzero()
    moved = rng.choices(list(WHICH_ASTRAY), list(WHICH_ASTRAY.values()))[0]
    points = list(points)
    for which in moved:
        pick = rng.randrange(len(rows))
        points[which] = (float(columns[pick]), float(rows[pick]))
    return points, background if len(moved) == 2 else cut | background


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
    for lesson in bar:
        embeddings = sam.image_encoder(sam.preprocess(lesson["pixels"]))
        hint = kinds.choices(list(HINTS), list(HINTS.values()))[0]
        masks = lesson[{"both": "filled", "box": "cut", "points": "whole"}[hint]]
        points = lesson["good_points" if hint == "points" else "points"]
        logits, estimate = decode_masks(
            sam,
            embeddings,
            image_index,
            None if hint == "points" else lesson["boxes"].view(-1, 4),
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
        bar.set_postfix(loss=f"{loss:.3f}", iou=f"{iou[:, 1:].mean():.3f}", refresh=False)
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
    targets, samples, prompts = [], [], []
    for index in range(count):
        image, things, _, target = Shapes("heldout").scene(index)
        thing = things[target]
        points = interior_points(thing.mask)
        astray = background_point(things, thing)
        shown = {
            "true box, good points": SamPrompt(thing.box, points),
            "true box, points in its middle": SamPrompt(thing.box, middle_points(thing.box)),
            "true box alone": SamPrompt(thing.box, ()),
            "good points alone": SamPrompt(None, points),
            "box grown by 15 %, good points": SamPrompt(move_box(thing.box, grow=0.15), points),
            "box shifted by 25 %, good points": SamPrompt(move_box(thing.box, shift=0.25), points),
            "box shifted by 50 %, good points": SamPrompt(move_box(thing.box, shift=0.5), points),
            "true box, one point astray": SamPrompt(thing.box, (points[0], astray)),
            "true box, both points astray": SamPrompt(thing.box, (astray, astray)),
        }
        targets.append(thing)
        samples.append(Sample(image, "", thing.mask, None, ""))
        prompts.append(list(shown.values()))
    scorer = SamScorer(load_sam(f"tiny:{out / 'sam.safetensors'}"))
    iou = scorer.score(samples, prompts).iou  # (scenes, prompts)
    hard = torch.tensor([thing.hard for thing in targets])
    print(f"SAM, mean mask IoU on {count} held-out scenes, by kind of target:")
    print(f"{'':34}{f'all ({count})':>14}{f'hard ({hard.sum()})':>14}")
    for name, column in zip(shown, iou.T, strict=True):
        print(f"{name:34}{column.mean():14.3f}{column[hard].mean():14.3f}")


def move_box(box: tuple[float, ...], shift: float = 0.0, grow: float = 0.0) -> tuple[float, ...]:
    """A box x1, y1, x2, y2, moved to the right and grown on each side by a share of its size."""
    width, height = box[2] - box[0], box[3] - box[1]
    x1, x2 = box[0] + (shift - grow) * width, box[2] + (shift + grow) * width
    return (x1, box[1] - grow * height, x2, box[3] + grow * height)


def background_point(things: list[Thing], thing: Thing) -> tuple[float, float]:
    """A pixel of the background near `thing`: the one after a third of them, row by row."""
    background = ~np.any([member.mask for member in things], axis=0)
    near = cut_mask(background, move_box(thing.box, grow=0.3))
    rows, columns = (near if near.any() else background).nonzero()
    pick = len(rows) // 3
    return (columns[pick] + 0.5, rows[pick] + 0.5)

"""rewards.py - rewards to compare the paper's with. None of them uses SAM's mask.

"box" is the paper's tiers on the IoU of the boxes. "segzero" is the reward of Seg-Zero (arXiv
2503.06520), the closest earlier system, and "segzero_mask" the same with a stronger label.
"""

import numpy as np
import torch
from torchvision.ops import box_iou, masks_to_boxes

from plumbing.scenes import interior_points, points_inside

# What --accuracy takes: names of `reward.accuracy_reward`, then the rewards of this file.
ACCURACY = ("tiered", "0.5", "0.7", "0.8", "iou", "box", "segzero", "segzero_mask")


def true_box(mask: np.ndarray) -> tuple[float, ...] | None:
    """The tightest box x1, y1, x2, y2 around a mask (H, W), image pixels, x2 and y2 exclusive."""
    if not mask.any():
        return None
    x1, y1, x2, y2 = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    return (x1, y1, x2 + 1, y2 + 1)


def box_ious(samples: list, prompts: list[list]) -> torch.Tensor:
    """IoU (B, G) of the box of each prompt with the true box, 0 where one of them is missing.

    prompts: B lists of G `reward.SamPrompt`, in image pixels.
    """
    none = (0.0, 0.0, 0.0, 0.0)
    rows = []
    for sample, group in zip(samples, prompts, strict=True):
        boxes = torch.tensor([prompt.box or none for prompt in group], dtype=torch.float64)
        truth = torch.tensor([true_box(sample.mask) or none], dtype=torch.float64)
        rows.append(box_iou(boxes, truth)[:, 0].nan_to_num())
    return torch.stack(rows).float()


def segzero_reward(
    samples: list, prompts: list[list], extent: float, in_mask: bool
) -> torch.Tensor:
    """Seg-Zero's reward for boxes and points, (B, G), 4/3 for each of three conditions:

    box IoU above 0.5; mean L1 distance of the box's coordinates below 10 pixels; both points in the
    true box and, on average, within 100 pixels of two labelled points. Pixels are those of an
    840 x 840 image. A smaller policy image is coarser: there the 10 are two of its pixels.

    prompts: B lists of G `reward.SamPrompt`, in image pixels.
    extent:  of `reward.sam_prompt`.
    in_mask: a stronger label, each point must lie in the true mask. The labelled points are
             `interior_points` of the true mask.
    """
    nearest = max(10, 2 * 840 / extent)
    reward = (box_ious(samples, prompts) > 0.5).float()
    for b, (sample, group) in enumerate(zip(samples, prompts, strict=True)):
        truth = true_box(sample.mask)
        for g, prompt in enumerate(group):
            if truth is not None and prompt.box is not None:
                size = np.array(sample.image.size)
                distance = np.abs(np.subtract(prompt.box, truth)) * np.tile(840 / size, 2)
                reward[b, g] += bool(distance.mean() < nearest)
                reward[b, g] += good_points(prompt.points, sample.mask, truth, in_mask)
    return reward * 4 / 3


def good_points(points: tuple, mask: np.ndarray, truth: tuple[float, ...], in_mask: bool) -> bool:
    """Whether two points (x, y), image pixels, meet Seg-Zero's condition. truth: the true box."""
    if len(points) < 2:
        return False
    if in_mask:
        return points_inside(points, mask) == 1
    points = np.array(points)
    size = np.array(mask.shape[::-1])
    labels = np.array(interior_points(mask))
    inside = (points >= truth[:2]).all() and (points <= truth[2:]).all()
    distances = [
        np.linalg.norm((points - two) * 840 / size, axis=1).mean() for two in (labels, labels[::-1])
    ]
    return bool(inside and min(distances) < 100)

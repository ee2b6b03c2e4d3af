"""boxes.py - the true box of a mask, and the IoU of boxes."""

import numpy as np
import torch
from torchvision.ops import box_iou, masks_to_boxes


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

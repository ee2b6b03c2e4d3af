"""reward.py - what the policy is paid for: answer -> SAM prompt -> mask -> IoU -> reward.

A completion earns three rewards, which are added (the paper's reward functions):

    accuracy        SAM turns its box and points into a mask. The IoU of that mask with the true one
                    falls into tiers: 4, 3, 2 or 0
    think format    1 if it is one <think> block with text, one <answer> block, and nothing else
    answer format   1 if the answer is JSON that holds a box and two points

The file follows the data: `parse_answer`, `sam_prompt`, `SamScorer` (prompts to masks to IoU, for
all images and completions of a step at once), `accuracy_reward`, `score_completions` (all of it).

Where this departs from the paper:
  1. The default segmenter is SAM 1 (`segment_anything`). The paper uses SAM2-Large, which
     `--sam sam2:facebook/sam2-hiera-large` loads.
  2. A violated format earns 0, a right one 1. *Assumed*: the paper has a penalty and does not give
     its size. Advantages subtract the mean of a group, so 1 and 0 have the same effect as 0 and -1.
  3. The JSON keys and the number of points follow Seg-Zero. *Assumed*: not stated in the paper.

A completion is text from a model in training, so it can be anything. Nothing in this file raises on
any text, and no reward is NaN. Errors of our own code are never caught: a bug in the reward must
look like a bug, not like a bad policy.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou, masks_to_boxes

from plumbing.answers import answer_fields, find_block, last_block, numbers
from plumbing.devices import half_precision, to_device
from plumbing.prompts import points_asked
from plumbing.sam import load_weights, restore_weights
from plumbing.scenes import interior_points

# --------------------------------------------------------------------------------------------------
# Text to numbers
# --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a completion says. Coordinates as written: policy pixels, or thousandths."""

    think_format: bool  # <think> reasoning </think> <answer> ... </answer>, and nothing else
    answer_format: bool  # the answer is JSON with a valid box and two valid points
    box: tuple[float, ...] | None  # x1, y1, x2, y2 with x1 < x2 and y1 < y2
    points: tuple[tuple[float, ...], ...]  # the valid ones of the two, (x, y) each
    thought: str  # the reasoning, "" if there is none
    objects: int = 1  # that the answer lists


def parse_answer(text: str, style: str = "full") -> Answer:
    """Read a completion. Never raises, and takes time linear in the length of the text.

    Each part is judged separately: SAM gets a valid box even if a point or the thought is missing.
    The answer is the last <answer> block after the thought, as JSON or as a Python literal. The
    helpers are in plumbing/answers.py. style: of the prompt. "visionreasoner" is answered with a
    list of objects with one point each: the first counts, while VisionReasoner unites all masks.

    >>> text = '<think>the red one</think><answer>{"points_1":[3,4], "bbox":[1,2,5.5,6]}</answer>'
    >>> answer = parse_answer(text)
    >>> answer.think_format, answer.answer_format, answer.box, answer.points, answer.thought
    (True, False, (1.0, 2.0, 5.5, 6.0), ((3.0, 4.0),), 'the red one')
    """
    think = find_block(text, "<think>", "</think>")
    answer = last_block(think.after if think else text, "<answer>", "</answer>")
    data = answer_fields(answer.inside, style) if answer else {}
    box = numbers(data.get("bbox"), 4)
    if box and not (box[0] < box[2] and box[1] < box[3]):
        box = None  # swapped corners: SAM would still draw a plausible mask of it
    points = tuple(p for key in ("points_1", "points_2") if (p := numbers(data.get(key), 2)))
    thought = think.inside.strip() if think else ""
    think_format = False
    if thought and answer:  # all text outside of the two blocks must be white space
        think_format = not (think.before + answer.before + answer.after).strip()
    answer_format = box is not None and len(points) == points_asked(style)
    return Answer(think_format, answer_format, box, points, thought, data.get("objects", 1))


class SamPrompt(NamedTuple):
    """A prompt for SAM, in image pixels. With neither box nor points the mask is empty."""

    box: tuple[float, ...] | None  # x1, y1, x2, y2
    points: tuple[tuple[float, ...], ...]  # (x, y) each, all on the target


def sam_prompt(answer: Answer, frame: float, width: int, height: int) -> SamPrompt:
    """Scale an answer to image pixels and crop it to the image of width x height pixels.

    frame: the number that the policy writes for the far edge of the image: the side of the image it
           sees in policy pixels, or 1000 for thousandths.
    The box is clipped to the image. A box or point that lies outside is dropped.

    >>> answer = Answer(True, True, (10, 10, 80, 32), ((20, 20), (70, 70)), "")
    >>> sam_prompt(answer, frame=64, width=128, height=96)
    SamPrompt(box=(20.0, 15.0, 128, 48.0), points=((40.0, 30.0),))
    """
    to_x, to_y = width / frame, height / frame
    box = None
    if answer.box:
        x1, y1, x2, y2 = answer.box
        box = (max(x1 * to_x, 0), max(y1 * to_y, 0), min(x2 * to_x, width), min(y2 * to_y, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            box = None
    points = ((x * to_x, y * to_y) for x, y in answer.points)
    inside = tuple((x, y) for x, y in points if 0 <= x <= width and 0 <= y <= height)
    return SamPrompt(box, inside)


# --------------------------------------------------------------------------------------------------
# Prompts to masks to IoU
# --------------------------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Overlap of B x G masks with B true masks. Tensors (B, G) on the scorer's device."""

    intersection: torch.Tensor  # float32, pixels; exact up to 16 million
    union: torch.Tensor  # float32, pixels
    prompted: torch.Tensor  # bool: SAM was given a box or a point
    masks: list[torch.Tensor] | None  # B tensors (G, H, W) bool, with keep_masks=True
    segzero: tuple = ()  # intersection and union if ignored pixels are target (B, G)

    @property
    def iou(self) -> torch.Tensor:
        """Intersection / union, and 1 where both masks are empty (the metric's convention)."""
        return torch.where(self.union > 0, self.intersection / self.union.clamp(min=1), 1.0)


def intersection_and_union(
    masks: torch.Tensor, truth: torch.Tensor, ignore: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in the intersection and in the union of G masks with one true mask.

    masks (G, H, W), truth (H, W), ignore (H, W) or None, all bool -> (G,), (G,) float32. Ignored
    pixels count neither in the intersection nor in the union.

    >>> masks = torch.tensor([[[True, False, False, False]], [[True, True, True, True]]])
    >>> truth = torch.tensor([[True, True, True, False]])
    >>> ignore = torch.tensor([[False, False, True, True]])
    >>> intersection_and_union(masks, truth, ignore)
    (tensor([1., 2.]), tensor([2., 2.]))
    """
    intersection, union = masks & truth, masks | truth  # (G, H, W)
    if ignore is not None:
        intersection, union = intersection & ~ignore, union & ~ignore
    # Counting in int32 is faster than in int64, torch's default.
    return tuple(x.sum((1, 2), dtype=torch.int32).float() for x in (intersection, union))


class SamScorer:
    """A frozen segmenter, SAM 1 or SAM 2, that scores all completions of a step at once.

    Each image is encoded once, however many completions are about it. Prompts that hold the same
    (a box and two points, a box only, ...) are decoded together, across images. Only the mask that
    the model itself rates best of its three is brought to full size. The masks are those of the
    model's own predictor for the same prompt: `SamPredictor`, or transformers' `Sam2Processor`.
    """

    def __init__(self, sam, device: str = "cpu", encoder_batch: int = 8, offload: bool = False):
        """sam: from `load_sam`. Only its methods know which model it is (`plumbing.sam.Sam1`).

        encoder_batch: images that are encoded together. offload: keep the model in host memory
        between calls of `score`; for ViT-H this frees 2.4 GiB of the GPU.
        """
        self.device, self.encoder_batch, self.offload = torch.device(device), encoder_batch, offload
        self.sam = sam.to("cpu" if offload else device).eval().requires_grad_(False)
        # Bytes of the largest level of embeddings in a decoder call. On a GPU this is 16 prompts of
        # an official SAM 1 and 8 of SAM 2. On a CPU 4 and 2: glibc maps large blocks anew (slow).
        self.decoder_bytes = 2**24 if self.device.type == "cpu" else 2**26

    @torch.no_grad()
    def score(self, samples: list, prompts: list[list[SamPrompt]], keep_masks=False) -> Overlap:
        """Masks and their overlap with the truth for B samples x G prompts.

        samples: B objects like `data.Sample`, with `image`, `mask` and `ignore`.
        prompts: B lists of G prompts, in image pixels. An empty prompt gets an empty mask.
        """
        B, G = len(samples), len(prompts[0])
        host = load_weights(self.sam, self.device) if self.offload else None
        embeddings, factors = self.encode([sample.image for sample in samples])
        flat = [prompt for group in prompts for prompt in group]
        logits, prompted = self._best_logits(embeddings, factors, flat)
        logits = logits.unflatten(0, (B, G))
        overlaps, masks = [], []
        for b, sample in enumerate(samples):  # one by one: every image has its own size
            full = self.sam.upsample(logits[b], sample.mask.shape)
            mask = full > self.sam.mask_threshold  # (G, H, W)
            truth, ignore = (
                None if pixels is None else self._to_device(torch.from_numpy(pixels))
                for pixels in (sample.mask, sample.ignore)
            )
            counts = wide = intersection_and_union(mask, truth, ignore)
            if ignore is not None:  # also with ignored pixels as target, see plumbing/protocols.py
                wide = intersection_and_union(mask, truth | ignore, None)
            overlaps.append((*counts, *wide))
            masks.append(mask if keep_masks else None)
        if self.offload:
            restore_weights(self.sam, host)
        counts = [torch.stack(column) for column in zip(*overlaps, strict=True)]
        masks = masks if keep_masks else None
        return Overlap(*counts[:2], prompted.view(B, G), masks, tuple(counts[2:]))

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Encode B images. Returns levels of embeddings, (B, C, h, w) float32 each, and factors
        (B, 2), float64, from image pixels x, y to those of the encoder's input."""
        pixels, factors = zip(*map(self.sam.prepare, images), strict=True)
        half = half_precision(self.device)  # for the encoder only, not for the decoder
        batches = []
        for start in range(0, len(images), self.encoder_batch):
            batch = [self._to_device(p) for p in pixels[start : start + self.encoder_batch]]
            with torch.autocast(self.device.type, half, self.device.type == "cuda"):
                batches.append(self.sam.encode(batch))
        levels = [torch.cat(level).float() for level in zip(*batches, strict=True)]
        return levels, torch.stack(factors)

    def _best_logits(self, embeddings, factors, prompts: list[SamPrompt]):
        """Logits (B*G, 4h, 4w) of the best of three masks for each of B*G prompts, and whether the
        prompt was not empty (B*G,). h, w: size of the last level of the embeddings."""
        G = len(prompts) // len(factors)
        h, w = embeddings[-1].shape[2:]
        best = embeddings[-1].new_full((len(prompts), 4 * h, 4 * w), -1.0)  # -1: outside the mask
        size = max(1, self.decoder_bytes // max(level[0].nbytes for level in embeddings))
        # Group prompts by what they hold. Padding a missing point beside a box would change the
        # mask, because SAM was not trained on that.
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault((prompt.box is not None, len(prompt.points)), []).append(index)
        empty_prompts = groups.pop((False, 0), [])
        for (has_box, count), members in groups.items():
            for index in torch.tensor(members).split(size):
                image = index // G
                chosen, factor = [prompts[i] for i in index.tolist()], factors[image]  # (N, 2)
                boxes = points = None
                if has_box:
                    boxes = torch.tensor([p.box for p in chosen], dtype=torch.float64)
                    boxes = self._to_device((boxes * factor.repeat(1, 2)).float())
                if count:
                    points = torch.tensor([p.points for p in chosen], dtype=torch.float64)
                    points = self._to_device((points * factor[:, None]).float())
                image_index = self._to_device(image)
                logits, rating = self.sam.decode(embeddings, image_index, boxes, points)
                each = torch.arange(len(index), device=self.device)
                best[self._to_device(index)] = logits[each, rating.argmax(1)]
        prompted = torch.ones(len(prompts), dtype=torch.bool)
        prompted[empty_prompts] = False
        return best, self._to_device(prompted)

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        return to_device(x, self.device)


# --------------------------------------------------------------------------------------------------
# IoU to reward
# --------------------------------------------------------------------------------------------------

# The paper's accuracy reward: an IoU above the first number earns the second.
TIERS = ((0.5, 2.0), (0.7, 3.0), (0.8, 4.0))
ACCURACY_REWARDS = ("tiered", "0.5", "0.7", "0.8", "iou", "box", "segzero", "segzero_mask")


def tiered_reward(iou: torch.Tensor) -> torch.Tensor:
    """The paper's accuracy reward, of any shape.

    >>> tiered_reward(torch.tensor([0.50, 0.51, 0.70, 0.75, 0.81]))
    tensor([0., 2., 2., 3., 4.])
    """
    reward = torch.zeros_like(iou)
    for threshold, value in TIERS:
        reward = torch.where(iou > threshold, value, reward)
    return reward


def accuracy_reward(iou: torch.Tensor, kind: str) -> torch.Tensor:
    """The accuracy reward by name: "tiered", "0.5", "0.7", "0.8" (fixed thresholds) or "iou".

    The rows of the paper's Table 3. All reach from 0 to 4, so the format rewards keep their weight.
    *Assumed*: the paper does not give the height of its fixed thresholds.

    >>> iou = torch.tensor([0.6, 0.75])
    >>> accuracy_reward(iou, "0.7"), accuracy_reward(iou, "iou")
    (tensor([0., 4.]), tensor([2.4000, 3.0000]))
    """
    if kind == "tiered":
        return tiered_reward(iou)
    if kind == "iou":
        return 4.0 * iou
    return 4.0 * (iou > float(kind)).float()


# Two rewards to compare the paper's with. Neither asks SAM.


def true_box(mask: np.ndarray) -> tuple[float, ...] | None:
    """The tightest box x1, y1, x2, y2 around a mask (H, W), image pixels, x2 and y2 exclusive."""
    if not mask.any():
        return None
    x1, y1, x2, y2 = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    return (x1, y1, x2 + 1, y2 + 1)


def box_ious(samples: list, prompts: list[list[SamPrompt]]) -> torch.Tensor:
    """IoU (B, G) of the box of each prompt with the true box, 0 where one of them is missing.

    "box" is the paper's tiers on this IoU: a reward that never looks at a mask.
    """
    none = (0.0, 0.0, 0.0, 0.0)
    rows = []
    for sample, group in zip(samples, prompts, strict=True):
        boxes = torch.tensor([prompt.box or none for prompt in group], dtype=torch.float64)
        truth = torch.tensor([true_box(sample.mask) or none], dtype=torch.float64)
        rows.append(box_iou(boxes, truth)[:, 0].nan_to_num())
    return torch.stack(rows).float()


def segzero_reward(samples: list, prompts: list[list[SamPrompt]], frame: float, in_mask: bool):
    """Seg-Zero's reward (arXiv 2503.06520) for boxes and points, (B, G), 4/3 for each of three:

    box IoU above 0.5; mean L1 distance of the box's coordinates below 10 pixels; both points in the
    true box and, on average, within 100 pixels of two labelled points. Pixels are those of an
    840 x 840 image. A smaller policy image (frame) is coarser: there the 10 are two of its pixels.

    The labelled points are `interior_points` of the true mask. in_mask: a stronger label, each
    point must lie in the true mask.
    """
    reward = (box_ious(samples, prompts) > 0.5).float()
    for b, (sample, group) in enumerate(zip(samples, prompts, strict=True)):
        scale = 840 / np.array(sample.image.size)  # (2,), image pixels to those of 840 x 840
        truth, labels = true_box(sample.mask), np.array(interior_points(sample.mask))
        for g, prompt in enumerate(group):
            if truth is None or prompt.box is None:
                continue
            distance = np.abs(np.subtract(prompt.box, truth)) * np.tile(scale, 2)
            reward[b, g] += bool(distance.mean() < max(10, 2 * 840 / frame))
            points = np.array(prompt.points)
            if len(points) < 2:
                continue
            if in_mask:
                x, y = np.minimum(points, np.array(sample.image.size) - 1).astype(int).T
                reward[b, g] += bool(sample.mask[y, x].all())
                continue
            inside = (points >= truth[:2]).all() and (points <= truth[2:]).all()
            far = [np.linalg.norm((points - two) * scale, axis=1) for two in (labels, labels[::-1])]
            reward[b, g] += bool(inside and min(d.mean() for d in far) < 100)
    return reward * 4 / 3


class Scores(NamedTuple):
    """Rewards of B x G completions and their parts. Tensors (B, G) float32 on the CPU."""

    reward: torch.Tensor  # the sum of the next three, 0 to 6
    accuracy: torch.Tensor
    think_format: torch.Tensor
    answer_format: torch.Tensor
    iou: torch.Tensor
    answers: list[list[Answer]]
    prompts: list[list[SamPrompt]]
    overlap: Overlap


def score_completions(
    scorer: SamScorer,
    samples: list,
    completions: list[list[str]],
    frame: float,
    accuracy: str = "tiered",
    keep_masks: bool = False,
    style: str = "full",
) -> Scores:
    """The whole reward for B samples x G completions (texts). See `sam_prompt` for `frame`.

    A completion without a usable box or point has IoU 0, even where the true mask is empty. style:
    of the prompt, see `parse_answer`.
    """
    answers = [[parse_answer(text, style) for text in group] for group in completions]
    prompts = [
        [sam_prompt(answer, frame, *sample.image.size) for answer in group]
        for sample, group in zip(samples, answers, strict=True)
    ]
    overlap = scorer.score(samples, prompts, keep_masks)
    iou = torch.where(overlap.prompted, overlap.iou, 0.0).cpu()  # here the host waits for the GPU
    if accuracy == "box":
        earned = tiered_reward(box_ious(samples, prompts))
    elif accuracy.startswith("segzero"):
        earned = segzero_reward(samples, prompts, frame, in_mask=accuracy == "segzero_mask")
    else:
        earned = accuracy_reward(iou, accuracy)
    think_format = torch.tensor([[float(a.think_format) for a in group] for group in answers])
    answer_format = torch.tensor([[float(a.answer_format) for a in group] for group in answers])
    reward = earned + think_format + answer_format
    return Scores(reward, earned, think_format, answer_format, iou, answers, prompts, overlap)

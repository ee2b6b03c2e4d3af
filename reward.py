"""reward.py - what the policy is paid for: text -> box and points -> SAM -> mask -> IoU -> reward.

Paper, sec. 3 (reward functions). A completion earns three rewards, summed:

    accuracy        SAM turns its box and points into a mask; the mask's IoU with the truth, in tiers: 4, 3, 2 or 0
    think format    1 if it reasons in one well-formed <think> block before one <answer> block, else 0
    answer format   1 if the answer is JSON that holds a box and two points, else 0

The file follows the data: `parse_answer` (text to numbers), `sam_prompt` (policy pixels to image pixels), `SamScorer`
(prompts to masks to IoU, all images and completions of a step at once), `accuracy_reward`, `score_completions`.

Where this departs from the paper: SAM 1 (`segment_anything`) in place of SAM2-Large; what a violated format costs is
*assumed* (0: the gap to the right one is what counts in a group, not the sign); key names and the two points follow
Seg-Zero, the closest public system.

A completion is text from a model under training, so it may hold anything. Nothing in here raises on any text, and no
reward is ever NaN. And no error of our own is swallowed: a bug in the reward must look like a bug, not like a bad policy.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from segment_anything.utils.transforms import ResizeLongestSide

# ---------------------------------------------------------------------------------------------------------------------
# Text to numbers
# ---------------------------------------------------------------------------------------------------------------------

LONGEST_ANSWER = 2000  # characters; a box and two points need a tenth. Longer ones are not parsed at all.
LARGEST_NUMBER = 1e6  # no image is that wide: beyond it (and at NaN and infinity) a coordinate is no coordinate


class Answer(NamedTuple):
    """What a completion says. Coordinates are as written: policy pixels, or thousandths for models that use them."""

    think_format: bool  # <think> reasoning </think> <answer> ... </answer>, each once, nothing around them
    answer_format: bool  # the answer is JSON with a valid box and two valid points
    box: tuple[float, ...] | None  # x1, y1, x2, y2 with x1 < x2 and y1 < y2
    points: tuple[tuple[float, ...], ...]  # those of the two that are valid, x, y each
    thought: str  # the reasoning, "" if there is none


def parse_answer(text: str) -> Answer:
    """Read a completion. Never raises, whatever the text holds, and takes time linear in its length.

    Each part is judged on its own: a good box counts for SAM also where a point is missing or the reasoning is.
    Tolerant where a reader would be: white space, key order, whole or decimal numbers, single quotes, a ```json fence.
    Blank reasoning is none. `_block`, `_json_object` and `_numbers`, below, read the pieces.

    >>> parse_answer('<think>the red one</think><answer>{"points_1":[3,4], "bbox":[1,2,5.5,6]}</answer>')
    Answer(think_format=True, answer_format=False, box=(1.0, 2.0, 5.5, 6.0), points=((3.0, 4.0),), thought='the red one')
    """
    # exercise 1: read an answer and judge its two formats
    think = _block(text, "<think>", "</think>")
    answer = _block(text, "<answer>", "</answer>")
    data = _json_object(answer.inside) if answer else {}
    box = _numbers(data.get("bbox"), 4)
    if box and not (box[0] < box[2] and box[1] < box[3]):
        box = None  # SAM would draw a plausible mask for swapped corners: do not ask it
    points = tuple(p for key in ("points_1", "points_2") if (p := _numbers(data.get(key), 2)))
    think_format = bool(
        think
        and answer
        and think.inside.strip()
        and not think.before.strip()
        and not answer.after.strip()
        and not think.after.partition("<answer>")[0].strip()
    )
    return Answer(think_format, box is not None and len(points) == 2, box, points, think.inside.strip() if think else "")
    # end of exercise 1


class _Block(NamedTuple):
    before: str
    inside: str
    after: str


def _block(text: str, opening: str, closing: str) -> _Block | None:
    """Split a text at a pair of tags. None unless each tag occurs exactly once, in this order."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    before, _, rest = text.partition(opening)
    inside, closed, after = rest.partition(closing)
    return _Block(before, inside, after) if closed else None


def _json_object(text: str) -> dict:
    """The JSON object that a text consists of, {} if it is none."""
    if len(text) > LONGEST_ANSWER:
        return {}
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    for attempt in (text, text.replace("'", '"')):
        try:
            data = json.loads(attempt)
        except (ValueError, RecursionError):  # not JSON, or nested deeper than Python's stack
            continue
        return data if isinstance(data, dict) else {}
    return {}


def _numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as a tuple of floats if it is a list of `count` finite numbers, else None. True is no number, nor is "3"."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and -LARGEST_NUMBER <= v <= LARGEST_NUMBER for v in value):
        return None
    return tuple(map(float, value))


class SamPrompt(NamedTuple):
    """What SAM is asked, in image pixels. Neither a box nor points: SAM is not asked, and the mask is empty."""

    box: tuple[float, ...] | None
    points: tuple[tuple[float, ...], ...]


def sam_prompt(answer: Answer, frame: float, width: int, height: int) -> SamPrompt:
    """Scale an answer to image pixels and cut it to the image. The only place where coordinates are scaled for SAM's sake.

    frame: side of the square that the answer's coordinates span: the policy image's pixels, or 1000 for thousandths.
    A box is clipped; one that lies outside is dropped, and so is a point that does.

    >>> sam_prompt(Answer(True, True, (10, 10, 80, 32), ((20, 20), (70, 70)), ""), frame=64, width=128, height=96)
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
    return SamPrompt(box, tuple((x, y) for x, y in points if 0 <= x <= width and 0 <= y <= height))


# ---------------------------------------------------------------------------------------------------------------------
# SAM: building and loading
# ---------------------------------------------------------------------------------------------------------------------

# The three official sizes (SAM, arXiv 2304.02643, and the package's build_sam.py) and the tiny one of tiny/make_tiny.py.
# `image_size`: side of the padded square that the encoder sees, pixels. `global_blocks`: these attend over the whole
# image, all others within windows.
SAM_SIZES = {
    "vit_b": dict(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": dict(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "tiny": dict(
        width=96, depth=3, heads=4, global_blocks=(1, 2), image_size=128, patch=8, window=8, prompt_width=64, mlp=128, decoder_heads=4
    ),
}


def build_sam(
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    image_size: int = 1024,
    patch: int = 16,
    window: int = 14,
    prompt_width: int = 256,
    mlp: int = 2048,
    decoder_heads: int = 8,
) -> Sam:
    """A `segment_anything` model with random weights, frozen. The package's own builder fixes all but four of these numbers."""
    grid = (image_size // patch, image_size // patch)
    sam = Sam(
        ImageEncoderViT(
            img_size=image_size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, out_chans=prompt_width,
            window_size=window, global_attn_indexes=global_blocks, use_rel_pos=True, qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ),
        PromptEncoder(prompt_width, image_embedding_size=grid, input_image_size=(image_size, image_size), mask_in_chans=16),
        MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=prompt_width, mlp_dim=mlp, num_heads=decoder_heads),
            transformer_dim=prompt_width, num_multimask_outputs=3, iou_head_depth=3, iou_head_hidden_dim=prompt_width,
        ),
    )  # fmt: skip
    for block in sam.image_encoder.blocks:
        block.attn.forward = partial(folded_attention, block.attn)
    return sam.eval().requires_grad_(False)


def load_sam(spec: str) -> Sam:
    """Build the SAM that `spec` names and load its weights, frozen, in float32 on the CPU.

    spec: "tiny" (shipped with this repository), or "vit_b:FILE", "vit_l:FILE", "vit_h:FILE" with an official checkpoint.
    Raises ValueError or FileNotFoundError with one line that says what is wrong and what to do.
    """
    size, _, path = spec.partition(":")
    if size not in SAM_SIZES:
        raise ValueError(f"no SAM is called {size!r}: use tiny, vit_b:FILE, vit_l:FILE or vit_h:FILE")
    if not path and size != "tiny":
        raise ValueError(f"{size} needs its checkpoint: write {size}:FILE")
    file = Path(path) if path else Path(__file__).resolve().parent / "tiny" / "sam.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            weights = safetensors.torch.load_file(file)
        else:  # weights_only: a pickle from the internet may run anything, this reads tensors and nothing else
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader trip over; nothing but the reading is in here
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} cannot be read as weights: truncated, or no checkpoint? Fetch it again ({reason})") from error
    sam = build_sam(**SAM_SIZES[size])
    try:
        sam.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds weights of another model than SAM {size}: name the size that it was made for") from error
    return sam


def folded_attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """`segment_anything`'s attention with relative positions, without its (heads, HW, HW) tensor. (B, H, W, C) -> same.

    The original adds rel_h[q, row of k] + rel_w[q, column of k] to the scores. That sum is an inner product, of the
    vector [rel_h[q, :], rel_w[q, :]] with k's one-hot row and column. So both are appended to the channels of q and k,
    and plain scaled_dot_product_attention gives the same result from its fused kernels. Values are padded to the same
    width because those kernels ask for it. (ViT-B on two CPU cores: 1.2 times faster than the original, and eight images at once
    take less memory than the original takes for one; benchmarks/sam_scoring.py. The same to 2e-6.)
    """
    B, H, W, _ = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).reshape(B, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, HW, c)
    grid = q.reshape(B, heads, H, W, -1)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(H, H, attention.rel_pos_h).to(q.dtype)).flatten(2, 3)
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(W, W, attention.rel_pos_w).to(q.dtype)).flatten(2, 3)
    row = torch.eye(H, device=x.device, dtype=q.dtype).repeat_interleave(W, 0)  # (HW, H) one-hot
    column = torch.eye(W, device=x.device, dtype=q.dtype).repeat(H, 1)  # (HW, W) one-hot
    q = torch.cat([q * attention.scale, rel_h, rel_w], -1)
    k = torch.cat([k, torch.cat([row, column], 1).expand(B, heads, -1, -1)], -1)
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, H + W)), scale=1.0)[..., : v.shape[-1]]
    return attention.proj(out.transpose(1, 2).reshape(B, H, W, -1))


def decode_masks(
    sam: Sam,
    embeddings: torch.Tensor,
    image_index: torch.Tensor,
    boxes: torch.Tensor | None,
    points: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode N prompts on any of B images in one call of the mask decoder.

    embeddings:  (B, C, h, w) image embeddings.
    image_index: (N,) int64, which image a prompt is about.
    boxes:       (N, 4) x1, y1, x2, y2 or None; points: (N, K, 2) x, y, all foreground, or None; not both None. In pixels
                 of the encoder's input.
    Returns logits (N, 4, 4h, 4w) of the single mask and of the three ambiguity-aware masks, and the decoder's own
    estimates of their IoU (N, 4).

    `MaskDecoder` serves one image a call: it repeats that image's embedding for every prompt and then adds the prompts'
    dense embeddings to it. The sum is all that counts, so the embedding is given as zero and the real ones, one for each
    prompt, ride on the dense side: N prompts of B images in one call, with the package's code untouched.
    """
    # exercise 2: prompts on B images in one call of the decoder
    no_mask = sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]  # (1, C, 1, 1)
    return sam.mask_decoder.predict_masks(
        image_embeddings=embeddings.new_zeros(1, *embeddings.shape[1:]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=embed_prompts(sam.prompt_encoder, boxes, points),
        dense_prompt_embeddings=embeddings[image_index] + no_mask,
    )
    # end of exercise 2


def embed_prompts(encoder: PromptEncoder, boxes: torch.Tensor | None, points: torch.Tensor | None) -> torch.Tensor:
    """The sparse embeddings of `PromptEncoder`, (N, tokens, C), for boxes (N, 4) and foreground points (N, K, 2).

    The package's own forward picks points by their labels with boolean masks, and each of them makes the host wait for a GPU.
    Here all labels are known. Points without a box are followed by one "not a point", as SAM was trained.
    """
    tokens = []
    if points is not None:
        where = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)  # a pixel's middle
        tokens.append(where + encoder.point_embeddings[1].weight)
        if boxes is None:
            tokens.append(encoder.not_a_point_embed.weight.expand(len(points), 1, -1))
    if boxes is not None:
        tokens.append(encoder._embed_boxes(boxes))
    return torch.cat(tokens, 1)


def sam_input(image: Image.Image, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize an image so that its longest side is `side` pixels, as SAM's own predictor does.

    Returns pixels (3, h, w) float32 in 0..255, not yet normalised or padded, and the factors (x, y), float64, that take
    image pixels to the encoder's pixels.
    """
    resized = ResizeLongestSide(side).apply_image(np.asarray(image))  # (h, w, 3) uint8
    scale = torch.tensor([resized.shape[1] / image.width, resized.shape[0] / image.height], dtype=torch.float64)
    return torch.from_numpy(resized).permute(2, 0, 1).float(), scale


# ---------------------------------------------------------------------------------------------------------------------
# Prompts to masks to IoU
# ---------------------------------------------------------------------------------------------------------------------


def upsample_masks(logits: torch.Tensor, side: int, input_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Logits of G masks, (G, 4h, 4w), at the size (H, W) of the image they are about: (G, H, W).

    side: of the padded square that the encoder saw, pixels; input_size: (height, width) of the image in it.
    The same as `Sam.postprocess_masks`: bilinear to the square, cut off the padding, bilinear to the image. But the padding goes
    before the first step, not after it, but for the rows and columns that interpolation mixes into the image's last ones:
    a photograph of 4:3 has a quarter of padding. (benchmarks/sam_scoring.py: "masks + IoU")
    """
    factor = side // logits.shape[-1]  # 4 for an official SAM
    height, width = input_size
    near = logits[:, None, : height // factor + 2, : width // factor + 2]
    square = F.interpolate(near, scale_factor=factor, mode="bilinear")[..., :height, :width]
    return F.interpolate(square, size, mode="bilinear")[:, 0]


class Overlap(NamedTuple):
    """How B x G masks meet B truths. All tensors (B, G) on the scorer's device."""

    intersection: torch.Tensor  # float32, pixels; exact up to 16 million
    union: torch.Tensor
    asked: torch.Tensor  # bool: SAM was given a box or a point
    masks: list[torch.Tensor] | None  # B tensors (G, H, W) bool, if they were asked for

    @property
    def iou(self) -> torch.Tensor:
        """1 where both mask and truth are empty (the metric's convention), else intersection / union."""
        # exercise 3: IoU, also of nothing with nothing
        return torch.where(self.union > 0, self.intersection / self.union.clamp(min=1), 1.0)
        # end of exercise 3


def intersection_and_union(masks: torch.Tensor, truth: torch.Tensor, ignore: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in both and in either, of G masks and one truth: (G, H, W), (H, W), (H, W) or None, all bool -> (G,), (G,) float32.

    Ignored pixels count neither for a mask nor against it.

    >>> masks = torch.tensor([[[True, False, False, False]], [[True, True, True, True]]])
    >>> truth, ignore = torch.tensor([[True, True, True, False]]), torch.tensor([[False, False, True, True]])
    >>> intersection_and_union(masks, truth, ignore)
    (tensor([1., 2.]), tensor([2., 2.]))
    """
    # exercise 3: pixels in both and in either, but for the ignored ones
    meet, join = masks & truth, masks | truth  # (G, H, W)
    if ignore is not None:
        meet, join = meet & ~ignore, join & ~ignore
    return tuple(x.sum((1, 2), dtype=torch.int32).float() for x in (meet, join))  # counting in int64, torch's default, takes longer
    # end of exercise 3


class SamScorer:
    """A frozen SAM that scores all completions of a step at once.

    Each image is encoded once, whatever the number of completions about it. Prompts of one make-up (a box and two points,
    a box alone, ...) are decoded together, across images, up to `decoder_batch` in a call. Only the mask that SAM itself rates
    best of its three is brought to full size. Masks are those of `SamPredictor.predict` with the same prompt.
    """

    def __init__(self, sam: Sam, device: torch.device | str = "cpu", encoder_batch: int = 8, decoder_batch: int = 64, offload: bool = False):
        """encoder_batch: images a pass; decoder_batch: prompts a call at most (256 MiB of embeddings at 64 for an official SAM).
        offload: keep SAM in the host's memory between calls of `score` (frees 2.4 GiB of the GPU for ViT-H)."""
        if torch.device(device).type == "cpu":
            # One call for all is for GPUs, where launches cost. On a CPU it is page faults: glibc fetches what is larger than
            # 32 MiB from the system anew each time, and so an official SAM takes less time for 64 prompts by fours.
            embedding = 4 * sam.prompt_encoder.embed_dim * math.prod(sam.prompt_encoder.image_embedding_size)  # bytes
            decoder_batch = min(decoder_batch, max(1, 2**24 // embedding))
        self.sam = sam.to("cpu" if offload else device).eval().requires_grad_(False)
        self.device, self.encoder_batch, self.decoder_batch, self.offload = torch.device(device), encoder_batch, decoder_batch, offload
        self.side = sam.image_encoder.img_size

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """Return embeddings (B, C, h, w) float32, factors (B, 2) to the encoder's pixels, and input sizes (h, w)."""
        pixels, scales = zip(*(sam_input(image, self.side) for image in images), strict=True)
        embeddings = []
        for start in range(0, len(images), self.encoder_batch):
            batch = [self.sam.preprocess(self._there(p)) for p in pixels[start : start + self.encoder_batch]]
            # Half precision for the encoder alone (IoU moves by 0.0007 on average): the decoder is small and touchy.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                embeddings.append(self.sam.image_encoder(torch.stack(batch)).float())
        return torch.cat(embeddings), torch.stack(scales), [tuple(p.shape[1:]) for p in pixels]

    @torch.no_grad()
    def score(self, samples: list, prompts: list[list[SamPrompt]], keep_masks: bool = False) -> Overlap:
        """Mask and overlap for B samples x G prompts.

        samples: B objects with `image` (PIL, W x H), `mask` (H, W) bool and `ignore` (H, W) bool or None.
        prompts: B lists of G prompts, in image pixels. Those that hold nothing get an empty mask.
        """
        B, G = len(samples), len(prompts[0])
        self.sam.to(self.device)
        embeddings, scales, input_sizes = self.encode([sample.image for sample in samples])
        logits, asked = self._best_logits(embeddings, scales, [p for group in prompts for p in group])
        logits = logits.unflatten(0, (B, G))
        intersection, union, masks = [], [], []
        for b, sample in enumerate(samples):  # B passes, since every image has its own size; no device sync in here
            mask = upsample_masks(logits[b], self.side, input_sizes[b], sample.mask.shape) > self.sam.mask_threshold  # (G, H, W)
            truth = self._there(torch.from_numpy(sample.mask))
            ignore = None if sample.ignore is None else self._there(torch.from_numpy(sample.ignore))
            meet, join = intersection_and_union(mask, truth, ignore)
            intersection.append(meet)
            union.append(join)
            masks.append(mask if keep_masks else None)
        if self.offload:
            self.sam.to("cpu")
        overlap = torch.stack(intersection), torch.stack(union), asked.view(B, G)
        return Overlap(*overlap, masks if keep_masks else None)

    def _best_logits(self, embeddings: torch.Tensor, scales: torch.Tensor, prompts: list[SamPrompt]):
        """For each of B*G prompts, low-resolution logits (B*G, 4h, 4w) of the best of SAM's three masks, and whether
        there was a prompt (B*G,). Prompts are grouped by what they hold: padding a missing point beside a box is not
        what SAM was trained on and changes the mask."""
        G = len(prompts) // len(embeddings)
        h, w = embeddings.shape[2:]
        best = embeddings.new_full((len(prompts), 4 * h, 4 * w), -1.0)  # negative: outside the mask
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault((prompt.box is not None, len(prompt.points)), []).append(index)
        unasked = groups.pop((False, 0), [])
        for (has_box, count), members in groups.items():
            for start in range(0, len(members), self.decoder_batch):
                index = torch.tensor(members[start : start + self.decoder_batch])
                image = index // G
                chosen = [prompts[i] for i in index.tolist()]
                scale = scales[image]  # (N, 2)
                boxes = torch.tensor([p.box for p in chosen], dtype=torch.float64) * scale.repeat(1, 2) if has_box else None
                points = torch.tensor([p.points for p in chosen], dtype=torch.float64) * scale[:, None] if count else None
                logits, rating = decode_masks(
                    self.sam,
                    embeddings,
                    self._there(image),
                    None if boxes is None else self._there(boxes.float()),
                    None if points is None else self._there(points.float()),
                )
                winner = rating[:, 1:].argmax(1) + 1  # mask 0 is the single-mask output, not one of the three
                best[self._there(index)] = logits[torch.arange(len(index), device=self.device), winner]
        asked = torch.ones(len(prompts), dtype=torch.bool)
        asked[unasked] = False
        return best, self._there(asked)

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on the scorer's device, without waiting for it."""
        return x.to(self.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# IoU to reward
# ---------------------------------------------------------------------------------------------------------------------

TIERS = ((0.5, 2.0), (0.7, 3.0), (0.8, 4.0))  # paper: IoU above the first number earns the second
ACCURACY_REWARDS = ("tiered", "0.5", "0.7", "0.8", "iou")


def tiered_reward(iou: torch.Tensor) -> torch.Tensor:
    """The paper's accuracy reward, any shape.

    >>> tiered_reward(torch.tensor([0.50, 0.51, 0.70, 0.75, 0.81]))
    tensor([0., 2., 2., 3., 4.])
    """
    # exercise 4: the tiers
    reward = torch.zeros_like(iou)
    for threshold, value in TIERS:
        reward = torch.where(iou > threshold, value, reward)
    return reward
    # end of exercise 4


def accuracy_reward(iou: torch.Tensor, kind: str) -> torch.Tensor:
    """The accuracy reward by name: "tiered", a fixed threshold "0.5", "0.7" or "0.8", or the raw "iou" (Table 3).

    All span 0 to 4, so that the weight of the format rewards beside them stays the same (*assumed*: the paper does not
    give the height of its fixed thresholds).

    >>> accuracy_reward(torch.tensor([0.6, 0.75]), "0.7"), accuracy_reward(torch.tensor([0.6, 0.75]), "iou")
    (tensor([0., 4.]), tensor([2.4000, 3.0000]))
    """
    if kind == "tiered":
        return tiered_reward(iou)
    if kind == "iou":
        return 4.0 * iou
    return 4.0 * (iou > float(kind)).float()


class Scores(NamedTuple):
    """Rewards of B x G completions with their parts kept apart. Tensors (B, G) float32 on the CPU."""

    reward: torch.Tensor  # the sum of the next three, 0 to 6
    accuracy: torch.Tensor
    think_format: torch.Tensor
    answer_format: torch.Tensor
    iou: torch.Tensor
    answers: list[list[Answer]]
    prompts: list[list[SamPrompt]]
    overlap: Overlap


def score_completions(
    scorer: SamScorer, samples: list, completions: list[list[str]], frame: float, accuracy: str = "tiered", keep_masks: bool = False
) -> Scores:
    """The whole reward for B samples x G completions (texts). See `sam_prompt` for `frame`.

    A completion without a usable box or point has IoU 0, also where the truth is empty: nothing was pointed out.
    """
    answers = [[parse_answer(text) for text in group] for group in completions]
    prompts = [[sam_prompt(a, frame, *s.image.size) for a in group] for s, group in zip(samples, answers, strict=True)]
    overlap = scorer.score(samples, prompts, keep_masks)
    iou = torch.where(overlap.asked, overlap.iou, 0.0).cpu()  # the step's one wait for the device
    earned = accuracy_reward(iou, accuracy)
    think_format = torch.tensor([[float(a.think_format) for a in group] for group in answers])
    answer_format = torch.tensor([[float(a.answer_format) for a in group] for group in answers])
    return Scores(earned + think_format + answer_format, earned, think_format, answer_format, iou, answers, prompts, overlap)


def trl_reward(scorer: SamScorer, frame: float, accuracy: str = "tiered"):
    """The same reward in the form that TRL's trainers take: reward(completions, photo=..., mask=..., **others) -> list.

    TRL hands over the data set's columns, one entry for each completion, so an image comes G times; it is encoded once
    nevertheless. Columns: `photo`, the image at its own size (PIL; the policy's resized one is TRL's `image`), and `mask`
    (H, W) bool.
    """

    class Shown(NamedTuple):
        image: Image.Image
        mask: np.ndarray
        ignore: None = None

    def sam_reward(completions: list, photo: list, mask: list, **others) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]  # plain or conversational
        groups: dict[tuple, list[int]] = {}
        for k, (image, truth) in enumerate(zip(photo, mask, strict=True)):
            groups.setdefault((image.size, image.tobytes(), np.asarray(truth).tobytes()), []).append(k)
        samples = [Shown(photo[members[0]], np.asarray(mask[members[0]], bool)) for members in groups.values()]
        longest = max(map(len, groups.values()))  # shorter groups are filled up with empty texts, which cost nothing
        rows = [[texts[k] for k in members] + [""] * (longest - len(members)) for members in groups.values()]
        rewards = score_completions(scorer, samples, rows, frame, accuracy).reward.tolist()
        found = {k: row[g] for row, members in zip(rewards, groups.values(), strict=True) for g, k in enumerate(members)}
        return [found[k] for k in range(len(texts))]

    return sam_reward

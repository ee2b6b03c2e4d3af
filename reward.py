"""reward.py - what the policy is paid for: answer -> SAM prompt -> mask -> IoU -> reward.

A completion earns three rewards, which are added (the paper's reward functions):

    accuracy        SAM turns its box and points into a mask. The IoU of that mask with the true one
                    falls into tiers: 4, 3, 2 or 0
    think format    1 if it is one <think> block with text, one <answer> block, and nothing else
    answer format   1 if the answer is JSON (or a Python literal) that holds a box and two points,
                    whether they are good or not

The file follows the data:

    parse_answer          a completion -> box and points, as the policy writes them
    sam_prompt            the same in pixels of the image
    decode_masks          prompts on many images -> mask logits, in one call of SAM's decoder
    SamScorer             images and prompts of a whole step -> masks -> intersection and union
    accuracy_reward       IoU -> reward
    score_completions     all of it

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
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import PromptEncoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide

from plumbing.answers import numbers, points_asked, read_answer
from plumbing.boxes import box_ious
from plumbing.devices import half_precision, to_device

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
    others: tuple[tuple, ...] = ()  # box and points of each further object


def parse_answer(text: str, style: str = "full") -> Answer:
    """Read a completion. Never raises, and takes time linear in the length of the text.

    Each part is judged separately: SAM gets a valid box even if a point or the thought is missing.
    A thought counts if each of its two tags occurs exactly once, in that order. In what follows the
    thought (in the whole text if no thought counts), the answer ends at the last </answer> and
    starts at the last <answer> before that. It is JSON or a Python literal.

    The answer format is about form alone: the paper rewards JSON with a box and points, whatever
    their quality. So two equal points, and points outside of the box, are valid. Coordinates in
    0..1 are valid too: they are read in the unit that the prompt asks for, so such a box is smaller
    than a pixel, and the accuracy reward judges it. What is clear but not in the right form, such
    as JSON within prose, gives a box and points, but earns no answer format
    (`plumbing.answers.read_answer`).

    style: of the prompt. Answers to the prompts of other systems are read in plumbing/segzero.py.
           They may hold several objects, and all must be valid for the answer format.

    >>> text = '<think>the red one</think><answer>{"points_1":[3,4], "bbox":[1,2,5.5,6]}</answer>'
    >>> answer = parse_answer(text)
    >>> answer.think_format, answer.answer_format, answer.box, answer.points, answer.thought
    (True, False, (1.0, 2.0, 5.5, 6.0), ((3.0, 4.0),), 'the red one')
    """
    # Without exactly one thought the whole text is `rest`: its answer still prompts SAM, but earns
    # no think format. `before`, `between` and `after` are what stands around the two blocks.
    before = ""
    thought = ""
    rest = text
    one_thought = text.count("<think>") == 1 and text.count("</think>") == 1
    if one_thought and text.index("<think>") < text.index("</think>"):
        before, _, rest = text.partition("<think>")
        thought, _, rest = rest.partition("</think>")
    # Without a tag, rpartition returns the whole text as its last part.
    head, closing, after = rest.rpartition("</answer>")
    between, opening, inside = head.rpartition("<answer>")
    answered = bool(opening and closing)
    inside = inside if answered else ""
    only_blocks = not (before + between + after).strip()
    think_format = bool(thought.strip()) and answered and only_blocks

    if style in ("brief", "full"):
        items, asked_form = read_answer(inside)
    else:
        from plumbing import segzero  # only with these two styles

        items, asked_form = segzero.read_answer(inside, style, text)
    objects = [read_object(item, points_asked(style)) for item in items]
    valid = [one.asked_form and one.box is not None and None not in one.points for one in objects]
    answer_format = asked_form and bool(valid) and all(valid)
    found = [(one.box, tuple(point for point in one.points if point)) for one in objects]
    found = [(box, points) for box, points in found if box or points]
    (box, points), *others = found or [(None, ())]
    return Answer(think_format, answer_format, box, points, thought.strip(), tuple(others))


class AnsweredObject(NamedTuple):
    """One object of an answer."""

    box: tuple[float, ...] | None  # None if it is missing or invalid
    points: list[tuple[float, ...] | None]  # as many as the prompt asks for
    asked_form: bool  # each is a list of at least two elements: no tuple, no list in a list


def read_object(item: dict, count: int = 2) -> AnsweredObject:
    """The box and the points of one object of an answer, each of them valid or None.

    A box is valid if it is four finite numbers with x1 < x2 and y1 < y2: SAM would draw a plausible
    mask of swapped corners. A tuple, or a list in a list, is read too, but it is not the form that
    the prompt asks for. count: number of points that it asks for.

    >>> read_object({"bbox": [1, 2, 5, 6], "points_1": [3, 4], "points_2": (3, 4)})
    AnsweredObject(box=(1.0, 2.0, 5.0, 6.0), points=[(3.0, 4.0), (3.0, 4.0)], asked_form=False)
    >>> read_object({"bbox": [5, 2, 1, 6], "points_1": [3, 4], "points_2": [3]})
    AnsweredObject(box=None, points=[(3.0, 4.0), None], asked_form=False)
    """
    values = [item.get(key) for key in ("bbox", "points_1", "points_2")[: 1 + count]]
    box = numbers(values[0], count=4)
    if box and not (box[0] < box[2] and box[1] < box[3]):
        box = None
    return AnsweredObject(
        box=box,
        points=[numbers(point, count=2) for point in values[1:]],
        asked_form=all(isinstance(value, list) and len(value) > 1 for value in values),
    )


class SamPrompt(NamedTuple):
    """A prompt for SAM, in image pixels. With neither box nor points the mask is empty."""

    box: tuple[float, ...] | None  # x1, y1, x2, y2
    points: tuple[tuple[float, ...], ...]  # (x, y) each; SAM takes them as foreground
    others: tuple["SamPrompt", ...] = ()  # of further objects: the masks of all are united

    @property
    def objects(self) -> tuple["SamPrompt", ...]:
        """One prompt for each object in the answer, almost always one."""
        return (self, *self.others)


def sam_prompt(answer: Answer, extent: float, width: int, height: int) -> SamPrompt:
    """Scale an answer to image pixels and crop it to the image of width x height pixels.

    extent: the number that the policy writes for the far edge of the image: the side of the image
            it sees in policy pixels, or 1000 for thousandths.
    The box is clipped to the image. A box or point that lies outside is dropped; a point on the
    edge is kept. `answer.others` are treated in the same way.

    >>> answer = Answer(True, True, (10, 10, 80, 32), ((20, 20), (70, 70)), "")
    >>> prompt = sam_prompt(answer, extent=64, width=128, height=96)
    >>> prompt == SamPrompt(box=(20, 15, 128, 48), points=((40, 30),))
    True
    """
    to_x = width / extent
    to_y = height / extent
    box = None
    if answer.box:
        x1, y1, x2, y2 = answer.box
        box = (max(x1 * to_x, 0), max(y1 * to_y, 0), min(x2 * to_x, width), min(y2 * to_y, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            box = None
    points = ((x * to_x, y * to_y) for x, y in answer.points)
    inside = tuple((x, y) for x, y in points if 0 <= x <= width and 0 <= y <= height)
    others = []
    for other_box, other_points in answer.others:
        other = answer._replace(box=other_box, points=other_points, others=())
        others.append(sam_prompt(other, extent, width, height))
    return SamPrompt(box, inside, tuple(others))


# --------------------------------------------------------------------------------------------------
# Prompts to masks: many prompts on many images in one call of SAM's decoder
# --------------------------------------------------------------------------------------------------


def sam_input(image: Image.Image, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize an image so that its longest side has `side` pixels, as SAM's own predictor does.

    Returns pixels (3, h, w), float32 in 0..255, not normalised and not padded, and the factors
    (x, y), float64, from image pixels to the pixels of the encoder's input.
    """
    resized = ResizeLongestSide(side).apply_image(np.asarray(image))  # (h, w, 3) uint8
    factors = [resized.shape[1] / image.width, resized.shape[0] / image.height]
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float()
    return pixels, torch.tensor(factors, dtype=torch.float64)


def embed_prompts(
    encoder: PromptEncoder, boxes: torch.Tensor | None, points: torch.Tensor | None
) -> torch.Tensor:
    """Sparse embeddings, (N, tokens, C), of boxes (N, 4) and foreground points (N, K, 2).

    The same as `PromptEncoder.forward`, which selects points by label with boolean masks. Each such
    mask makes the CPU wait for the GPU. Here all labels are known. Points without a box are
    followed by one "not a point" token, as in SAM's training.
    """
    tokens = []
    if points is not None:
        centres = points + 0.5  # as SamPredictor; `_embed_boxes` adds it to the corners
        position = encoder.pe_layer.forward_with_coords(centres, encoder.input_image_size)
        tokens.append(position + encoder.point_embeddings[1].weight)  # 1: foreground
        if boxes is None:
            tokens.append(encoder.not_a_point_embed.weight.expand(len(points), 1, -1))
    if boxes is not None:
        tokens.append(encoder._embed_boxes(boxes))
    return torch.cat(tokens, 1)


def decode_masks(
    sam: Sam,
    embeddings: torch.Tensor,
    image_index: torch.Tensor,
    boxes: torch.Tensor | None,
    points: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode N prompts on any of B images in one call of the mask decoder.

    embeddings:  (B, C, h, w) image embeddings.
    image_index: (N,) int64, the image that each prompt is about.
    boxes:       (N, 4) x1, y1, x2, y2, or None. In pixels of the encoder's input.
    points:      (N, K, 2) x, y, all foreground, or None. In the same pixels. Not both None.

    Returns mask logits (N, 4, 4h, 4w) and the decoder's own estimates of their IoU (N, 4). Mask 0
    is the single-mask output; masks 1 to 3 are the three candidates for an ambiguous prompt.

    SAM embeds a prompt as two tensors: sparse (tokens of the box and the points) and dense (a map
    of a mask prompt; we give none, so it is the learned `no_mask` vector everywhere). `MaskDecoder`
    takes one image per call: it repeats that image's embedding for every prompt and adds the dense
    embedding. `MaskDecoder.predict_masks` returns all four masks.
    """
    # Only the sum counts. So pass zeros as the image embedding and add each image's embedding to
    # its prompt's dense embedding.
    no_mask = sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]  # (1, C, 1, 1)
    return sam.mask_decoder.predict_masks(
        image_embeddings=embeddings.new_zeros(1, *embeddings.shape[1:]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=embed_prompts(sam.prompt_encoder, boxes, points),
        dense_prompt_embeddings=embeddings[image_index] + no_mask,
    )


def upsample_masks(
    logits: torch.Tensor, side: int, input_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Bring the logits of G masks, (G, 4h, 4w), to the size (H, W) of their image: (G, H, W).

    side: of the padded square that the encoder saw, pixels; input_size: (height, width) of the
    resized image in that square.
    The same as `Sam.postprocess_masks`: bilinear to the square, crop the padding, bilinear to the
    image. Here most of the padding is cropped before the first step, which saves time: a quarter of
    the square is padding for a 4:3 photograph. Two rows and columns of it stay, because
    interpolation mixes them into the last pixels of the image.
    """
    factor = side // logits.shape[-1]  # 4 for an official SAM
    height, width = input_size
    cropped = logits[:, None, : height // factor + 2, : width // factor + 2]
    square = F.interpolate(cropped, scale_factor=factor, mode="bilinear")[..., :height, :width]
    return F.interpolate(square, size, mode="bilinear")[:, 0]


class Sam1(Sam):
    """`segment_anything`'s model in the four steps that `SamScorer` calls.

    `plumbing.transformers_sam.TransformersSam` has the same four, for SAM 2 and SAM 3. So the
    scorer does not know which model it has.
    """

    def prepare(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (3, h, w) for `encode`, and the factors (x, y) to them, see `sam_input`."""
        return sam_input(image, self.image_encoder.img_size)

    def encode(self, pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encode B prepared images. Returns one level of embeddings, (B, C, h, w)."""
        return [self.image_encoder(torch.stack([self.preprocess(p) for p in pixels]))]

    def decode(
        self,
        embeddings: list[torch.Tensor],
        image_index: torch.Tensor,
        boxes: torch.Tensor | None,
        points: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 3, 4h, 4w) and ratings (N, 3) of the three candidates for each of N prompts.

        embeddings are those of `encode`; the other arguments are those of `decode_masks`.
        """
        logits, ratings = decode_masks(self, embeddings[0], image_index, boxes, points)
        # Without mask 0, as SamPredictor does with multimask_output=True, its default.
        return logits[:, 1:], ratings[:, 1:]

    def upsample(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bring logits (G, 4h, 4w) of one image to its size (H, W), see `upsample_masks`."""
        side = self.image_encoder.img_size
        input_size = ResizeLongestSide.get_preprocess_shape(*size, side)
        return upsample_masks(logits, side, input_size, size)


# --------------------------------------------------------------------------------------------------
# Masks to IoU
# --------------------------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Overlap of B x G masks with B true masks. Tensors (B, G) on the scorer's device."""

    intersection: torch.Tensor  # float32, pixels; exact up to 16 million
    union: torch.Tensor  # float32, pixels
    prompted: torch.Tensor  # bool: SAM was given a box or a point
    masks: list[torch.Tensor] | None  # B tensors (G, H, W) bool, with keep_masks=True

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
    intersection = masks & truth  # (G, H, W)
    union = masks | truth
    if ignore is not None:
        intersection = intersection & ~ignore
        union = union & ~ignore
    # Counting in int32 is faster than in int64, torch's default.
    return tuple(x.sum((1, 2), dtype=torch.int32).float() for x in (intersection, union))


# An embedding level is a feature map of one resolution: SAM 1 has one, SAM 2 and 3 have three. Each
# prompt of a decoder call needs a copy of them, so this limit, in bytes of the largest level,
# decides how many prompts one call takes: 16 for an official SAM 1 on a GPU, 8 for SAM 2, 6 for
# SAM 3. On a CPU 4, 2 and 1: there larger tensors are allocated anew in every call, and the time
# goes into page faults.
DECODER_BYTES = {"cpu": 2**24, "cuda": 2**26, "mps": 2**26}


class SamScorer:
    """A frozen segmenter that scores all completions of a step at once.

    Each image is encoded once, however many completions are about it. Prompts of the same form
    (a box and two points, a box only, ...) are decoded together, across images. Only the mask that
    the model itself rates best of its three is brought to full size. The masks are those of the
    model's own predictor for the same prompt: `SamPredictor`, or that of transformers.
    """

    def __init__(self, sam, device: str = "cpu", encoder_batch: int = 8, offload: bool = False):
        """sam: from `plumbing.sam.load_sam`: `segment_anything`'s Sam, or a later one.

        encoder_batch: images that are encoded together. offload: keep the model in host memory
        between calls of `score`; for ViT-H this frees 2.4 GiB of the GPU.
        """
        if isinstance(sam, Sam):
            sam = Sam1(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)  # the same weights
        self.device = torch.device(device)
        self.encoder_batch = encoder_batch
        self.offload = offload
        self.sam = sam.to("cpu" if offload else device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, samples: list, prompts: list[list[SamPrompt]], keep_masks=False) -> Overlap:
        """Masks and their overlap with the truth for B samples x G prompts.

        samples: B objects like `data.Sample`, with `image`, `mask` and `ignore`.
        prompts: B lists of G prompts, in image pixels. An empty prompt gets an empty mask. A prompt
                 with several objects gets the union of their masks.
        """
        self.sam.to(self.device)  # it is somewhere else only with `offload`
        embeddings, factors = self.encode([sample.image for sample in samples])
        objects = [[one for prompt in group for one in prompt.objects] for group in prompts]
        logits = self.best_logits(embeddings, factors, objects).split(list(map(len, objects)))
        intersections, unions, masks = [], [], []
        for b, sample in enumerate(samples):  # one by one: every image has its own size
            # One mask for each object of the G prompts, almost always one a prompt. Bring them to
            # full size, and unite those of the same prompt.
            full = self.sam.upsample(logits[b], sample.mask.shape)  # (objects, H, W)
            parts = (full > self.sam.mask_threshold).split([len(p.objects) for p in prompts[b]])
            mask = torch.stack([part.any(0) for part in parts])  # (G, H, W)
            truth = self._to_device(torch.from_numpy(sample.mask))
            ignore = None
            if sample.ignore is not None:
                ignore = self._to_device(torch.from_numpy(sample.ignore))
            intersection, union = intersection_and_union(mask, truth, ignore)
            intersections.append(intersection)
            unions.append(union)
            if keep_masks:
                masks.append(mask)
        if self.offload:
            self.sam.to("cpu")
        prompted = [
            [any(one.box or one.points for one in prompt.objects) for prompt in group]
            for group in prompts
        ]
        return Overlap(
            intersection=torch.stack(intersections),
            union=torch.stack(unions),
            prompted=self._to_device(torch.tensor(prompted)),
            masks=masks if keep_masks else None,
        )

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Encode B images. Returns levels of embeddings, (B, C, h, w) float32 each, and factors
        (B, 2), float64, from image pixels x, y to those of the encoder's input."""
        pixels, factors = zip(*map(self.sam.prepare, images), strict=True)
        half = half_precision(self.device)  # for the encoder only, not for the decoder
        batches = []
        for start in range(0, len(images), self.encoder_batch):
            batch = [self._to_device(p) for p in pixels[start : start + self.encoder_batch]]
            on_gpu = self.device.type == "cuda"
            with torch.autocast(self.device.type, dtype=half, enabled=on_gpu):
                batches.append(self.sam.encode(batch))
        levels = [torch.cat(level).float() for level in zip(*batches, strict=True)]
        return levels, torch.stack(factors)

    def best_logits(
        self, embeddings: list[torch.Tensor], factors: torch.Tensor, objects: list[list[SamPrompt]]
    ) -> torch.Tensor:
        """Logits (N, 4h, 4w) of the best of three masks for each of N prompts, image by image.

        embeddings, factors: of `encode`. h, w: size of the last level of the embeddings.
        objects: B lists of prompts, each of one object.
        """
        # Prompts are stored image by image. image_of[k] is the image that prompt k is about.
        prompts = [one for group in objects for one in group]
        image_of = torch.tensor([b for b, group in enumerate(objects) for _ in group])
        h, w = embeddings[-1].shape[2:]
        best = embeddings[-1].new_full((len(prompts), 4 * h, 4 * w), -1.0)  # -1: outside the mask
        largest = max(level[0].nbytes for level in embeddings)
        at_once = max(1, DECODER_BYTES[self.device.type] // largest)
        # Group prompts by what they hold. Padding a missing point beside a box would change the
        # mask, because SAM was not trained on that.
        by_form: dict[tuple[bool, int], list[int]] = {}
        for k, prompt in enumerate(prompts):
            by_form.setdefault((prompt.box is not None, len(prompt.points)), []).append(k)
        by_form.pop((False, 0), None)  # nothing to decode: the mask stays empty
        for (has_box, point_count), members in by_form.items():
            for prompt_index in torch.tensor(members).split(at_once):
                image_index = image_of[prompt_index]
                chosen = [prompts[k] for k in prompt_index.tolist()]  # the n prompts of this call
                factor = factors[image_index]  # (n, 2)
                boxes = points = None
                if has_box:
                    boxes = torch.tensor([p.box for p in chosen], dtype=torch.float64)
                    boxes = boxes * factor.repeat(1, 2)  # (n, 4): x, y, x, y
                    boxes = self._to_device(boxes.float())
                if point_count:
                    points = torch.tensor([p.points for p in chosen], dtype=torch.float64)
                    points = points * factor[:, None]  # (n, K, 2)
                    points = self._to_device(points.float())
                image_index = self._to_device(image_index)
                logits, ratings = self.sam.decode(embeddings, image_index, boxes, points)
                row = torch.arange(len(chosen), device=self.device)
                best[self._to_device(prompt_index)] = logits[row, ratings.argmax(1)]
        return best

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        return to_device(x, self.device)


# --------------------------------------------------------------------------------------------------
# IoU to reward
# --------------------------------------------------------------------------------------------------

# The paper's accuracy reward: an IoU above the first number earns the second.
TIERS = ((0.5, 2.0), (0.7, 3.0), (0.8, 4.0))


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


class Scores(NamedTuple):
    """Rewards of B x G completions and their parts. The tensors are (B, G) float32, on the CPU."""

    reward: torch.Tensor  # the sum of the next three, 0 to 6
    accuracy: torch.Tensor
    think_format: torch.Tensor
    answer_format: torch.Tensor
    iou: torch.Tensor
    answers: list[list[Answer]]  # B lists of G
    prompts: list[list[SamPrompt]]  # the same, in image pixels
    overlap: Overlap  # on the scorer's device


def score_completions(
    scorer: SamScorer,
    samples: list,
    completions: list[list[str]],
    extent: float,
    accuracy: str = "tiered",
    keep_masks: bool = False,
    style: str = "full",
) -> Scores:
    """The whole reward for B samples x G completions (texts).

    extent:   what the policy writes for the far edge of the image, see `sam_prompt`.
    accuracy: a name of `accuracy_reward`, or a reward to compare it with, which does not use SAM's
              mask: "box" (the tiers on the IoU of the boxes), "segzero", "segzero_mask" (see
              plumbing/segzero.py). SAM's mask is computed in any case, for the log.
    style:    of the prompt, see `parse_answer`.

    A completion without a usable box or point has IoU 0, so that it never pays to give no answer.
    (`Overlap.iou`, the metric, is 1 where both masks are empty.)
    """
    answers = [[parse_answer(text, style) for text in group] for group in completions]
    prompts = [
        [sam_prompt(answer, extent, *sample.image.size) for answer in group]
        for sample, group in zip(samples, answers, strict=True)
    ]
    overlap = scorer.score(samples, prompts, keep_masks)
    iou = torch.where(overlap.prompted, overlap.iou, 0.0).cpu()  # here the CPU waits for the GPU
    if accuracy == "box":
        earned = tiered_reward(box_ious(samples, prompts))
    elif accuracy.startswith("segzero"):
        from plumbing.segzero import segzero_reward  # only with this reward

        earned = segzero_reward(samples, prompts, extent, in_mask=accuracy == "segzero_mask")
    else:
        earned = accuracy_reward(iou, accuracy)
    think_format = torch.tensor([[float(a.think_format) for a in group] for group in answers])
    answer_format = torch.tensor([[float(a.answer_format) for a in group] for group in answers])
    return Scores(
        reward=earned + think_format + answer_format,
        accuracy=earned,
        think_format=think_format,
        answer_format=answer_format,
        iou=iou,
        answers=answers,
        prompts=prompts,
        overlap=overlap,
    )

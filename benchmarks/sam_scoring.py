"""sam_scoring.py - how long does it take to score B images x G completions with SAM?

    python -m benchmarks.sam_scoring [--sam tiny vit_b] [--repeats 3] [--threads 2]

Compares two ways to compute the same B x G IoUs of prompts with a box and two points:

    naive    `segment_anything.SamPredictor`: set_image and predict for every completion, IoU in
             numpy. Public code for segmentation by RL does this (Seg-Zero, for example). For sam2
             the same two steps with transformers' processor and model.
    ours     reward.SamScorer.score

naive runs the packages unchanged, with their own attention. It encodes each image once here, and
the table multiplies these seconds by G ("cached" is without this factor). The tiny SAM sees drawn
scenes. The others (vit_b, vit_l, vit_h; sam2: the sizes of sam2.1-hiera-tiny) have random weights
and see noise, which takes as long as photographs.

Phases. encoder: from a PIL image to its embedding, with resizing and padding. decoder: from a
prompt and an embedding to low-resolution logits. masks: all the rest, that is choosing the best
mask, upsampling it to the image's size, threshold, intersection and union.
"""

import argparse
import copy
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from segment_anything import SamPredictor
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Processor

from benchmarks import meter
from benchmarks.meter import DEVICE
from data import Sample, Shapes
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.sam2 import Sam2
from reward import SamPrompt, SamScorer

B, G = 8, 8
# Width and height of the images of noise, as in COCO.
SIZES = ((640, 480), (480, 640), (500, 375), (333, 500), (640, 640), (640, 427), (427, 640))
SIZES += ((375, 500),)


# --------------------------------------------------------------------------------------------------
# The case: model, samples and prompts
# --------------------------------------------------------------------------------------------------


def noise_sample(width: int, height: int, rng: np.random.Generator) -> Sample:
    """An image of noise with an ellipse as its object."""
    mask = Image.new("1", (width, height))
    right, bottom = width * rng.uniform(0.5, 0.9), height * rng.uniform(0.6, 0.9)
    ImageDraw.Draw(mask).ellipse((width * 0.2, height * 0.3, right, bottom), fill=1)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return Sample(image, "", np.array(mask), None, "")


def jittered_prompt(mask: np.ndarray, rng: np.random.Generator) -> SamPrompt:
    """A prompt as of a good policy: each edge is off by up to a tenth of the object, and two points
    are near its middle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    size, limit = np.tile(box[2:] - box[:2], 2), np.tile(mask.shape[::-1], 2)
    points = (box[:2] + box[2:]) / 2 + rng.uniform(-0.25, 0.25, (2, 2)) * size[:2]
    box = (box + rng.uniform(-0.1, 0.1, 4) * size).clip(0, limit)
    return SamPrompt(tuple(box), tuple(map(tuple, points)))


def make_case(name: str):
    """A segmenter, B samples, and B x G prompts."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "tiny":
        sam = load_sam("tiny")
        samples = [Shapes("heldout")[i] for i in range(B)]
    else:
        sam = random_sam2() if name == "sam2" else build_sam(**SAM_SIZES[name])
        samples = [noise_sample(*size, rng) for size in SIZES]
        for key, weight in sam.named_parameters():
            if "encoder" in key and "pos" in key:  # zero at first, so errors would not show
                torch.nn.init.normal_(weight, std=0.02)
    return sam, samples, [[jittered_prompt(one.mask, rng) for _ in range(G)] for one in samples]


def random_sam2() -> Sam2:
    """A SAM 2 with torch's own random weights: transformers' are so small that all logits are 0."""
    sam = Sam2(Sam2Config())
    for module in sam.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sam.image_processor = Sam2ImageProcessor()
    return sam


class Sam2Predictor:
    """`SamPredictor`'s two methods, with transformers' own model and processor for one image."""

    def __init__(self, model: Sam2):
        self.model = model
        self.processor = Sam2Processor(model.image_processor)

    @torch.no_grad()
    def set_image(self, image: np.ndarray) -> None:
        pixels = self.processor(images=image, return_tensors="pt").pixel_values.to(DEVICE)
        self.features = [level.float() for level in self.model.get_image_embeddings(pixels)]
        self.size = image.shape[:2]

    @torch.no_grad()
    def predict(self, points: np.ndarray, labels: np.ndarray, box: np.ndarray):
        """Three masks (3, H, W) bool and their scores (3,), as arrays."""
        prompt = self.processor(
            input_points=[[points.tolist()]],
            input_labels=[[labels.astype(int).tolist()]],
            input_boxes=[[box.tolist()]],
            original_sizes=[list(self.size)],
            return_tensors="pt",
        ).to(DEVICE)
        sizes = prompt.pop("original_sizes")
        out = self.model(**prompt, image_embeddings=self.features)
        masks = self.processor.post_process_masks(out.pred_masks, sizes)[0][0]
        return masks.cpu().numpy(), out.iou_scores[0, 0].cpu().numpy()


# --------------------------------------------------------------------------------------------------
# The two ways. Each returns its IoUs (B, G), and the seconds of the phases
# --------------------------------------------------------------------------------------------------


def make_predictor(sam, decoder: meter.Stopwatch):
    """A predictor with a copy of the model, whose decoding the stopwatch watches."""
    plain = copy.deepcopy(sam).to(DEVICE).eval()
    decoder.watch(plain.prompt_encoder, "forward")
    decoder.watch(plain.mask_decoder, "forward")
    if isinstance(sam, Sam2):
        return Sam2Predictor(plain)
    for block in plain.image_encoder.blocks:
        del block.attn.forward  # restores the package's own attention
    return SamPredictor(plain)


def score_naively(predictor, samples: list[Sample], prompts: list, decoder: meter.Stopwatch):
    iou = np.zeros((B, G))
    encoder = after = 0.0
    for b, sample in enumerate(samples):
        half = torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")
        with half:  # as in SamScorer.encode
            encoder += meter.seconds_of(predictor.set_image, np.asarray(sample.image))
        started = meter.now()
        for g, prompt in enumerate(prompts[b]):
            points, box = np.array(prompt.points), np.array(prompt.box)
            masks, scores, *_ = predictor.predict(points, np.ones(2), box)
            mask = masks[scores.argmax()]
            iou[b, g] = (mask & sample.mask).sum() / (mask | sample.mask).sum()
        after += meter.now() - started
    seconds = decoder.reset()
    return iou, {"encoder": encoder * G, "decoder": seconds, "masks": after - seconds}


def score_ours(scorer: SamScorer, samples: list[Sample], prompts: list, decoder: meter.Stopwatch):
    started = meter.now()
    encoded = scorer.encode([one.image for one in samples])
    encoder = meter.now() - started
    with mock.patch.object(scorer, "encode", lambda _: encoded):
        started = meter.now()
        iou = scorer.score(samples, prompts).iou.cpu().double().numpy()
        after = meter.now() - started
    seconds = decoder.reset()
    return iou, {"encoder": encoder, "decoder": seconds, "masks": after - seconds}


def measure_time(name: str, repeats: int) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each way by phase, and the largest difference of an IoU."""
    sam, samples, prompts = make_case(name)
    stopwatch = {"naive": meter.Stopwatch(), "ours": meter.Stopwatch()}
    predictor = make_predictor(sam, stopwatch["naive"])
    scorer = SamScorer(sam, DEVICE.type)
    stopwatch["ours"].watch(scorer.sam, "decode")
    score = {"naive": (score_naively, predictor), "ours": (score_ours, scorer)}
    ious = {}

    def run(way: str) -> dict[str, float]:
        function, scoring = score[way]
        ious[way], row = function(scoring, samples, prompts, stopwatch[way])
        return row | {"total": sum(row.values())}

    rows = meter.take_turns({way: lambda way=way: run(way) for way in score}, repeats)
    cached = rows["naive"] | {"encoder": rows["naive"]["encoder"] / G}
    cached["total"] = sum(cached[phase] for phase in ("encoder", "decoder", "masks"))
    rows = {"naive": rows["naive"], "cached": cached, "ours": rows["ours"]}
    return rows, abs(ious["ours"] - ious["naive"]).max()


def measure_memory(name: str, way: str) -> float:
    """Peak memory of one way above the weights, MiB: of all images, naive encodes one at a time."""
    sam, samples, prompts = make_case(name)
    stopwatch = meter.Stopwatch()
    if way == "naive":
        predictor = make_predictor(sam, stopwatch)
        return meter.added_mib(score_naively, predictor, samples[:1], prompts[:1], stopwatch)
    return meter.added_mib(SamScorer(sam, DEVICE.type).score, samples, prompts)


def main() -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sam_scoring", description=about)
    choices = ("tiny", "vit_b", "vit_l", "vit_h", "sam2")
    parser.add_argument("--sam", choices=choices, nargs="+", default=("tiny", "vit_b"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.sam:
        rows, difference = measure_time(name, options.repeats)
        limits = dict(threads=options.threads, malloc=meter.RETURN_FREED)
        for way in ("naive", "ours"):
            rows[way]["MiB"] = meter.in_new_process(measure_memory, name, way, **limits)
        title = f"{name}: B = {B}, G = {G}, {DEVICE}, {options.threads} threads, seconds"
        meter.print_table(title, rows)
        print(f"largest difference of an IoU: {difference:.1e}")


if __name__ == "__main__":
    main()

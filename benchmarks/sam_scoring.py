"""sam_scoring.py - how long does it take to score B images x G completions with SAM?

    python -m benchmarks.sam_scoring [--sam tiny vit_b]

Two ways to compute the same B x G IoUs of prompts with a box and two points:

    naive    `segment_anything.SamPredictor`: set_image and predict for every completion, IoU in
             numpy, as in public code. For sam2 the same with transformers' processor and model.
    ours     reward.SamScorer.score

naive runs the packages unchanged. It encodes each image once here, and the table multiplies these
seconds by G ("cached" is without this factor). The tiny SAM sees drawn scenes. The others (vit_b,
vit_l, vit_h; sam2: the sizes of sam2.1-hiera-tiny) have random weights and see noise.

Phases. encoder: from a PIL image to its embedding, with resizing and padding. decoder: from a
prompt and an embedding to low-resolution logits. masks: all the rest, that is choosing the best
mask, upsampling it to the image's size, threshold, intersection and union.
"""

import argparse
import copy

import numpy as np
import torch
from PIL import Image, ImageDraw
from segment_anything import SamPredictor
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

from benchmarks import meter
from benchmarks.meter import DEVICE
from data import Sample, Shapes
from plumbing.boxes import true_box
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.transformers_sam import TransformersSam
from reward import SamPrompt, SamScorer

B, G = 8, 8
# Width and height of the images of noise, as in COCO.
SIZES = [(640, 480), (480, 640), (500, 375), (333, 500), (640, 640), (640, 427), (427, 640)]
SIZES += [(375, 500)]


def noise_sample(width: int, height: int) -> Sample:
    """An image of noise with an ellipse as its object."""
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).ellipse((0.2 * width, 0.3 * height, 0.7 * width, 0.8 * height), fill=1)
    image = Image.effect_noise((width, height), 100).convert("RGB")
    return Sample(image, "", np.array(mask), None, "")


def jittered_prompt(mask: np.ndarray, rng: np.random.Generator) -> SamPrompt:
    """Each edge of the box is off by up to a tenth of the object; two points near its middle."""
    box = np.array(true_box(mask))
    size = box[2:] - box[:2]
    points = (box[:2] + box[2:]) / 2 + rng.uniform(-0.25, 0.25, (2, 2)) * size
    box = box + rng.uniform(-0.1, 0.1, 4) * np.tile(size, 2)
    return SamPrompt(tuple(box.clip(0, np.tile(mask.shape[::-1], 2))), tuple(map(tuple, points)))


def make_case(name: str):
    """A segmenter, B samples, and B x G prompts."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "tiny":
        sam = load_sam("tiny")
        samples = [Shapes("heldout")[i] for i in range(B)]
    else:
        sam = random_sam2() if name == "sam2" else build_sam(**SAM_SIZES[name])
        samples = [noise_sample(*size) for size in SIZES]
        for key, weight in sam.named_parameters():
            if "encoder" in key and "pos" in key:  # zero at first, so errors would not show
                torch.nn.init.normal_(weight, std=0.02)
    return sam, samples, [[jittered_prompt(one.mask, rng) for _ in range(G)] for one in samples]


def random_sam2() -> TransformersSam:
    """A SAM 2 with torch's own random weights: transformers' are so small that all logits are 0."""
    model = Sam2Model(Sam2Config())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return TransformersSam(model, Sam2ImageProcessor())


class Sam2Predictor:
    """`SamPredictor`'s two methods, with transformers' own model and processor for one image."""

    def __init__(self, sam: TransformersSam):
        self.model = sam.model
        self.processor = Sam2Processor(sam.image_processor)

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


def make_predictor(sam):
    """A predictor with a copy of the model."""
    plain = copy.deepcopy(sam).to(DEVICE).eval()
    if isinstance(sam, TransformersSam):
        return Sam2Predictor(plain)
    for block in plain.image_encoder.blocks:
        del block.attn.forward  # restores the package's own attention
    return SamPredictor(plain)


def watch(owner: object, name: str, seconds: list[float]) -> None:
    """Append the seconds of each call of a method to a list."""
    method = getattr(owner, name)

    def timed(*args, **kwargs):
        started = meter.now()
        result = method(*args, **kwargs)
        seconds.append(meter.now() - started)
        return result

    setattr(owner, name, timed)


def score_naively(predictor, samples: list[Sample], prompts: list) -> torch.Tensor:
    """IoUs (B, G)."""
    iou = torch.zeros(B, G, dtype=torch.float64)
    for b, sample in enumerate(samples):
        # As in SamScorer.encode.
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            predictor.set_image(np.asarray(sample.image))
        for g, prompt in enumerate(prompts[b]):
            points, box = np.array(prompt.points), np.array(prompt.box)
            masks, scores, *_ = predictor.predict(points, np.ones(2), box)
            mask = masks[scores.argmax()]
            iou[b, g] = (mask & sample.mask).sum() / (mask | sample.mask).sum()
    return iou


def measure_time(name: str) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each way by phase, and the largest difference of an IoU."""
    sam, samples, prompts = make_case(name)
    predictor = make_predictor(sam)
    scorer = SamScorer(sam, DEVICE.type)
    encoder, decoder = [], []
    watch(predictor, "set_image", encoder)
    watch(predictor.model.prompt_encoder, "forward", decoder)
    watch(predictor.model.mask_decoder, "forward", decoder)
    watch(scorer, "encode", encoder)
    watch(scorer.sam, "decode", decoder)
    ious = {}

    def run(way: str) -> dict[str, float]:
        encoder.clear()
        decoder.clear()
        started = meter.now()
        if way == "cached":
            ious[way] = score_naively(predictor, samples, prompts)
        else:
            ious[way] = scorer.score(samples, prompts).iou.cpu()
        masks = meter.now() - started - sum(encoder) - sum(decoder)
        return {"encoder": sum(encoder), "decoder": sum(decoder), "masks": masks}

    rows = meter.take_turns(run, ("cached", "ours"))
    rows = {"naive": rows["cached"] | {"encoder": G * rows["cached"]["encoder"]}} | rows
    for row in rows.values():
        row["total"] = sum(row.values())
    return rows, (ious["ours"] - ious["cached"]).abs().max().item()


def measure_memory(name: str, way: str) -> float:
    """Peak memory of one way above the weights, MiB: of all images, naive encodes one at a time."""
    sam, samples, prompts = make_case(name)
    if way == "naive":
        return meter.added_mib(score_naively, make_predictor(sam), samples[:1], prompts[:1])
    return meter.added_mib(SamScorer(sam, DEVICE.type).score, samples, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sam_scoring")
    choices = ("tiny", "vit_b", "vit_l", "vit_h", "sam2")
    parser.add_argument("--sam", choices=choices, nargs="+", default=("tiny", "vit_b"))
    torch.set_num_threads(meter.THREADS)
    for name in parser.parse_args().sam:
        rows, difference = measure_time(name)
        for way in ("naive", "ours"):
            rows[way]["MiB"] = meter.in_new_process(
                measure_memory, name, way, malloc=meter.RETURN_FREED
            )
        title = f"{name}: B = {B}, G = {G}, {DEVICE}, {meter.THREADS} threads, seconds"
        meter.print_table(title, rows)
        print(f"largest difference of an IoU: {difference:.1e}")


if __name__ == "__main__":
    main()

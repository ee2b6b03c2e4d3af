"""sam_scoring.py - how long does it take to score B images x G completions with SAM?

    python -m benchmarks.sam_scoring [--sam tiny|vit_b|both|sam2] [--repeats 3] [--threads 2]
                                     [--device cpu|cuda]

Compares three ways to compute the same B x G IoUs:

    naive    `segment_anything.SamPredictor`: set_image and predict for every completion, IoU in
             numpy. Public code for segmentation by RL does this (Seg-Zero, for example). For SAM 2
             the same two steps with transformers' processor and model.
    cached   the same, but set_image once per image
    ours     reward.SamScorer.score

The first two run the packages unchanged, with their own attention. Prompts are a box and two
points, jittered around the object. The tiny SAM sees drawn scenes. ViT-B and SAM 2 (sam2: the sizes
of sam2.1-hiera-tiny) have random weights and see noise, which takes as long as photographs.

Phases. encoder: from a PIL image to its embedding, with resizing and padding. decoder: from a
prompt and an embedding to low-resolution logits (prompt encoder and mask decoder). masks + IoU: all
the rest, that is choosing the best mask, upsampling it to the image's size, threshold, intersection
and union.
"""

import argparse
import copy
import json
import time
import timeit
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from segment_anything import SamPredictor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

import reward
from data import Sample, Shapes
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.sam2 import Sam2

B, G = 8, 8
# Width and height of the images of noise, as in COCO.
SIZES = ((640, 480), (480, 640), (500, 375), (333, 500), (640, 640), (640, 427), (427, 640))
SIZES += ((375, 500),)
# Images that the predictor encodes itself at true size on a CPU, half of them before our batch of 8
# and half after it. A call takes many seconds, and the encoder always sees 1024 x 1024 pixels, so
# four calls are enough. The predictor gets our embeddings of the other images.
ENCODED = 4
PHASES = ("encoder", "decoder", "masks")


class Meter(TorchDispatchMode):
    """Seconds of one way, by phase.

    With `count`, also counts operations and FLOPs, and the peak of the bytes of existing tensors.
    This slows down small operations, so it is for a warm-up. It does not see memory that kernels
    allocate internally, nor numpy's arrays. On CUDA the peak is the allocator's. Memory excludes
    the weights.
    """

    def __init__(self, device: str):
        super().__init__()
        self.cuda, self.phase, self.live, self.peak = device == "cuda", "", {}, 0
        self.weights = torch.cuda.memory_allocated() if self.cuda else 0
        self.seconds, self.operations, self.flops = Counter(), Counter(), Counter()
        self.repeats = []  # the seconds of each repetition

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def measure(self, phase: str, count: bool = False):
        """Add the time inside the block to this phase, and not to the phase around it."""
        outer, self.phase = self.phase, phase
        if self.cuda and not outer:
            torch.cuda.reset_peak_memory_stats()
        start = self.now()
        with self if count else nullcontext():
            yield
        seconds, self.phase = self.now() - start, outer
        self.seconds.update({phase: seconds, outer: -seconds})
        if self.cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self.weights)

    def measured(self, phase: str, function):
        """`function` with its time added to a phase."""
        return lambda *args, **kwargs: self.measure(phase)(function)(*args, **kwargs)

    def end_repeat(self) -> None:
        self.repeats.append(self.seconds)
        self.seconds = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations[self.phase] += not func.is_view  # a view runs no kernel
        if count := flop_registry.get(func.overloadpacket):
            self.flops[self.phase] += count(*args, **kwargs, out_val=out)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs} | self.live.keys()
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not self.cuda]
        for storage in (t.untyped_storage() for t in outputs):
            if storage._cdata not in known:  # else it is a view or an in-place operation
                known.add(storage._cdata)
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


# --------------------------------------------------------------------------------------------------
# The case: models, samples and prompts
# --------------------------------------------------------------------------------------------------


def noise_sample(index: int, rng: np.random.Generator) -> Sample:
    """An image of noise with an ellipse as its object."""
    width, height = SIZES[index]
    mask = Image.new("1", (width, height))
    right, bottom = width * rng.uniform(0.5, 0.9), height * rng.uniform(0.6, 0.9)
    ImageDraw.Draw(mask).ellipse((width * 0.2, height * 0.3, right, bottom), fill=1)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return Sample(image, "", np.array(mask), None, str(index))


def jittered_prompt(mask: np.ndarray, rng: np.random.Generator) -> reward.SamPrompt:
    """A prompt as of a good policy: each edge is off by up to a tenth of the object, and two points
    are near its middle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    size, limit = np.tile(box[2:] - box[:2], 2), np.tile(mask.shape[::-1], 2)
    points = (box[:2] + box[2:]) / 2 + rng.uniform(-0.25, 0.25, (2, 2)) * size[:2]
    box = (box + rng.uniform(-0.1, 0.1, 4) * size).clip(0, limit)
    return reward.SamPrompt(tuple(box), tuple(map(tuple, points)))


def random_sam2() -> Sam2:
    """A SAM 2 with torch's own random weights: transformers' are so small that all logits are 0."""
    sam = Sam2(Sam2Config())
    for module in sam.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sam.image_processor = Sam2ImageProcessor()
    return sam


class Sam2Predictor:
    """`SamPredictor`'s methods, with transformers' own model and processor for one image."""

    def __init__(self, model: Sam2Model, processor: Sam2Processor):
        self.model, self.processor = model, processor
        self.features, self.original_size = None, None

    @torch.no_grad()
    def set_image(self, image: np.ndarray) -> None:
        image = Image.fromarray(image)
        pixels = self.processor(images=image, return_tensors="pt").pixel_values
        self.features = self.model.get_image_embeddings(pixels.to(self.model.device))
        self.features = [level.float() for level in self.features]
        self.original_size = (image.height, image.width)

    @torch.no_grad()
    def predict(self, points, labels, box, multimask_output: bool):
        """Three masks (3, H, W) bool and their scores (3,), as arrays, and the logits."""
        prompt = self.processor(
            input_points=[[points.tolist()]],
            input_labels=[[labels.astype(int).tolist()]],
            input_boxes=[[box.tolist()]],
            original_sizes=[list(self.original_size)],
            return_tensors="pt",
        ).to(self.model.device)
        sizes = prompt.pop("original_sizes")
        options = dict(image_embeddings=self.features, multimask_output=multimask_output)
        out = self.model(**prompt, **options)
        masks = self.processor.post_process_masks(out.pred_masks, sizes)[0][0]
        return masks.cpu().numpy(), out.iou_scores[0, 0].cpu().numpy(), out.pred_masks[0, 0]


def make_case(name: str):
    """SAM, B samples, and B x G prompts."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "tiny":
        sam, scenes = load_sam("tiny"), Shapes("heldout")
        samples = [scenes[i] for i in range(B)]
    else:
        sam = random_sam2() if name == "sam2" else build_sam(**SAM_SIZES[name])
        samples = [noise_sample(i, rng) for i in range(B)]
        encoder = sam.vision_encoder if name == "sam2" else sam.image_encoder
        for key, weight in encoder.named_parameters():
            if "pos" in key:  # zero at first, so that errors in their use would not show
                torch.nn.init.normal_(weight, std=0.02)
    return sam, samples, [[jittered_prompt(one.mask, rng) for _ in range(G)] for one in samples]


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def score_one_by_one(
    predictors: list[SamPredictor | Sam2Predictor], samples: list[Sample], prompts: list
) -> np.ndarray:
    """IoU (B, G) with the predictors, after set_image."""
    iou = np.zeros((B, G))
    for b, (predictor, sample) in enumerate(zip(predictors, samples, strict=True)):
        for g, prompt in enumerate(prompts[b]):
            masks, scores, _ = predictor.predict(
                np.array(prompt.points), np.ones(2), np.array(prompt.box), multimask_output=True
            )
            mask = masks[scores.argmax()]
            intersection = np.logical_and(mask, sample.mask).sum()
            iou[b, g] = intersection / np.logical_or(mask, sample.mask).sum()
    return iou


class Comparison:
    """The predictors and `reward.SamScorer` on the same case, measured phase by phase."""

    def __init__(self, name: str, device: str):
        self.device, self.slow = device, name != "tiny" and device == "cpu"
        self.encoded = ENCODED if self.slow else B  # images that the predictors encode themselves
        sam, self.samples, self.prompts = make_case(name)
        plain = copy.deepcopy(sam).to(device).eval()
        self.scorer = reward.SamScorer(sam, device)
        self.theirs, self.ours = Meter(device), Meter(device)
        encoder, decoder = plain.prompt_encoder, plain.mask_decoder
        places = [(encoder, "forward"), (decoder, "forward")]
        if name == "sam2":
            processor = Sam2Processor(plain.image_processor)
            self.predictors = [Sam2Predictor(plain, processor) for _ in range(B)]
            places.append((plain, "get_image_wide_positional_embeddings"))
        else:
            for block in plain.image_encoder.blocks:
                del block.attn.forward  # restores the package's own attention
            self.predictors = [SamPredictor(plain) for _ in range(B)]
            places.append((encoder, "get_dense_pe"))
        for part, method in places:
            setattr(part, method, self.theirs.measured("decoder", getattr(part, method)))
        self.calls, self.batches = [], []  # seconds of encoder calls: one image, and our batch

    def time_encoders(self, count: bool) -> None:
        """Encode all images with the scorer, and `encoded` of them with the predictors."""
        for b in range(self.encoded):
            if b == self.encoded // 2:
                with self.ours.measure("encoder", count):
                    self.embedded = self.scorer.encode([one.image for one in self.samples])
                self.batches.append(self.ours.seconds.pop("encoder"))
            half = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
            with self.theirs.measure("encoder", count), half:  # as in SamScorer.encode
                self.predictors[b].set_image(np.asarray(self.samples[b].image))
            self.calls.append(self.theirs.seconds.pop("encoder"))
        for b in range(self.encoded, B):
            predictor, size = self.predictors[b], self.samples[b].mask.shape
            features = [level[b : b + 1] for level in self.embedded[0]]
            predictor.original_size = size
            if isinstance(predictor, Sam2Predictor):
                predictor.features = features
                continue
            predictor.features, predictor.is_image_set = features[0], True
            predictor.input_size = predictor.transform.get_preprocess_shape(
                *size, predictor.transform.target_length
            )

    def time_decoders(self, count: bool) -> None:
        """Score all prompts both ways. Keeps the IoUs and their largest difference."""
        with self.theirs.measure("masks", count):
            self.iou = score_one_by_one(self.predictors, self.samples, self.prompts)
        decode = self.ours.measured("decoder", self.scorer.sam.decode)
        with (
            mock.patch.object(self.scorer.sam, "decode", decode),
            mock.patch.object(self.scorer, "encode", return_value=self.embedded),
            self.ours.measure("masks", count),
        ):
            self.overlap = self.scorer.score(self.samples, self.prompts)
            iou = self.overlap.iou.cpu().double().numpy()
        self.difference = abs(iou - self.iou).max()

    def run(self, repeats: int) -> None:
        """Measure `repeats` times, after a warm-up that also counts operations."""
        for repeat in range(repeats + 1):
            # Slow encoders run in the warm-up only: next to ten seconds, counting takes no time.
            if repeat == 0 or not self.slow:
                self.time_encoders(count=repeat == 0)
            self.time_decoders(count=repeat == 0)
            self.theirs.end_repeat()
            self.ours.end_repeat()


def machine_floor(flops: dict[str, float], pixels: int, device: str) -> dict[str, float]:
    """Seconds of each phase at the best speed of this machine.

    For encoder and decoder: their FLOPs at the speed of a large matrix product. For masks: one
    write and one read of the logits at full size (`pixels` in total, 4 bytes each).
    """
    square, block = torch.randn(2048, 2048, device=device), torch.zeros(2**26, device=device)
    half = square.bfloat16() if device == "cuda" else square  # as the encoder
    jobs = (lambda: half @ half, lambda: square @ square, lambda: block.add_(1))
    timer = Meter(device).now
    best = [min(timeit.repeat(job, number=1, repeat=10, timer=timer)) for job in jobs]
    product = 2 * 2048**3  # FLOPs
    return {
        "encoder": flops["encoder"] * best[0] / product,
        "decoder": flops["decoder"] * best[1] / product,
        "masks": pixels * best[2] / len(block),
    }


def compare(name: str, device: str, repeats: int) -> dict:
    """Measure one SAM. Returns what `print_comparison` shows, ready for JSON."""
    c = Comparison(name, device)
    c.run(repeats)
    calls = c.calls[c.encoded :] or c.calls  # without the warm-up, if there are others
    call, batch = median(calls), median(c.batches[1:] or c.batches)
    ways = {  # meter, seconds of the encoder, and how often the counted encoder calls are made
        "naive": (c.theirs, call * B * G, B * G / c.encoded),
        "cached": (c.theirs, call * B, B / c.encoded),
        "ours": (c.ours, batch, 1),
    }
    table = {}
    for way, (meter, encoder, times) in ways.items():
        row = {"encoder": encoder}
        row |= {phase: median(r[phase] for r in meter.repeats[1:]) for phase in PHASES[1:]}
        row["total"] = sum(row.values())
        counts = meter.operations
        row["operations"] = round(sum(counts.values()) + counts["encoder"] * (times - 1))
        table[way] = row | {"peak MiB": meter.peak / 2**20}
    flops = c.theirs.flops | {"encoder": c.theirs.flops["encoder"] * B / c.encoded}
    floor = machine_floor(flops, G * sum(one.mask.size for one in c.samples), device)
    table["floor"] = floor | {"total": sum(floor.values())}
    truth, area = np.array([(one.mask.sum(), one.mask.size) for one in c.samples]).T[:, :, None]
    pixels = (c.overlap.union + c.overlap.intersection).cpu().numpy() - truth  # of the masks
    result = {"sam": name, "device": device, "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "B": B, "G": G, "repeats": repeats}
    result |= {"calls": len(calls), "ways": table}
    result["teraflops"] = {phase: flops[phase] / 1e12 for phase in PHASES[:2]}
    result |= {"iou_difference": c.difference, "mean_iou": c.iou.mean()}
    return result | {"covered": ((pixels / area).min(), (pixels / area).max())}


def print_comparison(r: dict) -> None:
    """Print a result of `compare`."""
    table, columns = r["ways"], (*PHASES, "total", "operations", "peak MiB")
    print(f"\n{r['sam']}: B = {B} images x G = {G} completions, {r['device']}, ", end="")
    print(f"{r['threads']} threads, medians of {r['repeats']}, seconds")
    headers = [column.replace("masks", "masks+IoU") for column in columns]
    print(f"{'':14}" + "".join(f"{header:>12}" for header in headers))
    for way, row in table.items():
        cells = [f"{row[c]:12,.{3 if c in columns[:4] else 0}f}" for c in columns if c in row]
        print(f"{way:14}" + "".join(cells))
    for one, other in (("naive", "ours"), ("cached", "ours"), ("ours", "floor")):
        ratios = [table[one][c] / table[other][c] for c in columns if c in table[other]]
        print(f"{one + ' / ' + other:14}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    encoder, decoder = r["teraflops"].values()
    low, high = r["covered"]
    print(f"naive: cached with {G} times the encoder calls (median of {r['calls']} timed calls)")
    print(f"floor: {encoder:.2g} TFLOP for {B} encodings and {decoder:.2g} for {B * G} decodings")
    print("at the speed of a matrix product, and the logits at full size")
    print(f"largest difference of an IoU: {r['iou_difference']:.1e} (mean IoU {r['mean_iou']:.2f};")
    print(f"masks cover {low:.0%} to {high:.0%} of their images)")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sam_scoring", description=__doc__.split("\n")[0]
    )
    choices = ("tiny", "vit_b", "both", "sam2")  # both: tiny and vit_b
    parser.add_argument("--sam", choices=choices, default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for name in ("tiny", "vit_b") if options.sam == "both" else (options.sam,):
        results.append(compare(name, options.device, options.repeats))
        print_comparison(results[-1])
    print("\noperations: kernels that PyTorch runs, without views and numpy")
    print("peak MiB: tensors that exist at the same time, without the weights")
    print(json.dumps(results))


if __name__ == "__main__":
    main()

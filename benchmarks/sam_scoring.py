"""sam_scoring.py - what does it cost to score B images x G completions with SAM?

    python benchmarks/sam_scoring.py [--sam tiny|vit_b|both] [--repeats 3] [--threads 2] [--device cpu|cuda]

Three ways to the same B x G numbers:
    naive    `segment_anything.SamPredictor`, set_image and predict for every completion, IoU in numpy, as public code for
             segmentation by RL (Seg-Zero, for one) does it
    cached   the same, but set_image once for each image
    ours     reward.SamScorer.score
The first two run the package as it is, its own attention included. Prompts are a box and two points, jittered around the
object. The tiny SAM sees drawn scenes; ViT-B has random weights and sees noise, which costs what photographs cost.

Phases. encoder: from a PIL image to its embedding, resizing and padding included. decoder: from a prompt and an embedding to
logits at low resolution (prompt encoder and mask decoder). masks + IoU: all the rest, so the choice of the best mask,
upsampling to the image's size, threshold, intersection and union.
"""

import argparse
import copy
import json
import sys
import time
import timeit
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from segment_anything import SamPredictor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reward  # noqa: E402
from data import Sample, Shapes  # noqa: E402

B, G = 8, 8
SHAPES = ((640, 480), (480, 640), (500, 375), (333, 500), (640, 640), (640, 427), (427, 640), (375, 500))  # W, H: as in COCO
# Images that the predictor encodes itself at ViT-B on a CPU, half of them before our batch of 8 and half after. A call takes many
# seconds, and as the encoder's input is always 1024 x 1024, four tell the price. For the rest it is lent our embeddings.
ENCODED = 4
PHASES = ("encoder", "decoder", "masks")


class Meter(TorchDispatchMode):
    """Seconds of one way by phase. With `tally`, which slows small operations and so is for a warm-up, also operations, FLOPs
    and the peak of the bytes of live tensors: those that kernels allocate for themselves are not seen, nor are numpy's arrays.
    On CUDA the peak is the allocator's own. Memory is what a way adds to the weights."""

    def __init__(self, device: str):
        super().__init__()
        self.cuda, self.phase, self.live, self.peak = device == "cuda", "", {}, 0
        self.weights = torch.cuda.memory_allocated() if self.cuda else 0
        self.seconds, self.operations, self.flops = Counter(), Counter(), Counter()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def charge(self, phase: str, tally: bool = False):
        """Time spent in here is this phase's, and not that of the phase around it."""
        outer, self.phase = self.phase, phase
        if self.cuda and not outer:
            torch.cuda.reset_peak_memory_stats()
        start = self.now()
        with self if tally else nullcontext():
            yield
        seconds, self.phase = self.now() - start, outer
        self.seconds.update({phase: seconds, outer: -seconds})
        if self.cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self.weights)

    def timed(self, phase: str, function):
        return lambda *args, **kwargs: self.charge(phase)(function)(*args, **kwargs)  # a context manager is a decorator too

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations[self.phase] += not func.is_view  # a view launches nothing
        if func.overloadpacket in flop_registry:
            self.flops[self.phase] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not self.cuda):
            if storage._cdata not in given | self.live.keys():  # else a view, or in place
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def noise_sample(index: int, rng: np.random.Generator) -> Sample:
    """An image of noise, with an ellipse for its object."""
    width, height = SHAPES[index]
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).ellipse((width * 0.2, height * 0.3, width * rng.uniform(0.5, 0.9), height * rng.uniform(0.6, 0.9)), fill=1)
    return Sample(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)), "", np.array(mask), None, str(index))


def jittered(mask: np.ndarray, rng: np.random.Generator) -> reward.SamPrompt:
    """What a decent policy might answer: each edge off by up to a tenth of the object, two points around its middle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    size, limit = np.tile(box[2:] - box[:2], 2), np.tile(mask.shape[::-1], 2)
    points = (box[:2] + box[2:]) / 2 + rng.uniform(-0.25, 0.25, (2, 2)) * size[:2]
    return reward.SamPrompt(tuple((box + rng.uniform(-0.1, 0.1, 4) * size).clip(0, limit)), tuple(map(tuple, points)))


def one_by_one(predictors: list[SamPredictor], samples: list[Sample], prompts: list) -> np.ndarray:
    """The public way, once the images are set. Returns IoU (B, G)."""
    iou = np.zeros((B, G))
    for b, (predictor, sample, group) in enumerate(zip(predictors, samples, prompts, strict=True)):
        for g, prompt in enumerate(group):
            masks, ratings, _ = predictor.predict(np.array(prompt.points), np.ones(2), np.array(prompt.box), multimask_output=True)
            mask = masks[ratings.argmax()]
            iou[b, g] = np.logical_and(mask, sample.mask).sum() / np.logical_or(mask, sample.mask).sum()
    return iou


def floor(flops: dict[str, float], pixels: int, device: str) -> dict[str, float]:
    """Seconds at the best speed of this machine: the FLOPs of B encodings and B*G decodings, as fast as a large matrix product;
    and B*G masks' logits at full size (`pixels` together, 4 bytes each) written once and read once."""
    square, block = torch.randn(2048, 2048, device=device), torch.zeros(2**26, device=device)
    half = square.bfloat16() if device == "cuda" else square  # the encoder runs in half precision there
    jobs = (lambda: half @ half, lambda: square @ square, lambda: block.add_(1))
    encoder, decoder, masks = (min(timeit.repeat(job, number=1, repeat=10, timer=Meter(device).now)) for job in jobs)
    work = 2 * 2048**3  # FLOPs of the product
    return {
        "encoder": flops["encoder"] * encoder / work,
        "decoder": flops["decoder"] * decoder / work,
        "masks": pixels * masks / len(block),
    }


def compare(name: str, device: str, repeats: int) -> dict:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "tiny":
        sam, samples = reward.load_sam("tiny"), [Shapes("heldout")[i] for i in range(B)]
    else:
        sam, samples = reward.build_sam(**reward.SAM_SIZES[name]), [noise_sample(i, rng) for i in range(B)]
        for key, weight in sam.image_encoder.named_parameters():
            if "pos" in key:  # all zero at first, and then any treatment of positions would do
                torch.nn.init.normal_(weight, std=0.02)
    prompts = [[jittered(sample.mask, rng) for _ in range(G)] for sample in samples]
    plain = copy.deepcopy(sam).to(device)
    for block in plain.image_encoder.blocks:
        del block.attn.forward  # ours; the package's own comes back
    scorer, predictors = reward.SamScorer(sam, device), [SamPredictor(plain) for _ in range(B)]
    encode, theirs, ours = scorer.encode, Meter(device), Meter(device)
    for part, function in ((plain.prompt_encoder, "forward"), (plain.prompt_encoder, "get_dense_pe"), (plain.mask_decoder, "forward")):
        setattr(part, function, theirs.timed("decoder", getattr(part, function)))
    slow = name == "vit_b" and device == "cpu"
    encoded = ENCODED if slow else B
    calls, batches, rest = [], [], {theirs: [], ours: []}

    for repeat in range(repeats + 1):  # the first is the warm-up
        tally = repeat == 0
        for b in range(encoded if tally or not slow else 0):  # slow ones are timed in the warm-up alone: ten seconds hide the tally
            if b == encoded // 2:
                with ours.charge("encoder", tally):
                    found = embeddings, _, input_sizes = encode([sample.image for sample in samples])
                batches.append(ours.seconds.pop("encoder"))
            with theirs.charge("encoder", tally), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as ours
                predictors[b].set_image(np.asarray(samples[b].image))
            calls.append(theirs.seconds.pop("encoder"))
        for b in range(encoded, B):
            predictors[b].features, predictors[b].is_image_set = embeddings[b : b + 1], True
            predictors[b].input_size, predictors[b].original_size = input_sizes[b], samples[b].mask.shape
        with theirs.charge("masks", tally):
            iou = one_by_one(predictors, samples, prompts)
        with mock.patch.object(reward, "decode_masks", ours.timed("decoder", reward.decode_masks)), ours.charge("masks", tally):
            with mock.patch.object(scorer, "encode", return_value=found):
                overlap = scorer.score(samples, prompts)
                difference = abs(overlap.iou.cpu().double().numpy() - iou).max()
        for meter in rest:
            rest[meter].append(meter.seconds)
            meter.seconds = Counter()

    truth, area = np.array([(sample.mask.sum(), sample.mask.size) for sample in samples]).T[:, :, None]
    covered = ((overlap.union + overlap.intersection).cpu().numpy() - truth) / area  # union + intersection = mask + truth
    call, batch = median(calls[encoded:] or calls), median(batches[1:] or batches)
    ways = {"naive": (theirs, call * B * G, B * G / encoded), "cached": (theirs, call * B, B / encoded), "ours": (ours, batch, 1)}
    table = {}
    for way, (meter, encoder, times) in ways.items():
        row = {"encoder": encoder} | {phase: median(r[phase] for r in rest[meter][1:]) for phase in PHASES[1:]}
        operations = sum(count * (times if phase == "encoder" else 1) for phase, count in meter.operations.items())
        table[way] = row | {"total": sum(row.values()), "operations": round(operations), "peak MiB": meter.peak / 2**20}
    flops = theirs.flops | {"encoder": theirs.flops["encoder"] * B / encoded}
    table["floor"] = floor(flops, G * sum(sample.mask.size for sample in samples), device)
    table["floor"]["total"] = sum(table["floor"].values())
    return {
        "sam": name, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "B": B, "G": G, "repeats": repeats,
        "calls": len(calls[encoded:] or calls), "ways": table, "teraflops": {phase: flops[phase] / 1e12 for phase in PHASES[:2]},
        "iou_difference": difference, "mean_iou": iou.mean(), "covered": (covered.min(), covered.max()),
    }  # fmt: skip


def show(r: dict) -> None:
    table, columns, flops, low, high = r["ways"], (*PHASES, "total", "operations", "peak MiB"), r["teraflops"], *r["covered"]
    print(f"\n{r['sam']}: B = {B} images x G = {G} completions, {r['device']}, {r['threads']} threads, medians of {r['repeats']}, seconds")
    print(f"{'':14}" + "".join(f"{c.replace('masks', 'masks+IoU'):>12}" for c in columns))
    for way, row in table.items():
        print(f"{way:14}" + "".join(f"{row[c]:12,.{3 if c in columns[:4] else 0}f}" for c in columns if c in row))
    for one, other in (("naive", "ours"), ("cached", "ours"), ("ours", "floor")):
        print(f"{one + ' / ' + other:14}" + "".join(f"{table[one][c] / table[other][c]:12.2f}" for c in columns if c in table[other]))
    print(f"""naive is cached, with the very same encoder call {G} times: the median of {r["calls"]} calls that were timed, times {B * G} or {B}
floor: {B} encodings, {flops["encoder"]:.2g} TFLOP, and {B * G} decodings, {flops["decoder"]:.2g} TFLOP, at the speed of a matrix product; logits at full size
largest difference of IoU: {r["iou_difference"]:.1e} (mean IoU {r["mean_iou"]:.2f}; masks cover {low:.0%} to {high:.0%} of their images)""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sam", choices=("tiny", "vit_b", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for name in ("tiny", "vit_b") if options.sam == "both" else (options.sam,):
        results.append(compare(name, options.device, options.repeats))
        show(results[-1])
    print("\noperations: what PyTorch launches; views and numpy are not counted. peak MiB: tensors alive at once, beyond the weights.")
    print(json.dumps(results))


if __name__ == "__main__":
    main()

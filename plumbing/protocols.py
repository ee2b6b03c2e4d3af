"""protocols.py - the two ways to count an evaluation, and the paper's figures beside them.

The mask of an answer is the same under both. What is counted differs:

    lisa     LISA's metric. Ignored pixels count neither in the intersection nor in the union. SAM
             gets whatever part of an answer is valid. An image whose union is empty has IoU 1.
    segzero  Seg-Zero's evaluation. Ignored pixels are target. An answer without a valid box and all
             of its points has IoU 0. So has an image whose union is empty.

Of an answer that lists several objects, the masks are united. One valid object is enough for
segzero. The columns box, points, box_iou and points_inside are about the first one alone. Answers
are greedy under both. ReasonSeg is the only set with ignored pixels.
"""

from pathlib import Path

from plumbing.prompts import points_asked

PROTOCOLS = {
    "lisa": "ignored pixels are left out, an empty union has IoU 1",
    "segzero": "ignored pixels are target, an unreadable answer has IoU 0",
}
# Prompts of `samr1_mini.evaluate_batch`, in this order: the policy's, the ceiling's, the box only.
PREFIXES = ("", "ceiling_", "boxonly_")


def protocols(s) -> tuple[str, ...]:
    """The protocols that a run is counted by, the one of its headline first.

    `train` is counted by LISA's, as the reward is. Evaluation sets of the hub do not mark ignored
    pixels: only Seg-Zero's counting exists there.
    """
    if not hasattr(s, "protocol"):
        return ("lisa",)
    if s.data.startswith("hub:"):
        return ("segzero",)
    return tuple(sorted(PROTOCOLS, key=lambda name: name != s.protocol))


def is_readable(answer, style: str) -> bool:
    """Whether an object of a reward.Answer has a valid box and all points that are asked for."""
    objects = [(answer.box, answer.points), *answer.others]
    return any(box and len(points) == points_asked(style) for box, points in objects)


def count(overlap, b: int, sample, readable: bool, s) -> dict:
    """The counts of sample b, in pixels, as columns of answers.jsonl.

    overlap:  reward.Overlap of B samples x 3 prompts, see `PREFIXES`, with masks.
    readable: of `is_readable`.

    Returns one dict with columns such as "ceiling_iou" for each of `protocols`, under its name, and
    the columns of the headline once more, without a name.
    """
    lisa = {}
    segzero = {}
    target = sample.mask if sample.ignore is None else sample.mask | sample.ignore
    for k, prefix in enumerate(PREFIXES):
        for name in ("intersection", "union", "iou"):
            lisa[prefix + name] = getattr(overlap, name)[b, k].item()
        mask = overlap.masks[b][k].cpu().numpy() & (readable or prefix == "ceiling_")
        intersection = float((mask & target).sum())
        union = float((mask | target).sum())
        segzero[prefix + "intersection"] = intersection
        segzero[prefix + "union"] = union
        segzero[prefix + "iou"] = intersection / union if union else 0.0
    counts = {"lisa": lisa, "segzero": segzero}
    return {name: counts[name] for name in protocols(s)} | counts[protocols(s)[0]]


def metrics(rows: list[dict], compute_metrics, trained: str, s) -> dict[str, dict]:
    """The metrics of an evaluation for eval.json: of the policy, named `trained`, and the ceiling.

    Both hold `samr1_mini.compute_metrics` of the headline, its name as "protocol", and gIoU and
    cIoU by each of `protocols`, such as "segzero_giou".
    """
    results = {}
    for title, prefix in ((trained, ""), ("ceiling", "ceiling_")):
        results[title] = compute_metrics(rows, prefix) | {"protocol": protocols(s)[0]}
        for name in protocols(s):
            found = compute_metrics([row | row.get(name, {}) for row in rows], prefix)
            results[title][f"{name}_giou"] = found["giou"]
            results[title][f"{name}_ciou"] = found["ciou"]
    return results


def print_protocols(metrics: dict, rows: list[dict], s) -> None:
    """Print what a table of metrics counts, and the paper's figures if they are comparable.

    metrics: those of the policy in `metrics`. rows: of `samr1_mini.evaluate`.
    """
    for name in protocols(s):
        figures = f"gIoU {metrics[f'{name}_giou']:.3f}, cIoU {metrics[f'{name}_ciou']:.3f}"
        table = " (the table)" if name == metrics["protocol"] else ""
        print(f"--protocol {name}{table}: {figures}; {PROTOCOLS[name]}")
    if s.protocol not in protocols(s):
        print(f"--protocol {s.protocol} needs marked ignored pixels, which hub: sets do not have")
    if paper := paper_results(s.data):
        ours = "SAM-R1 in the paper (7B, all weights, SAM2-Large)"
        if metrics["protocol"] == "segzero":
            print(f"{ours}, percent: {paper}; probably by this protocol, on the hub's set")
        else:
            print(f"{ours} was probably counted by --protocol segzero, so not printed here")
    if skipped := len(rows) - metrics["n"]:
        print(f"{skipped} samples could not be used and count in no metric")


# What the paper reports, in percent. Policy: Qwen2.5-VL-7B, all weights trained. Segmenter:
# SAM2-Large. It is printed beside our metrics and never mixed with them. Its rows for Seg-Zero
# match what one of its authors measured with Seg-Zero's evaluation, so the protocol is probably
# that one.
PAPER = {
    ("reasonseg", "val"): "gIoU 64.0, cIoU 55.8",
    ("reasonseg", "test"): "gIoU 60.2, cIoU 54.3",
    ("refcoco", "testA"): "cIoU 79.2",
    ("refcoco+", "testA"): "cIoU 74.7",
    ("refcocog", "test"): "gIoU 75.4, cIoU 73.1",
}


def paper_results(spec: str) -> str:
    """The paper's metrics on the split that `--data` names, or "".

    >>> paper_results("refcoco+:data/testA"), paper_results("hub:Ricky06662/refcocoplus_testA")
    ('cIoU 74.7', 'cIoU 74.7')
    """
    name, _, path = spec.partition(":")
    split = Path(path).name
    if name == "hub":
        name, _, split = split.replace("plus", "+").partition("_")
    return PAPER.get((name.lower(), split), "")

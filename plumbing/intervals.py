"""intervals.py - how far gIoU and cIoU would move with other images of the same kind.

The bootstrap: draw n of the n images with replacement, compute the metrics again, and do this 2,000
times. The 95 % interval holds the middle 95 % of the results. Another seed of training moves the
metrics too: the interval knows nothing of that.
"""

import numpy as np

from plumbing.errors import UserError

RESAMPLES = 2000


def counts_of(rows: list[dict], prefix: str = "") -> np.ndarray:
    """IoU, intersection and union of n rows of `samr1_mini.evaluate`, (3, n), without skipped ones.

    prefix: of the columns, see `protocols.PREFIXES`.
    """
    names = [prefix + name for name in ("iou", "intersection", "union")]
    usable = [row for row in rows if "skipped" not in row]
    return np.array([[row[name] for row in usable] for name in names], dtype=float)


def giou_and_ciou(counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The two metrics, (2, R), of each line of `drawn`, (R, n) indices of images."""
    iou, intersection, union = counts
    ciou = intersection[drawn].sum(-1) / union[drawn].sum(-1).clip(1)
    return np.stack([iou[drawn].mean(-1), ciou])


def bootstrap(counts: np.ndarray, other: np.ndarray | None = None) -> dict[str, list[float]]:
    """The 95 % intervals of gIoU and cIoU, or of what they are above those of `other`.

    counts, other: (3, n) of `counts_of`, of the same images. The same are drawn from both, so how
    hard an image is cancels out. Without images there is no interval.

    >>> bootstrap(np.array([[0.5, 0.5], [10, 30], [20, 60]]))  # two images that are alike
    {'giou_95': [0.5, 0.5], 'ciou_95': [0.5, 0.5]}
    """
    n = counts.shape[1]
    if n == 0:
        return {}
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    found = giou_and_ciou(counts, drawn)
    if other is not None:
        found -= giou_and_ciou(other, drawn)
    giou, ciou = np.quantile(found, (0.025, 0.975), axis=1).T.tolist()
    return {"giou_95": giou, "ciou_95": ciou}


def compare(rows: list[dict], other: list[dict], protocol: str, file: str) -> dict:
    """How far gIoU and cIoU of `rows` are above those of `other`, with intervals, for eval.json.

    rows, other: of two evaluations of the same images, both counted by `protocol`. Raises UserError
    if they are not. file: where `other` is from.
    """
    for number, pair in enumerate(zip(rows, other, strict=True), 1):
        ours, theirs = ((row.get("id"), row.get("query")) for row in pair)
        if ours != theirs:
            reason = f"answer {number} is about {theirs}, here about {ours}"
            raise UserError(f"--against {file}: {reason}: name one of the same --data")
    if any(protocol not in row for row in other if "skipped" not in row):
        raise UserError(f"--against {file}: it was not counted by --protocol {protocol}")
    counts, others = (
        counts_of([row | row.get(protocol, {}) for row in both]) for both in (rows, other)
    )
    images = np.arange(counts.shape[1])[None]
    giou, ciou = (giou_and_ciou(counts, images) - giou_and_ciou(others, images))[:, 0].tolist()
    return {"file": file, "giou": giou, "ciou": ciou} | bootstrap(counts, others)


def span(row: dict, name: str, sign: str = "") -> str:
    """The interval of a metric in a row of eval.json as text. sign: "+" for differences.

    >>> span({"giou_95": [-0.01, 0.05]}, "giou", "+")
    '-0.010 to +0.050'
    """
    return " to ".join(f"{bound:{sign}.3f}" for bound in row[f"{name}_95"])


def comparison(row: dict) -> str:
    """What `compare` found, as one line."""
    parts = []
    for name, title in (("giou", "gIoU"), ("ciou", "cIoU")):
        parts.append(f"{title} {row[name]:+.3f} ({span(row, name, '+')})")
    return f"against {row['file']}: {', '.join(parts)}, paired"

"""intervals.py - how far gIoU and cIoU would move with other images of the same kind.

The bootstrap: draw n of the n images with replacement, compute the metrics again, and do this 2,000
times. The 95 % interval holds the middle 95 % of the results. Another seed of training moves the
metrics too: the interval knows nothing of that.
"""

import numpy as np

RESAMPLES = 2000
# Three prompts are scored for each sample: the policy's, the ceiling's, the policy's box only. The
# columns of the first one have no prefix.
PREFIXES = ("", "ceiling_", "boxonly_")


def counts_of(rows: list[dict], prefix: str = "") -> np.ndarray:
    """IoU, intersection and union of n rows of `samr1_mini.evaluate`, (3, n), without skipped ones.

    prefix: of the columns, see `PREFIXES`.
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


def span(row: dict, name: str, sign: str = "") -> str:
    """The interval of a metric in a row of eval.json as text. sign: "+" for differences.

    >>> span({"giou_95": [-0.01, 0.05]}, "giou", "+")
    '-0.010 to +0.050'
    """
    return " to ".join(f"{bound:{sign}.3f}" for bound in row[f"{name}_95"])

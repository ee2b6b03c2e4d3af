"""Intervals of gIoU and cIoU over the images."""

import doctest
import math

import numpy as np
import pytest

from plumbing import intervals


def test_docstring_examples():
    failed, tried = doctest.testmod(intervals)
    assert tried and not failed


def test_images_that_are_right_or_wrong_follow_the_binomial_distribution():
    """5 of 10 images have IoU 1, so 10 times a drawn gIoU is binomial. Its quantiles are exact."""
    right = np.arange(10) % 2
    shares = np.cumsum([math.comb(10, k) / 2**10 for k in range(11)])
    span = [np.argmax(shares >= share) / 10 for share in (0.025, 0.975)]  # 2 and 8 of 10
    found = intervals.bootstrap(np.array([right, 30 * right, [30] * 10], float))
    assert found["giou_95"] == found["ciou_95"] == pytest.approx(span)


def of_many_images(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    union = generator.uniform(100, 10_000, 3000)
    iou = generator.beta(0.5, 0.4, 3000)
    return np.stack([iou, iou * union, union])


def test_large_samples_follow_the_normal_distribution():
    """gIoU is a mean; cIoU a ratio of means, whose error is that of (I - cIoU x U) / mean U."""
    counts = of_many_images(0)
    iou, intersection, union = counts
    ciou = intersection.sum() / union.sum()
    deviation = (intersection - ciou * union) / union.mean()
    found = intervals.bootstrap(counts)
    for name, mean, errors in (("giou", iou.mean(), iou), ("ciou", ciou, deviation)):
        half = 1.96 * errors.std() / 3000**0.5
        assert found[f"{name}_95"] == pytest.approx([mean - half, mean + half], abs=0.07 * half)


def test_a_paired_difference_leaves_out_what_the_images_share():
    counts = of_many_images(0)
    better = np.random.default_rng(1).normal(0.01, 0.02, 3000)
    improved = counts + np.stack([better, better * counts[2], np.zeros(3000)])
    half = 1.96 * better.std() / 3000**0.5
    expected = [better.mean() - half, better.mean() + half]
    found = intervals.bootstrap(improved, counts)
    assert found["giou_95"] == pytest.approx(expected, abs=0.07 * half)
    low, high = intervals.bootstrap(counts)["giou_95"]
    assert high - low > 10 * 2 * half


def test_what_was_counted_otherwise_is_refused():
    rows = [{"id": "1", "query": "it", "segzero": {}}]
    with pytest.raises(intervals.UserError, match="--against a.jsonl.*not counted by --protocol l"):
        intervals.compare(rows, rows, "lisa", "a.jsonl")

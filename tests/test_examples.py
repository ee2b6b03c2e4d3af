"""The example with TRL: its reward is the repository's, and it trains."""

import sys
from types import SimpleNamespace

import pytest

from examples import trl_grpo
from reward import score_completions

ANSWER = '<answer>{{"bbox":[{},{},{},{}],"points_1":[{},{}],"points_2":[{},{}]}}</answer>'


def answer(sample, think=True):
    """A completion with the true box and its centre twice, in policy pixels."""
    rows, columns = sample.mask.nonzero()
    x, y = trl_grpo.SIDE / sample.image.width, trl_grpo.SIDE / sample.image.height
    x1, x2 = columns.min() * x, (columns.max() + 1) * x
    y1, y2 = rows.min() * y, (rows.max() + 1) * y
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    return "<think>this one</think>" * think + ANSWER.format(x1, y1, x2, y2, *centre, *centre)


def test_trl_reward_equals_the_reward_in_any_order(scorer, samples, monkeypatch):
    first, second, third = samples[:3]
    negative = first.image.point(lambda v: 255 - v)
    negative = SimpleNamespace(image=negative, mask=first.mask, ignore=None)
    # Groups of different sizes, mixed, two of them with the same mask.
    rows = [third, first, second, first, third, third, negative]
    texts = [answer(third), answer(first), "no idea", answer(first, think=False)]
    texts += [answer(second), "<think>", answer(first)]
    scores = [score_completions(scorer, [r], [[t]], 64) for r, t in zip(rows, texts, strict=True)]
    expected = [score.reward.item() for score in scores]
    assert len(set(expected)) > 2
    encoded, encode = [], scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda images: encoded.extend(images) or encode(images))
    columns = {"photo": [r.image for r in rows], "mask": [r.mask for r in rows], "query": texts}
    reward = trl_grpo.trl_reward(scorer, trl_grpo.SIDE)
    assert reward(texts, **columns) == expected
    assert len(encoded) == 4
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(conversations, **columns) == expected
    columns["mask"] = [r.mask.tolist() for r in rows]
    assert reward(texts, **columns) == expected


@pytest.mark.slow
def test_trl_example_trains(tmp_path, capsys):
    pytest.importorskip("trl")
    trl_grpo.main(["--steps", "2", "--out", str(tmp_path / "trl")])
    reward = float(capsys.readouterr().out.splitlines()[-1].split()[4])
    assert 0 < reward <= 6


def test_missing_trl_gets_a_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as refused:
        trl_grpo.train(1, tmp_path)
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.count("\n") == 1 and "pip install trl" in said

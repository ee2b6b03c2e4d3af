"""RefCOCO, ReasonSeg and fetching: against miniatures in the published formats, and a web server that misbehaves.

Nothing here leaves this machine. Masks marked "cv2" were painted by LISA's reader with OpenCV 4.8.0.
"""

import hashlib
import inspect
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from makers import (
    IMAGES,
    box,
    jpeg,
    make_reasonseg,
    make_refcoco,
    make_refcocog,
    picture,
    python2_pickle,
    runs,
    serve,
    shape,
)
from PIL import Image
from pycocotools.coco import COCO

import data
from data import BadSample, ReasonSeg, RefCOCO, coco_mask, draw, labelme_masks, load_data, paint

REPO = Path(data.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools 2.0.11 under NumPy 2


def drawn(mask: np.ndarray, ignore: np.ndarray | None = None) -> list[str]:
    """Masks as lines of text: # target, o ignore."""
    rows = np.where(mask, "#", ".")
    if ignore is not None:
        assert not (mask & ignore).any()
        rows = np.where(ignore, "o", rows)
    return ["".join(row) for row in rows]


def one_line(error) -> str:
    """The message of an exception that pytest caught; it must be one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# RefCOCO
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refcocog(tmp_path_factory):
    return make_refcocog(tmp_path_factory.mktemp("refer"))


def by_id(made) -> dict[str, tuple[dict, dict]]:
    return {f"{made.name}-{ref['ref_id']}-{s['sent_id']}": (ref, s) for ref in made.refs for s in ref["sentences"]}


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize("make, splits", [(make_refcocog, "train val test"), (make_refcoco, "train val testA testB")])
def test_refcoco_yields_every_sentence_with_its_image_and_mask(tmp_path, make, splits, protocol):
    made = make(tmp_path, protocol=protocol)
    reference = COCO(tmp_path / made.name / "instances.json")
    left = by_id(made)
    for split in splits.split():
        dataset = RefCOCO(made.name, tmp_path, split)
        for one in (dataset[i] for i in range(len(dataset))):
            ref, sentence = left.pop(one.id)
            assert ref["split"] == split and one.query == sentence["sent"] and one.ignore is None
            stored = Image.open(tmp_path / IMAGES / reference.imgs[ref["image_id"]]["file_name"])
            assert one.image.mode == "RGB" and one.image.tobytes() == stored.convert("RGB").tobytes()
            assert one.mask.dtype == bool and one.mask.shape == (stored.height, stored.width)
            np.testing.assert_array_equal(one.mask, reference.annToMask(reference.anns[ref["ann_id"]]))
    assert not left


def test_the_pickles_are_what_python_2_writes(tmp_path):
    made = make_refcocog(tmp_path, images=False, protocol=0)
    raw = (tmp_path / "refcocog" / "refs(umd).p").read_bytes()
    assert raw.startswith(b"(lp0\n(dp1\nS'sent_ids'\np2\n(lp3\nI900\n") and rb"caf\xe9" in raw
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(raw)  # its strings are bytes, and not all of them ASCII
    assert pickle.loads(raw, encoding="latin1") == made.refs
    values = [
        [b"a", "é", 1, 300, 70000, -5, 2.5, None, True, [b"a", [b"b"], []], {b"k": [1]}, b"caf\xe9'\"\\\n", "€\n\\"]
    ]
    source = r"""[['a',u'\xe9',1,300,70000,-5,2.5,None,True,['a',['b'],[]],{'k':[1]},'caf\xe9\'"\\\n',u'\u20ac\n\\']]"""
    for python in pythons("2.7"):  # where there is one, it says the last word
        for protocol in (0, 2):
            code = f"import pickle, sys; sys.stdout.write(pickle.dumps({source}, {protocol}))"
            written = subprocess.run([python, "-c", code], capture_output=True, check=True).stdout
            assert written == python2_pickle(values, protocol)


def test_polygons_and_runs():
    one, other = coco_mask([[2, 2, 6, 2, 6, 5, 2, 5]], 12, 7), coco_mask([[8, 1, 9, 1, 9, 3, 8, 3]], 12, 7)
    both = coco_mask([[2, 2, 6, 2, 6, 5, 2, 5], [8, 1, 9, 1, 9, 3, 8, 3], [1, 1, 2, 2]], 12, 7)
    assert one.any() and other.any() and (both == (one | other)).all()  # a part of two points adds nothing
    mask = np.random.default_rng(0).random((7, 12)) < 0.5
    np.testing.assert_array_equal(coco_mask({"size": [7, 12], "counts": runs(mask)}, 12, 7), mask)
    assert coco_mask({"size": [7, 12], "counts": [0, 84]}, 12, 7).all()
    assert not coco_mask([], 12, 7).any()
    bad = [
        [[1, 1, float("nan"), 3, 4, 4]],
        [[1, 1, 1e30, 3, 4, 4]],
        [[1, 1, "x", 3, 4, 4]],
        {"size": [12, 7], "counts": [84]},
        {"size": [7, 12], "counts": [2, 30]},  # too short: pycocotools would fill in what the memory held
        {"size": [7, 12], "counts": [2, 30_000_000]},
        {"size": [7, 12], "counts": [-2, 86]},
        {"size": [7, 12], "counts": "22"},
        {"size": [7, 12], "counts": ""},
        {"size": [7, 12]},
        [3],
    ]
    for segmentation in bad:
        with pytest.raises((ValueError, LookupError, TypeError, OverflowError)):
            coco_mask(segmentation, 12, 7)


# The draw. These ids are part of the contract: they must come out on every machine and Python.


def deck() -> list[dict]:
    """5,000 references with 1 to 4 sentences each."""
    sentences = [[{"sent_id": 10 * i + (n * 3 + i) % 7} for n in range(1 + i % 4)] for i in range(5000)]
    return [{"ref_id": i * 7919 % 10007, "sentences": sentences[i]} for i in range(5000)]


DECK = deck()
DRAWN = ["2815-44511", "2738-44754", "3223-4255"]
DIGEST = "63773915f8324d873baf2a7cb070157d3ffa75a792da9a79f2cd837959edf968"


def ids(pairs) -> list[str]:
    return [f"{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in pairs]


def digest(names: list[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def test_the_draw_is_the_same_everywhere():
    found = ids(draw(DECK, 3000, "refcocog-train-0"))
    assert found[:3] == DRAWN and digest(found) == DIGEST
    shuffled = [ref | {"sentences": ref["sentences"][::-1]} for ref in random.Random(5).sample(DECK, len(DECK))]
    assert ids(draw(shuffled, 3000, "refcocog-train-0")) == found  # the file's order does not count


def pythons(*versions: str) -> list[str]:
    """Interpreters of these versions: on the path, and where pyenv and uv keep theirs."""
    home = Path.home()
    found = [path for version in versions if (path := shutil.which(f"python{version}"))]
    for version in versions:
        found += map(str, home.glob(f".pyenv/versions/{version}.*/bin/python"))
        found += map(str, home.glob(f".local/share/uv/python/cpython-{version}.*/bin/python"))
    return [
        path for path in found if not subprocess.run([path, "-c", ""], capture_output=True).returncode
    ]  # shims may be hollow


def test_the_draw_is_the_same_under_other_pythons():
    others = pythons(*(f"3.{minor}" for minor in range(8, 16) if minor != sys.version_info.minor))
    if not others:
        pytest.skip("no other Python here")
    code = "from __future__ import annotations\nimport hashlib, random\n"
    code += "".join(map(inspect.getsource, (draw, deck, ids, digest)))
    code += "print(digest(ids(draw(deck(), 3000, 'refcocog-train-0'))))"
    for python in others:
        done = subprocess.run([python, "-"], input=code, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == DIGEST, python


def test_the_draw_deals_like_cards():
    everything = ids(draw(DECK, None, "w"))
    assert len(everything) == len(set(everything)) == sum(len(ref["sentences"]) for ref in DECK) == 12500
    first = [name.split("-")[0] for name in everything[:5000]]
    assert len(set(first)) == 5000  # every object once before any comes again
    assert ids(draw(DECK, 700, "w")) == everything[:700] != ids(draw(DECK, 700, "v"))
    # any sentence of an object may be the one: of those with four, each place about equally often
    fours = {
        str(ref["ref_id"]): sorted(s["sent_id"] for s in ref["sentences"]) for ref in DECK if len(ref["sentences"]) == 4
    }
    pairs = [name.split("-") for name in everything[:5000]]
    counts = np.bincount([fours[ref].index(int(sentence)) for ref, sentence in pairs if ref in fours])
    assert len(counts) == 4 and counts.min() > 250
    assert abs(np.corrcoef(np.arange(5000), [int(name) for name in first])[0, 1]) < 0.05


def test_training_takes_a_draw_and_evaluation_everything(refcocog):
    spec = f"refcocog:{refcocog.root}"
    everything = {name for name, (ref, _) in by_id(refcocog).items() if ref["split"] == "train"}

    def names(*args, **more):
        return [one.id for one in load_data(*args, **more).expressions]

    assert set(names(spec, "train")) == everything  # fewer than 3,000
    assert names(spec, "train", samples=4) == names(spec, "train", 0)[:4] == names(f"{spec}/train", "train", samples=4)
    assert len({names(spec, "train", seed, 4)[0] for seed in range(6)}) > 1
    val = {name for name, (ref, _) in by_id(refcocog).items() if ref["split"] == "val"}
    for form in (spec, f"{spec}/train", f"{spec}/val", f"{spec}/"):
        assert set(names(form, "heldout", 3, 1)) == val and names(form, "heldout", 3) == names(form, "heldout", 4)
    assert len(load_data(f"{spec}/test", "heldout")) == 3 and len(load_data(f"{spec}/test", "train", samples=2)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with one sample, and what is wrong with a set
# ---------------------------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_named_and_the_others_are_sound(tmp_path):
    made = make_refcocog(tmp_path)
    folder = tmp_path / IMAGES
    files = {image["id"]: folder / image["file_name"] for image in made.instances["images"]}
    wanted = {}  # index of a reference: what the message must hold

    def spoil(k: int, *words: str):
        wanted[f"-{700 + k}-"] = words
        return files[9 + 16 * max(k, 1)], next(one for one in made.instances["annotations"] if one["id"] == 5000 + k)

    file, _ = spoil(2, "000000000041.jpg", "missing", "python data.py fetch refcocog", f"--out {tmp_path}")
    file.unlink()
    file, _ = spoil(3, "000000000057.jpg", "truncated", "again")
    file.write_bytes(file.read_bytes()[:900])
    file, _ = spoil(4, "000000000073.jpg", "UnidentifiedImage", "again")
    file.write_bytes(b"<html>not an image</html>")
    file, _ = spoil(5, "000000000089.jpg", "30 x 20", "72 x 96", "again")
    file.write_bytes(jpeg(picture(30, 20, 0)))
    _, annotation = spoil(0, "instances.json", "no mask", "leave it out")
    del annotation["segmentation"]
    _, annotation = spoil(6, "instances.json", "area is zero", "leave it out")
    annotation["segmentation"] = [[3, 3, 3, 3, 3, 3]]
    _, annotation = spoil(7, "instances.json", "runs", "leave it out")
    annotation["segmentation"] = {"size": [60, 100], "counts": [5, 6]}
    _, annotation = spoil(8, "instances.json", "no mask")
    made.instances["annotations"].remove(annotation)
    spoil(9, "instances.json", "no image")
    made.instances["images"] = made.instances["images"][:-1]
    (tmp_path / "refcocog" / "instances.json").write_text(json.dumps(made.instances))

    seen = set()
    for dataset in (RefCOCO("refcocog", tmp_path, split) for split in ("train", "val", "test")):
        for k, expression in enumerate(dataset.expressions):
            case = next((key for key in wanted if key in expression.id), None)
            if case is None:
                assert "-701-" in expression.id and dataset[k].mask.any()
                seen.add(None)
                continue
            with pytest.raises(BadSample) as error:
                dataset[k]
            text = one_line(error)
            assert all(word in text for word in wanted[case]), text
            assert (expression.id in text) == ("leave it out" in text), text
            seen.add(case)
    assert seen == {None, *wanted}


def test_an_image_is_read_as_stored_although_exif_says_turn(tmp_path):
    made = make_refcocog(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # show it turned by a quarter
    for image in made.instances["images"]:
        picture(image["width"], image["height"], 0).save(tmp_path / IMAGES / image["file_name"], exif=turned)
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def hostile(mark: Path) -> dict[str, bytes]:
    path = str(mark).encode()
    legit = [{"ref_id": 1, "split": "train", "sentences": [], "x": Payload(mark)}]
    return {f"protocol {n}": pickle.dumps(legit, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)} | {
        "inst": b"(S'" + path + b"'\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\nS'" + path + b"'\no.",
        "eval": b'c__builtin__\neval\n(S\'__import__("os").mkdir("' + path + b"\")'\ntR.",
    }


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    make_refcocog(tmp_path)
    mark = tmp_path / "ran"
    for name, content in hostile(mark).items():
        pickle.loads(content)
        assert mark.exists(), name  # it does run elsewhere
        mark.rmdir()
        (tmp_path / "refcocog" / "refs(umd).p").write_bytes(content)
        with pytest.raises(ValueError) as error:
            RefCOCO("refcocog", tmp_path, "train")
        assert "refs(umd).p" in one_line(error) and "mkdir" in one_line(error) or "eval" in one_line(error)
        assert not mark.exists(), name


MANY = (10**10).to_bytes(8, "little")
GREEDY = {"LONG_BINPUT": b"]r\xff\xff\xff\xff.", "PUT": b"]p10000000000\n.", "BYTEARRAY8": b"\x96" + MANY}
GREEDY |= {"LONG_BINGET": b"j\xff\xff\xff\xff.", "BINBYTES8": b"\x8e" + MANY, "FRAME": b"\x95" + MANY}


@pytest.mark.parametrize("name", GREEDY)
def test_a_pickle_of_a_few_bytes_takes_no_gigabytes(tmp_path, name):
    make_refcocog(tmp_path)
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(b"\x80\x04" + GREEDY[name])
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        RefCOCO("refcocog", tmp_path, "train")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert "refs(umd).p" in one_line(error)


def test_what_is_wrong_with_a_whole_set_is_one_line(tmp_path, monkeypatch):
    def error_of(*args) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_data(*args)
        assert not isinstance(error.value, BadSample)
        return one_line(error)

    spec = f"refcocog:{tmp_path}"
    for wrong in ("", "imagenet:x", "refcocog", "refcocog:", "shapes:x"):
        assert "refcocog:ROOT" in error_of(wrong, "train")
    message = error_of(f"refcoco:{tmp_path}/test", "heldout")
    assert "no split test" in message and "testA" in message
    message = error_of(spec, "train")
    assert "refs(umd).p" in message and f"python data.py fetch refcocog --out {tmp_path}" in message
    made = make_refcocog(tmp_path, images=False)
    refs, instances = tmp_path / "refcocog" / "refs(umd).p", tmp_path / "refcocog" / "instances.json"
    message = error_of(spec, "train", 7, 5)
    assert str(IMAGES) in message and "--split train --samples 5 --seed 7" in message
    sound = refs.read_bytes()
    others = [pickle.dumps(value) for value in ({"a": 1}, [1, 2], [{"split": "train"}], 3)]
    for content in (b"", b"garbage", sound[:-30], b"]." + sound, *others):
        refs.write_bytes(content)
        assert "refs(umd).p" in error_of(spec, "train") and "delete it" in error_of(spec, "train"), content[:20]
    refs.write_bytes(python2_pickle([{b"split": b"train", b"ref_id": 1, b"sentences": []}], 0))
    assert "refs(umd).p" in error_of(spec, "heldout") and "split val" in error_of(spec, "heldout")
    os.truncate(refs, 2**29 + 1)  # a sparse file: it takes no space
    assert "too large" in error_of(spec, "train")
    refs.write_bytes(sound)
    escape = json.loads(json.dumps(made.instances))
    escape["images"][0]["file_name"] = "../../elsewhere.jpg"
    for content in (
        "",
        "{",
        "[]",
        '{"images": 3}',
        "[" * 100_000,
        json.dumps(escape),
        '{"images": [], "annotations": [1]}',
    ):
        instances.write_text(content)
        assert "instances.json" in error_of(spec, "train") and "delete it" in error_of(spec, "train"), content[:20]
    instances.unlink()
    assert "instances.json" in error_of(spec, "train") and "python data.py fetch" in error_of(spec, "train")
    assert "reasonseg" in error_of(f"reasonseg:{tmp_path}/nowhere", "train")


def test_a_root_may_be_called_like_a_split(tmp_path, monkeypatch):
    made = make_refcocog(tmp_path / "val")
    train = {name for name, (ref, _) in by_id(made).items() if ref["split"] == "train"}
    assert {one.id for one in load_data(f"refcocog:{tmp_path}/val", "train").expressions} == train
    assert len(load_data(f"refcocog:{tmp_path}/val/test", "heldout")) == 3
    make_reasonseg(tmp_path / "test", ("train", "val"))
    assert load_data(f"reasonseg:{tmp_path}/test", "train").split == "train"
    assert load_data(f"reasonseg:{tmp_path}/test", "heldout").split == "val"
    assert load_data(f"reasonseg:{tmp_path}/test/val", "train").split == "val"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_data("refcocog:~/val/test", "heldout")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# ReasonSeg
# ---------------------------------------------------------------------------------------------------------------------

CV2 = {
    "overlap_0003": """
........................
........................
..######oooooo..........
..######oooooo..........
..######oooooo..........
..######oooooo..........
..######oooooo..........
..######oooooo..........
..######oooooo..........
..######oooooo..........
..#########.............
..#########.............
.oooooooooooooooooooo...
.oooooooooooooooooooo...
.oooooooooooooooooooo...
........................""",
    "nested_0004": """
..........................
..######################..
..######################..
..######################..
..#####oooooooooooo#####..
..#####oooooooooooo#####..
..#####oooooooooooo#####..
..#####oooo####oooo#####..
..#####oooo####oooo#####..
..#####oooo####oooo#####..
..#####oooo####oooo#####..
..#####oooooooooooo#####..
..#####oooooooooooo#####..
..#####oooooooooooo#####..
..######################..
..######################..
..######################..
..........................""",
    "thin_0005": """
....................
.##.................
...###..............
......####..........
..#.......###.......
..#..........###....
..#.............##..
...#................
...#........#.......
...#........#.......
............#.......
....#.......#.......
............#.......
....................""",
}


def test_reasonseg_masks_are_those_of_lisas_reader(tmp_path):
    made = make_reasonseg(tmp_path)
    dataset = load_data(f"reasonseg:{tmp_path}/test", "heldout")
    found = {one.id.removeprefix("reasonseg-test-"): one for one in (dataset[i] for i in range(len(dataset)))}
    assert sorted(found) == made.names
    for name, expected in CV2.items():
        assert drawn(found[name].mask, found[name].ignore) == expected.split(), name
        assert (found[name].ignore is None) == ("o" not in expected)
    first = found["café_0001"]  # a rectangle: corners are cut to whole numbers, and belong to it
    assert first.mask[5:19, 4:21].all() and first.mask.sum() == 14 * 17 and first.image.size == (40, 30)
    assert first.query == "What at the café keeps the rain off…"  # cp1252, and the first of two
    assert found["flagged_0002"].mask[3:9, 2:10].all() and found["flagged_0002"].mask.sum() == 48
    assert (tmp_path / "test" / "café_0001.json").read_bytes().count(b"\x85") == 1


def test_polygons_are_painted_as_opencv_does():
    skewed = """
....................
..###...............
..########..........
..#############.....
..################..
..###############...
..###############...
.#####.#########....
.####...#######.....
.####.....####......
.###.......###......
.##.........#.......
.#..................
...................."""  # cv2; Pillow paints 7 pixels of it otherwise
    assert drawn(paint([(2.9, 1.1), (17.8, 4.6), (12.2, 11.9), (6.5, 6.1), (1.0, 12.99)], 20, 14)) == skewed.split()
    bow = """
####################
....############....
....############....
####################
...................."""  # cv2; it crosses itself
    assert drawn(paint([(0, 0), (19, 3), (0, 3), (19, 0)], 20, 5)) == bow.split()
    assert drawn(paint([(-5, -5), (30, -5), (30, 30), (-5, 30)], 4, 2)) == ["####"] * 2
    assert drawn(paint([(9, 9)], 4, 2)) == ["...."] * 2
    with pytest.raises(ValueError):
        paint([(1, 1), (2e5, 1)], 4, 2)


def test_of_equal_areas_the_one_listed_first_lies_on_top():
    target, ignore = shape("target", *box(1, 1, 3, 3)), shape("ignore", *box(2, 2, 4, 4))
    assert labelme_masks([target, ignore], 6, 6)[0].sum() == 9
    assert labelme_masks([ignore, target], 6, 6)[0].sum() == 5


def test_a_picture_is_turned_upright_before_it_is_painted_on(tmp_path):
    make_reasonseg(tmp_path, ("val",))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(30, 40, 0).save(tmp_path / "val" / "café_0001.jpg", exif=turned)  # stored on its side
    one = load_data(f"reasonseg:{tmp_path}/val", "heldout")[0]
    assert one.image.size == (40, 30) and one.mask.shape == (30, 40)


def test_a_bad_reasonseg_sample_is_named(tmp_path):
    made = make_reasonseg(tmp_path, ("val",))
    folder = tmp_path / "val"
    sound = json.loads((folder / "nested_0004.json").read_bytes())
    file = folder / "nested_0004.json"
    corners = ([], [(1, 2, 3)], [(float("nan"), 1)], [(1e300, 1)], ["a"])
    changes = [{"text": []}, {"shapes": [{"label": 3, "points": [[1, 1]]}]}]
    changes += [{"shapes": [shape("target", *points)]} for points in corners]
    whole = [json.dumps(sound | change).encode() for change in changes]
    for content in (b"", b"{", b"\x81\x8d", b"[" * 100_000, b"[]", b'{"text": ["x"]}', *whole):
        file.write_bytes(content)
        with pytest.raises(BadSample) as error:
            ReasonSeg(tmp_path, "val")[made.names.index("nested_0004")]
        assert "nested_0004.json" in one_line(error), content[:40]
    file.unlink()
    (folder / "thin_0005.jpg").unlink()
    (folder / "flagged_0002.jpg").write_bytes((folder / "flagged_0002.jpg").read_bytes()[:500])
    (folder / "._nested_0004.jpg").write_bytes(b"what a Mac leaves")
    dataset = ReasonSeg(tmp_path, "val")
    assert dataset.names == made.names
    words = {"nested_0004": ".json", "thin_0005": "missing", "flagged_0002": "Truncated"}
    for k, name in enumerate(dataset.names):
        if name in words:
            with pytest.raises(BadSample) as error:
                dataset[k]
            assert name in one_line(error) and words[name] in one_line(error) and "fetch reasonseg" in one_line(error)
        else:
            assert dataset[k].mask.any()


def test_an_image_without_a_target_is_evaluated_but_not_trained_on(tmp_path):
    splits = ("train", "val", "test")
    made = make_reasonseg(tmp_path, splits)
    for shapes in ([], [shape("flag", *box(2, 2, 5, 5))], [shape("ignore", *box(1, 1, 9, 9))]):
        for split in splits:
            file = tmp_path / split / "nested_0004.json"
            file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"shapes": shapes}))
            dataset, index = ReasonSeg(tmp_path, split), made.names.index("nested_0004")
            if split == "train":
                with pytest.raises(BadSample) as error:
                    dataset[index]
                assert "no pixel is target" in one_line(error)
                continue
            one = dataset[index]
            assert one.mask.dtype == bool and one.mask.shape == (one.image.height, one.image.width) and not one.mask.any()
            assert (one.ignore is not None and one.ignore.sum() == 81) == (shapes != [] and shapes[0]["label"] == "ignore")


# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch):
    """A web server in place of the real hosts: /a.zip and /b.zip are the mirrors, /coco/ the images, /sam/ the weights."""
    with serve() as server:
        mirrors = f"{server.url}/a.zip", f"{server.url}/b.zip"
        monkeypatch.setattr(data, "ARCHIVES", dict.fromkeys(data.ARCHIVES, mirrors))
        monkeypatch.setattr(data, "COCO_URL", f"{server.url}/coco")
        monkeypatch.setattr(data, "SAM_URL", f"{server.url}/sam")
        monkeypatch.setattr(data, "PAUSE", 0.01)
        monkeypatch.setattr(data, "TIMEOUT", 0.5)
        yield server


def zipped(folder: Path, *more: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in more:
            bundle.writestr(name, content)
        for file in sorted(folder.iterdir()) if folder else ():
            bundle.write(file, f"{folder.name}/{file.name}")
    return buffer.getvalue()


@pytest.fixture
def published(tmp_path, host):
    """The miniature RefCOCOg on the server, and nothing on the disk."""
    made = make_refcocog(tmp_path / "published")
    host.files |= {f"/coco/{name}": content for name, content in made.jpegs.items()}
    host.files["/a.zip"] = host.files["/b.zip"] = zipped(tmp_path / "published" / "refcocog")
    shutil.rmtree(tmp_path / "published")
    made.root = tmp_path / "root"
    return made


def run(*args) -> int:
    return data.main(["fetch", *map(str, args)])


def images_of(made, split: str) -> set[str]:
    names = {image["id"]: image["file_name"] for image in made.instances["images"]}
    return {names[ref["image_id"]] for ref in made.refs if ref["split"] == split}


def test_fetch_gets_what_training_needs_and_no_more(published, host, capsys):
    root = published.root
    assert run("refcocog", "--out", root, "--samples", 2, "--seed", 3, "--heldout", 1) == 0
    out = capsys.readouterr().out
    assert f"{host.url}/a.zip" in out and "train: 2 expressions" in out and "val: 1 expressions" in out and "MB" in out
    assert f"train --data 'refcocog:{root}' --train_samples 2 --data_seed 3 --eval_samples 1\n" in out
    train, heldout = load_data(f"refcocog:{root}", "train", 3, 2), load_data(f"refcocog:{root}", "heldout")
    assert len(train) == 2 and all(train[i].mask.any() for i in range(2)) and heldout[0].mask.any()
    assert [one.id for one in heldout.expressions] == [one.id for one in RefCOCO("refcocog", root, "val").expressions]
    needed = {one.image[0] for one in train.expressions + heldout.expressions[:1]}
    assert needed < {one.image[0] for one in train.expressions + heldout.expressions}
    assert host.count() == {"/a.zip": 1, **{f"/coco/{name}": 1 for name in needed}}
    assert {file.name for file in (root / IMAGES).iterdir()} == needed
    assert sorted(file.name for file in (root / "refcocog").iterdir()) == ["instances.json", "refs(umd).p"]

    host.requests.clear()
    assert run("refcocog", "--out", root, "--samples", 2, "--seed", 3, "--heldout", 1) == 0  # again: all is there
    assert host.requests == []
    assert run("refcocog", "--out", root, "--split", "val", "--samples", 1) == 0
    assert f"eval --data 'refcocog:{root}/val'\n" in capsys.readouterr().out
    assert host.count() == {f"/coco/{name}": 1 for name in images_of(published, "val") - needed} and len(host.requests) == 1
    assert all(load_data(f"refcocog:{root}", "heldout")[i].mask.any() for i in range(2))


@pytest.mark.parametrize("options, splits", [
    ((), ("train", "val")), (("--heldout", 0), ("train",)), (("--split", "train"), ("train",)), (("--split", "test"), ("test",)),
])  # fmt: skip
def test_an_explicit_split_comes_alone(published, host, capsys, options, splits):
    assert run("refcocog", "--out", published.root, *options) == 0
    needed = set.union(*(images_of(published, split) for split in splits))
    assert host.count() == {"/a.zip": 1, **{f"/coco/{name}": 1 for name in needed}}
    ready = {("train", "val"): ": python samr1_mini.py train", ("test",): ": python samr1_mini.py eval", ("train",): "\n"}
    assert f"all there{ready[splits]}" in capsys.readouterr().out  # train alone is not enough to train


def test_a_changed_file_is_read_again(tmp_path):
    made = make_refcocog(tmp_path)
    assert RefCOCO("refcocog", tmp_path, "val")[0].mask.any()
    assert len({id(data.read_instances(tmp_path / "refcocog" / "instances.json", 0, 0)) for _ in range(2)}) == 1  # kept
    for annotation in made.instances["annotations"]:
        annotation["segmentation"] = None
    (tmp_path / "refcocog" / "instances.json").write_text(json.dumps(made.instances))
    with pytest.raises(BadSample):
        RefCOCO("refcocog", tmp_path, "val")[0]


def test_fetch_goes_on_after_an_interruption(published, host, capsys):
    root = published.root
    names = sorted(images_of(published, "train"))
    host.faults = {f"/coco/{names[0]}": ["drop"] * 4, f"/coco/{names[1]}": [404]}
    assert run("refcocog", "--out", root, "--split", "train") == 1
    err = capsys.readouterr().err
    assert (
        "2 images" in err
        and "same command again" in err
        and "404" in err
        and names[0] in err
        and "Traceback" not in err
    )
    assert host.count()[f"/coco/{names[1]}"] == 1  # a refusal is not asked again
    assert host.count()[f"/coco/{names[0]}"] == data.TRIES
    left = root / IMAGES / f"{names[0]}.part"
    had = left.stat().st_size
    assert 0 < had < len(published.jpegs[names[0]]) and not (root / IMAGES / names[0]).exists()
    (root / IMAGES / names[2]).write_bytes(published.jpegs[names[2]][:700])  # and a file broken by somebody else

    host.requests.clear()
    assert run("refcocog", "--out", root, "--split", "train") == 0
    assert dict(host.requests) == {
        f"/coco/{names[0]}": f"bytes={had}-",
        f"/coco/{names[1]}": None,
        f"/coco/{names[2]}": None,
    }
    assert len(host.requests) == 3
    for name in names:
        assert (root / IMAGES / name).read_bytes() == published.jpegs[name]
    assert not list(root.rglob("*.part"))


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "drop", "more", "less", "stall", "html", "whole", "/moved"])
@pytest.mark.parametrize("when", [0, 1])
def test_every_fault_of_the_host_is_outlived(tmp_path, host, fault, when):
    content = jpeg(picture(90, 70, 1))
    host.files = {"/coco/x.jpg": content, "/moved": content}
    host.faults = {"/coco/x.jpg": ["drop", fault][:: 1 if when else -1]}  # at the beginning of the file, or half way
    file = tmp_path / "x.jpg"
    assert data.download(f"{host.url}/coco/x.jpg", file, lambda part: data.read_image(part, "", (90, 70)), 2**20) == ""
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]
    assert fault != "whole" or len(host.requests) == 1 + when  # what came before is replaced, not added to


@pytest.mark.parametrize(
    "fault, words", [("html", "cannot"), ("less", "cannot"), (503, "HTTP 503"), ("endless", "larger")]
)
def test_what_never_comes_right_is_reported_and_leaves_nothing(tmp_path, host, fault, words):
    host.files["/x.jpg"] = jpeg(picture(90, 70, 1))
    host.faults["/x.jpg"] = [fault] * 9
    reason = data.download(
        f"{host.url}/x.jpg", tmp_path / "x.jpg", lambda part: data.read_image(part, "", (90, 70)), 2**21
    )
    assert words in reason and "\n" not in reason and len(host.requests) == data.TRIES
    assert list(tmp_path.iterdir()) == []


def test_pauses_double(tmp_path, host, monkeypatch):
    pauses = []
    monkeypatch.setattr(data, "PAUSE", 1.0)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: pauses.append(seconds))
    host.files["/x"] = b"x"
    host.faults["/x"] = [500] * 9
    data.download(f"{host.url}/x", tmp_path / "x", lambda part: None, 99)
    assert [p for p in pauses if p] == [1, 2, 4]


def test_a_dead_host_is_not_asked_for_everything(published, host, capsys, monkeypatch):
    monkeypatch.setattr(data, "GIVE_UP", 3)
    host.files = {"/a.zip": host.files["/a.zip"]}
    assert run("refcocog", "--out", published.root, "--split", "train", "--jobs", 1) == 1
    assert len(host.requests) <= 1 + 3 + 1 and "5 images are not there" in capsys.readouterr().err
    host.files |= {f"/coco/{name}": content for name, content in published.jpegs.items()}
    assert run("refcocog", "--out", published.root, "--split", "train", "--jobs", 1) == 0


def test_connections_are_counted(published, host):
    host.pause = 0.1
    assert run("refcocog", "--out", published.root, "--jobs", 2) == 0
    assert host.most == 2


def test_a_slow_host_is_waited_for_and_a_dead_one_is_not(tmp_path, host, monkeypatch):
    host.files["/x"] = bytes(4000)
    host.pause = 0.3
    assert data.download(f"{host.url}/x", tmp_path / "x", lambda part: None, 4000) == ""
    host.pause = 0.8  # longer than TIMEOUT
    monkeypatch.setattr(data, "TRIES", 2)
    begun = time.monotonic()
    assert "timed out" in data.download(f"{host.url}/x", tmp_path / "y", lambda part: None, 4000)
    assert time.monotonic() - begun < 3


def test_mirrors_are_tried_in_turn(published, host, capsys):
    host.files["/a.zip"] = b"PK no zip at all"
    assert run("refcocog", "--out", published.root, "--split", "test") == 0
    assert host.count()["/b.zip"] == 1 and "a.zip" in capsys.readouterr().err
    shutil.rmtree(published.root)
    del host.files["/a.zip"], host.files["/b.zip"]
    assert run("refcocog", "--out", published.root) == 1
    assert "no mirror" in capsys.readouterr().err


def test_nothing_leaves_the_folder_when_unpacking(tmp_path, published, host, capsys):
    sound = zipfile.ZipFile(io.BytesIO(host.files["/b.zip"]))
    refs, instances = sound.read("refcocog/refs(umd).p"), sound.read("refcocog/instances.json")
    secret = tmp_path / "secret.json"
    secret.write_bytes(instances)
    link = zipfile.ZipInfo("refcocog/instances.json")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    outside = tmp_path.parent / "escaped-absolute.txt"
    evil = [("../escaped.txt", b"1"), (str(outside), b"1"), ("refcocog/../../escaped.txt", b"1")]
    host.files["/a.zip"] = zipped(None, *evil, ("../../refs(umd).p", refs), ("/x/y/instances.json", instances))
    assert run("refcocog", "--out", published.root) == 0  # the two files are taken, and put where they belong
    assert (published.root / "refcocog" / "refs(umd).p").read_bytes() == refs
    assert not list(tmp_path.rglob("escaped*")) and not outside.exists()
    assert not (tmp_path / "refs(umd).p").exists() and not (tmp_path.parent / "refs(umd).p").exists()

    shutil.rmtree(published.root)
    host.files["/a.zip"] = host.files["/b.zip"] = zipped(
        None, ("refcocog/refs(umd).p", refs), (link, str(secret).encode())
    )
    assert run("refcocog", "--out", published.root) == 2
    assert (
        not (published.root / "refcocog" / "instances.json").is_symlink()
        and "instances.json" in capsys.readouterr().err
    )


def test_archives_that_cannot_be_unpacked(tmp_path, host, monkeypatch):
    wanted = [tmp_path / "out" / "refs(umd).p", tmp_path / "out" / "instances.json"]
    (tmp_path / "out").mkdir()
    pair = [("r/refs(umd).p", b"r" * 5000), ("r/instances.json", b"i" * 5000)]
    sound, part = zipped(None, *pair), tmp_path / "a.zip"
    broken = bytearray(sound)
    broken[45] ^= 255
    encrypted = bytearray(sound)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := encrypted.find(signature, at + 1)) >= 0:
            encrypted[at + offset] |= 1
    for content in (b"", sound[:-40], bytes(broken), bytes(encrypted), zipped(None, pair[0])):
        part.write_bytes(content)
        with pytest.raises(ValueError) as error:
            data.unpack(part, wanted)
        one_line(error)
        assert not wanted[1].exists()
    monkeypatch.setattr(data, "LARGEST_ARCHIVE", 4000)
    part.write_bytes(sound)
    with pytest.raises(ValueError):
        data.unpack(part, wanted)
    monkeypatch.undo()
    data.unpack(part, wanted)
    assert wanted[1].read_bytes() == b"i" * 5000


def test_a_checkpoint_is_resumed_and_its_sum_checked(tmp_path, host, capsys, monkeypatch):
    content = random.Random(0).randbytes(700_000)
    monkeypatch.setattr(data, "SAM_FILES", {"vit_b": ("b.pth", len(content), hashlib.sha256(content).hexdigest())})
    host.files["/sam/b.pth"] = content
    host.faults["/sam/b.pth"] = ["drop"] * 4
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 1
    assert "goes on" in capsys.readouterr().err and not (tmp_path / "b.pth").exists()
    had = (tmp_path / "b.pth.part").stat().st_size
    assert had > 600_000  # every attempt went on where the last one ended
    host.requests.clear()
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 0
    assert host.requests == [("/sam/b.pth", f"bytes={had}-")] and (tmp_path / "b.pth").read_bytes() == content
    assert f"--sam vit_b:{tmp_path / 'b.pth'}" in capsys.readouterr().out
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 0 and len(host.requests) == 1

    (tmp_path / "b.pth").unlink()  # stopped between the last byte and the check
    (tmp_path / "b.pth.part").write_bytes(content)
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 0 and (tmp_path / "b.pth").read_bytes() == content

    (tmp_path / "b.pth").write_bytes(b"x" + content[1:])
    capsys.readouterr()
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 2
    assert "SHA-256" in capsys.readouterr().err
    (tmp_path / "b.pth").unlink()
    host.files["/sam/b.pth"] = b"x" + content[1:]
    assert run("sam", "--model", "vit_b", "--out", tmp_path) == 1 and list(tmp_path.iterdir()) == []
    assert "SHA-256" in capsys.readouterr().err


def test_the_real_hosts():
    """What cannot be tried here is at least written as intended."""
    for name, urls in data.ARCHIVES.items():
        assert len(urls) == 2 and all(url.startswith("https://") and url.endswith(f"/{name}.zip") for url in urls)
        assert urls[0].startswith("https://web.archive.org/web/20220413") and urls[1] in urls[0]
    assert {name: file for name, (file, _, _) in data.SAM_FILES.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
    }
    assert all(len(digest) == 64 for _, _, digest in data.SAM_FILES.values())


def test_a_full_disk_is_one_line(published, host, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    assert run("refcocog", "--out", published.root) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err


def test_ctrl_c_is_one_line_and_loses_nothing(published, host):
    root = published.root
    host.pause = 0.15
    code = "import signal, sys, data; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    code += f"data.COCO_URL, data.ARCHIVES = {data.COCO_URL!r}, {data.ARCHIVES!r}\nsys.exit(data.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fetch", "refcocog", "--out", str(root), "--split", "train", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not list(root.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    had = {file.name for file in root.rglob("*.jpg")}
    assert 0 < len(had) < 5
    host.requests.clear()
    host.pause = 0
    assert run("refcocog", "--out", root, "--split", "train") == 0
    assert host.count() == {f"/coco/{name}": 1 for name in images_of(published, "train") - had}


def test_reasonseg_is_explained(tmp_path, capsys):
    assert run("reasonseg") == 0
    out = capsys.readouterr().out
    assert "github.com/dvlab-research/LISA" in out and "ROOT/val" in out and "779" in out
    assert run("reasonseg", "--out", tmp_path) == 1 and "Google Drive" in capsys.readouterr().out
    make_reasonseg(tmp_path, ("val",))
    assert run("reasonseg", "--out", tmp_path) == 0 and "5 of val" in capsys.readouterr().out


def test_the_command_line(tmp_path, capsys):
    def command(*args):
        done = subprocess.run([sys.executable, "data.py", *args], cwd=REPO, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = command("fetch", "--help")
    assert code == 0 and not err
    assert all(flag in out for flag in ("--out", "--samples", "--seed", "--heldout", "--split", "--jobs", "--model", "Exit code"))
    code, out, err = command("fetch", "refcocog")
    assert code == 2 and not out and err == "data.py fetch: name the folder with --out (--help lists the options)\n"
    (tmp_path / "file").write_text("")
    assert data.main([]) == 0 and "fetch" in capsys.readouterr().out
    for args, word in (
        (("download",), "download"),
        (("fetch",), "what"),
        (("fetch", "imagenet"), "imagenet"),
        (("fetch", "sam", "--out", "x"), "--model"),
        (("fetch", "refcoco", "--out", "x", "--split", "test"), "testA"),
        (("fetch", "refcoco", "--out", "x", "--jobs", "500"), "16"),
        (("fetch", "refcoco", "--out", "x", "--samples", "-3"), "-3"),
        (("fetch", "refcoco", "--out", "x", "--samples", "0"), "at least 1"),
        (("fetch", "refcoco", "--out", "x", "--heldout", "-1"), "at least 0"),
        (("fetch", "refcoco", "--out", str(tmp_path / "file")), "file"),
    ):
        try:
            code = data.main(list(args))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2 and not out and err.count("\n") == 1 and word in err, err
    assert not Path("x").exists()

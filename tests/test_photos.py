"""Tests of plumbing/photos.py on small data sets in the published formats.

Nothing here uses the network. Masks marked "OpenCV 4.8" come from LISA's reader with OpenCV 4.8.0.
"""

import hashlib
import inspect
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
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
    shape,
)
from PIL import Image
from pycocotools.coco import COCO

from data import BadSample
from plumbing import photos
from plumbing.photos import (
    ReasonSeg,
    RefCOCO,
    check_query,
    coco_mask,
    labelme_masks,
    load_data,
    subsample,
)

REPO = Path(photos.__file__).parent.parent
# pycocotools 2.0.11 under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def as_text(mask: np.ndarray, ignore: np.ndarray | None = None) -> list[str]:
    """Masks as lines of text: # target, o ignore."""
    rows = np.where(mask, "#", ".")
    if ignore is not None:
        assert not (mask & ignore).any()
        rows = np.where(ignore, "o", rows)
    return ["".join(row) for row in rows]


def one_line(error) -> str:
    """The message of an exception that pytest caught. It must be one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --------------------------------------------------------------------------------------------------
# RefCOCO
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refcocog(tmp_path_factory):
    return make_refcocog(tmp_path_factory.mktemp("refer"))


def by_id(made) -> dict[str, tuple[dict, dict]]:
    """{sample id: (reference, sentence)}."""
    found = {}
    for ref in made.refs:
        for sentence in ref["sentences"]:
            found[f"{made.name}-{ref['ref_id']}-{sentence['sent_id']}"] = ref, sentence
    return found


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize(
    "make, splits", [(make_refcocog, "train val test"), (make_refcoco, "train val testA testB")]
)
def test_refcoco_returns_every_sentence_with_its_image_and_mask(tmp_path, make, splits, protocol):
    made = make(tmp_path, protocol=protocol)
    reference = COCO(tmp_path / made.name / "instances.json")
    left = by_id(made)
    for split in splits.split():
        dataset = RefCOCO(made.name, tmp_path, split)
        for one in (dataset[i] for i in range(len(dataset))):
            ref, sentence = left.pop(one.id)
            assert ref["split"] == split and one.query == sentence["sent"] and one.ignore is None
            file_name = reference.imgs[ref["image_id"]]["file_name"]
            stored = Image.open(tmp_path / IMAGES / file_name)
            assert one.image.mode == "RGB"
            assert one.image.tobytes() == stored.convert("RGB").tobytes()
            assert one.mask.dtype == bool and one.mask.shape == (stored.height, stored.width)
            expected = reference.annToMask(reference.anns[ref["ann_id"]])
            np.testing.assert_array_equal(one.mask, expected)
    assert not left


def test_a_changed_file_is_read_again(tmp_path):
    made = make_refcocog(tmp_path)
    assert RefCOCO("refcocog", tmp_path, "val")[0].mask.any()
    instances = tmp_path / "refcocog" / "instances.json"
    assert len({id(photos.read_instances(instances, 0, 0)) for _ in range(2)}) == 1  # cached
    for annotation in made.instances["annotations"]:
        annotation["segmentation"] = None
    instances.write_text(json.dumps(made.instances))
    with pytest.raises(BadSample):
        RefCOCO("refcocog", tmp_path, "val")[0]


def test_makers_write_what_python_2_writes(tmp_path):
    made = make_refcocog(tmp_path, images=False, protocol=0)
    raw = (tmp_path / "refcocog" / "refs(umd).p").read_bytes()
    assert raw.startswith(b"(lp0\n(dp1\nS'sent_ids'\np2\n(lp3\nI900\n") and rb"caf\xe9" in raw
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(raw)  # its strings are bytes, and some are not ASCII
    assert pickle.loads(raw, encoding="latin1") == made.refs
    values = [b"a", "é", 1, 300, 70000, -5, 2.5, None, True, [b"a", [b"b"], []], {b"k": [1]}]
    values = [[*values, b"caf\xe9'\"\\\n", "€\n\\"]]
    source = r"[['a',u'\xe9',1,300,70000,-5,2.5,None,True,['a',['b'],[]],{'k':[1]},"
    source += r"""'caf\xe9\'"\\\n',u'\u20ac\n\\']]"""
    for python in pythons("2.7"):  # compare with a real Python 2.7 if there is one
        for protocol in (0, 2):
            code = f"import pickle, sys; sys.stdout.write(pickle.dumps({source}, {protocol}))"
            done = subprocess.run([python, "-c", code], capture_output=True, check=True)
            assert done.stdout == python2_pickle(values, protocol)


def test_coco_mask_decodes_polygons_and_run_lengths():
    first, second = [2, 2, 6, 2, 6, 5, 2, 5], [8, 1, 9, 1, 9, 3, 8, 3]
    one, other = coco_mask([first], 12, 7), coco_mask([second], 12, 7)
    both = coco_mask([first, second, [1, 1, 2, 2]], 12, 7)  # a part of two corners adds nothing
    assert one.any() and other.any() and (both == (one | other)).all()
    mask = np.random.default_rng(0).random((7, 12)) < 0.5
    decoded = coco_mask({"size": [7, 12], "counts": runs(mask)}, 12, 7)
    np.testing.assert_array_equal(decoded, mask)
    assert coco_mask({"size": [7, 12], "counts": [0, 84]}, 12, 7).all()
    assert not coco_mask([], 12, 7).any()


BAD_SEGMENTATIONS = [
    [[1, 1, float("nan"), 3, 4, 4]],
    [[1, 1, 1e30, 3, 4, 4]],
    [[1, 1, "x", 3, 4, 4]],
    {"size": [12, 7], "counts": [84]},
    {"size": [7, 12], "counts": [2, 30]},  # too short: pycocotools would read foreign memory
    {"size": [7, 12], "counts": [2, 30_000_000]},
    {"size": [7, 12], "counts": [-2, 86]},
    {"size": [7, 12], "counts": "22"},
    {"size": [7, 12], "counts": ""},
    {"size": [7, 12]},
    [3],
]


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS, ids=str)
def test_coco_mask_refuses_bad_segmentations(segmentation):
    with pytest.raises((ValueError, LookupError, TypeError, OverflowError)):
        coco_mask(segmentation, 12, 7)


# The subsample. These ids must be the same on every machine and in every Python version.


def make_refs() -> list[dict]:
    """5,000 references with 1 to 4 sentences each."""
    sentences = [
        [{"sent_id": 10 * i + (n * 3 + i) % 7} for n in range(1 + i % 4)] for i in range(5000)
    ]
    return [{"ref_id": i * 7919 % 10007, "sentences": sentences[i]} for i in range(5000)]


REFS = make_refs()
FIRST_IDS = ["2815-44511", "2738-44754", "3223-4255"]
DIGEST = "63773915f8324d873baf2a7cb070157d3ffa75a792da9a79f2cd837959edf968"


def ids(pairs) -> list[str]:
    return [f"{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in pairs]


def digest(names: list[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def test_the_subsample_has_known_ids():
    found = ids(subsample(REFS, 3000, "refcocog-train-0"))
    assert found[:3] == FIRST_IDS and digest(found) == DIGEST
    shuffled = random.Random(5).sample(REFS, len(REFS))
    shuffled = [ref | {"sentences": ref["sentences"][::-1]} for ref in shuffled]
    assert ids(subsample(shuffled, 3000, "refcocog-train-0")) == found


def pythons(*versions: str) -> list[str]:
    """Interpreters of these versions: on the path, and in the folders of pyenv and uv."""
    home = Path.home()
    found = [path for version in versions if (path := shutil.which(f"python{version}"))]
    for version in versions:
        found += map(str, home.glob(f".pyenv/versions/{version}.*/bin/python"))
        found += map(str, home.glob(f".local/share/uv/python/cpython-{version}.*/bin/python"))

    def works(path: str) -> bool:  # a shim of pyenv may start nothing
        return subprocess.run([path, "-c", ""], capture_output=True).returncode == 0

    return [path for path in found if works(path)]


def test_the_subsample_is_the_same_in_other_pythons():
    others = pythons(*(f"3.{minor}" for minor in range(8, 16) if minor != sys.version_info.minor))
    if not others:
        pytest.skip("no other Python found")
    code = "from __future__ import annotations\nimport hashlib, random\n"
    code += "".join(map(inspect.getsource, (subsample, make_refs, ids, digest)))
    code += "print(digest(ids(subsample(make_refs(), 3000, 'refcocog-train-0'))))"
    for python in others:
        done = subprocess.run([python, "-"], input=code, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == DIGEST, python


def test_the_subsample_takes_every_object_once_before_any_twice():
    everything = ids(subsample(REFS, None, "a"))
    count = sum(len(ref["sentences"]) for ref in REFS)
    assert len(everything) == len(set(everything)) == count == 12500
    first = [name.split("-")[0] for name in everything[:5000]]
    assert len(set(first)) == 5000
    assert ids(subsample(REFS, 700, "a")) == everything[:700] != ids(subsample(REFS, 700, "b"))
    # Of the objects with four sentences, each sentence comes first about equally often.
    fours = {}
    for ref in REFS:
        if len(ref["sentences"]) == 4:
            fours[str(ref["ref_id"])] = sorted(s["sent_id"] for s in ref["sentences"])
    pairs = [name.split("-") for name in everything[:5000]]
    counts = np.bincount([fours[ref].index(int(sent)) for ref, sent in pairs if ref in fours])
    assert len(counts) == 4 and counts.min() > 250
    assert abs(np.corrcoef(np.arange(5000), [int(name) for name in first])[0, 1]) < 0.05


def test_training_uses_a_subsample_and_evaluation_uses_everything(refcocog):
    spec = f"refcocog:{refcocog.root}"
    train = {name for name, (ref, _) in by_id(refcocog).items() if ref["split"] == "train"}

    def names(*args, **more):
        return [one.id for one in load_data(*args, **more).expressions]

    assert set(names(spec, "train")) == train  # fewer than 3,000
    four = names(spec, "train", samples=4)
    assert four == names(spec, "train", 0)[:4] == names(f"{spec}/train", "train", samples=4)
    assert len({names(spec, "train", seed, 4)[0] for seed in range(6)}) > 1
    val = {name for name, (ref, _) in by_id(refcocog).items() if ref["split"] == "val"}
    for form in (spec, f"{spec}/train", f"{spec}/val", f"{spec}/"):
        assert set(names(form, "heldout", 3, 1)) == val
        assert names(form, "heldout", 3) == names(form, "heldout", 4)
    assert len(load_data(f"{spec}/test", "heldout")) == 3
    assert len(load_data(f"{spec}/test", "train", samples=2)) == 2


# --------------------------------------------------------------------------------------------------
# Bad samples and bad data sets
# --------------------------------------------------------------------------------------------------


def spoil(made, folder: Path) -> dict[str, tuple[str, ...]]:
    """Damage all samples but one. Returns {part of the id: words that the message must have}."""
    files = {9 + 16 * max(k, 1): None for k in range(10)}
    files = {image_id: folder / f"COCO_train2014_{image_id:012d}.jpg" for image_id in files}
    annotations = {one["id"] - 5000: one for one in made.instances["annotations"]}
    files[41].unlink()
    files[57].write_bytes(files[57].read_bytes()[:900])
    files[73].write_bytes(b"<html>not an image</html>")
    files[89].write_bytes(jpeg(picture(30, 20, 0)))
    del annotations[0]["segmentation"]
    annotations[6]["segmentation"] = [[3, 3, 3, 3, 3, 3]]
    annotations[7]["segmentation"] = {"size": [60, 100], "counts": [5, 6]}
    made.instances["annotations"].remove(annotations[8])
    made.instances["images"] = made.instances["images"][:-1]
    (made.root / "refcocog" / "instances.json").write_text(json.dumps(made.instances))
    command = "python -m tools.fetch refcocog", f"--out {made.root}"
    return {
        "-702-": ("000000000041.jpg", "missing", *command),
        "-703-": ("000000000057.jpg", "truncated", "again", *command),
        "-704-": ("000000000073.jpg", "UnidentifiedImage", "again"),
        "-705-": ("000000000089.jpg", "30 x 20", "72 x 96", "again"),
        "-700-": ("instances.json", "no mask", "Skip this sample"),
        "-706-": ("instances.json", "area is zero", "Skip this sample"),
        "-707-": ("instances.json", "run lengths", "Skip this sample"),
        "-708-": ("instances.json", "no mask", "Skip this sample"),
        "-709-": ("instances.json", "no image", "Skip this sample"),
    }


def test_a_bad_sample_is_named_and_the_others_can_be_read(tmp_path):
    wanted = spoil(make_refcocog(tmp_path), tmp_path / IMAGES)
    seen = set()
    for dataset in (RefCOCO("refcocog", tmp_path, split) for split in ("train", "val", "test")):
        for k, expression in enumerate(dataset.expressions):
            case = next((key for key in wanted if key in expression.id), None)
            seen.add(case)
            if case is None:
                assert "-701-" in expression.id and dataset[k].mask.any()
                continue
            with pytest.raises(BadSample) as error:
                dataset[k]
            text = one_line(error)
            assert all(word in text for word in wanted[case]), text
            assert (expression.id in text) == ("Skip this sample" in text), text
    assert seen == {None, *wanted}


def test_a_coco_image_is_not_rotated_by_its_exif_data(tmp_path):
    made = make_refcocog(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for image in made.instances["images"]:
        stored = picture(image["width"], image["height"], 0)
        stored.save(tmp_path / IMAGES / image["file_name"], exif=exif)
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    path = str(mark).encode()
    refs = [{"ref_id": 1, "split": "train", "sentences": [], "x": Payload(mark)}]
    found = {f"protocol {n}": pickle.dumps(refs, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    return found | {
        "inst": b"(S'" + path + b"'\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\nS'" + path + b"'\no.",
        "eval": b'c__builtin__\neval\n(S\'__import__("os").mkdir("' + path + b"\")'\ntR.",
    }


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    make_refcocog(tmp_path)
    mark = tmp_path / "ran"
    for name, content in hostile_pickles(mark).items():
        pickle.loads(content)
        assert mark.exists(), name  # the plain unpickler runs it
        mark.rmdir()
        (tmp_path / "refcocog" / "refs(umd).p").write_bytes(content)
        with pytest.raises(ValueError) as error:
            RefCOCO("refcocog", tmp_path, "train")
        text = one_line(error)
        assert "refs(umd).p" in text and ("mkdir" in text or "eval" in text)
        assert not mark.exists(), name


MANY = (10**10).to_bytes(8, "little")
LARGE = {
    "LONG_BINPUT": b"]r\xff\xff\xff\xff.",
    "PUT": b"]p10000000000\n.",
    "BYTEARRAY8": b"\x96" + MANY,
    "LONG_BINGET": b"j\xff\xff\xff\xff.",
    "BINBYTES8": b"\x8e" + MANY,
    "FRAME": b"\x95" + MANY,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_small_pickle_cannot_allocate_gigabytes(tmp_path, name):
    make_refcocog(tmp_path)
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(b"\x80\x04" + LARGE[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            RefCOCO("refcocog", tmp_path, "train")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert "refs(umd).p" in one_line(error)


def error_of(*args) -> str:
    """The one-line error of load_data(*args)."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_data(*args)
    assert not isinstance(error.value, BadSample)
    return one_line(error)


def test_a_wrong_name_or_a_missing_file_is_one_line(tmp_path):
    for wrong in ("", "imagenet:x", "refcocog", "refcocog:", "shapes:x"):
        assert "refcocog:ROOT" in error_of(wrong, "train")
    message = error_of(f"refcoco:{tmp_path}/test", "heldout")
    assert "no split test" in message and "testA" in message
    spec, command = f"refcocog:{tmp_path}", f"python -m tools.fetch refcocog --out {tmp_path}"
    message = error_of(spec, "train")
    assert "refs(umd).p is missing" in message and command in message
    make_refcocog(tmp_path, images=False)
    message = error_of(spec, "train", 7, 5)
    assert str(IMAGES) in message
    assert f"{command} --split train --samples 5 --seed 7" in message
    (tmp_path / "refcocog" / "instances.json").unlink()
    message = error_of(spec, "train")
    assert "instances.json is missing" in message and command in message
    message = error_of(f"reasonseg:{tmp_path}/nowhere", "train")
    assert "python -m tools.fetch reasonseg" in message


def test_a_broken_annotation_file_is_one_line(tmp_path):
    spec, made = f"refcocog:{tmp_path}", make_refcocog(tmp_path, images=False)
    refs, instances = tmp_path / "refcocog" / "refs(umd).p", tmp_path / "refcocog/instances.json"
    valid = refs.read_bytes()
    others = [pickle.dumps(value) for value in ({"a": 1}, [1, 2], [{"split": "train"}], 3)]
    for content in (b"", b"garbage", valid[:-30], b"]." + valid, *others):
        refs.write_bytes(content)
        message = error_of(spec, "train")
        assert "refs(umd).p" in message and "Delete it" in message, content[:20]
    empty = [{b"split": b"train", b"ref_id": 1, b"sentences": []}]
    refs.write_bytes(python2_pickle(empty, 0))
    message = error_of(spec, "heldout")
    assert "refs(umd).p" in message and "split val" in message
    os.truncate(refs, 2**29 + 1)  # a sparse file, which needs no disk space
    assert "too large" in error_of(spec, "train")
    refs.write_bytes(valid)
    escape = json.loads(json.dumps(made.instances))
    escape["images"][0]["file_name"] = "../../elsewhere.jpg"
    contents = ["", "{", "[]", '{"images": 3}', "[" * 100_000, json.dumps(escape)]
    for content in (*contents, '{"images": [], "annotations": [1]}'):
        instances.write_text(content)
        message = error_of(spec, "train")
        assert "instances.json" in message and "Delete it" in message, content[:20]


def test_a_root_may_have_the_name_of_a_split(tmp_path, monkeypatch):
    made = make_refcocog(tmp_path / "val")
    train = {name for name, (ref, _) in by_id(made).items() if ref["split"] == "train"}
    found = load_data(f"refcocog:{tmp_path}/val", "train").expressions
    assert {one.id for one in found} == train
    assert len(load_data(f"refcocog:{tmp_path}/val/test", "heldout")) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_data("refcocog:~/val/test", "heldout")) == 3
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path / "test", ("train", "val"))
    assert load_data(f"reasonseg:{tmp_path}/test", "train").split == "train"
    assert load_data(f"reasonseg:{tmp_path}/test", "heldout").split == "val"
    assert load_data(f"reasonseg:{tmp_path}/test/val", "train").split == "val"


# --------------------------------------------------------------------------------------------------
# ReasonSeg
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def cv2():
    """OpenCV with LISA's rounding."""
    module = pytest.importorskip("cv2")
    version = tuple(map(int, module.__version__.split(".")[:2]))
    if version >= (4, 11):
        pytest.skip(f"OpenCV {module.__version__} fills polygons differently: {photos.INSTALL_CV2}")
    return module


OPENCV_48 = {
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


def test_reasonseg_masks_equal_those_of_lisas_reader(tmp_path, cv2):
    made = make_reasonseg(tmp_path)
    dataset = load_data(f"reasonseg:{tmp_path}/test", "heldout")
    samples = [dataset[i] for i in range(len(dataset))]
    found = {one.id.removeprefix("reasonseg-test-"): one for one in samples}
    assert sorted(found) == made.names
    for name, expected in OPENCV_48.items():
        assert as_text(found[name].mask, found[name].ignore) == expected.split(), name
        assert (found[name].ignore is None) == ("o" not in expected)
    first = found["café_0001"]  # a rectangle: corners are truncated, and belong to it
    assert first.mask[5:19, 4:21].all() and first.mask.sum() == 14 * 17
    assert first.image.size == (40, 30)
    assert first.query == "What at the café keeps the rain off…"  # cp1252, and the first of two
    assert (tmp_path / "test" / "café_0001.json").read_bytes().count(b"\x85") == 1
    flagged = found["flagged_0002"]
    assert flagged.mask[3:9, 2:10].all() and flagged.mask.sum() == 48


def fill(points: list, width: int, height: int) -> np.ndarray:
    """The mask of one polygon."""
    return labelme_masks([shape("target", *points)], width, height)[0]


SKEWED = """
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
...................."""
CROSSING = """
####################
....############....
....############....
####################
...................."""


def test_polygons_are_filled_as_in_opencv_48(cv2):
    skewed = [(2.9, 1.1), (17.8, 4.6), (12.2, 11.9), (6.5, 6.1), (1.0, 12.99)]
    assert as_text(fill(skewed, 20, 14)) == SKEWED.split()
    assert as_text(fill([(0, 0), (19, 3), (0, 3), (19, 0)], 20, 5)) == CROSSING.split()
    assert as_text(fill([(-5, -5), (30, -5), (30, 30), (-5, 30)], 4, 2)) == ["####"] * 2
    assert as_text(fill([(9, 9)], 4, 2)) == ["...."] * 2


@pytest.mark.parametrize("margin", [0, 1, 12, 90_000])
def test_polygons_with_corners_on_and_beyond_the_border_equal_opencvs(margin):
    """Corners are drawn from -margin to side + margin, often exactly on the border."""
    cv2 = pytest.importorskip("cv2")
    rng = random.Random(margin)
    on_border = 0
    for _ in range(300):
        width, height = rng.randint(1, 50), rng.randint(1, 50)

        def coordinate(side: int) -> float:
            inside = rng.uniform(-margin, side + margin)
            return rng.choice([inside, inside, -0.5, 0, side - 1, side - 0.5, side])

        points = [[coordinate(width), coordinate(height)] for _ in range(rng.randint(1, 8))]
        expected = np.zeros((height, width), np.uint8)
        corners = np.array([points], dtype=np.int32)
        cv2.polylines(expected, corners, True, 1, 1)
        cv2.fillPoly(expected, corners, 1)
        found = fill(points, width, height)
        assert found.dtype == bool and found.shape == (height, width)
        np.testing.assert_array_equal(found, expected.astype(bool), str((width, height, points)))
        on_border += any(x in (0, width - 1, width) for x, _ in points)
    assert on_border > 100


@pytest.mark.parametrize("corner", [2e5, -2e5, 1e300, float("inf"), float("nan")])
def test_absurd_corners_are_refused(corner):
    pytest.importorskip("cv2")
    for point in ((1, corner), (corner, 1)):
        with pytest.raises(ValueError):
            fill([(1, 1), point], 4, 2)
    with pytest.raises(ValueError):
        fill([], 4, 2)


def test_a_missing_opencv_is_one_line_with_a_hint(tmp_path, monkeypatch):
    make_reasonseg(tmp_path, ("val",))
    monkeypatch.setitem(sys.modules, "cv2", None)  # `import cv2` raises ImportError
    message = error_of(f"reasonseg:{tmp_path}/val", "heldout")
    assert 'Run: pip install "opencv-python-headless<4.11"' in message
    make_refcocog(tmp_path)
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()  # RefCOCO does not need it


def test_a_missing_opencv_ends_the_run_with_exit_code_2(tmp_path, monkeypatch, capsys):
    import samr1_mini

    make_reasonseg(tmp_path / "data", ("val",))
    monkeypatch.setitem(sys.modules, "cv2", None)
    command = ["eval", "--data", f"reasonseg:{tmp_path}/data/val", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        samr1_mini.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error and "skipped" not in error
    lines = [line for line in error.splitlines() if "opencv-python-headless" in line]
    assert len(lines) == 1 and "--data" in lines[0]


def test_of_equal_areas_the_one_listed_first_is_on_top():
    pytest.importorskip("cv2")
    target, ignore = shape("target", *box(1, 1, 3, 3)), shape("ignore", *box(2, 2, 4, 4))
    assert labelme_masks([target, ignore], 6, 6)[0].sum() == 9
    assert labelme_masks([ignore, target], 6, 6)[0].sum() == 5


def test_a_reasonseg_image_is_rotated_by_its_exif_data(tmp_path):
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path, ("val",))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    picture(30, 40, 0).save(tmp_path / "val" / "café_0001.jpg", exif=exif)
    one = load_data(f"reasonseg:{tmp_path}/val", "heldout")[0]
    assert one.image.size == (40, 30) and one.mask.shape == (30, 40)


def test_a_bad_reasonseg_annotation_is_named(tmp_path):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    file = tmp_path / "val" / "nested_0004.json"
    valid = json.loads(file.read_bytes())
    corners = ([], [(1, 2, 3)], [(float("nan"), 1)], [(1e300, 1)], ["a"])
    texts = [[], [None], [5], None, 5, [""], " ", [["a"]], ["a\x00b"], ["\ud800"]]
    texts += [["<|image_pad|>"], "the <|im_end|> here"]
    changes = [{"text": text} for text in texts]
    changes += [{"shapes": [{"label": 3, "points": [[1, 1]]}]}]
    changes += [{"shapes": [shape("target", *points)]} for points in corners]
    contents = [json.dumps(valid | change).encode() for change in changes]
    digits = json.dumps(valid | {"shapes": [shape("target", (1, 2), (3, 4))]})
    contents += [digits.replace("3", "1" * 400).encode()]  # too large for a float
    contents += [b"", b"{", b"\x81\x8d", b"[" * 100_000, b"[]", b'{"text": ["x"]}']
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(BadSample) as error:
            ReasonSeg(tmp_path, "val")[made.names.index("nested_0004")]
        assert "nested_0004.json" in one_line(error), content[:40]


def test_a_missing_or_broken_reasonseg_file_is_named(tmp_path):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    folder = tmp_path / "val"
    (folder / "nested_0004.json").unlink()
    (folder / "thin_0005.jpg").unlink()
    broken = folder / "flagged_0002.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    (folder / "._nested_0004.jpg").write_bytes(b"macOS leaves such files")
    dataset = ReasonSeg(tmp_path, "val")
    assert dataset.names == made.names
    words = {"nested_0004": ".json", "thin_0005": "missing", "flagged_0002": "Truncated"}
    for k, name in enumerate(dataset.names):
        if name not in words:
            assert dataset[k].mask.any()
            continue
        with pytest.raises(BadSample) as error:
            dataset[k]
        text = one_line(error)
        assert name in text and words[name] in text and "python -m tools.fetch reasonseg" in text


@pytest.mark.parametrize(
    "query",
    [
        *("", "  ", "\n", None, 5, ["star"], b"star"),
        *("<|image_pad|>", "the <|im_end|> star", "<|any thing\n|>", "a <| b |> c"),
        *("the \ud800 star", "\udcff", "a\x00b", "a\x1bb", "a\x7fb", "a\x9fb"),
    ],
    ids=repr,
)
def test_a_query_that_the_policy_cannot_be_asked_is_refused(query):
    with pytest.raises(ValueError) as error:
        check_query(query)
    one_line(error).encode("ascii")  # a terminal can print it


@pytest.mark.parametrize(
    "query",
    [
        *("the star", " the star\n", "\u201ecaf\u00e9\u201d \u661f \U0001f31f"),
        *("a < b | c > d", "<star>", "<| not closed", "|>"),
        *("two\tlines\nof text", "a\u200db", "\u200fright to left"),
    ],
)
def test_other_queries_are_only_stripped(query):
    assert check_query(query) == query.strip()


def test_a_refcoco_sentence_with_a_special_token_is_a_bad_sample(tmp_path):
    make_refcocog(tmp_path)
    dataset = RefCOCO("refcocog", tmp_path, "val")
    one = dataset.expressions[0]
    for query in ("the <|image_pad|>", "", "a\x00b"):
        dataset.expressions[0] = one._replace(query=query)
        with pytest.raises(BadSample) as error:
            dataset[0]
        assert one.id in one_line(error)


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (400, 2), (1, 1), (3, 600)], ids=str)
def test_pictures_may_be_200_times_as_long_as_wide(size):
    photos.check_shape(Image.new("RGB", size))
    longer = (size[0] + (size[0] >= size[1]), size[1] + (size[0] < size[1]))
    if max(size) > 1:
        with pytest.raises(ValueError) as error:
            photos.check_shape(Image.new("RGB", longer))
        assert "{} x {}".format(*longer) in one_line(error)


def test_a_picture_is_rotated_by_its_exif_data(tmp_path):
    """All eight orientations of the standard, each with a red pixel that ends up top left."""
    corners = [(0, 0), (3, 0), (3, 1), (0, 1), (0, 0), (0, 1), (3, 1), (3, 0)]
    for orientation, corner in enumerate(corners, 1):
        stored, exif = Image.new("RGB", (4, 2)), Image.Exif()
        stored.putpixel(corner, (255, 0, 0))
        exif[0x0112] = orientation
        stored.save(tmp_path / "stored.png", exif=exif)
        picture = photos.read_picture(str(tmp_path / "stored.png"))
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 0, 0), orientation
        assert picture.size == ((4, 2) if orientation < 5 else (2, 4))


@pytest.mark.parametrize("pixels", [30, 50])  # a warning of Pillow, and an error
def test_a_picture_with_too_many_pixels_is_one_line(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.new("RGB", (pixels, 1)).save(tmp_path / "large.png")
    with pytest.raises(ValueError) as error:
        photos.read_picture(str(tmp_path / "large.png"))
    assert "too many pixels" in one_line(error)


def test_a_photograph_with_too_many_pixels_or_too_thin_is_a_bad_sample(tmp_path, monkeypatch):
    Image.new("RGB", (201, 1)).save(tmp_path / "thin.png")
    Image.new("RGB", (50, 1)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for name, word in (("large.png", "DecompressionBomb"), ("thin.png", "201 x 1")):
        if name == "thin.png":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(BadSample) as error:
            photos.read_image(tmp_path / name, "the command")
        text = one_line(error)
        assert name in text and word in text and "the command" in text


NO_TARGETS = [[], [shape("flag", *box(2, 2, 5, 5))], [shape("ignore", *box(1, 1, 9, 9))]]


@pytest.mark.parametrize("shapes", NO_TARGETS, ids=["empty", "flag", "ignore"])
def test_an_image_without_a_target_is_evaluated_but_not_trained_on(tmp_path, shapes):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path)
    index = made.names.index("nested_0004")
    for split in ("train", "val", "test"):
        file = tmp_path / split / "nested_0004.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"shapes": shapes}))
        dataset = ReasonSeg(tmp_path, split)
        if split == "train":
            with pytest.raises(BadSample) as error:
                dataset[index]
            assert "no pixel is target" in one_line(error)
            continue
        one = dataset[index]
        assert one.mask.dtype == bool and not one.mask.any()
        assert one.mask.shape == (one.image.height, one.image.width)
        if shapes and shapes[0]["label"] == "ignore":
            assert one.ignore.sum() == 81
        else:
            assert one.ignore is None

"""Tests of RefCOCO, ReasonSeg and plumbing/photos.py on small sets in the published formats.

Nothing here uses the network. Masks marked "OpenCV 4.8" come from LISA's reader with OpenCV 4.8.0.
"""

import base64
import hashlib
import io
import json
import os
import pickle
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from makers import (
    IMAGES,
    PYTHON2,
    box,
    jpeg,
    make_reasonseg,
    make_refcoco,
    make_refcocog,
    picture,
    runs,
    shape,
)
from PIL import Image, ImageOps
from pycocotools import mask as coco
from pycocotools.coco import COCO

from data import BadSample, ReasonSeg, RefCOCO, subsample
from plumbing import photos
from plumbing.errors import UserError
from plumbing.photos import check_query, coco_mask, labelme_masks
from plumbing.sources import load_data

# pycocotools 2.0.11 under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def as_text(mask: np.ndarray, ignore: np.ndarray | None = None) -> list[str]:
    """Masks as lines of text: # target, o ignore."""
    rows = np.where(mask, "#", ".")
    if ignore is not None:
        assert not (mask & ignore).any()
        rows = np.where(ignore, "o", rows)
    return ["".join(row) for row in rows]


def error_of(call, *args, kind=UserError) -> str:
    """The message of the error that call(*args) raises. It must be one line."""
    with pytest.raises(UserError) as error:
        call(*args)
    text = str(error.value)
    assert type(error.value) is kind and text and "\n" not in text
    return text


def turned(image: Image.Image, file: Path) -> None:
    """Save an image with EXIF data that say: rotate by 90 degrees to display."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


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


@pytest.mark.parametrize(
    "make, splits", [(make_refcocog, "train val test"), (make_refcoco, "train val testA testB")]
)
def test_refcoco_returns_every_sentence_with_its_image_and_mask(tmp_path, make, splits):
    made = make(tmp_path)
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


def test_a_pickle_of_python_2_is_read(tmp_path):
    make_refcocog(tmp_path)
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(PYTHON2.read_bytes())  # its strings are bytes, and some are not ASCII
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(PYTHON2.read_bytes())
    samples = [load_data(f"refcocog:{tmp_path}", "heldout")[i] for i in range(2)]
    assert sorted(one.query for one in samples) == ["a red caf\u00e9 chair", "the caf\u00e9 chair"]
    assert sorted(one.id for one in samples) == ["refcocog-706-600", "refcocog-706-601"]
    assert all(one.mask.any() for one in samples)


def test_a_changed_file_is_read_again(tmp_path):
    made = make_refcocog(tmp_path)
    file = tmp_path / "refcocog" / "instances.json"
    first = photos.read_instances(file, "")
    assert photos.read_instances(file, "") is first  # cached
    file.write_text(json.dumps(made.instances | {"annotations": []}))
    os.utime(file, (1, 1))
    assert photos.read_instances(file, "")[1] == {}


def test_coco_mask_decodes_polygons_and_run_lengths():
    first, second = [2, 2, 6, 2, 6, 5, 2, 5], [8, 1, 9, 1, 9, 3, 8, 3]
    one, other = coco_mask([first], 12, 7), coco_mask([second], 12, 7)
    both = coco_mask([first, second, [1, 1, 2, 2]], 12, 7)  # a part of two corners adds nothing
    assert one.any() and other.any() and (both == (one | other)).all()
    assert not coco_mask([], 12, 7).any()
    mask = np.random.default_rng(0).random((7, 12)) < 0.5
    counts = {"size": [7, 12], "counts": runs(mask)}
    np.testing.assert_array_equal(coco_mask(counts, 12, 7), mask)
    np.testing.assert_array_equal(coco.decode(coco.frPyObjects(counts, 7, 12)), mask)
    assert coco_mask({"size": [7, 12], "counts": [0, 84]}, 12, 7).all()
    np.testing.assert_array_equal(coco_mask([counts], 12, 7), mask)
    np.testing.assert_array_equal(coco_mask([counts, first], 12, 7), mask | one)
    pairs, more = (np.reshape(part, (-1, 2)).tolist() for part in (first, second))
    for same in (first, pairs, [pairs], [first, [1, 1]]):
        np.testing.assert_array_equal(coco_mask(same, 12, 7), one)
    np.testing.assert_array_equal(coco_mask([pairs, more], 12, 7), one | other)


BAD_SEGMENTATIONS = [
    [[1, 1, float("nan"), 3, 4, 4]],  # pycocotools would crash
    [[1, 1, 1e30, 3, 4, 4]],
    [[1, 1, "x", 3, 4, 4]],
    {"size": [12, 7], "counts": [84]},
    {"size": [7, 12], "counts": [2, 30_000_000]},  # pycocotools would write to foreign memory
    {"size": [7, 12], "counts": "n2g0"},  # 84 zeros and ones, compressed
    [3],
    [[2, 2, 6, 2, 6, 5, 2]],  # pycocotools would leave the last number out
    [[[2, 2, 1], [6, 2, 1], [6, 5, 1]]],
]


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS, ids=str)
def test_coco_mask_refuses_bad_segmentations(segmentation):
    with pytest.raises((ValueError, LookupError, TypeError)):
        coco_mask(segmentation, 12, 7)


def numbered(made, refs: type, instances: type) -> None:
    """Write the files again with ids of other types."""
    sentence = {"sent_id": refs(8), "sent": "it"}
    ids = {"ref_id": refs(1), "ann_id": refs(7), "image_id": refs(9), "split": "val"}
    content = pickle.dumps([ids | {"sentences": [sentence]}], protocol=2)
    (made.root / "refcocog" / "refs(umd).p").write_bytes(content)
    image = {"id": instances(9), "file_name": "COCO_train2014_000000000025.jpg"}
    annotation = {
        "id": instances(7),
        "image_id": instances(9),
        "segmentation": [[1, 1, 9, 1, 9, 9]],
    }
    content = {"images": [image | {"width": 72, "height": 96}], "annotations": [annotation]}
    (made.root / "refcocog" / "instances.json").write_text(json.dumps(content))


@pytest.mark.parametrize("refs, instances", [(int, str), (str, "0{}".format), (float, int)])
def test_ids_join_also_if_they_are_texts(tmp_path, refs, instances):
    numbered(make_refcocog(tmp_path), refs, instances)
    (one,) = RefCOCO("refcocog", tmp_path, "val")
    assert one.id == "refcocog-1-8" and one.mask.any()


@pytest.mark.parametrize(
    "refs, instances, word",
    [
        (np.int64, int, "as int() gives"),
        ("a{}".format, int, "a1"),
        (int, lambda n: n + 0.5, "9.5"),
        (int, lambda n: None, "None"),
    ],
)
def test_other_ids_are_named_and_no_file_is_to_be_deleted(tmp_path, refs, instances, word):
    numbered(make_refcocog(tmp_path), refs, instances)
    message = error_of(RefCOCO, "refcocog", tmp_path, "val")
    assert word in message and "elete" not in message


# The subsample. These ids must be the same on every machine and in every Python version.


REFS = []  # with 1 to 4 sentences each
for i in range(5000):
    sentences = [{"sent_id": 10 * i + (n * 3 + i) % 7} for n in range(1 + i % 4)]
    REFS.append({"ref_id": i * 7919 % 10007, "sentences": sentences})
FIRST_IDS = ["2815-44511", "2738-44754", "3223-4255"]
DIGEST = "63773915f8324d873baf2a7cb070157d3ffa75a792da9a79f2cd837959edf968"


def ids(pairs) -> list[str]:
    return [f"{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in pairs]


def test_the_subsample_has_known_ids():
    found = ids(subsample(REFS, 3000, "refcocog-train-0"))
    assert found[:3] == FIRST_IDS
    assert hashlib.sha256(" ".join(found).encode()).hexdigest() == DIGEST
    shuffled = random.Random(5).sample(REFS, len(REFS))
    shuffled = [ref | {"sentences": ref["sentences"][::-1]} for ref in shuffled]
    assert ids(subsample(shuffled, 3000, "refcocog-train-0")) == found


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
    split_of = {name: ref["split"] for name, (ref, _) in by_id(refcocog).items()}

    def names(*args, **more):
        return [one.id for one in load_data(*args, **more).expressions]

    train = names(spec, "train")
    assert set(train) == {name for name, split in split_of.items() if split == "train"}
    assert names(spec, "train", samples=4) == train[:4] == names(f"{spec}/train", "train", 4)
    for form in (spec, f"{spec}/train", f"{spec}/val", f"{spec}/"):
        val = {name for name, split in split_of.items() if split == "val"}
        assert set(names(form, "heldout", samples=1)) == val
    assert len(load_data(f"{spec}/test", "heldout")) == 3
    for split in ("val", "test"):  # the evaluation after training would be of the same samples
        assert f"train on {spec}" in error_of(load_data, f"{spec}/{split}", "train")


# --------------------------------------------------------------------------------------------------
# Bad samples and bad data sets
# --------------------------------------------------------------------------------------------------


def spoil(made, folder: Path) -> dict[str, tuple[str, ...]]:
    """Damage all samples but one. Returns {part of the id: words that the message must have}."""
    files = {9 + 16 * k: folder / f"COCO_train2014_{9 + 16 * k:012d}.jpg" for k in range(1, 10)}
    annotations = {one["id"] - 5000: one for one in made.instances["annotations"]}
    files[41].unlink()
    files[57].write_bytes(files[57].read_bytes()[:900])
    files[73].write_bytes(b"<html>not an image</html>")
    files[89].write_bytes(jpeg(picture(30, 20, 0)))
    del annotations[0]["segmentation"]
    annotations[6]["segmentation"] = [[3, 3, 3, 3, 3, 3]]
    annotations[7]["segmentation"] = {"size": [60, 100], "counts": "compressed"}
    made.instances["annotations"].remove(annotations[8])
    made.instances["images"] = made.instances["images"][:-1]
    (made.root / "refcocog" / "instances.json").write_text(json.dumps(made.instances))
    command = f"move it away and run: python -m tools.fetch refcocog --out {made.root}"
    return {
        "-702-": ("000000000041.jpg is missing. Run: python -m tools.fetch refcocog",),
        "-703-": ("000000000057.jpg", "truncated", command),
        "-704-": ("000000000073.jpg", "UnidentifiedImage", command),
        "-705-": ("000000000089.jpg", "(30, 20)", "(72, 96)", command),
        "-700-": ("instances.json", "no mask", "Skip this sample"),
        "-706-": ("instances.json", "mask is zero", "Skip this sample"),
        "-707-": ("instances.json", "compressed", "Skip this sample"),
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
            text = error_of(dataset.__getitem__, k, kind=BadSample)
            assert all(word in text for word in (expression.id, *wanted[case])), text
    assert seen == {None, *wanted}


def test_ids_that_join_a_sentence_to_the_mask_of_another_are_refused(tmp_path):
    made = make_refcocog(tmp_path)
    file = tmp_path / "refcocog" / "instances.json"
    first, *_, last = made.instances["annotations"]
    first["image_id"] = last["image_id"]
    file.write_text(json.dumps(made.instances))
    reasons = []
    for dataset in (RefCOCO("refcocog", tmp_path, split) for split in ("train", "val", "test")):
        for k, one in enumerate(dataset.expressions):
            if "-700-" in one.id:
                reasons.append(error_of(dataset.__getitem__, k, kind=BadSample))
    assert reasons and all("its mask is of another image" in text for text in reasons)
    made.instances["annotations"].append(last | {"segmentation": first["segmentation"]})
    file.write_text(json.dumps(made.instances))
    assert f"two entries have the id {last['id']}" in error_of(RefCOCO, "refcocog", tmp_path, "val")


def test_a_sentence_that_the_policy_cannot_be_asked_is_a_bad_sample(tmp_path):
    make_refcocog(tmp_path)
    dataset = RefCOCO("refcocog", tmp_path, "val")
    one = dataset.expressions[0]
    dataset.expressions[0] = one._replace(query="the <|image_pad|>")
    text = error_of(dataset.__getitem__, 0, kind=BadSample)
    assert one.id in text and "special token" in text


def test_a_coco_image_is_not_rotated_by_its_exif_data(tmp_path):
    made = make_refcocog(tmp_path)
    for image in made.instances["images"]:
        turned(picture(image["width"], image["height"], 0), tmp_path / IMAGES / image["file_name"])
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL, "by hand, in old opcodes"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    make_refcocog(tmp_path)
    mark = tmp_path / "ran"
    if isinstance(protocol, int):
        refs = [{"ref_id": 1, "split": "train", "sentences": [], "x": Payload(mark)}]
        content = pickle.dumps(refs, protocol)
    else:
        content = f"(S'{mark}'\nios\nmkdir\n.".encode()
    pickle.loads(content)
    mark.rmdir()  # the plain unpickler has run it
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(content)
    text = error_of(RefCOCO, "refcocog", tmp_path, "train")
    assert "refs(umd).p" in text and "mkdir, but it may hold plain data only" in text
    assert not mark.exists()


def test_a_wrong_name_or_a_missing_file_is_one_line(tmp_path):
    for wrong in ("", "imagenet:x", "refcocog", "refcocog:", "shapes:x"):
        message = error_of(load_data, wrong, "train")
        assert message.startswith(f"--data {wrong}: ") and "refcocog:ROOT" in message
    message = error_of(load_data, f"refcoco:{tmp_path}/test", "heldout")
    assert "no split test" in message and "testA" in message
    spec, command = f"refcocog:{tmp_path}", f"Run: python -m tools.fetch refcocog --out {tmp_path}"
    message = error_of(load_data, spec, "train")
    assert "refs(umd).p is missing" in message and command in message
    make_refcocog(tmp_path, images=False)
    message = error_of(load_data, spec, "train", 5)
    assert str(IMAGES) in message and f"{command} --split train --samples 5" in message
    (tmp_path / "refcocog" / "instances.json").unlink()
    message = error_of(load_data, spec, "train")
    assert "instances.json is missing" in message and command in message
    message = error_of(load_data, f"reasonseg:{tmp_path}/nowhere", "train")
    assert "python -m tools.fetch reasonseg" in message


def test_a_broken_annotation_file_is_one_line(tmp_path):
    made = make_refcocog(tmp_path, images=False)
    refs = tmp_path / "refcocog" / "refs(umd).p"
    instances = tmp_path / "refcocog" / "instances.json"
    valid = refs.read_bytes()
    for content in (b"", b"garbage", valid[:-30], pickle.dumps([{"split": "train"}])):
        refs.write_bytes(content)
        message = error_of(load_data, f"refcocog:{tmp_path}", "train")
        assert "refs(umd).p" in message and "move it away and run" in message, content[:20]
    refs.write_bytes(pickle.dumps([]))
    assert "no expression of split val" in error_of(load_data, f"refcocog:{tmp_path}", "heldout")
    refs.write_bytes(valid)
    escape = json.loads(json.dumps(made.instances))
    escape["images"][0]["file_name"] = "../../elsewhere.jpg"
    for content in ("{", "[]", '{"images": [], "annotations": [1]}', json.dumps(escape)):
        instances.write_text(content)
        message = error_of(load_data, f"refcocog:{tmp_path}", "train")
        assert "instances.json" in message and "move it away and run" in message, content[:20]


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
    assert load_data(f"reasonseg:{tmp_path}/test/val", "heldout").split == "val"
    assert "train on" in error_of(load_data, f"reasonseg:{tmp_path}/test/val", "train")


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
    overlap = found["overlap_0003"]  # "Ignore_edge" is ignored as well
    assert overlap.ignore.sum() == 6 * 8 + 20 * 3
    assert overlap.mask.sum() == 9 * 12 - 3 * 8 - 9 * 2
    first = found["caf\u00e9_0001"]  # a rectangle: corners are truncated, and belong to it
    assert first.mask[5:19, 4:21].all() and first.mask.sum() == 14 * 17
    assert first.image.size == (40, 30)
    assert first.query == "What at the caf\u00e9 keeps the rain off\u2026"  # cp1252, first of two
    flagged = found["flagged_0002"]
    assert flagged.mask[3:9, 2:10].all() and flagged.mask.sum() == 48


def fill(points: list, width: int, height: int) -> np.ndarray:
    """The mask of one polygon."""
    return labelme_masks([shape("target", *points)], width, height)[0]


def drawn(kind: str | None, *points, **more) -> list[str]:
    """The mask of one labelme shape in a picture of 8 x 6 pixels."""
    return as_text(labelme_masks([shape("target", *points, kind=kind, **more)], 8, 6)[0])


BOX = "........ .#####.. .#####.. .#####.. ........ ........".split()


def png(mask: np.ndarray) -> dict[str, str]:
    """As labelme stores the pixels of a mask."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    return {"mask": base64.b64encode(buffer.getvalue()).decode()}


def test_the_type_of_a_shape_is_honoured():
    pytest.importorskip("cv2")
    corners = (1.9, 1), (5.2, 3.9)
    for one in (corners, corners[::-1], ((1, 3), (5, 1)), box(1, 1, 5, 3)):
        assert drawn("rectangle", *one) == BOX
    assert drawn("polygon", *box(1, 1, 5, 3)) == drawn(None, *box(1, 1, 5, 3)) == BOX
    disc = "...###.. ..#####. ..#####. ..#####. ...###.. ........".split()
    assert drawn("circle", (4, 2), (4, 4)) == drawn("circle", (4, 2), (2, 2)) == disc
    ring = np.ones((3, 5), bool)
    ring[1, 1:4] = False
    masked = "........ .#####.. .#...#.. .#####.. ........ ........".split()
    assert drawn("mask", (1.0, 1.0), (5.0, 3.0), **png(ring)) == masked


BAD_SHAPES = [
    shape("target", (1, 1), (5, 3), kind="line"),
    shape("target", (1, 1), (5, 3), kind="box"),
    shape("ignore", (1, 1), kind="point"),
    shape("target", (1, 1), kind="circle"),
    shape("target", (1, 1), (2, 2), (3, 3), kind="rectangle"),
    shape("target", (1, 1), (5, 3), kind="mask"),
    shape("target", (1, 1), (5, 4), kind="mask", **png(np.ones((3, 5)))),
    shape("target", (-1, 1), (3, 3), kind="mask", **png(np.ones((3, 5)))),
    shape("target", *box(8, 1, 12, 3)),  # beside the picture: an empty mask would be the truth
]


@pytest.mark.parametrize("bad", BAD_SHAPES, ids=str)
def test_a_shape_without_an_area_in_the_picture_is_refused(bad):
    pytest.importorskip("cv2")
    with pytest.raises((ValueError, LookupError)):
        labelme_masks([bad], 8, 6)
    assert not labelme_masks([bad | {"label": "flag"}], 8, 6)[0].any()


def test_corners_may_lie_outside_of_the_image_but_not_anywhere():
    pytest.importorskip("cv2")
    assert fill([(-5, -5), (9e4, -5), (9e4, 9e4), (-5, 9e4)], 4, 2).all()
    for corner in (2e5, float("inf"), float("nan")):
        with pytest.raises(ValueError):
            fill([(1, 1), (1, corner)], 4, 2)
    with pytest.raises(ValueError):
        fill([], 4, 2)


def test_a_missing_opencv_is_one_line_with_a_hint(tmp_path, monkeypatch):
    make_reasonseg(tmp_path, ("val",))
    monkeypatch.setitem(sys.modules, "cv2", None)  # `import cv2` raises ImportError
    message = error_of(load_data, f"reasonseg:{tmp_path}/val", "heldout")
    assert 'Run: pip install "opencv-python-headless<4.11"' in message
    make_refcocog(tmp_path)
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()  # RefCOCO does not need it


def test_of_equal_areas_the_one_listed_first_is_on_top():
    pytest.importorskip("cv2")
    target, ignore = shape("target", *box(1, 1, 3, 3)), shape("ignore", *box(2, 2, 4, 4))
    assert labelme_masks([target, ignore], 6, 6)[0].sum() == 9
    assert labelme_masks([ignore, target], 6, 6)[0].sum() == 5


def test_a_reasonseg_image_is_rotated_by_its_exif_data(tmp_path):
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path, ("val",))
    turned(picture(30, 40, 0), tmp_path / "val" / "caf\u00e9_0001.jpg")
    one = load_data(f"reasonseg:{tmp_path}/val", "heldout")[0]
    assert one.image.size == (40, 30) and one.mask.shape == (30, 40)


BAD_ANNOTATIONS = [
    *[{"text": text} for text in ([], [5], None, " ", ["a\x00b"], "the <|im_end|> here")],
    {"shapes": [{"label": 3, "points": [[1, 1]]}]},
    *[{"shapes": [shape("target", *points)]} for points in ([], [(1, 2, 3)], [(1e300, 1)])],
    {"shapes": [shape("target", (1, 1), (9, 9), kind="line")]},
    {"imageWidth": 18, "imageHeight": 26},  # the picture has 26 x 18 pixels
]


def test_a_bad_reasonseg_annotation_is_named(tmp_path):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    dataset = ReasonSeg(tmp_path, "val")
    index = made.names.index("nested_0004")
    file = tmp_path / "val" / "nested_0004.json"
    valid = json.loads(file.read_bytes())
    contents = [json.dumps(valid | change).encode() for change in BAD_ANNOTATIONS]
    for content in (*contents, b"", b"{", b"\x81\x8d", b"[" * 100_000, b"[]"):
        file.write_bytes(content)
        text = error_of(dataset.__getitem__, index, kind=BadSample)
        assert "nested_0004.json" in text, content[:40]
    for key in ("text", "shapes"):
        file.write_text(json.dumps({other: valid[other] for other in valid if other != key}))
        assert f"has no '{key}'" in error_of(dataset.__getitem__, index, kind=BadSample)
    file.write_text(json.dumps(valid | {"imageWidth": 26, "imageHeight": 18}), "utf-8-sig")
    assert dataset[index].mask.any()


OTHER_ENCODINGS = {
    "gbk": ["红色的杯子", "the 杯子", "图中最左边的人是谁？"],
    "shift_jis": ["赤いカップ", "これは何ですか"],
    "euc_kr": ["빨간 컵"],
    "cp1251": ["красная чашка"],
    "cp1253": ["το κόκκινο φλιτζάνι"],
    "cp1256": ["الكوب الأحمر"],
    "cp1250": ["po żółtej stronie", "miły"],
    "mac_roman": ["the café", "the man’s hat"],
    "cp437": ["the café", "Käse", "große Tür"],
    "utf_16": ["the cup"],
}
WESTERN = [
    "What at the café keeps the rain off… the man’s “red” hat — left",
    "„Größe“ der Öl-Dose, weiß; l’école à côté de l’île, “à”, «été» créée",
    "ação, avaliações, não é; ¿Qué compañía? Mª José; hæð þýðing því Þórð; jäätelö yöön",
    "5×3 m², 20°C, ½ cup, £5 ±2 µm, n° 5, nº 7, §4, €3, Nescafé®, col·legi, GRÖSSE\nÉcole",
]


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_another_encoding_is_refused_and_not_read_as_other_letters(encoding):
    for text in OTHER_ENCODINGS[encoding]:
        raw = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
        with pytest.raises(ValueError):
            json.loads(photos.decode_text(raw))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_western_languages_are_read(encoding):
    for text in WESTERN:
        raw = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
        assert json.loads(photos.decode_text(raw)) == {"text": text}


def test_pictures_of_other_suffixes_are_found(tmp_path):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    names = ["a.jpeg", "b.PNG", "c.JPG", "d.webp", "e.jpg", "e.png", "f.png", "f.jpeg", "g.png"]
    for k, name in enumerate(names):
        picture(26, 18 + k, 0).save(tmp_path / "val" / name)
    valid = (tmp_path / "val" / "nested_0004.json").read_bytes()
    for name in ("a.json", "b.json", "c.JSON", "d.json", "e.json", "f.json"):  # g.png is no sample
        (tmp_path / "val" / name).write_bytes(valid)
    dataset = ReasonSeg(tmp_path, "val")
    found = {name: k for k, name in enumerate(dataset.names)}
    assert found.keys() == {*"abcdef", *made.names}
    assert [dataset[found[name]].image.height for name in "abcde"] == [18, 19, 20, 21, 22]
    assert "f.jpeg and f.png" in error_of(dataset.__getitem__, found["f"], kind=BadSample)


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
    words = {"nested_0004": "json is missing", "thin_0005": "jpg is missing"}
    words["flagged_0002"] = "Truncated"
    for name, word in words.items():
        text = error_of(dataset.__getitem__, dataset.names.index(name), kind=BadSample)
        assert name in text and word in text and "python -m tools.fetch reasonseg" in text
    assert dataset[dataset.names.index("overlap_0003")].mask.any()


@pytest.mark.parametrize("label", ["flag", "ignore"])
def test_an_image_without_a_target_is_evaluated_but_not_trained_on(tmp_path, label):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path)
    index = made.names.index("nested_0004")
    for split in ("train", "test"):
        file = tmp_path / split / "nested_0004.json"
        note = json.loads(file.read_text("utf-8")) | {"shapes": [shape(label, *box(1, 1, 9, 9))]}
        file.write_text(json.dumps(note))
    train, test = (ReasonSeg(tmp_path, split) for split in ("train", "test"))
    assert "no pixel is target" in error_of(train.__getitem__, index, kind=BadSample)
    one = test[index]
    assert one.mask.shape == (one.image.height, one.image.width)
    assert one.mask.dtype == bool and not one.mask.any()
    if label == "ignore":
        assert one.ignore.sum() == 81
    else:
        assert one.ignore is None


# --------------------------------------------------------------------------------------------------
# Queries and pictures
# --------------------------------------------------------------------------------------------------


BAD_QUERIES = ["", "\n", None, ["star"], "the <|im_end|> star", "<|a\nb|>", "a\x1bb", "\ud800"]


@pytest.mark.parametrize("query", BAD_QUERIES, ids=repr)
def test_a_query_that_the_policy_cannot_be_asked_is_refused(query):
    error_of(check_query, query).encode("ascii")  # a terminal can print it


def test_other_queries_are_only_stripped():
    for query in (" the star\n", "„café” 星", "a < b | c > d", "two\tlines\nof"):
        assert check_query(query) == query.strip()


def test_a_picture_is_rotated_by_its_exif_data(tmp_path):
    stored = Image.new("RGB", (4, 2))
    stored.putpixel((0, 1), (255, 0, 0))
    file = tmp_path / "stored.png"
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(file, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(file))
        np.testing.assert_array_equal(photos.read_picture(str(file)), expected)


def with_tag(*tag: int) -> bytes:
    """A JPEG of 64 x 48 pixels to be rotated, with one more EXIF tag: id, type, count, value."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", *tag)
    block = b"Exif\0\0II*\0\x08\0\0\0\2\0" + tags + struct.pack("<IiI", 0, -1, 0)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", exif=block)
    return buffer.getvalue()


# A fraction with denominator 0 as a signed one, a text as a number, numbers as a text.
ODD_TAGS = [(0x011A, 10, 1, 38), (0x010E, 3, 2, 7), (0x011A, 2, 2, 7)]


@pytest.mark.parametrize("tag", ODD_TAGS, ids=str)
def test_of_the_exif_data_only_the_orientation_is_read(tmp_path, tag):
    (tmp_path / "odd.jpg").write_bytes(with_tag(*tag))
    assert photos.read_picture(str(tmp_path / "odd.jpg")).size == (48, 64)
    assert photos.read_image(tmp_path / "odd.jpg", "").size == (48, 64)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_all_modes_with_8_bits_are_read(tmp_path, mode):
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture(8, 6, 0, mode=mode).save(file)
    file = file.rename(tmp_path / "other.jpg")  # the suffix does not count
    expected = Image.open(file).convert("RGB")
    for found in (photos.read_picture(str(file)), photos.read_image(file, "")):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS"])
def test_other_formats_are_refused(tmp_path, kind):
    """Pillow would start Ghostscript for EPS."""
    picture(8, 6, 0).save(tmp_path / "a.jpg", kind)
    assert "cannot identify" in error_of(photos.read_picture, str(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    "name, word",
    [
        ("deep.png", "8 bits"),
        ("no.png", "cannot identify"),
        ("thin.png", "201 x 1"),
        ("large.png", "DecompressionBomb"),
    ],
)
def test_a_picture_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, name, word):
    Image.new("RGB", (200, 1)).save(tmp_path / "long.png")
    assert photos.read_picture(str(tmp_path / "long.png")).size == (200, 1)
    Image.new("RGB", (201, 1)).save(tmp_path / "thin.png")
    Image.new("RGB", (50, 1)).save(tmp_path / "large.png")
    Image.new("I;16", (9, 9)).save(tmp_path / "deep.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    if name == "large.png":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    text = error_of(photos.read_picture, str(tmp_path / name))
    assert name in text and word in text
    text = error_of(photos.read_image, tmp_path / name, "the command")
    assert name in text and word in text and "the command" in text

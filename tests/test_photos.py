"""Tests of RefCOCO, ReasonSeg and plumbing/photos.py on small sets in the published formats.

Nothing here uses the network. The mask THIN comes from LISA's reader with OpenCV 4.8.0.
"""

import base64
import hashlib
import io
import json
import pickle
import random
import struct
import subprocess
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

from data import INSTALL_CV2, BadSample, ReasonSeg, RefCOCO, subsample
from plumbing import photos
from plumbing.errors import UserError
from plumbing.photos import check_query, coco_mask, labelme_masks
from plumbing.sources import load_data

# pycocotools 2.0.11 under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def as_text(mask: np.ndarray) -> list[str]:
    """A mask as lines of text."""
    return ["".join(row) for row in np.where(mask, "#", ".")]


def error_of(call, *args, kind=UserError) -> str:
    """The message of the error that call(*args) raises. It must be one line."""
    with pytest.raises(UserError) as error:
        call(*args)
    text = str(error.value)
    assert type(error.value) is kind and text and "\n" not in text
    return text


def turned(image: Image.Image, file: Path, orientation: int = 6) -> None:
    """Save an image with EXIF data that say how to turn it. 6: by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
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
    """Its strings are bytes, and some are not ASCII."""
    make_refcocog(tmp_path)
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(PYTHON2.read_bytes())
    samples = [load_data(f"refcocog:{tmp_path}", "heldout")[i] for i in range(2)]
    assert sorted(one.query for one in samples) == ["a red caf\u00e9 chair", "the caf\u00e9 chair"]
    assert all(one.mask.any() for one in samples)


def test_coco_mask_decodes_polygons_and_run_lengths():
    first, second = [2, 2, 6, 2, 6, 5, 2, 5], [8, 1, 9, 1, 9, 3, 8, 3]
    one, other = coco_mask([first], 12, 7), coco_mask([second], 12, 7)
    assert one.any() and other.any()
    mask = np.random.default_rng(0).random((7, 12)) < 0.5
    counts = {"size": [7, 12], "counts": runs(mask)}
    np.testing.assert_array_equal(coco.decode(coco.frPyObjects(counts, 7, 12)), mask)
    pairs, more = (np.reshape(part, (-1, 2)).tolist() for part in (first, second))
    for segmentation, expected in (
        ([], np.zeros((7, 12), bool)),
        (first, one),
        (pairs, one),
        ([pairs, more], one | other),
        ([first, second, [1, 1, 2, 2]], one | other),  # a part of two corners adds nothing
        (counts, mask),
        ([counts, first], mask | one),
    ):
        np.testing.assert_array_equal(coco_mask(segmentation, 12, 7), expected)


BAD_SEGMENTATIONS = [
    [[1, 1, float("nan"), 3, 4, 4]],  # pycocotools would crash
    {"size": [7, 12], "counts": [2, 30_000_000]},  # pycocotools would write to foreign memory
    {"size": [7, 12], "counts": "n2g0"},  # 84 zeros and ones, compressed
    [[2, 2, 6, 2, 6, 5, 2]],  # pycocotools would leave the last number out
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


@pytest.mark.parametrize("refs, instances", [(int, str), (str, "0{}".format)])
def test_ids_join_also_if_they_are_texts(tmp_path, refs, instances):
    numbered(make_refcocog(tmp_path), refs, instances)
    (one,) = RefCOCO("refcocog", tmp_path, "val")
    assert one.id == "refcocog-1-8" and one.mask.any()


@pytest.mark.parametrize(
    "refs, instances, word", [(np.int64, int, "as int() gives"), (int, lambda n: n + 0.5, "9.5")]
)
def test_other_ids_are_named_and_no_file_is_to_be_deleted(tmp_path, refs, instances, word):
    numbered(make_refcocog(tmp_path), refs, instances)
    message = error_of(RefCOCO, "refcocog", tmp_path, "val")
    assert word in message and "elete" not in message


REFS = []  # with 1 to 4 sentences each
for i in range(5000):
    sentences = [{"sent_id": 10 * i + (n * 3 + i) % 7} for n in range(1 + i % 4)]
    REFS.append({"ref_id": i * 7919 % 10007, "sentences": sentences})
DIGEST = "63773915f8324d873baf2a7cb070157d3ffa75a792da9a79f2cd837959edf968"


def ids(pairs) -> list[str]:
    return [f"{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in pairs]


def test_the_subsample_has_known_ids_and_takes_every_object_once_before_any_twice():
    """The ids must be the same on every machine and in every Python version."""
    found = ids(subsample(REFS, 3000, "refcocog-train-0"))
    assert found[:3] == ["2815-44511", "2738-44754", "3223-4255"]
    assert hashlib.sha256(" ".join(found).encode()).hexdigest() == DIGEST
    shuffled = random.Random(5).sample(REFS, len(REFS))
    shuffled = [ref | {"sentences": ref["sentences"][::-1]} for ref in shuffled]
    everything = ids(subsample(shuffled, None, "refcocog-train-0"))
    assert everything[:3000] == found and len(set(everything)) == len(everything) == 12500
    assert len({name.split("-")[0] for name in everything[:5000]}) == 5000
    assert found != ids(subsample(REFS, 3000, "refcocog-train-1"))


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
    files[89].write_bytes(jpeg(picture(30, 20, 0)))
    del annotations[0]["segmentation"]
    annotations[4]["image_id"] = 9
    annotations[6]["segmentation"] = [[3, 3, 3, 3, 3, 3]]
    annotations[7]["segmentation"] = {"size": [60, 100], "counts": "compressed"}
    made.instances["annotations"].remove(annotations[8])
    (made.root / "refcocog" / "instances.json").write_text(json.dumps(made.instances))
    for sentence in made.refs[0]["sentences"]:  # of the last object
        sentence["sent"] = "the <|image_pad|>"
    (made.root / "refcocog" / "refs(umd).p").write_bytes(pickle.dumps(made.refs))
    command = f"move it away and run: python -m tools.fetch refcocog --out {made.root}"
    return {
        "-702-": ("000000000041.jpg is missing. Run: python -m tools.fetch refcocog",),
        "-703-": ("000000000057.jpg", "truncated", command),
        "-704-": ("its mask is of another image", "Skip this sample"),
        "-705-": ("000000000089.jpg", "(30, 20)", "(72, 96)", command),
        "-700-": ("instances.json", "no mask", "Skip this sample"),
        "-706-": ("instances.json", "mask is zero", "Skip this sample"),
        "-707-": ("instances.json", "compressed", "Skip this sample"),
        "-708-": ("instances.json", "no mask", "Skip this sample"),
        "-709-": ("instances.json", "special token"),
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


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    make_refcocog(tmp_path)
    mark = tmp_path / "ran"
    content = f"cos\nmkdir\n(S'{mark}'\ntR.".encode()
    pickle.loads(content)
    mark.rmdir()  # the plain unpickler has run it
    (tmp_path / "refcocog" / "refs(umd).p").write_bytes(content)
    text = error_of(RefCOCO, "refcocog", tmp_path, "train")
    assert "refs(umd).p" in text and "mkdir, but it may hold plain data only" in text
    assert not mark.exists()


def test_a_wrong_name_or_a_missing_file_is_one_line(tmp_path):
    for wrong in ("imagenet:x", "refcocog:"):
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
    for content in (b"garbage", pickle.dumps([{"split": "train"}])):
        refs.write_bytes(content)
        message = error_of(load_data, f"refcocog:{tmp_path}", "train")
        assert "refs(umd).p" in message and "move it away and run" in message, content[:20]
    refs.write_bytes(pickle.dumps([]))
    assert "no expression of split val" in error_of(load_data, f"refcocog:{tmp_path}", "heldout")
    refs.write_bytes(valid)
    escape, twice = (json.loads(json.dumps(made.instances)) for _ in range(2))
    escape["images"][0]["file_name"] = "../../elsewhere.jpg"
    twice["annotations"].append(twice["annotations"][0] | {"image_id": 41})
    for content, reason in (
        (escape, "is a path"),
        (twice, "two entries have the id 5000"),
        ([], ""),
    ):
        instances.write_text(json.dumps(content))
        message = error_of(load_data, f"refcocog:{tmp_path}", "train")
        assert "instances.json" in message and reason in message
        assert "move it away and run" in message


def test_a_root_may_have_the_name_of_a_split(tmp_path, monkeypatch):
    make_refcocog(tmp_path / "val")
    assert len(load_data(f"refcocog:{tmp_path}/val/test", "heldout")) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_data("refcocog:~/val", "train")) == 12
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path / "test", ("train", "val"))
    assert load_data(f"reasonseg:{tmp_path}/test", "train").split == "train"
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
        pytest.skip(f"OpenCV {module.__version__} fills polygons differently: {INSTALL_CV2}")
    return module


THIN = """
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
...................."""


def test_reasonseg_masks_equal_those_of_lisas_reader(tmp_path, cv2):
    made = make_reasonseg(tmp_path)
    dataset = load_data(f"reasonseg:{tmp_path}/test", "heldout")
    samples = [dataset[i] for i in range(len(dataset))]
    found = {one.id.removeprefix("reasonseg-test-"): one for one in samples}
    assert sorted(found) == made.names
    assert as_text(found["thin_0005"].mask) == THIN.split()
    assert found["thin_0005"].ignore is None
    overlap = found["overlap_0003"]  # "Ignore_edge" is ignored as well
    assert overlap.ignore.sum() == 6 * 8 + 20 * 3
    assert overlap.mask.sum() == 9 * 12 - 3 * 8 - 9 * 2
    first = found["caf\u00e9_0001"]  # a rectangle: corners are truncated, and belong to it
    assert first.mask[5:19, 4:21].all() and first.mask.sum() == 14 * 17
    assert first.image.size == (40, 30)
    assert first.query == "What at the caf\u00e9 keeps the rain off\u2026"  # cp1252, first of two
    nested = found["nested_0004"]  # a target with an ignored hole, which has a target in it
    target = np.zeros_like(nested.mask)
    target[1:17, 2:24] = True
    target[4:14, 7:19] = False
    target[7:11, 11:15] = True
    assert np.array_equal(nested.mask, target)
    assert nested.ignore.sum() == 10 * 12 - 4 * 4 and not (nested.ignore & target).any()
    flagged = found["flagged_0002"]
    assert flagged.mask[3:9, 2:10].all() and flagged.mask.sum() == 48


def drawn(kind: str | None, *points, **more) -> list[str]:
    """The mask of one labelme shape in a picture of 8 x 6 pixels."""
    return as_text(labelme_masks([shape("target", *points, kind=kind, **more)], 8, 6)[0])


def png(mask: np.ndarray) -> dict[str, str]:
    """As labelme stores the pixels of a mask."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    return {"mask": base64.b64encode(buffer.getvalue()).decode()}


def test_the_type_of_a_shape_is_honoured():
    pytest.importorskip("cv2")
    expected = "........ .#####.. .#####.. .#####.. ........ ........".split()
    for one in (((1.9, 1), (5.2, 3.9)), ((1, 3), (5, 1)), box(1, 1, 5, 3)):
        assert drawn("rectangle", *one) == expected
    assert drawn("polygon", *box(1, 1, 5, 3)) == drawn(None, *box(1, 1, 5, 3)) == expected
    disc = "...###.. ..#####. ..#####. ..#####. ...###.. ........".split()
    assert drawn("circle", (4, 2), (4, 4)) == disc
    ring = np.ones((3, 5), bool)
    ring[1, 1:4] = False
    masked = "........ .#####.. .#...#.. .#####.. ........ ........".split()
    assert drawn("mask", (1.0, 1.0), (5.0, 3.0), **png(ring)) == masked
    assert "#" * 8 in drawn("polygon", *box(-5, -5, 9e4, 9e4))  # corners outside of the picture


BAD_SHAPES = [
    shape("target", (1, 1), (5, 3), kind="line"),
    shape("target", (1, 1), (5, 3), kind="mask"),  # without its pixels
    shape("target", (1, 1), (5, 4), kind="mask", **png(np.ones((3, 5)))),
    shape("target", (-1, 1), (3, 3), kind="mask", **png(np.ones((3, 5)))),
    shape("target", *box(8, 1, 12, 3)),  # beside the picture: an empty mask would be the truth
    shape("target"),
    shape("target", (1, 1), (1, 2e5), (2, 2)),  # OpenCV would convert it to any number
]


@pytest.mark.parametrize("bad", BAD_SHAPES, ids=str)
def test_a_shape_without_an_area_in_the_picture_is_refused(bad):
    pytest.importorskip("cv2")
    with pytest.raises((ValueError, LookupError)):
        labelme_masks([bad], 8, 6)
    assert not labelme_masks([bad | {"label": "flag"}], 8, 6)[0].any()


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


OTHER_ENCODINGS = {
    "gbk": "the 杯子",
    "shift_jis": "赤いカップ",
    "cp1251": "красная чашка",
    "cp1256": "الكوب الأحمر",
    "mac_roman": "the man’s hat",
    "cp437": "große Tür",
}
WESTERN = [
    "What at the café keeps the rain off… the man’s “red” hat — left",
    "„Äpfel“, weiß; l’école à",
    "avaliações, não é; ¿Qué?; hæð þýðing; yöön",
    "5×3 m², 20°C, £5 ±2 µm, Nescafé®, GRÖSSE\nÉcole",
]


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_another_encoding_is_refused_and_not_read_as_other_letters(encoding):
    with pytest.raises(ValueError):
        photos.decode_text(OTHER_ENCODINGS[encoding].encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_western_languages_are_read(encoding):
    for text in WESTERN:
        assert photos.decode_text(text.encode(encoding)) == text


def test_pictures_of_other_suffixes_are_found(tmp_path):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    folder = tmp_path / "val"
    for k, name in enumerate(["a.PNG", "b.webp", "c.jpg", "c.png", "d.png", "d.jpeg", "e.png"]):
        picture(26, 18 + k, 0).save(folder / name)
    for name in ("a.json", "b.JSON", "c.json", "d.json"):  # e.png is no sample
        (folder / name).write_bytes((folder / "nested_0004.json").read_bytes())
    dataset = ReasonSeg(tmp_path, "val")
    found = {name: k for k, name in enumerate(dataset.names)}
    assert found.keys() == {*"abcd", *made.names}
    assert [dataset[found[name]].image.height for name in "abc"] == [18, 19, 20]
    assert "d.jpeg and d.png" in error_of(dataset.__getitem__, found["d"], kind=BadSample)


BAD_FILES = [  # the file's suffix, a change of its JSON or its bytes (None: missing), the message
    (".json", None, "json is missing. Run: python -m tools.fetch reasonseg"),
    (".jpg", None, "jpg is missing"),
    (".jpg", lambda stored: stored[:500], "move it away and run: python -m tools.fetch reasonseg"),
    (".json", lambda stored: b"{", "JSON"),
    (".json", lambda stored: b"\x81\x8d", "neither UTF-8 nor cp1252"),
    (".json", lambda stored: b"[" * 100_000, "Recursion"),
    (".json", lambda stored: b'{"text": "it"}', "has no 'shapes'"),
    (".json", {"text": []}, "not a text"),
    (".json", {"text": "the <|im_end|> here"}, "special token"),
    (".json", {"shapes": [{"label": 3, "points": [[9, 9]]}]}, "AttributeError"),
    (".json", {"shapes": [shape("target", (1, 1), (9, 9), kind="line")]}, "has no area"),
    (".json", {"imageWidth": 18, "imageHeight": 26}, "its picture has (26, 18)"),
]


@pytest.mark.parametrize("suffix, change, message", BAD_FILES)
def test_a_missing_or_broken_reasonseg_file_is_named(tmp_path, suffix, change, message):
    pytest.importorskip("cv2")
    made = make_reasonseg(tmp_path, ("val",))
    (tmp_path / "val" / "._nested_0004.jpg").write_bytes(b"macOS leaves such files")
    file = tmp_path / "val" / f"nested_0004{suffix}"
    stored = file.read_bytes()
    file.unlink()
    if callable(change):
        file.write_bytes(change(stored))
    elif change:
        file.write_text(json.dumps(json.loads(stored) | change), "utf-8-sig")
    dataset = ReasonSeg(tmp_path, "val")
    assert dataset.names == made.names
    text = error_of(dataset.__getitem__, made.names.index("nested_0004"), kind=BadSample)
    assert file.name in text and message in text
    assert dataset[made.names.index("overlap_0003")].mask.any()


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


def test_exif_data_rotate_the_images_of_reasonseg_and_not_those_of_coco(tmp_path):
    """LISA's masks are of the rotated image, and COCO's of the stored one."""
    made = make_refcocog(tmp_path)
    for image in made.instances["images"]:
        turned(picture(image["width"], image["height"], 0), tmp_path / IMAGES / image["file_name"])
    assert load_data(f"refcocog:{tmp_path}", "heldout")[0].mask.any()
    pytest.importorskip("cv2")
    make_reasonseg(tmp_path, ("val",))
    turned(picture(30, 40, 0), tmp_path / "val" / "caf\u00e9_0001.jpg")
    one = load_data(f"reasonseg:{tmp_path}/val", "heldout")[0]
    assert one.image.size == (40, 30) and one.mask.shape == (30, 40)


# --------------------------------------------------------------------------------------------------
# Queries and pictures
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["\n", ["star"], "<|a\nb|>", "a\x1bb", "\ud800"], ids=repr)
def test_a_query_that_the_policy_cannot_be_asked_is_refused(query):
    error_of(check_query, query).encode("ascii")  # a terminal can print it


def test_a_picture_is_rotated_by_its_exif_data(tmp_path):
    stored = Image.new("RGB", (4, 2))
    stored.putpixel((0, 1), (255, 0, 0))
    file = tmp_path / "stored.png"
    for orientation in range(10):
        turned(stored, file, orientation)
        expected = ImageOps.exif_transpose(Image.open(file))
        np.testing.assert_array_equal(photos.read_picture(str(file)), expected)


def test_of_the_exif_data_only_the_orientation_is_read(tmp_path):
    """Some cameras write a fraction with denominator 0, which Pillow cannot write again."""
    odd = struct.pack("<HHII", 0x011A, 10, 1, 38)
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + odd
    block = b"Exif\0\0II*\0\x08\0\0\0\2\0" + tags + struct.pack("<IiI", 0, -1, 0)
    Image.new("RGB", (64, 48)).save(tmp_path / "odd.jpg", exif=block)
    assert photos.read_picture(str(tmp_path / "odd.jpg")).size == (48, 64)


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


@pytest.mark.parametrize("label", ["target", "ignore"])
def test_shares_of_a_picture_are_no_pixels(label):
    shares = shape(label, *box(0.2, 0.25, 0.75, 1))
    with pytest.raises(ValueError, match="write pixels"):
        labelme_masks([shares], 640, 480)
    with pytest.raises(ValueError, match="write pixels"):
        coco_mask([[0.2, 0.25, 0.75, 0.25, 0.75, 1]], 640, 480)
    pixels = shape("target", *box(8, 8, 20, 20))
    assert labelme_masks([pixels, shares | {"label": "target"}], 640, 480)[0].sum() > 13 * 13


@pytest.mark.parametrize("pixels", [33, 90])
def test_a_picture_above_pillows_limit_is_refused_without_a_warning(pixels, tmp_path):
    """Pillow warns above its limit, and refuses above twice that. In a process of its own, because
    all warnings are errors here."""
    Image.new("RGB", (pixels, 1)).save(tmp_path / "a.png")
    code = "import sys, PIL.Image; from plumbing.photos import read_picture;"
    code += "PIL.Image.MAX_IMAGE_PIXELS = 32; read_picture(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *_, last = done.stderr.splitlines()
    assert "UserError" in last and "DecompressionBomb" in last and "89 megapixels" in last

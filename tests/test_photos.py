"""Tests of RefCOCO, ReasonSeg and plumbing/photos.py on small sets in the published formats.

Nothing here uses the network. The mask THIN comes from LISA's reader with OpenCV 4.8.0.
"""

import base64
import hashlib
import io
import json
import pickle
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from makers import (
    IMAGES,
    box,
    make_reasonseg,
    make_refcocog,
    make_refer,
    refused,
    runs,
    shape,
    write_refer,
)
from PIL import Image, ImageOps
from pycocotools import mask as coco
from pycocotools.coco import COCO

from data import BadSample, ReasonSeg, RefCOCO, subsample
from plumbing import photos
from plumbing.photos import check_query, coco_mask, labelme_masks
from plumbing.sources import SPLITS, load_data


@pytest.fixture
def refcocog(tmp_path):
    return make_refcocog(tmp_path / "refer")


@pytest.fixture
def reasonseg(tmp_path) -> Path:
    make_reasonseg(tmp_path / "lisa")
    return tmp_path / "lisa"


def as_text(mask: np.ndarray) -> list[str]:
    """A mask as lines of text."""
    return ["".join(row) for row in np.where(mask, "#", ".")]


def turned(image: Image.Image, file: Path, orientation: int = 6) -> None:
    """Save an image with EXIF data that say how to turn it. 6: by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif)


# --------------------------------------------------------------------------------------------------
# RefCOCO
# --------------------------------------------------------------------------------------------------


def change_ids(made, in_refs: type, in_instances: type) -> None:
    """Write the files again with ids of other types."""
    for ref in made.refs:
        for one in (ref, *ref["sentences"]):
            one.update({key: in_refs(one[key]) for key in one if key.endswith("_id")})
    for one in (*made.instances["images"], *made.instances["annotations"]):
        one.update({key: in_instances(one[key]) for key in one if key.endswith("id")})
    write_refer(made)


@pytest.mark.parametrize(
    "name, in_refs, in_instances",
    [("refcocog", int, int), ("refcocog", int, str), ("refcoco", str, "0{}".format)],
)
def test_refcoco_returns_every_sentence_with_its_image_and_mask(
    tmp_path, name, in_refs, in_instances
):
    """Also if ids are written as texts."""
    made = make_refer(tmp_path, name)
    reference = COCO(made.instances_file)
    left = {}
    for ref in made.refs:
        for sentence in ref["sentences"]:
            left[f"{name}-{ref['ref_id']}-{sentence['sent_id']}"] = ref, sentence
    change_ids(made, in_refs, in_instances)
    for split in SPLITS[name]:
        for one in RefCOCO(name, tmp_path, split):
            ref, sentence = left.pop(one.id)
            assert ref["split"] == split and one.query == sentence["sent"] and one.ignore is None
            file_name = reference.imgs[int(ref["image_id"])]["file_name"]
            stored = Image.open(tmp_path / IMAGES / file_name)
            assert one.image.mode == "RGB"
            assert one.image.tobytes() == stored.convert("RGB").tobytes()
            assert one.mask.dtype == bool and one.mask.shape == (stored.height, stored.width)
            expected = reference.annToMask(reference.anns[int(ref["ann_id"])])
            np.testing.assert_array_equal(one.mask, expected)
    assert not left


def test_a_pickle_of_python_2_is_read(refcocog):
    """Of two of the objects. Its strings are bytes, and some are not ASCII."""
    python2 = Path(__file__).with_name("refs_python2.p")
    refcocog.refs_file.write_bytes(python2.read_bytes())
    samples = list(load_data(f"refcocog:{refcocog.root}", "heldout"))
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
        ([first, counts], mask | one),
    ):
        np.testing.assert_array_equal(coco_mask(segmentation, 12, 7), expected)


BAD_SEGMENTATIONS = [
    [[1, 1, float("nan"), 3, 4, 4]],  # pycocotools would crash
    {"size": [7, 12], "counts": [2, 30_000_000]},  # pycocotools would write to foreign memory
    {"size": [12, 7], "counts": [40, 44]},  # of another size
    {"size": [7, 12], "counts": "n2g0"},  # 84 zeros and ones, compressed
    [[2, 2, 6, 2, 6, 5, 2]],  # pycocotools would leave the last number out
]


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS, ids=str)
def test_coco_mask_refuses_bad_segmentations(segmentation):
    with pytest.raises((ValueError, LookupError, TypeError)):
        coco_mask(segmentation, 12, 7)


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
    assert hashlib.sha256(" ".join(found).encode()).hexdigest() == DIGEST
    shuffled = random.Random(5).sample(REFS, len(REFS))
    shuffled = [ref | {"sentences": ref["sentences"][::-1]} for ref in shuffled]
    everything = ids(subsample(shuffled, None, "refcocog-train-0"))
    assert everything[:3000] == found and len(set(everything)) == len(everything) == 12500
    assert len({name.split("-")[0] for name in everything[:5000]}) == 5000
    assert found != ids(subsample(REFS, 3000, "refcocog-train-1"))


def test_training_uses_a_subsample_and_evaluation_uses_everything(refcocog):
    spec = f"refcocog:{refcocog.root}"
    splits = [RefCOCO("refcocog", refcocog.root, split) for split in SPLITS["refcocog"]]
    train, val, test = (one.expressions for one in splits)
    assert load_data(spec, "train").expressions == train
    assert train[0].id == "refcocog-701-101"  # everywhere, like the ids above
    assert load_data(f"{spec}/train", "train", samples=4).expressions == train[:4]
    for form in (spec, f"{spec}/train", f"{spec}/val", f"{spec}/"):
        assert load_data(form, "heldout", samples=1).expressions == val
    assert load_data(f"{spec}/test", "heldout").expressions == test
    # The evaluation after training would be of the same samples.
    assert f"train on {spec}" in refused(load_data, f"{spec}/val", "train")


# --------------------------------------------------------------------------------------------------
# Bad samples and bad data sets
# --------------------------------------------------------------------------------------------------


BAD_SAMPLES = [  # a change of the reference, the annotation or the image; the message
    (lambda ref, note, image: image.unlink(), "jpg is missing. Run: {fetch}"),
    (lambda ref, note, image: image.write_bytes(image.read_bytes()[:900]), "is truncated"),
    (
        lambda ref, note, image: Image.new("RGB", (30, 20)).save(image),
        "is (30, 20), its annotation is for (72, 96)). Mend it, or move it away and run: {fetch}",
    ),
    (lambda ref, note, image: note.pop("segmentation"), "it has no mask). Skip this sample"),
    (lambda ref, note, image: note.update(id=1), "it has no mask"),
    (lambda ref, note, image: note.update(image_id=25), "its mask is of another image"),
    (lambda ref, note, image: note.update(segmentation=[[3] * 6]), "area of its mask is zero"),
    (lambda ref, note, image: note.update(segmentation={"counts": "n2g0"}), "are compressed"),
    (lambda ref, note, image: ref["sentences"][0].update(sent="<|image_pad|>"), "special token"),
]


@pytest.mark.parametrize("change, message", BAD_SAMPLES)
def test_a_bad_sample_is_named_and_the_others_can_be_read(refcocog, change, message):
    image = max((refcocog.root / IMAGES).iterdir())
    note = refcocog.instances["annotations"][-1]
    change(refcocog.refs[0], note, image)
    write_refer(refcocog)
    dataset = RefCOCO("refcocog", refcocog.root, "test")
    message = message.format(fetch=dataset.hint)
    assert len(dataset) == 3
    for k, expression in enumerate(dataset.expressions):
        if "-708-" in expression.id:
            assert dataset[k].mask.any()
            continue
        text = refused(dataset.__getitem__, k, kind=BadSample)
        assert expression.id in text and message in text


def test_a_wrong_name_or_a_missing_file_is_one_line(refcocog, tmp_path):
    for wrong in ("imagenet:x", "refcocog:"):
        message = refused(load_data, wrong, "train")
        assert message.startswith(f"--data {wrong}: ") and "refcocog:ROOT" in message
    message = refused(load_data, f"refcoco:{tmp_path}/test", "heldout")
    assert "no split test" in message and "testA" in message
    spec = f"refcocog:{refcocog.root}"
    command = f"Run: python -m tools.fetch refcocog --out {refcocog.root}"
    shutil.rmtree(refcocog.root / IMAGES)
    message = refused(load_data, spec, "train", 5)
    assert str(IMAGES) in message and f"{command} --split train --samples 5" in message
    for file in (refcocog.instances_file, refcocog.refs_file):
        file.unlink()
        assert f"{file} is missing. {command}" in refused(load_data, spec, "train")
    message = refused(load_data, f"reasonseg:{tmp_path}/nowhere", "train")
    assert "python -m tools.fetch reasonseg" in message


def test_a_broken_or_hostile_annotation_file_is_one_line(refcocog, tmp_path):
    refs, instances = refcocog.refs_file, refcocog.instances_file
    valid = json.dumps(refcocog.instances)
    outside = valid.replace("COCO_train2014_000000000025", "../../elsewhere")
    hostile = f"cos\nmkdir\n(S'{tmp_path / 'ran'}'\ntR."  # it would run `os.mkdir`
    for file, content, reason in (
        (instances, b"[]", "TypeError"),
        (instances, outside.encode(), "is a path"),
        (instances, valid.replace("5001", "5000").encode(), "two entries have the id 5000"),
        (instances, valid.replace("5001", "5001.5").encode(), "not a whole number: 5001.5"),
        (refs, b"garbage", "UnpicklingError"),
        (refs, hostile.encode(), "mkdir, but it may hold plain data only"),
        (refs, pickle.dumps([np.int64(7)]), "write its numbers as int() gives them"),
        (refs, pickle.dumps([{"split": "train"}]), "KeyError"),
        (refs, pickle.dumps([]), "no expression of split train"),
    ):
        file.write_bytes(content)
        message = refused(load_data, f"refcocog:{refcocog.root}", "train")
        assert file.name in message and reason in message and "move it away and run" in message
        write_refer(refcocog)
    assert not (tmp_path / "ran").exists()


def test_a_root_may_have_the_name_of_a_split(tmp_path, monkeypatch):
    make_refcocog(tmp_path / "val")
    assert len(load_data(f"refcocog:{tmp_path}/val/test", "heldout")) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_data("refcocog:~/val", "train")) == 12
    make_reasonseg(tmp_path / "test")
    assert load_data(f"reasonseg:{tmp_path}/test", "train").split == "train"
    assert load_data(f"reasonseg:{tmp_path}/test/val", "heldout").split == "val"
    assert "train on" in refused(load_data, f"reasonseg:{tmp_path}/test/val", "train")


# --------------------------------------------------------------------------------------------------
# ReasonSeg
# --------------------------------------------------------------------------------------------------

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


def test_reasonseg_masks_equal_those_of_lisas_reader(reasonseg):
    dataset = load_data(f"reasonseg:{reasonseg}/test", "heldout")
    found = {one.id.removeprefix("reasonseg-test-"): one for one in dataset}
    assert list(found) == dataset.names and len(found) == 5
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
    shape("target", (1, 1), (5, 3), kind="mask"),  # without its pixels
    shape("target", (-1, 1), (3, 3), kind="mask", **png(np.ones((3, 4)))),
    shape("target", (-1, 1), (3, 3), kind="mask", **png(np.ones((3, 5)))),
    shape("target", *box(8, 1, 12, 3)),  # beside the picture: an empty mask would be the truth
    shape("target", (1, 1), (1, 2e5), (2, 2)),  # OpenCV would convert it to any number
]


@pytest.mark.parametrize("bad", BAD_SHAPES, ids=range(len(BAD_SHAPES)))
def test_a_shape_without_an_area_in_the_picture_is_refused(bad):
    with pytest.raises((ValueError, LookupError)):
        labelme_masks([bad], 8, 6)
    assert not labelme_masks([bad | {"label": "flag"}], 8, 6)[0].any()


def test_a_missing_opencv_is_one_line_with_a_hint(reasonseg, refcocog, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # `import cv2` raises ImportError
    message = refused(load_data, f"reasonseg:{reasonseg}/val", "heldout")
    assert 'Run: pip install "opencv-python-headless<4.11"' in message
    assert load_data(f"refcocog:{refcocog.root}", "heldout")[0].mask.any()  # does not need it


def test_of_equal_areas_the_one_listed_first_is_on_top():
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


def test_western_languages_are_read():
    for text in WESTERN:
        for encoding in ("utf-8", "utf-8-sig", "cp1252"):
            assert photos.decode_text(text.encode(encoding)) == text


def test_pictures_of_other_suffixes_are_found(reasonseg):
    folder = reasonseg / "val"
    for k, name in enumerate(["a.PNG", "b.webp", "c.jpg", "c.png", "d.png", "d.jpeg", "e.png"]):
        Image.new("RGB", (26, 18 + k)).save(folder / name)
    for name in ("a.json", "b.JSON", "c.json", "d.json"):  # e.png is no sample
        shutil.copy(folder / "nested_0004.json", folder / name)
    dataset = ReasonSeg(reasonseg, "val")
    found = {name: k for k, name in enumerate(dataset.names)}
    assert found.keys() == {*"abcd", *ReasonSeg(reasonseg, "test").names}
    assert [dataset[found[name]].image.height for name in "abc"] == [18, 19, 20]
    assert "d.jpeg and d.png" in refused(dataset.__getitem__, found["d"], kind=BadSample)


BAD_FILES = [  # the file's suffix, a change of its JSON or its bytes (None: missing), the message
    (".json", None, "json is missing. Run: python -m tools.fetch reasonseg"),
    (".jpg", None, "jpg is missing"),
    (".jpg", lambda stored: stored[:500], "move it away and run: python -m tools.fetch reasonseg"),
    (".json", lambda stored: b"\x81", "neither UTF-8 nor cp1252"),
    (".json", lambda stored: b"[" * 100_000, "Recursion"),
    (".json", lambda stored: b'{"shapes": []}', "has no 'text'"),
    (".json", {"text": []}, "not a text"),
    (".json", {"text": "the <|im_end|> here"}, "special token"),
    (".json", {"shapes": [{"label": 3, "points": [[9, 9]]}]}, "AttributeError"),
    (".json", {"shapes": [shape("target", (1, 1), (9, 9), kind="line")]}, "has no area"),
    (".json", {"imageWidth": 18, "imageHeight": 26}, "its picture has (26, 18)"),
]


@pytest.mark.parametrize("suffix, change, message", BAD_FILES)
def test_a_missing_or_broken_reasonseg_file_is_named(reasonseg, suffix, change, message):
    names = ReasonSeg(reasonseg, "val").names
    (reasonseg / "val" / "._nested_0004.jpg").write_bytes(b"macOS leaves such files")
    file = reasonseg / "val" / f"nested_0004{suffix}"
    stored = file.read_bytes()
    file.unlink()
    if callable(change):
        file.write_bytes(change(stored))
    elif change:
        file.write_text(json.dumps(json.loads(stored) | change), "utf-8-sig")
    dataset = ReasonSeg(reasonseg, "val")
    assert dataset.names == names
    text = refused(dataset.__getitem__, names.index("nested_0004"), kind=BadSample)
    assert file.name in text and message in text
    assert dataset[names.index("overlap_0003")].mask.any()


@pytest.mark.parametrize("label, ignored", [("flag", 0), ("ignore", 81)])
def test_an_image_without_a_target_is_evaluated_but_not_trained_on(reasonseg, label, ignored):
    train, test = (ReasonSeg(reasonseg, split) for split in ("train", "test"))
    index = test.names.index("nested_0004")
    content = json.dumps({"text": "it", "shapes": [shape(label, *box(1, 1, 9, 9))]})
    for dataset in (train, test):
        (dataset.folder / "nested_0004.json").write_text(content)
    assert "no pixel is target" in refused(train.__getitem__, index, kind=BadSample)
    one = test[index]
    assert one.mask.shape == (one.image.height, one.image.width)
    assert one.mask.dtype == bool and not one.mask.any()
    assert one.ignore.sum() == ignored if ignored else one.ignore is None


def test_exif_data_rotate_the_images_of_reasonseg_and_not_those_of_coco(refcocog, reasonseg):
    """LISA's masks are of the rotated image, and COCO's of the stored one."""
    for file in (refcocog.root / IMAGES).iterdir():
        turned(Image.open(file), file)
    assert load_data(f"refcocog:{refcocog.root}", "heldout")[0].mask.any()
    turned(Image.new("RGB", (30, 40)), reasonseg / "val" / "caf\u00e9_0001.jpg")
    one = load_data(f"reasonseg:{reasonseg}/val", "heldout")[0]
    assert one.image.size == (40, 30) and one.mask.shape == (30, 40)


# --------------------------------------------------------------------------------------------------
# Queries and pictures
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["\n", ["star"], "<|a\nb|>", "a\x1bb", "\ud800"], ids=repr)
def test_a_query_that_the_policy_cannot_be_asked_is_refused(query):
    refused(check_query, query).encode("ascii")  # a terminal can print it


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


def test_a_picture_that_cannot_be_used_is_one_line(tmp_path):
    Image.new("I;16", (9, 9)).save(tmp_path / "deep.png")
    Image.new("RGB", (201, 1)).save(tmp_path / "thin.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for name, word in (("deep", "8 bits"), ("thin", "201 x 1"), ("no", "cannot identify")):
        file = tmp_path / f"{name}.png"
        texts = refused(photos.read_picture, str(file)), refused(photos.read_image, file, "command")
        assert all(file.name in text and word in text for text in texts) and "command" in texts[1]
    Image.new("RGB", (200, 1)).save(file)
    assert photos.read_picture(str(file)).size == (200, 1)


def test_shares_of_a_picture_are_no_pixels():
    shares = shape("target", *box(0.2, 0.25, 0.75, 1))
    with pytest.raises(ValueError, match="write pixels"):
        labelme_masks([shares], 640, 480)
    with pytest.raises(ValueError, match="write pixels"):
        coco_mask(shares["points"], 640, 480)
    pixels = shape("target", *box(8, 8, 20, 20))
    assert labelme_masks([pixels, shares], 640, 480)[0].sum() > 13 * 13


def test_a_picture_above_pillows_limit_is_refused_without_a_warning(tmp_path):
    """Pillow warns above its limit, and refuses above twice that. In a process of its own, because
    all warnings are errors here."""
    Image.new("RGB", (33, 1)).save(tmp_path / "a.png")
    code = "import sys, PIL.Image; from plumbing.photos import read_picture;"
    code += "PIL.Image.MAX_IMAGE_PIXELS = 32; read_picture(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *_, last = done.stderr.splitlines()
    assert "UserError" in last and "DecompressionBomb" in last and "89 megapixels" in last

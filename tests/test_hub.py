"""Sets of the Hugging Face hub, on small parquet files in their columns. No network is used."""

import importlib
import io
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from makers import (
    ellipse,
    jpeg,
    make_refcocog,
    picture,
    read_rows,
    refused,
    run,
    serve,
    write_refer,
)
from PIL import Image
from pyarrow import parquet

import samr1_mini
from data import BadSample, RefCOCO
from plumbing import hub
from plumbing.sources import SPLITS, load_data

SIZES = ((40, 30), (24, 36), (32, 32))  # W, H


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def masked_rows() -> list[dict]:
    """Rows of an evaluation set. The last mask is empty."""
    rows = []
    for k, (width, height) in enumerate(SIZES):
        mask = ellipse(width, height, width / 2, height / 3, 9) & (k < 2)
        stored = jpeg(picture(width, height, k))
        row = {"image": {"bytes": stored, "path": f"{k}.jpg"}, "text": f"The thing {k}."}
        row |= {"mask": mask.tolist(), "image_id": f"i{k}", "ann_id": f"a{k}"}
        rows.append(row | {"img_height": height, "img_width": width})
    return rows


def write(folder, rows: list[dict], part: str = "test") -> str:
    """Write a folder that `datasets` takes as a set. Returns its name for --data."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, folder / "data" / f"{part}-00000-of-00001.parquet")
    return f"hub:{folder}"


def test_images_queries_and_masks_are_those_of_the_files(tmp_path):
    """Also if `datasets` wrote them: it keeps its own types in a file, such as Image."""
    rows = masked_rows()
    plain = write(tmp_path / "mail@home", rows)  # @ starts no ROOT here
    written = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "typed").mkdir()
    written.to_parquet(tmp_path / "typed" / "any.parquet")  # one file may have any name
    written.save_to_disk(tmp_path / "saved")
    for spec in (plain, f"hub:{tmp_path}/typed", f"hub:{tmp_path}/saved"):
        found = load_data(spec, "heldout")
        assert len(found) == len(rows)
        for k, (one, row) in enumerate(zip(found, rows, strict=True)):
            assert one.id == f"{Path(spec).name}-{k}-i{k}-a{k}"
            assert one.query == row["text"] and one.ignore is None
            assert one.mask.dtype == bool and one.mask.tolist() == row["mask"]
            stored = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            assert one.image.mode == "RGB" and np.array_equal(one.image, stored)


def test_a_broken_row_is_a_bad_sample_and_the_others_are_read(tmp_path):
    """One set, because opening one takes longer than reading it."""
    changes = [
        {"image": None},
        {"image": {"bytes": jpeg(picture(41, 30, 0)), "path": ""}},
        {"text": "the <|image_pad|> thing"},
        {"mask": [[True] * 40] * 28 + [[True] * 39, [True] * 41]},
        {"mask": [[True] * 40] * 29 + [[None] + [True] * 39]},
        {"mask": [[True] * 30] * 40},
        {"img_width": 41},
        {},
    ]
    rows = [masked_rows()[0] | change for change in changes]
    found = load_data(write(tmp_path / "broken", rows), "heldout")
    for index in range(len(changes) - 1):
        assert f"row {index}" in refused(found.__getitem__, index, kind=BadSample)
    assert found[len(changes) - 1].mask.any()


def test_a_wrong_name_is_one_line(tmp_path, monkeypatch):
    for wrong in ("hub:csv", f"hub:{tmp_path}/nothing"):
        assert "neither a folder nor OWNER/SET" in refused(load_data, wrong, "heldout")
    assert "hub:NAME" in refused(load_data, "hub:", "heldout")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "test.parquet").write_bytes(b"PAR1 no more")
    assert "damaged cannot be opened" in refused(load_data, f"hub:{tmp_path}/damaged", "heldout")
    for part in ("train", "validation"):
        name = write(tmp_path / "parts", masked_rows(), part)
    assert "validation" in refused(load_data, name, "heldout")  # neither is the right one
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(load_data, name, "heldout")
    assert len(load_data("shapes", "heldout"))


def test_no_network_and_an_unknown_name_are_one_line(monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody answers
    assert "set HF_HUB_OFFLINE=1" in refused(load_data, "hub:owner/set", "heldout")
    with serve() as host:
        monkeypatch.setattr(constants, "ENDPOINT", host.url)  # answers 404
        assert "Check its name" in refused(load_data, "hub:owner/set", "heldout") and host.requests


def test_a_set_of_the_other_sort_or_without_a_column_is_refused(tmp_path, refcocog):
    rows = [{k: v for k, v in row.items() if k != "mask"} for row in masked_rows()]
    message = refused(load_data, write(tmp_path / "cut", rows), "heldout")
    assert "lacks mask: its columns are " in message
    assert all(other in message for other in hub.MASKED)
    masked = write(tmp_path / "masked", masked_rows())
    assert "leave @ROOT out" in refused(load_data, f"{masked}@{refcocog.root}", "train")
    message = refused(load_data, masked, "train")
    assert "for eval" in message and "refCOCOg_9k_840@ROOT" in message
    name = write(tmp_path / "set", joined_rows(refcocog), "train")
    assert f"{name}@ROOT" in refused(load_data, name, "heldout")
    message = refused(load_data, f"{name}@{tmp_path}/nowhere", "train")
    assert "instances.json is missing" in message and "tools.fetch refcocog" in message


def joined_rows(made) -> list[dict]:
    """Seg-Zero's training rows for the objects of a miniature RefCOCOg: 840 x 840, no masks."""
    images = {one["id"]: one for one in made.instances["images"]}
    rows = []
    for one in made.instances["annotations"]:
        image = images[one["image_id"]]
        whole = Image.open(io.BytesIO(made.jpegs[image["file_name"]])).convert("RGB")
        row = {"id": f"refcocog_{one['image_id']}_{one['id']}", "problem": f"object {one['id']}"}
        row |= {"solution": '{"bbox": [1, 2, 3, 4]}', "image": {"path": ""}}
        row["image"]["bytes"] = jpeg(whole.resize((840, 840)))
        rows.append(row | {"img_height": image["height"], "img_width": image["width"]})
    return rows


@pytest.fixture
def refcocog(tmp_path):
    return make_refcocog(tmp_path / "root")


def train_set(folder, made, rows: list[dict]) -> str:
    return f"{write(folder, rows, 'train')}@{made.root}"


def test_masks_are_joined_by_annotation_and_have_the_original_size(tmp_path, refcocog):
    """They are those that the reader of REFER's files gives for the same annotation."""
    spec = train_set(tmp_path / "refCOCOg_9k_840", refcocog, joined_rows(refcocog))
    refs = {ref["ref_id"]: ref["ann_id"] for ref in refcocog.refs}
    truth = {}
    for split in SPLITS["refcocog"]:
        for one in RefCOCO("refcocog", refcocog.root, split):
            truth[refs[int(one.id.split("-")[1])]] = one
    found = load_data(spec, "train")
    assert len(found) == len(truth)  # none of the image ids is a multiple of 20
    for one in found:
        key = int(one.id.rsplit("_", 1)[1])
        assert one.query == f"object {key}" and one.ignore is None
        assert np.array_equal(one.mask, truth[key].mask)
        assert one.image.size == truth[key].image.size
        difference = np.abs(np.asarray(one.image, int) - np.asarray(truth[key].image, int))
        assert difference.mean() < 12  # the same picture, resized and compressed twice
    names = [one.id for one in found]
    assert [one.id for one in load_data(spec, "train", samples=3)] == names[:3] != sorted(names)[:3]


def test_rows_without_a_partner_are_left_out_and_counted(tmp_path, refcocog, capsys):
    rows = joined_rows(refcocog)
    others = [rows[0] | {"id": name} for name in ("no number", "refcocog_1_999999", "9" * 5000)]
    spec = train_set(tmp_path / "set", refcocog, rows + others)
    assert len(load_data(spec, "train")) == len(rows)
    assert f"skipped: {len(others)} of {len(rows + others)} rows" in capsys.readouterr().err
    message = refused(load_data, train_set(tmp_path / "alone", refcocog, others), "train")
    assert "instances.json" in message and "'no number'" in message


def test_refers_val_is_held_out_or_else_rows_on_other_images(
    tmp_path, refcocog, monkeypatch, capsys
):
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    found = load_data(spec, "heldout")
    assert isinstance(found, RefCOCO)
    assert found.expressions == load_data(f"refcocog:{refcocog.root}", "heldout").expressions
    refcocog.refs = []
    write_refer(refcocog)
    assert "no row for heldout" in refused(load_data, spec, "heldout")
    monkeypatch.setattr(hub, "EVERY", 41)
    train, heldout = (load_data(spec, split) for split in ("train", "heldout"))
    assert "held out: 1 rows" in capsys.readouterr().err
    assert [one.id for one in heldout] == ["set-refcocog_41_5002"]
    assert len(train) == 9 and not any("_41_" in one.id for one in train)


def test_broken_training_rows_are_bad_samples(tmp_path, refcocog):
    good, empty, *_ = joined_rows(refcocog)
    refcocog.instances["annotations"][1]["segmentation"] = [[3, 3, 3, 3, 3, 3]]
    write_refer(refcocog)
    rows = [good | change for change in ({"problem": ""}, {"img_width": 97}, {"image": None})]
    found = load_data(train_set(tmp_path / "set", refcocog, [*rows, empty]), "train")
    for index in range(4):
        assert "row " in refused(found.__getitem__, index, kind=BadSample)


@pytest.mark.slow
def test_hub_sets_are_trained_on_and_evaluated(tmp_path, refcocog, capsys):
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    quick = "--steps 1 --prompts_per_step 2 --group_size 2"
    run(f"train {quick} --data", spec, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["after"]["n"] == samr1_mini.EVAL_SAMPLES and len(results) == 3
    name = write(tmp_path / "ReasonSeg_test", masked_rows())
    run("eval --data", name, "--out", tmp_path / "eval")
    said = capsys.readouterr().out
    assert "--protocol lisa needs marked ignored pixels" in said
    assert "gIoU 60.2, cIoU 54.3; probably" in said  # the paper's, found by the name of the set
    rows = read_rows(tmp_path / "eval" / "answers.jsonl")
    assert len(rows) == 3 and all("segzero" in row and "lisa" not in row for row in rows)

"""Sets of the Hugging Face hub, on small parquet files in their columns. No network is used."""

import importlib
import io
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from makers import ellipse, jpeg, make_refcocog, picture, serve
from PIL import Image
from pyarrow import parquet

import samr1_mini
from data import BadSample
from plumbing import hub, protocols
from plumbing.photos import RefCOCO, load_data

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
SIZES = ((40, 30), (24, 36), (32, 32))  # W, H


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    hub.join_masks.cache_clear()


def masked_rows() -> list[dict]:
    """Rows of an evaluation set. The last mask is empty."""
    rows = []
    for k, (width, height) in enumerate(SIZES):
        mask = ellipse(width, height, width / 2, height / 3, 9) & (k < 2)
        stored = jpeg(picture(width, height, k, ([(9, 2), (30, 2), (20, 20)],)))
        row = {"image": {"bytes": stored, "path": f"{k}.jpg"}, "text": f"The thing {k}."}
        row |= {"mask": mask.tolist(), "image_id": f"i{k}", "ann_id": f"a{k}"}
        rows.append(row | {"img_height": height, "img_width": width})
    return rows


def write(folder, rows: list[dict], file: str = "data/test-00000-of-00001.parquet", schema=None):
    """Write a folder that `datasets` takes as a set. Returns its name for --data."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), folder / file)
    return f"hub:{folder}"


def error_of(*args) -> str:
    """The one-line error of load_data(*args)."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_data(*args)
    assert not isinstance(error.value, BadSample) and "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# Evaluation sets
# --------------------------------------------------------------------------------------------------


def test_images_queries_and_masks_are_those_of_the_files(tmp_path):
    rows = masked_rows()
    found = load_data(write(tmp_path / "ReasonSeg_val", rows), "heldout")
    assert len(found) == len(rows)
    for k, row in enumerate(rows):
        one = found[k]
        assert one.query == row["text"] and one.ignore is None
        assert one.mask.dtype == bool and one.mask.tolist() == row["mask"]
        assert one.image.size == SIZES[k] and one.image.mode == "RGB"
        stored = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        assert np.array_equal(one.image, stored)
        assert one.id == f"ReasonSeg_val-{k}-i{k}-a{k}"
    assert not found[2].mask.any()


def test_a_set_that_datasets_wrote_itself_is_read_the_same(tmp_path):
    """`datasets` keeps its own types in the file, such as Image. One file may have any name."""
    rows = masked_rows()
    plain = load_data(write(tmp_path / "plain", rows), "heldout")
    types = {"image": datasets.Image(), "text": datasets.Value("string")}
    types |= {"mask": datasets.Sequence(datasets.Sequence(datasets.Value("bool")))}
    types |= {name: datasets.Value("string") for name in ("image_id", "ann_id")}
    types |= {name: datasets.Value("int64") for name in ("img_height", "img_width")}
    (tmp_path / "typed").mkdir()
    typed = datasets.Dataset.from_list(rows, features=datasets.Features(types))
    typed.to_parquet(tmp_path / "typed" / "any.parquet")
    found = load_data(f"hub:{tmp_path}/typed", "heldout")
    for one, other in zip(plain, found, strict=True):
        assert np.array_equal(one.mask, other.mask) and np.array_equal(one.image, other.image)


@pytest.mark.parametrize("column", hub.MASKED)
def test_a_set_without_a_column_is_refused_with_the_columns_it_has(column, tmp_path):
    rows = [{k: v for k, v in row.items() if k != column} for row in masked_rows()]
    message = error_of(write(tmp_path / "cut", rows), "heldout")
    assert f"lacks {column}:" in message
    assert ", ".join(sorted(set(hub.MASKED) - {column})) in message


def test_masks_that_are_not_bool_are_refused(tmp_path):
    rows = [row | {"mask": np.array(row["mask"], int).tolist()} for row in masked_rows()]
    assert "list of lists of bool" in error_of(write(tmp_path / "ints", rows), "heldout")


BROKEN = {
    "no image": {"image": None},
    "no bytes": {"image": {"bytes": None, "path": "x.jpg"}},
    "image of another kind": {"image": {"bytes": b"GIF89a" + bytes(99), "path": ""}},
    "cut image": {"image": {"bytes": masked_rows()[0]["image"]["bytes"][:400], "path": ""}},
    "image of another size": {"image": {"bytes": jpeg(picture(41, 30, 0)), "path": ""}},
    "thin image": {"image": {"bytes": jpeg(picture(900, 2, 0)), "path": ""}},
    "no query": {"text": None},
    "empty query": {"text": "  "},
    "special token": {"text": "the <|image_pad|> thing"},
    "no mask": {"mask": None},
    "no lines": {"mask": []},
    "ragged mask": {"mask": [[True] * 40] * 29 + [[True] * 39]},
    "missing line": {"mask": [[True] * 40] * 29 + [None]},
    "missing pixel": {"mask": [[True] * 40] * 29 + [[None] + [True] * 39]},
    "mask of another size": {"mask": [[True] * 40] * 29},
    "mask of the transposed size": {"mask": [[True] * 30] * 40},
    "other width": {"img_width": 41},
    "no height": {"img_height": None},
}


def test_a_broken_row_is_a_bad_sample_and_the_others_are_read(tmp_path):
    """One set, because opening one takes longer than reading it."""
    rows = [masked_rows()[0] | change for change in BROKEN.values()] + [masked_rows()[0]]
    found = load_data(write(tmp_path / "broken", rows), "heldout")
    for index, name in enumerate(BROKEN):
        with pytest.raises(BadSample) as error:
            found[index]
        message = str(error.value)
        assert f"row {index} " in message and "\n" not in message, name
    assert found[len(BROKEN)].mask.any()


def test_exif_rotation_is_applied_as_datasets_does(tmp_path):
    row, exif, buffer = masked_rows()[0], Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    picture(30, 40, 0).save(buffer, "JPEG", exif=exif)
    row["image"] = {"bytes": buffer.getvalue(), "path": ""}
    name = write(tmp_path / "turned", [row])
    shown = datasets.Image().decode_example(row["image"])
    assert np.array_equal(load_data(name, "heldout")[0].image, shown)


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def test_a_wrong_name_is_one_line(tmp_path):
    for wrong in ("hub:", "hub:csv", f"hub:{tmp_path}/nothing", "hub:a/b/c", "hub:../x"):
        assert wrong.removeprefix("hub:") in error_of(wrong, "heldout")
    assert "hub:NAME" in error_of("hub:", "heldout")
    (tmp_path / "empty").mkdir()
    assert "empty" in error_of(f"hub:{tmp_path}/empty", "heldout")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "test.parquet").write_bytes(b"PAR1 no more")
    assert "damaged" in error_of(f"hub:{tmp_path}/damaged", "heldout")


def test_a_set_with_several_other_splits_is_refused(tmp_path):
    for part in ("train", "validation"):
        name = write(tmp_path / "parts", masked_rows(), f"data/{part}-00000-of-00001.parquet")
    assert "no split test: it has train, validation" in error_of(name, "heldout")


def test_no_network_and_an_unknown_name_are_one_line(monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody answers
    assert "HF_HUB_OFFLINE=1" in error_of("hub:owner/set", "heldout")
    with serve() as host:
        monkeypatch.setattr(constants, "ENDPOINT", host.url)  # answers 404
        message = error_of("hub:owner/set", "heldout")
        assert "owner/set" in message and host.requests


def test_without_datasets_the_package_is_asked_for(tmp_path, monkeypatch):
    name = write(tmp_path / "set", masked_rows())
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of(name, "heldout")
    assert len(load_data("shapes", "heldout"))


def test_an_evaluation_set_is_not_trained_on(tmp_path):
    name = write(tmp_path / "set", masked_rows())
    for spec in (name, "hub:Ricky06662/ReasonSeg_test"):
        message = error_of(spec, "train")
        assert "for eval" in message and "refCOCOg_9k_840@ROOT" in message


# --------------------------------------------------------------------------------------------------
# Training sets
# --------------------------------------------------------------------------------------------------


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
    return f"{write(folder, rows, 'data/train-00000-of-00001.parquet')}@{made.root}"


def test_masks_are_joined_by_annotation_and_have_the_original_size(tmp_path, refcocog):
    """They are those that the reader of REFER's files gives for the same annotation."""
    made = refcocog
    spec = train_set(tmp_path / "refCOCOg_9k_840", made, joined_rows(made))
    found = load_data(spec, "train")
    truth, refs = {}, {ref["ref_id"]: ref["ann_id"] for ref in made.refs}
    for split in ("train", "val", "test"):
        for one in RefCOCO("refcocog", made.root, split):
            truth[refs[int(one.id.split("-")[1])]] = one
    kept = {int(one.id.rsplit("_", 1)[1]): one for one in found}
    ids = {one["id"]: one["image_id"] for one in made.instances["annotations"]}
    assert set(kept) == {key for key, image in ids.items() if image % hub.EVERY}
    for key, one in kept.items():
        assert one.query == f"object {key}" and one.ignore is None
        assert np.array_equal(one.mask, truth[key].mask)
        assert one.image.size == truth[key].image.size
        difference = np.abs(np.asarray(one.image, int) - np.asarray(truth[key].image, int))
        assert difference.mean() < 12  # the same picture, resized and compressed twice


def test_the_subset_depends_on_its_seed_only(tmp_path, refcocog):
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    ids = [[one.id for one in load_data(spec, "train", seed, 4)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 4
    assert [one.id for one in load_data(spec, "train", 0, 3)] == ids[0][:3]


def test_rows_without_a_partner_are_left_out_and_counted_once(tmp_path, refcocog, capsys):
    rows = joined_rows(refcocog)
    ids = ["no number", "refcocog_1_999999", "9" * 5000, ""]
    rows += [rows[0] | {"id": name} for name in ids]
    spec = train_set(tmp_path / "set", refcocog, rows)
    whole = len(load_data(spec, "train"))
    load_data(spec, "heldout")
    assert capsys.readouterr().err.count(f"skipped: {len(ids)} of {len(rows)} rows") == 1
    assert whole == sum(
        one["image_id"] % hub.EVERY > 0 for one in refcocog.instances["annotations"]
    )
    alone = train_set(tmp_path / "alone", refcocog, [row | {"id": "x"} for row in rows])
    assert "instances.json" in error_of(alone, "train") and "'x'" in error_of(alone, "train")


def test_refers_val_is_held_out_if_it_is_there(tmp_path, refcocog):
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    found = load_data(spec, "heldout")
    assert isinstance(found, RefCOCO)
    expected = load_data(f"refcocog:{refcocog.root}", "heldout").expressions
    assert found.expressions == expected


def test_without_val_rows_on_other_images_are_held_out(tmp_path, refcocog, capsys):
    """Of miniature RefCOCOg's image ids 25, 25, 41, ..., 153 none is a multiple of 20."""
    (refcocog.root / "refcocog" / "refs(umd).p").unlink()
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    assert "no row for heldout" in error_of(spec, "heldout")
    moved = {41: 60, 57: 80}  # image 60 and 80 are held out
    for one in [*refcocog.instances["images"], *refcocog.instances["annotations"]]:
        key = ("file_name" in one and "id") or "image_id"
        one[key] = moved.get(one[key], one[key])
    file = refcocog.root / "refcocog" / "instances.json"
    file.write_text(json.dumps(refcocog.instances))
    hub.join_masks.cache_clear()
    train, heldout = load_data(spec, "train"), load_data(spec, "heldout")
    assert "held out: 2 rows" in capsys.readouterr().err
    owner = {one["id"]: one["image_id"] for one in refcocog.instances["annotations"]}
    images = [{owner[int(one.id.rsplit("_", 1)[1])] for one in part} for part in (train, heldout)]
    assert images[1] == {60, 80} and not images[0] & images[1]
    assert len(train) + len(heldout) == len(owner)


def test_a_training_set_and_its_root_are_asked_for(tmp_path, refcocog):
    rows = joined_rows(refcocog)
    name = write(tmp_path / "set", rows, "data/train-00000-of-00001.parquet")
    assert f"{name}@ROOT" in error_of(name, "heldout")
    assert "leave @ROOT out" in error_of(
        write(tmp_path / "masked", masked_rows()) + f"@{refcocog.root}", "heldout"
    )
    message = error_of(f"{name}@{tmp_path}/nowhere", "train")
    assert "instances.json is missing" in message and "tools.fetch refcocog" in message
    for column in hub.JOINED:
        cut = [{k: v for k, v in row.items() if k != column} for row in rows]
        message = error_of(train_set(tmp_path / f"no-{column}", refcocog, cut), "train")
        assert f"lacks {column}:" in message and "solution" in message
    for content in ("{", "[]", '{"images": [], "annotations": [1]}'):
        (refcocog.root / "refcocog" / "instances.json").write_text(content)
        assert "Delete it" in error_of(f"{name}@{refcocog.root}", "train")


def test_broken_training_rows_are_bad_samples(tmp_path, refcocog):
    good = joined_rows(refcocog)[0]
    changes = [{"problem": ""}, {"img_width": 97}, {"image": None}, {"img_height": None}]
    spec = train_set(tmp_path / "set", refcocog, [good | change for change in changes])
    found = load_data(spec, "train")
    for index in range(len(changes)):
        with pytest.raises(BadSample, match="row \\d cannot be used"):
            found[index]


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path):
    name = write(tmp_path / "mail@home", masked_rows())
    assert len(load_data(name, "heldout")) == len(SIZES)


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def test_eval_of_a_hub_set_has_one_protocol_and_says_so(tmp_path, capsys):
    name = write(tmp_path / "ReasonSeg_test", masked_rows())
    for flags in ("", "--protocol segzero"):
        out = tmp_path / f"eval{len(flags)}"
        samr1_mini.main([*f"eval --out {out} --data {name} {flags}".split()])
        said = capsys.readouterr().out
        assert ("--protocol lisa needs marked ignored pixels" in said) == (not flags)
        assert "--protocol segzero (the table): gIoU" in said and "lisa:" not in said
        assert "gIoU 60.2, cIoU 54.3; probably" in said
        (base, ceiling) = json.loads((out / "eval.json").read_text()).values()
        for row in (base, ceiling):
            assert row["protocol"] == "segzero" and row["segzero_giou"] == row["giou"]
            assert not [column for column in row if column.startswith("lisa")]
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and all("segzero" in row and "lisa" not in row for row in rows)


@pytest.mark.slow
def test_training_on_a_hub_set_and_refusing_one(tmp_path, refcocog, capsys):
    spec = train_set(tmp_path / "set", refcocog, joined_rows(refcocog))
    quick = "--steps 2 --prompts_per_step 2 --group_size 2 --eval_samples 2".split()
    samr1_mini.main(["train", *quick, "--data", spec, "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["after"]["n"] == 2 and len(results) == 3
    with pytest.raises(SystemExit) as stopped:
        samr1_mini.main(["train", "--data", "hub:Ricky06662/ReasonSeg_test"])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.fullmatch(r"samr1_mini.py: --data .*", lines[-1])


def test_the_papers_results_are_found_by_the_name_of_a_set():
    for name, expected in {
        "ReasonSeg_val": "gIoU 64.0, cIoU 55.8",
        "ReasonSeg_test": "gIoU 60.2, cIoU 54.3",
        "refcoco_testA": "cIoU 79.2",
        "refcocoplus_testA": "cIoU 74.7",
        "refcocog_test": "gIoU 75.4, cIoU 73.1",
        "refcocog_val": "",
        "refCOCOg_9k_840@data": "",
    }.items():
        assert protocols.paper_results(f"hub:Ricky06662/{name}") == expected

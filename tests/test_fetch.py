"""Tests of tools/fetch.py against a web server on this machine."""

import hashlib
import io
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from makers import IMAGES, make_refcocog, refused, serve

from plumbing.sources import load_data
from tools import fetch

REPO = Path(fetch.__file__).parent.parent


@pytest.fixture
def host(monkeypatch):
    """A web server in place of the real ones.

    /a.zip and /b.zip are the mirrors, /coco/ has the images and /sam/ the checkpoints.
    """
    with serve() as server:
        mirrors = f"{server.url}/a.zip", f"{server.url}/b.zip"
        monkeypatch.setattr(fetch, "ARCHIVES", dict.fromkeys(fetch.ARCHIVES, mirrors))
        monkeypatch.setattr(fetch, "COCO_URL", f"{server.url}/coco")
        monkeypatch.setattr(fetch, "SAM_URL", f"{server.url}/sam")
        yield server


@pytest.fixture
def published(tmp_path, host):
    """A small RefCOCOg on the server, and not yet in its `root`. The archive is a hostile one."""
    made = make_refcocog(tmp_path / "root")
    host.files |= {f"/coco/{name}": content for name, content in made.jpegs.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("../../refs(umd).p", made.refs_file.read_bytes())
        bundle.writestr("/x/y/instances.json", made.instances_file.read_bytes())
        bundle.writestr("../escaped.txt", b"")
        bundle.writestr(f"{tmp_path}/escaped.txt", b"")
    host.files["/a.zip"] = host.files["/b.zip"] = buffer.getvalue()
    shutil.rmtree(made.root)
    return made


def run(*args) -> None:
    fetch.main([*map(str, args)])


def images_of(made, split: str) -> set[str]:
    names = {image["id"]: image["file_name"] for image in made.instances["images"]}
    return {names[ref["image_id"]] for ref in made.refs if ref["split"] == split}


def test_fetch_downloads_what_training_needs_and_nothing_else(
    published, host, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fetch, "EVAL_SAMPLES", 1)
    root = published.root
    command = ("refcocog", "--out", root, "--samples", 2)
    run(*command)
    out = capsys.readouterr().out
    flags = f"--data 'refcocog:{root}' --train_samples 2"
    assert f"{host.url}/a.zip" in out and "MB" in out and flags in out
    train = load_data(f"refcocog:{root}", "train", samples=2)
    heldout = load_data(f"refcocog:{root}", "heldout")
    assert len(train) == 2
    needed = {one.image[0] for one in train.expressions + heldout.expressions[:1]}
    assert needed < {one.image[0] for one in train.expressions + heldout.expressions}
    assert host.count() == {"/a.zip": 1, **{f"/coco/{name}": 1 for name in needed}}
    assert {file.name for file in (root / IMAGES).iterdir()} == needed
    unpacked = {file for file in tmp_path.rglob("*.*") if IMAGES.name not in file.parts}
    assert unpacked == {published.refs_file, published.instances_file}

    host.requests.clear()
    run(*command)  # again: everything is there
    assert host.requests == []
    run("refcocog", "--out", root, "--split", "val")
    assert f"--data 'refcocog:{root}/val'\n" in capsys.readouterr().out
    rest = images_of(published, "val") - needed
    assert rest and host.count() == {f"/coco/{name}": 1 for name in rest}


def test_what_could_not_be_downloaded_is_by_the_same_command(published, host):
    root, command = published.root, ("refcocog", "--out", published.root, "--split", "train")
    names = sorted(images_of(published, "train"))
    host.faults = {f"/coco/{names[0]}": ["drop"], f"/coco/{names[1]}": [404]}
    host.files[f"/coco/{names[2]}"] = b"<html>log in to this network</html>"
    message = refused(run, *command)
    assert f"{names[1]}: " in message and "404" in message and "run the same command" in message
    assert host.count()[f"/coco/{names[0]}"] == 2 and host.count()[f"/coco/{names[1]}"] == 1
    assert {file.name for file in (root / IMAGES).glob("*.jpg")} == {*names} - {*names[1:3]}

    host.files[f"/coco/{names[2]}"] = published.jpegs[names[2]]
    host.requests.clear()
    run(*command)
    assert host.count() == {f"/coco/{names[1]}": 1, f"/coco/{names[2]}": 1}
    for name in names:
        assert (root / IMAGES / name).read_bytes() == published.jpegs[name]
    assert not list(root.rglob("*.part"))


def test_fetch_stops_early_if_the_server_is_down(published, host, monkeypatch):
    monkeypatch.setattr(fetch, "GIVE_UP", 2)
    host.pause = 0.2
    host.files = {"/a.zip": host.files["/a.zip"]}
    command = ("refcocog", "--out", published.root, "--split", "train", "--jobs", 1)
    assert "images are missing" in refused(run, *command)
    assert len(host.requests) <= 1 + 2 + 1 < len(images_of(published, "train"))


def test_the_second_mirror_is_used_if_the_first_fails(published, host, capsys):
    """The first archive's entry has a wrong checksum."""
    damaged = bytearray(host.files["/a.zip"])
    damaged[60] ^= 255
    host.files["/a.zip"] = bytes(damaged)
    run("refcocog", "--out", published.root, "--split", "test")
    assert host.count()["/b.zip"] == 1 and "cannot be unpacked" in capsys.readouterr().err
    assert not list((published.root / "refcocog").glob("*.zip*"))
    shutil.rmtree(published.root)
    del host.files["/a.zip"], host.files["/b.zip"]
    assert "no mirror" in refused(run, "refcocog", "--out", published.root)


def test_a_checkpoint_download_resumes_and_is_checked(tmp_path, host, capsys, monkeypatch):
    checkpoint = random.Random(0).randbytes(700_000)
    monkeypatch.setattr(fetch, "SAM_FILES", {"vit_b": ("b.pth", len(checkpoint))})
    monkeypatch.setattr(fetch, "SAM_SHA256", {"vit_b": hashlib.sha256(checkpoint).hexdigest()})
    host.files["/sam/b.pth"] = checkpoint
    command, file = ("sam", "--model", "vit_b", "--out", tmp_path), tmp_path / "b.pth"
    (tmp_path / "b.pth.part").write_bytes(checkpoint[:300_000])  # of an earlier run
    run(*command)
    assert host.requests == [("/sam/b.pth", "bytes=300000-")] and file.read_bytes() == checkpoint
    assert f"--sam vit_b:{file}" in capsys.readouterr().out
    run(*command)
    assert len(host.requests) == 1 and list(tmp_path.iterdir()) == [file]

    other = b"x" + checkpoint[1:]
    file.write_bytes(other)
    assert "SHA-256" in refused(run, *command)
    file.unlink()
    host.files["/sam/b.pth"] = other
    assert "SHA-256" in refused(run, *command)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_was_downloaded(published, host, monkeypatch):
    def interrupted(results, **_):
        yield next(results)
        raise KeyboardInterrupt

    host.pause = 0.1
    command = ("refcocog", "--out", published.root, "--split", "train", "--jobs", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "tqdm", interrupted)
        run(*command)
    needed = images_of(published, "train")
    complete = {file.name for file in published.root.rglob("*.jpg")}
    assert 0 < len(complete) < len(needed)
    host.requests.clear()
    run(*command)
    assert host.count() == {f"/coco/{name}": 1 for name in needed - complete}


def test_a_wrong_command_is_refused(tmp_path, capsys):
    assert "--samples" in refused(run, "refcoco", "--samples", 0, "--out", tmp_path)
    assert "name another folder" in refused(run, "refcoco", "--out", __file__)
    with pytest.raises(SystemExit):
        run("refcoco", "--split", "test", "--out", tmp_path)
    assert "testA" in capsys.readouterr().err


def test_the_sources_are_explained_as_a_user_types_it():
    command = [sys.executable, "-m", "tools.fetch", "reasonseg"]
    out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "github.com/dvlab-research/LISA" in out and "ROOT/val" in out and "779" in out

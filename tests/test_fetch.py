"""Tests of tools/fetch.py against a web server on this machine that fails on demand."""

import hashlib
import io
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from makers import IMAGES, jpeg, make_reasonseg, make_refcocog, picture, serve

from plumbing.photos import RefCOCO, load_data, read_image
from tools import fetch

REPO = Path(fetch.__file__).parent.parent
# pycocotools 2.0.11 under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


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
        monkeypatch.setattr(fetch, "PAUSE", 0.01)
        monkeypatch.setattr(fetch, "TIMEOUT", 0.5)
        yield server


def zipped(folder: Path | None, *more: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    """A zip archive of `more` and the files of a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in more:
            bundle.writestr(name, content)
        for file in sorted(folder.iterdir()) if folder else ():
            bundle.write(file, f"{folder.name}/{file.name}")
    return buffer.getvalue()


@pytest.fixture
def published(tmp_path, host):
    """A small RefCOCOg on the server. Its `root` does not exist yet."""
    made = make_refcocog(tmp_path / "published")
    host.files |= {f"/coco/{name}": content for name, content in made.jpegs.items()}
    host.files["/a.zip"] = host.files["/b.zip"] = zipped(tmp_path / "published" / "refcocog")
    shutil.rmtree(tmp_path / "published")
    made.root = tmp_path / "root"
    return made


def run(*args) -> int:
    return fetch.main([*map(str, args)])


def images_of(made, split: str) -> set[str]:
    names = {image["id"]: image["file_name"] for image in made.instances["images"]}
    return {names[ref["image_id"]] for ref in made.refs if ref["split"] == split}


def one_line(error) -> None:
    assert str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Which images
# --------------------------------------------------------------------------------------------------


def test_fetch_downloads_what_training_needs_and_nothing_else(published, host, capsys):
    root = published.root
    command = ("refcocog", "--out", root, "--samples", 2, "--seed", 3, "--heldout", 1)
    assert run(*command) == 0
    out = capsys.readouterr().out
    assert f"{host.url}/a.zip" in out and "MB" in out
    assert "train: 2 expressions" in out and "val: 1 expressions" in out
    options = "--train_samples 2 --data_seed 3 --eval_samples 1"
    assert f"python samr1_mini.py train --data 'refcocog:{root}' {options}\n" in out
    train = load_data(f"refcocog:{root}", "train", 3, 2)
    heldout = load_data(f"refcocog:{root}", "heldout")
    assert len(train) == 2 and all(train[i].mask.any() for i in range(2))
    assert heldout[0].mask.any()
    val = RefCOCO("refcocog", root, "val")
    assert [one.id for one in heldout.expressions] == [one.id for one in val.expressions]
    needed = {one.image[0] for one in train.expressions + heldout.expressions[:1]}
    assert needed < {one.image[0] for one in train.expressions + heldout.expressions}
    assert host.count() == {"/a.zip": 1, **{f"/coco/{name}": 1 for name in needed}}
    assert {file.name for file in (root / IMAGES).iterdir()} == needed
    files = sorted(file.name for file in (root / "refcocog").iterdir())
    assert files == ["instances.json", "refs(umd).p"]

    host.requests.clear()
    assert run(*command) == 0  # again: everything is there
    assert host.requests == []
    assert run("refcocog", "--out", root, "--split", "val", "--samples", 1) == 0
    assert f"eval --data 'refcocog:{root}/val'\n" in capsys.readouterr().out
    rest = images_of(published, "val") - needed
    assert host.count() == {f"/coco/{name}": 1 for name in rest} and len(host.requests) == 1
    assert all(load_data(f"refcocog:{root}", "heldout")[i].mask.any() for i in range(2))


@pytest.mark.parametrize(
    "options, splits, message",
    [
        ((), ("train", "val"), "complete. Next: python samr1_mini.py train"),
        (("--heldout", 0), ("train",), "complete\n"),  # this is not enough for a training run
        (("--split", "train"), ("train",), "complete\n"),
        (("--split", "test"), ("test",), "complete. Next: python samr1_mini.py eval"),
    ],
)
def test_an_explicit_split_is_downloaded_alone(published, host, capsys, options, splits, message):
    assert run("refcocog", "--out", published.root, *options) == 0
    needed = set.union(*(images_of(published, split) for split in splits))
    assert host.count() == {"/a.zip": 1, **{f"/coco/{name}": 1 for name in needed}}
    assert message in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Failures of the network
# --------------------------------------------------------------------------------------------------


def test_fetch_resumes_after_an_interruption(published, host, capsys):
    root, train = published.root, ("refcocog", "--out", published.root, "--split", "train")
    names = sorted(images_of(published, "train"))
    host.faults = {f"/coco/{names[0]}": ["drop"] * 4, f"/coco/{names[1]}": [404]}
    assert run(*train) == 1
    err = capsys.readouterr().err
    assert "2 images" in err and "same command again" in err and "Traceback" not in err
    assert "404" in err and names[0] in err
    assert host.count()[f"/coco/{names[1]}"] == 1  # a refused request is not repeated
    assert host.count()[f"/coco/{names[0]}"] == fetch.TRIES
    part = root / IMAGES / f"{names[0]}.part"
    size = part.stat().st_size
    assert 0 < size < len(published.jpegs[names[0]]) and not (root / IMAGES / names[0]).exists()
    (root / IMAGES / names[2]).write_bytes(published.jpegs[names[2]][:700])  # a broken file

    host.requests.clear()
    assert run(*train) == 0
    assert len(host.requests) == 3 and dict(host.requests) == {
        f"/coco/{names[0]}": f"bytes={size}-",
        f"/coco/{names[1]}": None,
        f"/coco/{names[2]}": None,
    }
    for name in names:
        assert (root / IMAGES / name).read_bytes() == published.jpegs[name]
    assert not list(root.rglob("*.part"))


FAULTS = [500, 503, 429, 408, "drop", "more", "less", "stall", "html", "whole", "/moved"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("position", ["start", "half way"])
def test_a_download_survives_every_single_fault(tmp_path, host, fault, position):
    content = jpeg(picture(90, 70, 1))
    host.files = {"/coco/x.jpg": content, "/moved": content}
    faults = ["drop", fault] if position == "half way" else [fault, "drop"]
    host.faults = {"/coco/x.jpg": faults}
    file = tmp_path / "x.jpg"

    def check(part: Path):
        read_image(part, "", (90, 70))

    assert fetch.download(f"{host.url}/coco/x.jpg", file, check, 2**20) == ""
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]
    if fault == "whole":  # half way, the whole file replaces its first half
        assert len(host.requests) == (2 if position == "half way" else 1)


@pytest.mark.parametrize(
    "fault, word",
    [("html", "cannot"), ("less", "cannot"), (503, "HTTP 503"), ("endless", "larger")],
)
def test_a_fault_that_stays_is_reported_and_leaves_no_file(tmp_path, host, fault, word):
    host.files["/x.jpg"] = jpeg(picture(90, 70, 1))
    host.faults["/x.jpg"] = [fault] * 9

    def check(part: Path):
        read_image(part, "", (90, 70))

    reason = fetch.download(f"{host.url}/x.jpg", tmp_path / "x.jpg", check, 2**21)
    assert word in reason and "\n" not in reason and len(host.requests) == fetch.TRIES
    assert list(tmp_path.iterdir()) == []


def test_pauses_between_attempts_double(tmp_path, host, monkeypatch):
    pauses = []
    monkeypatch.setattr(fetch, "PAUSE", 1.0)
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    host.files["/x"] = b"x"
    host.faults["/x"] = [500] * 9
    fetch.download(f"{host.url}/x", tmp_path / "x", lambda part: None, 99)
    assert [p for p in pauses if p] == [1, 2, 4]


def test_fetch_stops_early_if_the_server_is_down(published, host, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "GIVE_UP", 3)
    host.files = {"/a.zip": host.files["/a.zip"]}
    command = ("refcocog", "--out", published.root, "--split", "train", "--jobs", 1)
    assert run(*command) == 1
    assert len(host.requests) <= 1 + 3 + 1
    assert "5 images are missing" in capsys.readouterr().err
    host.files |= {f"/coco/{name}": content for name, content in published.jpegs.items()}
    assert run(*command) == 0


def test_the_number_of_connections_is_limited(published, host):
    host.pause = 0.1
    assert run("refcocog", "--out", published.root, "--jobs", 2) == 0
    assert host.most == 2


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(tmp_path, host, monkeypatch):
    host.files["/x"] = bytes(4000)
    host.pause = 0.3
    assert fetch.download(f"{host.url}/x", tmp_path / "x", lambda part: None, 4000) == ""
    host.pause = 0.8  # longer than TIMEOUT
    monkeypatch.setattr(fetch, "TRIES", 2)
    start = time.monotonic()
    reason = fetch.download(f"{host.url}/x", tmp_path / "y", lambda part: None, 4000)
    assert "timed out" in reason and time.monotonic() - start < 3


def test_the_second_mirror_is_used_if_the_first_fails(published, host, capsys):
    host.files["/a.zip"] = b"PK not a zip file"
    assert run("refcocog", "--out", published.root, "--split", "test") == 0
    assert host.count()["/b.zip"] == 1 and "a.zip" in capsys.readouterr().err
    shutil.rmtree(published.root)
    del host.files["/a.zip"], host.files["/b.zip"]
    assert run("refcocog", "--out", published.root) == 1
    assert "no mirror" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------


def test_unpacking_writes_nothing_outside_the_folder(tmp_path, published, host, capsys):
    valid = zipfile.ZipFile(io.BytesIO(host.files["/b.zip"]))
    refs, instances = valid.read("refcocog/refs(umd).p"), valid.read("refcocog/instances.json")
    root, outside = published.root, tmp_path.parent / "escaped-absolute.txt"
    entries = [("../escaped.txt", b"1"), (str(outside), b"1"), ("refcocog/../../escaped.txt", b"1")]
    entries += [("../../refs(umd).p", refs), ("/x/y/instances.json", instances)]
    host.files["/a.zip"] = zipped(None, *entries)
    assert run("refcocog", "--out", root) == 0  # both files are extracted to where they belong
    assert (root / "refcocog" / "refs(umd).p").read_bytes() == refs
    assert not list(tmp_path.rglob("escaped*")) and not outside.exists()
    assert not (tmp_path / "refs(umd).p").exists()
    assert not (tmp_path.parent / "refs(umd).p").exists()

    shutil.rmtree(root)
    secret = tmp_path / "secret.json"
    secret.write_bytes(instances)
    link = zipfile.ZipInfo("refcocog/instances.json")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    archive = zipped(None, ("refcocog/refs(umd).p", refs), (link, str(secret).encode()))
    host.files["/a.zip"] = host.files["/b.zip"] = archive
    assert run("refcocog", "--out", root) == 2
    assert not (root / "refcocog" / "instances.json").is_symlink()
    assert "instances.json" in capsys.readouterr().err


def test_archives_that_cannot_be_unpacked_are_refused(tmp_path, monkeypatch):
    wanted = [tmp_path / "out" / "refs(umd).p", tmp_path / "out" / "instances.json"]
    (tmp_path / "out").mkdir()
    pair = [("r/refs(umd).p", b"r" * 5000), ("r/instances.json", b"i" * 5000)]
    valid, part = zipped(None, *pair), tmp_path / "a.zip"
    broken = bytearray(valid)
    broken[45] ^= 255
    encrypted = bytearray(valid)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = -1
        while (position := encrypted.find(signature, position + 1)) >= 0:
            encrypted[position + offset] |= 1
    for content in (b"", valid[:-40], bytes(broken), bytes(encrypted), zipped(None, pair[0])):
        part.write_bytes(content)
        with pytest.raises(ValueError) as error:
            fetch.unpack(part, wanted)
        one_line(error)
        assert not wanted[1].exists()
    part.write_bytes(valid)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "MAX_ARCHIVE", 4000)
        with pytest.raises(ValueError):
            fetch.unpack(part, wanted)
    fetch.unpack(part, wanted)
    assert wanted[1].read_bytes() == b"i" * 5000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["STORED", "DEFLATED", "BZIP2", "LZMA"])
def test_any_flipped_bit_of_an_archive_is_noticed_or_has_no_effect(tmp_path, method):
    """An OSError would mean a full disk, and the damaged archive would be kept."""
    wanted = {tmp_path / "refs(umd).p": b"refs" * 9, tmp_path / "instances.json": b'{"a": [1, 2]}'}
    part, buffer = tmp_path / "a.zip", io.BytesIO()
    with zipfile.ZipFile(buffer, "w", getattr(zipfile, f"ZIP_{method}")) as bundle:
        for file, content in wanted.items():
            bundle.writestr(f"r/{file.name}", content)
    valid, refused = buffer.getvalue(), 0
    for bit in range(8 * len(valid)):
        damaged = bytearray(valid)
        damaged[bit // 8] ^= 1 << bit % 8
        part.write_bytes(damaged)
        for file in wanted:
            file.unlink(missing_ok=True)
        try:
            fetch.unpack(part, list(wanted))
        except ValueError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), bit
            continue
        assert {file: file.read_bytes() for file in wanted} == wanted, bit
    assert refused > 4 * len(valid)


def test_a_damaged_archive_is_deleted_and_fetched_again(published, host, capsys):
    damaged = bytearray(host.files["/a.zip"])
    with zipfile.ZipFile(io.BytesIO(damaged)) as bundle:
        directory = bundle.start_dir
    damaged[directory + 42 + 3] ^= 0x80  # the offset of a file: before the archive's beginning
    host.files["/a.zip"] = bytes(damaged)
    assert run("refcocog", "--out", published.root) == 0
    assert "not downloaded" in capsys.readouterr().err and host.count()["/b.zip"] == 1
    assert not list((published.root / "refcocog").glob("*.zip*"))
    assert not list((published.root / "refcocog").glob("*.part"))


# --------------------------------------------------------------------------------------------------
# SAM and ReasonSeg
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(host, monkeypatch) -> bytes:
    """A small vit_b on the server."""
    content = random.Random(0).randbytes(700_000)
    entry = ("b.pth", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "SAM_FILES", {"vit_b": entry})
    host.files["/sam/b.pth"] = content
    return content


def test_a_checkpoint_download_resumes(tmp_path, host, capsys, checkpoint):
    command, file = ("sam", "--model", "vit_b", "--out", tmp_path), tmp_path / "b.pth"
    part = tmp_path / "b.pth.part"
    host.faults["/sam/b.pth"] = ["drop"] * 4
    assert run(*command) == 1
    assert "resumes" in capsys.readouterr().err and not file.exists()
    size = part.stat().st_size
    assert size > 600_000  # every attempt resumed at the end of the one before
    host.requests.clear()
    assert run(*command) == 0
    assert host.requests == [("/sam/b.pth", f"bytes={size}-")] and file.read_bytes() == checkpoint
    assert f"--sam vit_b:{file}" in capsys.readouterr().out
    assert run(*command) == 0 and len(host.requests) == 1

    file.unlink()  # as if interrupted between the last byte and the check
    part.write_bytes(checkpoint)
    assert run(*command) == 0 and file.read_bytes() == checkpoint


def test_a_checkpoint_with_another_sha256_is_refused(tmp_path, host, capsys, checkpoint):
    command, file = ("sam", "--model", "vit_b", "--out", tmp_path), tmp_path / "b.pth"
    file.write_bytes(b"x" + checkpoint[1:])
    assert run(*command) == 2
    assert "SHA-256" in capsys.readouterr().err
    file.unlink()
    host.files["/sam/b.pth"] = b"x" + checkpoint[1:]
    assert run(*command) == 1 and list(tmp_path.iterdir()) == []
    assert "SHA-256" in capsys.readouterr().err


def test_the_addresses_of_the_real_servers():
    """The tests cannot use the real servers, so this only compares their addresses."""
    for name, urls in fetch.ARCHIVES.items():
        assert len(urls) == 2
        assert all(url.startswith("https://") and url.endswith(f"/{name}.zip") for url in urls)
        assert urls[0].startswith("https://web.archive.org/web/20220413") and urls[1] in urls[0]
    assert {name: file for name, (file, _, _) in fetch.SAM_FILES.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
    }
    assert all(len(digest) == 64 for _, _, digest in fetch.SAM_FILES.values())


def test_reasonseg_is_explained(tmp_path, capsys):
    assert run("reasonseg") == 0
    out = capsys.readouterr().out
    assert "github.com/dvlab-research/LISA" in out and "ROOT/val" in out and "779" in out
    assert run("reasonseg", "--out", tmp_path) == 1
    assert "Google Drive" in capsys.readouterr().out
    make_reasonseg(tmp_path, ("val",))
    assert run("reasonseg", "--out", tmp_path) == 0 and "5 of val" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line(published, host, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.os, "replace", full)
    assert run("refcocog", "--out", published.root) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err


def test_ctrl_c_is_one_line_and_keeps_what_was_downloaded(published, host):
    root = published.root
    host.pause = 0.15
    code = "import signal, sys\nfrom tools import fetch\n"
    # A background job ignores SIGINT, so the child process sets Python's handler.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"fetch.COCO_URL, fetch.ARCHIVES = {fetch.COCO_URL!r}, {fetch.ARCHIVES!r}\n"
    code += "sys.exit(fetch.main(sys.argv[1:]))"
    options = ["refcocog", "--out", str(root), "--split", "train", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not list(root.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command resumes from here" in err and "Traceback" not in err
    complete = {file.name for file in root.rglob("*.jpg")}
    assert 0 < len(complete) < 5
    host.requests.clear()
    host.pause = 0
    assert run("refcocog", "--out", root, "--split", "train") == 0
    rest = images_of(published, "train") - complete
    assert host.count() == {f"/coco/{name}": 1 for name in rest}


def test_fetch_runs_as_a_module():
    def command(*args):
        args = [sys.executable, "-m", "tools.fetch", *args]
        done = subprocess.run(args, cwd=REPO, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = command("--help")
    assert code == 0 and not err
    flags = ("--out", "--samples", "--seed", "--heldout", "--split", "--jobs", "--model")
    assert "python -m tools.fetch" in out and all(one in out for one in (*flags, "Exit code"))
    code, out, err = command("refcocog")
    assert code == 2 and not out
    assert err == "python -m tools.fetch: add the folder with --out (--help lists the options)\n"


@pytest.mark.parametrize(
    "args, word",
    [
        ((), "what"),
        (("imagenet",), "imagenet"),
        (("sam", "--out", "x"), "--model"),
        (("refcoco", "--out", "x", "--split", "test"), "testA"),
        (("refcoco", "--out", "x", "--jobs", "500"), "16"),
        (("refcoco", "--out", "x", "--samples", "-3"), "-3"),
        (("refcoco", "--out", "x", "--samples", "0"), "at least 1"),
        (("refcoco", "--out", "x", "--heldout", "-1"), "at least 0"),
        (("refcoco", "--out", "file"), "file"),
    ],
)
def test_a_wrong_command_is_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys, args, word):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    try:
        code = run(*args)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and word in err, err
    assert err.startswith("python -m tools.fetch: ")
    assert not Path("x").exists()

"""fetch.py - download real data sets and SAM checkpoints. The method itself needs none of this.

    python -m tools.fetch refcocog --out ROOT --samples 3000
        everything that training needs: the annotations, the images of its training samples and
        those of its evaluation
    python -m tools.fetch refcocog --out ROOT --split val     the images of one split
    python -m tools.fetch sam --model vit_h --out FOLDER      an official SAM checkpoint
    python -m tools.fetch reasonseg                           explains how to download it by hand

A file gets its name only when it is complete and has passed a check: an image decodes at the
expected size, a checkpoint has its SHA-256. So the same command can be run again after any failure,
and it resumes where it stopped. COCO's training images are 13 GB, and 3,000 of them are 0.5 GB.
"""

import argparse
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # of the client that this version of the hub uses
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from data import PHOTOGRAPHS, REFS, read_expressions
from plumbing.errors import UserError, exit_with_one_line, reason_of
from plumbing.photos import read_image
from plumbing.sources import EVAL_SAMPLES, SPLITS

# This server is offline more often than not, so the Internet Archive is the first mirror.
UNC = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
STAMPS = {"refcocog": 20220413012904, "refcoco": 20220413011718, "refcoco+": 20220413011656}
ARCHIVES = {
    name: (f"https://web.archive.org/web/{stamp}/{UNC}/{name}.zip", f"{UNC}/{name}.zip")
    for name, stamp in STAMPS.items()
}
COCO_URL = "http://images.cocodataset.org/train2014"
COCO_MB = 0.163  # mean size of an image
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {  # name, bytes
    "vit_b": ("sam_vit_b_01ec64.pth", 375_042_383),
    "vit_l": ("sam_vit_l_0b3195.pth", 1_249_524_607),
    "vit_h": ("sam_vit_h_4b8939.pth", 2_564_550_879),
}
SAM_SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
REASONSEG_BY_HAND = """ReasonSeg is on Google Drive, which has no plain link. Download it by hand:
  1. open https://github.com/dvlab-research/LISA and follow "Dataset" to the Google Drive folder;
  2. unpack the files, so that there are ROOT/train/NAME.jpg and ROOT/train/NAME.json, and the same
     for ROOT/val and ROOT/test (239, 200 and 779 images);
  3. python samr1_mini.py eval --data reasonseg:ROOT/val"""
TIMEOUT = 30  # seconds without data; the Internet Archive can need more than the hub client's 10
GIVE_UP = 20  # images that could not be downloaded: the server is down
AGAIN = "run the same command again"


def download(url: str, file: Path, check: Callable, size: int | None = None) -> None:
    """Download a file. It is called FILE.part until it is complete and `check` has passed.

    The hub's client connects again if the connection breaks, and notices missing bytes.

    check: function of a path that raises UserError if this is the wrong file.
    size:  bytes of the whole file. With it, the next call resumes at the end of FILE.part.
    """
    part = file.with_name(file.name + ".part")
    start = part.stat().st_size if size and part.is_file() else 0
    try:
        with open(part, "ab" if start else "wb") as stream:
            http_get(url, stream, resume_size=start, expected_size=size)
    except (OSError, HTTPError) as error:  # the disk or the network
        raise UserError(f"{url}: {reason_of(error)}: {AGAIN}") from error
    try:
        check(part)
    except UserError:
        part.unlink()
        raise
    os.replace(part, file)


def unpack(archive: Path, files: list[Path]) -> None:
    """Extract files from a zip archive by their names. Paths in the archive are never used."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = {Path(entry).name: entry for entry in bundle.namelist()}
            for file in files:
                part = file.with_name(file.name + ".part")
                part.write_bytes(bundle.read(entries[file.name]))
                os.replace(part, file)
    except Exception as error:  # a damaged archive can raise anything; this block only unpacks
        raise UserError(f"{archive} cannot be unpacked ({reason_of(error)})") from error


def fetch_annotations(name: str, root: Path) -> None:
    """Download RefCOCO's annotations from the first mirror that has them."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    files = [folder / REFS[name], folder / "instances.json"]
    if all(file.is_file() for file in files):
        return
    archive = folder / f"{name}.zip"
    for url in ARCHIVES[name]:
        print(f"downloading the annotations from {url}")
        try:
            download(url, archive, partial(unpack, files=files))
            return archive.unlink()
        except UserError as error:
            print(f"not downloaded: {error}", file=sys.stderr)
    raise UserError(f"no mirror has the annotations of {name}: {AGAIN} later")


def fetch_images(images: dict[str, tuple[int, int]], folder: Path, jobs: int) -> None:
    """Download the images that `folder` does not have, with `jobs` connections.

    images: {file name: (width, height) in pixels}.
    """

    def fetch_image(file_name: str) -> str | None:
        """The reason why an image could not be downloaded, if so."""
        check = partial(read_image, hint="the same command again", size=images[file_name])
        try:
            download(f"{COCO_URL}/{file_name}", folder / file_name, check)
        except UserError as error:
            return str(error)

    folder.mkdir(parents=True, exist_ok=True)
    missing = [file_name for file_name in images if not (folder / file_name).is_file()]
    print(f"downloading {len(missing):,} images, about {len(missing) * COCO_MB:,.0f} MB")
    disable_progress_bars("huggingface_hub.http_get")  # one bar for all images
    pool = ThreadPoolExecutor(jobs)
    try:
        reasons = tqdm(pool.map(fetch_image, missing), desc="images", total=len(missing))
        failures = list(islice(filter(None, reasons), GIVE_UP))
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise UserError(f"images are missing: {AGAIN} (the first: {failures[0]})")


def fetch_refer(args: argparse.Namespace) -> None:
    """Download annotations, then images: those of --split, or of training and its evaluation."""
    name = args.what
    root = args.out
    fetch_annotations(name, root)
    # Evaluation reads the first expressions of val. A small subsample is the beginning of val.
    sizes = {"train": args.samples, "val": EVAL_SAMPLES}  # number of expressions, None is all
    flags = f"--data '{name}:{root}' --train_samples {args.samples}"
    if args.split:
        sizes = {args.split: args.samples if args.split == "train" else None}
        flags = f"--data '{name}:{root}/{args.split}'"
    images = {}
    for split, size in sizes.items():
        expressions = read_expressions(name, root, split, size)
        found = dict(one.image for one in expressions if one.image)
        print(f"{name} {split}: {len(expressions):,} expressions on {len(found):,} images")
        images |= found
    fetch_images(images, root / PHOTOGRAPHS, args.jobs)
    print(f"complete. Use it with {flags}")


def fetch_sam(model: str, folder: Path) -> None:
    """Download an official SAM checkpoint."""
    name, size = SAM_FILES[model]
    file = folder / name

    def check(path: Path) -> None:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != SAM_SHA256[model]:
            raise UserError(f"{path} has another SHA-256 than SAM's: move it away, then {AGAIN}")

    if file.is_file():
        check(file)
    else:
        print(f"downloading {name}, {size / 1e6:,.0f} MB, from {SAM_URL}")
        download(f"{SAM_URL}/{name}", file, check, size)
    print(f"complete. Use it with --sam {model}:{file}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.fetch", description="The same command resumes."
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("reasonseg", help="explains how to download ReasonSeg by hand")
    sam = commands.add_parser("sam", help="an official checkpoint of SAM")
    sam.add_argument("--model", choices=list(SAM_FILES), required=True)
    sam.add_argument("--out", type=Path, required=True, help="the folder")
    for name in ARCHIVES:
        add = commands.add_parser(name, help="a data set").add_argument
        add("--out", type=Path, required=True, help=f"the folder; --data {name}:OUT finds it there")
        add("--samples", type=int, default=3000, help="number of training samples (3000)")
        add("--split", choices=SPLITS[name], help="this split only; of train, --samples")
        # At most 16: these servers serve everybody.
        add("--jobs", type=int, choices=range(1, 17), default=4, help="connections (4)")
    args = parser.parse_args(argv)
    if args.what == "reasonseg":
        return print(REASONSEG_BY_HAND)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = TIMEOUT
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {reason_of(error)}: name another folder") from error
    if args.what == "sam":
        fetch_sam(args.model, args.out)
    elif args.samples < 1:
        raise UserError("--samples must be at least 1")
    else:
        fetch_refer(args)


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

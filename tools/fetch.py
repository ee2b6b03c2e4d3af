"""fetch.py - download real data sets and SAM checkpoints. The method itself needs none of this.

    python -m tools.fetch refcocog --out ROOT --samples 3000
        everything that training needs: the annotations, the images of its training samples and
        those of its evaluation (--heldout 256)
    python -m tools.fetch refcocog --out ROOT --split val     the images of one split
    python -m tools.fetch sam --model vit_h --out FOLDER      an official SAM checkpoint
    python -m tools.fetch reasonseg                           explains how to download it by hand

A file gets its name only when it is complete and has passed a check: an image decodes at the
expected size, a checkpoint has its SHA-256. So the same command can be run again after any failure,
and it resumes where it stopped. COCO's training images are 13 GB, and 3,000 of them are 0.5 GB.
"""

import argparse
import errno
import hashlib
import http.client
import lzma
import os
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import BadSample
from plumbing.photos import PHOTOGRAPHS, REFS, SPLITS, read_image, read_refer

PROG = "python -m tools.fetch"
# This server is offline more often than not, so the Internet Archive is the first mirror.
UNC = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
STAMPS = {"refcocog": 20220413012904, "refcoco": 20220413011718, "refcoco+": 20220413011656}
ARCHIVES = {
    name: (f"https://web.archive.org/web/{stamp}/{UNC}/{name}.zip", f"{UNC}/{name}.zip")
    for name, stamp in STAMPS.items()
}
COCO_URL = "http://images.cocodataset.org/train2014"
COCO_MB = 0.163  # mean size of an image: train2014 has 82,783 images in 13.5 GB
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {  # name, bytes, SHA-256 (the digits in the names are the start of an MD5 sum)
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
REASONSEG_BY_HAND = """ReasonSeg is on Google Drive, which has no plain link. Download it by hand:
  1. open https://github.com/dvlab-research/LISA and follow "Dataset" to the Google Drive folder;
  2. unpack the files, so that there are ROOT/train/NAME.jpg and ROOT/train/NAME.json, and the same
     for ROOT/val and ROOT/test (239, 200 and 779 images);
  3. python samr1_mini.py eval --data reasonseg:ROOT/val"""
TIMEOUT = 30  # seconds without data
TRIES = 4  # attempts for each file
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
MAX_JOBS = 16  # simultaneous connections: these servers serve everybody
# Stop after this many images failed in a row, each TRIES times: the server is down.
GIVE_UP = 20
MAX_IMAGE, MAX_ARCHIVE = 2**25, 2**31  # bytes; a larger file is not what we asked for


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def download(
    url: str, file: Path, check: Callable[[Path], object], limit: int, progress: bool = False
) -> str:
    """Download a file of at most `limit` bytes.

    The file is called FILE.part until it is complete and `check` has passed (`check` raises
    ValueError otherwise). The next attempt, in this run or in another, resumes at its end.

    Returns "" if the file is complete, or else the reason why not, in one line.
    """
    part = file.with_name(file.name + ".part")
    for attempt in range(TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            transfer(url, part, limit, progress)
            check(part)
            os.replace(part, file)
            return ""
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break  # the server refuses, so another attempt is useless
        except (OSError, http.client.HTTPException) as error:  # the network or the disk
            reason = f"{type(error).__name__}: {error}"
        except ValueError as error:  # the whole file arrived, but it is the wrong one
            reason = str(error)
            part.unlink(missing_ok=True)
    return f"{url}: {reason}"


def transfer(url: str, part: Path, limit: int, progress: bool) -> None:
    """Append the rest of a URL to a partial file.

    If the server cannot start in the middle, the file is written again from the start. Raises
    OSError (this includes the errors of urllib and sockets) or http.client.HTTPException, and
    ValueError if the file is larger than `limit` bytes.
    """
    size = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "samr1-mini"} | ({"Range": f"bytes={size}-"} if size else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if size and error.code == 416:
            return  # the server has no more bytes; the check decides whether the file is complete
        raise
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            size = 0
        total = None if response.length is None else size + response.length
        options = {"unit": "B", "unit_scale": True, "disable": not progress}
        bar = tqdm(desc=part.stem, total=total, initial=size, **options)
        with bar, open(part, "ab" if size else "wb") as out:
            while block := response.read(2**18):
                size += len(block)
                if size > limit:
                    raise ValueError(f"the file is larger than {limit:,} bytes")
                out.write(block)
                bar.update(len(block))
        if response.length:  # http.client does not report that bytes are missing
            raise http.client.IncompleteRead(b"", response.length)


def unpack(archive: Path, files: list[Path]) -> None:
    """Extract files from a zip archive, which may be hostile.

    Entries are found by the name of each file. Paths in the archive are never used, links are
    copied as text, and no other entry is extracted. Raises ValueError if a file cannot be
    extracted.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            for file in files:
                infos = bundle.infolist()
                entries = [one for one in infos if one.filename.split("/")[-1] == file.name]
                if not entries or entries[0].file_size > MAX_ARCHIVE:
                    raise ValueError(f"the archive has no {file.name}, or one that is too large")
                part = file.with_name(file.name + ".part")
                with bundle.open(entries[0]) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(part, file)
    # zipfile raises RuntimeError for an encrypted entry or an unknown method
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(f"the archive cannot be unpacked ({error})") from error
    except OSError as error:  # from a decompressor, or a wrong offset; else it is the disk's
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"the archive is damaged ({error})") from error


# --------------------------------------------------------------------------------------------------
# RefCOCO, RefCOCO+, RefCOCOg
# --------------------------------------------------------------------------------------------------


def fetch_refer(
    name: str, root: Path, split: str | None, samples: int, seed: int, heldout: int, jobs: int
) -> int:
    """Download the annotations, then images. Returns the exit code.

    Without `split`, the images are those that `samr1_mini.py train` reads: its training samples and
    the first `heldout` expressions of val. With `split`, they are those of one split (of train, the
    training samples).
    """
    if not fetch_annotations(name, root):
        print("no mirror has the annotations: run the same command again later", file=sys.stderr)
        return 1
    photographs = root / PHOTOGRAPHS
    photographs.mkdir(parents=True, exist_ok=True)
    images = list_images(name, root, split, samples, seed, heldout)
    reasons = fetch_images(images, photographs, jobs)
    if missing := len(images) - reasons.count(""):
        text = f"{missing:,} images are missing: run the same command again. The first reasons:"
        print(text, *[f"  {one}" for one in reasons if one][:3], sep="\n", file=sys.stderr)
        return 1
    command = ""
    if not split and heldout:
        command = f"train --data '{name}:{root}' --train_samples {samples} --data_seed {seed}"
        command += f" --eval_samples {heldout}"
    elif split not in (None, "train"):
        command = f"eval --data '{name}:{root}/{split}'"
    print("complete" + (f". Next: python samr1_mini.py {command}" if command else ""))
    return 0


def fetch_annotations(name: str, root: Path) -> bool:
    """Download the annotations from the first mirror that has them. Returns whether they exist."""
    files = [root / name / REFS[name], root / name / "instances.json"]
    (root / name).mkdir(parents=True, exist_ok=True)
    for url in ARCHIVES[name]:
        if all(file.is_file() for file in files):
            break
        print(f"downloading the annotations from {url}")
        archive = root / name / f"{name}.zip"
        reason = download(url, archive, lambda part: unpack(part, files), MAX_ARCHIVE, True)
        if reason:
            print(f"not downloaded: {reason}", file=sys.stderr)
        archive.unlink(missing_ok=True)
    return all(file.is_file() for file in files)


def list_images(
    name: str, root: Path, split: str | None, samples: int, seed: int, heldout: int
) -> dict[str, tuple[int, int]]:
    """List the images to download as {file name: (width, height)}, see `fetch_refer`."""
    subsets = [("train", samples, seed)] if split in (None, "train") else [(split, None, 0)]
    if not split and heldout:
        # Evaluation reads the first expressions of val. A small subsample is the beginning of val.
        subsets.append(("val", heldout, 0))
    images, folder = {}, root / PHOTOGRAPHS
    for part, size, part_seed in subsets:
        expressions = read_refer(name, root, part, size, part_seed)
        found = dict(one.image for one in expressions if one.image)
        present = sum((folder / file_name).is_file() for file_name in found)
        counts = f"{len(expressions):,} expressions on {len(found):,} images"
        print(f"{name} {part}: {counts}, {present:,} of them present")
        images |= found
    if missing := sum(not (folder / file_name).is_file() for file_name in images):
        print(f"downloading {missing:,} from {COCO_URL}: about {missing * COCO_MB:,.0f} MB")
    return images


def fetch_images(images: dict[str, tuple[int, int]], folder: Path, jobs: int) -> list[str]:
    """Download images that are missing or broken, with `jobs` connections.

    Returns for each image, in order, "" or the reason why it is missing. The list is shorter than
    `images` if the server seems to be down. Raises KeyboardInterrupt after Ctrl-C.
    """
    # A KeyboardInterrupt in this thread could arrive while it holds a lock of the pool. So the
    # handler only sets an event, and the exception is raised when all threads have ended.
    stopped = threading.Event()

    def fetch_image(file_name: str) -> str:
        if stopped.is_set():
            return "interrupted"
        file, size, hint = folder / file_name, images[file_name], "the same command"
        try:
            read_image(file, hint, size)
            return ""  # it is present, and it decodes
        except BadSample:
            url = f"{COCO_URL}/{file_name}"
            return download(url, file, lambda part: read_image(part, hint, size), MAX_IMAGE)

    reasons, failed_in_a_row = [], 0
    previous_handler = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    pool = ThreadPoolExecutor(jobs)
    try:
        for reason in tqdm(pool.map(fetch_image, images), desc="images", total=len(images)):
            reasons.append(reason)
            failed_in_a_row = failed_in_a_row + 1 if reason else 0
            if failed_in_a_row == GIVE_UP or stopped.is_set():
                break
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, previous_handler)
    if stopped.is_set():
        raise KeyboardInterrupt
    return reasons


# --------------------------------------------------------------------------------------------------
# SAM and ReasonSeg
# --------------------------------------------------------------------------------------------------


def fetch_sam(model: str, folder: Path) -> int:
    """Download an official SAM checkpoint. Returns the exit code.

    Raises ValueError if a file of its name is there with another SHA-256.
    """
    name, size, digest = SAM_FILES[model]
    file = folder / name

    def check(candidate: Path) -> None:
        found = hashlib.sha256()
        with open(candidate, "rb") as stream:
            while block := stream.read(2**20):
                found.update(block)
        if found.hexdigest() != digest:
            hint = "delete it and run the same command again"
            raise ValueError(f"{candidate} does not have the SHA-256 of the official file: {hint}")

    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        check(file)
    else:
        print(f"downloading {name}, {size / 1e6:,.0f} MB, from {SAM_URL}")
        if reason := download(f"{SAM_URL}/{name}", file, check, size, progress=True):
            hint = "Run the same command again: it resumes where it stopped"
            print(f"not downloaded: {reason}. {hint}", file=sys.stderr)
            return 1
    print(f"complete. Use it with --sam {model}:{file}")
    return 0


def fetch_reasonseg(root: Path | None) -> int:
    """Explain how to download ReasonSeg, or count the files in a folder. Returns the exit code."""
    counts = {}
    if root:
        counts = {split: len(list((root / split).glob("*.json"))) for split in SPLITS["reasonseg"]}
    if any(counts.values()):
        print(f"{root} has " + ", ".join(f"{count} of {split}" for split, count in counts.items()))
        return 0
    print(REASONSEG_BY_HAND)
    return 1 if root else 0


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def integer(text: str, least: int = 1) -> int:
    """Parse an integer of at least `least`, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return int(text)


def make_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Download a data set or a SAM checkpoint. The same command resumes where it "
        "stopped. For RefCOCO, it downloads what training needs: the images of the training "
        "samples and of the expressions for evaluation. With --split, it downloads the images of "
        "one split.",
        epilog="Exit code: 0 everything is there; 1 something could not be downloaded, run the "
        "command again; 2 wrong option or folder; 130 interrupted.",
    )
    add = parser.add_argument
    add("what", choices=[*ARCHIVES, "reasonseg", "sam"], help="sam is a checkpoint of SAM")
    add("--out", type=Path, metavar="ROOT", help="the folder; --data NAME:ROOT finds it there")
    add("--samples", type=integer, default=3000, help="RefCOCO: number of training samples (3000)")
    add("--seed", type=int, default=0, help="RefCOCO: seed for choosing the training samples (0)")
    heldout = "RefCOCO: number of val expressions for evaluation during training; 0 for none (256)"
    add("--heldout", type=lambda text: integer(text, 0), default=256, help=heldout)
    add("--split", help="RefCOCO: this split only; for train, only the training samples")
    jobs = f"RefCOCO: simultaneous connections, at most {MAX_JOBS} (4)"
    add("--jobs", type=int, choices=range(1, MAX_JOBS + 1), default=4, metavar="JOBS", help=jobs)
    add("--model", choices=[*SAM_FILES], help="sam: which model")
    return parser


def main(argv: list[str]) -> int:
    """Run `python -m tools.fetch ...`. Returns the exit code, see --help."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.what == "reasonseg":
            return fetch_reasonseg(args.out)
        if not args.out:
            parser.error("add the folder with --out")
        if args.what == "sam":
            if not args.model:
                parser.error(f"add --model {'|'.join(SAM_FILES)}")
            return fetch_sam(args.model, args.out)
        splits = SPLITS[args.what]
        if args.split not in (None, *splits):
            parser.error(f"{args.what} has no split {args.split!r}: use {', '.join(splits)}")
        options = (args.split, args.samples, args.seed, args.heldout, args.jobs)
        return fetch_refer(args.what, args.out, *options)
    except (OSError, ValueError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

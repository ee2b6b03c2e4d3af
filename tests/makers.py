"""What several test files need: commands and their files, small data sets in the formats of the
published ones, and a web server that fails on demand.

run(command), refused(action)               a command of samr1_mini.py; the message of a UserError
read_rows(file), contents(folder)           a log of a run; all bytes in a folder
make_refcocog(root), make_refer(root, name) REFER's layout: refs(...).p, instances.json, photographs
make_reasonseg(root)                        LISA's layout: labelme polygons, UTF-8 and cp1252
serve()                                     see `Host`
"""

import contextlib
import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import samr1_mini
from plumbing.errors import UserError

IMAGES = Path("images", "mscoco", "images", "train2014")


def run(command: str, *more: object) -> None:
    samr1_mini.main([*command.split(), *map(str, more)])


def refused(action, *arguments: object, kind: type = UserError, **named: object) -> str:
    """The message of the UserError that an action raises. It must be one line."""
    with pytest.raises(kind) as error:
        action(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A shaded, noisy image."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 150, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 30, (height, width, 3))).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def ellipse(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    """(H, W) bool."""
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) / radius) ** 2 + ((rows - y) / (0.7 * radius)) ** 2 <= 1


def runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: run lengths along the columns, the first one of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


# {name: (its file of references, the split of each object)}
REFER = {
    "refcocog": ("refs(umd).p", ["train"] * 6 + ["val"] * 2 + ["test"] * 2),
    "refcoco": ("refs(unc).p", ["train"] * 4 + ["val"] * 2 + ["testA"] * 2 + ["testB"] * 2),
}


def write_refer(made: SimpleNamespace) -> None:
    """Write the annotations of `make_refer`, also after a change."""
    made.refs_file.write_bytes(pickle.dumps(made.refs, protocol=2))
    made.instances_file.write_text(json.dumps(made.instances))


def make_refcocog(root: Path) -> SimpleNamespace:
    return make_refer(root, "refcocog")


def make_refer(root: Path, name: str) -> SimpleNamespace:
    """Write a set of REFER, with one object per split in `REFER[name]`, and its photographs.

    Each object has its own image, but the first two share one. The annotations take these forms in
    turn: polygon, polygon of two parts, run lengths.

    Returns root, refs (as Python reads them), instances, their two files, and jpegs
    {file name: bytes}.
    """
    refs_name, splits = REFER[name]
    sizes = [(96, 72), (72, 96), (80, 80), (100, 60)]
    photographs, annotations, refs, jpegs = [], [], [], {}
    for k, split in enumerate(splits):
        image_id = 9 + 16 * max(k, 1)
        width, height = sizes[max(k, 1) % 4]
        x, y, r = 20.5 + 5 * k, 25.25 + 2 * k, 12.0
        left = [x - r, y - r, x + r, y - r / 2, x, y + r]
        right = [x + r + 2, y, x + 2 * r, y + 3, x + r + 1, y + r]
        crowd = {"counts": runs(ellipse(width, height, x, y, r)), "size": [height, width]}
        segmentation = [[left], [left, right], crowd][k % 3]
        annotations.append({"id": 5000 + k, "image_id": image_id, "segmentation": segmentation})
        if k != 1:
            image = picture(width, height, k)
            file_name = f"COCO_train2014_{image_id:012d}.jpg"
            jpegs[file_name] = jpeg(image.convert("L") if k == 3 else image)
            photograph = {"id": image_id, "file_name": file_name}
            photographs.append(photograph | {"height": height, "width": width})
        ref = {"ref_id": 700 + k, "ann_id": 5000 + k, "image_id": image_id, "split": split}
        sents = [f"the red thing number {k} seen from side {n}" for n in range(1 + (k * 2) % 3)]
        sentences = [{"sent_id": 100 * k + n, "sent": sent} for n, sent in enumerate(sents)]
        refs.append(ref | {"sentences": sentences})
    instances = {"images": photographs, "annotations": annotations}
    refs = refs[::-1]  # the published lists are not sorted
    made = SimpleNamespace(root=root, refs=refs, instances=instances, jpegs=jpegs)
    made.refs_file = root / name / refs_name
    made.instances_file = root / name / "instances.json"
    (root / name).mkdir(parents=True)
    write_refer(made)
    (root / IMAGES).mkdir(parents=True)
    for file_name, content in jpegs.items():
        (root / IMAGES / file_name).write_bytes(content)
    return made


def shape(label: str, *points: tuple[float, float], kind: str = "polygon", **more) -> dict:
    """A labelme shape."""
    return {"label": label, "shape_type": kind, "points": [list(p) for p in points], **more}


def box(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, float]]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


# {name: {"size": (width, height), "text", "shapes"}}. The expected masks are in test_photos.py.
REASONSEG = json.loads(Path(__file__).with_name("reasonseg.json").read_text("utf-8"))


def make_reasonseg(root: Path, splits: Iterable[str] = ("train", "val", "test")) -> list[str]:
    """Write a small ReasonSeg with the same images in each split. Returns their names."""
    for split in splits:
        folder = Path(root) / split
        folder.mkdir(parents=True)
        for k, (name, one) in enumerate(REASONSEG.items()):
            (folder / f"{name}.jpg").write_bytes(jpeg(picture(*one["size"], k)))
            note = {"shapes": one["shapes"], "text": one["text"], "is_sentence": True}
            content = json.dumps(note, ensure_ascii=False).encode("utf-8" if k else "cp1252")
            (folder / f"{name}.json").write_bytes(content)
    return sorted(REASONSEG)


class Host(ThreadingHTTPServer):
    """A web server on this machine.

    files:    what it serves, {path: bytes}. It supports Range requests.
    faults:   {path: [fault, ...]}. Each request uses up one fault: an HTTP status, or "drop" (the
              connection ends half way).
    pause:    seconds that each answer takes.
    requests: [(path, Range or None), ...].
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.pause = {}, {}, [], 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self) -> Counter:
        return Counter(path for path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        part = self.headers.get("Range")
        self.server.requests.append((self.path, part))
        faults = self.server.faults.get(self.path)
        fault = faults.pop(0) if faults else None
        time.sleep(self.server.pause)
        body = self.server.files.get(self.path)
        if isinstance(fault, int) or body is None:
            return self.send_error(fault or 404)
        start = int((part or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may close the connection
            self.wfile.write(body[start : len(body) // 2 if fault == "drop" else None])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve():
    """Run a `Host` in a thread."""
    with Host() as host:
        threading.Thread(target=host.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield host
        finally:
            host.shutdown()

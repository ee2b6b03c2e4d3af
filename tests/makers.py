"""Small data sets in the formats of the published ones, and a web server that fails on demand.

make_refcocog(root), make_refcoco(root)     REFER's layout: pickles as Python 2 writes them,
                                            instances.json, COCO's file names
make_reasonseg(root)                        LISA's layout: labelme polygons, UTF-8 and cp1252
serve()                                     see `Host`
"""

import contextlib
import json
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco

IMAGES = Path("images", "mscoco", "images", "train2014")


# --------------------------------------------------------------------------------------------------
# Pickles as Python 2 wrote them. Here bytes represent its str, and str represents its unicode.
# --------------------------------------------------------------------------------------------------


def pickle_atom(item, protocol: int) -> bytes:
    """Return the opcode and argument of None, a bool, a number or a string."""
    if isinstance(item, bool) or item is None:
        true, false = (b"\x88", b"\x89") if protocol else (b"I01\n", b"I00\n")
        return {None: b"N", True: true, False: false}[item]
    if isinstance(item, int):
        if not protocol:
            return b"I%d\n" % item
        if 0 <= item < 256:
            return b"K" + bytes([item])
        short = 0 <= item < 65536
        return b"M" + struct.pack("<H", item) if short else b"J" + struct.pack("<i", item)
    if isinstance(item, float):
        return b"G" + struct.pack(">d", item) if protocol else b"F" + repr(item).encode() + b"\n"
    if isinstance(item, str):
        if protocol:
            return b"X" + struct.pack("<i", len(item.encode())) + item.encode()
        escaped = item.replace("\\", "\\u005c").replace("\n", "\\u000a")
        return b"V" + escaped.encode("raw-unicode-escape") + b"\n"
    if protocol:
        n = len(item)
        return (b"U" + bytes([n]) if n < 256 else b"T" + struct.pack("<i", n)) + item
    return b"S" + repr(item)[1:].encode() + b"\n"  # Python 2's repr is Python 3's without the b


def python2_pickle(value, protocol: int) -> bytes:
    """Return what pickle.dumps(value, protocol) returns in Python 2.7.

    All equal strings in `value` must be one object there.
    """
    out, memo = [b"\x80\x02" if protocol == 2 else b""], {}

    def number(opcodes: bytes, n: int) -> None:
        """Write n with one of three opcodes, chosen by the protocol and the size of n."""
        text, short, long = opcodes[:1], opcodes[1:2], opcodes[2:]
        if not protocol:
            out.append(text + b"%d\n" % n)
        else:
            out.append(short + bytes([n]) if n < 256 else long + struct.pack("<i", n))

    def put(key=None) -> None:
        number(b"pqr", len(memo))
        memo[object() if key is None else key] = len(memo)

    def save(item) -> None:
        if isinstance(item, list):
            out.append(b"]" if protocol else b"(l")
            put()
            batch(item, save, b"a", b"e")
        elif isinstance(item, dict):
            out.append(b"}" if protocol else b"(d")
            put()
            pairs = list(item.items())
            batch(pairs, lambda pair: (save(pair[0]), save(pair[1])), b"s", b"u")
        elif (type(item), item) in memo:
            number(b"ghj", memo[type(item), item])
        else:
            out.append(pickle_atom(item, protocol))
            if isinstance(item, (bytes, str)):
                put((type(item), item))

    def batch(items: list, each, one: bytes, many: bytes) -> None:
        size = 1000 if protocol else 1
        for start in range(0, len(items), size):
            group = items[start : start + size]
            out.append(b"(" if len(group) > 1 else b"")
            for item in group:
                each(item)
            out.append(many if len(group) > 1 else one)

    save(value)
    return b"".join(out) + b"."


# --------------------------------------------------------------------------------------------------
# RefCOCO
# --------------------------------------------------------------------------------------------------


def picture(
    width: int, height: int, seed: int, outlines: tuple = (), mode: str = "RGB"
) -> Image.Image:
    """Return an image with a shaded, noisy background and some polygons."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 150, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    image = Image.fromarray((ramp + rng.integers(0, 30, (height, width, 3))).astype(np.uint8))
    for k, outline in enumerate(outlines):
        colour = [(220, 40, 40), (50, 80, 220), (235, 205, 40)][k % 3]
        ImageDraw.Draw(image).polygon([tuple(map(int, p)) for p in outline], fill=colour)
    return image.convert(mode)


def jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def ellipse(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    """(H, W) bool."""
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) / radius) ** 2 + ((rows - y) / (0.7 * radius)) ** 2 <= 1


def runs(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed RLE: run lengths along the columns, the first one of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def compressed(mask: np.ndarray) -> str:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def make_refcocog(root: Path, images: bool = True, protocol: int = 2) -> SimpleNamespace:
    """Write a small RefCOCOg (partition umd) with its photographs.

    Returns root, name, refs_name, refs (as Python 3 reads them), instances and jpegs
    {file name: bytes}.
    """
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    return make_refer(Path(root), "refcocog", "refs(umd).p", splits, images, protocol)


def make_refcoco(
    root: Path, name: str = "refcoco", images: bool = True, protocol: int = 0
) -> SimpleNamespace:
    """Write a small RefCOCO or RefCOCO+ (partition unc), which has two test splits."""
    splits = ["train"] * 4 + ["val"] * 2 + ["testA", "testA", "testB", "testB"]
    return make_refer(Path(root), name, "refs(unc).p", splits, images, protocol)


def make_refer(
    root: Path, name: str, refs_name: str, splits: list[str], images: bool, protocol: int
) -> SimpleNamespace:
    """Write one object per entry of `splits`.

    Each object has its own image, but the first two share one. The annotations take these forms in
    turn: polygon, polygon of two parts, RLE of a crowd, compressed RLE.
    """
    sizes = [(96, 72), (72, 96), (80, 80), (100, 60)]
    photographs, annotations, refs, jpegs = [], [], [], {}
    for k, split in enumerate(splits):
        image_id = 9 + 16 * max(k, 1)
        width, height = sizes[max(k, 1) % 4]
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        x, y, r = 20.5 + 5 * k, 25.25 + 2 * k, 12.0
        left = [x - r, y - r, x + r, y - r / 2, x, y + r]
        right = [x + r + 2, y, x + 2 * r, y + 3, x + r + 1, y + r]
        blob = ellipse(width, height, x, y, r)
        rle = [{"counts": c, "size": [height, width]} for c in (runs(blob), compressed(blob))]
        annotation = {"id": 5000 + k, "image_id": image_id, "category_id": 1 + k % 2}
        annotation |= {"iscrowd": int(k % 4 == 2), "area": 1.0}
        annotation |= {"bbox": [x - r, y - r, 2 * r, 2 * r]}
        annotation |= {"segmentation": [[left], [left, right], *rle][k % 4]}
        annotations.append(annotation)
        if k != 1:
            outline, mode = (left[:2], left[2:4], left[4:]), "L" if k == 3 else "RGB"
            jpegs[file_name] = jpeg(picture(width, height, k, (outline,), mode))
            photograph = {"id": image_id, "file_name": file_name}
            photographs.append(photograph | {"height": height, "width": width, "license": 1})
        refs.append(make_ref(k, split, image_id, file_name))
    category = {"supercategory": "any"}
    instances = {
        "info": {"description": "miniature"},
        "licenses": [],
        "images": photographs,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"} | category, {"id": 2, "name": "two"} | category],
    }
    refs = refs[::-1]  # the published lists are not sorted
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / IMAGES).mkdir(parents=True, exist_ok=True)
    (root / name / refs_name).write_bytes(python2_pickle(refs, protocol))
    (root / name / "instances.json").write_text(json.dumps(instances))
    for file_name, content in jpegs.items() if images else ():
        (root / IMAGES / file_name).write_bytes(content)
    made = {"root": root, "name": name, "refs_name": refs_name, "refs": as_read(refs)}
    return SimpleNamespace(**made, instances=instances, jpegs=jpegs)


def make_ref(k: int, split: str, image_id: int, file_name: str) -> dict:
    """Return reference k with 1 to 3 sentences. bytes are Python 2's str."""
    sentences = []
    for n in range(1 + (k * 2) % 3):
        sent = f"the red thing number {k} seen from side {n}"
        raw = sent.title().encode() + (b" caf\xe9" if k == 0 else b"")
        sentence = {b"tokens": [word.encode() for word in sent.split()], b"raw": raw}
        sentence |= {b"sent_id": 100 * k + n, b"sent": sent.encode() if n else sent}
        sentences.append(sentence)
    return {
        b"sent_ids": [sentence[b"sent_id"] for sentence in sentences],
        b"file_name": file_name[:-4].encode() + b"_%d.jpg" % (5000 + k),
        b"ann_id": 5000 + k,
        b"ref_id": 700 + k,
        b"image_id": image_id,
        b"split": split.encode(),
        b"sentences": sentences,
        b"category_id": 1 + k % 2,
    }


def as_read(value):
    """Return what Python 3 reads with encoding latin1 from `python2_pickle(value, ...)`."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, list):
        return [as_read(one) for one in value]
    return {as_read(k): as_read(v) for k, v in value.items()} if isinstance(value, dict) else value


# --------------------------------------------------------------------------------------------------
# ReasonSeg
# --------------------------------------------------------------------------------------------------


def shape(label: str, *points: tuple[float, float]) -> dict:
    """Return a labelme polygon."""
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "",
        "points": [list(p) for p in points],
        "group_id": None,
        "group_ids": [None],
        "flags": {},
    }


def box(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, float]]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


# name: (width, height, queries, shapes). The expected masks are in test_photos.py.
REASONSEG = {
    "caf\u00e9_0001": (
        40,
        30,
        ["What at the caf\u00e9 keeps the rain off\u2026", "another wording"],
        [shape("target", *box(4.9, 5.2, 20.7, 18.9))],
    ),
    "flagged_0002": (
        24,
        16,
        ["the part that opens"],
        [shape("Flag", *box(0, 0, 23, 15)), shape("target", *box(2, 3, 9, 8))],
    ),
    "overlap_0003": (
        24,
        16,
        ["what is ripe"],
        [
            shape("ignore", *box(8, 2, 13, 9)),
            shape("target", *box(2, 2, 10, 13)),
            shape("Ignore_edge", *box(1, 12, 20, 14)),
        ],
    ),
    "nested_0004": (
        26,
        18,
        ["the outer ring and its core"],
        [
            shape("target", *box(11, 7, 14, 10)),
            shape("ignore", *box(7, 4, 18, 13)),
            shape("target", *box(2, 1, 23, 16)),
        ],
    ),
    "thin_0005": (
        20,
        14,
        ["the rope, the dot and the pole"],
        [
            shape("target", (1, 1), (17, 6), (1, 1)),
            shape("target", (4, 11)),
            shape("rope", (12.6, 8.2), (12.9, 12.7)),
            shape("target", (2, 4), (3, 9)),
        ],
    ),
}


def make_reasonseg(
    root: Path, splits: tuple[str, ...] = ("train", "val", "test")
) -> SimpleNamespace:
    """Write a small ReasonSeg with the same five images in each split. Returns root and names."""
    for split in splits:
        folder = Path(root) / split
        folder.mkdir(parents=True, exist_ok=True)
        for k, (name, (width, height, text, shapes)) in enumerate(REASONSEG.items()):
            outlines = [one["points"] for one in shapes if len(one["points"]) > 1]
            (folder / f"{name}.jpg").write_bytes(jpeg(picture(width, height, k, outlines)))
            note = {"shapes": shapes, "text": text, "is_sentence": len(text[0].split()) > 3}
            content = json.dumps(note, ensure_ascii=False).encode("utf-8" if k else "cp1252")
            (folder / f"{name}.json").write_bytes(content)
    return SimpleNamespace(root=Path(root), names=sorted(REASONSEG))


# --------------------------------------------------------------------------------------------------
# A web server
# --------------------------------------------------------------------------------------------------


class Host:
    """A web server on this machine.

    files:    what it serves, {path: bytes}. It supports Range requests.
    faults:   {path: [fault, ...]}. Each request uses up one fault, which is
                  an int          this HTTP status
                  "drop"          the connection ends half way
                  "stall"         no data after half of the file
                  "more", "less"  Content-Length is 100 bytes too large, or a third too small
                  "html"          an HTML page in place of the file, status 200
                  "whole"         Range is ignored
                  "endless"       no Content-Length, and 64 MiB too many
                  "/path"         a redirection to this path
                  None            no fault
    pause:    seconds that each answer takes.
    requests: [(path, Range or None), ...].
    most:     the largest number of simultaneous requests that wait for their answer.
    """

    def __init__(self):
        self.files, self.faults, self.requests, self.pause = {}, {}, [], 0.0
        self.lock, self.current, self.most = threading.Lock(), 0, 0
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with host.lock:
                    host.requests.append((self.path, self.headers.get("Range")))
                    host.current += 1
                    host.most = max(host.most, host.current)
                    waiting = host.faults.get(self.path) or [None]
                    fault = waiting[0]
                    host.faults[self.path] = waiting[1:]
                time.sleep(host.pause)
                with host.lock:  # before the answer: after it, the client may ask again at once
                    host.current -= 1
                with contextlib.suppress(OSError):  # the client may close the connection
                    host.answer(self, fault)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def count(self) -> Counter:
        return Counter(path for path, _ in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler, fault) -> None:
        body = self.files.get(handler.path)
        if isinstance(fault, int) or body is None:
            return handler.send_error(fault or 404)
        if isinstance(fault, str) and fault.startswith("/"):
            handler.send_response(302)
            handler.send_header("Location", self.url + fault)
            return handler.end_headers()
        if fault == "html":
            body = b"<html>Log in to this network</html>"
        start, offset = 0, handler.headers.get("Range")
        if offset and fault not in ("whole", "html"):
            start = int(offset.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return handler.send_error(416)
        rest = body[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        length = {"more": len(rest) + 100, "less": len(rest) * 2 // 3}.get(fault, len(rest))
        if fault != "endless":
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if fault in ("drop", "stall"):
            handler.wfile.write(rest[: len(rest) // 2])
            time.sleep(2 if fault == "stall" else 0)
            return
        # An end after 64 MiB protects the disk if the client's limit does not work.
        for _ in range(64 if fault == "endless" else 0):
            handler.wfile.write(bytes(2**20))
        handler.wfile.write(rest)


@contextlib.contextmanager
def serve():
    """Run a `Host` in a thread."""
    host = Host()
    options = {"poll_interval": 0.02}
    thread = threading.Thread(target=host.server.serve_forever, kwargs=options, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.server.shutdown()
        host.server.server_close()
        thread.join()

"""Small data sets in exactly the formats of the published ones, and a web server that misbehaves on demand.

    make_refcocog(root), make_refcoco(root)     REFER's layout: pickles as Python 2 writes them, instances.json, COCO's file names
    make_reasonseg(root)                        LISA's layout: labelme polygons, utf-8 and cp1252
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


# ---------------------------------------------------------------------------------------------------------------------
# Pickles as Python 2 wrote them. Here bytes stand for its str, and str for its unicode.
# ---------------------------------------------------------------------------------------------------------------------


def python2_pickle(value, protocol: int) -> bytes:
    """What pickle.dumps(value, protocol) of Python 2.7 returns if all equal strings in `value` are one object."""
    out, memo = [b"\x80\x02" if protocol == 2 else b""], {}

    def number(words: bytes, n: int) -> None:
        """One of the three opcodes, by protocol and size of n, with n."""
        text, short, long = words[:1], words[1:2], words[2:]
        out.append(text + b"%d\n" % n if not protocol else short + bytes([n]) if n < 256 else long + struct.pack("<i", n))

    def put(key=None) -> None:
        number(b"pqr", len(memo))
        memo[object() if key is None else key] = len(memo)

    def save(item) -> None:
        if isinstance(item, bool) or item is None:
            words = {None: b"N", True: b"\x88" if protocol else b"I01\n", False: b"\x89" if protocol else b"I00\n"}
            out.append(words[item])
        elif isinstance(item, int):
            code = b"K" + bytes([item]) if 0 <= item < 256 else b"M" + struct.pack("<H", item) if 0 <= item < 65536 else None
            out.append((code or b"J" + struct.pack("<i", item)) if protocol else b"I%d\n" % item)
        elif isinstance(item, float):
            out.append(b"G" + struct.pack(">d", item) if protocol else b"F" + repr(item).encode() + b"\n")
        elif isinstance(item, (bytes, str)):
            if (type(item), item) in memo:
                return number(b"ghj", memo[type(item), item])
            if isinstance(item, str):
                escaped = item.replace("\\", "\\u005c").replace("\n", "\\u000a").encode("raw-unicode-escape")
                raw = item.encode() if protocol else escaped
                out.append(b"X" + struct.pack("<i", len(raw)) + raw if protocol else b"V" + raw + b"\n")
            elif protocol:
                out.append((b"U" + bytes([len(item)]) if len(item) < 256 else b"T" + struct.pack("<i", len(item))) + item)
            else:
                out.append(b"S" + repr(item)[1:].encode() + b"\n")  # Python 2's repr is Python 3's without the b
            put((type(item), item))
        elif isinstance(item, list):
            out.append(b"]" if protocol else b"(l")
            put()
            batch(item, save, b"a", b"e")
        else:
            out.append(b"}" if protocol else b"(d")
            put()
            batch(list(item.items()), lambda pair: (save(pair[0]), save(pair[1])), b"s", b"u")

    def batch(items: list, each, one: bytes, many: bytes) -> None:
        for start in range(0, len(items), 1000 if protocol else 1):
            group = items[start : start + (1000 if protocol else 1)]
            out.append(b"(" if len(group) > 1 else b"")
            for item in group:
                each(item)
            out.append(many if len(group) > 1 else one)

    save(value)
    return b"".join(out) + b"."


# ---------------------------------------------------------------------------------------------------------------------
# RefCOCO
# ---------------------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int, outlines: tuple = (), mode: str = "RGB") -> Image.Image:
    """A shaded, noisy ground with some polygons on it."""
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
    """COCO's uncompressed RLE: run lengths down the columns, the first of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def compressed(mask: np.ndarray) -> str:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def make_refcocog(root: Path, images: bool = True, protocol: int = 2) -> SimpleNamespace:
    """A miniature of RefCOCOg (partition umd) with its photographs. Returns refs (as Python 3 would read them), instances,
    jpegs {file name: bytes} and root."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    return make_refer(Path(root), "refcocog", "refs(umd).p", splits, images, protocol)


def make_refcoco(root: Path, name: str = "refcoco", images: bool = True, protocol: int = 0) -> SimpleNamespace:
    """Likewise RefCOCO or RefCOCO+ (partition unc), with its two test splits."""
    splits = ["train"] * 4 + ["val"] * 2 + ["testA", "testA", "testB", "testB"]
    return make_refer(Path(root), name, "refs(unc).p", splits, images, protocol)


def make_refer(root: Path, name: str, refs_name: str, splits: list[str], images: bool, protocol: int) -> SimpleNamespace:
    """One image a reference, except that the first two share theirs. Image k has object k, whose annotation takes each of
    the forms in turn: polygon, polygon of two parts, RLE of a crowd, compressed RLE."""
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
        crowd = [{"counts": counts, "size": [height, width]} for counts in (runs(blob), compressed(blob))]
        annotations.append(
            {
                "id": 5000 + k, "image_id": image_id, "category_id": 1 + k % 2, "iscrowd": int(k % 4 == 2), "area": 1.0,
                "bbox": [x - r, y - r, 2 * r, 2 * r], "segmentation": [[left], [left, right], *crowd][k % 4],
            }
        )  # fmt: skip
        if k != 1:
            jpegs[file_name] = jpeg(picture(width, height, k, ([left[:2], left[2:4], left[4:]],), "L" if k == 3 else "RGB"))
            photographs.append({"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1})
        sentences = []
        for n in range(1 + (k * 2) % 3):
            sent = f"the red thing number {k} seen from side {n}"
            raw = sent.title().encode() + (b" caf\xe9" if k == 0 else b"")
            tokens = [word.encode() for word in sent.split()]
            sentences.append({b"tokens": tokens, b"raw": raw, b"sent_id": 100 * k + n, b"sent": sent.encode() if n else sent})
        refs.append(
            {
                b"sent_ids": [s[b"sent_id"] for s in sentences], b"file_name": file_name[:-4].encode() + b"_%d.jpg" % (5000 + k),
                b"ann_id": 5000 + k, b"ref_id": 700 + k, b"image_id": image_id, b"split": split.encode(), b"sentences": sentences,
                b"category_id": 1 + k % 2,
            }
        )  # fmt: skip
    instances = {
        "info": {"description": "miniature"}, "licenses": [], "images": photographs, "annotations": annotations,
        "categories": [{"id": 1, "name": "thing", "supercategory": "any"}, {"id": 2, "name": "other", "supercategory": "any"}],
    }  # fmt: skip
    refs = refs[::-1]  # the published lists are in no order
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / IMAGES).mkdir(parents=True, exist_ok=True)
    (root / name / refs_name).write_bytes(python2_pickle(refs, protocol))
    (root / name / "instances.json").write_text(json.dumps(instances))
    for file_name, content in jpegs.items() if images else ():
        (root / IMAGES / file_name).write_bytes(content)
    return SimpleNamespace(root=root, name=name, refs_name=refs_name, refs=as_read(refs), instances=instances, jpegs=jpegs)


def as_read(value):
    """What `python2_pickle`'s argument becomes when Python 3 reads it as latin1."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, list):
        return [as_read(one) for one in value]
    return {as_read(k): as_read(v) for k, v in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------------------------------------------------------------
# ReasonSeg
# ---------------------------------------------------------------------------------------------------------------------


def shape(label: str, *points: tuple[float, float]) -> dict:
    """A labelme polygon."""
    return {"label": label, "labels": [label], "shape_type": "polygon", "image_name": "", "points": [list(p) for p in points],
            "group_id": None, "group_ids": [None], "flags": {}}  # fmt: skip


def box(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, float]]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


# name: (width, height, queries, shapes). The masks that these make are in test_real_data.py.
REASONSEG = {
    "caf\u00e9_0001": (
        40, 30, ["What at the caf\u00e9 keeps the rain off\u2026", "another wording"],
        [shape("target", *box(4.9, 5.2, 20.7, 18.9))],
    ),
    "flagged_0002": (24, 16, ["the part that opens"], [shape("Flag", *box(0, 0, 23, 15)), shape("target", *box(2, 3, 9, 8))]),
    "overlap_0003": (
        24, 16, ["what is ripe"],
        [shape("ignore", *box(8, 2, 13, 9)), shape("target", *box(2, 2, 10, 13)), shape("Ignore_edge", *box(1, 12, 20, 14))],
    ),
    "nested_0004": (
        26, 18, ["the outer ring and its core"],
        [shape("target", *box(11, 7, 14, 10)), shape("ignore", *box(7, 4, 18, 13)), shape("target", *box(2, 1, 23, 16))],
    ),
    "thin_0005": (
        20, 14, ["the rope, the dot and the pole"],
        [shape("target", (1, 1), (17, 6), (1, 1)), shape("target", (4, 11)), shape("rope", (12.6, 8.2), (12.9, 12.7)),
         shape("target", (2, 4), (3, 9))],
    ),
}  # fmt: skip


def make_reasonseg(root: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> SimpleNamespace:
    """A miniature of ReasonSeg, the same five images in each split. Returns root and names (sorted)."""
    for split in splits:
        folder = Path(root) / split
        folder.mkdir(parents=True, exist_ok=True)
        for k, (name, (width, height, text, shapes)) in enumerate(REASONSEG.items()):
            outlines = [one["points"] for one in shapes if len(one["points"]) > 1]
            (folder / f"{name}.jpg").write_bytes(jpeg(picture(width, height, k, outlines)))
            note = json.dumps({"shapes": shapes, "text": text, "is_sentence": len(text[0].split()) > 3}, ensure_ascii=False)
            (folder / f"{name}.json").write_bytes(note.encode("cp1252" if k == 0 else "utf-8"))
    return SimpleNamespace(root=Path(root), names=sorted(REASONSEG))


# ---------------------------------------------------------------------------------------------------------------------
# A web server
# ---------------------------------------------------------------------------------------------------------------------


class Host:
    """A web server on this machine. `files` is what it serves, {path: bytes}; it can begin at an offset if asked to.

    `faults` is {path: [fault, ...]}, one used up by each request: an int (a status); "drop" (the connection breaks half
    way); "more" or "less" (Content-Length promises 100 bytes too many, or a third too few); "stall" (silence half way);
    "html" (a page in place of the file, status 200); "whole" (offsets are ignored); "endless" (no length, and far too
    much); another path (a redirection to it). `pause` is how long each answer takes. `requests` is [(path, Range or None)], `most` the
    largest number of requests at once.
    """

    def __init__(self):
        self.files, self.faults, self.requests, self.most, self.pause = {}, {}, [], 0, 0.0
        self.lock, self.now = threading.Lock(), 0
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with host.lock:
                    host.requests.append((self.path, self.headers.get("Range")))
                    host.now += 1
                    host.most = max(host.most, host.now)
                    waiting = host.faults.get(self.path) or [None]
                    fault = waiting[0]
                    host.faults[self.path] = waiting[1:]
                try:
                    time.sleep(host.pause)
                    with contextlib.suppress(OSError):  # the client may hang up
                        host.answer(self, fault)
                finally:
                    with host.lock:
                        host.now -= 1

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
        start, asked = 0, handler.headers.get("Range")
        if asked and fault not in ("whole", "html"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
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
        for _ in range(64 if fault == "endless" else 0):  # MiB: a limit that is broken fails its test and spares the disk
            handler.wfile.write(bytes(2**20))
        handler.wfile.write(rest)


@contextlib.contextmanager
def serve():
    """A running `Host`."""
    host = Host()
    thread = threading.Thread(target=host.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.server.shutdown()
        host.server.server_close()
        thread.join()

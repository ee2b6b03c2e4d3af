"""data.py - what the policy sees: an image, a query, and the mask that answers it.

Read this file first. It holds
  1. `Sample`, the record that every data set yields;
  2. `messages`, the prompt that asks for a thought, then for a box and two points;
  3. `Shapes`, drawn scenes whose queries need a little reasoning. They are the embedded default:
     nothing is downloaded, and there are as many scenes as a run asks for;
  4. `RefCOCO` and `ReasonSeg`, the photographs of the paper.

How shapes are drawn is in plumbing/scenes.py, and how the files of photographs are decoded in
plumbing/photos.py. plumbing/sources.py opens the data set that `--data` names.

Coordinate frames. The image and the mask of a sample use *image pixels*: x to the right, y down,
origin at the top left corner, so the centre of the first pixel is (0.5, 0.5). The policy sees the
image resized to a square. Its answers use *policy pixels*, those of Qwen3-VL thousandths of the
sides. `reward.sam_prompt` scales both back to image pixels.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from plumbing.errors import UserError
from plumbing.scenes import HARD_SHARE, Thing, draw_scene, unambiguous_queries


@dataclass
class Sample:
    """One image, one query, and the region that the query refers to.

    image:  PIL image, RGB, W x H.
    query:  the referring expression or question.
    mask:   (H, W) bool, True on the target.
    ignore: (H, W) bool, True on pixels that the metrics leave out, or None (ReasonSeg has them).
    id:     a name that is unique within the data set.
    """

    image: Image.Image
    query: str
    mask: np.ndarray
    ignore: np.ndarray | None
    id: str


class BadSample(UserError):
    """One sample cannot be used: its image is missing or broken, or its annotation has no mask.

    The message is one line that names the file and the remedy. Training skips such samples and
    counts them.
    """


# --------------------------------------------------------------------------------------------------
# The prompt
# --------------------------------------------------------------------------------------------------

BRIEF = "find {query}"
SYSTEM = (
    "You find things in images. You first think about what the request means and where in the "
    "image its target is, then you point the target out."
)
FULL = """Find in this image: {query}

First reason inside <think> </think>: which objects come into question, what tells the right one \
apart, and where it is.
Then answer inside <answer> </answer> with nothing but JSON: the tightest box around the target, \
and two points that lie well inside it, {units}.

<think>your reasoning</think><answer>{{"bbox": [x1, y1, x2, y2], "points_1": [x, y], \
"points_2": [x, y]}}</answer>"""
UNITS = {
    "pixels": "in pixels of the {side} x {side} image, x to the right and y down",
    "thousandths": "in thousandths of the image's width and height (0 to 1000), "
    "x to the right and y down",
}


def messages(query: str, style: str, units: str, side: int) -> list[dict]:
    """The conversation that asks the policy a query, in the form that chat templates take.

    style: "brief" is the query alone, for a model that knows the task: the tiny one sees 16 image
           tokens, and a page of instructions would hide them. "full" explains the task to a model
           that was not trained on it. The paper gives no wording, so this one is ours.
           "segzero" and "visionreasoner" are for the public checkpoints of these systems, see
           plumbing/segzero.py.
    units: "pixels" or "thousandths", see `UNITS`.
    side:  side of the square image that the policy sees, in pixels.

    >>> sample = Shapes("heldout")[4]
    >>> (conversation,) = messages(sample.query, style="brief", units="pixels", side=64)
    >>> conversation["role"], conversation["content"]
    ('user', [{'type': 'image'}, {'type': 'text', 'text': 'find the largest square'}])

    The policy sees this text and the image, resized to 64 x 64. A right completion, one line:

    <think>the yellow square is at the middle right</think><answer>{"bbox":[32,25,54,54],\
"points_1":[36,32],"points_2":[37,48]}</answer>
    """
    if style in ("brief", "full"):
        request = BRIEF if style == "brief" else FULL
    else:
        from plumbing import segzero  # only with these two styles

        request = segzero.REQUESTS[style]
        query = segzero.plain_query(query, style)
    request = request.format(query=query, units=UNITS[units].format(side=side))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request}]}
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    return [system, user] if style == "full" else [user]


# --------------------------------------------------------------------------------------------------
# Shapes: drawn scenes
# --------------------------------------------------------------------------------------------------


@dataclass
class Shapes:
    """Drawn scenes of 2 to 5 shapes, each with one unambiguous query about one of them.

    Item i depends on i and the fields below alone. It is drawn when it is read, and is the same in
    every run.

    split:      "train", "heldout" or "warmup" (for the tiny models). Splits seed the generator
                differently, so no scene is in two.
    seed:       a number for other scenes of the same split.
    size:       number of scenes.
    things:     smallest and largest number of shapes that are drawn.
    hard_share: in scenes with a query about a thing whose box has something else in its middle
                (`Thing.hard`), the probability to ask such a one. Otherwise all queries are
                drawn from. Only points tell what a hard query means.
    """

    split: str = "train"
    seed: int = 0
    size: int = 100_000
    things: tuple[int, int] = (2, 5)
    hard_share: float = HARD_SHARE

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        image, things, query, target = self.scene(index)
        name = f"shapes-{self.split}-{self.seed}-{index}"
        return Sample(image, query, things[target].mask, None, name)

    def scene(self, index: int) -> tuple[Image.Image, list[Thing], str, int]:
        """Return (image, things, query, index of the thing that the query refers to)."""
        rng = random.Random(f"{self.split}-{self.seed}-{index}")
        fewest, most = self.things
        while True:  # draw again if no query about the scene is unambiguous
            image, things = draw_scene(rng, rng.randint(fewest, most))
            queries = unambiguous_queries(things, image.width, image.height)
            hard = {}
            for sort, found in queries.items():
                if about_hard := [(query, k) for query, k in found if things[k].hard]:
                    hard[sort] = about_hard
            if hard and rng.random() < self.hard_share:
                queries = hard
            if queries:
                # Choose the sort of query first. Otherwise the common sorts would dominate.
                sort = rng.choice(sorted(queries))
                query, target = rng.choice(queries[sort])
                return image, things, query, target


# --------------------------------------------------------------------------------------------------
# Photographs. plumbing/photos.py decodes their files; drawn scenes do not need it
# --------------------------------------------------------------------------------------------------

# REFER published one of these files and instances.json for each set; they lie in ROOT/<name>/.
# RefCOCOg has two partitions. Papers report umd, which has a test split.
REFS = {"refcocog": "refs(umd).p", "refcoco": "refs(unc).p", "refcoco+": "refs(unc).p"}
PHOTOGRAPHS = "images/mscoco/images/train2014"
# LISA pins OpenCV 4.8. Up to 4.10 fillPoly fills the same pixels, and 4.11 changed its rounding.
INSTALL_CV2 = 'pip install "opencv-python-headless<4.11"'


def subsample(refs: list[dict], samples: int | None, seed: str) -> list[tuple[dict, dict]]:
    """Choose `samples` expressions (None: all) in random order, as (reference, sentence) pairs.

    A reference is one object. The first round takes one random sentence of each object, the next
    round a second one, and so on. So 3,000 samples of RefCOCOg are 3,000 different objects, and a
    smaller subsample is the beginning of a larger one. *Assumed*: the paper does not say how.

    The result depends on `seed` and the references only, not on their order or the Python version:
    Python keeps the stream of random() stable but not shuffle(), so this sorts by random().
    """
    rng = random.Random(seed)
    entries = []
    for ref in sorted(refs, key=lambda ref: ref["ref_id"]):
        shuffle_key = rng.random()
        sentences = sorted(ref["sentences"], key=lambda sentence: sentence["sent_id"])
        sentences.sort(key=lambda _: rng.random())  # sort() calls the key once for each, in order
        for turn, sentence in enumerate(sentences):
            place = (turn, shuffle_key, ref["ref_id"])
            entries.append((place, ref, sentence))
    entries.sort(key=lambda entry: entry[0])
    return [(ref, sentence) for _, ref, sentence in entries[:samples]]


class Expression(NamedTuple):
    """One sentence about one object, with its entries in instances.json (None: no entry)."""

    id: str
    query: str
    image: tuple[str, tuple[int, int]] | None  # file name, (width, height) in pixels
    segmentation: list | dict | None  # see `plumbing.photos.coco_mask`


def read_expressions(name: str, root: Path, split: str, samples: int | None) -> list[Expression]:
    """Read a split and subsample it (`samples` None: all). `name` is a key of `REFS`.

    Raises UserError with the file and the command that downloads it.
    """
    from plumbing import photos

    hint = f"python -m tools.fetch {name} --out {root}"
    file = root / name / REFS[name]
    refs = [ref for ref in photos.read_refs(file, hint) if ref["split"] == split]
    images, annotations = photos.read_instances(root / name / "instances.json", hint)
    expressions = []
    for ref, sentence in subsample(refs, samples, seed=f"{name}-{split}-0"):
        key = f"{name}-{ref['ref_id']}-{sentence['sent_id']}"
        # A mask of another image must not be used: such an expression gets no image.
        image_id, segmentation = annotations.get(ref["ann_id"], (None, None))
        image = images.get(ref["image_id"]) if image_id in (None, ref["image_id"]) else None
        expressions.append(Expression(key, sentence["sent"], image, segmentation))
    if not expressions:
        mend = f"Mend it, or move it away and run: {hint}"
        raise UserError(f"{file} has no expression of split {split}. {mend}")
    return expressions


class RefCOCO:
    """A split of RefCOCO, RefCOCO+ or RefCOCOg, in the order of `subsample`.

    The constructor reads the annotations, and raises UserError if files are missing or broken.
    [index] reads one image and its mask, and may raise `BadSample`.
    """

    def __init__(self, name: str, root: Path | str, split: str, samples: int | None = None):
        self.expressions = read_expressions(name, Path(root), split, samples)
        self.folder = Path(root) / PHOTOGRAPHS
        flag = f" --samples {samples}" if samples and split == "train" else ""
        self.hint = f"python -m tools.fetch {name} --out {root} --split {split}{flag}"
        if not any((self.folder / one.image[0]).is_file() for one in self.expressions if one.image):
            raise UserError(f"{self.folder} has no image of {split}. Run: {self.hint}")

    def __len__(self) -> int:
        return len(self.expressions)

    def __getitem__(self, index: int) -> Sample:
        from plumbing import photos

        one = self.expressions[index]
        with photos.foreign(f"{one.id} of instances.json", kind=BadSample):
            if not one.image:
                raise ValueError("it has no image, or its mask is of another image")
            if not one.segmentation:
                raise ValueError("it has no mask")
            file_name, (width, height) = one.image
            mask = photos.coco_mask(one.segmentation, width, height)
            if not mask.any():
                raise ValueError("the area of its mask is zero")
            image = photos.read_image(self.folder / file_name, self.hint, (width, height))
            return Sample(image, photos.check_query(one.query), mask, None, one.id)


class ReasonSeg:
    """A split of ReasonSeg (LISA, arXiv 2308.00692): ROOT/<split>/NAME.jpg with NAME.json.

    The constructor raises UserError if the folder is empty or OpenCV is missing. [index] returns a
    `Sample` or raises `BadSample`. The query is the first text of the image, and the masks equal
    those of LISA's reader. An image without a target is a bad sample in train, because it teaches
    nothing. In val and test its correct answer is an empty mask.
    """

    def __init__(self, root: Path | str, split: str):
        from plumbing import photos

        self.split = split
        self.folder = Path(root) / split
        self.hint = "python -m tools.fetch reasonseg"  # it explains how to get them
        self.files = photos.labelme_files(self.folder)  # of each name, by suffix
        self.names = sorted(self.files)
        if not self.names:
            raise UserError(f"{self.folder} has no .jpg and .json files. Run: {self.hint}")
        try:  # here, so that the run ends instead of skipping every sample
            import cv2  # noqa: F401
        except ImportError as error:
            raise UserError(f"ReasonSeg needs OpenCV ({error}). Run: {INSTALL_CV2}") from error

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        from plumbing import photos

        name = self.names[index]
        file = self.files[name].get(".json", self.folder / f"{name}.json")
        with photos.foreign(file, self.hint, kind=BadSample):
            picture = photos.labelme_picture(self.files[name]) or self.folder / f"{name}.jpg"
            image = photos.read_image(picture, self.hint)
            text, shapes = photos.read_labelme(file, image.size)
            query = photos.check_query(text)
            target, ignore = photos.labelme_masks(shapes, image.width, image.height)
            if self.split == "train" and not target.any():
                raise UserError("no pixel is target. Skip this sample")
        ignore = ignore if ignore.any() else None
        return Sample(image, query, target, ignore, f"reasonseg-{self.split}-{name}")

"""evaluation.py - what only `eval` and `segment` do: protocols, --against, figures of answers.

There are two ways to count, called protocols. The mask of an answer is the same under both:

    lisa     LISA's metric. Ignored pixels count neither in the intersection nor in the union. SAM
             gets whatever part of an answer is valid. An image whose union is empty has IoU 1.
    segzero  Seg-Zero's evaluation. Ignored pixels are target. An image whose union is empty has IoU
             0. So has an answer that lacks a valid box, or one of the points that were asked for.

The masks of all objects in an answer are united. One valid object is enough for segzero. The
columns box, points, box_iou and points_inside are about the first one alone. Answers are greedy
under both. ReasonSeg is the only set with ignored pixels.
"""

import contextlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from data import BadSample
from plumbing import pictures
from plumbing.answers import points_asked
from plumbing.errors import UserError
from plumbing.intervals import PREFIXES, bootstrap, counts_of, giou_and_ciou, span
from plumbing.runs import ANSWER, COUNTS, append_lines, has_form, read_rows, start_log, write_lines

PROTOCOLS = {
    "lisa": "ignored pixels are left out, an empty union has IoU 1",
    "segzero": "ignored pixels are target, an unreadable answer has IoU 0",
}

TALLEST = 4  # height over width of `found`; drawing one of 200 x the width would take 12 GiB

# --------------------------------------------------------------------------------------------------
# Protocols
# --------------------------------------------------------------------------------------------------


def protocols(s) -> tuple[str, ...]:
    """The protocols that an evaluation is counted by, the one of its headline first.

    Evaluation sets of the hub do not mark ignored pixels: only Seg-Zero's counting exists there.
    """
    if s.data.startswith("hub:"):
        return ("segzero",)
    return tuple(sorted(PROTOCOLS, key=lambda name: name != s.protocol))


def is_readable(answer, style: str) -> bool:
    """Whether an object of a reward.Answer has a valid box and all points that are asked for."""
    objects = [(answer.box, answer.points), *answer.others]
    return any(box and len(points) == points_asked(style) for box, points in objects)


def count(row: dict, masks, sample, readable: bool, s) -> dict:
    """The counts of a sample, in pixels, as columns of answers.jsonl.

    row:      the sample's, with LISA's counts.
    masks:    (3, H, W) bool, those of the prompts in `PREFIXES`.
    readable: of `is_readable`.

    Returns one dict with columns such as "ceiling_iou" for each of `protocols`, under its name, and
    the columns of the headline once more, without a name.
    """
    segzero = {}
    target = sample.mask if sample.ignore is None else sample.mask | sample.ignore
    for prefix, found in zip(PREFIXES, masks.cpu().numpy(), strict=True):
        mask = found & (readable or prefix == "ceiling_")
        intersection = float((mask & target).sum())
        union = float((mask | target).sum())
        segzero[prefix + "intersection"] = intersection
        segzero[prefix + "union"] = union
        segzero[prefix + "iou"] = intersection / union if union else 0.0
    counts = {"lisa": {name: row[name] for name in segzero}, "segzero": segzero}
    return {name: counts[name] for name in protocols(s)} | counts[protocols(s)[0]]


def metrics(rows: list[dict], compute_metrics, trained: str, s) -> dict[str, dict]:
    """The metrics of an evaluation for eval.json: of the policy, named `trained`, and the ceiling.

    Both hold `samr1_mini.compute_metrics` of the headline, its name as "protocol", and gIoU and
    cIoU by each of `protocols`, such as "segzero_giou".
    """
    results = {}
    for title, prefix in ((trained, ""), ("ceiling", "ceiling_")):
        results[title] = compute_metrics(rows, prefix) | {"protocol": protocols(s)[0]}
        for name in protocols(s):
            found = compute_metrics([row | row.get(name, {}) for row in rows], prefix)
            results[title][f"{name}_giou"] = found["giou"]
            results[title][f"{name}_ciou"] = found["ciou"]
    return results


def print_protocols(metrics: dict, rows: list[dict], s) -> None:
    """Print what a table of metrics counts, and the paper's figures if they are comparable.

    metrics: the policy's, from the result of `metrics`. rows: of `samr1_mini.evaluate`.
    """
    for name in protocols(s):
        figures = f"gIoU {metrics[f'{name}_giou']:.3f}, cIoU {metrics[f'{name}_ciou']:.3f}"
        table = " (the table)" if name == metrics["protocol"] else ""
        print(f"--protocol {name}{table}: {figures}; {PROTOCOLS[name]}")
    if s.protocol not in protocols(s):
        print(f"--protocol {s.protocol} needs marked ignored pixels, which hub: sets do not have")
    if paper := paper_results(s.data):
        ours = "SAM-R1 in the paper (7B, all weights, SAM2-Large)"
        if metrics["protocol"] == "segzero":
            print(f"{ours}, percent: {paper}; probably by this protocol, on the hub's set")
        else:
            print(f"{ours} was probably counted by --protocol segzero, so not printed here")
    if "against" in metrics:
        row = metrics["against"]
        giou, ciou = (f"{row[name]:+.3f} ({span(row, name, '+')})" for name in ("giou", "ciou"))
        print(f"against {row['file']}: gIoU {giou}, cIoU {ciou}, paired")
    if skipped := len(rows) - metrics["n"]:
        print(f"{skipped} samples could not be used and count in no metric")


# What the paper reports, in percent. Policy: Qwen2.5-VL-7B, all weights trained. Segmenter:
# SAM2-Large. It is printed beside our metrics and never mixed with them. Its rows for Seg-Zero
# match what one of its authors measured with Seg-Zero's evaluation, so the protocol is probably
# that one.
PAPER = {
    ("reasonseg", "val"): "gIoU 64.0, cIoU 55.8",
    ("reasonseg", "test"): "gIoU 60.2, cIoU 54.3",
    ("refcoco", "testA"): "cIoU 79.2",
    ("refcoco+", "testA"): "cIoU 74.7",
    ("refcocog", "test"): "gIoU 75.4, cIoU 73.1",
}


def paper_results(spec: str) -> str:
    """The paper's metrics on the split that `--data` names, or "".

    >>> paper_results("refcoco+:data/testA"), paper_results("hub:Ricky06662/refcocoplus_testA")
    ('cIoU 74.7', 'cIoU 74.7')
    """
    name, _, path = spec.partition(":")
    split = Path(path).name
    if name == "hub":
        name, _, split = split.replace("plus", "+").partition("_")
    return PAPER.get((name.lower(), split), "")


# --------------------------------------------------------------------------------------------------
# Answers that are there already: of an interrupted evaluation, and of another one (--against)
# --------------------------------------------------------------------------------------------------


class Answers:
    """The rows of answers.jsonl, those of an interrupted evaluation too. Writes config.json.

    Raises UserError if there are more of them than the `count` that the settings `s` ask for, or if
    the last one is about another sample than the one in its place: the set has changed.
    """

    def __init__(self, out: Path, s, count: int, style: str, dataset):
        """style: of the prompt. dataset: that of `s`."""
        self.file = out / "answers.jsonl"
        self.settings = s
        self.count = count
        self.style = style
        self.rows = read_rows(self.file, ANSWER) if s.resume else []
        if len(self.rows) > count and s.limit:
            done = f"{out} has {len(self.rows)} answers already"
            raise UserError(f"--limit {count}: {done}: name as many")
        if len(self.rows) > count or not self.ends_with_its_sample(dataset):
            reason = f"the answers in {out} are not those of its samples"
            raise UserError(f"--data {s.data}: {reason}: restore its files, or start another run")
        start_log(out, s, self.file.name, self.rows)

    def ends_with_its_sample(self, dataset) -> bool:
        """Whether the last answer is about the sample in its place. Only this one is read again."""
        scored = [index for index, row in enumerate(self.rows) if "skipped" not in row]
        if scored:
            with contextlib.suppress(BadSample):  # it is there, but cannot be read any more
                return dataset[scored[-1]].id == self.rows[scored[-1]]["id"]
        return True

    def missing(self) -> list[int]:
        """Indices of the samples to evaluate. Skipped ones are tried again, as files get mended."""
        skipped = [index for index, row in enumerate(self.rows) if "skipped" in row]
        return skipped + list(range(len(self.rows), self.count))

    def recount(self, row: dict, masks, sample, answer) -> dict:
        return count(row, masks, sample, is_readable(answer, self.style), self.settings)

    def add(self, found: dict[int, dict]) -> None:
        """Log the rows of a batch, by index."""
        done = len(self.rows)
        self.rows = [found.get(index, row) for index, row in enumerate(self.rows)]
        self.rows += [row for index, row in sorted(found.items()) if index >= done]
        if min(found) < done:
            write_lines(self.file, self.rows)
        else:
            append_lines(self.file, self.rows[done:])


def read_other(file: str, count: int) -> list[dict]:
    """The rows of another evaluation's answers.jsonl, or none for "".

    Raises UserError if they are not as many as here, `count`.
    """
    if not file:
        return []
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"--against {file}: no such file: name the answers.jsonl of an evaluation")
    rows = read_rows(path, ANSWER, mend=f"name another --against than {file}")
    if len(rows) != count:
        raise UserError(f"--against {file}: it has {len(rows)} answers, not {count}: see --limit")
    return rows


def compare(rows: list[dict], other: list[dict], protocol: str, file: str) -> dict:
    """How far gIoU and cIoU of `rows` are above those of `other`, with intervals, for eval.json.

    rows, other: of two evaluations of the same images, both counted by `protocol`. Raises UserError
    if they are not. file: where `other` is from.
    """
    for number, pair in enumerate(zip(rows, other, strict=True), 1):
        ours, theirs = ((row.get("id"), row.get("query")) for row in pair)
        if ours != theirs:
            reason = f"answer {number} is about {theirs}, here about {ours}"
            raise UserError(f"--against {file}: {reason}: name one of the same --data")
    counted = [has_form(row.get(protocol), COUNTS) for row in other if "skipped" not in row]
    if not all(counted):
        raise UserError(f"--against {file}: it was not counted by --protocol {protocol}")
    counts, others = (
        counts_of([row | row.get(protocol, {}) for row in both]) for both in (rows, other)
    )
    images = np.arange(counts.shape[1])[None]
    giou, ciou = (giou_and_ciou(counts, images) - giou_and_ciou(others, images))[:, 0].tolist()
    return {"file": file, "giou": giou, "ciou": ciou} | bootstrap(counts, others)


# --------------------------------------------------------------------------------------------------
# Figures of answers
# --------------------------------------------------------------------------------------------------


def sheet(answers: dict[str, list[tuple]]) -> Figure:
    """A row of pictures for each title, from tuples (sample, prompt, mask (H, W) bool, IoU)."""
    columns = max(map(len, answers.values()))
    figure = Figure(figsize=(3 * columns, 3.3 * len(answers)), dpi=100, layout="constrained")
    grid = figure.subplots(len(answers), columns, squeeze=False)
    for line, (title, cells) in zip(grid, answers.items(), strict=True):
        for axes in line[len(cells) :]:
            axes.set_axis_off()
        for axes, (one, prompt, mask, iou) in zip(line, cells, strict=False):
            pictures.draw_answer(axes, one.image, mask, prompt, one.mask)
            pictures.write_title(axes, f"{title}: IoU {iou:.2f}")
            pictures.write_below(axes, pictures.printable_query(one.query, 160, 38))
    pictures.draw_legend(figure)
    return figure


def evaluation_sheet(rows: list[dict], scorer, dataset, prompt_type, count: int = 4) -> Figure:
    """The best, median and worst answers of an evaluation, `count` of each, by IoU.

    rows:        of samr1_mini.evaluate; row k is about dataset[k]. Rows with "skipped" are ignored,
                 at least one must have been scored.
    scorer:      reward.SamScorer, which makes the masks again.
    prompt_type: reward.SamPrompt.
    """
    scored = [k for k, row in enumerate(rows) if "skipped" not in row]
    order = sorted(scored, key=lambda k: -rows[k]["iou"])
    middle = max(0, len(order) // 2 - count // 2)
    median = order[middle : middle + count]
    picks = {"best": order[:count], "median": median, "worst": order[-count:]}
    chosen = sorted({k for row in picks.values() for k in row})  # encode each image once
    batch = [dataset[k] for k in chosen]
    prompts = []
    for k in chosen:
        others = [prompt_type(box, points) for box, points in rows[k].get("others", ())]
        prompts.append(prompt_type(rows[k]["box"], rows[k]["points"], tuple(others)))
    masks = scorer.score(batch, [[prompt] for prompt in prompts], keep_masks=True).masks
    drawn = dict(zip(chosen, zip(batch, prompts, masks, strict=True), strict=True))
    answers = {}
    for title, numbers in picks.items():
        answers[title] = []
        for k in numbers:
            one, prompt, mask = drawn[k]
            answers[title].append((one, prompt, mask[0].cpu().numpy(), rows[k]["iou"]))
    return sheet(answers)


def found(image: Image.Image, query: str, mask: np.ndarray, prompt, said: str) -> Figure:
    """One picture with the mask of a query (H, W) bool, the prompt, and the policy's reasoning."""
    size = (7, 7 * min(image.height / image.width, TALLEST) + 1.2)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    pictures.draw_answer(axes, image, mask, prompt)
    pictures.write_title(axes, pictures.printable_query(query, 240, 60), size=12)
    pictures.write_below(axes, pictures.fold(said, 800, 90))
    return figure

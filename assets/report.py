"""report.py - a run as one page that opens from the disk: RUN/report.html.

    python samr1_mini.py report RUN

`record` turns what a step sampled into plain numbers, texts and small pictures; training writes them as
RUN/rollouts/step_00050.json. `report_html` puts those files, the log and the evaluation into assets/report.html, where all
drawing happens. The page asks for no server and no network.

Completions are untrusted text: a policy may write markup. In the page's data every "<" is escaped, the page shows text as
text nodes and nothing else, and its content security policy allows no request.
"""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

LONGEST_SIDE = 640  # pixels; of the pictures in the page
PHOTOGRAPH = 256  # pixels; pictures with a longer side are kept as JPEG
DATA_HERE = '{"data": "goes here"}'  # in the template
NUMBERS = ("reward", "accuracy", "think_format", "answer_format", "iou")
SCENE = ("id", "query", "image", "size", "truth", "completions")  # what the page needs of a record, and of its answers
ANSWER = ("text", "tokens", "clipped", *NUMBERS, "advantage", "box", "points", "mask")


def record(samples: list, completions, scores, tokenizer, advantages=None, clipped=None) -> list[dict]:
    """What B samples and their G completions were like, as plain data for a JSON file: a dict with SCENE for each sample.

    samples:     B objects with `image` (PIL, W x H), `query`, `mask` (H, W) bool and `id`. What follows may be about more
                 samples: its first B rows are taken.
    completions: grpo.Completions (B, G, T).
    scores:      reward.Scores (B, G) of `score_completions(..., keep_masks=True)`.
    advantages:  (B, G) or None.
    clipped:     (B, G, T) int8 or None: -1 where the clip took a token's gradient below, 1 where above, else 0.

    Boxes, points and `size` (W, H) in image pixels. The pictures are scaled down to LONGEST_SIDE; masks are 1-bit PNGs.
    """
    rows = []
    for b, one in enumerate(samples):
        scale = min(1, LONGEST_SIDE / max(one.image.size))
        small = tuple(max(1, round(side * scale)) for side in one.image.size)
        answers = []
        for g, prompt in enumerate(scores.prompts[b]):
            length = int(completions.mask[b, g].sum())
            ids = completions.ids[b, g, :length].tolist()
            answer = {"text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": token_texts(ids, tokenizer)}
            answer["clipped"] = None if clipped is None else clipped[b, g, :length].tolist()
            for name in NUMBERS:
                answer[name] = getattr(scores, name)[b, g].item()
            answer["advantage"] = None if advantages is None else advantages[b, g].item()
            answer |= {"box": prompt.box, "points": prompt.points}
            answers.append(answer | {"mask": mask_uri(scores.overlap.masks[b][g].cpu().numpy(), small)})
        picture = one.image.resize(small, Image.Resampling.LANCZOS) if scale < 1 else one.image
        row = {"id": one.id, "query": one.query, "image": data_uri(picture, "JPEG" if max(small) > PHOTOGRAPH else "PNG")}
        rows.append(row | {"size": list(one.image.size), "truth": mask_uri(one.mask, small), "completions": answers})
    return rows


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """Each token as text; joined, and without the special tokens, they are the text that all of them make.

    A token may be a part of a character (an emoji can take four): then the character's last token shows it, and those before
    are "". Spaces may depend on the token before, so a token's text is what it adds to the text of its neighbours.
    """
    special = set(tokenizer.all_special_ids)
    plain = [i for i in ids if i not in special]
    texts, first, shown = [], 0, 0  # plain[:shown] is written; plain[first:shown] is the neighbour
    for k in range(1, len(plain) + 1):
        before = tokenizer.decode(plain[first:shown])
        added = tokenizer.decode(plain[first:k])[len(before) :]
        if added.endswith("\ufffd") and k < len(plain):  # bytes that are no character yet
            texts.append("")
        else:
            texts.append(added)
            first, shown = shown, k
    texts = iter(texts)
    return [tokenizer.decode([i]) if i in special else next(texts) for i in ids]


def mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """A mask (H, W) bool as a 1-bit PNG of this size (width, height)."""
    return data_uri(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), "PNG")


def data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def report_html(run: Path) -> str:
    """The page about a run's folder, in ASCII. Raises FileNotFoundError or ValueError, with one line, where the folder is no
    run or a file in it is damaged. eval.json, metrics.jsonl and rollouts/ may be missing: a run may have just begun."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is no run's folder: it holds no config.json")
    data = {"name": run.resolve().name, "config": read_json(run / "config.json"), "eval": {}, "metrics": []}
    if (run / "eval.json").is_file():
        data["eval"] = read_json(run / "eval.json")
    if (run / "metrics.jsonl").is_file():
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # a line without an end is still being written
        data["metrics"] = [parse(line, f"{run / 'metrics.jsonl'}, line {k}") for k, line in enumerate(lines, 1)]
    rollouts = [read_rollout(file) for file in (run / "rollouts").glob("step_*.json")]
    data["rollouts"] = sorted(rollouts, key=lambda rollout: rollout["step"])
    data["pictures"] = share_pictures(rollouts)
    template = (Path(__file__).resolve().parent / "report.html").read_text(encoding="ascii")
    text = json.dumps(finite(data), allow_nan=False).replace("<", "\\u003c")  # no </script> and no <!-- in a script element
    return template.replace(DATA_HERE, text, 1)


def read_rollout(file: Path) -> dict:
    """A file that training wrote; ValueError unless it holds all that the page reads."""
    rollout = read_json(file)
    try:
        scenes = [(one, SCENE) for one in rollout["train"] + rollout["heldout"]]
        answers = [(answer, ANSWER) for one, _ in scenes for answer in one["completions"]]
        if missing := [name for part, names in scenes + answers for name in names if name not in part]:
            raise KeyError(missing[0])
        rollout["step"] = int(rollout["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: it is no record of rollouts ({type(error).__name__}: {error})") from error
    return rollout


def share_pictures(rollouts: list[dict]) -> list[str]:
    """Replace the data URIs by numbers and return the list that these count: the held-out scenes are the same in every file."""
    numbers = {}
    for rollout in rollouts:
        for one in rollout["train"] + rollout["heldout"]:
            for part, name in [(one, "image"), (one, "truth"), *((answer, "mask") for answer in one["completions"])]:
                part[name] = numbers.setdefault(part[name], len(numbers))
    return list(numbers)


def read_json(file: Path):
    return parse(file.read_bytes(), str(file))


def parse(text: bytes, where: str):
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{where} is damaged: {error}") from error


def finite(value):
    """The same data with null in place of NaN and infinity, which JSON does not have.

    >>> finite({"kl": [0.5, float("nan")]})
    {'kl': [0.5, None]}
    """
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

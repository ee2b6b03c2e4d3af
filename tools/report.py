"""report.py - a run as one page: RUN/report.html, which opens from disk without a server.

    python -m tools.report RUN

The page shows the table of eval.json, the curves of metrics.jsonl, and all rollouts that training
logged in RUN/rollouts/.

Completions are untrusted text: a policy may write markup. All text is escaped. In addition, the
page has no script, and its content security policy allows none and no request.
"""

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from plumbing import intervals, pictures
from plumbing.errors import UserError, exit_with_one_line, reason_of, refusing
from plumbing.runs import write_text
from reward import SamPrompt

COLUMNS = {"giou": "gIoU", "ciou": "cIoU", "format": "format", "box": "box@0.5", "n": "samples"}
CLIPPED = {  # a token, and the marks of one that was clipped above or below
    0: "{}",
    1: '<mark class="above">{}\u25b2</mark>',
    -1: '<mark class="below">{}\u25bc</mark>',
}

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>SAM-R1 mini: $name</title>
<style>
body { margin: 0 auto; padding: 0 12px; max-width: 1320px; font: 15px/1.45 sans-serif;
  overflow-wrap: anywhere; }
summary { font-weight: bold; margin: 12px 0; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid silver; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 10px;
  padding: 0; list-style: none; }
li { padding: 8px; border: 1px solid silver; border-radius: 8px; font-size: 13px; }
img { max-width: 100%; } li img { display: block; height: 200px; margin: auto; }
pre { white-space: pre-wrap; }
.above { background: #ffd48a; } .below { background: #b9d6ff; }
</style>
<h1>SAM-R1 mini: $name</h1>
<h2>Results</h2>$results
<h2>Curves</h2>$curves
<h2>Rollouts</h2>
<p>Held-out scenes are the same at every step. Training samples have advantages.
Outlines: green is the true mask, magenta is SAM's mask. Box and points are white.
<mark class="above">\u25b2</mark> follows a token whose ratio was clipped above,
<mark class="below">\u25bc</mark> one clipped below.</p>
$steps
<h2>Settings</h2><pre>$config</pre>
""")


def decode(uri: str) -> Image.Image:
    """The picture of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def answer_html(one: dict, answer: dict) -> str:
    """A completion: its picture, reward, IoU, advantage, clipped tokens and text."""
    picture = pictures.answer_picture(
        image=decode(one["image"]),
        mask=np.asarray(decode(answer["mask"])),
        prompt=SamPrompt(answer["box"], answer["points"]),
        truth=np.asarray(decode(one["truth"])),
    )
    line = (
        "reward <b>{reward:.3g}</b> = {accuracy:.3g} accuracy + {think_format:.3g} think "
        "+ {answer_format:.3g} answer<br>IoU <b>{iou:.2f}</b>"
    ).format_map(answer)
    if answer["advantage"] is not None:
        line += f", advantage <b>{answer['advantage']:+.3g}</b>"
    sides = answer["clipped"] or [0] * len(answer["tokens"])
    if answer["clipped"] is not None:
        line += f"<br>clipped {sides.count(1)}\u25b2 {sides.count(-1)}\u25bc of {len(sides)}"
    pairs = zip(answer["tokens"], sides, strict=True)
    text = "".join(CLIPPED[side].format(html.escape(token)) for token, side in pairs)
    uri = pictures.data_uri(picture)
    return f'<li><img src="{uri}" alt=""><p>{line}</p><pre>{text}</pre></li>\n'


def scene_html(one: dict) -> str:
    """A sample and its completions."""
    answers = "".join(answer_html(one, answer) for answer in one["completions"])
    image = f'<img src="{html.escape(one["image"])}" alt="">'
    first = f"<li>{image}<p>{html.escape(one['id'])}</p></li>\n"
    return f"<h4>{html.escape(one['query'])}: {means([one])}</h4>\n<ul>{first}{answers}</ul>\n"


def means(samples: list[dict]) -> str:
    """Mean reward and IoU of the completions of some samples, as text."""
    answers = [answer for one in samples for answer in one["completions"]]
    reward = np.mean([answer["reward"] for answer in answers])
    iou = np.mean([answer["iou"] for answer in answers])
    return f"mean reward {reward:.3g}, mean IoU {iou:.2f}"


def step_html(rollout: dict, last: bool) -> str:
    """A step's held-out scenes and training samples. All steps but the last are folded."""
    parts = f"<details{' open' if last else ''}><summary>Step {rollout['step']:d}</summary>\n"
    for title, name in (("Held-out scenes", "heldout"), ("Training samples", "train")):
        if samples := rollout[name]:
            parts += f"<h3>{title}: {means(samples)}</h3>\n"
            parts += "".join(scene_html(one) for one in samples)
    return parts + "</details>\n"


def results_html(results: dict) -> str:
    """The table of eval.json, and the share of the gap to the ceiling that training closed."""
    table = "".join(f"<th>{title}</th>" for title in ("", *COLUMNS.values()))
    for name, row in sorted(results.items(), key=lambda item: item[0] == "ceiling"):  # last
        table += f"\n<tr><th>{html.escape(name)}</th>"
        for key in COLUMNS:
            cell = format(row[key], ".3g") if key in row else ""
            if f"{key}_95" in row:
                cell += f" ({intervals.span(row, key)})"
            table += f"<td>{cell}</td>"
    note = "The ceiling is SAM with the true box and two good points."
    if {"before", "after", "ceiling"} <= set(results):
        gained = results["after"]["giou"] - results["before"]["giou"]
        gap = results["ceiling"]["giou"] - results["before"]["giou"]
        note += f" Training closed {100 * gained / max(gap, 1e-9):.0f} % of the gap in gIoU."
    return f"<table><tr>{table}</table>\n<p>{note}</p>"


def curves_html(rows: list[dict]) -> str:
    """The figure of `plumbing.pictures.curves`, or "" before the first step."""
    if not rows:
        return ""
    buffer = io.BytesIO()
    pictures.curves(rows).savefig(buffer, format="png")
    uri = pictures.data_uri(Image.open(buffer))
    return f'<img src="{uri}" alt="Curves of {len(rows)} steps">'


def section(file: Path, render: Callable[..., str], missing: str = "") -> str:
    """What `render` makes of the JSON in a file, or of the list of the JSON in its lines.

    Without the file, or with nothing in it yet, it is `missing`. Raises UserError if the file is
    damaged, or of another form: then `render` can raise anything.
    """
    if not file.is_file():
        return missing
    wrong = f"{file} is damaged, or not of a run"
    with refusing(lambda error: f"{wrong} ({reason_of(error)}): delete it, or what is damaged"):
        text = file.read_bytes()
        if file.suffix != ".jsonl":
            return render(json.loads(text))
        lines = text.split(b"\n")[:-1]  # one without an end is still being written
        return render([json.loads(line) for line in lines]) or missing


def report_html(run: Path) -> str:
    """The page of a run's folder, in ASCII. eval.json, metrics.jsonl and rollouts/ may be missing.

    Raises UserError if the folder is not a run's, or a file is damaged.
    """
    settings = section(run / "config.json", partial(json.dumps, indent=2))
    if '"vlm": ' not in settings:  # the folder of a model has a config.json too
        reason = "its config.json is of something else" if settings else "it has no config.json"
        raise UserError(f"{run} is not the folder of a run: {reason}")
    files = sorted((run / "rollouts").glob("step_*.json"))
    steps = [section(file, partial(step_html, last=file == files[-1])) for file in files]
    page = PAGE.substitute(
        name=html.escape(run.resolve().name),
        results=section(run / "eval.json", results_html, "<p>No evaluation was written yet.</p>"),
        curves=section(run / "metrics.jsonl", curves_html, "<p>No step was logged yet.</p>"),
        steps="".join(steps) or "<p>No rollouts were logged.</p>",
        config=html.escape(settings),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tools.report", description="Write RUN/report.html.")
    parser.add_argument("run", type=Path, help="folder of a run")
    run = parser.parse_args(argv).run
    write_text(run / "report.html", report_html(run))
    print(f"written to {run / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

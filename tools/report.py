"""report.py - a run as one page: RUN/report.html, which opens from disk without a server.

    python -m tools.report RUN

The page shows the table of eval.json, the curves of metrics.jsonl, and all rollouts that training
logged in RUN/rollouts/. A slider chooses the step.

Completions are untrusted text: a policy may write markup. All text is escaped, and the page's
content security policy allows no request, and no script or style but its own.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import re
from pathlib import Path
from string import Template

from plumbing.pictures import FOUND, NUMBERS, PANELS, TRUTH, curves
from plumbing.runs import write_text

COLUMNS = {"giou": "gIoU", "ciou": "cIoU", "format": "format", "box": "box@0.5", "n": "samples"}
METRICS = [name for names in PANELS.values() for name in names]
PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")
CLIPPED = {1: ("above", "\u25b2"), -1: ("below", "\u25bc")}  # how a clipped token is marked
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # unexpected data

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; $hashes">
<title>SAM-R1 mini: $name</title><style>$style</style>
<h1>SAM-R1 mini: $name</h1>
<h2>Results</h2>$results
<h2>Curves</h2>$curves
<h2>Rollouts</h2><p>Held-out scenes are the same at every step. Training samples have advantages.
Outlines: <b class="key truth">true mask</b> <b class="key found">SAM's mask</b>. Box and points
are white. In a text, \u25b2 marks a token whose ratio was clipped above, \u25bc one clipped below.
<p id="control" hidden><label for="at">Step</label> <input type="range" id="at" min="0">
<output for="at"></output></p>
$rollouts
<h2>Settings</h2><details><summary>config.json</summary><pre>$config</pre></details>
<svg id="store" aria-hidden="true"><defs>$pictures</defs></svg>
<script>$script</script>
""")

STYLE = f"""
:root {{ color-scheme: light dark; --line: color-mix(in srgb, CanvasText 25%, Canvas); }}
body {{ margin: 0 auto; padding: 0 12px 40px; max-width: 1320px; overflow-wrap: anywhere;
  font: 15px/1.45 system-ui, sans-serif; }}
h2 {{ margin: 32px 0 8px; }} h3, h4, h5 {{ margin: 16px 0 6px; font-size: 1rem; }}
.table {{ overflow-x: auto; overflow-wrap: normal; }} .curves {{ width: 100%; background: white; }}
th, td {{ padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); }}
.key {{ padding: 0 6px; border: 3px solid; outline: 1px solid CanvasText; }}
.key.truth {{ border-color: {TRUTH}; }} .key.found {{ border-color: {FOUND}; }}
#control:not([hidden]) {{ position: sticky; top: 0; display: flex; gap: 10px; align-items: center;
  padding: 8px 0; background: Canvas; border-bottom: 1px solid var(--line); }}
#at {{ flex: 1; min-width: 0; height: 32px; }} output {{ min-width: 4ch; font-weight: bold; }}
.step {{ scroll-margin-top: 60px; }} #store {{ position: absolute; width: 0; height: 0; }}
ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(215px, 100%), 1fr));
  gap: 10px; padding: 0; list-style: none; }}
li {{ min-width: 0; padding: 8px; border: 1px solid var(--line); border-radius: 8px; }}
li svg {{ display: block; width: 100%; height: 200px; }} li p {{ margin: 4px 0; font-size: 13px; }}
li .text {{ height: 10em; overflow: auto; font-family: monospace; }}
pre, .text {{ white-space: pre-wrap; }} .pixels {{ image-rendering: pixelated; }}
mark.above {{ background: #ffd48a; }} mark.below {{ background: #b9d6ff; }} i {{ opacity: .6; }}
"""

SCRIPT = """
const steps = [...document.querySelectorAll(".step")], at = document.querySelector("#at");
function show(k) {
  steps.forEach((one, n) => one.hidden = n !== k);
  at.value = k;
  at.ariaValueText = document.querySelector("output").value = steps[k].id.slice(5);
}
if (steps.length) {
  at.max = steps.length - 1, at.parentElement.hidden = false;
  at.addEventListener("input", () => show(Number(at.value)));
  const linked = steps.findIndex(one => "#" + one.id === location.hash);
  show(linked < 0 ? steps.length - 1 : linked);
}
"""

# The outline of the white part of a mask, with a dark edge on both sides.
OUTLINE = Template("""<filter id="$id" filterUnits="userSpaceOnUse" x="0" y="0" $size>
<feColorMatrix type="luminanceToAlpha" result="mask"/>
<feMorphology in="mask" operator="dilate" radius="$line" result="line"/>
<feMorphology in="mask" operator="dilate" radius="$outer" result="outside"/>
<feMorphology in="mask" operator="erode" radius="$inner" result="inside"/>
<feFlood/><feComposite in2="outside" operator="in"/>
<feComposite in2="inside" operator="out" result="edge"/>
<feFlood flood-color="$colour"/><feComposite in2="line" operator="in"/>
<feComposite in2="mask" operator="out" result="outline"/>
<feMerge><feMergeNode in="edge"/><feMergeNode in="outline"/></feMerge></filter>""")


class Pictures:
    """The pictures of a page. Each is stored once; the page shows it by its id."""

    def __init__(self):
        self.ids: dict[tuple[str, int, int], str] = {}  # of (data URI, width, height)

    def id(self, uri: str, width: int, height: int) -> str:
        if not PICTURE.fullmatch(uri):
            raise ValueError("a picture is not a data URI of a PNG or JPEG")
        return self.ids.setdefault((uri, width, height), f"p{len(self.ids)}")

    def definitions(self) -> str:
        """Each picture as an image and as a mask, and two outlines for each size of pictures."""
        parts = []
        for (uri, width, height), name in self.ids.items():
            size = f'width="{width}" height="{height}" preserveAspectRatio="none"'
            parts.append(f'<image id="{name}" {size} href="{uri}"/>')
            parts.append(f'<mask id="{name}m"><use href="#{name}"/></mask>')
        for width, height in dict.fromkeys(key[1:] for key in self.ids):
            size, unit = f'width="{width}" height="{height}"', max(width, height) / 200
            for name, colour in (("truth", TRUTH), ("found", FOUND)):
                lines = {"line": 2.1 * unit, "outer": 3.2 * unit, "inner": 1.1 * unit}
                name = f"{name}{width}x{height}"
                parts.append(OUTLINE.substitute(lines, id=name, size=size, colour=colour))
        return "\n".join(parts)


def picture_html(pictures: Pictures, one: dict, answer: dict | None = None) -> str:
    """A sample with the outline of its truth and, given a completion, its mask, box and points."""
    width, height = map(int, one["size"])
    image, truth = (pictures.id(one[name], width, height) for name in ("image", "truth"))
    layers, marks, label = [f'<use href="#{image}"/>'], [], "true mask"
    if answer is not None:
        mask, unit = pictures.id(answer["mask"], width, height), max(width, height) / 200
        layers = [f'<rect width="{width}" height="{height}"/><use href="#{image}" opacity=".5"/>']
        layers += [f'<use href="#{image}" mask="url(#{mask}m)"/>']
        layers += [f'<use href="#{mask}" filter="url(#found{width}x{height})"/>']
        if answer["box"]:
            x1, y1, x2, y2 = map(float, answer["box"])
            box = f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" fill="none"'
            for colour, wide in (("black", 3.5 * unit), ("white", 1.5 * unit)):
                marks += [f'{box} stroke="{colour}" stroke-width="{wide}"/>']
        for x, y in answer["points"]:
            circle = f'<circle cx="{float(x)}" cy="{float(y)}" r="{3.5 * unit}" fill="white"'
            marks += [f'{circle} stroke="black" stroke-width="{1.5 * unit}"/>']
        label = f"mask with IoU {number(answer['iou'])}, box and points"
    layers += [f'<use href="#{truth}" filter="url(#truth{width}x{height})"/>', *marks]
    pixels = ' class="pixels"' if max(width, height) <= 256 else ""
    head = f'<svg{pixels} viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return f"{head}{''.join(layers)}</svg>"


def number(value, sign: str = "") -> str:
    """Three digits; a dash for None, NaN and infinity. sign: "+" also writes a plus."""
    return f"{value:{sign}.3g}" if value is not None and math.isfinite(value) else "\u2013"


def text_html(answer: dict) -> str:
    """A completion's tokens: clipped ones marked, special ones faint. Lines may end at commas."""
    parts, written = "", 0  # characters of the text; a special token is not part of it
    sides = answer["clipped"] or [0] * len(answer["tokens"])
    for k, (token, side) in enumerate(zip(answer["tokens"], sides, strict=True), 1):
        shown = html.escape(token).replace(",", ",<wbr>").replace("&lt;", "<wbr>&lt;")
        plain = answer["text"].startswith(token, written)
        written += len(token) * plain
        shown = shown if plain else f"<i>{shown}</i>"
        if side:
            name, sign = CLIPPED[side]
            title = f'class="{name}" title="token {k}, ratio clipped {name}"'
            shown = f"<mark {title}>{shown}<sup>{sign}</sup></mark>"
        parts += shown
    return parts


def answer_html(pictures: Pictures, one: dict, answer: dict) -> str:
    """A completion: its picture, reward, IoU, advantage, clipped tokens and text."""
    line = "reward <b>{}</b> = {} accuracy + {} think + {} answer<br>IoU <b>{}</b>"
    line = line.format(*(number(answer[name]) for name in NUMBERS))
    if answer["advantage"] is not None:
        line += f", advantage <b>{number(answer['advantage'], '+')}</b>"
    if (clipped := answer["clipped"]) is not None:
        line += f"<br>clipped {clipped.count(1)}\u25b2 {clipped.count(-1)}\u25bc of {len(clipped)}"
    text = f'<p class="text" tabindex="0">{text_html(answer)}</p>'
    return f"<li>{picture_html(pictures, one, answer)}\n<p>{line}</p>\n{text}</li>\n"


def scene_html(pictures: Pictures, one: dict) -> str:
    """A sample and its completions."""
    answers = "".join(answer_html(pictures, one, answer) for answer in one["completions"])
    first = f"<li>{picture_html(pictures, one)}\n<p>{html.escape(one['id'])}</p></li>\n"
    return f"<h5>{html.escape(one['query'])}: {means([one])}</h5>\n<ul>{first}{answers}</ul>\n"


def means(samples: list[dict]) -> str:
    """Mean reward and IoU of the completions of some samples, as text."""
    answers = [answer for one in samples for answer in one["completions"]]
    mean = {name: sum(a[name] for a in answers) / len(answers) for name in ("reward", "iou")}
    return f"mean reward {number(mean['reward'])}, mean IoU {number(mean['iou'])}"


def step_html(pictures: Pictures, rollout: dict) -> str:
    """A step's held-out scenes and training samples."""
    step = int(rollout["step"])
    parts = f'<section class="step" id="step-{step}">\n<h3>Step {step}</h3>\n'
    for title, samples in (("Held-out scenes", "heldout"), ("Training samples", "train")):
        if rollout[samples]:
            parts += f"<h4>{title}: {means(rollout[samples])}</h4>\n"
            parts += "".join(scene_html(pictures, one) for one in rollout[samples])
    return parts + "</section>\n"


def results_html(results: dict) -> str:
    """The table of eval.json, and the share of the gap to the ceiling that training closed."""
    if not results:
        return "<p>No evaluation was written yet.</p>"
    table = "".join(f"<th>{title}</th>" for title in ("", *COLUMNS.values()))
    for name, row in sorted(results.items(), key=lambda item: item[0] == "ceiling"):
        cells = "".join(f"<td>{number(row.get(column))}</td>" for column in COLUMNS)
        table += f"\n<tr><th>{html.escape(name)}</th>{cells}"
    note = "The ceiling is SAM with the true box and two good points."
    if {"before", "after", "ceiling"} <= set(results):
        before, after, ceiling = (results[name]["giou"] for name in ("before", "after", "ceiling"))
        share = (after - before) / max(ceiling - before, 1e-9)
        note += f" Training closed {100 * share:.0f} % of the gap in gIoU."
    return f'<div class="table"><table><tr>{table}</table></div>\n<p>{note}</p>'


def curves_html(rows: list[dict]) -> str:
    """The figure of plumbing.pictures.curves: three panels in a row or, on a phone, one."""
    if not rows:
        return "<p>No step was logged yet.</p>"
    uris = []
    for columns in (3, 1):
        buffer = io.BytesIO()
        curves(rows, columns).savefig(buffer, format="svg")
        uris.append("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
    phone = f'<source media="(max-width: 700px)" srcset="{uris[1]}">'
    image = f'<img class="curves" src="{uris[0]}" alt="Curves of {len(rows)} steps">'
    return f"<picture>{phone}{image}</picture>"


def check_metrics(row: dict) -> dict:
    """A line of metrics.jsonl: TypeError unless it has a step, and numbers or null as metrics."""
    [number(row.get(name)) for name in METRICS]
    return row | {"step": int(row["step"])}


def read(text: bytes, where: Path | str, use):
    """use(JSON) of a text. ValueError with one line that names the file if that is not possible."""
    try:
        return use(json.loads(text))
    except (*DAMAGE, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{where} is damaged, or was not written by a run ({reason})") from error


def report_html(run: Path) -> str:
    """The page of a run's folder, in ASCII. eval.json, metrics.jsonl and rollouts/ may be missing.

    Raises OSError or ValueError, with one line, if the folder is not a run's or a file is damaged.
    """
    file, lines, pictures = run / "config.json", [], Pictures()
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no config.json")
    config = read(file.read_bytes(), file, lambda data: html.escape(json.dumps(data, indent=2)))
    results = results_html({})
    if (file := run / "eval.json").is_file():
        results = read(file.read_bytes(), file, results_html)
    if (file := run / "metrics.jsonl").is_file():
        lines = file.read_bytes().split(b"\n")[:-1]  # a line without an end is still being written
    rows = [read(line, f"{file}, line {k},", check_metrics) for k, line in enumerate(lines, 1)]
    steps = [
        read(file.read_bytes(), file, lambda data: (int(data["step"]), step_html(pictures, data)))
        for file in (run / "rollouts").glob("step_*.json")
    ]
    hashes = (
        f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for kind, text in (("style", STYLE), ("script", SCRIPT))
    )
    page = PAGE.substitute(
        hashes="; ".join(hashes), name=html.escape(run.resolve().name), style=STYLE, script=SCRIPT,
        results=results, curves=curves_html(rows), config=config, pictures=pictures.definitions(),
        rollouts="".join(text for _, text in sorted(steps)) or "<p>No rollouts were logged.</p>",
    )  # fmt: skip
    return page.encode("ascii", "xmlcharrefreplace").decode()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.report", description="Write RUN/report.html.")
    parser.add_argument("run", type=Path, help="folder of a run")
    run = parser.parse_args(argv).run
    try:
        write_text(run / "report.html", report_html(run))
    except (OSError, ValueError) as error:
        parser.exit(2, f"report.py: {error}\n")
    print(f"written to {run / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    main()

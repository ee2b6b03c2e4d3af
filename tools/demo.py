"""demo.py - a page to try a model: ask it, change its thought, and see where the answer goes.

    python -m tools.demo --adapter RUN/adapter    the base model and the trained one, side by side
    python -m tools.demo                          the base model alone
    python -m tools.demo --help                   every setting

The page shows a drawn scene or a picture of yours, the answer token by token, SAM's mask, and the
reward if the true mask is known. It needs Gradio (pip install gradio). The server listens on this
machine only, unless --host says otherwise, and the page loads nothing from elsewhere.

The first half of the file asks the models. The second half is the page.
"""

import contextlib
import functools
import html
import io
import itertools
import os
import random
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from data import Sample, Shapes
from grpo import Completions, choose_token, mask_banned, prefill
from plumbing import pictures
from plumbing.command_line import exit_on_error, parse
from plumbing.devices import choose_device
from plumbing.photos import check_plain, check_query, read_picture
from plumbing.sam import load_sam
from plumbing.scenes import taught_thought
from plumbing.settings import PRESET_VALUES, DemoSettings, problem
from plumbing.vlm import base
from reward import SamScorer, Scores, score_completions
from samr1_mini import load_policy

# --------------------------------------------------------------------------------------------------
# Asking the models
# --------------------------------------------------------------------------------------------------

SCENES = Shapes("heldout")
FIRST = 2  # number of the scene that the page opens with: three shapes that stand apart
LARGEST = 1024  # pixels, longest side of a picture; SAM scales pictures to this too
LONGEST = 1000  # characters of a query or a thought


class Scene(NamedTuple):
    """What a page shows: a picture, and what is known about it."""

    image: Image.Image
    query: str  # "" for a picture of the user's
    mask: np.ndarray | None  # (H, W) bool, the true mask for `query`, or None
    thoughts: list[str]  # one for each thing, as the tiny model was taught to think about it

    def sample(self, query: str) -> tuple[Sample, bool]:
        """A sample that asks `query`, and whether its mask is the true one. Raises ValueError."""
        query, known = check_text(check_query(query), "query"), self.mask is not None
        if known and query == self.query:
            return Sample(self.image, query, self.mask, None, "scene"), True
        nothing = np.zeros((self.image.height, self.image.width), bool)
        return Sample(self.image, query, nothing, None, "picture"), False


def drawn_scene(number: int) -> Scene:
    """A held-out scene. Raises ValueError unless 0 <= number < len(SCENES)."""
    if not isinstance(number, int) or not 0 <= number < len(SCENES):
        raise ValueError(f"scenes have numbers from 0 to {len(SCENES) - 1}")
    image, things, query, target = SCENES.scene(number)
    thoughts = [taught_thought(thing, image.size) for thing in things]
    return Scene(image, query, things[target].mask, list(dict.fromkeys(thoughts)))


def uploaded_scene(file: str) -> Scene:
    """A picture of the user's. Raises ValueError, with the file's name, if it cannot be used."""
    try:
        image = read_picture(file)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three
        name = Path(file).name
        raise ValueError(f"{name} cannot be used: {str(error).replace(file, name)}") from error
    image.thumbnail((LARGEST, LARGEST))
    return Scene(image, "", None, [])


def check_text(text: str, name: str) -> str:
    """The text. Raises ValueError if a policy should not read it."""
    if len(text) > LONGEST:
        raise ValueError(f"the {name} has over {LONGEST} characters: shorten it")
    check_plain(text, name)
    return text


class Asker:
    """The base model, the trained model if there is an adapter, and SAM.

    One thread does all their work, because switching the adapter off switches it off for everyone.
    So two pages can ask at once: their tokens take turns.
    """

    def __init__(self, s: DemoSettings):
        with exit_on_error(f"--sam {s.sam}"):
            sam = load_sam(s.sam)
        self.policy, self.max_new_tokens = load_policy(s), s.max_new_tokens
        self.scorer = SamScorer(sam, self.policy.device, offload=s.save_memory >= 3)
        self.trained = s.adapter != "none"
        # The current CUDA device and the treatment of denormals are settings of a thread.
        self.worker = ThreadPoolExecutor(1, "asker", choose_device, [s.device])

    def answer(self, sample: Sample, trained: bool, start: str = "") -> Iterator[str]:
        """The greedy completion that begins with `start`: its text so far, after each token.

        The last text is that of `samr1_mini.sample_completions(..., greedy=True)`.
        """
        texts = self._answer(sample, start)

        def advance() -> str | None:
            off = self.trained and not trained
            adapter = self.policy.model.disable_adapter() if off else contextlib.nullcontext()
            with torch.no_grad(), adapter:
                return next(texts, None)

        while (text := self.worker.submit(advance).result()) is not None:
            yield text

    def _answer(self, sample: Sample, start: str) -> Iterator[str]:
        """`grpo.rollout` for one greedy completion, which yields after each token."""
        policy, tokens = self.policy, []
        prompts = policy.read([sample], [start])
        decoder, logits = prefill(base(policy.model), prompts, 1, self.max_new_tokens)
        while True:
            token = choose_token(mask_banned(logits.float(), policy.banned), 0.0, 1.0, None)
            tokens.append(token)
            ids = torch.stack(tokens, -1)[None].cpu()  # (1, 1, T)
            text = policy.texts(Completions(ids, torch.ones_like(ids, dtype=torch.bool)))[0][0]
            yield start + text.removeprefix(policy.opening) if start else text
            if len(tokens) == self.max_new_tokens or torch.isin(token, policy.end):
                return
            logits = decoder.step(token)

    def score(self, sample: Sample, text: str) -> Scores:
        """The reward of one completion, (1, 1), with its mask."""
        batch, options = ([sample], [[text]], self.policy.frame), {"style": self.policy.prompt}
        options["keep_masks"] = True
        return self.worker.submit(score_completions, self.scorer, *batch, **options).result()


def draw_answer(sample: Sample, known: bool, scores: Scores) -> Image.Image:
    """The picture with SAM's mask, box and points, and with the true mask if it is known."""
    width, height = sample.image.size
    scale = 3.6 / max(width, height)  # inches for a pixel; lines and points have their usual size
    figure = Figure(figsize=(width * scale, height * scale), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_frame_on(False)
    mask = scores.overlap.masks[0][0].cpu().numpy()
    pictures.draw_mask(axes, sample.image, mask, pictures.FOUND)
    if known:
        pictures.draw_outline(axes, sample.mask, pictures.TRUTH)
    pictures.draw_prompt(axes, scores.prompts[0][0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


# --------------------------------------------------------------------------------------------------
# Parts of the page as HTML. Queries and completions are untrusted: all text is escaped
# --------------------------------------------------------------------------------------------------


def picture_html(image: Image.Image, meaning: str, kind: str = "PNG") -> str:
    """A picture within the page, so that the server keeps no file of it. kind: "PNG" or "JPEG"."""
    name = "picture pixels" if max(image.size) <= pictures.PHOTOGRAPH else "picture"
    return f'<img class="{name}" src="{pictures.data_uri(image, kind)}" alt="{meaning}">'


def answer_html(text: str, start: str = "", waiting: bool = False) -> str:
    """A completion, in which the beginning that the user wrote is marked."""
    written, rest = html.escape(start), html.escape(text.removeprefix(start))
    written = f"<mark>{written}</mark>" if written else ""
    cursor = '<span class="cursor">&#9611;</span>' if waiting else ""
    return f'<div class="answer">{written}{rest}{cursor}</div>'


def result_html(sample: Sample, known: bool, scores: Scores) -> str:
    """The picture of `draw_answer`, reward and parts (formats only if not known), box, points."""
    kind = "PNG" if max(sample.image.size) <= pictures.PHOTOGRAPH else "JPEG"
    picture = picture_html(draw_answer(sample, known, scores), "box, points and SAM's mask", kind)
    prompt, values = scores.prompts[0][0], {"IoU": f"{scores.iou.item():.2f}"}
    for name in ("accuracy", "think_format", "answer_format", "reward"):
        values[name.replace("_", " ")] = f"{getattr(scores, name).item():g}"
    note = ""
    if not known:
        values |= dict.fromkeys(("IoU", "accuracy", "reward"), "&ndash;")
        note = "<p>Only a drawn scene with its own query has a true mask to compare with.</p>"
    head, cells = "".join(f"<th>{x}" for x in values), "".join(f"<td>{x}" for x in values.values())
    box = ", ".join(f"{v:.0f}" for v in prompt.box) if prompt.box else "none"
    points = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in prompt.points) or "none"
    where = f"<p>Box <b>{box}</b>, points <b>{points}</b>, in pixels of the picture.</p>"
    return f"{picture}<table><tr>{head}<tr>{cells}</table>{note}{where}"


def message_html(reason: object) -> str:
    """What is wrong with a query, a thought or a picture."""
    reason = " ".join(str(reason).split())[:300]
    return f'<div class="message" role="alert">{html.escape(reason)}</div>'


HEADER = f"""<h1>SAM-R1 mini</h1><p>The policy reads the picture and the query. It thinks, then
answers with a box and two points, and SAM turns these into a mask. <b>Change the thought</b> and
let the policy go on from there: does the answer follow?</p><p class="legend">
<span><i style="border-color:{pictures.TRUTH}"></i>true mask, if known</span>
<span><i style="border-color:{pictures.FOUND}"></i>SAM's mask</span>
<span><i style="border-color:white"></i>box and points</span>
<span><i style="border-color:#ffd48a; background:#ffd48a"></i>what you wrote in the answer</span>
</p>"""
UNTRAINED = """<p>This is the base model. To see a trained one beside it, train it (minutes on a
laptop), then start the page with its adapter:</p>
<pre>python samr1_mini.py train
python -m tools.demo --adapter runs/shapes-tiny-0/adapter</pre>"""
READY = '<div class="answer idle">Press Ask, or write a thought.</div>'
STYLE = (Path(__file__).parent / "demo.css").read_text()


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


QUIET = {"show_progress": "hidden", "api_visibility": "private"}


class Column(NamedTuple):
    """The parts of the page that belong to one model. The last five are Gradio components."""

    trained: bool
    answer: object
    thought: object
    others: object  # thoughts to take
    resume: object  # the button
    result: object


class Parts(NamedTuple):
    """The other parts of the page, all of them Gradio components."""

    scene: object  # what the tab of the browser shows, a `Scene`
    picture: object
    number: object
    another: object
    upload: object
    query: object
    ask: object
    message: object


def add_column(gr, trained: bool, scene: Scene) -> Column:
    """Lay out one model's answer, and its thought, which can be changed."""
    with gr.Column(min_width=300):
        gr.Markdown("## Trained model" if trained else "## Base model")
        answer = gr.HTML(READY)
        hint = "the red star is at the top left"
        thought = gr.Textbox(label="Thought: edit it, or take one", lines=2, placeholder=hint)
        samples = [[one] for one in scene.thoughts]
        others = gr.Dataset(components=["textbox"], samples=samples, show_label=False)
        others.click(lambda row: row[0], others, thought, queue=False, **QUIET)
        resume = gr.Button("Go on from this thought")
        result = gr.HTML(elem_classes=["result"])
    return Column(trained, answer, thought, others, resume, result)


def add_parts(gr, scene: Scene, trained: bool) -> Parts:
    """Lay out the picture, where it comes from, and the query."""
    with gr.Column(min_width=300):
        gr.Markdown("## Picture and query")
        picture = gr.HTML(picture_html(scene.image, "the picture"))
        with gr.Row():
            number = gr.Number(FIRST, label="Scene number", precision=0, min_width=100)
            with gr.Column(min_width=140):
                another = gr.Button("Another scene", size="md")
                upload = gr.UploadButton("Upload a picture", size="md")
        query = gr.Textbox(scene.query, label="Query")
        ask, message = gr.Button("Ask", variant="primary"), gr.HTML()
        if not trained:
            gr.HTML(UNTRAINED)
    return Parts(gr.State(scene), picture, number, another, upload, query, ask, message)


def build_page(gr, asker: Asker):
    """The page as gradio.Blocks. Each tab of a browser has its own scene; they share the models."""
    first = drawn_scene(FIRST)
    with gr.Blocks(title="SAM-R1 mini", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.HTML(HEADER, elem_id="header")
        with gr.Row():
            parts = add_parts(gr, first, asker.trained)
            models = (False, True) if asker.trained else (False,)
            columns = [add_column(gr, trained, first) for trained in models]
        running = connect_questions(asker, parts, columns)
        connect_scenes(gr, parts, columns, running)
    return page


def ask(asker: Asker, parts: Parts, columns: list[Column], scene: Scene, query: str):
    """Let all models answer a query. Yields what changes on the page: {part: its new value}."""
    try:
        sample, known = scene.sample(query)
    except ValueError as error:
        yield {parts.message: message_html(error)}
        return
    yield {parts.message: ""}
    yield from respond(asker, columns, sample, known)


def resume(asker: Asker, column: Column, scene: Scene, query: str, thought: str):
    """Let one model continue from a thought. Yields what changes on the page."""
    try:
        start = f"<think>{check_text(thought, 'thought')}</think>"
        sample, known = scene.sample(query)
    except ValueError as error:
        yield {column.answer: message_html(error), column.result: ""}
        return
    yield from respond(asker, [column], sample, known, start)


def respond(asker: Asker, columns: list[Column], sample: Sample, known: bool, start: str = ""):
    """Complete a sample, one token of each model in turn, then score the completions."""
    yield {column.result: "" for column in columns}
    texts = [start] * len(columns)
    streams = [asker.answer(sample, column.trained, start) for column in columns]
    for new in itertools.zip_longest(*streams):
        texts = [last if text is None else text for text, last in zip(new, texts, strict=True)]
        shown = zip(columns, texts, strict=True)
        yield {column.answer: answer_html(text, start, waiting=True) for column, text in shown}
    for column, text in zip(columns, texts, strict=True):
        scores = asker.score(sample, text)
        changes = {column.answer: answer_html(text, start)}
        changes[column.result] = result_html(sample, known, scores)
        if not start:
            changes[column.thought] = scores.answers[0][0].thought
        yield changes


def connect_questions(asker: Asker, parts: Parts, columns: list[Column]) -> list:
    """Connect what asks a model. Returns the events. They run one at a time."""
    options = {"concurrency_id": "models", "concurrency_limit": 1, **QUIET}
    inputs, outputs = [parts.scene, parts.query], [parts.message]
    for column in columns:
        outputs += [column.answer, column.result, column.thought]
    handler = functools.partial(ask, asker, parts, columns)
    starts = (parts.ask.click, parts.query.submit)
    events = [start(handler, inputs, outputs, **options) for start in starts]
    for column in columns:
        handler = functools.partial(resume, asker, column)
        for start in (column.resume.click, column.thought.submit):
            changed = [column.answer, column.result, column.thought]
            events.append(start(handler, [*inputs, column.thought], changed, **options))
    return events


def connect_scenes(gr, parts: Parts, columns: list[Column], running: list) -> None:
    """Connect what changes the picture. It stops the `running` answers about the old one."""

    def show(scene: Scene, number: int | None) -> dict:
        changes = {parts.scene: scene, parts.number: number, parts.query: scene.query}
        changes |= {parts.picture: picture_html(scene.image, "the picture"), parts.message: ""}
        for column in columns:
            changes |= {column.answer: READY, column.result: "", column.thought: ""}
            samples = [[thought] for thought in scene.thoughts]
            changes[column.others] = gr.Dataset(samples=samples, visible=bool(samples))
        return changes

    def draw(number: int) -> dict:
        try:
            return show(drawn_scene(number), number)
        except ValueError as error:
            return {parts.message: message_html(error)}

    def upload(file: str) -> dict:
        try:
            return show(uploaded_scene(file), None)
        except ValueError as error:
            return {parts.message: message_html(error)}

    outputs = [parts.scene, parts.number, parts.query, parts.picture, parts.message]
    for column in columns:
        outputs += [column.answer, column.result, column.thought, column.others]
    changes = (
        (parts.number.submit, draw, parts.number),
        (parts.another.click, lambda: draw(random.randrange(len(SCENES))), None),
        (parts.upload.upload, upload, parts.upload),
    )
    for start, handler, inputs in changes:  # first stop: the last token must not come after
        start(None, cancels=running).then(handler, inputs, outputs, **QUIET)


def load_gradio():
    """Gradio, told not to report its use. Exits with code 2 if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with exit_on_error("python -m tools.demo needs Gradio: pip install gradio", (ImportError,)):
        import gradio
    return gradio


def main(argv: list[str] | None = None) -> None:
    about = "A page to try a model, and to change its thought. See the top of tools/demo.py."
    argv = sys.argv[1:] if argv is None else argv
    s = parse(DemoSettings, argv, "python -m tools.demo", about, PRESET_VALUES, set(), problem)
    gr = load_gradio()
    with exit_on_error(f"--host {s.host} --port {s.port}"):  # before the models are loaded
        try:
            socket.create_server((s.host, s.port)).close()
        except OSError as error:
            raise OSError(f"{error}: choose another port, or leave both out") from error
    page = build_page(gr, Asker(s))
    print(f"open {serve(gr, page, s.host, s.port)} in a browser; Ctrl-C ends the page", flush=True)
    page.block_thread()


def serve(gr, page, host: str, port: int) -> str:
    """Start the server in a thread of its own. Returns the page's address."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(**fonts),  # in Gradio's own bold font, letters are missing
        css=STYLE,
        footer_links=[],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


if __name__ == "__main__":
    main()

"""demo.py - a page to try a model: ask it, change its thought, and see where the answer goes.

    python -m tools.demo --adapter RUN/adapter    the base model and the trained one, side by side
    python -m tools.demo                          the base model alone
    python -m tools.demo --help                   every setting

The page needs Gradio (pip install gradio). The server listens on this machine only, unless --host
says otherwise, and the page loads nothing from elsewhere. Completions are untrusted: they are shown
in text boxes, which do not read markup.
"""

import contextlib
import dataclasses
import functools
import html
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import Sample, Shapes
from plumbing import pictures
from plumbing.errors import UserError, exit_with_one_line
from plumbing.photos import check_plain, check_query, read_picture
from plumbing.settings import Models, parse, setting
from reward import Scores, score_completions
from samr1_mini import load_policy, load_scorer, sample_completions

SCENES = Shapes("heldout")
FIRST = 2  # number of the scene that the page opens with: three shapes that stand apart
LARGEST = 1024  # pixels, longest side of a picture; SAM scales pictures to this too
UPLOAD = "20mb"  # largest file that the server accepts
LONGEST = 1000  # characters of a query or a thought

INTRODUCTION = """# SAM-R1 mini
The policy reads the picture and the query. It thinks, then answers with a box and two points, and
SAM turns these into a mask. **Change the thought** and let the policy go on from there: does the
answer follow? Outlines: green is the true mask, if it is known, and magenta is SAM's mask. Box and
points are white."""
THOUGHT = "Thought: edit it, for example to: the red triangle is at the bottom left"


@dataclasses.dataclass
class DemoFlags:
    _argument_group_name = "page"
    adapter: str = setting("none", "folder of a trained adapter, or none for the base model alone")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines ask too")
    port: int = setting(7860, "port to listen on")


@dataclasses.dataclass
class DemoSettings(Models, DemoFlags):
    """A page to try a model, and to change its thought. See the top of tools/demo.py."""


class Asker:
    """The base model, the trained model if there is an adapter, and SAM."""

    def __init__(self, s: DemoSettings):
        self.settings = s
        self.trained = s.adapter != "none"
        self.policy = load_policy(s, s.adapter)
        self.scorer = load_scorer(s, self.policy.device)
        config = self.policy.model.active_peft_config if self.trained else None
        start = str(getattr(config, "init_lora_weights", ""))
        if getattr(config, "bias", "none") != "none" or start.startswith(("pissa", "olora")):
            reason = "it changes weights of the base model, which could not be shown beside it"
            raise UserError(f"--adapter {s.adapter}: {reason}: merge it (tools.merge), name --vlm")

    def complete(self, sample: Sample, trained: bool, start: str = "") -> str:
        """The greedy completion that begins with `start`."""
        policy = self.policy
        off = self.trained and not trained
        with policy.model.disable_adapter() if off else contextlib.nullcontext():
            prompts = policy.read([sample], [start])
            completions = sample_completions(policy, prompts, self.settings, greedy=True)
        text = policy.texts(completions)[0][0]
        return start + text.removeprefix(policy.opening) if start else text


def drawn_scene(number: int) -> Sample:
    """A held-out scene."""
    if number not in range(len(SCENES)):
        raise UserError(f"scenes have numbers from 0 to {len(SCENES) - 1}")
    return SCENES[number]


def uploaded_picture(file: str | None) -> Sample:
    """A picture of the user's, scaled down to LARGEST."""
    file = file or ""  # a client can send none
    try:
        image = read_picture(file)
    except UserError as error:
        raise UserError(str(error).replace(file, Path(file).name)) from error
    image.thumbnail((LARGEST, LARGEST))
    # The true mask is not known. An empty one stands in for it, and no score against it is shown.
    return Sample(image, "", np.zeros((image.height, image.width), bool), None, "picture")


def describe(scores: Scores, known: bool) -> str:
    """Reward and parts (formats only if the true mask is not known), box and points."""
    prompt = scores.prompts[0][0]
    formats = f"{scores.think_format.item():g} think + {scores.answer_format.item():g} answer"
    line = f"formats {formats}; reward and IoU need the true mask"
    if known:
        line = f"reward {scores.reward.item():g} = {scores.accuracy.item():g} accuracy + {formats}"
        line += f"; IoU {scores.iou.item():.2f}"
    box = ", ".join(f"{v:.0f}" for v in prompt.box) if prompt.box else "none"
    points = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in prompt.points) or "none"
    return f"{line}\nbox {box}; points {points}, in pixels of the picture"


def answer(asker: Asker, trained: bool, shown: Sample, query: str, thought: str | None = ""):
    """Let one model answer, after its own thought or after the given one.

    shown: the scene on the page. Its mask is the true one if the query is the scene's own.
    Returns (thought, completion, picture, description).
    """
    query = check_query(query)
    thought = thought or ""  # a client can send no text at all
    check_plain(thought, "thought")
    if max(len(query), len(thought)) > LONGEST:  # Gradio limits what is typed, not what is sent
        raise UserError(f"a query or a thought has at most {LONGEST} characters")
    known = query == shown.query
    sample = dataclasses.replace(shown, query=query)
    text = asker.complete(sample, trained, f"<think>{thought}</think>" if thought else "")
    policy = asker.policy
    scores = score_completions(
        asker.scorer, [sample], [[text]], policy.extent, keep_masks=True, style=policy.style
    )  # (1, 1)
    mask = scores.overlap.masks[0][0].cpu().numpy()
    truth = shown.mask if known else None
    picture = pictures.answer_picture(shown.image, mask, scores.prompts[0][0], truth, side=480)
    return thought or scores.answers[0][0].thought, text, picture, describe(scores, known)


def show(make: Callable[..., Sample], source: int | str) -> tuple[Sample, Image.Image, str]:
    """The sample that `make` makes of its source, its picture (a small one enlarged), its query."""
    sample = make(source)
    factor = max(1, 480 // max(sample.image.size))
    return sample, ImageOps.scale(sample.image, factor, Image.Resampling.NEAREST), sample.query


def with_message(gr, handler, *arguments):
    """handler(*arguments), with a message on the page about what cannot be used."""
    try:
        return handler(*arguments)
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def build_page(gr, asker: Asker):
    """The page as gradio.Blocks. gr: the module gradio."""
    scene, image, asked = show(drawn_scene, FIRST)
    view = dict(height=420, format="png", interactive=False, buttons=["fullscreen"])
    # One event at a time: one that switches the adapter off does so for all of them.
    queue = {"concurrency_id": "models", "concurrency_limit": 1}
    with gr.Blocks(title="SAM-R1 mini", delete_cache=(600, 600)) as page:
        gr.Markdown(INTRODUCTION)
        shown = gr.State(scene)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(image, label="Picture", **view)
                number = gr.Number(FIRST, label="Scene: a number, then Enter", precision=0)
                upload = gr.UploadButton("Upload a picture", file_types=["image"])
                query = gr.Textbox(asked, label="Query", max_length=LONGEST)
                ask = gr.Button("Ask", variant="primary")
            for trained in (False, True) if asker.trained else (False,):
                with gr.Column():
                    gr.Markdown("### Trained model" if trained else "### Base model")
                    thought = gr.Textbox(label=THOUGHT, lines=2, max_length=LONGEST)
                    resume = gr.Button("Go on from this thought")
                    completion = gr.Textbox(label="Completion", lines=4)
                    mask = gr.Image(label="SAM's mask", **view)
                    reward = gr.Textbox(label="Reward", lines=3)
                handler = functools.partial(with_message, gr, answer, asker, trained)
                outputs = [thought, completion, mask, reward]
                gr.on([ask.click, query.submit], handler, [shown, query], outputs, **queue)
                starts = [resume.click, thought.submit]
                gr.on(starts, handler, [shown, query, thought], outputs, **queue)
        outputs = [shown, picture, query]
        number.submit(functools.partial(with_message, gr, show, drawn_scene), number, outputs)
        upload.upload(functools.partial(with_message, gr, show, uploaded_picture), upload, outputs)
    return page


def main(argv: list[str]):
    s = parse(DemoSettings, argv, program="python -m tools.demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio would report its use
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("python -m tools.demo needs Gradio: pip install gradio") from error
    page = build_page(gr, Asker(s))
    try:
        launch(gr, page, s.host, s.port)
    except OSError as error:
        raise UserError(f"--host {s.host} --port {s.port}: {error}") from error
    page.block_thread()


def launch(gr, page, host: str, port: int) -> str:
    """Start the server in a thread of its own. Returns the page's address."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        # Gradio's own fonts come from another server.
        theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
        max_file_size=UPLOAD,
        show_error=True,
        share=False,
        prevent_thread_lock=True,
    )
    return address


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])

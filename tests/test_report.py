"""The run report: what is recorded of a rollout, the page's data, and the page itself in a browser (skipped where there is none)."""

import base64
import doctest
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from assets import report
from grpo import Completions
from reward import SamPrompt, score_completions

ROOT = Path(report.__file__).resolve().parent.parent
HOSTILE = '</script><script>alert(1)</script><img src="http://x/y" onerror="alert(2)"><!-- <b>'
RIGHT = '<think>the red circle is at the top left</think><answer>{"bbox":[%d,%d,%d,%d],"points_1":[%d,%d],"points_2":[%d,%d]}</answer>'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "vlm")


def answers_near(sample, shift: int) -> list[str]:
    """Four texts about a sample: its true box moved by so many policy pixels, a box without points, no answer, nothing."""
    rows, columns = np.nonzero(sample.mask)
    x, y = (np.array((v.min(), v.max() + 1)) * 64 / side for v, side in zip((columns, rows), sample.image.size, strict=True))
    x, y = (np.clip(v.round().astype(int) + shift, 0, 64) for v in (x, y))
    middle = (x.sum() // 2, y.sum() // 2)
    good = RIGHT % (x[0], y[0], x[1], y[1], *middle, *middle)
    return [good, good.split(',"points_1"')[0] + "}</answer>", "<think>the star</think>", ""]


def complete(tokenizer, texts: list[list[str]]) -> Completions:
    """The texts as tokens, each ended by the end-of-text token."""
    rows = [[tokenizer.encode(text) + [tokenizer.eos_token_id] for text in group] for group in texts]
    longest = max(len(ids) for group in rows for ids in group)
    mask = torch.tensor([[[k < len(ids) for k in range(longest)] for ids in group] for group in rows])
    return Completions(torch.tensor([[ids + [0] * (longest - len(ids)) for ids in group] for group in rows]), mask)


@pytest.fixture(scope="module")
def rolled(samples, scorer, tokenizer):
    """Three scenes of different shapes with four answers each, before (shift 12) and after (shift 0) some training."""

    def at(shift: int) -> SimpleNamespace:
        texts = [answers_near(one, shift) for one in samples[:3]]
        scores = score_completions(scorer, samples[:3], texts, 64, keep_masks=True)
        return SimpleNamespace(texts=texts, completions=complete(tokenizer, texts), scores=scores)

    return {shift: at(shift) for shift in (12, 4, 0)}


def decode(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
    return Image.open(io.BytesIO(base64.b64decode(body)))


# ---------------------------------------------------------------------------------------------------------------------
# record
# ---------------------------------------------------------------------------------------------------------------------


def test_a_record_holds_what_was_scored(samples, rolled, tokenizer):
    it = rolled[0]
    advantages = torch.arange(12.0).view(3, 4) - 5.5
    clipped = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, it.completions.ids.shape).astype(np.int8))
    rows = json.loads(json.dumps(report.record(samples[:3], it.completions, it.scores, tokenizer, advantages, clipped)))
    assert [row["id"] for row in rows] == [one.id for one in samples[:3]]
    for b, (row, one) in enumerate(zip(rows, samples, strict=False)):
        assert set(row) == set(report.SCENE) and row["query"] == one.query and row["size"] == list(one.image.size)
        assert np.array_equal(np.asarray(decode(row["image"])), np.asarray(one.image))  # small, so without loss
        assert np.array_equal(np.asarray(decode(row["truth"])), one.mask)
        for g, answer in enumerate(row["completions"]):
            assert set(answer) == set(report.ANSWER) and answer["text"] == it.texts[b][g]
            for name in report.NUMBERS:
                assert answer[name] == getattr(it.scores, name)[b, g].item()
            prompt, length = it.scores.prompts[b][g], it.completions.mask[b, g].sum()
            assert SamPrompt(answer["box"] and tuple(answer["box"]), tuple(map(tuple, answer["points"]))) == prompt
            assert answer["advantage"] == advantages[b, g] and answer["clipped"] == clipped[b, g, :length].tolist()
            assert len(answer["tokens"]) == length and answer["tokens"][-1] == "<|im_end|>"
            assert "".join(answer["tokens"][:-1]) == answer["text"]
            mask = decode(answer["mask"])
            assert mask.mode == "1" and np.array_equal(np.asarray(mask), it.scores.overlap.masks[b][g].numpy())
    assert sum(answer["iou"] > 0.8 for row in rows for answer in row["completions"]) >= 3


def test_without_an_update_there_are_no_advantages_and_the_first_rows_are_taken(samples, rolled, tokenizer):
    it = rolled[0]
    (row,) = report.record(samples[:1], it.completions, it.scores, tokenizer)
    assert [answer["text"] for answer in row["completions"]] == it.texts[0]
    assert all(answer["advantage"] is None and answer["clipped"] is None for answer in row["completions"])


@pytest.mark.parametrize("size", [(1280, 960), (300, 1000), (500, 400), (2000, 1)])
def test_large_pictures_shrink_and_their_masks_with_them(rolled, tokenizer, size):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[: height // 2 + 1, : width // 2] = True
    sample = SimpleNamespace(id="a", query="q", image=Image.new("RGB", size, "navy"), mask=mask)
    it = rolled[0]
    masks = [torch.from_numpy(np.stack([mask, ~mask, mask, mask]))]
    scores = it.scores._replace(overlap=it.scores.overlap._replace(masks=masks))
    (row,) = report.record([sample], it.completions, scores, tokenizer)
    image, truth, other = (decode(uri) for uri in (row["image"], row["truth"], row["completions"][1]["mask"]))
    assert image.format == "JPEG" and image.size == truth.size == other.size and max(image.size) == min(640, max(size))
    assert row["size"] == [width, height]
    assert np.asarray(truth).mean() == pytest.approx(mask.mean(), abs=0.01)
    assert np.array_equal(np.asarray(other), ~np.asarray(truth))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, as Qwen's is, without merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(rest)}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.decoder = decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    assert tokens.eos_token_id == 256
    return tokens


def test_tokens_join_to_the_text_also_within_characters():
    tokens = byte_tokenizer()
    ids = [*"née\U0001f600 ".encode(), tokens.eos_token_id]
    assert report.token_texts(ids, tokens) == ["n", "", "é", "e", "", "", "", "\U0001f600", " ", "<|im_end|>"]
    assert report.token_texts([], tokens) == []
    rng = np.random.default_rng(0)
    for _ in range(200):  # bytes that are no text, characters cut off by the end or by a special token
        ids = rng.choice([*"aé\U0001f600 \n".encode(), 255, 256], rng.integers(1, 30)).tolist()
        texts = report.token_texts(ids, tokens)
        assert len(texts) == len(ids)
        plain = [text for text, i in zip(texts, ids, strict=True) if i != 256]
        assert "".join(plain) == tokens.decode(ids, skip_special_tokens=True)


def test_docstrings():
    assert doctest.testmod(report).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# report_html
# ---------------------------------------------------------------------------------------------------------------------


def make_run(run: Path, rolled, samples, tokenizer) -> Path:
    """A finished run of 100 steps, of which 1, 50 and 100 have rollouts. A NaN and hostile texts are among it."""
    run.mkdir()
    config = {"vlm": "tiny", "sam": "tiny", "data": "shapes", "seed": 0, "steps": 100, "note": HOSTILE}
    (run / "config.json").write_text(json.dumps(config))
    before, after = ({"giou": g, "ciou": g - 0.05, "format": 0.9, "box": 0.5, "n": 64} for g in (0.5, 0.75))
    (run / "eval.json").write_text(json.dumps({"before": before, "ceiling": {"giou": 0.9, "ciou": 0.85, "n": 64}, "after": after}))
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, 101):
        row = {"step": step, "reward": 2 + step / 40 + rng.uniform(), "accuracy": step / 40, "iou": step / 120, "kl": step / 300}
        rows.append(row | {"clip_low": 0.001, "clip_high": rng.uniform() / 100, "length": 30.0, "seconds_rollout": 0.25})
    rows[6]["kl"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "rew')  # being written
    (run / "rollouts").mkdir()
    for step, it in zip((1, 50, 100), rolled.values(), strict=True):
        clipped = torch.zeros(it.completions.ids.shape, dtype=torch.int8)
        clipped[0, 0, 4], clipped[0, 0, 6] = 1, -1
        advantages = it.scores.reward - it.scores.reward.mean(1, keepdim=True)
        train = report.record(samples[:2], it.completions, it.scores, tokenizer, advantages, clipped)
        train[1] |= {"query": HOSTILE, "id": HOSTILE}
        train[1]["completions"][0] |= {"text": HOSTILE, "tokens": re.findall(r"\W|\w+", HOSTILE), "clipped": None}
        rollout = {"step": step, "train": train, "heldout": report.record(samples[:3], it.completions, it.scores, tokenizer)}
        (run / "rollouts" / f"step_{step:05d}.json").write_text(json.dumps(rollout))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, rolled, samples, tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", rolled, samples, tokenizer)


@pytest.fixture
def damaged(tmp_path, run) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def data_of(page: str) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page).group(1), parse_constant=refuse)


def test_the_page_holds_the_run_once_and_safely(run):
    page = report.report_html(run)
    assert page.isascii() and page.count("<script") == page.count("</script>") == 2
    data = data_of(page)
    assert data["config"]["note"] == HOSTILE and data["rollouts"][0]["train"][1]["query"] == HOSTILE
    assert [row["step"] for row in data["metrics"]] == list(range(1, 101)) and data["metrics"][6]["kl"] is None
    assert [rollout["step"] for rollout in data["rollouts"]] == [1, 50, 100]
    assert len(set(data["pictures"])) == len(data["pictures"]) and all(page.count(uri) == 1 for uri in data["pictures"])
    for rollout in data["rollouts"]:
        original = json.loads((run / "rollouts" / f"step_{rollout['step']:05d}.json").read_text())
        for one in rollout["train"] + rollout["heldout"]:
            for part, name in [(one, "image"), (one, "truth"), *((answer, "mask") for answer in one["completions"])]:
                part[name] = data["pictures"][part[name]]
        assert rollout == original


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    data = data_of(report.report_html(tmp_path))
    assert data["metrics"] == data["rollouts"] == data["pictures"] == [] and data["eval"] == {}


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json") as error:
        report.report_html(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "eval.json", "metrics.jsonl", "rollouts/step_00050.json"])
@pytest.mark.parametrize("content", [b'{"step": 1, "tra\n', b"\xff\xfe\x00\x81\n"])
def test_a_damaged_file_is_named(damaged, name, content):
    (damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        report.report_html(damaged)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda rollout: rollout.pop("heldout"),
    lambda rollout: rollout.pop("step"),
    lambda rollout: rollout.update(step="many"),
    lambda rollout: rollout.update(train=None),
    lambda rollout: rollout["train"].append("text"),
    lambda rollout: rollout["heldout"][0].pop("size"),
    lambda rollout: rollout["train"][0]["completions"][2].pop("mask"),
])  # fmt: skip
def test_a_rollout_file_that_lacks_something_is_named(damaged, change):
    file = damaged / "rollouts" / "step_00050.json"
    rollout = json.loads(file.read_text())
    change(rollout)
    file.write_text(json.dumps(rollout))
    with pytest.raises(ValueError, match=r"step_00050\.json is damaged"):
        report.report_html(damaged)


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser
# ---------------------------------------------------------------------------------------------------------------------

# The DevTools protocol goes over two pipes that the browser expects as its files 3 and 4.
START = """import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4), os.execvp(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One page of a headless Chromium. Call it with a method of the DevTools protocol."""

    def __init__(self, program: str, profile: Path):
        theirs_in, self.out = os.pipe()
        self.source, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--disable-breakpad"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), program, *flags],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.sent, self.session, self.events = b"", 0, {}, []
        page = next(one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = {"sessionId": self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.source], [], [], 60)[0], "the browser says nothing"
            more = os.read(self.source, 1 << 20)
            assert more, "the browser is gone"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **params) -> dict:
        self.sent += 1
        os.write(self.out, json.dumps({"id": self.sent, "method": method, "params": params} | self.session).encode() + b"\0")
        while (message := self.read()).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, address: str, width: int = 1280, scheme: str = "light") -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for each in ("about:blank", address):  # between two fragments alone the browser would not load anew
            self.events.clear()
            self("Page.navigate", url=each)
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.events.append(self.read())

    def js(self, code: str):
        result = self("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, modifiers: int = 0) -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        for event in (down, {"type": "keyUp"}):
            self("Input.dispatchKeyEvent", key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers, **event)

    def close(self) -> None:
        self.session = {}
        self("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.source)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program or os.name != "posix":
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(run) -> str:
    (run / "report.html").write_text(report.report_html(run))
    return (run / "report.html").as_uri()


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


SHOWN = """({
    step: document.querySelector("#step-shown").textContent,
    queries: [...document.querySelectorAll("#scenes label span")].map(one => one.textContent),
    answers: [...document.querySelectorAll(".answer")].map(card => ({
        numbers: Object.fromEntries([...card.querySelectorAll(".row")].map(row => [row.firstChild.textContent, row.querySelector("b").textContent])),
        parts: card.querySelector("small").textContent,
        tokens: [...card.querySelectorAll(".tokens > span")].map(one => one.firstChild ? one.firstChild.data : ""),
        text: card.querySelector(".tokens").textContent,
        clipped: [...card.querySelectorAll(".tokens .high, .tokens .low")].map(one => [one.className, one.textContent, one.title]),
        picture: card.querySelector("svg").getAttribute("aria-label"),
        mask: card.querySelector("svg mask image").getAttribute("href"),
    })),
})"""


@pytest.mark.parametrize(("step", "group", "scene"), [(1, "heldout", 1), (100, "heldout", 3), (50, "train", 1), (50, "train", 2)])
def test_an_address_shows_its_rollout(browser, page, run, step, group, scene):
    browser.open(f"{page}#step={step}&set={group}&scene={scene}")
    shown = browser.js(SHOWN)
    scenes = json.loads((run / "rollouts" / f"step_{step:05d}.json").read_text())[group]
    one = scenes[scene - 1]
    assert shown["step"] == str(step)
    for text, each in zip(shown["queries"], scenes, strict=True):
        reward, iou = re.fullmatch(re.escape(each["query"]) + r"reward (\S+), IoU (\S+)", text).groups()
        for value, name in ((reward, "reward"), (iou, "iou")):
            assert number(value) == pytest.approx(np.mean([answer[name] for answer in each["completions"]]), rel=1e-3)
    for g, (card, answer) in enumerate(zip(shown["answers"], one["completions"], strict=True), 1):
        numbers = card["numbers"]
        assert number(numbers[f"Answer {g}"]) == pytest.approx(answer["reward"], rel=1e-3)
        assert number(numbers["IoU"]) == pytest.approx(answer["iou"], rel=1e-3)
        assert re.findall(r"[\d.]+", card["parts"]) == [f"{answer[name]:g}" for name in ("accuracy", "think_format", "answer_format")]
        assert ("advantage" in numbers) == (group == "train")
        if group == "train":
            assert number(numbers["advantage"]) == pytest.approx(answer["advantage"], rel=1e-3, abs=1e-6)
        assert card["tokens"] == answer["tokens"] and card["mask"] == answer["mask"]
        assert card["text"].startswith(answer["text"]) or answer["clipped"]
    if (step, group, scene) == (50, "train", 1):
        first = shown["answers"][0]
        assert first["numbers"]["clipped"].startswith("1\u25b2 1\u25bc of")
        tokens = one["completions"][0]["tokens"]
        assert first["clipped"] == [
            ["high", f"{tokens[4]}\u25b2", "token 5, clipped above"],
            ["low", f"{tokens[6]}\u25bc", "token 7, clipped below"],
        ]
    if (step, group, scene) == (50, "train", 2):
        assert shown["answers"][0]["text"] == HOSTILE


@pytest.mark.parametrize("fragment", ["", "#step=50&set=train&scene=2", "#step=7&set=x&scene=-3", "#curves"])
def test_nothing_goes_wrong_and_nothing_is_fetched(browser, page, fragment):
    browser.open(page + fragment)
    assert (
        browser.js("document.scripts.length") == 2
        and browser.js("document.querySelectorAll('main b > script, main img[onerror]').length") == 0
    )
    browser("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)  # it has been drawn by then
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:image/")] == [(page + fragment).split("#")[0]]
    noise = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
    assert [event for event in browser.events if event["method"] in noise] == []


def test_results_curves_steps_and_settings(browser, page, run):
    browser.open(page)
    text = browser.js("document.querySelector('#results').textContent")
    assert "training closed 63 %" in text and all(name in text for name in ("before", "after", "ceiling", "0.75", "0.85"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert browser.js("[...document.querySelectorAll('#plots figcaption')].map(one => one.textContent)") == [
        "Reward and its parts", "Sampled mask IoU", "KL to the reference", "Share of tokens clipped", "Length, tokens"]  # fmt: skip
    faint = "[...document.querySelectorAll('.faint')].map(one => one.getAttribute('d').split(/(?=[ML])/))"
    lines = browser.js(faint)
    assert [len(line) for line in lines] == [100, 100, 100, 99, 100, 100, 100]
    assert [sum(part[0] == "M" for part in line) for line in lines] == [1, 1, 1, 2, 1, 1, 1]  # the NaN breaks its line
    cells = "[...document.querySelectorAll('#table tbody tr')].map(row => [...row.children].map(cell => cell.textContent))"
    columns = "[...document.querySelectorAll('#table thead th')].map(one => one.textContent)"
    names = ["step", "reward", "accuracy", "iou", "length", "kl", "clip_low", "clip_high"]
    assert [re.sub(r"\W*$", "", one).replace(" ", "_") for one in browser.js(columns)] == names
    for shown, row in zip(browser.js(cells), rows, strict=True):
        for cell, name in zip(shown, names, strict=True):
            assert (cell == "\N{EN DASH}") if row[name] != row[name] else number(cell) == pytest.approx(row[name], rel=1e-3)
    browser.js("document.querySelector('#all').click()")
    assert browser.js(columns)[-1] == "seconds rollout"
    browser.js("document.querySelectorAll('#table thead button')[1].focus()")
    for keys, sign in ((1, 1), (2, -1)):  # up, then down
        browser.press("Enter")
        order = [float(row[1]) for row in browser.js(cells)]
        assert order == sorted(order, key=lambda value: sign * value), keys
        assert browser.js("document.activeElement.closest('th').ariaSort") == ("ascending" if sign == 1 else "descending")
    browser.js("document.querySelector('#table a[href=\"#step=50\"]').click()")
    assert browser.js(SHOWN)["step"] == "50"
    assert HOSTILE in browser.js("document.querySelector('#config').textContent")


def test_the_keyboard_does_it_all(browser, page, run):
    browser.open(page)
    stops = []
    while True:
        browser.press("Tab")
        name, outline = browser.js("""(() => { const it = document.activeElement, style = getComputedStyle(it);
            return [it.id || it.name || it.getAttribute("aria-label") || it.textContent.trim(), style.outlineStyle + style.outlineWidth] })()""")
        if name.startswith("SAM-R1"):  # the body, after the last stop
            break
        assert outline == "solid3px", name
        stops.append(name)
    wanted = ["Results", "Curves", "Answers", "Steps", "Settings", "Table of the results", "at", "previous", "next", "play", "step", "set", "scene",
              "all", "Table of the steps", "step \u25b4", "reward"]  # fmt: skip
    places = [stops.index(name) for name in wanted]
    assert places == sorted(places)

    browser.js("document.querySelector('#step').focus()")
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.press(key)
        seen.append((browser.js("document.querySelector('#step-shown').textContent"), browser.js("location.hash.split('&')[0]")))
        assert browser.js("document.activeElement.id") == "step"
    assert seen == [(str(step), f"#step={step}") for step in (1, 50, 100, 50)]
    browser.js("document.querySelector('#next').focus()")
    for step in ("100", "100"):  # at the end it stays, and keeps the focus
        browser.press("Enter")
        assert browser.js("[document.querySelector('#step-shown').textContent, document.activeElement.id]") == [step, "next"]
    browser.js("document.querySelector('input[name=set]:checked').focus()")
    browser.press("ArrowRight")
    assert "set=train" in browser.js("location.hash")
    browser.js("document.querySelector('input[name=scene]:checked').focus()")
    browser.press("ArrowDown")
    assert browser.js("location.hash").endswith("set=train&scene=2")
    assert browser.js("document.activeElement.name + document.activeElement.checked") == "scenetrue"
    browser.js("document.querySelector('#at').focus()")
    browser.press("Home")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert browser.js("document.querySelector('#at-shown').textContent") == "1"
    assert number(browser.js("document.querySelector('.legend b').textContent")) == pytest.approx(rows[0]["reward"], rel=1e-3)
    browser.js("document.querySelector('#play').focus()")
    browser.press(" ")  # at the last step it starts over
    assert browser.js("[document.querySelector('#play').textContent, document.querySelector('#step-shown').textContent]") == ["Pause", "1"]
    browser.press(" ")
    assert browser.js("document.querySelector('#play').textContent") == "Play"


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_its_width_in_both_colours_and_everything_has_a_name(browser, page, width):
    grounds = {}
    for scheme in ("light", "dark"):
        browser.open(f"{page}#step=50&set=train&scene=2", width, scheme)
        browser.js("document.querySelector('#settings').open = true, document.querySelector('#all').click()")
        assert browser.js("document.documentElement.scrollWidth") <= width, scheme  # innerWidth would grow with the page
        assert browser.js("document.querySelector('#table').scrollWidth > 360")
        colours = browser.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        grounds[scheme] = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert grounds["light"][0] > 700 > 150 > grounds["light"][1] and grounds["dark"][0] < 150 < 600 < grounds["dark"][1]
    nodes = [node for node in browser("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = ("image", "button", "slider", "radio", "checkbox", "link", "radiogroup", "region", "navigation", "RootWebArea")
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in named]
    assert {"image", "button", "slider", "radio", "checkbox", "link"} <= {role for role, _ in found}
    assert [pair for pair in found if not pair[1].strip()] == []


@pytest.mark.parametrize("missing", ["rollouts", "metrics.jsonl", "eval.json", "all"])
def test_what_is_missing_is_said(browser, damaged, missing):
    shutil.rmtree(damaged / "rollouts") if missing in ("rollouts", "all") else None
    for name in ("metrics.jsonl", "eval.json"):
        if missing in (name, "all"):
            (damaged / name).unlink()
    (damaged / "report.html").write_text(report.report_html(damaged))
    browser.open((damaged / "report.html").as_uri())
    text = browser.js("document.querySelector('main').textContent")
    assert ("No rollouts were logged" in text) == (missing in ("rollouts", "all"))
    assert text.count("No step was logged yet") == (2 if missing in ("metrics.jsonl", "all") else 0)
    assert ("No evaluation was written yet" in text) == (missing in ("eval.json", "all"))
    assert [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"] == []

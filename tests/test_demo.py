"""tools.demo: streamed answers, scenes, what the page says; and the page in a headless browser."""

import html
import itertools
import re
import shutil
import socket
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import samr1_mini
from data import Shapes, messages
from plumbing.settings import DemoSettings
from plumbing.vlm import vlm_path
from reward import accuracy_reward, score_completions
from tools import demo

NUMBERS = (2, 4)  # scenes, a tall one and a wide one


@pytest.fixture(scope="module")
def asker(tmp_path_factory):
    """Base model and an adapter with random weights."""
    folder = tmp_path_factory.mktemp("adapter")
    model = samr1_mini.add_lora(samr1_mini.load_policy(DemoSettings()).model, rank=4, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in an untrained adapter, which then changes nothing
                weight.normal_(std=0.05)
    model.save_pretrained(folder)
    return demo.Asker(DemoSettings(adapter=str(folder)))


def sample(number: int):
    scene = demo.drawn_scene(number)
    return scene.sample(scene.query)[0]


def greedy(policy, one) -> str:
    completions = samr1_mini.sample_completions(
        policy, policy.read([one]), DemoSettings(), greedy=True
    )
    return policy.texts(completions)[0][0]


def last(texts) -> str:
    *_, text = texts
    return text


# --------------------------------------------------------------------------------------------------
# Asking the models
# --------------------------------------------------------------------------------------------------


def test_a_streamed_answer_is_the_greedy_completion_of_its_model(asker):
    base = samr1_mini.load_policy(DemoSettings())
    differ = 0
    for one in map(sample, NUMBERS):
        expected = {False: greedy(base, one), True: greedy(asker.policy, one)}
        for trained, text in expected.items():
            texts = list(asker.answer(one, trained))
            assert texts[-1] == text and len(texts) > 10
            assert all(new.startswith(old) for old, new in itertools.pairwise(texts))
        differ += expected[False] != expected[True]
    assert differ, "the adapter must change an answer, or this test sees nothing"


@pytest.mark.parametrize("start", ["", "<think>the red star is at the top left</think>"])
def test_an_answer_continues_from_its_start_as_generate_does(asker, start):
    """transformers' `generate` reads the prompt and the start as one text."""
    processor = asker.policy.processor
    model = AutoModelForImageTextToText.from_pretrained(vlm_path("tiny"), dtype=torch.float32)
    for one in map(sample, NUMBERS):
        chat = [messages(one.query, "brief", "pixels", 64)]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)[0]
        image = one.image.resize((64, 64))
        inputs = processor(text=[text + start], images=[image], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        rest = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert last(asker.answer(one, False, start)) == start + rest


def test_a_thinking_model_gets_its_tag_once(asker, monkeypatch):
    """Its chat template ends with <think>, so neither the prompt nor the text may repeat it."""
    one, start = sample(2), "<think>the red star</think>"
    plain = asker.policy.read([one], ["the red star</think>"]).ids
    whole = asker.policy.read([one], [start]).ids
    monkeypatch.setattr(asker.policy, "opening", "<think>")
    assert torch.equal(asker.policy.read([one], [start]).ids, plain)
    assert plain.shape[1] < whole.shape[1]
    texts = list(asker.answer(one, False, start))
    assert all(text.startswith(start) and text.count("<think>") == 1 for text in texts)
    assert next(asker.answer(one, False)).startswith("<think>")


def test_answers_do_not_mix(asker):
    """Token by token in turn, in two threads at once, and after an answer that nobody finished."""
    asked = [(sample(2), False), (sample(4), True)]
    alone = [last(asker.answer(*one)) for one in asked]
    assert alone[0] != last(asker.answer(sample(2), True))

    together = list(itertools.zip_longest(*(asker.answer(*one) for one in asked)))
    columns = zip(*together, strict=True)
    assert [last(filter(None, column)) for column in columns] == alone

    found = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: last(asker.answer(*asked[k]))}))
        for k in range(2)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [found[k] for k in range(2)] == alone

    abandoned = asker.answer(*asked[0])
    next(abandoned)
    assert last(asker.answer(*asked[1])) == alone[1]


def test_the_score_is_the_reward_of_training(asker, scorer):
    one = sample(2)
    text = last(asker.answer(one, False))
    mine = asker.score(one, text)
    expected = score_completions(scorer, [one], [[text]], asker.policy.frame)
    assert mine.reward.item() == expected.reward.item()
    assert mine.iou.item() == expected.iou.item()
    assert mine.overlap.masks[0].shape == (1, *one.mask.shape)


# --------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------


def test_a_number_brings_back_its_scene():
    for number in NUMBERS:
        scene, held = demo.drawn_scene(number), Shapes("heldout")[number]
        assert scene.image.tobytes() == held.image.tobytes() and scene.query == held.query
        assert np.array_equal(scene.mask, held.mask)
        things = Shapes("heldout").scene(number)[1]
        names = {f"the {thing.colour} {thing.kind} is at" for thing in things}
        assert {re.split(r"(?<= at) ", thought)[0] for thought in scene.thoughts} == names


@pytest.mark.parametrize("number", [-1, 100_000, None])
def test_other_numbers_are_refused(number):
    with pytest.raises(ValueError, match="from 0 to 99999"):
        demo.drawn_scene(number)


def test_the_true_mask_is_known_for_the_scenes_own_query_only(tmp_path):
    scene = demo.drawn_scene(2)
    one, known = scene.sample(f" {scene.query}\n")
    assert known and one.query == scene.query and one.mask.any()
    other, known = scene.sample("the largest circle")
    assert not known and not other.mask.any()
    scene.image.save(tmp_path / "picture.png")
    uploaded = demo.uploaded_scene(str(tmp_path / "picture.png"))
    one, known = uploaded.sample(scene.query)
    assert not known and not one.mask.any() and uploaded.query == "" and not uploaded.thoughts


@pytest.mark.parametrize("query", ["", " \n", "find <|image_pad|>", "a\0b", "x" * 1001])
def test_a_query_that_no_policy_should_read_is_refused(query):
    with pytest.raises(ValueError, match="query"):
        demo.drawn_scene(2).sample(query)


def test_a_large_picture_is_scaled_down(tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    assert demo.uploaded_scene(str(tmp_path / "large.png")).image.size == (1024, 512)


def bad_pictures(folder):
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (2, 900)).save(folder / "thin.png")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 99_999, 99_999, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "thin.png").read_bytes()[:60])
    return ["deep.png", "thin.png", "bomb.png", "text.png", "cut.png"]


def test_a_bad_picture_is_refused_by_its_name(tmp_path):
    for name in bad_pictures(tmp_path):
        with pytest.raises(ValueError) as refused:
            demo.uploaded_scene(str(tmp_path / name))
        assert str(refused.value).startswith(f"{name} cannot be used: ")
        assert str(tmp_path) not in str(refused.value)  # where uploads lie is no one's business


# --------------------------------------------------------------------------------------------------
# What the page says. The handlers only pass on the parts of the page, so names stand in for them
# --------------------------------------------------------------------------------------------------

PARTS = demo.Parts(*demo.Parts._fields)
BASE = demo.Column(False, "answer", "thought", "others", "resume", "result")
TRAINED = demo.Column(True, *(f"trained {name}" for name in BASE[1:]))


def page_after(changes) -> dict:
    """What the parts of the page show in the end."""
    page = {}
    for change in changes:
        page |= change
    return page


def text_of(shown: str) -> str:
    return html.unescape(re.sub(r"<(?!\w*think|/think|\w*answer|/answer).*?>", "", shown))


def test_all_models_answer_and_a_thought_is_continued(asker):
    scene = demo.drawn_scene(2)
    changes = list(demo.ask(asker, PARTS, [BASE, TRAINED], scene, scene.query))
    assert sum("answer" in change and "trained answer" in change for change in changes) > 10
    page = page_after(changes)
    for column in (BASE, TRAINED):
        text = last(asker.answer(sample(2), column.trained))
        assert html.escape(text) in page[column.answer] and "cursor" not in page[column.answer]
        assert page[column.thought] in text and "<img" in page[column.result]
    assert page["message"] == ""

    thought = scene.thoughts[2]
    page = page_after(demo.resume(asker, TRAINED, scene, scene.query, thought))
    start = f"<think>{thought}</think>"
    text = last(asker.answer(sample(2), True, start))
    marked = f"<mark>{html.escape(start)}</mark>{html.escape(text.removeprefix(start))}"
    assert marked in page["trained answer"]
    assert set(page) == {"trained answer", "trained result"}  # the edited thought stays


def test_bad_texts_get_a_message_and_no_answer(asker):
    scene = demo.drawn_scene(2)
    page = page_after(demo.ask(asker, PARTS, [BASE], scene, "<b> <|im_end|>"))
    assert set(page) == {"message"}
    assert "special token" in page["message"] and "<b>" not in page["message"]
    for query, thought in ((scene.query, "a <|im_end|>"), (scene.query, "x" * 1001), ("", "a")):
        page = page_after(demo.resume(asker, BASE, scene, query, thought))
        assert 'role="alert"' in page["answer"] and page["result"] == ""


def test_reward_and_parts_are_those_of_the_score(asker):
    one, scene = sample(2), demo.drawn_scene(2)
    good = '<think>a</think><answer>{"bbox":[30,50,45,60],"points_1":[37,52],"points_2":[37,57]}'
    for text in (good + "</answer>", good, "nothing"):
        scores = asker.score(one, text)
        cells = re.findall(r"<td>([^<]*)", demo.result_html(one, True, scores))
        iou, accuracy, think, answer, reward = map(float, cells)
        assert abs(iou - scores.iou.item()) < 0.006
        assert accuracy == accuracy_reward(scores.iou, "tiered").item()
        assert (think, answer) == ((1, 1) if text.endswith("</answer>") else (0, 0))
        assert reward == accuracy + think + answer
    shown = demo.result_html(one, True, asker.score(one, "nothing"))
    assert shown.count("<b>none</b>") == 2

    other, known = scene.sample("the largest circle")
    cells = re.findall(r"<td>([^<]*)", demo.result_html(other, known, asker.score(other, text)))
    assert cells == ["&ndash;", "&ndash;", "0", "0", "&ndash;"]  # IoU, accuracy, formats, reward


@pytest.mark.parametrize("size", [(96, 96), (190, 1), (3, 500), (400, 300)])
def test_a_picture_of_any_shape_can_be_drawn(asker, size):
    scene = demo.Scene(Image.new("RGB", size, "red"), "", None, [])
    one, known = scene.sample("all")
    text = '<answer>{"bbox":[0,0,64,64],"points_1":[32,32],"points_2":[40,32]}</answer>'
    drawn = demo.draw_answer(one, known, asker.score(one, text))
    assert max(drawn.size) == 720
    assert abs(drawn.width / size[0] - drawn.height / size[1]) < 1.01 * max(1 / s for s in size)


def test_markup_is_shown_as_text():
    hostile = '<img src=x onerror="alert(1)">&amp;'
    for shown in (demo.answer_html(hostile), demo.answer_html(hostile, hostile[:5]),
                  demo.message_html(hostile)):  # fmt: skip
        assert "<img" not in shown and text_of(shown) == hostile


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def test_without_gradio_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(demo, "Asker", lambda s: pytest.fail("no model may be loaded before"))
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "pip install gradio" in error


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_does_not_exist_is_refused(port, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--port", port])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "--port must be" in error


def test_a_port_in_use_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_gradio", lambda: None)
    monkeypatch.setattr(demo, "Asker", lambda s: pytest.fail("no model may be loaded before"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        demo.main(["--port", str(taken.getsockname()[1])])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "another port" in error


def test_the_page_is_for_this_machine_unless_asked_otherwise():
    assert DemoSettings().host == "127.0.0.1"


# --------------------------------------------------------------------------------------------------
# The page in a browser
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def page(asker, monkeypatch):
    """The page in headless Chromium. Afterwards: no error, and no address but this machine's."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    connect, reached, errors = socket.socket.connect, [], []

    def record(self, address):
        reached.append(address[0] if self.family != socket.AF_UNIX else "127.0.0.1")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    gr = demo.load_gradio()
    blocks = demo.build_page(gr, asker)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = demo.serve(gr, blocks, "127.0.0.1", port)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        tab.set_default_timeout(60_000)  # milliseconds
        tab.on("request", lambda request: reached.append(request.url))
        tab.on("pageerror", lambda error: errors.append(error))
        tab.goto(address)
        yield tab
        browser.close()
    blocks.close()
    outside = [one for one in reached if not re.match(f"127.0.0.1$|{address}|data:", one)]
    assert not outside and not errors


def numbers_of(tab, column: int) -> str:
    """The box and the points that a column shows."""
    return tab.locator(".result p", has_text="Box").nth(column).inner_text()


@pytest.mark.slow
def test_load_draw_ask_edit_the_thought_ask_again(page, asker, tmp_path):
    page.get_by_label("Scene number").fill("3")
    page.get_by_label("Scene number").press("Enter")
    query = page.get_by_label("Query")
    page.wait_for_function("document.querySelector('textarea').value == 'the largest shape'")
    page.get_by_role("button", name="Ask").click()
    page.locator("table").nth(1).wait_for()
    assert page.locator(".answer").all_inner_texts() == [
        last(asker.answer(sample(3), trained)) for trained in (False, True)
    ]
    before = [numbers_of(page, column) for column in (0, 1)]

    # The base model's answer follows the thought: its points go to the shape that it names.
    thought = "the red circle is at the middle right"
    assert thought in demo.drawn_scene(3).thoughts
    page.get_by_label("Thought").first.fill(thought)
    page.get_by_role("button", name="Go on from this thought").first.click()
    page.locator("mark").wait_for()
    page.locator("table").nth(1).wait_for()
    after = [numbers_of(page, column) for column in (0, 1)]
    assert after[0] != before[0] and after[1] == before[1]
    assert page.locator("mark").inner_text() == f"<think>{thought}</think>"
    things = Shapes("heldout").scene(3)[1]
    points = re.findall(r"\((\d+), (\d+)\)", after[0])
    middle = np.mean(np.array(points, float), 0)
    nearest = min(things, key=lambda thing: np.linalg.norm(middle - thing.centre))
    assert len(points) == 2 and (nearest.colour, nearest.kind) == ("red", "circle")

    query.fill("find <|image_pad|>")
    page.get_by_role("button", name="Ask").click()
    assert "special token" in page.get_by_role("alert").inner_text()
    name = bad_pictures(tmp_path)[0]
    page.locator("input[type=file]").set_input_files(tmp_path / name)
    page.get_by_role("alert").filter(has_text=f"{name} cannot be used").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    # A new scene ends a running answer: no token of it comes after. Another tab has its own scene.
    query.fill("the largest shape")
    page.get_by_role("button", name="Ask").click()
    page.locator(".cursor").first.wait_for()
    page.get_by_label("Scene number").fill("4")
    page.get_by_label("Scene number").press("Enter")
    page.locator(".idle").nth(1).wait_for()
    other = page.context.new_page()
    other.goto(page.url)
    assert other.get_by_label("Query").input_value() == demo.drawn_scene(demo.FIRST).query
    assert query.input_value() == demo.drawn_scene(4).query
    assert page.locator(".idle").count() == 2

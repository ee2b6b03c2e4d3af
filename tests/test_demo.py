"""tools.demo: what the models answer, which inputs are refused, and the page in a browser."""

import re
import shutil
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import refused
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

import samr1_mini
from data import messages
from plumbing.vlm import vlm_path
from reward import score_completions
from tools import demo
from tools.demo import DemoSettings

HOSTILE = '</textarea><img src=x onerror="alert(1)"><script>alert(2)</script>'
THOUGHT = "the red circle is at the middle right"  # about one of the shapes of scene 3


@pytest.fixture(scope="module")
def asker(policy_parts, tmp_path_factory):
    """Base model and an adapter with random weights."""
    folder = tmp_path_factory.mktemp("adapter")
    policy_parts.model.save_pretrained(folder)
    return demo.Asker(DemoSettings(adapter=str(folder)))


@pytest.mark.parametrize("start", ["", "<think>the red star is at the top left</think>"])
def test_the_base_model_continues_from_a_start_as_generate_does(asker, start):
    """transformers' `generate` reads the prompt and the start as one text, without any adapter."""
    processor = asker.policy.processor
    model = AutoModelForImageTextToText.from_pretrained(vlm_path("tiny"), dtype=torch.float32)
    scenes = (demo.drawn_scene(2), demo.drawn_scene(4))  # a tall one and a wide one
    for one in scenes:
        chat = [messages(one.query, "brief", "pixels", 64)]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)[0]
        image = one.image.resize((64, 64))
        inputs = processor(text=[text + start], images=[image], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        rest = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert asker.complete(one, False, start) == start + rest
    assert any(asker.complete(one, True) != asker.complete(one, False) for one in scenes)


def test_a_thinking_model_gets_its_tag_once(asker, monkeypatch):
    """Its chat template ends with <think>, so neither the prompt nor the text may repeat it."""
    monkeypatch.setattr(asker.policy, "opening", "<think>")
    start = "<think>the red star</think>"
    text = asker.complete(demo.drawn_scene(2), False, start)
    assert text.startswith(start) and text.count("<think>") == 1
    ids = asker.policy.read([demo.drawn_scene(2)], [start]).ids[0]
    assert "<think>" not in asker.policy.processor.decode(ids)
    assert asker.complete(demo.drawn_scene(2), False).startswith("<think>")


def test_an_answer_shows_the_reward_of_training_if_the_true_mask_is_known(asker, scorer):
    scene = demo.drawn_scene(2)
    thought, text, picture, shown = demo.answer(asker, True, scene, f" {scene.query}\n", THOUGHT)
    assert thought == THOUGHT and text == asker.complete(scene, True, f"<think>{THOUGHT}</think>")
    scores = score_completions(scorer, [scene], [[text]], 64)
    reward, accuracy, iou = (x.item() for x in (scores.reward, scores.accuracy, scores.iou))
    assert f"reward {reward:g} = {accuracy:g} accuracy" in shown and f"IoU {iou:.2f}" in shown
    green = (np.asarray(picture) == (0, 255, 0)).all(2)
    assert green.any()

    thought, text, picture, shown = demo.answer(asker, False, scene, "the largest circle", None)
    assert text.startswith(f"<think>{thought}</think>")
    assert "reward and IoU need the true mask" in shown and "accuracy" not in shown
    assert not (np.asarray(picture) == (0, 255, 0)).all(2).any()


def test_what_no_policy_should_read_is_refused(asker):
    scene = demo.drawn_scene(2)
    for query, thought in (("a" * 1001, ""), ("a", "[" * 10**5)):  # that keep the server busy
        assert "at most 1000" in refused(demo.answer, asker, True, scene, query, thought)
    assert "query" in refused(demo.answer, asker, True, scene, "", "")
    assert "thought" in refused(demo.answer, asker, True, scene, "a", "<|im_end|>")
    assert "not a text" in refused(demo.answer, asker, True, scene, "a", ["a"])
    for number in (100_000, None):
        assert "from 0 to 99999" in refused(demo.drawn_scene, number)


def test_uploads_are_scaled_down_or_refused_by_their_name(tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    sample, picture, query = demo.show(demo.uploaded_picture, str(tmp_path / "large.png"))
    assert sample.image.size == picture.size == (1024, 512)
    assert query == "" and not sample.mask.any()
    (tmp_path / "text.png").write_text("no picture")
    message = refused(demo.uploaded_picture, str(tmp_path / "text.png"))
    assert "text.png" in message and str(tmp_path) not in message  # where uploads lie is no one's


def test_without_gradio_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(demo, "Asker", lambda s: pytest.fail("no model may be loaded before"))
    assert "pip install gradio" in refused(demo.main, [])


@pytest.mark.slow
def test_a_port_in_use_is_named(monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "Asker", lambda s: SimpleNamespace(trained=False))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert DemoSettings().host == "127.0.0.1"  # for this machine unless asked otherwise
        assert f"--port {port}" in refused(demo.main, ["--port", str(port)])


@pytest.fixture
def page(asker, monkeypatch):
    """The page in headless Chromium. Afterwards: no dialog, no error, no request to elsewhere."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("there is no Chromium on the PATH")
    blocks = demo.build_page(gradio, asker)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = demo.launch(gradio, blocks, "127.0.0.1", port)
    requests = []
    surprises = []
    with playwright.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=program, args=options)
        tab = browser.new_page()
        tab.set_default_timeout(60_000)  # milliseconds
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("dialog", lambda dialog: surprises.append(dialog))
        tab.on("pageerror", lambda error: surprises.append(error))
        tab.goto(address)
        yield tab
        browser.close()
    blocks.close()
    assert not surprises
    assert not [one for one in requests if not one.startswith((address, "data:", "blob:"))]


@pytest.mark.slow
def test_load_draw_ask_edit_the_thought_ask_again(page, asker, monkeypatch):
    from playwright.sync_api import expect

    def wait_for(label: str, column: int, text: str) -> None:
        pattern = re.compile(re.escape(text))
        expect(page.get_by_label(label).nth(column)).to_have_value(pattern, timeout=60_000)

    scene = demo.drawn_scene(3)
    expected = [asker.complete(scene, trained) for trained in (False, True)]
    assert expected[0] != expected[1]
    page.get_by_label("Scene").fill("3")
    page.get_by_label("Scene").press("Enter")
    wait_for("Query", 0, scene.query)
    page.get_by_role("button", name="Ask").click()
    for column in (0, 1):
        wait_for("Completion", column, expected[column])
        wait_for("Reward", column, "IoU")

    followed = asker.complete(scene, False, f"<think>{THOUGHT}</think>")
    page.get_by_label("Thought").first.fill(THOUGHT)
    page.get_by_role("button", name="Go on from this thought").first.click()
    wait_for("Completion", 0, followed)

    page.get_by_label("Query").fill(HOSTILE + "<|image_pad|>")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("the query holds a special token").first.wait_for()
    monkeypatch.setattr(asker, "complete", lambda *arguments: HOSTILE)
    page.get_by_label("Query").fill(HOSTILE)
    page.get_by_role("button", name="Ask").click()
    wait_for("Completion", 1, HOSTILE)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_the_base_model_is_not_shown_beside_it(options, tmp_path):
    """Without the adapter, these would not be the base model's answers."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = samr1_mini.load_policy(DemoSettings()).model
    get_peft_model(model, lora).save_pretrained(tmp_path)
    message = refused(demo.Asker, DemoSettings(adapter=str(tmp_path)))
    assert "--adapter " in message and "tools.merge" in message

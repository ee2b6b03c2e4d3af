"""Fixtures that the tests share, loaded once a session, and how unsolved exercises are skipped."""

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import samr1_mini  # before peft, see plumbing/__init__.py

# isort: split
from peft import LoraConfig, get_peft_model
from peft.utils import save_and_load

from data import Shapes, messages
from plumbing import evaluation, runs
from plumbing.sam import load_sam
from plumbing.vlm import vlm_path
from reward import SamScorer

torch.set_num_threads(1)  # the matrices are too small to share between threads
torch.set_flush_denormal(True)
samr1_mini.EVAL_SAMPLES = 4  # short evaluations before and after training
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """Messages name the program that runs. In tests, that is samr1_mini.py and not pytest."""
    monkeypatch.setattr(sys, "argv", ["samr1_mini.py"])


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run sets its own. Afterwards Ctrl-C ends the tests again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def missing_exercise(error: BaseException | None) -> str | None:
    """The number of the unsolved exercise that caused an error, directly or not, or None."""
    while error is not None:
        found = re.match(r"exercise (\d+): ", str(error))
        if isinstance(error, NotImplementedError) and found:
            return found[1]
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test that needs an unsolved exercise, unless it is a test of that exercise."""
    report = yield
    number = missing_exercise(call.excinfo.value) if report.failed else None
    if number and not item.get_closest_marker(f"exercise_{number}"):
        file, line, _ = item.location
        report.outcome = "skipped"
        report.longrepr = (file, (line or 0) + 1, f"Skipped: needs exercise {number}")
    return report


@pytest.fixture(scope="session")
def samples():
    """Six held-out scenes. Three of them are not square, and the queries differ in length."""
    scenes = [Shapes("heldout")[i] for i in range(60)]
    square = [s for s in scenes if s.image.width == s.image.height]
    wide = [s for s in scenes if s.image.width > s.image.height]
    tall = [s for s in scenes if s.image.width < s.image.height]
    chosen = [wide[1], square[0], tall[0], square[1], wide[0], square[2]]
    lengths = {len(s.query.split()) for s in chosen[:3]}
    assert len(lengths) > 1, "with equal lengths no prompt would be padded"
    return chosen


@pytest.fixture(scope="session")
def sam():
    return load_sam("tiny")


@pytest.fixture(scope="session")
def scorer(sam):
    return SamScorer(sam)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a short, uninterrupted run. Tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    flags = "--steps 4 --prompts_per_step 4 --group_size 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)  # there is no folder tiny/vlm here, so peft could ask the hub
        fail = "check_file_exists_on_hf_hub"
        patch.setattr(save_and_load, fail, lambda *_, **__: pytest.fail("asked a server"))
        samr1_mini.main(["train", *flags.split(), "--out", str(out)])
    return out


@pytest.fixture
def quick_pictures(monkeypatch):
    """Drawing takes most of a short run. Where pictures are not the subject, they are empty."""

    def log_samples(out, step, *_):
        runs.write_text(out / "samples" / f"step_{step:05d}.png", "")

    monkeypatch.setattr(samr1_mini, "log_samples", log_samples)
    monkeypatch.setattr(evaluation, "sheet", lambda answers: Figure())


@pytest.fixture(scope="session")
def policy_parts():
    """The tiny VLM with a random LoRA, loaded without the code of this repository.

    model, processor; side: of the square image it sees, pixels; end, banned: token ids;
    read(samples): the processor's output.
    """
    torch.manual_seed(0)  # of the adapter
    folder = ROOT / "tiny" / "vlm"
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    targets = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft sets these to zero, and the adapter would do nothing
                parameter.normal_(std=0.05)
    side = 64

    def read(samples):
        chats = [messages(s.query, "brief", "pixels", side) for s in samples]
        texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        images = [s.image.resize((side, side)) for s in samples]
        padding = {"padding": True, "padding_side": "left"}
        return processor(text=texts, images=images, return_tensors="pt", **padding)

    end = torch.tensor([processor.tokenizer.eos_token_id])
    banned = torch.tensor([getattr(model.config, name) for name in VISION_TOKENS])
    return SimpleNamespace(
        model=model, processor=processor, side=side, end=end, banned=banned, read=read
    )


@pytest.fixture(scope="session")
def thinking_qwen3vl(tmp_path_factory):
    """A folder with a small random Qwen3-VL and the tiny model's tokenizer.

    4 bit can divide its widths. Its chat template opens <think>, as those of thinking models do.
    """
    folder = tmp_path_factory.mktemp("qwen3vl")
    tiny = transformers.AutoProcessor.from_pretrained(vlm_path("tiny"))
    tiny_config = transformers.AutoConfig.from_pretrained(vlm_path("tiny"))
    text = dict(vocab_size=len(tiny.tokenizer), eos_token_id=tiny.tokenizer.eos_token_id)
    text |= dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2)
    text |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    vision = dict(hidden_size=64, out_hidden_size=128, intermediate_size=128, num_heads=4)
    vision |= dict(depth=2, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{name: getattr(tiny_config, name) for name in VISION_TOKENS},
    )
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    patches = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    patches["size"] = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    start = "<|im_start|>assistant\n"
    assert start in tiny.chat_template
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**patches),
        tokenizer=tiny.tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**patches),
        chat_template=tiny.chat_template.replace(start, start + "<think>\n"),
    ).save_pretrained(folder)
    return folder

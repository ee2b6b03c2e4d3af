"""Fixtures that the tests share, loaded once a session, and how unsolved exercises are skipped."""

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import samr1_mini
from data import Shapes, messages
from plumbing.sam import load_sam
from plumbing.vlm import vlm_path
from reward import SamScorer

torch.set_num_threads(1)  # the matrices are too small to share between threads
torch.set_flush_denormal(True)
samr1_mini.EVAL_SAMPLES = 4  # short evaluations before and after training


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
def policy_parts():
    """The tiny VLM with a random LoRA, loaded without the code of this repository.

    model, processor; side: of the square image it sees, pixels; end, banned: token ids;
    read(samples): the processor's output.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(0)  # of the adapter
    folder = ROOT / "tiny" / "vlm"
    processor = AutoProcessor.from_pretrained(folder)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    targets = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft sets these to zero, and the adapter would do nothing
                parameter.normal_(std=0.05)
    config, side = model.config, 64

    def read(samples):
        chats = [messages(s.query, "brief", "pixels", side) for s in samples]
        texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        images = [s.image.resize((side, side)) for s in samples]
        padding = {"padding": True, "padding_side": "left"}
        return processor(text=texts, images=images, return_tensors="pt", **padding)

    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return SimpleNamespace(
        model=model.eval(),
        processor=processor,
        side=side,
        end=torch.tensor([processor.tokenizer.eos_token_id]),
        banned=torch.tensor([getattr(config, name) for name in names]),
        read=read,
    )


@pytest.fixture(scope="session")
def thinking_qwen3vl(tmp_path_factory):
    """A folder with a small random Qwen3-VL and the tiny model's tokenizer.

    4 bit can divide its widths. Its chat template opens <think>, as those of thinking models do.
    """
    import transformers

    tiny = transformers.AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = tiny.tokenizer
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokens),
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
            eos_token_id=tokens.eos_token_id,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            patch_size=16,
            spatial_merge_size=2,
            out_hidden_size=128,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        tie_word_embeddings=True,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokens.convert_tokens_to_ids("<|video_pad|>"),
    )
    patches = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    patches["size"] = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    start = "<|im_start|>assistant\n"
    assert start in tiny.chat_template
    folder = tmp_path_factory.mktemp("qwen3vl")
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**patches),
        tokenizer=tokens,
        video_processor=transformers.Qwen3VLVideoProcessor(**patches),
        chat_template=tiny.chat_template.replace(start, start + "<think>\n"),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder

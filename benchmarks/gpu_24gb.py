"""gpu_24gb.py - does the recipe fit a 24 GB card, and how long does it take?

    python benchmarks/gpu_24gb.py [--preset qwen3b|qwen7b] [--steps 3]

Builds the policy's architecture from its published sizes and SAM ViT-H likewise, both with random weights (nothing is
downloaded), caps the process at 24 GiB, and runs real training steps of samr1_mini.py: 840 x 840 pixels, 8 prompts, 8 completions
each, 512 new tokens. A random policy never stops by itself, so every completion has full length: the worst case. Prints peak
memory and seconds by phase, tokens per second, and what 3,000 samples would take, beside the memory that `--dry-run` expects; and the
lines of code at which the host waited for the GPU (torch.cuda.set_sync_debug_mode), which should not lie in a step's inner loops.

Without a CUDA device it says so and stops. --toy runs the same code at toy size on any device, to check the script itself.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import samr1_mini  # noqa: E402
from benchmarks.memory import expected_memory, published_config  # noqa: E402
from reward import SAM_SIZES, build_sam  # noqa: E402

CARD = 24 * 2**30  # bytes
PHASES = ("rollout", "reward", "logprobs", "update")


def random_policy(vlm: str):
    """Stand-ins for the two from_pretrained calls: the processor of the tiny model (its vision settings at the real patch
    size, its words as they are), and the architecture of `vlm` with random weights."""
    config = published_config(vlm)
    tiny = samr1_mini.AutoProcessor.from_pretrained(samr1_mini.HERE / "tiny" / "vlm")
    tokens = tiny.tokenizer
    for name in ("image", "video", "vision_start", "vision_end"):
        written = {"image": "<|image_pad|>", "video": "<|video_pad|>"}.get(name, f"<|{name}|>")
        setattr(config, f"{name}_token_id", tokens.convert_tokens_to_ids(written))
    config.text_config.eos_token_id = config.eos_token_id = tokens.eos_token_id
    vision = config.vision_config
    side = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}
    for part in (tiny.image_processor, tiny.video_processor):
        part.patch_size, part.merge_size, part.size = vision.patch_size, vision.spatial_merge_size, side

    def model(_, dtype, attn_implementation):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random numbers are quicker drawn there
            built = samr1_mini.AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
        torch.set_default_dtype(previous)
        return built

    return mock.patch.object(samr1_mini.AutoProcessor, "from_pretrained", lambda _: tiny), mock.patch.object(
        samr1_mini.AutoModelForImageTextToText, "from_pretrained", model
    )


def measure(preset: str, steps: int, flags: list[str]) -> tuple[list[dict], dict, Counter]:
    """Train for some steps; return the log, the expected gigabytes of each phase, and how often a line waited for the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--preset", preset, "--data", "shapes", "--steps", str(steps), "--eval_samples", "1", "--sample_every", "1000000",
                "--save_every", "1000000", "--out", f"{folder}/run", *flags]  # fmt: skip
        s = samr1_mini.parse_settings("train", argv)
        sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
        processor, model = random_policy(samr1_mini.vlm_folder(s))
        expected = expected_memory(s, samr1_mini.vlm_folder(s), samr1_mini.LORA_TARGETS)
        no_pictures = mock.patch.object(samr1_mini, "save_figure", lambda *_: None)
        with processor, model, no_pictures, mock.patch.object(samr1_mini, "load_sam", lambda _: sam):
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if torch.cuda.is_available():
                    torch.cuda.set_sync_debug_mode("warn")
                samr1_mini.train(s)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    return rows, {phase: sum(size for size, _ in parts.values()) / 2**30 for phase, parts in expected.items()}, waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("qwen3b", "qwen7b"), default="qwen3b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="check the script at toy size, on any device")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        print("no CUDA device here: nothing measured (--toy checks the script itself)")
        return
    name = "CPU"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        name = card.name
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / card.total_memory))
    toy = "--vlm tiny --sam tiny --side 64 --max_new_tokens 8 --prompts_per_step 2 --group_size 2 --rollout_prompts 2 --device cpu"
    rows, expected, waits = measure(options.preset, options.steps, toy.split() if options.toy else [])
    last = rows[-1]  # the first step still fills caches
    print(f"{options.preset}{' at toy size' if options.toy else ''} on {name}, torch {torch.__version__}, {options.steps} steps, the last one:")
    print(f"{'phase':10}{'seconds':>10}{'peak GiB':>10}{'expected':>10}")
    for phase in PHASES:
        guess = f"{expected[phase]:10.1f}" if phase in expected else ""
        print(f"{phase:10}{last[f'seconds_{phase}']:10.1f}{last[f'peak_mib_{phase}'] / 1024:10.1f}{guess}")
    seconds = sum(last[f"seconds_{phase}"] for phase in PHASES)
    print(f"a step: {seconds:.1f} s, {last['tokens_per_second']:.0f} tokens/s; 3,000 samples: {375 * seconds / 3600:.1f} h")
    for line, count in waits.most_common(12):
        print(f"waited for the GPU at {line}: {count} times in {options.steps} steps and two evaluations of one sample")
    print(json.dumps({"preset": options.preset, "device": name, "toy": options.toy, "torch": torch.__version__, **last}))


if __name__ == "__main__":
    main()

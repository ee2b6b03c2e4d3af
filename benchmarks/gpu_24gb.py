"""gpu_24gb.py - does a training step fit a 24 GB GPU, and how long does it take?

    python -m benchmarks.gpu_24gb [--preset qwen3b|qwen7b] [--steps 3]

Builds the policy and SAM ViT-H from their published sizes, with random weights, so nothing is
downloaded. Limits the process to 24 GiB and runs training steps of samr1_mini.py at the paper's
size: 840 x 840 pixels, 8 prompts, 8 completions each, 512 new tokens. A random policy never ends a
completion, so all completions have full length, which is the worst case. It never writes a valid
answer either, so the reward reads fixed answers instead, and SAM decodes a prompt for each.

Prints peak memory and seconds of each phase, tokens per second, the time that 3,000 samples would
take, and the memory that `python -m tools.memory` expects. Also prints the lines of code at which
the host waited for the GPU (torch.cuda.set_sync_debug_mode). The inner loops of a step should not
be among them.

Without a CUDA device, the script says so and stops. --toy runs the same code at toy size on any
device, to check the script itself.
"""

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import samr1_mini
from plumbing.memory import expected_memory, published_config
from plumbing.sam import SAM_SIZES, build_sam
from plumbing.settings import parse_settings
from plumbing.vlm import vlm_path
from reward import score_completions

CARD = 24 * 2**30  # bytes
PHASES = ("rollout", "reward", "logprobs", "update")
ANSWER = '<answer>{{"bbox":[{0},{0},{1},{1}],"points_1":[{0},{1}],"points_2":[{1},{0}]}}</answer>'
TOY = """--vlm tiny --sam tiny --side 64 --max_new_tokens 8 --prompts_per_step 2 --group_size 2
    --rollout_prompts 2 --device cpu"""


@contextlib.contextmanager
def random_policy(vlm: str):
    """Replace the two from_pretrained calls of `plumbing.vlm.load_vlm`.

    The processor is the tiny model's, with the patch size of `vlm`. The model has the architecture
    of `vlm` with random weights.
    """
    config = published_config(vlm)
    tiny = AutoProcessor.from_pretrained(vlm_path("tiny"))
    tokens = tiny.tokenizer
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    for name in ("image", "video", "vision_start", "vision_end"):
        token = tokens.convert_tokens_to_ids(names.get(name, f"<|{name}|>"))
        setattr(config, f"{name}_token_id", token)
    config.text_config.eos_token_id = config.eos_token_id = tokens.eos_token_id
    vision = config.vision_config
    for part in (tiny.image_processor, tiny.video_processor):
        part.patch_size, part.merge_size = vision.patch_size, vision.spatial_merge_size
        part.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 4096}

    def build(_, dtype, **options):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        # Random initialisation is faster on a GPU.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForImageTextToText.from_config(config, **options)
        torch.set_default_dtype(previous)
        return model

    with (
        mock.patch.object(AutoProcessor, "from_pretrained", lambda _: tiny),
        mock.patch.object(AutoModelForImageTextToText, "from_pretrained", build),
    ):
        yield


def score_fixed_answers(scorer, samples, completions, frame, *args, **options):
    """`score_completions` on valid answers instead of a random policy's text."""
    size = len(completions[0])
    boxes = [(frame * g / (2 * size), frame * (g + size) / (2 * size)) for g in range(size)]
    texts = [[ANSWER.format(*box) for box in boxes]] * len(samples)
    return score_completions(scorer, samples, texts, frame, *args, **options)


def measure(preset: str, steps: int, flags: list[str]) -> tuple[list[dict], dict, Counter]:
    """Train for some steps.

    Returns the rows of metrics.jsonl, the expected GiB of each phase, and how often each line of
    code waited for the GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = f"--preset {preset} --data shapes --steps {steps} --eval_samples 1".split()
        argv += ["--save_every", "1000000", "--out", f"{folder}/run", *flags]
        s = parse_settings("train", argv)
        sam = build_sam(**SAM_SIZES[s.sam.partition(":")[0]])
        vlm = vlm_path(s.vlm)
        expected = expected_memory(s, vlm, samr1_mini.LORA_TARGETS)
        replaced = {"load_sam": lambda _: sam, "score_completions": score_fixed_answers}
        with (
            random_policy(vlm),
            mock.patch.multiple(samr1_mini, **replaced),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
            samr1_mini.train(s)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    gib = {
        phase: sum(size for size, _ in parts.values()) / 2**30 for phase, parts in expected.items()
    }
    return [json.loads(line) for line in lines], gib, waits


def print_results(last: dict, expected: dict, waits: Counter, steps: int) -> None:
    """Print the metrics of one step, `last`, and the lines that waited for the GPU."""
    print(f"{'phase':10}{'seconds':>10}{'peak GiB':>10}{'expected':>10}")
    for phase in PHASES:
        gib = f"{expected[phase]:10.1f}" if phase in expected else ""
        seconds, peak = last[f"seconds_{phase}"], last[f"peak_mib_{phase}"] / 1024
        print(f"{phase:10}{seconds:10.1f}{peak:10.1f}{gib}")
    seconds = sum(last[f"seconds_{phase}"] for phase in PHASES)
    hours = 375 * seconds / 3600
    tokens = last["tokens_per_second"]
    print(f"a step: {seconds:.1f} s, {tokens:.0f} tokens/s; 3,000 samples: {hours:.1f} h")
    for line, count in waits.most_common(12):
        where = f"in {steps} steps and two evaluations of one sample"
        print(f"waited for the GPU at {line}: {count} times {where}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_24gb", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--preset", choices=("qwen3b", "qwen7b"), default="qwen3b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        print("no CUDA device: nothing measured (--toy checks the script itself)")
        return
    name = "CPU"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        name = card.name
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / card.total_memory))
    flags = TOY.split() if options.toy else []
    rows, expected, waits = measure(options.preset, options.steps, flags)
    last = rows[-1]  # the first step is slower: it fills caches
    size = " at toy size" if options.toy else ""
    print(f"{options.preset}{size} on {name}, torch {torch.__version__}, last of {options.steps}")
    print_results(last, expected, waits, options.steps)
    result = {"preset": options.preset, "device": name, "toy": options.toy}
    print(json.dumps(result | {"torch": torch.__version__} | last))


if __name__ == "__main__":
    main()

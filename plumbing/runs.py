"""runs.py - a run's folder on the disk: whole files, checkpoints, resuming, interruption, timing.

A file has its final name only when it is complete. So whatever happens to the process, every file
in the folder can be read.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from tqdm import tqdm

from data import BadSample, Sample
from plumbing import intervals
from plumbing.errors import UserError, continued_by, reason_of, refusing

try:
    import resource  # peak memory of the process
except ImportError:  # Windows has no such module
    resource = None

LOCK = ".lock"  # a file in the folder of a run, locked by the process that writes to it
TORCH_SAVE = re.compile("inline_container|PytorchStreamWriter")  # in its errors on a full disk
_locks = []  # those that this process holds until it ends


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path):
    """Turn an error of the disk into a UserError that says how to continue."""
    try:
        yield
    except (BrokenPipeError, Timeout):  # of the terminal, of a lock
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TORCH_SAVE.search(str(error)):
            raise
        mend = "make room, or name a place that you may write to; checkpoints go on with --resume"
        raise UserError(f"{path} cannot be written ({reason_of(error)}): {mend}") from error


@contextlib.contextmanager
def whole_file(path: Path):
    """Write a file completely or not at all: under a temporary name, which is then renamed."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # no one's file has this name
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# The keys and types that `has_form` requires of metrics.jsonl, eval.json and answers.jsonl.
NUMBER = int | float
METRICS = {"step": int} | dict.fromkeys(("reward", "iou", "clip_low", "clip_high"), NUMBER)
RESULTS = {row: {"giou": NUMBER, "ciou": NUMBER, "n": int} for row in ("before", "ceiling")}
COUNTS = {
    prefix + name: NUMBER
    for prefix in intervals.PREFIXES
    for name in ("iou", "intersection", "union")
}
ANSWER = {"id": str, "format": bool, "box_iou": NUMBER, "points_inside": NUMBER} | COUNTS


def has_form(value: object, form: object) -> bool:
    """Whether what a file holds has a form: a type, or a dict with a form for each key it needs.

    >>> has_form({"step": 3, "more": ""}, {"step": int}), has_form({"step": "3"}, {"step": int})
    (True, False)
    """
    if not isinstance(form, dict):
        return isinstance(value, form)
    return isinstance(value, dict) and all(has_form(value.get(key), form[key]) for key in form)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def save_figure(figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def write_lines(file: Path, rows: list[dict]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def append_lines(file: Path, rows: list[dict]) -> None:
    with writing(file), open(file, "a") as log:
        log.write("".join(json.dumps(row) + "\n" for row in rows))


def share_weights(folder: Path) -> None:
    """safetensors writes files that only their owner may read: they get the mode of config.json."""
    config = next(folder.glob("*config.json"))
    for file in folder.glob("*.safetensors"):
        shutil.copymode(config, file)


def open_run(s, name: str) -> Path:
    """The folder of a run, locked until this process ends: that of --out, or the first free of
    `name`, `name`-2, `name`-3 and so on. Raises UserError.

    A new run takes an empty folder only, so it deletes nothing.
    """
    free = (Path(name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    out = Path(s.out).expanduser() if s.out else next(path for path in free if not path.exists())
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            if not s.resume and any(file.name != LOCK for file in out.iterdir()):
                mend = "name another folder, delete it, or continue the run in it with --resume"
                raise UserError(f"--out {out}: it is not empty: {mend}")
            # A singleton, because this process may open the folder again.
            lock = FileLock((out / LOCK).resolve(), is_singleton=True)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--out {out}: another process is writing to it") from error
    _locks.append(lock)
    return out


def start_metrics(out: Path, settings, steps: int) -> list[dict]:
    """Write config.json, and crop metrics.jsonl to the first `steps` lines, which are returned.

    Steps after the checkpoint that a run continues from are repeated. Without the file, the log
    begins with the next step. Raises UserError if the run has gone further than `settings` ask.
    """
    if steps > settings.steps:
        raise UserError(f"--steps {settings.steps}: {out} has done {steps} already: name as many")
    rows = read_rows(out / "metrics.jsonl", METRICS)[:steps] if steps else []
    start_log(out, settings, "metrics.jsonl", rows)
    return rows


def start_log(out: Path, settings, name: str, rows: list[dict]) -> None:
    config = asdict(settings) | {"out": str(out), "resume": False}
    write_text(out / "config.json", json.dumps(config, indent=2))
    write_lines(out / name, rows)


def read_rows(
    file: Path, form: dict, mend: str = "mend or delete the file, then --resume"
) -> list[dict]:
    """The lines of a log, each of this form or a skipped answer. Empty without the file.

    Raises UserError if a line is anything else.
    """
    rows = []
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines[:-1], 1):  # the interruption cut off what has no line end
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not (has_form(row, {"skipped": str}) or has_form(row, form)):
            raise UserError(f"{file} is damaged (line {number}): {mend}")
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


class Checkpoint:
    """All that an exact resume needs, and the adapter in peft's format with a model card.

    The order of the data and the learning rate follow from the step.
    """

    def __init__(self, out: Path, model, optimizer, generator, scaler):
        """scaler: a GradScaler. It has a state in float16 only."""
        self.out = out
        self.file = out / "checkpoint" / "state.pt"
        self.model = model
        self.optimizer = optimizer
        self.generator = generator
        self.scaler = scaler

    def adapter(self) -> dict[str, torch.Tensor]:
        # False: peft would ask the hub whether the base model's vocabulary has another size.
        return get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def save(self, step: int, s, results: dict) -> None:
        """Write checkpoint/, adapter/ and eval.json, which holds `results`."""
        adapter = self.adapter()
        if bad := [name for name, weight in adapter.items() if not weight.isfinite().all()]:
            reason = f"{len(bad)} weights are not finite ({bad[0]})"
            raise UserError(f"step {step}: {reason}: the last checkpoint stays: lower --lr")
        state = {
            "step": step,
            "adapter": adapter,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "results": results,
        }
        with whole_file(self.file) as temporary:
            torch.save(state, temporary)
        with writing(self.out), tempfile.TemporaryDirectory(dir=self.out, suffix=".tmp") as folder:
            self.model.save_pretrained(folder, save_embedding_layers=False)  # several files
            (Path(folder) / "README.md").write_text(model_card(s, step, results))
            (self.out / "adapter").mkdir(exist_ok=True)
            share_weights(Path(folder))
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, self.out / "adapter" / file.name)
        write_text(self.out / "eval.json", json.dumps(results, indent=2))

    def load(self) -> tuple[int, dict]:
        """Restore it. Returns its step, and its results of "before" and "ceiling".

        Raises UserError, before anything is changed, if the adapter does not fit the model.
        """
        from plumbing import weights  # only with --resume

        if not self.file.is_file():
            raise UserError(f"--resume: {self.out} has no checkpoint yet: start another run")
        # To the CPU: AdamW's step counters must stay there, or each update waits for the GPU.
        state = weights.read_tensors(self.file, "--resume")
        what = f"--resume: {self.file}"
        unfit = "it does not fit this model and these settings"
        with refusing(lambda error: f"{what}: {unfit} ({reason_of(error)}): start another run"):
            if not has_form(state, {"step": int, "results": RESULTS}):
                raise ValueError("it has no step, or other results")
            weights.compare(
                expected=weights.shapes(self.adapter()),
                given=weights.shapes(state["adapter"]),
                what=what,
                mend="use the --vlm and the versions of peft and transformers that wrote it",
            )
            weights.check_finite(state["adapter"].items(), what, "start another run")
            set_peft_model_state_dict(self.model, state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            if state.get("scaler"):  # older checkpoints have none
                self.scaler.load_state_dict(state["scaler"])
        state["results"].pop("after", None)
        return state["step"], state["results"]


def model_card(s, step: int, results: dict) -> str:
    """The README of an adapter: what it is, how it was trained, what it reaches, how to load it."""
    base = "tiny/vlm of this repository" if s.vlm == "tiny" else s.vlm
    sam = s.sam if s.sam.startswith(("sam2:", "sam3:")) else s.sam.partition(":")[0]
    started = "" if s.adapter == "none" else ", started from another adapter on it"
    rows = [(name, results[name]) for name in ("before", "after", "ceiling") if name in results]
    table = [f"| {name} | {r['giou']:.3f} | {r['ciou']:.3f} | {r['n']} |" for name, r in rows]
    return f"""---
library_name: peft
tags: [segmentation, grpo, lora]
---
# LoRA adapter trained with SAM-R1 mini

- base model: {base}{started}
- segmenter in the reward: {sam} (frozen)
- data: {s.data.partition(":")[0]}, training step {step} of {s.steps}
- {s.prompts_per_step} prompts a step, {s.group_size} completions each, seed {s.seed}
- accuracy reward {s.accuracy}, beta {s.beta:g}, learning rate {s.lr:g}, LoRA rank {s.lora_rank}

Greedy answers on held-out samples. "ceiling" is the segmenter with the
true box and two good points.

| | gIoU | cIoU | samples |
|---|---|---|---|
{chr(10).join(table)}

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(BASE_MODEL)
    model = PeftModel.from_pretrained(model, THIS_FOLDER)
"""


# --------------------------------------------------------------------------------------------------
# Samples of a step
# --------------------------------------------------------------------------------------------------


def indices(step: int, count: int, n: int, seed: int) -> list[int]:
    """Which `count` of n samples a step takes. Every round through the data has its own order.

    The result depends on the arguments alone, so a resumed run continues with the right samples.
    """
    chosen = []
    for place in range(step * count, (step + 1) * count):
        if not chosen or place % n == 0:
            order = np.random.default_rng([seed, place // n]).permutation(n)
        chosen.append(int(order[place % n]))
    return chosen


def load_samples(dataset, chosen: list[int]) -> tuple[list[Sample], int]:
    """Read the chosen samples. Returns them, and how many were skipped.

    A sample that cannot be used is reported and replaced by the next one of the data set.
    """
    batch = []
    skipped = 0
    for index in chosen:
        for attempt in range(100):
            try:
                batch.append(dataset[(index + attempt) % len(dataset)])
                break
            except BadSample as error:
                skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        else:
            raise UserError(
                "--data: 100 samples in a row cannot be used, see above: mend the files"
            )
    return batch, skipped


# --------------------------------------------------------------------------------------------------
# Interruption and timing
# --------------------------------------------------------------------------------------------------


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the current step can be finished and saved.

    The second signal ends the run at once. So does the first one in `ended`.
    """

    def __init__(self):
        self.number = 0  # of the signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.number = number
        tqdm.write("stopping after this step (again: at once)")
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    @contextlib.contextmanager
    def ended(self, out: Path):
        """No step is left to be finished: Ctrl-C and SIGTERM act at once, as they did before."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with continued_by(resume_command("train", out)):
            yield

    def exit(self, out: Path, step: int) -> None:
        command = resume_command("train", out)
        print(f"stopped after step {step}, everything is saved; continue with: {command}")
        raise SystemExit(128 + self.number)


def resume_command(command: str, out: Path) -> str:
    """What a user types to continue the run in a folder."""
    return f"python samr1_mini.py {command} --resume --out {shlex.quote(str(out))}"


class PhaseTimer:
    """Seconds and peak memory of each phase of a step. On a GPU, a phase ends when it is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {}
        self.peaks = {}
        self.started = self.last = time.perf_counter()

    def end(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now
        self.peaks[phase] = peak_mib(self.device)

    def row(self, completions) -> dict[str, float]:
        """Columns of metrics.jsonl about a step that sampled these completions."""
        row = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        row |= {f"peak_mib_{phase}": peak for phase, peak in self.peaks.items()}
        tokens = completions.mask.sum().item()
        row["tokens_per_second"] = tokens / (time.perf_counter() - self.started)
        return row | {"peak_mib": max(self.peaks.values())}


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU since the last call, or of the process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, else KiB


# --------------------------------------------------------------------------------------------------
# Numbers of a run
# --------------------------------------------------------------------------------------------------


def describe(scores, completions, end: torch.Tensor) -> dict[str, float]:
    """Means over the B x G completions of a step, for metrics.jsonl.

    tier_2, tier_3 and tier_4 are the shares of completions whose IoU falls into that tier of the
    paper's accuracy reward, whichever reward the run uses.
    """
    names = ("reward", "accuracy", "think_format", "answer_format", "iou")
    values = {name: getattr(scores, name) for name in names}
    # The tiers of reward.TIERS as intervals (low, high]. -1 and 2 stand for "no bound".
    for tier, low, high in ((2, 0.5, 0.7), (3, 0.7, 0.8), (4, 0.8, 2.0), (0, -1.0, 0.5)):
        values[f"tier_{tier}"] = (scores.iou > low) & (scores.iou <= high)
    values["equal_groups"] = scores.reward.amax(1) == scores.reward.amin(1)
    values["length"] = completions.mask.sum(-1)
    values["truncated"] = completions.truncated(end)
    return {name: value.float().mean().item() for name, value in values.items()}


def print_table(results: dict, metrics: list[dict], out: Path) -> None:
    """Print the metrics of a run side by side, and how reward and IoU changed."""
    columns = {"giou": "gIoU", "ciou": "cIoU", "format": "format", "box": "box@0.5"}
    columns |= {"points": "points", "boxonly": "box only"}
    width = max(12, *(len(name) + 2 for name in results))
    print(f"\n{'':{width}}{''.join(f'{title:>9}' for title in columns.values())}{'n':>7}")
    rows = sorted(results.items(), key=lambda item: item[0] == "ceiling")  # it is last
    for name, row in rows:
        cells = (f"{row[c]:9.3f}" if c in row else f"{'-':>9}" for c in columns)
        print(f"{name:{width}}{''.join(cells)}{row['n']:7d}")
    print("95 % intervals over the images:")
    for name, row in rows:
        if "giou_95" in row:  # runs of older versions have none
            spans = f"gIoU {intervals.span(row, 'giou')}, cIoU {intervals.span(row, 'ciou')}"
            print(f"{name:{width}}{spans}")
    if "before" in results and "after" in results:
        before, after, ceiling = (results[k]["giou"] for k in ("before", "after", "ceiling"))
        closed = round(100 * (after - before) / max(ceiling - before, 1e-9))
        print(f"\ngap to the ceiling closed: {closed} %")
    if metrics:
        first = min(5, (len(metrics) + 1) // 2)
        last = min(20, max(1, len(metrics) - first))
        for name, label in (("reward", "mean reward (of 6)"), ("iou", "sampled mask IoU")):
            values = [row[name] for row in metrics]
            start, end = np.mean(values[:first]), np.mean(values[-last:])
            print(f"{label}: {start:.2f} -> {end:.2f} (first {first} and last {last} steps)")
        low, high = (np.mean([row[name] for row in metrics]) for name in ("clip_low", "clip_high"))
        print(f"ratio clipped below {low:.2%}, above {high:.2%} of tokens")
    files = sorted(p.name + "/" * p.is_dir() for p in out.iterdir() if p.name != LOCK)
    print(f"written to {out}: {', '.join(files)}")

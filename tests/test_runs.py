"""A run's folder and the settings: whole files, locks, bounds, the samples of a step, timing. And
the examples in the docstrings of plumbing/."""

import dataclasses
import doctest
import importlib
import json
import math
import multiprocessing
import re
import signal
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from data import BadSample, Shapes
from plumbing import evaluation, runs, settings
from plumbing.errors import UserError, continued_by, exit_with_one_line
from plumbing.settings import parse_settings


def open_run(out="", name="", resume=False):
    return runs.open_run(SimpleNamespace(out=str(out), resume=resume), str(name))


def test_a_file_is_replaced_and_never_written_into(tmp_path):
    """A reader of the old file keeps all of it. No half file ever has the final name."""
    (tmp_path / "file.tmp.json").write_text("of the user")  # never the temporary name
    file = tmp_path / "file.json"
    runs.write_text(file, "old")
    with open(file) as held:
        runs.write_text(file, "new, and longer")
        assert held.read() == "old"
    with pytest.raises(KeyboardInterrupt), runs.whole_file(file) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "new, and longer"
    assert (tmp_path / "file.tmp.json").read_text() == "of the user"
    assert len(list(tmp_path.iterdir())) == 2


DISK = UserError, r"file\.json cannot be written.*--resume"


@pytest.mark.parametrize(
    "error, found",
    [
        (OSError(28, "No space left on device"), DISK),
        (SafetensorError("I/O error"), DISK),
        (RuntimeError("[enforce fail at inline_container.cc]"), DISK),  # of torch.save
        (RuntimeError("a bug"), (RuntimeError, "a bug")),
        (BrokenPipeError("of a pipe"), (BrokenPipeError, "of a pipe")),
    ],
)
def test_a_full_disk_is_one_line_and_keeps_the_old_file(error, found, tmp_path):
    file = tmp_path / "file.json"
    file.write_text("old")
    kind, message = found
    with pytest.raises(kind, match=message), runs.whole_file(file) as temporary:
        temporary.write_text("ne")
        raise error
    assert file.read_text() == "old"


def test_without_out_a_run_takes_the_next_free_name(tmp_path):
    names = [open_run(name=tmp_path / "runs" / "shapes").name for _ in range(3)]
    assert names == ["shapes", "shapes-2", "shapes-3"]


def hold(out, opened):
    open_run(out)
    opened.set()
    signal.pause()


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("fork")  # spawn would import torch first
    opened = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", opened))
    process.start()
    assert opened.wait(30)
    with pytest.raises(UserError, match="another process is writing to it"):
        open_run(tmp_path / "run", resume=True)
    process.kill()
    process.join()
    open_run(tmp_path / "run", resume=True)  # a killed process leaves no lock


METRICS = {"reward": 2.5, "iou": 0.5, "clip_low": 0.0, "clip_high": 0.0}


def test_the_settings_of_a_run_are_written(tmp_path):
    s = dataclasses.replace(parse_settings("train", ["--lr", "0.5"]), resume=True)
    assert runs.start_metrics(tmp_path, s, 0) == []
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lr"] == 0.5 and config["out"] == str(tmp_path) and not config["resume"]


def test_a_run_that_went_further_is_refused_and_stays(tmp_path):
    """Else the weights of step 3 would be called those of step 2, or 4 answers those of 1."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match="--steps 2: .*3"):
        runs.start_metrics(tmp_path, parse_settings("train", ["--steps", "2"]), 3)
    (tmp_path / "answers.jsonl").write_text('{"skipped": "no file"}\n' * 4)
    s = SimpleNamespace(resume=True, limit=1)
    with pytest.raises(UserError, match="--limit 1: .*4 answers"):
        evaluation.Answers(tmp_path, s, count=1, style="brief", dataset=[])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("line", [b"null", b'{"step": 2}', b"\xff"])
def test_a_damaged_log_is_named_and_stays(line, tmp_path):
    content = json.dumps({"step": 1} | METRICS).encode() + b"\n" + line + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged.*mend or delete the file"):
        runs.start_metrics(tmp_path, parse_settings("train", []), 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_presets_fill_in_and_a_flag_wins():
    for command in settings.CLASSES:
        for preset in settings.PRESETS:
            parse_settings(command, ["--preset", preset])
    s = parse_settings("train", ["--save_memory", "0", "--preset", "qwen7b"])
    assert s.side == 840 and s.save_memory == 0 and settings.rollout_prompts(s) == 4


def test_every_number_has_bounds_and_every_setting_a_help_text():
    for cls in settings.CLASSES.values():
        for field in dataclasses.fields(cls):
            assert field.metadata["help"]
            assert (field.name in settings.BOUNDS) == (field.type in (int, float)), field.name


@pytest.mark.parametrize(
    "name, bad, good, bounds",
    [
        ("seed", 2**63, 2**63 - 1, "at least 0"),
        ("group_size", 1, 2, "from 2 to 4096"),
        ("lr", math.nan, 1e-6, "from 1e-12 to 1"),
        ("lr", 2.0, 1.0, "from 1e-12 to 1"),
        ("temperature", 1e30, 2.0, "from 0.0001 to 100"),
        ("beta", math.inf, 0.0, "from 0 to 1000"),
        ("train_samples", 10**13, 10**7, "from 1 to 10000000"),
        ("minibatches", 3, 4, "divide --prompts_per_step, 8"),
    ],
)
def test_numbers_outside_of_their_bounds_are_refused(name, bad, good, bounds):
    with pytest.raises(UserError, match=f"--{name} .*{bounds}"):
        parse_settings("train", [f"--{name}", str(bad)])
    assert getattr(parse_settings("train", [f"--{name}", str(good)]), name) == good


def save_config(folder, command="train", **changes):
    """Write config.json of a run. Returns the flags that continue it."""
    config = dataclasses.asdict(settings.CLASSES[command]()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return ["--resume", "--out", str(folder)]


def test_resume_takes_the_settings_of_the_run(tmp_path):
    flags = save_config(tmp_path, lr=0.5, seed=3, data="refcocog:a", sam="vit_b:a.pth")
    # How far it goes may change, and how and where its files lie.
    moved = "--steps 7 --device cpu --save_memory 1 --data refcocog:b --sam vit_b:b.pth"
    s = parse_settings("train", [*flags, *moved.split()])
    assert s.lr == 0.5 and s.seed == 3 and s.steps == 7 and s.data == "refcocog:b" and s.resume


@pytest.mark.parametrize(
    "command, name, other",
    [
        ("eval", "data", "refcocog:b"),
        ("eval", "protocol", "segzero"),
        ("train", "data", "reasonseg:a"),
        ("train", "sam", "vit_l:a.pth"),
        ("train", "seed", "4"),
    ],
)
def test_one_run_has_one_set_and_one_model(command, name, other, tmp_path):
    flags = save_config(tmp_path, command, data="refcocog:a", sam="vit_b:a.pth")
    assert parse_settings(command, flags).data == "refcocog:a"
    with pytest.raises(UserError, match=f"own --{name}:"):
        parse_settings(command, [*flags, f"--{name}", other])


@pytest.mark.parametrize("change", [{"normalise": "both"}, {"preset": "big"}, {"lr": None}])
def test_a_value_that_was_changed_in_config_json_is_checked(change, tmp_path):
    with pytest.raises(UserError, match=f"--{min(change)} "):
        parse_settings("train", save_config(tmp_path, **change))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"colour": "red"}'])
def test_a_run_that_cannot_be_resumed_is_named(text, tmp_path):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"--resume: .*{tmp_path.name}"):
        parse_settings("train", ["--resume", "--out", str(tmp_path)])


def test_a_user_error_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, exit_with_one_line():
        raise UserError("--data FOLDER: two\nlines")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "samr1_mini.py: --data FOLDER: two lines\n"
    with pytest.raises(SystemExit) as stopped, exit_with_one_line(), continued_by("eval --resume"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    line = "samr1_mini.py: interrupted; continue with: eval --resume\n"
    assert capsys.readouterr().err == line
    with pytest.raises(ValueError), exit_with_one_line():
        raise ValueError("a bug")


def test_every_epoch_takes_every_sample_once_in_its_own_order():
    chosen = [i for step in range(5) for i in runs.indices(step, 4, 10, seed=0)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert chosen[:10] != chosen[10:]
    assert chosen[:4] != runs.indices(0, 4, 10, seed=1)


class Broken(Shapes):
    """Scenes of which only those with an index in `usable` can be read."""

    usable = ()

    def __getitem__(self, index):
        if index not in self.usable:
            raise BadSample(f"{index} is broken")
        return super().__getitem__(index)


def test_a_bad_sample_is_replaced_by_the_next_good_one(capsys):
    scenes = Broken("train", size=10)
    scenes.usable = (1, 4)
    batch, skipped = runs.load_samples(scenes, [1, 2, 5])
    assert [one.id.rsplit("-", 1)[1] for one in batch] == ["1", "4", "1"]
    assert skipped == 2 + 6
    assert capsys.readouterr().err.splitlines()[0] == "skipped: 2 is broken"
    with pytest.raises(UserError, match="100 samples in a row"):
        runs.load_samples(Broken("train", size=10), [0])


def test_the_second_signal_and_the_first_one_after_the_last_step_act_at_once(tmp_path, capsys):
    stop = runs.StopSignal()
    message = f"train --resume --out {tmp_path}"
    with pytest.raises(KeyboardInterrupt, match=message), stop.ended(tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert not stop.number and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stop = runs.StopSignal()
    signal.raise_signal(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(number) == signal.SIG_DFL
    with pytest.raises(SystemExit) as stopped:
        stop.exit(tmp_path, 3)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert message in capsys.readouterr().out


def test_the_table_of_a_run_is_printed(tmp_path, capsys):
    before = {"giou": 0.4, "ciou": 0.3, "format": 0.9, "box": 0.5, "points": 0.75}
    before |= {"boxonly": 0.125, "n": 8}
    after = before | {"giou": 0.65, "giou_95": [0.6, 0.71], "ciou_95": [0.25, 0.375]}
    results = {"before": before, "ceiling": {"giou": 0.9, "ciou": 0.95, "n": 8}, "after": after}
    results["another adapter"] = before  # its name is longer than the column's title
    row = {"reward": 2.0, "iou": 0.25, "clip_low": 0.01, "clip_high": 0.02}
    (tmp_path / "samples").mkdir()
    runs.print_table(results, [row, row | {"reward": 4.0}], tmp_path)
    titles, *lines = capsys.readouterr().out.strip("\n").split("\n")
    assert lines[0].split() == ["before", "0.400", "0.300", "0.900", "0.500", "0.750", "0.125", "8"]
    assert lines[2].split() == ["another", "adapter", *lines[0].split()[1:]]
    assert lines[3].split() == ["ceiling", "0.900", "0.950", *"----", "8"]
    for line in lines[:4]:  # below their title
        assert re.search(r" 0\.\d+", line).end() == titles.index("gIoU") + len("gIoU")
    assert "after            gIoU 0.600 to 0.710, cIoU 0.250 to 0.375" in lines
    assert "gap to the ceiling closed: 50 %" in lines
    assert "mean reward (of 6): 2.00 -> 4.00 (first 1 and last 1 steps)" in lines
    assert lines[-1] == f"written to {tmp_path}: samples/"


EXAMPLES = "answers evaluation foreign pictures runs scenes segzero weights"


@pytest.mark.parametrize("module", EXAMPLES.split())
def test_docstring_examples(module):
    failed, tried = doctest.testmod(importlib.import_module(f"plumbing.{module}"))
    assert tried and not failed

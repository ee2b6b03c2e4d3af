"""A run's folder and the settings: whole files, marks, bounds, the samples of a step, timing."""

import contextlib
import dataclasses
import doctest
import json
import math
import os
import signal
import sys
import typing
import warnings
from pathlib import Path

import pytest
import torch

import samr1_mini
from data import BadSample, Shapes
from grpo import Completions
from plumbing import command_line, runs, settings
from plumbing.settings import parse_settings

ROOT = Path(runs.__file__).parent.parent


@pytest.fixture(autouse=True)
def own_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_never_written_into(tmp_path):
    """A reader of the old file keeps all of it. No half file ever has the final name."""
    file = tmp_path / "folder" / "file.json"
    runs.write_text(file, "old")
    with open(file) as held:
        runs.write_text(file, "new, and longer")
        assert held.read() == "old"
    assert file.read_text() == "new, and longer" and len(list(file.parent.iterdir())) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), runs.whole_file(file) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def open_run(out: Path, *inputs: Path, resume=False, overwrite=False, command="train") -> None:
    runs.open_run(out, command, resume, overwrite, ["tiny", *map(str, inputs), "none"])


def test_a_new_or_empty_folder_gets_the_mark(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "run"):
        open_run(out)
        assert (out / runs.MARK).read_text() == "train"
        open_run(out, resume=True)  # that is, a run that wrote nothing yet


def test_a_run_is_replaced_only_with_overwrite(tmp_path):
    out = tmp_path / "run"
    open_run(out, command="eval")
    for name in runs.RUN_FILES:
        (out / name).mkdir() if "." not in name else (out / name).write_text("old")
    (out / "adapter" / "weights").write_text("old")
    (out / "config.tmp.json").write_text("old")  # left by a killed process
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        open_run(out)
    assert len(list(out.iterdir())) == len(runs.RUN_FILES) + 2
    open_run(out, overwrite=True)
    assert [file.name for file in out.iterdir()] == [runs.MARK]
    assert (out / runs.MARK).read_text() == "train"


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", ".git"])
def test_a_run_beside_other_files_is_not_replaced(name, tmp_path):
    open_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("other")
    with pytest.raises(ValueError, match=f"also holds {name}"):
        open_run(tmp_path, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 3


OTHERS = ["config.json", "thesis.txt", "notes.tmp", "config.json.tmp", "thesis.tmp.txt"]
OTHERS += ["samples.tmp", "adapter.tmp", "tmpmy_notes.tmp"]


def test_a_folder_without_the_mark_is_not_replaced(tmp_path):
    for name in OTHERS:
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="other files than a run: name another one"):
                open_run(out, overwrite=overwrite)
        assert (out / name).read_text() == "{}"


@pytest.mark.parametrize("name", ["notes.tmp", "tmpmy_notes.tmp", "samples.tmp"])
def test_a_users_own_temporary_file_is_never_deleted(name, tmp_path):
    open_run(tmp_path)
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds a run|also holds"):
            open_run(tmp_path, overwrite=overwrite)
    open_run(tmp_path, resume=True)
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_killed_process_left_blocks_no_folder_and_is_removed(tmp_path):
    """It was killed within its first write, so there is no mark, or not yet a file of the run."""
    for k, mark in enumerate((None, "train")):
        out = tmp_path / str(k)
        (out / "tmpab_1cd2e.tmp").mkdir(parents=True)
        (out / "tmpab_1cd2e.tmp" / "adapter_config.json").write_text("{")
        for name in ("config.tmp.json", "metrics.tmp.jsonl", "curves.tmp.png"):
            (out / name).write_text("{")
        if mark:
            (out / runs.MARK).write_text(mark)
        open_run(out, overwrite=bool(mark))
        assert [file.name for file in out.iterdir()] == [runs.MARK]


def test_what_a_killed_process_left_is_removed_at_the_next_resume(tmp_path):
    out = tmp_path / "samples"  # a run's folder may have the name of one of its own folders
    open_run(out)
    half = ["tmpab_1cd2e.tmp/adapter_config.json", "config.tmp.json", "metrics.tmp.jsonl"]
    half += ["checkpoint/state.tmp.pt", "rollouts/step_00050.tmp.json", "samples/step_1.tmp.png"]
    whole = ["config.json", "checkpoint/state.pt", "rollouts/step_00050.json", "adapter/x.tmp.json"]
    whole += ["samples/mine.tmp.png", "step_1.tmp.png", "notes.tmp", "tmpmy_notes.tmp"]
    for name in half + whole:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{")
    open_run(out, resume=True)
    left = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert left == {runs.MARK, *whole} and not (out / "tmpab_1cd2e.tmp").exists()


def test_a_folder_that_holds_only_the_mark_is_like_a_new_one(tmp_path):
    """What a disk leaves that was full before the first file of a run."""
    for text in ("", "train", "eval"):
        (tmp_path / runs.MARK).write_text(text)
        open_run(tmp_path)
        assert (tmp_path / runs.MARK).read_text() == "train"


@pytest.mark.parametrize(
    "command, files, way",
    [
        ("train", "", "--overwrite"),
        ("train", "config.json", "--overwrite"),
        ("train", "config.json metrics.jsonl eval.json", "--overwrite"),
        ("train", "checkpoint/state.pt", "--overwrite"),
        ("train", "config.json checkpoint/state.pt", "--resume"),
        ("eval", "", "--overwrite"),
        ("eval", "config.json", "--resume"),
    ],
)
def test_a_full_disk_names_the_way_that_works(command, files, way, tmp_path, capsys):
    out = tmp_path / "run"
    open_run(out, command=command)
    for name in files.split():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    with pytest.raises(SystemExit) as stopped, runs.writing_to(out):
        raise OSError(28, "No space left on device")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"samr1_mini.py: --out {out} cannot be written (make room, then {way})")
    if files:  # the same words as those of a new start
        with pytest.raises(ValueError, match="--overwrite") as refused:
            open_run(out, command=command)
        assert ("--resume" in str(refused.value)) == (way == "--resume")
    with pytest.raises(KeyError), runs.writing_to(out):
        raise KeyError("a bug")


@pytest.mark.skipif(runs.fcntl is None, reason="this system has no locks of files")
def test_a_lock_ends_without_a_warning(tmp_path):
    """Python warns of each open file object that nobody closed, and a lock is never closed."""
    open_run(tmp_path)
    descriptor = runs._locks.pop((tmp_path / runs.MARK).resolve())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        os.close(descriptor)
    open_run(tmp_path, resume=True)


def in_another_process(function, *args) -> int:
    """Start a copy of this process that only calls a function. Returns the number of the process.

    A new process would import the libraries first, which takes longer than these tests.
    """
    if number := os.fork():
        return number
    code = 1
    try:
        function(*args)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@contextlib.contextmanager
def held_by_another_process(out, resume=False):
    """A process that has opened a run's folder. It is killed at the end of this block."""
    read, write = os.pipe()

    def hold():
        open_run(out, resume=resume)
        os.write(write, b"open")
        signal.pause()

    process = in_another_process(hold)
    os.close(write)  # else the next line would wait for a process that has failed
    try:
        assert os.read(read, 4) == b"open"
        yield
    finally:
        os.close(read)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.skipif(runs.fcntl is None, reason="this system has no locks of files")
def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    out = tmp_path / "run"
    with held_by_another_process(out):
        (out / "config.json").write_text("{}")
        (tmp_path / "link").symlink_to(out)
        for folder in (out, tmp_path / "link"):
            for how in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(ValueError, match="another process is writing to it"):
                    open_run(folder, **how)
        open_run(tmp_path / "other")
        assert {file.name for file in out.iterdir()} == {runs.MARK, "config.json"}
    open_run(out, resume=True)  # a killed process leaves no lock
    open_run(tmp_path / "link", resume=True)  # this process has the lock itself
    open_run(out, overwrite=True)
    assert (out / runs.MARK).read_text() == "train"


@pytest.mark.skipif(runs.fcntl is None, reason="this system has no locks of files")
@pytest.mark.slow
def test_of_two_processes_that_resume_a_run_the_second_stops_with_one_line(tmp_path, capfd):
    out = tmp_path / "run"
    train, resume = ["train", "--out", str(out)], ["train", "--out", str(out), "--resume"]
    flags = "--steps 0 --eval_samples 1 --prompts_per_step 2".split()
    assert exit_code(in_another_process(samr1_mini.main, train + flags)) == 0
    before = (out / "metrics.jsonl").stat().st_mtime_ns
    with held_by_another_process(out, resume=True):
        capfd.readouterr()
        assert exit_code(in_another_process(samr1_mini.main, resume)) == 2
        lines = capfd.readouterr().err.splitlines()
        lines = [one for one in lines if one.startswith("samr1_mini.py")]
        assert len(lines) == 1 and f"--out {out}" in lines[0] and "another process" in lines[0]
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before
    assert exit_code(in_another_process(samr1_mini.main, resume)) == 0


@pytest.mark.parametrize("where", ["the folder", "inside", "linked", "through a link", "file"])
def test_an_input_is_never_an_output(where, tmp_path):
    out = tmp_path / "run"
    open_run(out)
    (out / "adapter").mkdir()
    (out / "adapter" / "weights").write_text("trained")
    (tmp_path / "link").symlink_to(out)
    inputs = {
        "the folder": (out, out),
        "inside": (out, out / "adapter"),
        "linked": (tmp_path / "link", out / "adapter"),
        "through a link": (out, tmp_path / "link" / "adapter"),
        "file": (out, f"vit_b:{out}/adapter/weights"),
    }
    folder, name = inputs[where]
    with pytest.raises(ValueError, match="which this command reads: name another folder"):
        open_run(folder, name, overwrite=True)
    assert (out / "adapter" / "weights").read_text() == "trained"


def test_only_a_link_in_a_run_is_deleted_and_not_its_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "figure.png").write_text("figure")
    open_run(tmp_path / "run")
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "elsewhere")
    open_run(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "samples").exists()
    assert (tmp_path / "elsewhere" / "figure.png").read_text() == "figure"


def test_a_run_is_resumed_by_its_own_command_only(tmp_path):
    open_run(tmp_path / "run", command="eval")
    for out in (tmp_path / "run", tmp_path / "none"):
        with pytest.raises(ValueError, match="not the folder of a `train` run"):
            open_run(out, resume=True)
    assert not (tmp_path / "none").exists()


def test_the_metrics_are_cropped_to_the_checkpoint(tmp_path):
    s = parse_settings("train", ["--lr", "0.5"])
    rows = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"st')
    assert runs.start_metrics(tmp_path, s, 2) == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == rows[:2]
    assert runs.start_metrics(tmp_path, s, 0) == []
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lr"] == 0.5 and config["out"] == str(tmp_path) and not config["resume"]


@pytest.mark.parametrize("line", ["{]", "null", "5", '{"other": 1}', '"step"', "\udcff"])
def test_a_damaged_log_is_named_and_stays(line, tmp_path, capsys):
    s = parse_settings("train", [])
    s.resume = True
    starts = {"metrics.jsonl": lambda: runs.start_metrics(tmp_path, s, 2)}
    starts["answers.jsonl"] = lambda: runs.start_answers(tmp_path, s)
    for name, start in starts.items():
        text = f'{{"step": 1, "skipped": "no file"}}\n{line}\n'.encode(errors="surrogateescape")
        (tmp_path / name).write_bytes(text)
        with pytest.raises(SystemExit) as stopped:
            start()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert f"{tmp_path / name} is damaged, mend or delete it, then --resume" in said
        assert (tmp_path / name).read_bytes() == text
        (tmp_path / name).unlink()
        assert start() == []  # training goes on without the log of its first steps


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


def test_defaults_and_presets_are_valid_and_a_flag_wins():
    for command in settings.CLASSES:
        for preset in settings.PRESETS:
            assert not settings.problem(parse_settings(command, ["--preset", preset]))
    assert parse_settings("train", ["--preset", "qwen7b"]).rollout_prompts == 4
    flags = ["--rollout_prompts", "2", "--preset", "qwen7b", "--save_memory", "0"]
    s = parse_settings("train", flags)
    assert s.rollout_prompts == 2 and s.save_memory == 0 and s.side == 840


def test_every_number_has_a_lower_bound_and_every_setting_a_help_text():
    tables = (settings.AT_LEAST, settings.ABOVE, settings.AT_MOST)
    bounded = [{name for text in table.values() for name in text.split()} for table in tables]
    seen = set()
    for cls in (*(cls for cls, _ in settings.CLASSES.values()), settings.DemoSettings):
        for field in dataclasses.fields(cls):
            seen.add(field.name)
            assert field.metadata["help"]
            if field.type in (int, float):
                assert field.name in bounded[0] | bounded[1], field.name
    assert set().union(*bounded, settings.MAY_CHANGE) <= seen
    for values in settings.PRESET_VALUES.values():
        assert set(values) <= seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_decimal_number_must_be_finite(value):
    hints = typing.get_type_hints(settings.Settings)
    names = [name for name, kind in hints.items() if kind is float]
    assert "lr" in names
    for name in names:
        s = dataclasses.replace(settings.Settings(), **{name: value})
        assert settings.problem(s) == f"--{name} must be a finite number"


@pytest.mark.parametrize(
    "name, bad, good",
    [
        ("seed", -1, 0),
        ("seed", 2**63, 2**63 - 1),
        ("group_size", 1, 2),
        ("steps", -1, 0),
        ("side", 0, 1),
        ("side", 4097, 4096),
        ("max_new_tokens", 4097, 4096),
        ("lora_rank", 1025, 1024),
        ("data_seed", 2**63, 2**63 - 1),
        ("eps_low", 1.01, 1.0),
        ("top_p", 0.0, 0.01),
        ("top_p", 1.01, 1.0),
        ("temperature", 0.0, 0.01),
        ("beta", -0.1, 0.0),
        ("lora_rank", 0, 1),
        ("minibatches", 3, 4),
    ],
)
def test_bounds_are_exact(name, bad, good):
    s = settings.Settings()
    assert settings.problem(dataclasses.replace(s, **{name: bad})).startswith(f"--{name} must ")
    assert not settings.problem(dataclasses.replace(s, **{name: good}))


@pytest.mark.parametrize("name, value", [("steps", "many"), ("steps", 2.0), ("steps", True)])
def test_a_config_with_values_of_another_type_is_refused(name, value, tmp_path):
    config = dataclasses.asdict(settings.Settings()) | {"lr": 1}  # JSON does not tell 1 from 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert command_line.read_config(tmp_path, settings.Settings) == config
    for key, wrong in {name: value, "lr": "1", "vlm": 3, "resume": 0, "accuracy": "best"}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: wrong}))
        with pytest.raises(ValueError, match=f"config.json is damaged .{key}: "):
            command_line.read_config(tmp_path, settings.Settings)


def test_an_error_about_a_file_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, command_line.exit_on_error("--data FOLDER"):
        raise ValueError("two\nlines")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "samr1_mini.py: --data FOLDER: two lines\n"
    with pytest.raises(TypeError), command_line.exit_on_error("--data FOLDER"):
        raise TypeError("a bug")
    with pytest.raises(ValueError), command_line.exit_on_error("--out FOLDER", (OSError,)):
        raise ValueError("a bug")


# --------------------------------------------------------------------------------------------------
# Samples of a step, interruption, numbers
# --------------------------------------------------------------------------------------------------


def test_every_epoch_takes_every_sample_once_in_its_own_order():
    chosen = [i for step in range(10) for i in runs.indices(step, 4, 20, seed=0)]
    assert sorted(chosen[:20]) == sorted(chosen[20:]) == list(range(20))
    assert chosen[:20] != chosen[20:]
    assert chosen[:4] != runs.indices(0, 4, 20, seed=1)
    # A step may contain the end of an epoch.
    chosen = [i for step in range(5) for i in runs.indices(step, 4, 10, seed=0)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))


class Broken(Shapes):
    """Scenes of which only those with an index in `usable` can be read."""

    usable: tuple[int, ...] = ()

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
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 8 and errors[0] == "skipped: 2 is broken"


def test_a_hundred_bad_samples_in_a_row_end_the_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        runs.load_samples(Broken("train", size=10), [0])
    *skipped, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(skipped) == 100
    assert last.startswith("samr1_mini.py: --data: 100 samples in a row")


def test_the_second_signal_ends_the_run_at_once(tmp_path, capsys):
    stop = runs.StopSignal()
    assert not stop.number
    signal.raise_signal(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(number) == signal.SIG_DFL
    with pytest.raises(SystemExit) as stopped:
        stop.exit(tmp_path, 3)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"train --resume --out {tmp_path}" in capsys.readouterr().out


def test_the_timer_measures_each_phase():
    timer = runs.PhaseTimer(torch.device("cpu"))
    timer.end("rollout")
    timer.end("update")
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    row = timer.row(Completions(mask.long(), mask))
    assert set(row) == {
        *("seconds_rollout", "seconds_update", "peak_mib_rollout", "peak_mib_update"),
        *("tokens_per_second", "peak_mib"),
    }
    assert all(value >= 0 and math.isfinite(value) for value in row.values())


def test_the_table_of_a_run_is_printed(tmp_path, capsys):
    before = {"giou": 0.4, "ciou": 0.3, "format": 0.9, "box": 0.5, "n": 8}
    before |= {"points": 0.75, "boxonly": 0.125}
    ceiling = {"giou": 0.9, "ciou": 0.95, "n": 8}
    results = {"before": before, "ceiling": ceiling, "after": before | {"giou": 0.65}}
    row = {"reward": 2.0, "iou": 0.25, "clip_low": 0.01, "clip_high": 0.02}
    (tmp_path / "samples").mkdir()
    runs.print_table(results, [row, row | {"reward": 4.0}], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line]
    assert names[1:4] == ["before", "after", "ceiling"]
    assert lines[1].split()[-4:] == ["points", "box", "only", "n"]
    assert lines[2].split() == ["before", "0.400", "0.300", "0.900", "0.500", "0.750", "0.125", "8"]
    assert lines[4].split() == ["ceiling", "0.900", "0.950", *"----", "8"]
    assert "gap to the ceiling closed: 50 %" in lines
    assert "mean reward (of 6): 2.00 -> 4.00 (first 1 and last 1 steps)" in lines
    assert lines[-1] == f"written to {tmp_path}: samples/"


@pytest.mark.parametrize("module", [runs, settings, command_line])
def test_docstring_examples(module):
    assert not doctest.testmod(module).failed

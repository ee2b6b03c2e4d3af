"""command_line.py - settings classes as a command line: --help, presets, checks, --resume."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser


def setting(default, meaning: str, choices: tuple = ()):
    """A field of a settings class, with its line in --help."""
    metadata = {"help": meaning} | ({"choices": list(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=metadata)


@contextlib.contextmanager
def exit_on_error(flag: str, errors: tuple = (OSError, ValueError, KeyError, RuntimeError)):
    """Turn an error about a file or a flag into one line that names it, and exit with code 2.

    Put it only around the reading or writing of that file. An error anywhere else is a bug and
    should keep its traceback.
    """
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:400]
        program = Path(sys.argv[0]).name
        tqdm.write(f"{program}: {flag}: {reason}", file=sys.stderr)  # below a progress bar
        raise SystemExit(2) from error


class Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse(cls, argv: list[str], program: str, about: str, presets: dict, may_change: set, problem):
    """Read an instance of the settings class `cls` from a command line.

    The bases of `cls` are the groups in --help. Values come from the defaults, then from the preset
    (or, with --resume, from the run in --out), then from the flags. Bad values exit with code 2.

    may_change: settings that may differ from those of the run that --resume continues.
    problem:    function of the settings that returns what is wrong with them, or "".
    """

    def parser() -> Parser:
        usage = "%(prog)s [--flag value ...]"
        groups = list(cls.__bases__)
        return Parser(groups, prog=program, usage=usage, description=about, allow_abbrev=False)

    given = parser().parse_args(argv)  # once for --preset and --resume, then with their values
    names = [field.name for field in dataclasses.fields(cls)]
    filled, saved = parser(), {}
    filled.set_defaults(**{k: v for k, v in presets[given.preset].items() if k in names})
    if getattr(given, "resume", False):
        with exit_on_error("--resume"):
            if not given.out or given.overwrite:
                raise ValueError("name the run with --out, and leave --overwrite out")
            saved = read_config(Path(given.out), cls) | {"resume": True}
        filled.set_defaults(**saved)
    settings = cls(**vars(filled.parse_args(argv)))
    fixed = [name for name in saved if name not in may_change]
    if changed := [f"--{name}" for name in fixed if getattr(settings, name) != saved[name]]:
        filled.error(
            f"--resume continues with the run's own {', '.join(changed)}: leave out "
            f"{'them' if len(changed) > 1 else 'it'}, or start another run"
        )
    if reason := problem(settings):
        filled.error(reason)
    return settings


def read_config(run: Path, cls) -> dict:
    """The settings in a run's folder, those of the class `cls`.

    Raises ValueError if they are damaged, or those of another version or command.
    """
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: name the folder of a run")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): start again with --overwrite") from error
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(config, dict) or set(config) != set(fields):
        known = set(config) ^ set(fields) if isinstance(config, dict) else {"no settings"}
        known = ", ".join(sorted(known))
        raise ValueError(f"{file} is of another version or command ({known}): start another run")
    for name, value in config.items():
        kind, choices = fields[name].type, fields[name].metadata.get("choices", [value])
        if type(value) not in {kind, int if kind is float else kind} or value not in choices:
            raise ValueError(f"{file} is damaged ({name}: {value!r}): start another run")
    return config

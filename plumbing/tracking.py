"""tracking.py - metrics and pictures of a run in a tracker of the user's choice, see --track."""

import importlib
from dataclasses import asdict
from pathlib import Path

from plumbing.errors import UserError, reason_of


class Tracker:
    """trackio or wandb, which have the same functions, or nothing for "none"."""

    def __init__(self, s, out: Path):
        """out: the folder of the run, which gives it its name. Raises UserError."""
        self.package = None
        if s.track == "none":
            return
        try:
            self.package = importlib.import_module(s.track)
            resume = "allow" if s.resume else "never"
            self.package.init(project="samr1-mini", name=out.name, config=asdict(s), resume=resume)
        except ModuleNotFoundError as error:
            raise UserError(f"--track {s.track}: first pip install {error.name}") from error
        except Exception as error:  # no account, no network, another version
            reason = f"it does not start ({reason_of(error)})"
            raise UserError(f"--track {s.track}: {reason}: log in, or leave it out") from error

    def log(self, row: dict, picture: Path) -> None:
        """Log a row of metrics.jsonl, and the picture of its step if there is one."""
        if self.package:
            shown = {"samples": self.package.Image(str(picture))} if picture.exists() else {}
            self.package.log(row | shown, step=row["step"])

    def finish(self) -> None:
        """End the run. An interrupted one is ended by the package itself."""
        if self.package:
            self.package.finish()

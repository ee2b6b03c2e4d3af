"""errors.py - errors that the user can mend, and the one place that prints them."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """Something that the user gave cannot be used: a file, a flag, a model.

    The message is one line. It names the file or the flag, what is wrong, and the mend. Raise it
    where the data enters the program. An error in our own code keeps its traceback.
    """


def reason_of(error: BaseException) -> str:
    """The type and the message of an exception, on one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def refusing(explain: Callable[[Exception], str]):
    """Turn any error in this block into a `UserError` with the message explain(error).

    Put it only around the reading of what other people made: a damaged file can raise anything.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error)) from error


@contextlib.contextmanager
def exit_with_one_line():
    """Print a `UserError` as one line on stderr and exit with code 2. Ctrl-C exits with 130.

    If the reader of the output is gone, as in `... | head -1`, it exits with 141, as other programs
    do. Every program of this repository runs its `main` within this, once.
    """
    program = Path(sys.argv[0]).name
    try:
        yield
        sys.stdout.flush()  # the last lines can be the ones that nobody reads
    except UserError as error:
        message = " ".join(str(error).split())
        tqdm.write(f"{program}: {message}", file=sys.stderr)  # below a progress bar
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        message = "; ".join(("interrupted", *map(str, error.args)))
        tqdm.write(f"{program}: {message}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # Python writes the rest when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(141) from None


@contextlib.contextmanager
def continued_by(command: str):
    """Add to the line that Ctrl-C prints how to continue what runs in this block."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"continue with: {command}") from error

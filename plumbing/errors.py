"""errors.py - errors that the user can mend, and the one place that prints them."""

import contextlib
import sys
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
def exit_with_one_line():
    """Print a `UserError` as one line on stderr and exit with code 2. Ctrl-C exits with 130.

    Every program of this repository runs its `main` within this, once.
    """
    program = Path(sys.argv[0]).name
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
        tqdm.write(f"{program}: {message}", file=sys.stderr)  # below a progress bar
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        tqdm.write(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None

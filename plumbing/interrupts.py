"""interrupts.py - Ctrl-C is one line also while a program imports torch, which takes seconds.

Programs import this module first. Nothing else may: it changes what Ctrl-C prints.
"""

import sys

from plumbing.errors import exit_with_one_line


def report(kind: type[BaseException], error: BaseException, trace) -> None:
    """A `sys.excepthook`: only Ctrl-C loses its traceback."""
    with exit_with_one_line():
        if issubclass(kind, KeyboardInterrupt):
            raise error
    sys.__excepthook__(kind, error, trace)


sys.excepthook = report

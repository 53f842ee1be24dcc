"""The edge of every command: parse with tyro, and turn bad input into one sentence and exit code 2.

    if __name__ == "__main__":
        command(main)

`InputError` is the only exception a user may cause. Anything else is our bug and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")

# Threads of a parallel region wait asleep, not spinning: beside another busy process spinning ones cost a training step
# 5 to 10 times its time (LOG.md, 2026-11-21). OpenMP reads this once, so it is set before torch is imported; this is
# the first of our modules that any program imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class InputError(ValueError):
    """What the user gave cannot work. The message says what was got, what was expected, what to do."""


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one `error:` line to stderr and leave with `code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def guarded(function: Callable[[], T]) -> T:
    """The result of `function`; an `InputError` or a failing disk is a sentence (exit 2), Ctrl-C is exit 130."""
    try:
        return function()
    except InputError as error:
        fail(error)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise  # a library's own OSError subclass: not a file the user named
        where = f"{error.filename}: " if error.filename is not None else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C; what was written is whole: run the same command to continue", 130)


def command(main: Callable[..., object]) -> None:
    """Run `main` as a command line: its signature is the options, its docstring the help."""
    import tyro

    guarded(lambda: tyro.cli(main))

"""The one place where an exception becomes a message and an exit code.

One job: run a command and end as the README's table of exit codes says. Nothing else in the package prints an
error or leaves the process.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from typer import BadParameter

from hrm_ray.errors import HrmRayError

EXIT_USAGE = 2
EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130

_USAGE_ERRORS: type[Any] = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What Typer raises for wrong usage. It exports only this subclass, from wherever its version takes the base."""


class Aborted(Exception):
    """Carries an exception of a command past Typer, which would swallow a broken pipe of any socket as quiet."""


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command` and say how the process ends; errors are told on stderr.

    A command may return its exit code; anything else it returns means 0.
    """
    try:
        result = command()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Aborted as ended:
        return _report(ended.__cause__ or ended)
    except BaseException as error:  # noqa: BLE001 (this is the edge: every end is told here, and once)
        return _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return 0  # what prints help pages leaves in this way
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_UNEXPECTED if error.code else 0
    if isinstance(error, HrmRayError):
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, _USAGE_ERRORS):
        message = str(error.format_message()).rstrip()
        print(f"error: {message}{'' if message[-1:] in '.?!' else '.'} `--help` lists what there is.", file=sys.stderr)
        return EXIT_USAGE
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and reader_is_gone():
        # Who reads has had enough. Commands print what they have done, or what was all they had to do.
        return 0
    traceback.print_exception(error)
    return EXIT_UNEXPECTED


def reader_is_gone() -> bool:
    """Whether what reads our output (`| head`) has closed it; then the rest of the output goes nowhere, quietly."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file, such as a notebook's output
        return False
    try:
        sys.stdout.flush()
        gone = _hung_up(descriptor)
    except OSError:
        gone = True
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def _hung_up(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed, also where no output is left in the buffer to find it out with."""
    if os.name != "posix":
        return False
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

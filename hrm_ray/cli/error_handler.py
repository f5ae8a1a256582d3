"""Turns exceptions into messages and exit codes (the table in the README)."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

from typer import BadParameter

from hrm_ray.errors import HrmRayError

EXIT_USAGE = 2
EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130

_USAGE_ERRORS: type[Any] = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What Typer raises for wrong usage; it exports only this subclass of it."""


class Aborted(Exception):
    """Carries an exception past Typer, which would exit silently on any broken pipe, also of a socket."""


def command(body: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command so that interrupts and broken pipes reach `exit_code_of` and not Typer."""

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> int:
        try:
            return body(*args, **kwargs)
        except (KeyboardInterrupt, EOFError, OSError) as error:
            raise Aborted from error

    return run


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command`, print its errors on stderr, and return the exit code: the one that `command` returns, or 0."""
    try:
        result = command()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Aborted as ended:
        return _report(ended.__cause__ or ended)
    except BaseException as error:  # noqa: BLE001 (every end of the process is reported here, and only here)
        return _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return 0  # a help page ends like this when its reader is gone
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_UNEXPECTED if error.code else 0
    if isinstance(error, HrmRayError):
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        if error.detail:
            print(error.detail.rstrip(), file=sys.stderr)
        return error.exit_code
    if isinstance(error, _USAGE_ERRORS):
        message = str(error.format_message()).rstrip()
        print(f"error: {message}{'' if message[-1:] in '.?!' else '.'} `--help` lists the choices.", file=sys.stderr)
        return EXIT_USAGE
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and reader_is_gone():
        # The reader (`| head`) has closed the pipe: what a command prints last is what it has done.
        return 0
    print(f"error: {type(error).__name__}: hrm-ray did not expect it. Report this traceback.", file=sys.stderr)
    traceback.print_exception(error)
    return EXIT_UNEXPECTED


def reader_is_gone() -> bool:
    """Whether the reader of the output (`| head`) has closed it; the rest of the output is then discarded."""
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
    """Whether the other end of a pipe is closed, also when the buffer is empty, so that a flush would not find out."""
    if os.name != "posix":
        return False
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

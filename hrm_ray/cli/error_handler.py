"""Turns exceptions into messages and exit codes (the table in the README)."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

from typer import BadParameter

from hrm_ray.cli.output import is_unread, output_failure, print_error
from hrm_ray.errors import DISK_FULL_ERRNOS, Fault, HrmRayError, ResourceError
from hrm_ray.stop_signals import EXIT_INTERRUPTED, EXIT_STOPPED, Terminated, unwind_from_now_on

EXIT_USAGE = 2
EXIT_UNEXPECTED = 1

_USAGE_ERRORS: type[Any] = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What Typer raises for wrong usage; it exports only this subclass of it."""


class Aborted(Exception):
    """Carries an exception past Typer, which would exit silently on any broken pipe, also of a socket."""


def command(body: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command so that interrupts and broken pipes reach `exit_code_of` and not Typer; signals raise in it."""
    run = training_command(body)

    @wraps(body)
    def run_unwinding(*args: Any, **kwargs: Any) -> int:
        unwind_from_now_on()
        return run(*args, **kwargs)

    return run_unwinding


def training_command(body: Callable[..., int]) -> Callable[..., int]:
    """As `command`, for a body that handles signals itself once its imports are done."""

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
        code = result if isinstance(result, int) else 0
    except Aborted as ended:
        code = _report(ended.__cause__ or ended)
    except BaseException as error:  # noqa: BLE001 (every end of the process is reported here, and only here)
        code = _report(error)
    failure = output_failure()
    return code if failure is None else _report_output(failure, code)


def _report(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return 0  # a help page ends like this when its reader is gone
    if isinstance(error, Terminated):
        print_error(error.message)
        return EXIT_STOPPED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_UNEXPECTED if error.code else 0
    if isinstance(error, HrmRayError):
        for fault in error.faults:
            print_error(f"error: {fault}")
        if error.detail:
            print_error(error.detail.rstrip())
        return error.exit_code
    if isinstance(error, _USAGE_ERRORS):
        message = str(error.format_message()).rstrip()
        print_error(f"error: {message}{'' if message[-1:] in '.?!' else '.'} `--help` lists the choices.")
        return EXIT_USAGE
    if isinstance(error, KeyboardInterrupt):
        print_error("interrupted" + "".join(map(str, error.args)))
        return EXIT_INTERRUPTED
    if isinstance(error, OSError):
        failure = output_failure()
        if failure is not None:
            return _report_output(failure, 0)
        if error.errno == errno.ENAMETOOLONG:
            name = str(error.filename)
            fault = Fault(f"...{name[-60:]} ({len(name)} characters)", "is too long for a path", "Give a shorter one")
            print_error(f"error: {fault}")
            return EXIT_USAGE
        if error.errno in DISK_FULL_ERRNOS:
            hint = "Free some space, or send it elsewhere"
            fault = Fault(str(error.filename or "the output"), f"it cannot be written ({error.strerror})", hint)
            print_error(f"error: {fault}")
            return ResourceError.exit_code
    print_error(
        f"error: {type(error).__name__}: hrm-ray did not expect it. Report this traceback and `hrm-ray doctor`."
    )
    print_error("".join(traceback.format_exception(error)).rstrip())
    return EXIT_UNEXPECTED


def _report_output(failure: OSError, code: int) -> int:
    """The exit code of a command whose output could not all be written; `code` is the command's own."""
    if is_unread(failure):
        return code  # what a command prints last is what it has done
    fault = Fault("standard output", f"it cannot be written ({failure.strerror})", "Send it elsewhere")
    print_error(f"error: {fault}")
    return code or ResourceError.exit_code

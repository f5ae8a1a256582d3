"""Standard output and error of the command where they are closed, full, no longer read, or lack characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress


def prepare_streams() -> None:
    """Make `print` work on any stream: a closed one discards, and a character that its encoding lacks is escaped."""
    # A file that is opened while a standard descriptor is closed would get its number, and what libraries print.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_if_possible(text: str, *, discards: bool) -> None:
    """Print what a run says; the run goes on where that cannot be written. `discards` as in `output_failure`."""
    try:
        print(text, flush=True)
    except OSError as error:
        # An unbuffered stream, which has lost the text, shows no failure any more.
        failure = output_failure(discards=discards) or error
        if not is_unread(failure):
            print_error(f"warning: standard output cannot be written ({failure.strerror}): the run goes on without it")


def print_error(text: str) -> None:
    """Print on stderr where that is possible; what cannot be said there cannot be said at all."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def output_failure(*, discards: bool = True) -> OSError | None:
    """Why standard output cannot be written, None where it can. With `discards`, which only the owner of the process
    may ask for, all later output is discarded after a failure."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file, such as a notebook's output
        return None
    failure: OSError | None = None
    try:
        sys.stdout.flush()
        if _hung_up(descriptor):
            failure = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    except OSError as error:
        failure = error
    if failure is not None and discards:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return failure


def is_unread(failure: OSError) -> bool:
    """Whether nobody reads the output any more: a pipe (`| head`) or a terminal that was closed."""
    return failure.errno in (errno.EPIPE, errno.EIO)


def _hung_up(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed, also when the buffer is empty, so that a flush would not find out."""
    if os.name != "posix":
        return False
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

"""The file format of `metrics.jsonl`: records as lines of JSON, written, read, and cut at a step for a resumed run.

A line is one flat object: `kind`, `step`, `time_s`, then the record's values under their own names. JSON has no
numbers that are not finite, so these are written as the texts "NaN", "Infinity" and "-Infinity" and read back as
numbers (null would lose which of the three it was).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout

from hrm_ray.atomic_files import atomic_write
from hrm_ray.errors import AWAY_ERRNOS, DISK_FULL_ERRNOS, DataError, DiskError, Fault, ResourceError
from hrm_ray.types import Record, RecordKind

_LOG = logging.getLogger(__name__)
_OWN_KEYS = frozenset({"kind", "step", "time_s"})
_KINDS: dict[str, RecordKind] = {kind: kind for kind in get_args(RecordKind)}
_LOCK_WAIT_S = 2.0
"""At most so long a run waits for another one that writes to the same file."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlSink:
    """Appends each record as one line and flushes it: a kill loses at most the line that is being written.

    `append=False` replaces the file. When appending after a kill, a half-written last line is cut off first and the
    cut is logged. Where the file is deleted or replaced while it is open, later records go into a new one at its path.
    Several processes may write a file that all of them open as `shared`. Raises ResourceError where the file cannot be
    opened.
    """

    def __init__(self, path: Path, append: bool = True, *, shared: bool = False) -> None:
        self._path = path
        self._shared = shared
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if append:
                    _repair_tail(path)
                self._file = path.open("ab" if append else "wb")
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            kind = DiskError if error.errno in DISK_FULL_ERRNOS | AWAY_ERRNOS else ResourceError
            raise kind(Fault(str(path), reason, "Give a file that you may write, on a disk with room")) from error

    def write(self, record: Record) -> None:
        """Take one record. ValueError if a value is named kind, step or time_s, or if the sink is closed."""
        line = to_line(record)
        if not self._in_place() and self._path.parent.is_dir():
            self._file.close()
            self._file = self._path.open("ab")
            _LOG.warning("%s was deleted or replaced during the run; its records begin again", self._path)
        with self._alone():
            self._file.write(line)
            self._file.flush()

    def _alone(self) -> AbstractContextManager[None]:
        return locked(self._path) if self._shared else nullcontext()

    def _in_place(self) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that use this function from the file, by a lock on the file `path`.lock.

    Without it where that cannot be made, or another process holds it too long: metrics must not stop training.
    """
    lock = FileLock(f"{path.resolve()}.lock")
    try:
        Path(lock.lock_file).touch()  # `acquire` would try for the whole time to make a file that cannot be made
        lock.acquire(timeout=_LOCK_WAIT_S)
    except (OSError, NotImplementedError, Timeout) as error:
        _LOG.debug("%s is written without a lock: %s", path, error)
    try:
        yield
    finally:
        lock.release()


def to_line(record: Record) -> bytes:
    """One record as an ASCII line with its newline. TypeError for a value that JSON cannot hold, such as a tensor."""
    taken = _OWN_KEYS & record.values.keys()
    if taken:
        raise ValueError(f"metrics named {sorted(taken)} would hide the record's own fields; rename them")
    flat: dict[str, Any] = {"kind": record.kind, "step": record.step, "time_s": record.time_s, **record.values}
    return json.dumps({key: _jsonable(value) for key, value in flat.items()}, allow_nan=False).encode("ascii") + b"\n"


def read_records(path: Path) -> list[Record]:
    """All complete records of a file, in order; a torn last line (no newline, not JSON) is left out.

    DataError when the file is missing or any other line is not a record.
    """
    return [record for record, _ in _records_and_lines(path)]


def last_records(path: Path, tail_bytes: int = 1 << 16) -> list[Record]:
    """The complete records in the last `tail_bytes` of a file; DataError where one of them is not a record."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail_bytes))
        lines = file.read().split(b"\n")
    first = 0 if size <= tail_bytes else 1
    try:
        return [_from_line(line) for line in lines[first:-1]]
    except ValueError as error:
        hint = "Remove the line, or name a file that a run has written"
        raise DataError(Fault(str(path), f"not a metrics record ({error})", hint)) from error


def truncate_after(path: Path, step: int) -> int:
    """Drop the records after `step` (and a torn last line) for resuming there; returns how many records were dropped.

    The file is replaced atomically; it may be missing. Call this before a sink opens the file. DataError if a line is
    not a record.
    """
    if not path.exists():
        return 0
    dropped = 0
    with atomic_write(path) as file:
        for record, line in _records_and_lines(path):
            if record.step <= step:
                file.write(line)
            else:
                dropped += 1
    return dropped


def drop_copies(path: Path, own: Path, step: int) -> None:
    """Drop from `path`, to which several runs may append, the lines that the metrics file `own` has after `step`.

    Lines of other runs stay, whatever they are, also those that a sink with `shared` adds meanwhile. The file is
    changed in place, so that other runs and links keep it. Either file may be missing. Call this before `own` is
    truncated. DataError if a line of `own` is not a record.
    """
    if not path.exists() or not own.exists():
        return
    later = {line for record, line in _records_and_lines(own) if record.step > step}
    with locked(path), path.open("r+b") as file:
        lines = file.readlines()
        dropped = [line.rstrip(b"\n") + b"\n" in later for line in lines]
        if True not in dropped:
            return
        first = dropped.index(True)
        file.seek(sum(map(len, lines[:first])))
        file.writelines(line for line, drops in zip(lines[first:], dropped[first:], strict=True) if not drops)
        file.truncate()


def why_no_metrics(path: Path) -> str | None:
    """Why metrics cannot be appended to this file; None if it is missing or empty, or JSON lines."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        is_object = not first or isinstance(json.loads(first), dict)
    except ValueError:
        is_object = False
    return None if is_object else "it is not a file of metrics (its first line is not a JSON object)"


def _records_and_lines(path: Path) -> Iterator[tuple[Record, bytes]]:
    """Each record with its line as bytes, newline included."""
    if not path.is_file():
        raise DataError(
            Fault(str(path), "there is no such metrics file", "Name a metrics.jsonl that a run has written")
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            try:
                record = _from_line(line)
            except ValueError as error:
                if not whole:
                    return
                raise DataError(
                    Fault(
                        f"{path}, line {number}",
                        f"not a metrics record ({error})",
                        "Remove the line, or name a file that a run has written",
                    )
                ) from error
            yield record, line if whole else line + b"\n"


class _NotARecordError(ValueError):
    """A line that is JSON and yet no record."""


def _from_line(line: bytes) -> Record:
    """Raises a ValueError (of JSON, UTF-8 or _NotARecordError) if the line is not a record."""
    flat = json.loads(line.decode("utf-8"))
    if not isinstance(flat, dict):
        raise _NotARecordError("not a JSON object")
    kind, step, time_s = flat.pop("kind", None), flat.pop("step", None), _number(flat.pop("time_s", None))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _NotARecordError(f"kind is {kind!r}, known are {', '.join(sorted(_KINDS))}")
    if not isinstance(step, int) or isinstance(step, bool):
        raise _NotARecordError(f"step is {step!r}, not a whole number")
    if not isinstance(time_s, (int, float)) or isinstance(time_s, bool):
        raise _NotARecordError(f"time_s is {time_s!r}, not a number")
    values = {name: _number(value) for name, value in flat.items()}
    if kind == "train" and "lm_loss" in values:
        values = _without_old_names(values)
    return Record(_KINDS[kind], step, time_s, values)


def _without_old_names(values: dict[str, Any]) -> dict[str, Any]:
    """A training record of version 0.1 under today's names; its `loss` was the whole objective."""
    accuracy = "cell_accuracy" if "exact_accuracy" in values or "q_continue_loss" in values else "token_accuracy"
    names = {"loss": "objective", "lm_loss": "loss", "accuracy": accuracy}
    return {names.get(name, name): value for name, value in values.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_number(item) for item in value]
    return value


def _repair_tail(path: Path) -> None:
    """Make the file end with a newline: complete a last line that lacks only that, cut off a torn one."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size, tail = _unfinished_tail(path)
        if not tail:
            return
        try:
            json.loads(tail)  # also a line of another program, which ends without a newline
        except ValueError:
            _LOG.warning("%s: cut off %d bytes of a half-written last line", path, len(tail))
            file.truncate(size - len(tail))
        else:
            file.seek(size)
            file.write(b"\n")


def _unfinished_tail(path: Path) -> tuple[int, bytes]:
    """The file's size and what follows its last newline, read from the end in growing pieces."""
    size = path.stat().st_size
    bite = 4096
    with path.open("rb") as file:
        while True:
            start = max(0, size - bite)
            file.seek(start)
            _, newline, tail = file.read().rpartition(b"\n")
            if newline or start == 0:
                return size, tail
            bite *= 4

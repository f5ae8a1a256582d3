"""A trial: the first updates of a run in a process of their own, and what they say about its memory and speed.

`python -m hrm_ray.search.trial` is that process. It reads its task as a line of JSON, says what it measures as lines of
JSON, and ends when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from hrm_ray.errors import ERROR_KINDS, Fault, HrmRayError, ResourceError
from hrm_ray.settings.tree import RunSettings, from_plain, to_plain

Kind: TypeAlias = Literal["fits", "too large", "no answer"]
SILENT_S = 600.0
"""A trial that says nothing for so long is ended. That is no sign that it is too large."""
COMMAND = (sys.executable, "-m", "hrm_ray.search.trial")
_KILLED = (-9, 137)
"""Exit codes of a process that the system has ended, as it does where memory runs out."""


@dataclass(frozen=True)
class Verdict:
    """What a trial said: whether it fits, the peak of its memory in bytes, and the seconds of an update, as far as they
    could be measured; what it failed of, and how long it took."""

    kind: Kind
    peak_bytes: int | None = None
    update_s: float | None = None
    why: str = ""
    took_s: float = 0.0

    @property
    def fits(self) -> bool:
        return self.kind == "fits"


def run_trial(settings: RunSettings, limit_bytes: int, silent_s: float = SILENT_S) -> Verdict:
    """Try a run with these settings (resolved), which may take `limit_bytes` at its peak. Raises HrmRayError where it
    fails for a reason other than memory."""
    began_s = time.monotonic()
    with _temporary_folder() as folder, _started(settings, folder) as child:
        said: dict[str, Any] = {}
        ended: Verdict | None = None
        try:
            for line in child.lines(silent_s):
                said |= line
                if "peak_bytes" in line:
                    said["peak"] = max(line["peak_bytes"], said.get("peak", 0))
        except TimeoutError:
            ended = Verdict("no answer", said.get("peak"), why=f"said nothing for {silent_s:.0f} s")
        took_s = time.monotonic() - began_s
        if ended is None:
            ended = _verdict(said, child.process.wait(), limit_bytes, child.errors)
    return Verdict(ended.kind, ended.peak_bytes, ended.update_s, ended.why, took_s)


def _verdict(said: dict[str, Any], code: int, limit_bytes: int, errors: str) -> Verdict:
    peak: int | None = said.get("peak")
    if said.get("halved"):
        return Verdict("too large", None, why="a micro-batch ran out of memory")
    if "error" in said:
        error = ERROR_KINDS.get(said["error"], HrmRayError)([Fault(*fault) for fault in said["faults"]])
        if isinstance(error, ResourceError) and "memory" in f"{error.faults[0].value} {error.faults[0].reason}":
            return Verdict("too large", None, why=error.faults[0].reason)
        raise error
    if code in _KILLED or code == -signal.SIGABRT or "can't allocate memory" in errors or "bad_alloc" in errors:
        return Verdict("too large", None, why="its process was ended")
    if code or "update_s" not in said:
        last = errors.strip().splitlines()[-1:] or ["it said nothing"]
        fault = Fault("a trial", f"its process ended with exit code {code} ({last[0][:160]})", "Run `hrm-ray train`")
        raise HrmRayError(fault)
    if peak is not None and peak > limit_bytes:
        return Verdict("too large", peak, said["update_s"], "it took more than it may")
    return Verdict("fits", peak, said["update_s"])


class _Child:
    """The process of a trial, and what it says."""

    def __init__(self, process: subprocess.Popen[str], out: IO[str], err: IO[str]) -> None:
        self.process = process
        self._said: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=50)
        self._threads = [
            threading.Thread(target=self._read, args=(out,), daemon=True),
            threading.Thread(target=lambda: self._errors.extend(err), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def errors(self) -> str:
        """The last lines of its standard error, once it has ended."""
        self._threads[1].join(5.0)
        return "".join(self._errors)

    def lines(self, silent_s: float) -> Iterator[dict[str, Any]]:
        """What it says, until it ends. Raises TimeoutError where it says nothing for so long."""
        while True:
            try:
                line = self._said.get(timeout=silent_s)
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return
            yield json.loads(line)

    def _read(self, out: IO[str]) -> None:
        for line in out:
            self._said.put(line)
        self._said.put(None)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hrm-ray-trial-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(settings: RunSettings, folder: Path) -> Iterator[_Child]:
    """The process of a trial; it is ended with the block."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("a process without pipes")
        child = _Child(process, process.stdout, process.stderr)
        with suppress(OSError):  # it has ended already, which is seen where it is looked at
            process.stdin.write(f"{json.dumps({'settings': to_plain(settings), 'folder': str(folder)})}\n")
            process.stdin.flush()  # it stays open: its end tells the process that the search is gone
        yield child
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()


def main() -> int:
    """Do the task; returns the exit code, that of a run."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if name in signal.Signals.__members__:
            # A stop is the search's to tell: Ctrl-C reaches all processes of a terminal.
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    task = json.loads(sys.stdin.readline())
    folder = Path(task["folder"])
    threading.Thread(target=_end_with_the_search, args=(folder,), daemon=True).start()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no line of JSON

    def say(**values: Any) -> None:
        lines.write(f"{json.dumps(values)}\n")

    # What takes long comes after the thread that ends this process.
    from hrm_ray.search.first_updates import first_updates, shortened

    try:
        first_updates(shortened(from_plain(task["settings"]), folder / "bundle"), say)
    except HrmRayError as error:
        say(error=type(error).__name__, faults=[[one.value, one.reason, one.hint] for one in error.faults])
        return error.exit_code
    return 0


def _end_with_the_search(folder: Path) -> None:
    """End this process where the one that started it is gone, and leave no folder."""
    while sys.stdin.read(1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())

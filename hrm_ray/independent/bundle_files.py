"""How a trainer gets at the files of its run: directly, or in pieces from the process that has the bundle.

Where a trainer's machine does not see the bundle, it has a folder of its own with the same names below. Only files of
`independent/` travel; memory is bounded by a piece, whatever the size of a file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias

from hrm_ray.atomic_files import atomic_path, sync_folder, unwritable
from hrm_ray.errors import DataError, Fault
from hrm_ray.metrics.jsonl import truncate_after
from hrm_ray.rundir import RunDir

PIECE_BYTES = 8 << 20

Call: TypeAlias = Callable[..., Any]
"""A call of the process that has the bundle: the method's name, then its arguments. Raises its errors, and
wire.Disconnected."""


class BundleFiles(Protocol):
    """Files of a bundle's `independent/`, named by their paths relative to the bundle."""

    @property
    def run_dir(self) -> RunDir:
        """The bundle, or the folder that stands for it on this machine."""

    def fetch(self, path: str) -> Path:
        """Where the file is on this machine; there is none where the bundle has none."""

    def deliver(self, path: str) -> None:
        """The bundle has the file that was written at this path below `run_dir`, on its disk. Raises DiskError."""

    def remove(self, path: str) -> None:
        """Delete a file that was delivered."""

    def fetch_state(self, trainer: str) -> None:
        """Have the folder of a trainer here, with its newest checkpoint, and the records up to that."""

    def deliver_state(self, trainer: str) -> None:
        """The bundle has the newest checkpoint and the records in the folder of a trainer."""


def cut_records(folder: RunDir) -> None:
    """Delete what a trainer's records say of steps behind its newest whole checkpoint: it takes them again."""
    newest = folder.newest_whole_checkpoint()
    with suppress(DataError):  # a file with other lines stays as it is
        truncate_after(folder.metrics, 0 if newest is None else int(newest.name.partition("_")[2]))


class SharedFiles:
    """BundleFiles of a bundle on a disk that this machine has, or shares."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir

    def fetch(self, path: str) -> Path:
        """See BundleFiles."""
        return self.run_dir.root / path

    def deliver(self, path: str) -> None:
        """See BundleFiles."""

    def remove(self, path: str) -> None:
        """See BundleFiles."""
        (self.run_dir.root / path).unlink(missing_ok=True)

    def fetch_state(self, trainer: str) -> None:
        """See BundleFiles."""
        cut_records(RunDir(self.run_dir.independent.trainer(trainer)))

    def deliver_state(self, trainer: str) -> None:
        """See BundleFiles."""


class _Gone(Exception):
    """A file was deleted or cut while it was read."""


class SentFiles:
    """BundleFiles of a bundle on another machine, whose process answers as `FileServer` does."""

    def __init__(self, root: Path, call: Call) -> None:
        """`root` is a folder of this trainer alone."""
        self.run_dir, self._call = RunDir(root), call
        self.on_piece: Callable[[], None] = lambda: None
        """Called after each piece."""
        self._records_sent = 0

    def fetch(self, path: str) -> Path:
        """See BundleFiles. Of anchors only the one that was fetched last stays here."""
        target = self.run_dir.root / path
        if target.is_file():
            return target
        if target.parent == self.run_dir.independent.anchors:
            for other in target.parent.glob("*"):
                with suppress(OSError):  # Windows deletes no file that is open; the next fetch does
                    other.unlink()
        self._fetch(path)
        return target

    def deliver(self, path: str) -> None:
        """See BundleFiles. The file is not needed here any more, and deleted."""
        source = self.run_dir.root / path
        self._send(source, path)
        source.unlink()

    def remove(self, path: str) -> None:
        """See BundleFiles."""
        self._call("remove_file", path)

    def fetch_state(self, trainer: str) -> None:
        """See BundleFiles."""
        for name in self._call("state_files", trainer):
            self._fetch(name)
        cut_records(self._folder(trainer))
        records = self._folder(trainer).metrics
        self._records_sent = records.stat().st_size if records.is_file() else 0

    def deliver_state(self, trainer: str) -> None:
        """See BundleFiles."""
        folder = self._folder(trainer)
        if folder.metrics.is_file():
            name = folder.metrics.relative_to(self.run_dir.root).as_posix()
            self._records_sent = self._send(folder.metrics, name, self._records_sent)
        newest = folder.newest_checkpoint()
        if newest is None:
            return
        partial = newest.with_name(f"{newest.name}.{secrets.token_hex(4)}.partial")
        relative = PurePosixPath(partial.relative_to(self.run_dir.root).as_posix())
        for source in sorted(path for path in newest.rglob("*") if path.is_file()):
            self._send(source, str(relative / source.relative_to(newest).as_posix()))
        self._call("seal_state", trainer, int(newest.name.partition("_")[2]), str(relative))

    def _folder(self, trainer: str) -> RunDir:
        return RunDir(self.run_dir.independent.trainer(trainer))

    def _fetch(self, path: str) -> None:
        size: int | None = self._call("file_bytes", path)
        if size is None:
            return
        target = self.run_dir.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(_Gone), atomic_path(target) as temporary, temporary.open("wb") as file:
                while file.tell() < size:
                    piece: bytes = self._call("read_piece", path, file.tell(), PIECE_BYTES)
                    if not piece:
                        raise _Gone
                    file.write(piece)
                    self.on_piece()
        except OSError as error:
            raise unwritable(target, error) from error

    def _send(self, source: Path, path: str, begin: int = 0) -> int:
        """Send a file from byte `begin` on; returns its size."""
        with source.open("rb") as file:
            file.seek(begin)
            while True:
                place, piece = file.tell(), file.read(PIECE_BYTES)
                self._call("write_piece", path, place, piece, len(piece) < PIECE_BYTES)
                self.on_piece()
                if len(piece) < PIECE_BYTES:
                    return file.tell()


class FileServer:
    """Answers `SentFiles` where the bundle is. Paths outside `independent/` are refused."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """The calls by their names."""
        own = (
            *(self.file_bytes, self.read_piece, self.write_piece, self.remove_file),
            *(self.state_files, self.seal_state),
        )
        return {method.__name__: method for method in own}

    def file_bytes(self, path: str) -> int | None:
        """The size of a file; None where there is none."""
        place = self._place(path)
        return place.stat().st_size if place.is_file() else None

    def read_piece(self, path: str, begin: int, length: int) -> bytes:
        """At most `length` bytes of a file; empty at its end, and where it is gone."""
        try:
            with self._place(path).open("rb") as file:
                file.seek(begin)
                return file.read(length)
        except FileNotFoundError:
            return b""

    def write_piece(self, path: str, begin: int, piece: bytes, last: bool) -> None:
        """Write bytes of a file, which is cut behind them; the `last` ones are on the disk when this returns. Raises
        DiskError."""
        place = self._place(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("r+b" if begin else "wb") as file:
                file.seek(begin)
                file.write(piece)
                file.truncate()
                if last:
                    file.flush()
                    os.fsync(file.fileno())
            if last:
                sync_folder(place.parent)
        except OSError as error:
            raise unwritable(place, error) from error

    def remove_file(self, path: str) -> None:
        """Delete a file, where it is there."""
        self._place(path).unlink(missing_ok=True)

    def state_files(self, trainer: str) -> list[str]:
        """The files that a trainer begins with: its records and its newest whole checkpoint."""
        folder = RunDir(self._run_dir.independent.trainer(trainer))
        newest = folder.newest_whole_checkpoint()
        files = [] if newest is None else sorted(path for path in newest.rglob("*") if path.is_file())
        files += [folder.metrics] if folder.metrics.is_file() else []
        return [path.relative_to(self._run_dir.root).as_posix() for path in files]

    def seal_state(self, trainer: str, step: int, partial: str) -> None:
        """A trainer's checkpoint is complete in the folder `partial`: it takes the place of the earlier ones. Raises
        DiskError."""
        folder = RunDir(self._run_dir.independent.trainer(trainer))
        try:
            folder.seal_checkpoint(step, self._place(partial))
            folder.remove_partial_checkpoints()
            folder.prune(1)
        except OSError as error:
            raise unwritable(folder.checkpoints, error) from error

    def _place(self, path: str) -> Path:
        """Raises DataError for a path that a trainer has no business with."""
        place = (self._run_dir.root / path).resolve()
        if not place.is_relative_to(self._run_dir.independent.root.resolve()):
            raise DataError(Fault(path[:80], "is no file of the trainers", "Start the trainer from this run's bundle"))
        return place

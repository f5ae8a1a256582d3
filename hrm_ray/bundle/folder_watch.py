"""Notices that a bundle's folder was deleted, moved or replaced while a run writes into it, or that another set of
workers has opened it since."""

from __future__ import annotations

import errno
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from hrm_ray.errors import DataError, Fault, UnreadableError
from hrm_ray.rundir import RunDir, write_json

_HINT = "Start the run again; if the folder was moved: `--bundle-dir NEW_PATH --resume`"
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})


def deleted(folder: Path) -> Fault:
    """The fault of a bundle whose folder is gone."""
    return Fault(str(folder), "the bundle was deleted or moved while training; nothing can be saved there", _HINT)


def missing(folder: Path) -> Fault:
    """The fault of a bundle that an earlier attempt of the run has written, and that is not there."""
    # The folder below a mount point may be there, and be empty.
    reason = "the bundle is not there any more: it was deleted or moved, or its disk is unmounted"
    return Fault(str(folder), reason, "When it is there again, run the command with --resume")


def _unmounted(folder: Path) -> Fault:
    reason = "the disk of the bundle was unmounted while training; nothing can be saved there"
    return Fault(str(folder), reason, "Mount it again and run the command with --resume")


class FolderWatch:
    """Remembers which folder has this path, and the generation that this process took of it. Close it at the end.

    The generation is a number in the bundle which each set of workers raises when it opens the bundle. The driver's
    lock does not keep out workers that outlive their driver, or that are cut off from it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError where there is no such folder, and OSError where its disk does not answer."""
        self.folder = folder
        self._generation: dict[str, Any] | None = None
        self._descriptor: int | None = None
        try:
            if os.name != "nt":
                # While it is open no new folder gets the number of this one. Windows deletes no folder with open files.
                self._descriptor = os.open(folder, os.O_RDONLY)
            self._first = os.stat(folder)
        except OSError as error:
            self.close()
            if error.errno in _GONE:
                raise DataError(deleted(folder)) from error
            raise

    def take_generation(self) -> None:
        """Open the bundle for this set of workers: an earlier set is refused from now on. Called on rank 0."""
        path = RunDir(self.folder).generation
        before = _generation_in(path) or {"generation": 0}
        # Two sets may read the same number at once: the token tells them apart.
        taken = {"generation": before["generation"] + 1, "token": secrets.token_hex(8)}
        write_json(path, taken)
        self._generation = taken

    def fault(self) -> Fault | None:
        """What has happened to the folder; None where it is still in its place, and this process may write into it."""
        try:
            now = os.stat(self.folder)
        except OSError as error:
            if error.errno not in _GONE:
                return None  # Unreachable for the moment: what is written next says why.
            return _unmounted(self.folder) if self._is_on_another_disk() else deleted(self.folder)
        then = self._first
        if self._descriptor is not None:
            # The handle alone is stale after a network file system was restarted.
            with suppress(OSError):
                then = os.fstat(self._descriptor)
        if not os.path.samestat(now, then):
            if self._is_on_another_disk():
                return _unmounted(self.folder)
            reason = "the bundle was deleted or moved while training, and another folder took its place"
            return Fault(str(self.folder), reason, _HINT)
        return None if self._generation is None else self._superseded(self._generation)

    def _superseded(self, taken: dict[str, Any]) -> Fault | None:
        try:
            found = _generation_in(RunDir(self.folder).generation)
        except OSError:
            return None  # As above.
        if found == taken:
            return None
        by = "a later start" if found is None else f"generation {found['generation']}"
        reason = f"{by} of this run has opened the bundle since; these workers, generation {taken['generation']}, "
        return Fault(str(self.folder), f"{reason}save nothing more", "End one of the two runs of this bundle")

    def check(self) -> None:
        """Raises DataError where the folder is no longer in its place, and UnreadableError where its disk is not."""
        fault = self.fault()
        if fault is not None:
            raise UnreadableError(fault) if self._is_on_another_disk() else DataError(fault)

    def _is_on_another_disk(self) -> bool:
        """Whether the path is on another disk now: its own was unmounted, and may come back."""
        for place in (self.folder, *self.folder.resolve().parents):
            with suppress(OSError):
                return os.stat(place).st_dev != self._first.st_dev
        return True

    def close(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _generation_in(path: Path) -> dict[str, Any] | None:
    """The content of the file; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("generation"), int) else None

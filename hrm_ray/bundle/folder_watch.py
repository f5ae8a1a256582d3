"""Notices that a bundle's folder was deleted, moved or replaced while a run writes into it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hrm_ray.errors import DataError, Fault

_HINT = "Start the run again; if the folder was moved: `--bundle-dir NEW_PATH --resume`"
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})


def deleted(folder: Path) -> Fault:
    """The fault of a bundle whose folder is gone."""
    return Fault(str(folder), "the bundle was deleted or moved while training; nothing can be saved there", _HINT)


class FolderWatch:
    """Remembers which folder has this path. Close it at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        if os.name != "nt":
            # While it is open no new folder gets the number of this one. Windows deletes no folder with open files.
            self._descriptor = os.open(folder, os.O_RDONLY)
        self._first = os.stat(folder)

    def fault(self) -> Fault | None:
        """What has happened to the folder; None where it is still in its place."""
        try:
            now = os.stat(self.folder)
            then = self._first if self._descriptor is None else os.fstat(self._descriptor)
        except OSError as error:
            if error.errno not in _GONE:
                return None  # Unreachable for the moment: what is written next says why.
            return deleted(self.folder)
        if os.path.samestat(now, then):
            return None
        reason = "the bundle was deleted or moved while training, and another folder took its place"
        return Fault(str(self.folder), reason, _HINT)

    def check(self) -> None:
        """Raises DataError where the folder is no longer in its place."""
        fault = self.fault()
        if fault is not None:
            raise DataError(fault)

    def close(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

"""Refuses paths that are neither files nor folders: opening a named pipe or a device may wait for ever."""

from __future__ import annotations

import os
import stat

from hrm_ray.errors import Fault

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def special_file(path: str | os.PathLike[str], value: str | None = None) -> Fault | None:
    """What is wrong with a path that is a pipe, a socket or a device, links followed; None where it is none of them or
    does not exist. `value` names it in the message (default: the path)."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return None
    if kind is None:
        return None
    return Fault(value or os.fspath(path), f"is {kind}, not a file", "Give a file, such as a copy of what it sends")

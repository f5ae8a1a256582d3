"""Write a file whole or not at all.

One job: hand out a temporary neighbour of a file and put it in the file's place when all went well. It does not
know what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s place at the end of the block; on any error `path` stays as it was.

    The neighbour lies in the same folder, because a rename is atomic only within one file system. On Windows the
    replacement fails with PermissionError while another handle holds `path` open: close the sink first.
    """
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with neighbour.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)

"""What is in an archive, looked up once.

One job: the names in an archive by its address, remembered as long as it does not change: a corpus is listed several
times before a run, and then read.
"""

from __future__ import annotations

from functools import lru_cache

from hrm_ray.data.archives.tars import tar_names
from hrm_ray.data.archives.zips import ZipDirectory, open_zip
from hrm_ray.data.file_systems import file_system_of


@lru_cache(maxsize=1)
def zip_directory(address: str, archive_bytes: int, stamp: str) -> ZipDirectory:
    """The directory of a .zip that has this size and stamp. Raises ContainerUnreadable and OSError."""
    with file_system_of(address).open(address) as file:
        return open_zip(file, address, archive_bytes)


@lru_cache(maxsize=1)
def tar_directory(address: str, archive_bytes: int, stamp: str) -> tuple[list[str], int]:
    """The names in a .tar that has this size and stamp, and how many members are of other kinds. Raises
    ContainerUnreadable and OSError."""
    with file_system_of(address).open(address) as file:
        return tar_names(file, address)

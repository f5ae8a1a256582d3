"""The package of a job on a Ray cluster: the code that goes with it, and what must not be written into it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hrm_ray.errors import Fault, SettingsError

UNPACKED = ("runtime_resources", "working_dir_files")
"""Folders of Ray's session below which a job's package lies on a node."""


def check_outlives_job(path: Path, option: str) -> None:
    """Raises SettingsError for a bundle inside the unpacked package of a job, which is removed with the job."""
    if UNPACKED in pairwise(path.absolute().parts):
        reason = "it would lie in the job's unpacked package, which is removed when the job has ended"
        hint = f"Give {option} an absolute path on a disk that stays, such as {option} /mnt/bundles/NAME"
        raise SettingsError(Fault(f"{option} {path.name}", reason, hint))

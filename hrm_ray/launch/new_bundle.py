"""The folder of a new bundle: its prepared content appears at once, and is removed again if nothing was trained.

A file that was in the folder before the run is never removed. The run's lock is held all the while.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from hrm_ray.atomic_files import atomic_write, sync_folder
from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.launch.run_directory import (
    LOCK_FILES,
    OLDER_BEST,
    PREPARED,
    REUSABLE,
    RunLocation,
    check_folder_is_free,
    never_trained,
)
from hrm_ray.rundir import RunDir


@contextmanager
def new_bundle(location: RunLocation) -> Iterator[RunDir]:
    """A folder to prepare a bundle in; what is in it moves to the bundle's place when the block ends without an error.

    It begins with the tokenizer of the bundle that this one branches off from, or with the one that lies in its place.
    """
    root = location.run_dir.root
    preparing = RunDir(location.run_dir.preparing)
    _remove(preparing.root)  # of a process that was killed
    preparing.root.mkdir(parents=True)
    try:
        tokenizers = location.source if location.source is not None else location.run_dir
        for name in REUSABLE:
            if (tokenizers.root / name).is_file():
                shutil.copyfile(tokenizers.root / name, preparing.root / name)
        yield preparing
        # Preparing can take hours. In that time somebody may have put files of their own here.
        check_folder_is_free(location)
        # First what marks the folder as a prepared bundle: a later run may take the place of a part of one.
        os.replace(preparing.training_args, location.run_dir.training_args)
        # Of a run that was killed before its first checkpoint.
        for name in PREPARED - REUSABLE - {preparing.training_args.name}:
            _remove(root / name)
        _remove(location.run_dir.checkpoints)
        best = location.run_dir.best.root
        if best.is_dir():
            # The only weights of that run: kept.
            number = next(n for n in count(1) if not (root / f"{OLDER_BEST}{n}").exists())
            best.rename(root / f"{OLDER_BEST}{number}")
        for path in preparing.root.iterdir():
            os.replace(path, root / path.name)
        sync_folder(root)
    finally:
        _remove(preparing.root)


@contextmanager
def removed_unless_trained(location: RunLocation) -> Iterator[None]:
    """Take back what the block has put into a new bundle's folder, if it ends with nothing trained."""
    run_dir = location.run_dir
    watch = FolderWatch(run_dir.root)
    before = {path.name for path in run_dir.root.iterdir()}
    tokenizer = {name: (run_dir.root / name).read_bytes() for name in REUSABLE & before}
    try:
        yield
    finally:
        in_place = watch.fault() is None
        watch.close()
        if in_place and not location.continues and never_trained(run_dir):
            for path in run_dir.root.iterdir():
                if path.name not in before | LOCK_FILES:
                    _remove(path)
            for name, content in tokenizer.items():
                if (run_dir.root / name).read_bytes() != content:
                    with atomic_write(run_dir.root / name) as file:
                        file.write(content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

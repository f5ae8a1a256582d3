"""Tokenised chunks on disk, so that a second epoch does not tokenise again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hrm_ray.data.text_store import TextStore, load_store, save_store

_SUFFIX = ".safetensors"


class ChunkCache:
    """Token stores in `folder` by key, at most `limit_bytes` of them. One process `writes`, any number read."""

    def __init__(self, folder: Path, limit_bytes: int, *, writes: bool) -> None:
        self._folder, self._limit_bytes, self._writes = folder, limit_bytes, writes
        self._used_bytes: int | None = None
        self.refusal: str | None = None
        """Why the first store that was not kept was not."""

    def load(self, key: str) -> TextStore | None:
        """The store of `key`, None where there is none. A damaged one is deleted, so that it is made again."""
        store = load_store(self._path(key))
        if store is None and self._writes:
            with suppress(OSError):
                self._path(key).unlink()
        return store

    def contains(self, key: str) -> bool:
        """Whether there is a file of `key`."""
        return self._path(key).is_file()

    def add(self, key: str, store: TextStore) -> None:
        """Keep a store if it fits. A full disk costs time in later epochs, and nothing else."""
        if not self._writes or not self._limit_bytes or self.refusal is not None or self.contains(key):
            return
        # Nothing is evicted: an epoch reads every chunk once, so the oldest would go just before it is wanted again.
        used_bytes = self._used()
        if used_bytes + store.memory_bytes > self._limit_bytes:
            gigabytes = self._limit_bytes / 1e9
            self.refusal = f"--cache-gb {gigabytes:g} is full, so later chunks are tokenised again in every epoch"
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_store(store, self._path(key))
            self._used_bytes = used_bytes + self._path(key).stat().st_size
        except OSError as error:
            self.refusal = f"tokenised chunks cannot be kept ({error}), so they are tokenised again in every epoch"

    def _used(self) -> int:
        if self._used_bytes is None:
            files = self._folder.glob(f"*{_SUFFIX}") if self._folder.is_dir() else ()
            self._used_bytes = sum(file.stat().st_size for file in files)
        return self._used_bytes

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

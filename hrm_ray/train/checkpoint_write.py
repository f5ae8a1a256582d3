"""Writes one checkpoint, at once or by a thread while training goes on, and puts it in its place when it is whole.

All ranks write together: each its own small files, the leading rank those of the strategy, which are large.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hrm_ray.atomic_files import unwritable
from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.rundir import RunDir
from hrm_ray.train.host_memory import room_for_copy
from hrm_ray.train.out_of_memory import unless_out_of_memory
from hrm_ray.train.world import World

AT_ONCE_BYTES = 64 * 2**20
"""Up to this size the files of a strategy are written at once: that is quicker than what a thread costs the steps."""
AFTER_ERROR_S = 60.0
"""So long a run that ends by an error waits for what is being written. On a disk that hangs that would have no end."""
_WAIT_S = 1.0
"""On Windows a signal is seen only between two waits."""


class CheckpointWrite:
    """One checkpoint from the making of its folder until it has its final name. Every rank of a group has one."""

    def __init__(self, world: World, run_dir: RunDir, step: int, keep: int, enter: Callable[[str], None]) -> None:
        """Make the folder, on rank 0; a collective. `enter` and `keep` are those of `checkpoint.save_checkpoint`."""
        self._world = world
        self._run_dir = run_dir
        self._step = step
        self._keep = keep
        self._enter = enter
        self._begun_s = time.monotonic()
        self._checksum: Future[str] = Future()
        """Of the manifest, on the leading rank once all files are written."""
        self.in_background = False
        """Whether a thread of the leading rank writes the files."""
        self.lacked_room_bytes = 0
        """What copies would have taken for which the leading rank had too little memory."""
        self.took_s = 0.0
        """Seconds from the start until it is in its place, without the steps made after the writing; on rank 0."""

        def make_folder() -> Path:
            # Not its parents: where the bundle was deleted, nothing is made in its place.
            run_dir.checkpoints.mkdir(exist_ok=True)
            run_dir.remove_partial_checkpoints()
            made = run_dir.partial_checkpoint(step)
            made.mkdir()
            return made

        try:
            self.folder = world.from_leader(make_folder)
        except OSError as error:
            raise unwritable(run_dir.checkpoints, error) from error

    def start(self, files: dict[str, Mapping[str, Tensor]], *, background: bool) -> None:
        """Write the strategy's files: tensors by name, by the name of the file. A collective.

        With `background` a thread writes copies of them, if they are large and memory has room.
        """

        def write() -> bool:
            copies = self._copies(files) if background else None
            if copies is None:
                self._write(files)
                self._checksum.result()
                return False
            # A daemon, so that a disk that does not answer does not keep the process from ending.
            threading.Thread(target=self._write, args=(copies,), name="checkpoint-write", daemon=True).start()
            return True

        self.in_background = self._world.from_leader(write)

    @property
    def written(self) -> bool:
        """Whether the writing has ended, well or not; on the leading rank."""
        return self._checksum.done()

    def finish(self) -> None:
        """Wait for the files, and put the checkpoint in its place; a collective. Raises what the writing raised."""
        with self.discarded_on_error():
            self._world.from_leader(self._put_in_place)

    def finish_alone(self) -> None:
        """`finish` on the leading rank, where others may have failed; nothing is raised.

        What is not written after AFTER_ERROR_S is left as it is, for the next save to remove.
        """
        deadline_s = time.monotonic() + AFTER_ERROR_S
        while not self.written and time.monotonic() < deadline_s:
            wait([self._checksum], _WAIT_S)
        if self.written:
            with suppress(Exception), self.discarded_on_error():
                self._put_in_place()

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Nothing of the checkpoint is left where the block raises; errors of the disk become DiskErrors."""
        try:
            yield
        except BaseException as error:
            if self._world.leads:
                shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise unwritable(self.folder, error) from error
            raise

    def _copies(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]] | None:
        """Copies in host memory, which training does not change; None where the files are better written at once.

        Also of what was gathered afresh: which tensors are those that are trained depends on strategy, device and type.
        """
        size_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        if size_bytes <= AT_ONCE_BYTES:
            return None

        def copied() -> dict[str, Mapping[str, Tensor]]:
            return {file: {name: _copy(tensor) for name, tensor in of.items()} for file, of in files.items()}

        room = room_for_copy(size_bytes, self._world.size)
        copies = unless_out_of_memory(copied, torch.device("cpu")) if room else None
        if copies is None:
            self.lacked_room_bytes = size_bytes
        return copies

    def _write(self, files: dict[str, Mapping[str, Tensor]]) -> None:
        """Write the files and the manifest, in whichever thread; each tensor is let go when its file is written."""
        try:
            while files:
                file = next(iter(files))
                save_tensors(files.pop(file), self.folder / file)
            checksum = self._run_dir.describe_checkpoint(self._step, self.folder)
            self.took_s = time.monotonic() - self._begun_s
            self._checksum.set_result(checksum)
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            self._checksum.set_exception(error)

    def _put_in_place(self) -> None:
        while not self._checksum.done():
            wait([self._checksum], _WAIT_S)
        checksum, begun_s = self._checksum.result(), time.monotonic()
        self._enter(checksum)
        self._run_dir.seal_checkpoint(self._step, self.folder)
        self._run_dir.prune(self._keep)
        self.took_s += time.monotonic() - begun_s


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())

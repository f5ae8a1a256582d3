"""Saves and restores the state of a run, completely or not at all.

The strategy writes weights, optimizer state and moving average; with carries each rank writes its slots (carries and
position in the data), else rank 0 the position; rank 0 writes counters as JSON. Nothing is pickled. A checkpoint's
folder is valid once its manifest exists.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from hrm_ray.atomic_files import unwritable
from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.progress import STATE, Progress
from hrm_ray.bundle.store import BundleWeights, save_final
from hrm_ray.bundle.weights_file import read_rows, read_tensors, save_tensors
from hrm_ray.data.stream import ConsumedRange, append_ranges
from hrm_ray.errors import DataError, Fault, HrmRayError
from hrm_ray.model.actv1 import States
from hrm_ray.model.puzzle_objective import ROW_FIELDS, PuzzleCarry
from hrm_ray.rundir import RunDir, read_json, write_json
from hrm_ray.train.ledger_writer import LedgerWriter
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.precision import LossScaler
from hrm_ray.types import StopReason

RANKS = "ranks.safetensors"
_LOADER = "feed."
"""Prefix of the loader's arrays in slots_*.safetensors: the name in the files of all versions."""


class Checkpointer:
    """Writes a run's checkpoints, their rounds in the ledger where there is one, and the final bundle.

    Every rank of a group has one with the same `run_dir`; the ledger is rank 0's. Nothing takes its place once `watch`
    says that the bundle is gone, or another set of workers' own.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        run_dir: RunDir,
        keep: int,
        ledger_writer: LedgerWriter | None = None,
        watch: FolderWatch | None = None,
    ) -> None:
        self.loop = loop
        self.run_dir = run_dir
        self.keep = keep
        self.ledger_writer = ledger_writer
        self.watch = watch
        self.saved_step: int | None = None
        self._consumed: list[ConsumedRange] = []
        """Read and not yet in a whole checkpoint."""

    def save(self, extra: dict[str, Any]) -> None:
        """Save the current step, unless that was done; a collective. `extra` are JSON values that loading returns."""
        step, loader, ledger_writer = self.loop.progress.step, self.loop.parts.loader, self.ledger_writer
        if self.saved_step == step:
            return
        append_ranges(self._consumed, loader.take_consumed())
        consumed = self._consumed if ledger_writer is None else ledger_writer.covered(step, self._consumed)

        def commit(checksum: str) -> None:
            self._check_folder()
            if ledger_writer is not None:
                ledger_writer.commit(step, consumed, checksum, data_ended=loader.data_ended)

        extra = {**extra, "trained": [astuple(item) for item in consumed]}
        save_checkpoint(self.loop, self.run_dir, extra, self.keep, commit)
        self._consumed = []
        self.saved_step = step

    def save_bundle(self, reason: StopReason, figures: Mapping[str, float], best: Mapping[str, Any] | None) -> None:
        """Write the final weights and metadata of a run that ended for `reason`; a collective."""
        loop = self.loop
        with loop.parts.strategy.evaluating():
            weights = bundle_weights(loop)
            epoch = loop.parts.loader.epoch

            def write() -> None:
                self._check_folder()
                save_final(self.run_dir, weights, reason, loop.progress, epoch, figures, best)

            loop.world.from_leader(write)

    def _check_folder(self) -> None:
        if self.watch is not None:
            self.watch.check()


def bundle_weights(loop: TrainingLoop) -> BundleWeights:
    """The weights that a bundle stores, on the leading rank (elsewhere possibly none); called inside
    `strategy.evaluating()`, a collective. Adapters are merged into them and stored apart too."""
    adapters = loop.parts.adapters
    if adapters is None:
        return BundleWeights(loop.parts.strategy.full_weights())
    # The model's weights are whole on the leading rank alone.
    if not loop.world.leads:
        return BundleWeights({})
    return BundleWeights(adapters.merged_weights(), adapters.in_file())


def save_checkpoint(
    loop: TrainingLoop,
    run_dir: RunDir,
    extra: dict[str, Any],
    keep: int,
    enter: Callable[[str], None] = lambda checksum: None,
) -> Path:
    """Write a checkpoint of the current step; called on all ranks, returns when it is complete.

    `extra` is the trainer's own JSON-able state. `enter` is called on rank 0 with the sha256 of the manifest when all
    files are written, before the rename that makes the checkpoint whole. Raises ResourceError on every rank where one
    of them cannot write; then nothing of this checkpoint is left, and the earlier checkpoints are.
    """
    world, step = loop.world, loop.progress.step

    def begin() -> Path:
        # Not its parents: where the bundle was deleted, nothing is made in its place.
        run_dir.checkpoints.mkdir(exist_ok=True)
        run_dir.remove_partial_checkpoints()
        made = run_dir.partial_checkpoint(step)
        made.mkdir()
        return made

    def finish() -> None:
        enter(run_dir.describe_checkpoint(step, partial))
        run_dir.seal_checkpoint(step, partial)
        run_dir.prune(keep)

    try:
        partial = world.from_leader(begin)
    except OSError as error:
        raise unwritable(run_dir.checkpoints, error) from error
    try:
        # The trend is a sum over ranks: before any write, which may fail on one rank alone.
        adaptive = loop.parts.lr_schedule.adaptive
        trend = None if adaptive is None else adaptive.state(loop.parts.strategy.sum_over_ranks, world.leads)
        failed: Exception | None = None
        try:
            _write(loop, partial, trend, extra)
        except (HrmRayError, OSError, SafetensorError) as error:
            failed = error
        world.raise_together(failed)
        world.from_leader(finish)
    except (OSError, SafetensorError) as error:
        raise unwritable(partial, error) from error
    finally:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
    return run_dir.checkpoint(step)


def _write(loop: TrainingLoop, folder: Path, trend: dict[str, Any] | None, extra: dict[str, Any]) -> None:
    """This rank's files of a checkpoint."""
    parts = loop.parts
    parts.strategy.save(folder)
    if parts.carried or loop.world.leads:  # without carries all ranks have the same state
        save_tensors(_slots(loop), _slots_file(folder, parts.shape.first_slot))
    if not loop.world.leads:
        return
    if parts.adapters is not None and parts.adapters.ranks is not None:
        save_tensors(parts.adapters.ranks.state(), folder / RANKS)
    state = {
        "progress": vars(loop.progress),
        "schedule_position": loop.clock.position,
        "epoch_rows": loop.epoch_rows,
        "epoch": parts.loader.epoch,
        "effective_batch_size": parts.shape.effective,
        "physical_batch_size": parts.shape.batch_size,
        "asked_batch_size": loop.asked_batch_size,
        "loss_scaler": None if parts.scaler is None else vars(parts.scaler),
        "adaptive_lr": trend,
        "extra": extra,
    }
    write_json(folder / STATE, state)


def load_checkpoint(loop: TrainingLoop, folder: Path) -> dict[str, Any]:
    """Restore the loop from a verified checkpoint, on any number of ranks with the same effective batch.

    Micro-batches that were made smaller after out of memory stay so, unless another size is asked for now. Called on
    all ranks; returns the trainer's `extra`. Raises DataError.
    """
    parts = loop.parts
    state = loop.world.from_leader(lambda: read_json(folder / STATE))
    if state["effective_batch_size"] != parts.shape.effective:
        raise DataError(
            Fault(
                f"effective batch {parts.shape.effective}",
                f"the checkpoint {folder} was trained with {state['effective_batch_size']}",
                "Choose --batch-size, --gradient-accumulation-steps and --world-size with that product",
            )
        )
    parts.strategy.load(folder)
    if parts.adapters is not None and parts.adapters.ranks is not None:
        parts.adapters.ranks.load(loop.world.from_leader(lambda: read_tensors(folder / RANKS)))
    loop.progress = Progress.from_plain(state["progress"])
    # Older checkpoints have no position: theirs counted updates.
    loop.clock.position = state.get("schedule_position", loop.progress.step)
    epoch_rows = state.get("epoch_rows")
    loop.epoch_rows = None if epoch_rows is None else (epoch_rows[0], epoch_rows[1])
    if parts.scaler is not None and state["loss_scaler"] is not None:
        parts.scaler = LossScaler(**state["loss_scaler"])
    adaptive = parts.lr_schedule.adaptive
    if adaptive is not None and state["adaptive_lr"] is not None:
        zero = torch.zeros((), dtype=loop.count_type, device=loop.world.device)
        adaptive.load(state["adaptive_lr"], loop.world.leads, zero)
    rows = state["physical_batch_size"]
    asked_as_then = state["asked_batch_size"] == loop.asked_batch_size
    if asked_as_then and rows < parts.shape.batch_size and parts.shape.per_rank % rows == 0:
        loop.set_microbatch(rows)
    slots = _own_slots(loop, folder)
    position = {
        name.removeprefix(_LOADER): tensor.numpy() for name, tensor in slots.items() if name.startswith(_LOADER)
    }
    parts.loader.load_state_dict(state["epoch"], position)
    # Before the first step there are no carries.
    if parts.carried and "carry.z_h" in slots:
        loop.carries = _carries(loop, slots)
    extra: dict[str, Any] = state["extra"]
    return extra


def _slots(loop: TrainingLoop) -> dict[str, Tensor]:
    """This rank's carries, slot by slot, and the state of its loader."""
    tensors = {
        f"{_LOADER}{n}": torch.from_numpy(np.ascontiguousarray(v)) for n, v in loop.parts.loader.state_dict().items()
    }
    if loop.parts.carried and loop.carries is not None:
        carry = PuzzleCarry.joined(loop.carries)
        tensors["carry.z_h"], tensors["carry.z_l"] = carry.states.z_h, carry.states.z_l
        tensors["carry.steps"], tensors["carry.halted"] = carry.steps, carry.halted
        for name in ROW_FIELDS:
            tensors[f"carry.data.{name}"] = carry.data[name]
    return tensors


def _own_slots(loop: TrainingLoop, folder: Path) -> dict[str, Tensor]:
    """This rank's slots. Without carries all ranks have the same state, and the leading rank reads it. A collective."""
    shape, world = loop.parts.shape, loop.world
    if not loop.parts.carried:
        return world.from_leader(lambda: read_tensors(_slots_file(folder, 0)))
    slots: dict[str, Tensor] = {}
    failed: Exception | None = None
    try:
        slots = slots_between(folder, shape.first_slot, shape.first_slot + shape.per_rank)
    except HrmRayError as error:
        failed = error
    world.raise_together(failed)
    return slots


def slots_between(folder: Path, first: int, beyond: int) -> dict[str, Tensor]:
    """Slots first..beyond-1 out of the files of a checkpoint, whose names say with which slot each begins."""
    begins = sorted(int(path.stem.partition("_")[2]) for path in folder.glob("slots_*.safetensors"))
    parts = []
    for begin, end in zip(begins, [*begins[1:], beyond], strict=True):
        own = max(first, begin), min(beyond, end)
        if own[0] < own[1]:
            parts.append(read_rows(_slots_file(folder, begin), own[0] - begin, own[1] - begin))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _slots_file(folder: Path, first: int) -> Path:
    """The file of the rank whose slots begin with `first`."""
    return folder / f"slots_{first:08d}.safetensors"


def _carries(loop: TrainingLoop, slots: dict[str, Tensor]) -> list[PuzzleCarry]:
    carried = {name: tensor.to(loop.world.device) for name, tensor in slots.items() if name.startswith("carry.")}
    # A resumed run may have another type of activations than the run that stored the states.
    dtype = loop.parts.objective.model.embedding.dtype
    whole = PuzzleCarry(
        states=States(carried["carry.z_h"].to(dtype), carried["carry.z_l"].to(dtype)),
        steps=carried["carry.steps"],
        halted=carried["carry.halted"],
        data={name: carried[f"carry.data.{name}"] for name in ROW_FIELDS},
    )
    return whole.split(loop.parts.shape.batch_size)

"""Saves and restores the state of a run, completely or not at all.

With carries each rank writes its slots (carries and position in the data), else rank 0 the position; rank 0 writes
counters as JSON, and what the strategy gives: weights, optimizer state and moving average. Nothing is pickled. A
checkpoint's folder is valid once its manifest exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.progress import STATE, Progress
from hrm_ray.bundle.store import BundleWeights, save_final, step_of_best
from hrm_ray.bundle.weights_file import read_rows, read_tensors, save_tensors
from hrm_ray.data.stream import ConsumedRange, StreamState, TrainedRanges, append_ranges
from hrm_ray.errors import DataError, Fault, HrmRayError
from hrm_ray.model.actv1 import States
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.puzzle_objective import ROW_FIELDS, PuzzleCarry
from hrm_ray.rundir import RunDir, checkpoint_damage, read_json, write_json
from hrm_ray.settings.memory import ModelDtype
from hrm_ray.train.checkpoint_write import CheckpointWrite
from hrm_ray.train.ledger_writer import LedgerWriter
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.precision import NARROW, LossScaler
from hrm_ray.train.strategies.single import AVERAGE, WEIGHTS
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
        """The step of the newest checkpoint, also while it is written in the background."""
        self.took_s = 0.0
        """Seconds that the last whole checkpoint took, with what a thread wrote of it; on the leading rank."""
        self._consumed: list[ConsumedRange] = []
        """Read and in no checkpoint."""
        self._write: CheckpointWrite | None = None
        """What is written in the background: one checkpoint at a time."""
        self._notes: list[str] = []
        self._told_of_room = False

    def save(self, extra: dict[str, Any], *, background: bool = False) -> None:
        """Save the current step, unless that was done; a collective. `extra` are JSON values that loading returns.

        With `background` a large checkpoint may be written by a thread: then it is whole after `finish`, which comes
        before the next one is begun.
        """
        self.finish()
        step, loader, ledger_writer = self.loop.progress.step, self.loop.parts.loader, self.ledger_writer
        if self.saved_step == step:
            return
        append_ranges(self._consumed, loader.take_consumed())
        consumed = self._consumed if ledger_writer is None else ledger_writer.covered(step, self._consumed)
        data_ended = loader.data_ended

        def commit(checksum: str) -> None:
            self._check_folder()
            if ledger_writer is not None:
                ledger_writer.commit(step, consumed, checksum, data_ended=data_ended)

        extra = {**extra, "trained": [astuple(item) for item in consumed]}
        write = begin_checkpoint(self.loop, self.run_dir, extra, self.keep, commit, background=background)
        self._write = write
        if write.lacked_room_bytes and not self._told_of_room:
            self._told_of_room = True
            note = f"Host memory has no room for a copy of the {write.lacked_room_bytes / 1e9:.1f} GB of a checkpoint"
            self._notes.append(f"{note}: training waits while checkpoints are written.")
        if not write.in_background:
            self.finish()
        self._consumed = []
        self.saved_step = step

    def take_notes(self) -> list[str]:
        """What the user should know of the saves since the last call; on the leading rank."""
        notes, self._notes = self._notes, []
        return notes

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is written in the background."""
        return self._write is not None

    def written(self) -> bool:
        """Whether the writing in the background has ended and `finish` would not wait; on the leading rank."""
        return self._write is not None and self.loop.world.leads and self._write.written

    def finish(self) -> None:
        """Wait for what is written in the background, and put it in its place, with its round in the ledger; a
        collective. Raises what the writing raised."""
        write, self._write = self._write, None
        if write is not None:
            write.finish()
            self.took_s = write.took_s

    def close(self) -> None:
        """Finish what is written in the background where a run ends by an error; no collective."""
        write, self._write = self._write, None
        if write is not None and self.loop.world.leads:
            self.loop.activity.enter("ending")  # This wait is no part of the step that has failed.
            write.finish_alone()

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


def save_bundle_of(
    checkpoint: Path, run_dir: RunDir, reason: StopReason, config: ModelConfig, model_dtype: ModelDtype
) -> None:
    """Write the final weights and metadata of a run that was stopped for `reason` while it had no workers: what
    `Checkpointer.save_bundle` writes at the step of this checkpoint. Not for adapters, which a model merges.

    Raises DataError for a damaged checkpoint, DiskError.
    """
    damage = checkpoint_damage(checkpoint)
    if damage is not None:
        raise DataError(Fault(*damage, "Use --resume, which looks for an older checkpoint"))
    state, weights = read_json(checkpoint / STATE), read_tensors(checkpoint / WEIGHTS)
    average = read_tensors(checkpoint / AVERAGE) if (checkpoint / AVERAGE).is_file() else {}
    weights |= {name: tensor.to(weights[name].dtype) for name, tensor in average.items()}
    if model_dtype in NARROW:
        # ZeRO saves the float32 weights that it updates.
        with torch.device("meta"):
            names = weights.keys() & dict(build_model(config).named_parameters())
        weights |= {name: weights[name].to(NARROW[model_dtype]) for name in names}
    progress, extra = Progress.from_plain(state["progress"]), state["extra"]
    best = extra["best"]
    if best is not None and best["step"] != step_of_best(run_dir):
        best = None
    save_final(run_dir, BundleWeights(weights), reason, progress, state["epoch"], extra["figures"], best)


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
    begin_checkpoint(loop, run_dir, extra, keep, enter).finish()
    return run_dir.checkpoint(loop.progress.step)


def begin_checkpoint(
    loop: TrainingLoop,
    run_dir: RunDir,
    extra: dict[str, Any],
    keep: int,
    enter: Callable[[str], None],
    *,
    background: bool = False,
) -> CheckpointWrite:
    """As `save_checkpoint`, but with `background` a thread may still write files; `finish` makes it complete."""
    world = loop.world
    write = CheckpointWrite(world, run_dir, loop.progress.step, keep, enter)
    with write.discarded_on_error():
        # Sums over ranks and collectives of the strategy: before any write, which may fail on one rank alone.
        adaptive = loop.parts.lr_schedule.adaptive
        trend = None if adaptive is None else adaptive.state(loop.parts.strategy.sum_over_ranks, world.leads)
        files = loop.parts.strategy.state_files()
        failed: Exception | None = None
        try:
            _write_small_files(loop, write.folder, trend, extra)
        except (HrmRayError, OSError, SafetensorError) as error:
            failed = error
        world.raise_together(failed)
        write.start(files, background=background)
    return write


def _write_small_files(loop: TrainingLoop, folder: Path, trend: dict[str, Any] | None, extra: dict[str, Any]) -> None:
    """This rank's files of a checkpoint, without those of the strategy."""
    parts = loop.parts
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
        "trained_ranges": parts.loader.trained,
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
    parts.loader.trained = _trained_ranges(state)
    parts.loader.load_state_dict(state["epoch"], position)
    # Before the first step there are no carries.
    if parts.carried and "carry.z_h" in slots:
        loop.carries = _carries(loop, slots)
    extra: dict[str, Any] = state["extra"]
    return extra


def _trained_ranges(state: Mapping[str, Any]) -> TrainedRanges | None:
    """What independent trainers have trained of a checkpoint's epoch; older checkpoints do not say."""
    found = state.get("trained_ranges")
    return None if found is None else tuple((chunk, start, end) for chunk, start, end in found)


def stream_position(folder: Path) -> tuple[int, StreamState]:
    """The epoch of a checkpoint of a run on text under a strategy, and its position in that epoch."""
    slots = read_tensors(_slots_file(folder, 0))
    taken = {name.removeprefix(_LOADER): int(t[0]) for name, t in slots.items() if name.startswith(_LOADER)}
    epoch: int = read_json(folder / STATE)["epoch"]
    return epoch, StreamState(**taken)


def puzzles_taken(folder: Path) -> int:
    """Of a checkpoint of a run on puzzles with whole batches: how many were taken of what its epoch had left."""
    return int(read_tensors(_slots_file(folder, 0))[f"{_LOADER}taken"][0])


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

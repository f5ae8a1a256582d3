"""Saving and restoring the state of a run, whole or not at all.

One job: what a checkpoint holds and how it is laid back. Weights, optimizer, average, carries and data position go in
as safetensors, counters as JSON; nothing is pickled. The folder counts only once its manifest is there (RunDir).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from hrm_ray.bundle.progress import Progress
from hrm_ray.bundle.weights_file import fill_module, read_tensors, save_tensors, unwritable
from hrm_ray.errors import DataError, Fault
from hrm_ray.model.actv1 import States
from hrm_ray.model.puzzle_objective import ROW_FIELDS, PuzzleCarry
from hrm_ray.rundir import RunDir, read_json, write_json
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.precision import LossScaler

WEIGHTS, AVERAGE, RANKS = "model.safetensors", "ema.safetensors", "ranks.safetensors"
STATE = "state.json"


def save_checkpoint(
    loop: TrainingLoop,
    run_dir: RunDir,
    extra: dict[str, Any],
    keep: int,
    enter: Callable[[str], None] = lambda checksum: None,
) -> Path:
    """Write a checkpoint of the present step; called on all ranks, returns when it is whole.

    `extra` is the runner's own JSON-able state. `enter` is called on the leading rank when all files are written and
    the checkpoint is not yet in its place, with the sha256 of its manifest. Ranks write their slots, the leading rank
    everything else. Raises ResourceError where the disk takes no more; then no part of this checkpoint is left, and the
    earlier ones are.
    """
    partial = run_dir.partial_checkpoint(loop.progress.step)
    try:
        _write(loop, partial, extra)
        if loop.world.leads:
            enter(run_dir.describe_checkpoint(loop.progress.step))
            run_dir.seal_checkpoint(loop.progress.step)
            run_dir.prune(keep)
    except (OSError, SafetensorError) as error:
        raise unwritable(partial, error) from error
    finally:
        if loop.world.leads:
            shutil.rmtree(partial, ignore_errors=True)
    loop.world.barrier()
    return run_dir.checkpoint(loop.progress.step)


def _write(loop: TrainingLoop, folder: Path, extra: dict[str, Any]) -> None:
    """All files of a checkpoint but its manifest; when it returns, every rank's are there."""
    parts, world = loop.parts, loop.world
    if world.leads:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    world.barrier()
    weights = parts.strategy.full_weights()
    adaptive = parts.lr_schedule.adaptive
    trend = None if adaptive is None else adaptive.state(parts.strategy.sum_over_ranks, world.leads)
    parts.strategy.save(folder)
    save_tensors(_slots(loop), folder / f"slots_{parts.shape.first_slot:08d}.safetensors")
    if world.leads:
        save_tensors(weights, folder / WEIGHTS)
        if parts.ema is not None:
            save_tensors(parts.ema.average, folder / AVERAGE)
        if parts.adapters is not None and parts.adapters.ranks is not None:
            save_tensors(parts.adapters.ranks.state(), folder / RANKS)
        state = {
            "progress": vars(loop.progress),
            "epoch": parts.loader.epoch,
            "effective_batch_size": parts.shape.effective,
            "physical_batch_size": parts.shape.batch_size,
            "asked_batch_size": loop.asked_batch_size,
            "loss_scaler": None if parts.scaler is None else vars(parts.scaler),
            "adaptive_lr": trend,
            "extra": extra,
        }
        write_json(folder / STATE, state)
    world.barrier()


def load_checkpoint(loop: TrainingLoop, folder: Path) -> dict[str, Any]:
    """Lay a whole checkpoint back into the loop, on any number of ranks with the same effective batch.

    Micro-batches that had become smaller for lack of memory stay so, unless another size is asked for than then. Called
    on all ranks, after the folder was verified; returns the runner's `extra`. Raises DataError.
    """
    parts = loop.parts
    state = read_json(folder / STATE)
    if state["effective_batch_size"] != parts.shape.effective:
        raise DataError(
            Fault(
                f"effective batch {parts.shape.effective}",
                f"the checkpoint {folder} was trained with {state['effective_batch_size']}",
                "Choose --batch-size, --gradient-accumulation-steps and --world-size with that product",
            )
        )
    fill_module(parts.objective.model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    parts.strategy.load(folder)
    if parts.ema is not None:
        parts.ema.load(read_tensors(folder / AVERAGE))
    if parts.adapters is not None and parts.adapters.ranks is not None:
        parts.adapters.ranks.load(read_tensors(folder / RANKS))
    loop.progress = Progress(**state["progress"])
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
        name.removeprefix("feed."): tensor.numpy() for name, tensor in slots.items() if name.startswith("feed.")
    }
    parts.loader.load_state_dict(state["epoch"], position)
    if parts.carried:
        loop.carries = _carries(loop, slots)
    extra: dict[str, Any] = state["extra"]
    return extra


def _slots(loop: TrainingLoop) -> dict[str, Tensor]:
    """This rank's carries, slot by slot, and its place in the data."""
    tensors = {
        f"feed.{n}": torch.from_numpy(np.ascontiguousarray(v)) for n, v in loop.parts.loader.state_dict().items()
    }
    if loop.parts.carried and loop.carries is not None:
        carry = PuzzleCarry.joined(loop.carries)
        tensors["carry.z_h"], tensors["carry.z_l"] = carry.states.z_h, carry.states.z_l
        tensors["carry.steps"], tensors["carry.halted"] = carry.steps, carry.halted
        for name in ROW_FIELDS:
            tensors[f"carry.data.{name}"] = carry.data[name]
    return tensors


def _own_slots(loop: TrainingLoop, folder: Path) -> dict[str, Tensor]:
    """The slots of this rank out of all ranks' files; what does not go by slots comes from the first file."""
    shape = loop.parts.shape
    files = [read_tensors(path) for path in sorted(folder.glob("slots_*.safetensors"))]
    if not loop.parts.carried:
        return files[0]
    own = slice(shape.first_slot, shape.first_slot + shape.per_rank)
    return {name: torch.cat([f[name] for f in files])[own] for name in files[0]}


def _carries(loop: TrainingLoop, slots: dict[str, Tensor]) -> list[PuzzleCarry]:
    carried = {name: tensor.to(loop.world.device) for name, tensor in slots.items() if name.startswith("carry.")}
    whole = PuzzleCarry(
        states=States(carried["carry.z_h"], carried["carry.z_l"]),
        steps=carried["carry.steps"],
        halted=carried["carry.halted"],
        data={name: carried[f"carry.data.{name}"] for name in ROW_FIELDS},
    )
    return whole.split(loop.parts.shape.batch_size)

"""Rank 0 decides for all ranks, and an error on one rank ends all of them: nobody waits at a collective."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from hrm_ray.bundle.weights_file import unwritable
from hrm_ray.errors import DataError, Fault, HrmRayError
from hrm_ray.rundir import RunDir
from hrm_ray.train import checkpoint, checkpoint_write
from hrm_ray.train.assemble import assemble
from hrm_ray.train.evaluator import Evaluator
from hrm_ray.train.loop import WRITTEN, TrainingLoop
from hrm_ray.train.strategies import ddp
from hrm_ray.train.world import World, collectives_begun
from hrm_ray.types import StopReason, StopRequested
from tests.support.splits import Cut, Rows, config_for, settings_for

pytestmark = pytest.mark.agreement

STARTED_S = 20
"""How long a collective may wait for a rank that never comes."""


def loop_for(cut: Cut) -> TrainingLoop:
    settings = settings_for("puzzle-carried", "sgd", cut)
    config = config_for(settings)
    return assemble(settings, config, Rows(config.task), World.here("cpu", 1), 4)


def error_of(saved_by: TrainingLoop, run_dir: RunDir, keep: int = 1) -> str:
    try:
        checkpoint.save_checkpoint(saved_by, run_dir, {}, keep)
    except (HrmRayError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def stopped_before_its_first_batch(loop: TrainingLoop) -> str:
    """The reason with which the first step is left, where rank 0 alone is asked to stop."""
    loop.stop_poll = lambda: StopReason.SIGTERM if loop.world.leads else None
    try:
        loop.step()
    except StopRequested as stopped:
        return f"{stopped.reason.value} {loop.trained}"
    return "a step was taken"


def error_at_a_record(loop: TrainingLoop) -> str:
    """The error of a check that fails on rank 0 as a record is made."""

    def gone() -> None:
        raise DataError(Fault("the bundle", "is gone", "Start again"))

    loop.step()
    try:
        loop.flush_metrics(gone)
    except DataError as error:
        return str(error)
    return "nothing"


def collectives_of(step: Callable[[], object]) -> int:
    """How many collectives this rank takes part in."""
    before = collectives_begun()
    step()
    after = collectives_begun()
    assert before is not None and after is not None
    return after - before


def folded_alike(loops: Sequence[TrainingLoop]) -> bool:
    """Whether loops of the same run have the same weights, to the bit."""
    one, other = (dict(loop.parts.strategy.full_weights()) for loop in loops)
    return all(bool((one[name] == other[name]).all()) for name in one)


def in_background(loop: TrainingLoop, run_dir: RunDir, error: OSError | None) -> dict[str, Any]:
    """A checkpoint that a thread of rank 0 writes, where its disk may give an error: how all ranks learn of the end.

    The thread writes once the step after the save is made, which has as many collectives as any other.
    """
    checkpointer = checkpoint.Checkpointer(loop, run_dir, 1)
    loop.written_poll = checkpointer.written
    real, may_write, told = checkpoint_write.save_tensors, threading.Event(), list[float]()
    ended = "whole"

    def writing(tensors: Mapping[str, Tensor], path: Path) -> None:
        may_write.wait(STARTED_S)
        if error is not None:
            raise error
        real(tensors, path)

    def step() -> None:
        report = loop.step()
        assert report is not None
        told.append(report.totals[WRITTEN])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_write, "AT_ONCE_BYTES", 0)
        patch.setattr(checkpoint_write, "save_tensors", writing)
        checkpointer.save({}, background=True)
        collectives = collectives_of(step)
        may_write.set()
        while told[-1] == 0:
            step()
        try:
            checkpointer.finish()
        except (HrmRayError, RuntimeError) as raised:
            ended = f"{type(raised).__name__}: {raised}"
    loop.written_poll = lambda: False
    whole = len(run_dir.checkpoint_steps())
    return {"collectives": collectives, "told": [told[0], told[-1]], "ended": ended, "whole": whole}


def best_seen(loop: TrainingLoop, run_dir: RunDir) -> int:
    """The step of the best evaluation after a resume, where best/ is on rank 0's disk alone."""
    if loop.world.leads:
        run_dir.best.root.mkdir(parents=True)
        run_dir.best.metadata.write_text('{"step": 2}')
    evaluator = Evaluator(loop, None, (), run_dir)
    best = {"step": 2, "loss": 1.0}
    evaluator.load_state_dict({"evaluated_on": [0], "best": best, "figures": {}, "evaluated_at": 2})
    return -1 if evaluator.best is None else int(evaluator.best["step"])


def spawned(rank: int, folder: str) -> None:
    """The first checkpoint is whole; at the second the disk takes nothing of rank 1; at the third rank 0's manifest."""
    os.environ["USE_LIBUV"] = "0"
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=STARTED_S), rank=rank, world_size=2)
    loop, run_dir, real = loop_for(Cut(2, 1, 4)), RunDir(Path(folder) / "run"), checkpoint.save_tensors
    run_dir.root.mkdir(exist_ok=True)
    found: list[Any] = []
    loop.step()
    found += [error_of(loop, run_dir), run_dir.checkpoint_steps()]
    loop.step()

    def full(tensors: Mapping[str, Tensor], path: Path) -> None:
        if rank == 1:
            raise unwritable(path, OSError(errno.ENOSPC, "No space left on device"))
        real(tensors, path)

    checkpoint.save_tensors = full  # type: ignore[assignment]
    found += [error_of(loop, run_dir), run_dir.checkpoint_steps()]
    checkpoint.save_tensors = real  # type: ignore[assignment]

    def unknown(run_dir: RunDir, step: int, partial: Path) -> str:
        raise DataError(Fault("the ledger", "its head has moved", "Resume"))

    described = RunDir.describe_checkpoint
    RunDir.describe_checkpoint = unknown  # type: ignore[method-assign]
    found += [error_of(loop, run_dir), run_dir.checkpoint_steps()]
    RunDir.describe_checkpoint = described  # type: ignore[method-assign]
    found += [error_of(loop, run_dir), run_dir.checkpoint_steps()]
    run_dir = RunDir(Path(folder) / "in_background")
    run_dir.root.mkdir(exist_ok=True)
    found.append(in_background(loop, run_dir, None))
    found.append(in_background(loop, run_dir, OSError(errno.ENOSPC, "No space left on device")))
    found.append(best_seen(loop, RunDir(Path(folder) / f"seen_by_{rank}")))
    found.append(stopped_before_its_first_batch(loop_for(Cut(2, 1, 4))))
    found.append(error_at_a_record(loop))
    loop.step()
    found.append([collectives_of(loop.step), collectives_of(loop.flush_metrics)])
    loops = [loop_for(Cut(2, 1, 4)) for _ in range(2)]
    for number, each in enumerate(loops):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ddp, "SMALL_BYTES", ddp.SMALL_BYTES * number)
            for _ in range(3):
                each.step()
    found.append(folded_alike(loops))
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own tear-down


def test_all_ranks_end_with_the_error_of_one(tmp_path: Path) -> None:
    mp.spawn(spawned, (str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    whole, steps, full, after_full, unknown, after_unknown, again, at_last, written, failed, best, stopped, *rest = (
        ranks[0]
    )
    assert (whole, steps, again, at_last) == ("nothing", [1], "nothing", [2])
    assert full.startswith("DiskError") and "slots_00000004" in full and "No space left" in full
    assert unknown.startswith("DataError: the ledger")
    assert after_full == after_unknown == [1], "the earlier checkpoint stays, and nothing of the other is left"
    assert written == {"collectives": 2, "told": [0, 1], "ended": "whole", "whole": 1}
    ended = failed.pop("ended")
    assert failed == {"collectives": 2, "told": [0, 1], "whole": 1}
    assert ended.startswith("DiskError") and "No space left" in ended
    assert best == 2, "rank 0 decides for all"
    assert stopped == "sigterm False"
    gone, counts, same = rest
    assert gone.startswith("the bundle") and "is gone" in gone
    assert counts == [2, 1], "a step adds up denominators and then gradients, a record its means"
    assert same is True, "gradients in one collective with the word of a failure are those of several"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))

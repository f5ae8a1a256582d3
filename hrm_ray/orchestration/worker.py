"""The entry of each Ray Train worker: it runs the training body and reports to the driver how the body ended."""

from __future__ import annotations

import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import ray.train

from hrm_ray.errors import AWAY_ERRNOS, DiskError, Fault, UnavailableError
from hrm_ray.orchestration.failures import Failure
from hrm_ray.orchestration.heartbeats import HeartbeatThread
from hrm_ray.orchestration.run_monitor import WorkerChannel, WorkerInfo
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import RunResult

Body: TypeAlias = Callable[[RunPlan, WorkerChannel], RunResult]
"""What each worker runs."""

PEER_LOSS_WAIT_S = 5.0
"""A rank whose collective broke waits this long before it ends, so that Ray notices first the rank which is gone."""


class WorkerEnded(Exception):
    """Ends a failed rank in Ray Train; the driver has the cause already."""


def main(config: dict[str, Any]) -> None:
    """The training function of TorchTrainer; torch.distributed is set up when it is entered.

    `config`: "body" (None for training), "plan" (from `RunPlan.to_plain`), "marker" (the path of a file in the bundle),
    "token" (its content), "monitor" and "chunk_server" (actor handles; the latter may be None).
    """
    rank = ray.train.get_context().get_world_rank()
    channel = WorkerChannel(config["monitor"], rank, config["chunk_server"])
    worker = WorkerInfo.here(rank)
    if not channel.announce(worker):
        return
    heartbeats = HeartbeatThread(config["monitor"], worker, channel.activity)
    try:
        check_shared(Path(config["marker"]), config["token"])
        from hrm_ray.train.session import train

        body: Body = config["body"] or train
        channel.finish(body(RunPlan.from_plain(config["plan"]), channel))
    except BaseException as error:  # noqa: BLE001 - the actor's edge: the driver reports it
        failure = Failure.of(rank, error)
        traceback.print_exc(file=sys.stderr)
        channel.fail(failure)
        if failure.peer_loss:
            threading.Event().wait(PEER_LOSS_WAIT_S)
        raise WorkerEnded(f"rank {rank}: {failure.kind}") from None
    finally:
        heartbeats.close()


def check_shared(marker: Path, token: str) -> None:
    """Raise UnavailableError where this node does not see the file with the token that the driver has just put into the
    bundle, and DiskError where the disk does not answer."""
    try:
        found = marker.read_text(encoding="utf-8")
    except OSError as error:
        if error.errno in AWAY_ERRNOS:
            raise DiskError(
                Fault(str(marker.parent), f"node {socket.gethostname()} cannot read it ({error})", "")
            ) from error
        found = ""
    if found != token:
        folder = "sees another folder of that name" if marker.parent.is_dir() else "has no such folder"
        hint = "Give --bundle-dir a folder that all nodes of the cluster share"
        raise UnavailableError(Fault(str(marker.parent), f"node {socket.gethostname()} {folder}", hint))

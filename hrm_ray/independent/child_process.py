"""A process of a run of independent trainers: `python -m hrm_ray.independent.child_process` with its task on standard
input. It ends when the process that started it is gone."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Client, Connection
from typing import Any, TypeAlias

from hrm_ray.independent.wire import FAILED, Disconnected, RemoteCoordinator, call, expected, packed, serve_one_heard

Work: TypeAlias = Callable[[dict[str, Any], Connection], None]


def main() -> int:
    """Do the task; returns the exit code: 0, or 1 after a failure that was reported or could not be."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if name in signal.Signals.__members__:
            # A stop is the driver's to tell: Ctrl-C reaches all processes of a terminal.
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    task = json.loads(sys.stdin.readline())
    # What takes long comes first: the driver gets on with other things until this process is connected.
    work = _load_trainer() if task["role"] == "trainer" else _load_keeper()
    connection = Client(tuple(task["address"]), authkey=bytes.fromhex(task["key"]))
    try:
        connection.send(task["name"])
        work(task, connection)
    except (Disconnected, EOFError, ConnectionError):
        return 1
    except Exception as error:  # noqa: BLE001 - the process's edge: the driver reports it
        with suppress(OSError):
            connection.send((FAILED, (packed(expected(error)),)))
        return 1
    return 0


def _load_trainer() -> Work:
    from hrm_ray.independent.assembly import block_trainer
    from hrm_ray.train.plan import RunPlan

    def train(task: dict[str, Any], connection: Connection) -> None:
        plan = RunPlan.from_plain(task["plan"])
        connection.recv()  # the first anchor is there
        block_trainer(plan, task["name"], task["number"], RemoteCoordinator(partial(call, connection))).run()

    return train


def _load_keeper() -> Work:
    from hrm_ray.independent.anchor_keeper import AnchorKeeper
    from hrm_ray.train.plan import RunPlan

    def keep_anchors(task: dict[str, Any], connection: Connection) -> None:
        keeper = AnchorKeeper(RunPlan.from_plain(task["plan"]))
        try:
            while True:
                serve_one_heard(connection, keeper.methods)
        except (EOFError, OSError):
            return
        finally:
            keeper.close()

    return keep_anchors


if __name__ == "__main__":
    raise SystemExit(main())

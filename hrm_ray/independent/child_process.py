"""A process of a run of independent trainers: `python -m hrm_ray.independent.child_process` with its task on standard
input. It ends when the process that started it is gone."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from typing import Any, TypeAlias

from hrm_ray.independent.wire import FAILED, Disconnected, RemoteCoordinator, expected, packed, serve_one

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
    from hrm_ray.independent.assembly import assemble_loop, samples_per_step
    from hrm_ray.independent.trainer import BlockTrainer
    from hrm_ray.metrics.jsonl import JsonlSink
    from hrm_ray.rundir import RunDir
    from hrm_ray.train.plan import RunPlan

    def train(task: dict[str, Any], connection: Connection) -> None:
        plan, name = RunPlan.from_plain(task["plan"]), task["name"]
        connection.recv()  # the first anchor is there
        run_dir = RunDir(plan.bundle)
        folder = run_dir.independent.trainer(name)
        folder.mkdir(parents=True, exist_ok=True)
        BlockTrainer(
            name,
            assemble_loop(plan, task["number"]),
            run_dir,
            RemoteCoordinator(connection),
            samples_per_update=samples_per_step(plan),
            log_every=plan.settings.run.log_every,
            sink=JsonlSink(RunDir(folder).metrics),
        ).run()

    return train


def _load_keeper() -> Work:
    from hrm_ray.independent.anchor_keeper import AnchorKeeper
    from hrm_ray.train.plan import RunPlan

    def keep_anchors(task: dict[str, Any], connection: Connection) -> None:
        keeper = AnchorKeeper(RunPlan.from_plain(task["plan"]))
        methods: dict[str, Callable[..., Any]] = {
            "begin": keeper.begin,
            "resume": keeper.resume,
            "merge": keeper.merge,
            "evaluate": keeper.evaluate,
            "sample": keeper.sample,
            "save": keeper.save,
            "finish": keeper.finish,
        }
        try:
            while True:
                serve_one(connection, methods)
        except (EOFError, OSError):
            return
        finally:
            keeper.close()

    return keep_anchors


if __name__ == "__main__":
    raise SystemExit(main())

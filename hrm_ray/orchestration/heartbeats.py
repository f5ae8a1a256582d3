"""A worker's heartbeats: what it does, once a second, and its stacks when they are asked for.

A thread of the worker sends them, so that they come while the main thread waits in native code (a collective, a network
disk). A stopped process, or native code that holds Python's lock, sends none.
"""

from __future__ import annotations

import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

import ray

from hrm_ray.launch.hangs import BEAT_INTERVAL_S, Heartbeat
from hrm_ray.orchestration.run_monitor import WorkerInfo
from hrm_ray.train.activity import Activity
from hrm_ray.train.world import collectives_begun

ANSWER_S = 10 * BEAT_INTERVAL_S
"""How long the monitor may take to answer, before the next heartbeat is sent."""


class HeartbeatThread:
    """Sends what `activity` does to the monitor every BEAT_INTERVAL_S, and the stacks of this process when asked.

    Made by the thread that trains.
    """

    def __init__(self, monitor: Any, worker: WorkerInfo, activity: Activity) -> None:
        self._monitor, self._worker, self._activity = monitor, worker, activity
        self._trains = threading.get_ident()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send no more; does not wait for an answer of the monitor."""
        self._closing.set()

    def _send_until_closed(self) -> None:
        worker = self._worker
        while True:
            # Whatever fails, the next heartbeat is sent: a worker without heartbeats would be taken for one that hangs.
            with suppress(Exception):
                beat = Heartbeat.of(self._activity, worker.rank, worker.node_ip, worker.pid, collectives_begun())
                if ray.get(self._monitor.beat.remote(beat), timeout=ANSWER_S):
                    ray.get(
                        self._monitor.add_stacks.remote(worker.rank, stacks(self._trains)), timeout=10 * BEAT_INTERVAL_S
                    )
            if self._closing.wait(BEAT_INTERVAL_S):
                return


def stacks(first: int) -> str:
    """The Python stacks of all threads of this process, that of thread `first` first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
    )

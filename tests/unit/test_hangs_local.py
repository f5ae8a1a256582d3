"""A stall of a single process is told while it lasts; nothing is ended."""

from __future__ import annotations

import threading

from hrm_ray.launch.local import stalls_told
from hrm_ray.train.activity import Activity
from hrm_ray.types import Record


class Told:
    """A sink that says when it has had so many records."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.came = threading.Semaphore(0)

    def write(self, record: Record) -> None:
        self.records.append(record)
        self.came.release()

    def close(self) -> None:
        pass


def test_a_read_that_hangs_is_told_and_so_is_its_end() -> None:
    now_s, told = [0.0], Told()

    def clock() -> float:
        now_s[0] += stalls  # each look of the watching thread comes this much later
        return now_s[0]

    stalls = 2.0
    activity = Activity(lambda: now_s[0])
    with activity.doing("step"):
        now_s[0] += 1
    activity.enter("data")
    with stalls_told(activity, told, None, clock, every_s=0.001):
        assert told.came.acquire(timeout=20)
        activity.progressed()
        assert told.came.acquire(timeout=20)
        stalls = 0.0
    warning, end = told.records[:2]
    assert warning.values["level"] == "WARNING" and "waiting for data" in str(warning.values["message"])
    assert "ended after" not in str(warning.values["message"])
    assert end.values["level"] == "INFO" and "continues" in str(end.values["message"])

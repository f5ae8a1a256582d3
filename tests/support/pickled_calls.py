"""Calls of a BatchServer in this process that carry what Ray would: pickled words, answered from other threads."""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

from hrm_ray.data.batch_server import BatchServer, Item
from hrm_ray.data.batches import BatchRequest

Call = tuple[int, "Future[bytes]"]


class PickledCalls:
    """ServerCalls of all ranks of a group; counts the bytes that each receives."""

    def __init__(self, server: BatchServer, world_size: int) -> None:
        self._server = server
        self._threads = ThreadPoolExecutor(4 * world_size, "calls")
        self.received_bytes: Counter[int] = Counter()
        self.answers: Counter[int] = Counter()

    def get(self, rank: int, request: BatchRequest, slots: range, number: int) -> Call:
        words = pickle.dumps((rank, request, slots, number))
        return rank, self._threads.submit(lambda: pickle.dumps(self._server.get(*pickle.loads(words)), protocol=5))

    def result(self, call: Call) -> list[Item]:
        rank, answer = call
        items = answer.result(20)
        self.received_bytes[rank] += len(items)
        self.answers[rank] += 1
        received: list[Item] = pickle.loads(items)
        return received

    def close(self, rank: int, request: BatchRequest) -> None:
        self._threads.submit(self._server.close, rank, request)

    def shut_down(self) -> None:
        """Wait for the calls in progress."""
        self._threads.shutdown()

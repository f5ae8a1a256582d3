"""What all tests that start Ray share."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import ray
from ray.actor import ActorHandle


@pytest.fixture(autouse=True)
def nothing_of_a_cluster_is_left() -> Iterator[None]:
    """A thread that waits for a cluster that is gone takes a core until the process ends. A handle of one of its actors
    ends the actor with the same id in the next cluster, when it is deleted."""
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "ray-train-fit"] == []
    if not ray.is_initialized():
        gc.collect()
        assert [found for found in gc.get_objects() if type(found) is ActorHandle] == []

"""What all tests that start Ray share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_thread_of_ray_train_is_left() -> Iterator[None]:
    """One that waits for a cluster that is gone takes a core until the process ends."""
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "ray-train-fit"] == []

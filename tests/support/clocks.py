"""Clocks that tests move."""

from __future__ import annotations


class Ticking:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def standing() -> float:
    """A clock that stands still."""
    return 0.0

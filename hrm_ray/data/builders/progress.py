"""How far a builder has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called often with what is being made (such as the split), how many there are, and how many there will be."""


def no_progress(what: str, made: int, wanted: int) -> None:
    """Shows nothing."""

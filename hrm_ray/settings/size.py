"""Sizes of memory as people write them: 900MB, 1.5GB, 8GiB."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]i?b|[kmgt])", re.ASCII | re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
LARGEST_BYTES = 10**15
"""A larger size is a mistake."""


def bytes_of(text: str) -> int | None:
    """The bytes of a size: `900MB`, `1.5GB`, `24G` (powers of 1000) or `8GiB` (of 1024); None for anything else, for no
    size at all, and for a number without a unit."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    unit = found["unit"].lower()
    size = round(float(found["number"]) * (1024 if "i" in unit else 1000) ** _POWERS[unit[0]])
    return size if 0 < size <= LARGEST_BYTES else None

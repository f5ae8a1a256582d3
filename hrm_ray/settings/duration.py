"""Durations as people write them: 30m, 1h30m, 1:30:00."""

from __future__ import annotations

import re

_UNITS = re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s?)?", re.ASCII | re.IGNORECASE)
_CLOCK = re.compile(r"(?P<h>\d+):(?P<m>[0-5]?\d):(?P<s>[0-5]?\d)", re.ASCII)
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
LONGEST_S = 1_000 * 86400
"""A longer time is a mistake."""


def seconds_of(text: str) -> int | None:
    """The seconds of a duration: `90`, `90s`, `30m`, `2h`, `1h30m`, `1d12h` or `1:30:00`; None for anything else, and
    for no time at all."""
    found = _CLOCK.fullmatch(text.strip()) or _UNITS.fullmatch(text.strip())
    if found is None:
        return None
    total = sum(int(number) * _SECONDS[unit] for unit, number in found.groupdict(default="0").items())
    return total if 0 < total <= LONGEST_S else None

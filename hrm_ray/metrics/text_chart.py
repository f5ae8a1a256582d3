"""The training loss of a run as a small text chart."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np

from hrm_ray.types import Record

_MARGIN = 9
"""Cells for a number beside the chart: the longest with three digits, such as 1.23e-100."""


def loss_chart(records: Sequence[Record], width: int, height: int = 8, encoding: str | None = None) -> str:
    """A chart at most `width` cells wide (but at least 24) and `height` + 2 lines high.

    A column is the mean of the finite losses of its span of steps; the numbers at the side are the highest, the middle
    and the lowest. Drawn in eighth blocks, or in ASCII if `encoding` (None: that of sys.stdout) lacks them.
    """
    losses = [
        (record.step, record.values["loss"]) for record in records if record.kind == "train" and "loss" in record.values
    ]
    points = np.array([(step, loss) for step, loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)])
    if not points.size:
        return "no finite train loss recorded"
    columns = max(width, 24) - _MARGIN - 2
    first, last = int(points[:, 0].min()), int(points[:, 0].max())
    places = np.minimum((points[:, 0] - first) / max(last - first, 1) * columns, columns - 1).astype(int)
    counts = np.bincount(places, minlength=columns)
    filled = np.flatnonzero(counts)
    sums = np.bincount(places, weights=points[:, 1], minlength=columns)
    # A column without a record lies between its neighbours.
    means = np.interp(np.arange(columns), filled, sums[filled] / counts[filled])

    low, high = float(means.min()), float(means.max())
    glyphs, side, corner, floor = _glyphs(encoding)
    parts = len(glyphs) - 1  # levels that one cell can show
    span = high - low
    # The lowest column still shows one part, so that no column looks missing; a flat curve lies in the middle.
    scaled = (means - low) / span if span > 0 else np.full(columns, 0.5)
    levels = 1 + np.rint(scaled * (height * parts - 1)).astype(int)
    labels = {0: high, height // 2: (low + high) / 2, height - 1: low} if span > 0 else {height // 2: low}
    lines = []
    for row in range(height):
        label = f"{labels[row]:.3g}" if row in labels else ""
        cells = np.clip(levels - (height - 1 - row) * parts, 0, parts)
        lines.append(f"{label:>{_MARGIN}} {side}{''.join(glyphs[part] for part in cells)}".rstrip())
    lines.append(" " * (_MARGIN + 1) + corner + floor * columns)
    lines.append(" " * (_MARGIN + 2) + f"{first}" + "step".center(columns - len(f"{first}{last}")) + f"{last}")
    return "\n".join(lines)


def _glyphs(encoding: str | None) -> tuple[str, str, str, str]:
    """A cell's fillings from empty to full, then the side, the corner and the floor of the axes."""
    blocks = (" \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "\u2502", "\u2514", "\u2500")
    try:
        "".join(blocks).encode(encoding or sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return " .:#", "|", "+", "-"
    return blocks

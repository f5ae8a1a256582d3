"""Going on with independent trainers from a checkpoint of workers that took each step together (a strategy's)."""

from __future__ import annotations

from pathlib import Path

from hrm_ray.bundle.progress import STATE
from hrm_ray.errors import DataError, Fault
from hrm_ray.independent.claims import DataOrder, whole_catalog
from hrm_ray.rundir import read_json
from hrm_ray.train.checkpoint import stream_position
from hrm_ray.train.plan import RunPlan, TextData


def is_synchronous(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved under a strategy, not by independent trainers."""
    return read_json(checkpoint / STATE)["extra"].get("independent") is None


def check_position(plan: RunPlan, order: DataOrder) -> None:
    """Raises DataError where the plan's checkpoint lies inside a shuffle window of several chunks.

    Such a window mixes its chunks, and the shuffle window of independent trainers is one chunk: what is left of one
    would hold samples that were trained, and lack others.
    """
    checkpoint = plan.checkpoint
    if checkpoint is None or not isinstance(plan.data, TextData) or not plan.data.text.shuffle_rows:
        return
    epoch, state = stream_position(checkpoint)
    if not state.taken:
        return
    entries = whole_catalog(plan, lambda message: None).entries
    chunk = order(epoch, state.position)
    first = order.start if epoch == 0 else 0
    ends_block = state.position + 1 >= len(entries) - first
    if not ends_block:
        ends_block = entries[order(epoch, state.position + 1)].start.block != entries[chunk].start.block
    rows = entries[chunk].rows
    if ends_block or not rows or rows >= plan.data.text.shuffle_rows:
        return
    reason = "lies inside a shuffle window of several chunks, which independent trainers cannot go on with"
    hint = "Resume from a checkpoint at the end of an epoch, or start a new run with --student-init"
    raise DataError(Fault(str(checkpoint), reason, hint))

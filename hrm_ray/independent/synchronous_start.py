"""Going on with independent trainers from a checkpoint of workers that took each step together (a strategy's)."""

from __future__ import annotations

from pathlib import Path

from hrm_ray.bundle.progress import STATE
from hrm_ray.errors import DataError, Fault
from hrm_ray.independent.claims import DataOrder, whole_catalog
from hrm_ray.ledger import Ledger, Span, SynchronousRun, is_anchor
from hrm_ray.rundir import MANIFEST, file_sha256, read_json
from hrm_ray.train.checkpoint import puzzles_taken, stream_position
from hrm_ray.train.claimed_rows import puzzles_of_chunk
from hrm_ray.train.plan import RunPlan, TextData


def is_synchronous(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved under a strategy, not by independent trainers."""
    return read_json(checkpoint / STATE)["extra"].get("independent") is None


def enter_puzzles(ledger: Ledger, checkpoint: Path, puzzles: int) -> None:
    """Enter into the ledger, as the round of a checkpoint, what a strategy has trained up to it: it keeps no ledger of
    puzzles. Nothing changes where the ledger has that round."""
    state = read_json(checkpoint / STATE)
    step: int = state["progress"]["step"]
    name, checksum = f"{checkpoint.parent.name}/{checkpoint.name}", file_sha256(checkpoint / MANIFEST)
    known = next((one for one in ledger.lineage() if one.round == step), None)
    if not step or (known is not None and (is_anchor(known) or known.checksum == checksum)):
        return
    parent = next((one.round for one in ledger.lineage() if one.round < step), None)
    run = SynchronousRun(ledger, parent)
    spans: list[Span] = []
    for epoch in range(ledger.epoch, state["epoch"] + 1):
        left = puzzles if epoch < state["epoch"] else puzzles_taken(checkpoint)
        while left and (lease := run.claim(lambda epoch, position: position, epochs=epoch + 1)) is not None:
            of_chunk = puzzles_of_chunk(puzzles, lease.chunk)
            run.measure(lease.chunk, of_chunk)
            end = min(of_chunk if lease.end is None else lease.end, lease.start + left)
            spans.append(Span(epoch, lease.chunk, lease.start, end))
            left -= end - lease.start
    run.commit_checkpoint(step, parent, spans, name, checksum)
    run.close()


def check_position(plan: RunPlan, order: DataOrder) -> None:
    """Raises DataError where the plan's checkpoint lies inside a shuffle window of several chunks.

    Such a window mixes its chunks, and the shuffle window of independent trainers is one chunk: what is left of one
    would hold samples that were trained, and lack others.
    """
    checkpoint = plan.checkpoint
    if checkpoint is None or not isinstance(plan.data, TextData) or not plan.data.text.shuffle_rows:
        return
    epoch, state = stream_position(checkpoint)
    if not state.taken or read_json(checkpoint / STATE).get("trained_ranges") is not None:
        return  # after trainers of before, windows are one chunk to the end of the epoch
    catalog = whole_catalog(plan, lambda message: None)
    # The order of the stream, whose positions are not the ledger's where the first epoch begins with a later chunk.
    slot = next(order.epochs.slots(catalog, epoch, state.position))
    rows = catalog.entries[slot.number].rows
    if slot.ends_block or not rows or rows >= plan.data.text.shuffle_rows:
        return
    reason = "lies inside a shuffle window of several chunks, which independent trainers cannot go on with"
    hint = "Resume from a checkpoint at the end of an epoch, or start a new run with --student-init"
    raise DataError(Fault(str(checkpoint), reason, hint))

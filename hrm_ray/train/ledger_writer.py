"""Writes the ledger of a text run: every checkpoint is a round with what was trained since the previous one.

All ranks take each step together, so they are one worker to the ledger, and rank 0 writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.stream import ConsumedRange, append_ranges
from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import BlockLength, Span, SynchronousRun, is_anchor, open_ledger
from hrm_ray.ledger.export import export
from hrm_ray.rundir import RunDir

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from: its step, its manifest's checksum, and its round's ranges."""

    step: int
    checksum: str
    trained: tuple[ConsumedRange, ...]


class LedgerWriter:
    """The ledger of one run, from its start (or the checkpoint it resumes from) to its end."""

    def __init__(
        self,
        run_dir: RunDir,
        catalog: Catalog,
        start: int,
        resume_point: ResumePoint | None,
        *,
        shuffled: bool = False,
    ) -> None:
        """`start` is the chunk that the first epoch begins with; `shuffled` says that epochs have shuffle windows.

        Raises DataError if the checkpoint that the run resumes from is not in the ledger.
        """
        self._run_dir = run_dir
        self._ledger = open_ledger(run_dir.ledger)
        self._ledger.set_shuffled(shuffled)
        if start:
            # Chunks before the start are in the catalog: the start was found by reading them.
            self._add_new_blocks(
                [BlockLength(e.start.block, e.start.chunk + 1, False) for e in catalog.entries[:start]]
            )
            self._ledger.start_at(start)
        if catalog.ended and not self._ledger.data_ended:
            self._ledger.add_blocks([BlockLength(block, size) for block, size in enumerate(catalog.block_sizes())])
            self._ledger.end_data()
        self._run = SynchronousRun(self._ledger, None if resume_point is None else resume_point.step)
        self._head = None if resume_point is None else resume_point.step
        self._of_head: list[ConsumedRange] = [] if resume_point is None else list(resume_point.trained)
        self._head_is_anchor = False
        """Whether the head is a round of independent trainers: it stays as it is, and what is trained after it belongs
        to the next round."""
        if resume_point is not None:
            # If the run died between the commit of a round and the rename of its checkpoint, the round gets the ranges
            # of the checkpoint that exists.
            known = self._ledger.round(resume_point.step)
            self._head_is_anchor = known is not None and is_anchor(known)
            if known is not None and not self._head_is_anchor and known.checksum != resume_point.checksum:
                self._enter(resume_point.step, resume_point.trained, resume_point.checksum, False)

    def covered(self, step: int, trained: Sequence[ConsumedRange]) -> list[ConsumedRange]:
        """The ranges of the round of `step`, when `trained` was read since the checkpoint before.

        A checkpoint that replaces another of the same step (no update was applied in between) has the ranges of both.
        """
        ranges = list(self._of_head) if step == self._head or self._head_is_anchor else []
        append_ranges(ranges, trained)
        return ranges

    def commit(self, step: int, covered: Sequence[ConsumedRange], checksum: str, *, data_ended: bool) -> None:
        """Commit the round of a checkpoint whose files are written, before its rename; `checksum` is its manifest's."""
        self._restore()
        if not self._head_is_anchor or step != self._head:
            self._enter(step, covered, checksum, data_ended)
            self._head_is_anchor = False
        self._head, self._of_head = step, list(covered)

    def _restore(self) -> None:
        """Write the ledger's file again where it was deleted during the run: it is whole in the open connection."""
        if self._ledger.database.restore():
            _LOG.warning("%s was deleted during the run; it is written again", self._run_dir.ledger)

    def _enter(self, step: int, covered: Sequence[ConsumedRange], checksum: str, data_ended: bool) -> None:
        parent = self._head
        with self._ledger.transaction():
            if step == parent:
                head = self._ledger.round(step)
                if head is None:
                    raise RuntimeError(f"round {step} is this run's head, but is not in the ledger")
                parent = head.parent
                self._run = SynchronousRun(self._ledger, parent)
            before: ConsumedRange | None = None
            for item in covered:
                # A range that continues the one before, trained or skipped, lies in the same lease.
                if before is None or (before.epoch, before.chunk, before.end) != (item.epoch, item.chunk, item.start):
                    self._lease(item)
                before = item
            if data_ended:
                self._end_data()
            spans = [Span(item.epoch, item.chunk, item.start, item.end, item.skipped) for item in covered]
            self._run.commit_checkpoint(step, parent, spans, f"checkpoints/step_{step}", checksum)

    def close(self, *, exports: bool = True) -> None:
        """Release the leases, export the ledger as JSON (`exports`), and close the file."""
        try:
            if exports:
                self._restore()
            self._run.close()
            if exports:
                export(self._ledger, self._run_dir.chunk_tracker)
        finally:
            self._ledger.close()

    def _lease(self, item: ConsumedRange) -> None:
        """Claim and measure the chunk of `item`, unless an earlier range of the chunk did."""
        if self._ledger.lease_at(item.epoch, item.chunk, item.start) is not None:
            return
        if not self._ledger.data_ended:
            if item.epoch:
                self._end_data()
            else:
                self._add_new_blocks([BlockLength(item.block, item.chunk_in_block + 1, False)])
        lease = self._run.claim(lambda epoch, position: item.chunk)
        if lease is None or (lease.epoch, lease.chunk, lease.start) != (item.epoch, item.chunk, item.start):
            given = "nothing" if lease is None else f"chunk {lease.chunk} of epoch {lease.epoch} from {lease.start} on"
            value = f"chunk {item.chunk} of epoch {item.epoch} from sequence {item.start} on"
            reason = f"was trained, but the ledger of {self._run_dir.root} leases {given}"
            raise DataError(Fault(value, reason, "Resume from the last checkpoint with --resume"))
        self._run.measure(item.chunk, item.sequences)

    def _add_new_blocks(self, found: Sequence[BlockLength]) -> None:
        """Add blocks as they are found; a block that another follows is complete."""
        blocks = self._ledger.blocks()
        last = BlockLength(blocks[-1].block, blocks[-1].chunks, blocks[-1].sealed) if blocks else None
        for block in found:
            if last is not None and block.block > last.block and not last.sealed:
                self._ledger.add_blocks([BlockLength(last.block, last.chunks, True)])
            if last is None or (block.block, block.chunks) > (last.block, last.chunks):
                last = block
                self._ledger.add_blocks([block])

    def _end_data(self) -> None:
        if self._ledger.data_ended:
            return
        blocks = self._ledger.blocks()
        if blocks and not blocks[-1].sealed:
            self._ledger.add_blocks([BlockLength(blocks[-1].block, blocks[-1].chunks, True)])
        self._ledger.end_data()

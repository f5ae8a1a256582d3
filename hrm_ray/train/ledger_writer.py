"""The ledger of a run on text: every checkpoint is a round, and holds what was trained since the one before.

From what the loader says it has given out to the ledger's leases, reports and rounds. All workers take one step
together, so they are one worker to the ledger, and the leading one keeps it. How a ledger works is hrm_ray.ledger's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.stream import ConsumedRange
from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import BlockLength, Lease, Span, SynchronousRun, open_ledger
from hrm_ray.ledger.export import export
from hrm_ray.rundir import RunDir


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run goes on from: its step, its manifest's checksum, and what it stands for."""

    step: int
    checksum: str
    trained: tuple[ConsumedRange, ...]


def joined(trained: Sequence[ConsumedRange]) -> list[ConsumedRange]:
    """The same with stretches of a chunk that follow each other made one."""
    found: list[ConsumedRange] = []
    for item in trained:
        last = found[-1] if found else None
        if last is not None and (last.epoch, last.chunk, last.end) == (item.epoch, item.chunk, item.start):
            found[-1] = replace(last, end=item.end)
        else:
            found.append(item)
    return found


class LedgerWriter:
    """The ledger of one run, from its start (or the checkpoint it goes on from) to its end."""

    def __init__(self, run_dir: RunDir, catalog: Catalog, start: int, resume_point: ResumePoint | None) -> None:
        """`start` is the chunk that the first epoch begins with.

        Raises DataError where the ledger does not know the checkpoint that the run goes on from.
        """
        self._run_dir = run_dir
        self._ledger = open_ledger(run_dir.ledger)
        if start:
            # Chunks before the start are known, or it could not have been found.
            self._grow([BlockLength(e.start.block, e.start.chunk + 1, False) for e in catalog.entries[:start]])
            self._ledger.start_at(start)
        if catalog.ended and not self._ledger.data_ended:
            self._ledger.add_blocks([BlockLength(block, size) for block, size in enumerate(catalog.block_sizes())])
            self._ledger.end_data()
        self._run = SynchronousRun(self._ledger, None if resume_point is None else resume_point.step)
        self._head = None if resume_point is None else resume_point.step
        self._of_head: list[ConsumedRange] = [] if resume_point is None else list(resume_point.trained)
        if resume_point is not None:
            self._settle(resume_point)

    def covered(self, step: int, trained: Sequence[ConsumedRange]) -> list[ConsumedRange]:
        """What the checkpoint of `step` will stand for, when `trained` was trained since the one before.

        One that takes the place of another of the same step (no update was applied in between) stands for both.
        """
        return joined([*self._of_head, *trained] if step == self._head else trained)

    def commit(self, step: int, covered: Sequence[ConsumedRange], checksum: str, *, data_ended: bool) -> None:
        """Enter a checkpoint whose files are written but not yet in their place; `checksum` is that of its manifest."""
        self._enter(step, covered, checksum, data_ended)
        self._head, self._of_head = step, list(covered)

    def _settle(self, resume_point: ResumePoint) -> None:
        """Where a run died after its ledger had a checkpoint of that step which never came into its place, the ledger
        is given what the one that is there stands for."""
        known = self._ledger.round(resume_point.step)
        if known is not None and known.checksum != resume_point.checksum:
            self._enter(resume_point.step, resume_point.trained, resume_point.checksum, False)

    def _enter(self, step: int, covered: Sequence[ConsumedRange], checksum: str, data_ended: bool) -> None:
        parent = self._head
        with self._ledger.transaction():
            if step == parent:
                before = self._ledger.round(step)
                assert before is not None, "it is this ledger's head"
                parent = before.parent
                self._run = SynchronousRun(self._ledger, parent)
            for item in covered:
                self._lease(item)
            if data_ended:
                self._end_data()
            spans = [Span(item.epoch, item.chunk, item.start, item.end) for item in covered]
            self._run.commit_checkpoint(step, parent, spans, f"checkpoints/step_{step}", checksum)

    def close(self) -> None:
        """Give back what is leased, write down for people where the run stands, and release the file."""
        self._run.close()
        export(self._ledger, self._run_dir.chunk_tracker)
        self._ledger.close()

    def _lease(self, item: ConsumedRange) -> None:
        """Claim and measure the chunk of `item`, where that has not been done for an earlier part of it."""
        if self._ledger.lease_at(item.epoch, item.chunk, item.start) is not None:
            return
        if not self._ledger.data_ended:
            if item.epoch:
                self._end_data()
            else:
                self._grow([BlockLength(item.block, item.chunk_in_block + 1, False)])
        lease = self._run.claim(lambda epoch, position: item.chunk)
        if lease is None or (lease.epoch, lease.chunk, lease.start) != (item.epoch, item.chunk, item.start):
            raise DataError(self._foreign(item, lease))
        self._run.measure(item.chunk, item.sequences)

    def _grow(self, told: Sequence[BlockLength]) -> None:
        """Take in blocks as they are found; one that another follows is complete."""
        blocks = self._ledger.blocks()
        last = BlockLength(blocks[-1].block, blocks[-1].chunks, blocks[-1].sealed) if blocks else None
        for block in told:
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

    def _foreign(self, item: ConsumedRange, lease: Lease | None) -> Fault:
        given = "nothing" if lease is None else f"chunk {lease.chunk} of epoch {lease.epoch} from {lease.start} on"
        value = f"chunk {item.chunk} of epoch {item.epoch} from sequence {item.start} on"
        reason = f"it was trained, and the ledger of {self._run_dir.root} gives out {given}"
        return Fault(value, reason, "Go on from the last checkpoint with --resume")

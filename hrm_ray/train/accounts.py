"""The ledger of a run on text: every checkpoint is a round, and holds what was trained since the one before.

One job: from what the feed says it has given out to the ledger's leases, reports and rounds. All workers take one step
together, so they are one worker to the ledger, and the leading one keeps it. How a ledger works is hrm_ray.ledger's.
"""

from __future__ import annotations

from collections.abc import Sequence

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.stream import Trained
from hrm_ray.errors import DataFault, Fault
from hrm_ray.ledger import BlockLength, Lease, Span, SynchronousRun, open_ledger, ranges
from hrm_ray.ledger.export import export
from hrm_ray.rundir import RunDir


class ChunkAccounts:
    """The ledger of one run, from its start (or the checkpoint it goes on from) to its end."""

    def __init__(self, run_dir: RunDir, catalog: Catalog, start: int, step: int | None) -> None:
        """`start` is the chunk that the first epoch begins with, `step` that of the checkpoint to go on from.

        Raises DataFault where the ledger does not know that checkpoint.
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
        self._run = SynchronousRun(self._ledger, step)
        self._head = step

    def commit(self, step: int, trained: Sequence[Trained], checksum: str, *, data_ended: bool) -> None:
        """Enter a checkpoint whose files are written but not yet in their place; `checksum` is that of its weights.

        A checkpoint that takes the place of one of the same step (no update was applied in between) has what both have
        trained.
        """
        parent = self._head
        with self._ledger.database.transaction(durable=True):
            if step == parent:
                before = self._ledger.round(step)
                assert before is not None, "it is this ledger's head"
                parent, trained = before.parent, [*self._of(step), *trained]
                self._run = SynchronousRun(self._ledger, parent)
            for item in trained:
                self._lease(item)
            if data_ended:
                self._end_data()
            spans = [Span(item.epoch, item.chunk, item.start, item.end) for item in trained]
            anchor = f"checkpoints/step_{step}"
            self._run.commit_checkpoint(step, parent, spans, anchor, checksum)
        self._head = step

    def _of(self, step: int) -> list[Trained]:
        """What a round holds."""
        found = []
        for contribution in self._ledger.contributions_of(step):
            for held in ranges.of_contribution(self._ledger.database, contribution.number):
                block = self._ledger.block_of(held.chunk)
                place = (block.block, held.chunk - block.first_chunk, held.chunk)
                sequences = self._ledger.sequences(held.chunk)
                assert sequences is not None and held.end is not None, "it was measured when it was trained"
                found.append((held.position, Trained(held.epoch, *place, sequences, held.start, held.end)))
        return [trained for _, trained in sorted(found, key=lambda pair: (pair[1].epoch, pair[0], pair[1].start))]

    def close(self) -> None:
        """Give back what is leased, write down for people where the run stands, and release the file."""
        self._run.close()
        export(self._ledger, self._run_dir.chunk_tracker)
        self._ledger.close()

    def _lease(self, item: Trained) -> None:
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
            raise DataFault(self._foreign(item, lease))
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

    def _foreign(self, item: Trained, lease: Lease | None) -> Fault:
        given = "nothing" if lease is None else f"chunk {lease.chunk} of epoch {lease.epoch} from {lease.start} on"
        value = f"chunk {item.chunk} of epoch {item.epoch} from sequence {item.start} on"
        reason = f"it was trained, and the ledger of {self._run_dir.root} gives out {given}"
        return Fault(value, reason, "Go on from the last checkpoint with --resume")

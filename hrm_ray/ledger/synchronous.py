"""The ledger as synchronous training uses it: checkpoints are rounds, and all workers together are one.

One job: a run's claims in order and its commits, so that after any end the ledger and the checkpoint that is taken up
again agree. It writes no checkpoint and reads no data.

The order of a checkpoint: its files are written whole in their place aside, then `commit_checkpoint`, then the rename
that makes it one. A run that dies before the rename goes on from the checkpoint before, and takes the round back; the
other order would leave a checkpoint that has learned what the ledger gives out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import ranges, rounds, states
from hrm_ray.ledger.owner import Ledger
from hrm_ray.ledger.ranges import ClaimOrder
from hrm_ray.ledger.reader import Round
from hrm_ray.ledger.states import Idle, Lease, Refused, Span

_Answer = TypeVar("_Answer")

_GANG = "gang"
"""The name of the one worker."""


class SynchronousRun:
    """A run's hold on its ledger, from one start to its end."""

    def __init__(self, ledger: Ledger, checkpoint: int | None) -> None:
        """Take the ledger back to the checkpoint that the run goes on from (its step; None: from the start).

        What an earlier start held is given back, and counts against no chunk: here a failure ends all workers, whatever
        they were at. Raises DataError where that checkpoint's round is not in the ledger.
        """
        self.ledger = ledger
        with ledger.database.transaction(durable=True):
            self.undone = _done(ledger, ledger.rollback(checkpoint))
            """Rounds that this start has undone, the newest first."""
            rounds.stop_all(ledger)
            self.generation = ledger.start_worker(_GANG)

    def claim(self, order: ClaimOrder, epochs: int | None = None) -> Lease | None:
        """The next range in order, or None where there is none (of the `epochs` first ones, or not yet)."""
        given = self.ledger.claim(_GANG, self.generation, order, epochs=epochs)
        return None if isinstance(given, Idle) else _done(self.ledger, given)

    def measure(self, chunk: int, sequences: int) -> None:
        """Tell how many packed sequences a chunk has; the same again changes nothing."""
        self.ledger.measure(chunk, sequences)

    def commit_checkpoint(
        self, step: int, parent: int | None, finished: Sequence[Span], anchor: str, checksum: str
    ) -> Round:
        """Commit the round of a checkpoint: all that was trained since the one before, `finished`, is merged.

        Each span begins where a lease of this run begins; where it ends before the lease does, the rest stays leased.
        `step` names the round, `parent` the checkpoint before (None: there is none). One transaction that outlives
        power loss; the same again gives the same round. Raises DataError where the ledger's head is not `parent` or a
        span is not leased to this run.
        """
        name = f"step {step}"
        database = self.ledger.database
        with database.transaction(durable=True):
            if self.ledger.round(step) is None and finished:
                leases = [(self._cut(span), span.skipped) for span in finished]
                learned, skipped = ([lease for lease, skips in leases if skips is kind] for kind in (False, True))
                reported = self.ledger.report(
                    name, learned, skipped=skipped, base=parent, path=anchor, checksum=checksum
                )
                _done(self.ledger, reported)
            accepted = [name] if finished else []
            committed = self.ledger.commit(step, parent=parent, accepted=accepted, anchor=anchor, checksum=checksum)
            return _done(self.ledger, committed)

    def close(self) -> None:
        """Give back what is leased and not committed; the ledger stays open."""
        self.ledger.stop_worker(_GANG, self.generation)

    def _cut(self, span: Span) -> Lease:
        """The lease of exactly `span`; what was leased beyond it is leased anew. Inside a transaction."""
        lease = self.ledger.lease_at(span.epoch, span.chunk, span.start)
        ours = lease is not None and (lease.worker, lease.generation) == (_GANG, self.generation)
        if lease is None or not ours or lease.end is None or span.end > lease.end:
            raise DataError(
                Fault(
                    f"sequences {span.start} to {span.end} of chunk {span.chunk} in epoch {span.epoch}",
                    "they were trained, but the ledger has not given them to this run",
                    "Go on from the last checkpoint with --resume",
                )
            )
        if span.end == lease.end:
            return lease
        first = _done(self.ledger, self.ledger.split(lease, span.end))
        rest = ranges.at(self.ledger.database, span.epoch, span.chunk, span.end)
        assert rest is not None
        ranges.put(self.ledger.database, states.lease(rest, _GANG, self.generation, None))
        return first


def _done(ledger: Ledger, answer: _Answer | Refused) -> _Answer:
    """The answer, where it is none of `Refused`: with one worker, nothing is late but by a fault."""
    if isinstance(answer, Refused):
        hint = "Go on from a checkpoint that the ledger knows, or train anew under another --brain-name"
        raise DataError(Fault(str(ledger.path), answer.reason, hint))
    return answer

"""The ledger in synchronous training: a checkpoint is a round, and all workers together are one worker.

A checkpoint's files are written first, then `commit_checkpoint` is called, then the folder gets its final name. A run
that dies before the rename resumes from the checkpoint before, and undoes the round. In the other order there
could be a checkpoint that has learned what the ledger gives out again.
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

_WORKER = "gang"
"""The name of all workers together; ledgers of earlier runs have it too."""


class SynchronousRun:
    """A run's use of its ledger, from its start or resume to its end."""

    def __init__(self, ledger: Ledger, checkpoint: int | None) -> None:
        """Roll the ledger back to the checkpoint that the run resumes from (its step; None: the start).

        Staged reports of independent trainers are dropped: this run trains what they have. Leases of an earlier start
        are released without a failed attempt: here any failure ends all workers. Raises
        DataError where the checkpoint's round is not in the ledger.
        """
        self.ledger = ledger
        with ledger.database.transaction(durable=True):
            self.undone = _accepted(ledger, ledger.rollback(checkpoint))
            """Rounds that this start has undone, newest first."""
            rounds.drop_staged(ledger)
            rounds.stop_all(ledger)
            self.generation = ledger.start_worker(_WORKER)

    def claim(self, order: ClaimOrder, epochs: int | None = None) -> Lease | None:
        """The next range in order, or None where there is none yet, or none in the first `epochs`."""
        given = self.ledger.claim(_WORKER, self.generation, order, epochs=epochs)
        return None if isinstance(given, Idle) else _accepted(self.ledger, given)

    def measure(self, chunk: int, sequences: int) -> None:
        """Set how many packed sequences a chunk has."""
        self.ledger.measure(chunk, sequences)

    def commit_checkpoint(
        self, step: int, parent: int | None, finished: Sequence[Span], anchor: str, checksum: str
    ) -> Round:
        """Commit the round of a checkpoint: `finished`, all that was trained since the one before, is merged.

        Each span begins where a lease of this run begins; where it ends before the lease does, the rest stays leased.
        `step` is the round, `parent` the checkpoint before (None: there is none). One transaction that survives power
        loss; the same call again returns the same round. Raises DataError where the ledger's head is not `parent` or a
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
                _accepted(self.ledger, reported)
            accepted = [name] if finished else []
            committed = self.ledger.commit(step, parent=parent, accepted=accepted, anchor=anchor, checksum=checksum)
            return _accepted(self.ledger, committed)

    def close(self) -> None:
        """Release leases that were not committed; the ledger stays open."""
        self.ledger.stop_worker(_WORKER, self.generation)

    def _cut(self, span: Span) -> Lease:
        """The lease of exactly `span`; the rest of its lease is leased again. Call inside a transaction."""
        lease = self.ledger.lease_at(span.epoch, span.chunk, span.start)
        ours = lease is not None and (lease.worker, lease.generation) == (_WORKER, self.generation)
        if lease is None or not ours or lease.end is None or span.end > lease.end:
            raise DataError(
                Fault(
                    f"sequences {span.start} to {span.end} of chunk {span.chunk} in epoch {span.epoch}",
                    "were trained, but are not leased to this run in the ledger",
                    "Resume from the last checkpoint with --resume",
                )
            )
        if span.end == lease.end:
            return lease
        first = _accepted(self.ledger, self.ledger.split(lease, span.end))
        rest = ranges.at(self.ledger.database, span.epoch, span.chunk, span.end)
        if rest is None:
            raise RuntimeError(f"no range follows {first} after its split")
        ranges.put(self.ledger.database, states.lease(rest, _WORKER, self.generation, None))
        return first


def _accepted(ledger: Ledger, answer: _Answer | Refused) -> _Answer:
    """The answer, or a DataError for `Refused`: with a single worker no call is late in ordinary use."""
    if isinstance(answer, Refused):
        hint = "Resume from a checkpoint that is in the ledger, or train again under another --brain-name"
        raise DataError(Fault(str(ledger.path), answer.reason, hint))
    return answer

"""Synchronous training whose model is a counter of trained sequences, with checkpoints and kills.

One job: play the starts of a run against a real ledger. A kill may come anywhere, also between the commit of a round
and the moment at which its checkpoint is in its place.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from hrm_ray.ledger import BlockLength, Lease, Ledger, Span, SynchronousRun, open_ledger

_AHEAD = 2
"""Leases that are claimed before they are trained, as a feed does."""


class CountedTraining:
    """A run of `epochs` epochs over chunks of `lengths` sequences, `per_step` in a step, a checkpoint every `every`."""

    def __init__(self, path: Path, lengths: list[int], per_step: int, every: int, epochs: int, draw: Random) -> None:
        self.path, self.lengths, self.per_step, self.every = path, lengths, per_step, every
        self.epochs, self.draw = epochs, draw
        self.checkpoints: dict[int, Counter[tuple[int, int, int]]] = {}
        self.starts = 0

    def start(self, may_be_killed: bool) -> bool:
        """Train on from the newest checkpoint, or now and then from an older one; True once the run is at its end."""
        self.starts += 1
        parent = max(self.checkpoints, default=None)
        if parent is not None and may_be_killed and self.draw.random() < 0.2:
            parent = self.draw.choice(list(self.checkpoints))
            self.checkpoints = {step: kept for step, kept in self.checkpoints.items() if step <= parent}
        with open_ledger(self.path, durable=False) as ledger:
            return self._train(ledger, parent, may_be_killed)

    def _train(self, ledger: Ledger, parent: int | None, may_be_killed: bool) -> bool:
        ledger.add_blocks([BlockLength(0, len(self.lengths))])
        ledger.end_data()
        run = SynchronousRun(ledger, parent)
        model = Counter() if parent is None else Counter(self.checkpoints[parent])
        step, finished, ahead = parent or 0, list[Span](), list[Lease]()
        self._fill(run, ahead)
        while True:
            taken = self._step(ahead)
            for span in taken:
                model.update((span.epoch, span.chunk, number) for number in range(span.start, span.end))
            finished += taken
            self._fill(run, ahead)
            step += 1
            if self._killed(may_be_killed):
                return False
            if step % self.every and ahead:
                continue
            run.commit_checkpoint(step, parent, joined(finished), f"step_{step}", "sum")
            if self._killed(may_be_killed):
                return False
            self.checkpoints[step] = Counter(model)
            parent, finished = step, []
            if not ahead:
                run.close()
                return True

    def _killed(self, may_be: bool) -> bool:
        return may_be and self.draw.random() < 0.15

    def _fill(self, run: SynchronousRun, ahead: list[Lease]) -> None:
        """Claim and measure until enough leases are ahead, or there are no more."""
        while len(ahead) < _AHEAD and (lease := run.claim(self._order, self.epochs)) is not None:
            run.measure(lease.chunk, self.lengths[lease.chunk])
            ahead.append(lease.measured(self.lengths[lease.chunk]))

    def _step(self, ahead: list[Lease]) -> list[Span]:
        """The sequences of one step, off the front of what is leased; empty chunks on the way count as taken."""
        taken: list[Span] = []
        left = self.per_step
        while ahead and (left or ahead[0].end == ahead[0].start):
            lease = ahead.pop(0)
            assert lease.end is not None
            at = min(lease.start + left, lease.end)
            taken.append(Span(lease.epoch, lease.chunk, lease.start, at))
            left -= at - lease.start
            if at < lease.end:
                ahead.insert(0, Lease(**{**vars(lease), "start": at}))
        return taken

    def _order(self, epoch: int, position: int) -> int:
        return (position + epoch) % len(self.lengths)


def joined(spans: list[Span]) -> list[Span]:
    """Neighbouring spans as one: what several steps took of a chunk."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and (last.epoch, last.chunk, last.end) == (span.epoch, span.chunk, span.start):
            found[-1] = Span(span.epoch, span.chunk, last.start, span.end)
        else:
            found.append(span)
    return found

"""What trainers and the coordinator say to each other: values without tensors, which any launcher can carry.

Weights travel as files below the bundle; a value names a file and its sha256. A call may be repeated after a lost
connection: claims have a key and reports a name, and the second call gives the answer of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from hrm_ray.ledger import Lease, Refused, Span
from hrm_ray.train.activity import Phase
from hrm_ray.types import StopReason


@dataclass(frozen=True)
class AnchorRef:
    """The common weights after a round (0: the start), an immutable file. `path` is relative to the bundle;
    `total_sequences` are the samples that its lineage has learned. `copy_of` names the report whose weights this anchor
    is to the bit: a trainer that trains on from that report lays nothing in place."""

    round: int
    path: str
    sha256: str
    total_sequences: int
    copy_of: str | None = None


@dataclass(frozen=True)
class News:
    """What a trainer hears with every answer: the newest anchor, which of its reports were rejected since its last
    call, and whether it shall end (report what it has, release the rest, leave).

    `staged_sequences` are the samples of all reports that no round has taken yet, of any trainer. The clock of the
    learning rate is what the anchor has learned, what is staged, and the trainer's open samples.

    `unmerged`: a report of the trainer waits for a round, and the next one better waits for that: a newer anchor does
    not have what waits, so the trainer would go on from weights without its own work (never under --merge-every end).

    A trainer lays a newer anchor in place at a step boundary: weights = anchor + (weights - snap), snap = anchor. It
    does the same with the anchor that it has where one of its reports was `rejected`.
    """

    anchor: AnchorRef
    rejected: tuple[str, ...] = ()
    stop: StopReason | None = None
    staged_sequences: int = 0
    unmerged: bool = False


@dataclass(frozen=True)
class Joined:
    """The answer to `join`. A trainer reports after at most `report_updates` weight updates, and renews its leases
    every `renew_every_s`. With `whole_weights` its reports have the weights too: then a round of one report alone can
    commit them to the bit."""

    trainer: str
    generation: int
    news: News
    report_updates: int
    renew_every_s: float
    whole_weights: bool = False


@dataclass(frozen=True)
class Claimed:
    """A range to train, at most as many samples as a report has. Where its `end` is None the chunk was never read:
    `measure` gives the lease with its end."""

    lease: Lease
    news: News


@dataclass(frozen=True)
class Wait:
    """Nothing to train for now: others hold what is left, and may give it back. Report what you have, ask again after
    `after_s`."""

    after_s: float
    news: News


@dataclass(frozen=True)
class Finished:
    """Everything is trained: report what you have, then leave."""

    news: News


Claim: TypeAlias = Claimed | Wait | Finished | Refused


@dataclass(frozen=True)
class Progress:
    """How far a trainer is, for displays: weight updates since it joined, samples since its last report, samples per
    second, the training loss of the last update, and the chunk that it reads. `marks` increases with all that it does,
    skipped updates and waits for others too, and stands where it hangs within `phase`."""

    updates: int
    open_samples: int
    samples_per_s: float
    loss: float
    chunk: int | None
    marks: int = 0
    phase: Phase = "starting"


@dataclass(frozen=True)
class Renewed:
    """The leases as they are now; one that is missing was taken back, and its samples must not be reported."""

    leases: tuple[Lease, ...]
    news: News


@dataclass(frozen=True)
class Report:
    """What a trainer has learned since its last report: a file with weights - snap in float32.

    `base` is the anchor that its snap came from. `spans` lie in `leases` and fill each from its start without gaps, in
    the order of training; a lease may end in the middle: with `keeps` the rest is leased to the trainer again,
    otherwise it is returned. Spans of skipped updates are marked. `updates` are weight updates, `tokens` the label
    positions learned, `loss` the mean training loss, `seconds` the time since the last report.

    `weights_path` is a file with the weights themselves, where the coordinator wants it. They descend from the anchor
    `base` with nothing between, or, where `follows` is given, from the trainer's own report of that name: a round of
    this report alone may commit them only on top of exactly that.
    """

    name: str
    trainer: str
    generation: int
    base: AnchorRef
    path: str
    sha256: str
    leases: tuple[Lease, ...]
    spans: tuple[Span, ...]
    updates: int
    tokens: int
    loss: float
    seconds: float
    keeps: bool = True
    weights_path: str | None = None
    weights_sha256: str | None = None
    follows: str | None = None


@dataclass(frozen=True)
class Reported:
    """A report is staged; a round will accept or reject it. `rest`: the leases of what was not trained yet."""

    rest: tuple[Lease, ...]
    report_updates: int
    news: News


class Coordinator(Protocol):
    """The calls of a trainer. `Refused` answers a call that comes too late: the trainer drops what it is about, and
    joins again where the call names its generation as over."""

    def join(self, trainer: str) -> Joined | Refused:
        """Start a trainer, or start it again: leases of its earlier generation are returned."""

    def claim(self, trainer: str, generation: int, key: str, origin: str) -> Claim:
        """The next range to train. `key` is new for every claim; `origin` is the sha256 of the trainer's anchor."""

    def measure(self, lease: Lease, sequences: int) -> Lease | Refused:
        """Say how many samples a chunk has; returns the lease with its end, cut to the length of a report."""

    def renew(self, trainer: str, generation: int, leases: Sequence[Lease], progress: Progress) -> Renewed | Refused:
        """Keep leases, and say how far training is. Called every few seconds, without leases too."""

    def report(self, report: Report) -> Reported | Refused:
        """Stage what was learned; all or nothing. Refused: go back to the anchor, the ranges are trained again."""

    def release(self, lease: Lease) -> Refused | None:
        """Return a range of which nothing was trained."""

    def leave(self, trainer: str, generation: int, failure: str | None = None) -> None:
        """End a trainer: its leases are returned, with a `failure` as failed attempts."""

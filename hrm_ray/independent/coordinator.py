"""The coordinator of parallel-independent training: it gives out ranges, takes reports and commits rounds.

It owns the ledger and decides; merging is another process's work, between `due` and `commit`, and nobody waits for it.
A plain object for any launcher: the caller's clock, no process, no tensor. Safe to call from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from statistics import median

from hrm_ray.errors import DataError, Fault
from hrm_ray.independent.calls import (
    AnchorRef,
    Claim,
    Claimed,
    Finished,
    Joined,
    News,
    Progress,
    Renewed,
    Report,
    Reported,
    Wait,
)
from hrm_ray.independent.decisions import (
    LEASE_S,
    MOST_ROUNDS_BEHIND,
    RENEW_S,
    STOOD_STILL_S,
    WAIT_S,
    Member,
    MergeEvery,
    report_updates,
    round_closes,
)
from hrm_ray.ledger import ClaimOrder, Contribution, Idle, Lease, Ledger, Refused, Round, Span
from hrm_ray.types import StopReason


@dataclass(frozen=True)
class Rules:
    """What the settings say about claims and rounds.

    `samples_per_update` are the samples of a trainer's weight update, `samples_per_step` those after which a round is
    numbered one higher (fewer, where a sample stays for several updates). `budget` are the samples of the whole run
    (None: as many as the epochs have), `epochs` the epochs (None: no limit). `within_block`: the run ends with the
    block of its first claim. `whole_weights`: reports have the weights too, so that a sole trainer's are committed to
    the bit.
    """

    samples_per_update: int
    samples_per_step: float
    merge_every: MergeEvery = "auto"
    budget: int | None = None
    epochs: int | None = None
    within_block: bool = False
    whole_weights: bool = False


@dataclass(frozen=True)
class MergeRequest:
    """A round to be merged: the anchor to start from, and the members in the order of their arrival."""

    round: int
    parent: AnchorRef
    members: tuple[Contribution, ...]
    whole: Report | None = None
    """The last report of a sole trainer, whose weights are the parent and all members' changes, to the bit."""
    samples_per_s: Mapping[str, float] = field(default_factory=dict)
    """The speeds of the trainers whose work goes into this round or the next ones (decisions.round_share)."""


@dataclass(frozen=True)
class Merged:
    """What a merge came to. `accepted` are names of members in the request's order; `rejected` and `lost` (the file is
    missing or damaged) have reasons. Without accepted members there is no new anchor (`path` is empty).

    `figures` are those of the held-out data, empty where there is none; `seconds` all that it took. `copied`: the
    anchor is the weights of the request's whole report, to the bit. `warnings` are for people.
    """

    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    lost: Mapping[str, str]
    path: str
    sha256: str
    figures: Mapping[str, float]
    seconds: float
    copied: bool = False
    warnings: tuple[str, ...] = ()


@dataclass
class TrainerState:
    """What is known of a trainer, for displays and to decide when rounds close: when it was heard of, how long its
    last report and an update of it took, its speed in that, when it joined, its reports and how many were rejected, and
    those that it was not told of."""

    generation: int
    seen_s: float
    progress: Progress | None = None
    duration_s: float = 0.0
    update_s: float = 0.0
    samples_per_s: float = 0.0
    joined_s: float = 0.0
    reports: int = 0
    rejected: list[str] = field(default_factory=list)
    rejections: int = 0
    rejected_in_row: int = 0
    """Reports that the guard rejected since it took one."""
    rejected_by_guard: int = 0
    """All reports that the guard rejected."""


class Stale(Exception):
    """Undoes the transaction of a report that is refused."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused


class LedgerCoordinator:
    """`calls.Coordinator`, and what the process that holds it does between the calls: `tick`, `due`, `commit`."""

    def __init__(
        self,
        ledger: Ledger,
        anchor: AnchorRef,
        rules: Rules,
        order: ClaimOrder,
        clock: Callable[[], float],
        *,
        renew_every_s: float = RENEW_S,
    ) -> None:
        """`anchor` is that of the ledger's head, or of the start. `clock` is monotonic, in seconds."""
        self.renew_every_s = renew_every_s
        self.ledger = ledger
        self.anchor = anchor
        self.rules = rules
        self.trainers: dict[str, TrainerState] = {}
        self.stop: StopReason | None = None
        self.merging: MergeRequest | None = None
        self.report_updates = report_updates(rules.merge_every, None)
        self._origins = {anchor.sha256, *(one.checksum for one in ledger.lineage())}
        self._order = order
        self._block: int | None = None
        self._clock = clock
        self._closed_s = self._awake_s = clock()
        self._last_reporters: frozenset[str] = frozenset()
        self._reports: dict[str, Report] = {}
        self._lock = threading.RLock()

    def join(self, trainer: str) -> Joined | Refused:
        with self._lock:
            if self.stop is not None or self.finished:
                return Refused("the run ends: no trainer joins it any more")
            generation = self.ledger.start_worker(trainer)
            now_s = self._clock()
            self.trainers[trainer] = TrainerState(generation, now_s, joined_s=now_s)
            return Joined(
                trainer,
                generation,
                self._news(trainer),
                self.report_updates,
                self.renew_every_s,
                self.rules.whole_weights,
            )

    def claim(self, trainer: str, generation: int, key: str, origin: str) -> Claim:
        with self._lock:
            if origin not in self._origins:
                return Refused(f"the weights of trainer {trainer} come from no anchor of this run")
            state = self._seen(trainer, generation)
            if isinstance(state, Refused):
                return state
            if self.stop is not None or self.finished:
                return Finished(self._news(trainer))
            left = self._left()
            if left is not None and left <= 0:
                return Wait(WAIT_S, self._news(trainer))
            given = self.ledger.claim(
                trainer,
                generation,
                self._allowed,
                epochs=self.rules.epochs,
                now_s=self._now_s(),
                lease_s=LEASE_S,
                key=key,
            )
            if isinstance(given, Refused):
                return given
            if given is Idle.DONE:
                return Finished(self._news(trainer))
            if isinstance(given, Idle):
                return Wait(WAIT_S, self._news(trainer))
            if self.rules.within_block and self._block is None:
                self._block = given.block
            cut = self._cut(given, left)
            return cut if isinstance(cut, Refused) else Claimed(cut, self._news(trainer))

    def measure(self, lease: Lease, sequences: int) -> Lease | Refused:
        with self._lock:
            self.ledger.measure(lease.chunk, sequences)
            held = self._current(lease)
            if isinstance(held, Refused) or held.end is None:
                return held
            left = self._left()
            # The lease itself is counted as given out since it was measured.
            left = None if left is None else left + held.end - held.start
            if left is not None and left <= 0:
                self.ledger.release(held)
                return Refused("the rest of the run's samples was given to others meanwhile")
            return self._cut(held, left)

    def renew(self, trainer: str, generation: int, leases: Sequence[Lease], progress: Progress) -> Renewed | Refused:
        with self._lock:
            state = self._seen(trainer, generation)
            if isinstance(state, Refused):
                return state
            state.progress = progress
            now_s = self._now_s()
            renewed = [self.ledger.renew(lease, now_s, LEASE_S) for lease in leases]
            return Renewed(tuple(one for one in renewed if isinstance(one, Lease)), self._news(trainer))

    def report(self, report: Report) -> Reported | Refused:
        with self._lock:
            state = self._seen(report.trainer, report.generation)
            if isinstance(state, Refused):
                return state
            if report.base.sha256 not in self._origins:
                return Refused(f"report {report.name} comes from no anchor of this run")
            if self.ledger.contribution(report.name) is None:
                behind = self._rounds_since(report.base)
                if behind > MOST_ROUNDS_BEHIND:
                    return Refused(f"report {report.name} comes from an anchor that is {behind} rounds old")
                try:
                    self._stage(report)
                except Stale as stale:
                    return stale.refused
                self._reports[report.name] = report
                state.reports += 1
                state.duration_s = report.seconds
                if report.updates:
                    state.update_s = report.seconds / report.updates
                if report.seconds > 0:
                    state.samples_per_s = sum(span.end - span.start for span in report.spans) / report.seconds
            return Reported(tuple(self.ledger.leases(report.trainer)), self.report_updates, self._news(report.trainer))

    def release(self, lease: Lease) -> Refused | None:
        with self._lock:
            return self.ledger.release(lease)

    def leave(self, trainer: str, generation: int, failure: str | None = None) -> None:
        with self._lock:
            self.ledger.stop_worker(trainer, generation, failure)
            state = self.trainers.get(trainer)
            if state is not None and state.generation == generation:
                del self.trainers[trainer]

    def lost(self, trainer: str, failure: str) -> None:
        """A trainer's process has ended without leaving."""
        state = self.trainers.get(trainer)
        if state is not None:
            self.leave(trainer, state.generation, failure)

    @property
    def finished(self) -> bool:
        """Whether everything that the run shall learn is merged (or quarantined)."""
        with self._lock:
            budget, epochs = self.rules.budget, self.rules.epochs
            if budget is not None and self.anchor.total_sequences >= budget:
                return True
            if self._block is not None and not self.ledger.staged() and not self.ledger.any_leased():
                # Whether trainers are there does not count: one that was lost is started again.
                return not self.ledger.has_more(self._allowed, epochs)
            return epochs is not None and self.ledger.epoch >= epochs

    def tick(self) -> list[str]:
        """Take back leases that have expired; returns the trainers that were not heard of since, which are dropped.
        To be called far more often than a lease lasts."""
        with self._lock:
            now_s = self._now_s()
            self.ledger.expire(now_s)
            silent = [name for name, state in self.trainers.items() if now_s - state.seen_s >= LEASE_S]
            for name in silent:
                self.lost(name, "nothing was heard of it for the length of a lease")
            return silent

    def due(self) -> MergeRequest | None:
        """The round to merge now, if any; then `commit` must follow, or `abandon`."""
        with self._lock:
            if self.merging is not None:
                return None
            staged = self.ledger.staged()
            members = [self._member(one) for one in staged]
            # The next reports may have more updates than the last ones.
            durations = {
                name: state.update_s * self.report_updates if state.update_s else state.duration_s
                for name, state in self.trainers.items()
                if state.duration_s
            }
            # A first report takes from when its trainer joined. The median: one that joins over and over delays none.
            joined_s = [state.joined_s for state in self.trainers.values()]
            since_s = max(self._closed_s, median(joined_s)) if joined_s else self._closed_s
            idle = bool(staged) and self._nobody_reports()
            if not round_closes(
                members,
                frozenset(self.trainers),
                durations,
                since_s,
                self._clock(),
                at_end=self.rules.merge_every == "end",
                idle=idle,
            ):
                return None
            total = self.anchor.total_sequences + sum(one.sequences for one in staged)
            number = max(self.anchor.round + 1, int(total / self.rules.samples_per_step))
            self.merging = MergeRequest(
                number, self.anchor, tuple(staged), self._whole(staged), self._team_speeds(staged)
            )
            return self.merging

    def commit(self, request: MergeRequest, merged: Merged) -> Round | None:
        """Make the merged anchor the head, in one transaction; returns the round, None where no member was taken."""
        with self._lock:
            made: Round | None = None
            for name, reason in merged.lost.items():
                self.ledger.reject(name, reason, lost=True)
            if merged.accepted:
                parent = self.ledger.round(request.parent.round)
                answer = self.ledger.commit(
                    request.round,
                    parent=None if parent is None else parent.round,
                    accepted=merged.accepted,
                    anchor=merged.path,
                    checksum=merged.sha256,
                    rejected=merged.rejected,
                )
                if isinstance(answer, Refused):
                    hint = "End what else writes there, then use --resume"
                    raise DataError(Fault(f"round {request.round}", f"was not committed: {answer.reason}", hint))
                made = answer
                copied = request.whole.name if request.whole is not None and merged.copied else None
                self.anchor = AnchorRef(made.round, made.anchor, made.checksum, made.total_sequences, copied)
                self._origins.add(made.checksum)
            else:
                for name, reason in merged.rejected.items():
                    self.ledger.reject(name, reason)
            for member in request.members:
                self._reports.pop(member.name, None)
                state = self.trainers.get(member.worker)
                if state is None:
                    continue
                if member.name in merged.accepted:
                    state.rejected_in_row = 0
                    continue
                state.rejected.append(member.name)
                state.rejections += 1
                if member.name in merged.rejected:
                    state.rejected_in_row += 1
                    state.rejected_by_guard += 1
            self._closed_s = self._clock()
            self._last_reporters = frozenset(member.worker for member in request.members)
            self.merging = None
            paces = [state.update_s for state in self.trainers.values() if state.update_s]
            update_s = median(paces) if paces else 0.0
            self.report_updates = report_updates(
                self.rules.merge_every, self.report_updates, merged.seconds, update_s, len(self.trainers)
            )
            return made

    def abandon(self) -> None:
        """The merge that was due has failed: its members stay staged."""
        with self._lock:
            self.merging = None

    def reported(self, name: str) -> Report | None:
        """A staged report; None where the coordinator was started since."""
        return self._reports.get(name)

    def _stage(self, report: Report) -> None:
        """Cut the leases to what was trained and stage the contribution: all of it, or Stale is raised."""
        ledger = self.ledger
        base = report.base.round if ledger.round(report.base.round) is not None else None
        with ledger.database.transaction():
            learned: list[Lease] = []
            skipped: list[Lease] = []
            used = 0
            for lease in report.leases:
                held = _valid(self._current(lease))
                if held.end is None:
                    raise Stale(Refused(f"chunk {held.chunk} is reported before it was measured"))
                own = [span for span in report.spans if (span.epoch, span.chunk) == (held.epoch, held.chunk)]
                own = [span for span in own if held.start <= span.start < span.end <= held.end]
                used += len(own)
                for done, skips in self._trained(report, held, own):
                    (skipped if skips else learned).append(done)
            if used < sum(span.start < span.end for span in report.spans):
                raise Stale(Refused(f"report {report.name} has samples outside its leases"))
            if not learned and not skipped:
                raise Stale(Refused(f"report {report.name} has no trained samples"))
            made = ledger.report(
                report.name, learned, skipped=skipped, base=base, path=report.path, checksum=report.sha256
            )
            if isinstance(made, Refused):
                raise Stale(made)

    def _trained(self, report: Report, lease: Lease, spans: Sequence[Span]) -> list[tuple[Lease, bool]]:
        """The leases of exactly `spans`, each with whether it was skipped; the rest is leased again, or returned."""
        if lease.start == lease.end:
            return [(lease, False)]  # a chunk without samples
        found: list[tuple[Lease, bool]] = []
        rest: Lease | None = lease
        for number, span in enumerate(spans, 1):
            if rest is None or span.start != rest.start:
                raise Stale(Refused(f"report {report.name} leaves a gap in chunk {lease.chunk} at {span.start}"))
            if span.end == rest.end:
                found.append((rest, span.skipped))
                rest = None
                continue
            first = _valid(self.ledger.split(rest, span.end))
            found.append((first, span.skipped))
            rest = None
            if number < len(spans) or report.keeps:
                trainer, now_s = (report.trainer, report.generation), self._clock()
                rest = _valid(self.ledger.claim_at(*trainer, first, span.end, now_s=now_s, lease_s=LEASE_S))
        if rest is not None and not report.keeps:
            self.ledger.release(rest)
        return found

    def _current(self, lease: Lease) -> Lease | Refused:
        """A lease as it is in the ledger, if it is still that one."""
        held = self.ledger.lease_at(lease.epoch, lease.chunk, lease.start)
        fence = (lease.worker, lease.generation, lease.attempt)
        if held is None or (held.worker, held.generation, held.attempt) != fence:
            return Refused(f"attempt {lease.attempt} of {lease.worker} at chunk {lease.chunk} is over")
        return held

    def _cut(self, lease: Lease, left: int | None) -> Lease | Refused:
        """The lease without what is beyond a report's length, or beyond the samples that are `left` to give out."""
        if lease.end is None:
            return lease
        most = self.report_updates * self.rules.samples_per_update
        end = lease.start + (most if left is None else min(most, left))
        if lease.start < end < lease.end:
            return self.ledger.split(lease, end)
        return lease

    def _left(self) -> int | None:
        """Samples that may still be given out; None without a limit."""
        if self.rules.budget is None:
            return None
        return self.rules.budget - self.anchor.total_sequences - self.ledger.outstanding()

    def _allowed(self, epoch: int, position: int) -> int | None:
        """The order of claims, which ends with the block of the first one where the rules say so."""
        chunk = self._order(epoch, position)
        if chunk is None or self._block is None:
            return chunk
        return chunk if self.ledger.block_of(chunk).block == self._block else None

    def _nobody_reports(self) -> bool:
        """Whether no report can come before another round: nothing is leased, and nothing could be."""
        if self.ledger.any_leased():
            return False
        left = self._left()
        # Trainers that are away come back, unless the run stops.
        if (self.stop is not None and not self.trainers) or (left is not None and left <= 0):
            return True
        return not self.ledger.has_more(self._allowed, self.rules.epochs)

    def _team_speeds(self, staged: Sequence[Contribution]) -> dict[str, float]:
        """The speeds of the trainers in this round, in the one before, and of those that have something to train: one
        that only waits for ranges takes no part."""
        team = {one.worker for one in staged} | self._last_reporters
        team |= {name for name in self.trainers if self.ledger.leases(name)}
        return {name: self.trainers[name].samples_per_s if name in self.trainers else 0.0 for name in sorted(team)}

    def _whole(self, staged: Sequence[Contribution]) -> Report | None:
        """The last of the staged reports, where they follow each other from the anchor on and have their weights."""
        before = self.anchor.copy_of
        report: Report | None = None
        for one in staged:
            report = self._reports.get(one.name)
            if report is None or report.weights_path is None:
                return None
            from_anchor = report.follows is None and report.base.sha256 == self.anchor.sha256 and one is staged[0]
            if not from_anchor and (report.follows is None or report.follows != before):
                return None
            before = report.name
        return report

    def _rounds_since(self, anchor: AnchorRef) -> int:
        """How many rounds were committed after that of an anchor; one more than is looked for, where there are more."""
        newest = islice(self.ledger.lineage(), MOST_ROUNDS_BEHIND + 1)
        return sum(1 for _ in takewhile(lambda one: one.round > anchor.round, newest))

    def _member(self, staged: Contribution) -> Member:
        report = self._reports.get(staged.name)
        seconds, updates = (0.0, 0) if report is None else (report.seconds, report.updates)
        return Member(staged.name, staged.worker, staged.sequences, seconds, updates, staged.generation)

    def _news(self, trainer: str) -> News:
        state = self.trainers.get(trainer)
        rejected: tuple[str, ...] = ()
        if state is not None:
            rejected, state.rejected = tuple(state.rejected), []
        staged = self.ledger.staged()
        unmerged = self.rules.merge_every != "end" and any(one.worker == trainer for one in staged)
        return News(self.anchor, rejected, self.stop, sum(one.sequences for one in staged), unmerged)

    def _now_s(self) -> float:
        """The clock. Where nothing was asked of this process for long, it stood still itself (Ctrl-Z, a paused
        machine), and trainers were silent because nobody answered them: their leases last on from now."""
        now_s = self._clock()
        if now_s - self._awake_s > STOOD_STILL_S:
            for name, state in self.trainers.items():
                state.seen_s = now_s
                for lease in self.ledger.leases(name):
                    self.ledger.renew(lease, now_s, LEASE_S)
        self._awake_s = now_s
        return now_s

    def _seen(self, trainer: str, generation: int) -> TrainerState | Refused:
        state = self.trainers.get(trainer)
        if state is None or state.generation != generation:
            return Refused(f"generation {generation} of trainer {trainer} is over")
        state.seen_s = self._now_s()
        return state


def _valid(answer: Lease | Refused) -> Lease:
    if isinstance(answer, Refused):
        raise Stale(answer)
    return answer

"""A block trainer: the ordinary training loop over ranges that it claims, between anchors that others make.

It keeps `snap`, the weights that its open work began with. A report is weights - snap; a newer anchor is laid in place
between two steps. It waits for nobody but the coordinator's answers, and merges nothing itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from hrm_ray.errors import DataError
from hrm_ray.independent.bundle_files import BundleFiles, SharedFiles
from hrm_ray.independent.calls import (
    AnchorRef,
    Claimed,
    Coordinator,
    Finished,
    Joined,
    News,
    Progress,
    Report,
    Reported,
    Wait,
)
from hrm_ray.independent.weights import ExpertTokens, SharedWeights
from hrm_ray.ledger import Lease, Refused, Span
from hrm_ray.metrics.meters import Throughput
from hrm_ray.rundir import RunDir
from hrm_ray.train.checkpoint import load_checkpoint, save_checkpoint
from hrm_ray.train.claimed_loader import ClaimedLoader
from hrm_ray.train.loop import SAMPLES, StepReport, TrainingLoop
from hrm_ray.train.metric_logger import MetricLogger
from hrm_ray.types import MetricSink, Record, StopReason

NEWCOMER_STEPS = 20
"""Weight updates over which a trainer without optimizer state that joins in mid-run warms up."""
SAVE_STATE_EVERY_S = 60.0
"""A trainer's optimizer state is saved at a report when the last time is so long ago, and when it leaves."""
HEAR_EVERY_S = 1.0
"""Between two steps the coordinator is asked for news so often at least: a stop, or a newer anchor."""
HEAR_OF_REPORT_EVERY_S = 0.1
"""The same while a report of the trainer waits for its round."""
MOST_OPEN_REPORTS = 4
"""A trainer whose last report waits for a round trains on, and reports again at the latest when it has so many times
the updates of a report."""

_Key: TypeAlias = tuple[int, int, int, int]


def _key(lease: Lease) -> _Key:
    return lease.epoch, lease.chunk, lease.start, lease.attempt


@dataclass
class OpenWork:
    """What was trained since the last report."""

    since_s: float
    updates: int = 0
    """Steps, those whose update was skipped too."""
    samples: int = 0
    """Samples of applied updates."""
    tokens: int = 0


class _LastLoss:
    """A sink that keeps the losses of the training records it passes on."""

    def __init__(self, sink: MetricSink | None) -> None:
        self._sink = sink
        self.losses: list[float] = []

    def write(self, record: Record) -> None:
        loss = record.values.get("loss", record.values.get("objective"))
        if record.kind == "train" and isinstance(loss, float):
            self.losses.append(loss)
        if self._sink is not None:
            self._sink.write(record)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()


class BlockTrainer:
    """Trains what the coordinator gives it, until that says that the run ends."""

    def __init__(
        self,
        name: str,
        loop: TrainingLoop,
        run_dir: RunDir,
        coordinator: Coordinator,
        *,
        samples_per_update: float,
        log_every: int = 1,
        sink: MetricSink | None = None,
        files: BundleFiles | None = None,
        begins_from: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`loop` has a ClaimedLoader; the trainer closes it. `samples_per_update`: samples after which
        the clock of the learning rate is one further (assembly.samples_per_step). `sink` gets the records of this
        trainer. `files` are those below `run_dir`. `begins_from`: the checkpoint of a strategy whose optimizer state it
        begins with where it has none of its own."""
        loader = loop.parts.loader
        if not isinstance(loader, ClaimedLoader):
            raise TypeError("a block trainer's loop has a ClaimedLoader")
        self.name, self.loop, self.loader, self.run_dir = name, loop, loader, run_dir
        self.coordinator = coordinator
        self._files = files or SharedFiles(run_dir)
        loop.clock.samples_per_update = samples_per_update
        self._per_update = samples_per_update
        self._log_every = log_every
        self._losses = _LastLoss(sink)
        self.logger = MetricLogger(loop, self._losses)
        self._clock, self._sleep = clock, sleep
        self._weights, self._expert_tokens = SharedWeights(loop), ExpertTokens(loop)
        self._speed = Throughput(clock=clock)
        self._base_rates = loop.parts.lr_schedule.lr, loop.parts.lr_schedule.puzzle_emb_lr
        self._warm_up_left = 0
        self._restored = self._load_state(begins_from)
        self._state_saved_s = clock()
        self._work = OpenWork(clock())
        self._reports = 0
        self._chain: list[str] = []
        """Own reports since the last anchor was laid in place, each trained on from the one before."""
        # What the thread that renews leases reads and writes too, inside the lock: every call of the coordinator.
        self._calling = threading.Lock()
        self._held: tuple[Lease, ...] = ()
        self._lost: set[_Key] = set()
        self._rejected: set[str] = set()
        self._over = False
        """Whether the coordinator has ended this generation of the trainer."""
        self._renewal_error: Exception | None = None
        self._joined: Joined
        self._news: News
        self._anchor: AnchorRef
        self._report_updates = 1
        self._unread: Lease | None = None
        """Claimed, and not given to the loader yet."""
        self._ask_again_s = clock()
        self._heard_s = clock()
        self._finished = False

    def run(self) -> StopReason:
        """Train until the coordinator says that everything is trained, or that the run stops."""
        try:
            ended = self.join()
            with self._renewing():
                while ended is None:
                    ended = self.turn()
            return ended
        finally:
            self.loader.close()
            self._losses.close()

    def join(self) -> StopReason | None:
        """Begin a generation of this trainer at the newest anchor; a reason where the run ends already."""
        with self._calling:
            joined = self.coordinator.join(self.name)
            if isinstance(joined, Refused):
                return StopReason.FINISHED
            self._joined, self._news, self._report_updates = joined, joined.news, joined.report_updates
            self._held, self._over = (), False
            self._lost.clear()
            self._rejected.clear()
        self._unread = None
        self._ask_again_s = self._clock()
        self._begin_from_anchor(())
        if not self._restored and not self._reports and self._sequences() > 0:
            self._warm_up_left = NEWCOMER_STEPS
        return None

    def turn(self) -> StopReason | None:
        """What lies between two steps, and a step; the reason when the trainer has left."""
        self.loop.activity.progressed()
        if self._renewal_error is not None:
            raise self._renewal_error
        if self._clock() - self._heard_s >= (HEAR_OF_REPORT_EVERY_S if self._news.unmerged else HEAR_EVERY_S):
            self.renew()
        self._drop_lost()
        if self._over:
            return self.join()
        if self._news.stop is not None:
            return self._leave(self._news.stop)
        self._lay_newer_anchor()
        self._fill_loader()
        if self._over:
            return None
        if self.loader.left or (self.loop.parts.carried and self.loop.carries is not None):
            step = self._step()
            if step is not None:
                waits = MOST_OPEN_REPORTS if self._news.unmerged else 1
                if self._work.updates >= waits * self._report_updates:
                    self._report()
                return None
        if self._work.updates or self._emptied():
            self._report()
        elif self._finished:
            return self._leave(StopReason.FINISHED)
        else:
            self._sleep(max(0.0, self._ask_again_s - self._clock()))
        return None

    def renew(self) -> None:
        """Keep the leases, and hear what is new; between two turns, or from another thread."""
        with self._calling:
            if self._over:
                return
            answer = self.coordinator.renew(self.name, self._joined.generation, self._held, self._progress())
            if isinstance(answer, Refused):
                self._over = True
                return
            kept = {_key(lease) for lease in answer.leases}
            self._lost |= {_key(lease) for lease in self._held} - kept
            self._hear(answer.news)

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """Inside, a thread renews the leases: a step, or the reading of a chunk, may take longer than they last."""
        ended = threading.Event()

        def renew_on() -> None:
            while not ended.wait(self._joined.renew_every_s):
                try:
                    self.renew()
                except Exception as error:  # noqa: BLE001 - raised again between two steps, whatever it is
                    self._renewal_error = error
                    return

        thread = threading.Thread(target=renew_on, name="renewals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _hear(self, news: News) -> None:
        """Keep what an answer said; call it while holding the lock, so that news come in their order."""
        self._heard_s = self._clock()
        self._news = news
        self._rejected |= set(news.rejected)

    def _step(self) -> StepReport | None:
        """One step at the clock's present position."""
        loop, schedule = self.loop, self.loop.parts.lr_schedule
        loop.clock.position = (self._sequences() + self._work.samples) / self._per_update
        warmed = 1.0
        if self._warm_up_left:
            warmed = (NEWCOMER_STEPS - self._warm_up_left + 1) / (NEWCOMER_STEPS + 1)
        lr, puzzle_emb_lr = self._base_rates
        loop.parts.lr_schedule = replace(schedule, lr=lr * warmed, puzzle_emb_lr=puzzle_emb_lr * warmed)
        loop.activity.step = loop.progress.step + 1
        with loop.activity.doing("step" if loop.trained else "first step", then="records"):
            report = loop.step()
        if report is None:
            return None
        self._warm_up_left -= report.applied and self._warm_up_left > 0
        work = self._work
        work.updates += 1
        taken = round(report.totals[SAMPLES])
        self._speed.add(taken)
        if report.applied:
            work.samples += taken
            work.tokens += round(report.totals.get("tokens", 0.0))
        self.logger.observe(report)
        if report.applied and (loop.progress.step % self._log_every == 0 or loop.progress.step == 1):
            self.logger.train()
        return report

    def _sequences(self) -> int:
        """Samples that the anchor has learned, and those of all reports that wait for a round."""
        return self._news.anchor.total_sequences + self._news.staged_sequences

    def _fill_loader(self) -> None:
        """Claim the next range while the loader has rows, and give it to the loader before these are too few."""
        batch = self.loop.parts.shape.effective
        ahead = batch * max(2, self._report_updates // 4)
        while not self._over:
            if self._unread is None and not self._claim_below(ahead):
                return
            if self._unread is not None:
                if self.loader.left >= batch and not self.loader.rows.is_read(self._unread):
                    return
                self._measure(self._unread)

    def _claim_below(self, rows: int) -> bool:
        """Claim a range where the loader has fewer rows than that; whether there is one now."""
        if self._finished or self.loader.left >= rows or self._clock() < self._ask_again_s:
            return False
        with self._calling:
            key = f"{self.name}-{self._joined.generation}-{secrets.token_hex(8)}"
            answer = self.coordinator.claim(self.name, self._joined.generation, key, self._anchor.sha256)
            if isinstance(answer, Refused):
                self._over = True
                return False
            self._hear(answer.news)
            if isinstance(answer, Claimed):
                self._held = (*self._held, answer.lease)
                self._unread = answer.lease
        if isinstance(answer, Wait):
            self._ask_again_s = self._clock() + answer.after_s
        self._finished = isinstance(answer, Finished)
        if self._unread is not None:
            self.loader.rows.read_ahead(self._unread)
        return self._unread is not None

    def _measure(self, lease: Lease) -> None:
        """Give a range that was claimed to the loader, as soon as its chunk is read."""
        with self.loop.activity.doing("data"):
            sequences = self.loader.rows.sequences(lease)
        self._unread = None
        measured: Lease | Refused = lease
        with self._calling:
            if lease.end is None:
                measured = self.coordinator.measure(lease, sequences)
            others = tuple(one for one in self._held if _key(one) != _key(lease))
            self._held = others if isinstance(measured, Refused) else (*others, measured)
        if isinstance(measured, Lease):
            self.loader.add(measured)

    def _drop_lost(self) -> None:
        """Forget ranges that were taken back; where one of them was trained, so is all open work."""
        if not self._lost:
            return
        with self._calling:
            lost, self._lost = self._lost, set()
            gone = [lease for lease in self._held if _key(lease) in lost]
            self._held = tuple(lease for lease in self._held if _key(lease) not in lost)
        if self._unread is not None and _key(self._unread) in lost:
            self._unread = None
        if gone:
            # Simpler than taking a range out of what is open, and it happens only after a lease's length of silence.
            self._begin_from_anchor(self._held)

    def _lay_newer_anchor(self) -> None:
        """Lay the newest anchor in place, and drop what was rejected of the trainer's own reports."""
        anchor = self._news.anchor
        rejected, self._rejected = self._rejected, set()
        if anchor.sha256 == self._anchor.sha256 and not rejected:
            return
        if anchor.copy_of is not None and anchor.copy_of in self._chain and not rejected.intersection(self._chain):
            # The weights are this anchor and what was trained since, and a + (w - a) is not w in floating point.
            self._anchor = anchor
            self._chain = self._chain[self._chain.index(anchor.copy_of) :]
            return
        self._lay(keep_open_work=self._work.updates > 0)

    def _lay(self, *, keep_open_work: bool) -> None:
        with self.loop.activity.doing("data"):
            self._lay_newest(keep_open_work=keep_open_work)

    def _lay_newest(self, *, keep_open_work: bool) -> None:
        anchor = self._news.anchor
        while True:
            try:
                self._weights.lay(self._files.fetch(anchor.path), anchor.sha256, keep_open_work=keep_open_work)
                break
            except DataError:
                # It may be deleted by now, because there are newer ones, also while it was fetched.
                self.renew()
                if self._news.anchor.sha256 == anchor.sha256:
                    raise
                anchor = self._news.anchor
        self._anchor = anchor
        self._chain = []

    def _begin_from_anchor(self, leases: Sequence[Lease]) -> None:
        """Drop all open work: the weights are the newest anchor, and `leases` are trained from their starts."""
        self._lay(keep_open_work=False)
        self.loop.carries = None
        self._work = OpenWork(self._clock())
        self._expert_tokens.reset()
        unread = self._unread
        self.loader.replace(lease for lease in leases if unread is None or _key(lease) != _key(unread))

    def _emptied(self) -> bool:
        """Whether a chunk without samples is held, which is reported too."""
        return any(lease.start == lease.end for lease in self._held) and not self.loader.left

    def _report(self, *, keeps: bool = True) -> None:
        """Write what was learned since the last report, and say so; a refusal drops it."""
        self._drain()
        self.logger.train()
        spans, leases = self._trained()
        if not leases:
            return
        work, folder = self._work, self.run_dir.independent
        name = f"{self.name}-{self._joined.generation}-{self._reports + 1}"
        path = self._relative(folder.new_contribution(name))
        weights_path: str | None = None
        weights_checksum: str | None = None
        with self.loop.activity.doing("checkpoint"):
            checksum = self._weights.save_change(self.run_dir.root / path, self._expert_tokens.by_tensor())
            self._files.deliver(path)
            if self._joined.whole_weights:
                weights_path = self._relative(folder.new_contribution(f"{name}.weights"))
                weights_checksum = self._weights.save_weights(self.run_dir.root / weights_path)
                self._files.deliver(weights_path)
        losses = self._losses.losses
        report = Report(
            name=name,
            trainer=self.name,
            generation=self._joined.generation,
            base=self._anchor,
            path=path,
            sha256=checksum,
            leases=leases,
            spans=spans,
            updates=work.updates,
            tokens=work.tokens,
            loss=fmean(losses) if losses else 0.0,
            seconds=self._clock() - work.since_s,
            keeps=keeps,
            weights_path=weights_path,
            weights_sha256=weights_checksum,
            follows=self._chain[-1] if self._chain else None,
        )
        with self._calling:
            answer = self.coordinator.report(report)
            if isinstance(answer, Reported):
                self._hear(answer.news)
                self._held, self._report_updates = answer.rest, answer.report_updates
        self._reports += 1
        if isinstance(answer, Refused):
            self._files.remove(path)
            if weights_path is not None:
                self._files.remove(weights_path)
            self._over = True
            return
        self._weights.take_snap()
        self._expert_tokens.reset()
        self._chain.append(name)
        self._losses.losses = losses[-1:]
        self._work = OpenWork(self._clock())
        unread = self._unread
        rest = [lease for lease in self._held if unread is None or _key(lease) != _key(unread)]
        self.loader.replace(rest)
        self.loader.rows.keep(self._held)
        if self._clock() - self._state_saved_s >= SAVE_STATE_EVERY_S:
            self._save_state()

    def _trained(self) -> tuple[tuple[Span, ...], tuple[Lease, ...]]:
        """What was trained since the last report, and the leases that it lies in."""
        taken = self.loader.taken()
        used = {_key(one.lease) for one in taken}
        # A chunk without samples is reported too, with what was trained beside it.
        leases = tuple(lease for lease in self._held if _key(lease) in used or lease.start == lease.end)
        lease_of = {_key(lease): lease for lease in leases}
        if used - lease_of.keys():
            raise RuntimeError(f"trainer {self.name} has trained ranges that it does not hold")
        spans = tuple(Span(o.lease.epoch, o.lease.chunk, o.start, o.end, o.skipped) for o in taken)
        return spans, leases

    def _drain(self) -> None:
        """In carried supervision: train the running rows until the last has halted."""
        if not self.loop.parts.carried or self.loop.carries is None:
            return
        self.loader.draining = True
        try:
            while self._step() is not None:
                self._lay_newer_anchor()  # draining may take longer than several rounds
        finally:
            self.loader.draining = False

    def _leave(self, reason: StopReason) -> StopReason:
        """Report what is open, return the rest, save the optimizer's state and leave."""
        self._report(keeps=False)
        self._save_state()  # the other thread speaks for this one meanwhile, however long the disk takes
        with self._calling:
            held, self._held = self._held, ()
            for lease in held:
                self.coordinator.release(lease)
            self.coordinator.leave(self.name, self._joined.generation)
            self._over = True
        return reason

    def _progress(self) -> Progress:
        losses = self._losses.losses
        chunk = self._held[0].chunk if self._held else None
        loss = losses[-1] if losses else 0.0
        rate = self._speed.per_s() or 0.0
        activity = self.loop.activity
        return Progress(self.loop.progress.step, self._work.samples, rate, loss, chunk, activity.marks, activity.phase)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.run_dir.root).as_posix()

    @property
    def _folder(self) -> RunDir:
        """This trainer's own folder, in the form of a bundle's."""
        return RunDir(self.run_dir.independent.trainer(self.name))

    def _save_state(self) -> None:
        """Save the optimizer's state and the counters, by the rules of a run's checkpoints."""
        self._folder.root.mkdir(parents=True, exist_ok=True)
        with self.loop.activity.doing("checkpoint"):
            save_checkpoint(self.loop, self._folder, {}, 1)
            self._files.deliver_state(self.name)
        self._state_saved_s = self._clock()

    def _load_state(self, begins_from: Path | None) -> bool:
        """Restore the state of this trainer's earlier generation, else that of `begins_from`; whether there was one."""
        folder = self._folder.newest_whole_checkpoint() or begins_from
        if folder is None:
            return False
        try:
            load_checkpoint(self.loop, folder)
        except DataError as error:
            message = f"trainer {self.name} begins without its optimizer's state: {error.faults[0].reason}"
            self.logger.event("WARNING", message)
            return False
        return True

"""The coordinator, simulated with faults: what goes wrong costs time, never a sequence; and each safeguard that is left
out shows. The last anchor of a run is the audit, not the ledger's own word."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from hrm_ray.independent.calls import AnchorRef, Claimed, Joined, Report, Reported
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, Rules
from hrm_ray.ledger import BlockLength, Lease, Span, open_ledger
from tests.support.coordinator_simulation import Outcome, simulate
from tests.support.weak_ledgers import Weakness


def outcomes(folder: Path, seeds: range, weakness: Weakness = Weakness.NONE) -> dict[int, Outcome]:
    return {seed: simulate(folder / f"{seed}.sqlite", seed, weakness) for seed in seeds}


def broken(found: dict[int, Outcome]) -> dict[int, Outcome]:
    return {seed: outcome for seed, outcome in found.items() if not outcome.holds}


def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path) -> None:
    assert broken(outcomes(tmp_path, range(1000, 1050))) == {}


@pytest.mark.slow
def test_a_thousand_runs(tmp_path: Path) -> None:
    found = outcomes(tmp_path, range(1000))
    assert broken(found) == {}
    suffered = sum((outcome.faults for outcome in found.values()), Counter[str]())
    assert min(suffered.values()) > 10 and len(suffered) == 15, suffered


@pytest.mark.parametrize("weakness", [weakness for weakness in Weakness if weakness is not Weakness.NONE])
def test_the_simulation_can_fail(tmp_path: Path, weakness: Weakness) -> None:
    assert len(broken(outcomes(tmp_path, range(30), weakness))) >= 5


def test_a_trainer_four_times_slower_neither_stalls_nor_starves_anybody(tmp_path: Path) -> None:
    """Four trainers on a virtual clock: nobody waits for the slow one, and its reports are merged too."""
    clock, chunks, rows, every = 0.0, 40, 16, 4
    with closing(open_ledger(tmp_path / "ledger.sqlite", durable=False)) as ledger:
        ledger.add_blocks([BlockLength(0, chunks)])
        ledger.end_data()
        for chunk in range(chunks):
            ledger.measure(chunk, rows)
        start = AnchorRef(0, "a", "a", 0)
        rules = Rules(1, 1, merge_every=every, epochs=1)
        coordinator = LedgerCoordinator(ledger, start, rules, lambda epoch, place: place, lambda: clock)
        pace_s = {"slow": 4.0, "one": 1.0, "two": 1.0, "three": 1.0}
        generations: dict[str, int] = {}
        held: dict[str, Lease] = {}
        ready_s = dict.fromkeys(pace_s, 0.0)
        waited_s, learned, merged_of = dict.fromkeys(pace_s, 0.0), Counter[tuple[int, int]](), Counter[str]()
        for name in pace_s:
            joined = coordinator.join(name)
            assert isinstance(joined, Joined)
            generations[name] = joined.generation
        for number in count():
            name = min(ready_s, key=lambda each: ready_s[each])
            clock = ready_s[name]
            if name in held:
                lease = held.pop(name)
                said, end = f"{name}-{generations[name]}-{number}", lease.end or 0
                span = Span(lease.epoch, lease.chunk, lease.start, end, False)
                seconds = pace_s[name] * (end - lease.start)
                at = (said, name, generations[name], coordinator.anchor, said, said, (lease,), (span,))
                assert isinstance(coordinator.report(Report(*at, end - lease.start, 1, 1.0, seconds)), Reported)
                learned.update((lease.chunk, row) for row in range(lease.start, end))
            request = coordinator.due()
            if request is not None:
                names = tuple(member.name for member in request.members)
                merged_of.update(member.worker for member in request.members)
                coordinator.commit(request, Merged(names, {}, {}, f"r{number}", f"r{number}", {}, 0.01))
            claim = coordinator.claim(name, generations[name], f"{name}{number}", coordinator.anchor.sha256)
            if isinstance(claim, Claimed):
                held[name] = claim.lease
                ready_s[name] += pace_s[name] * ((claim.lease.end or 0) - claim.lease.start)
            elif coordinator.finished:
                break
            else:
                waited_s[name] += 1.0
                ready_s[name] += 1.0
            assert number < 2000
        assert len(learned) == chunks * rows and set(learned.values()) == {1}
        # Alone the fast ones would take a third of the rows each; a slow one may hold up the end by one report.
        assert clock <= chunks * rows / (3 + 1 / 4) + 2 * pace_s["slow"] * every
        assert max(waited_s.values()) <= pace_s["slow"] * every
        assert merged_of["slow"] >= chunks * rows / every * (1 / 4) / (3 + 1 / 4) - 1

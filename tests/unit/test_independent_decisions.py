"""When a round of parallel-independent training closes, and with what; no process, no clock."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.independent.calls import AnchorRef, Claimed, Joined, Report, Reported
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, Rules
from hrm_ray.independent.decisions import (
    HANG_AFTER_S,
    LEAST_MERGE_EVERY,
    MOST_MERGE_EVERY,
    Member,
    Watched,
    hung,
    leave_one_out,
    merge_weights,
    report_updates,
    round_closes,
    round_share,
    unfit,
)
from hrm_ray.ledger import BlockLength, Lease, Span, open_ledger
from hrm_ray.train.activity import Phase

PHASES: tuple[Phase, ...] = get_args(Phase)


def closes(reporters: str, active: str, now_s: float, durations: dict[str, float], *, idle: bool = False) -> bool:
    members = [Member(f"r{number}", trainer, 10, 10.0, 5) for number, trainer in enumerate(reporters)]
    return round_closes(members, frozenset(active), durations, 0.0, now_s, at_end=False, idle=idle)


def test_a_round_waits_for_equal_trainers_and_not_for_a_slow_one() -> None:
    equal = {"a": 10.0, "b": 10.0}
    assert not closes("a", "ab", 10.5, equal)
    assert closes("ab", "ab", 10.5, equal)
    unequal = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 40.0}
    assert not closes("abc", "abcd", 11.0, unequal)
    assert closes("abc", "abcd", 13.0, unequal)
    assert closes("a", "ab", 0.0, equal, idle=True)
    assert not closes("", "ab", 100.0, equal, idle=True)


def test_at_end_closes_only_when_nobody_can_report_any_more() -> None:
    members = [Member("r", "a", 1)]
    assert not round_closes(members, frozenset("a"), {}, 0.0, 1e9, at_end=True, idle=False)
    assert round_closes(members, frozenset("a"), {}, 0.0, 0.0, at_end=True, idle=True)


def test_changes_of_one_trainer_are_added_and_those_of_several_averaged() -> None:
    members = [Member("r1", "a", 30), Member("r2", "a", 30), Member("r3", "b", 20)]
    assert merge_weights(members, "samples") == (0.75, 0.75, 0.25)
    assert merge_weights(members, "equal") == (0.5, 0.5, 0.5)
    assert merge_weights([Member("r1", "a", 0), Member("r2", "b", 0)], "samples") == (0.5, 0.5)


def test_a_round_of_few_trainers_moves_the_anchor_by_their_part() -> None:
    """A late report alone would go the whole way that the others went already."""
    equal = dict.fromkeys("abcd", 10.0)
    assert round_share("abcd", equal) == round_share("a", {"a": 10.0}) == round_share("a", {}) == 1.0
    assert round_share("d", equal) == 0.25 and round_share("abc", equal) == 0.75
    # A slow trainer that is not waited for takes little from the others.
    assert round_share("abc", {**equal, "d": 2.5}) == pytest.approx(30 / 32.5)
    # Whose speed is not known counts as the mean of the others, also where it has left since.
    assert round_share("d", {**equal, "a": 0.0}) == 0.25
    assert round_share("ab", dict.fromkeys("abcd", 0.0)) == 0.5
    assert round_share("e", {**equal, "d": 0.0}) == 0.2


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6)), st.sets(st.sampled_from("abcdefg"), min_size=1))
def test_shares_of_rounds_without_common_trainers_add_up_to_one(
    samples_per_s: dict[str, float], reporters: set[str]
) -> None:
    team = dict.fromkeys(reporters, 0.0) | samples_per_s
    rest = team.keys() - reporters
    assert round_share(reporters, team) + (round_share(rest, team) if rest else 0.0) == pytest.approx(1.0)


def test_auto_approaches_the_smallest_interval_whose_merges_are_cheap() -> None:
    current = report_updates("auto", None)
    for _ in range(10):
        current = report_updates("auto", current, merge_s=0.3, update_s=0.1)
    assert current == 100  # 0.3 s is 3 % of 100 updates of 0.1 s
    assert report_updates("auto", current, merge_s=0.3, update_s=0.1, trainers=4) == 50  # 25 would be more than halved
    assert report_updates("auto", 50, merge_s=0.3, update_s=0.1, trainers=4) == 25
    assert report_updates(7, None) == report_updates(7, 7, 9.0, 0.001) == 7


@given(st.integers(8, 500), st.floats(0, 1e6), st.floats(0, 1e3))
def test_auto_stays_within_its_bounds(current: int, merge_s: float, update_s: float) -> None:
    found = report_updates("auto", current, merge_s, update_s)
    assert LEAST_MERGE_EVERY <= found <= MOST_MERGE_EVERY
    assert current // 2 <= found <= 2 * current or found in (LEAST_MERGE_EVERY, MOST_MERGE_EVERY)


def test_an_outlier_is_rejected_by_its_norm_only_among_three() -> None:
    alike = dict.fromkeys("abcde", 8)
    assert set(unfit({"a": 1.0, "b": 1.1, "c": 3.4}, alike)) == {"c"}
    assert unfit({"a": 1.0, "b": 50.0}, alike) == {}
    assert set(unfit({"a": 1.0, "b": math.nan}, alike)) == {"b"}
    assert unfit({"a": 0.0, "b": 0.0, "c": 1.0}, alike) == {}
    assert set(unfit({"a": 0.0, "b": 1.0, "c": 1.0, "d": 4.0, "e": 0.0}, alike)) == {"d"}
    # Four times the updates, all in one direction.
    assert unfit({"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 8, "b": 8, "c": 32}) == {}
    assert set(unfit({"a": 1.0, "b": 1.0, "c": 7.0}, {"a": 8, "b": 8, "c": 32})) == {"c"}
    # An update of one sample at the end of an epoch, beside 50 of 32.
    assert unfit({"a": 7.0, "b": 7.1, "c": 7.2, "d": 1.0}, {"a": 1600, "b": 1600, "c": 1600, "d": 1}) == {}


@pytest.mark.parametrize(("bad", "before"), [("b", 2.0), ("c", 2.0)])
def test_the_member_that_spoils_a_round_is_left_out(bad: str, before: float) -> None:
    calls: list[tuple[str, ...]] = []

    def loss_of(names: tuple[str, ...]) -> float:
        calls.append(names)
        return 3.0 if bad in names else 1.9

    choice = leave_one_out(["a", "b", "c"], loss_of, before)
    assert choice.taken == tuple(name for name in "abc" if name != bad)
    assert set(choice.rejected) == {bad} and choice.loss == 1.9
    assert leave_one_out([bad], loss_of, before).taken == (bad,)  # a sole trainer's loss may rise
    calls.clear()
    assert leave_one_out(["a"], loss_of, before).loss == 1.9 and calls == [("a",)]


def test_a_rise_that_nobody_is_to_blame_for_is_taken() -> None:
    choice = leave_one_out(["a", "b"], lambda names: 2.5, 2.0)
    assert choice.taken == ("a", "b") and not choice.rejected


def test_a_loss_that_is_not_finite_is_mended_where_that_is_possible() -> None:
    choice = leave_one_out(["a", "b"], lambda names: math.inf if "b" in names else 5.0, 5.0)
    assert choice.taken == ("a",) and set(choice.rejected) == {"b"}


@pytest.mark.parametrize("members", ["a", "ab", "abcd"])
def test_weights_without_a_finite_loss_take_the_place_of_no_others(members: str) -> None:
    choice = leave_one_out(list(members), lambda names: math.nan, 5.0)
    assert choice.taken == () and set(choice.rejected) == set(members)
    assert leave_one_out(list(members), lambda names: math.nan, math.nan).taken == tuple(members)
    two_bad = leave_one_out(list("abcd"), lambda names: math.nan if {"a", "c"} & {*names} else 5.2, 5.0)
    assert two_bad.taken == ("b", "d") and two_bad.loss == 5.2


def test_a_trainer_that_was_started_again_is_averaged_with_what_it_reported_before() -> None:
    """Both began from the same anchor; added up they would be a double step."""
    members = [Member("r1", "a", 30, generation=1), Member("r2", "a", 10, generation=2)]
    assert merge_weights(members, "samples") == (0.75, 0.25)
    assert members[0].series != members[1].series


def test_a_block_whose_only_trainer_was_lost_is_not_finished(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite", durable=False) as ledger:
        ledger.add_blocks([BlockLength(0, 1), BlockLength(1, 1)])
        ledger.end_data()
        rules = Rules(2, 2, epochs=1, within_block=True)
        coordinator = LedgerCoordinator(ledger, AnchorRef(0, "a", "a", 0), rules, lambda e, p: p, lambda: 0.0)
        joined = coordinator.join("t")
        assert isinstance(joined, Joined)
        assert isinstance(coordinator.claim("t", joined.generation, "k", "a"), Claimed)
        coordinator.lost("t", "it was killed")
        assert not coordinator.finished and isinstance(coordinator.join("t"), Joined)


def test_a_late_report_is_merged_by_its_part_also_where_the_others_have_left(tmp_path: Path) -> None:
    """Two trainers of one range each: the first is merged past its deadline, and the second alone after the first has
    left. The deadline runs from when they joined."""
    now_s = 0.0
    with open_ledger(tmp_path / "l.sqlite", durable=False) as ledger:
        ledger.add_blocks([BlockLength(0, 2)])
        ledger.end_data()
        start = AnchorRef(0, "a", "a", 0)
        rules = Rules(1, 1, merge_every=1, epochs=1)
        coordinator = LedgerCoordinator(ledger, start, rules, lambda e, p: p if p < 2 else None, lambda: now_s)
        now_s = 50.0  # reading torch took long
        reports = {}
        for name in ("t", "u"):
            joined = coordinator.join(name)
            assert isinstance(joined, Joined)
            claimed = coordinator.claim(name, joined.generation, name, "a")
            assert isinstance(claimed, Claimed)
            lease = coordinator.measure(claimed.lease, 1)
            assert isinstance(lease, Lease)
            span = Span(0, lease.chunk, 0, 1)
            reports[name] = Report(name, name, joined.generation, start, name, name, (lease,), (span,), 1, 1, 1.0, 10.0)
        shares = []
        for name, from_s in (("t", 60.0), ("u", 80.0)):
            now_s = from_s
            assert isinstance(coordinator.report(reports[name]), Reported)
            if name == "t":
                assert coordinator.due() is None
                now_s = 63.0
            request = coordinator.due()
            assert request is not None
            shares.append(round_share({name}, request.samples_per_s))
            merged = Merged((name,), {}, {}, f"after {name}", f"after {name}", {}, 0.1)
            assert coordinator.commit(request, merged) is not None
            coordinator.leave(name, 1)
        assert shares == [0.5, 0.5] and coordinator.finished


def test_trainers_that_only_wait_for_ranges_take_no_part_in_a_round(tmp_path: Path) -> None:
    """One chunk, claimed by one of three: its report is all that there is to learn."""
    with open_ledger(tmp_path / "l.sqlite", durable=False) as ledger:
        ledger.add_blocks([BlockLength(0, 1)])
        ledger.end_data()
        start = AnchorRef(0, "a", "a", 0)
        rules = Rules(1, 1, merge_every=1, epochs=1)
        coordinator = LedgerCoordinator(ledger, start, rules, lambda e, p: p if p < 1 else None, lambda: 1.0)
        for name in ("t", "u", "v"):
            joined = coordinator.join(name)
            assert isinstance(joined, Joined)
            claimed = coordinator.claim(name, joined.generation, name, "a")
            if name == "t":
                assert isinstance(claimed, Claimed)
                lease = coordinator.measure(claimed.lease, 1)
                assert isinstance(lease, Lease)
        span = Span(0, lease.chunk, 0, 1)
        report = Report("r", "t", 1, start, "r", "r", (lease,), (span,), 1, 1, 1.0, 10.0)
        assert isinstance(coordinator.report(report), Reported)
        request = coordinator.due()
        assert request is not None and round_share({"t"}, request.samples_per_s) == 1.0


def test_a_command_that_stood_still_blames_no_trainer(tmp_path: Path) -> None:
    """Ctrl-Z and fg: nobody could be heard, so all trainers stay and keep what they hold; the next silence counts."""
    now_s = 0.0
    with open_ledger(tmp_path / "l.sqlite", durable=False) as ledger:
        ledger.add_blocks([BlockLength(0, 2)])
        ledger.end_data()
        start = AnchorRef(0, "a", "a", 0)
        coordinator = LedgerCoordinator(ledger, start, Rules(2, 2, epochs=1), lambda e, p: p, lambda: now_s)
        for name in ("t", "u"):
            joined = coordinator.join(name)
            assert isinstance(joined, Joined)
            assert isinstance(coordinator.claim(name, joined.generation, name, "a"), Claimed)
        now_s = 100.0
        assert coordinator.tick() == [] and len(coordinator.trainers) == 2
        assert len(ledger.leases("t")) == len(ledger.leases("u")) == 1
        for now_s in range(101, 170):  # noqa: B007 - the clock reads it
            silent = coordinator.tick()
            if silent:
                break
        assert silent == ["t", "u"] and now_s == 160 and ledger.leases("t") == []


def look(phase: Phase, hang_after_s: float | None, until_s: int, moves_every_s: int = 10**9) -> float | None:
    """When a trainer in that phase, looked at every second, is ended."""
    watched = Watched(0.0)
    for second in range(until_s):
        watched, found = hung(watched, {"t": (second // moves_every_s, phase)}, float(second), hang_after_s)
        if found:
            return second
    return None


def test_a_trainer_without_progress_is_ended_and_only_a_step_is_held_to_the_users_limit() -> None:
    assert look("step", 30, 99) == 31 and look("records", 30, 99) == 31
    assert look("step", 30, 999, moves_every_s=29) is None
    for phase in PHASES:
        if phase not in ("step", "records"):
            assert look(phase, 30, 999) == look(phase, None, 999) == HANG_AFTER_S + 1
    assert look("first step", 900, 999) == 901


def test_a_look_after_a_long_pause_finds_nobody_hung() -> None:
    watched, _ = hung(Watched(0.0), {"t": (1, "step")}, 1.0, 30)
    watched, found = hung(watched, {"t": (1, "step")}, 1000.0, 30)
    assert found == {}
    for second in range(1001, 1032):
        watched, found = hung(watched, {"t": (1, "step")}, float(second), 30)
    assert set(found) == {"t"}

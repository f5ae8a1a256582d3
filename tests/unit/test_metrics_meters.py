"""Throughput with a clock of one's own, memory against known allocations, sums that do not care how they are split."""

from __future__ import annotations

import math
import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.metrics.meters import DeviceMemory, MemoryMeter, MetricSums, Throughput, peak_resident_bytes


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_throughput_over_a_sliding_window() -> None:
    clock = _Clock()
    meter = Throughput(window_s=10.0, clock=clock)
    assert meter.per_s() is None
    clock.now_s += 20.0
    meter.add(100)  # a slow first step: 5 per second
    assert meter.per_s() == pytest.approx(5.0)
    for _ in range(5):
        clock.now_s += 2.0
        meter.add(100)
    assert meter.per_s() == pytest.approx(50.0)  # the last 10 s alone: the first step is out of the window
    clock.now_s += 10.0
    meter.add(100)
    assert meter.per_s() == pytest.approx(10.0)  # one interval fills the window


def test_throughput_leaves_pauses_out() -> None:
    clock = _Clock()
    meter = Throughput(window_s=60.0, clock=clock)
    clock.now_s += 1.0
    meter.add(10)
    meter.pause()
    meter.pause()
    clock.now_s += 1000.0
    with pytest.raises(RuntimeError, match="paused"):
        meter.add(1)
    meter.resume()
    clock.now_s += 1.0
    meter.resume()
    meter.add(10)
    assert meter.per_s() == pytest.approx(10.0)


def test_throughput_without_time_passed() -> None:
    meter = Throughput(clock=_Clock())
    meter.add(10)
    assert meter.per_s() is None


def test_throughput_keeps_few_marks() -> None:
    clock = _Clock()
    meter = Throughput(window_s=1.0, clock=clock)
    for _ in range(1000):
        clock.now_s += 0.5
        meter.add(1)
    assert len(meter._marks) <= 4
    assert meter.per_s() == pytest.approx(2.0)


def test_memory_of_this_process_sees_an_allocation() -> None:
    meter = MemoryMeter()
    before = meter.read()
    block = bytearray(b"x") * 200_000_000
    during = meter.read()
    # 5 MB of slack: the interpreter may give back or take some pages meanwhile.
    assert during["memory_gb"] - before["memory_gb"] == pytest.approx(0.2, abs=0.005)
    assert during["peak_gb"] >= during["memory_gb"]
    del block
    after = meter.read()
    assert after["memory_gb"] < during["memory_gb"] - 0.15
    assert after["peak_gb"] >= during["memory_gb"]
    assert set(after) == {"memory_gb", "peak_gb"}


def test_memory_of_an_accelerator_is_what_it_says() -> None:
    meter = MemoryMeter(lambda: DeviceMemory(1_500_000_000, 2_000_000_000, 3_000_000_000))
    assert meter.read() == {"memory_gb": 1.5, "peak_gb": 2.0, "reserved_gb": 3.0}


@pytest.mark.skipif(sys.platform == "win32", reason="the Windows path itself runs there")
def test_peak_without_proc_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: False)
    peak_bytes = peak_resident_bytes()
    assert 0.5 * psutil.Process().memory_info().rss < peak_bytes < 100e9


def test_peak_on_windows_comes_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Info:
        peak_wset = 12345

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: _Info())
    assert peak_resident_bytes() == 12345


def test_means_and_zero_weights() -> None:
    sums = MetricSums()
    sums.add("loss", 6.0, 2.0)
    sums.add("loss", 2.0, 2.0)
    sums.add("exact_accuracy", 0.0, 0.0)
    sums.add_per("lm_loss", 9.0, per="tokens")
    sums.add_per("q_halt_loss", 9.0, per="halted rows")
    sums.add_count("tokens", 3.0)
    assert sums.means() == {"loss": 2.0, "lm_loss": 3.0}
    assert sums.pairs()["lm_loss"] == (9.0, 3.0)
    assert MetricSums.from_pairs(sums.pairs()).means() == sums.means()


def test_infinite_and_nan_totals_are_kept() -> None:
    sums = MetricSums()
    sums.add("loss", math.nan, 1.0)
    sums.add("perplexity", math.inf, 1.0)
    assert math.isnan(sums.means()["loss"])
    assert sums.means()["perplexity"] == math.inf


def test_declarations_do_not_mix() -> None:
    sums = MetricSums()
    sums.add("loss", 1.0, 1.0)
    sums.add_per("lm_loss", 1.0, per="tokens")
    with pytest.raises(ValueError, match="brings its own weights"):
        sums.add_per("loss", 1.0, per="tokens")
    with pytest.raises(ValueError, match="takes no weight"):
        sums.add("lm_loss", 1.0, 1.0)
    with pytest.raises(ValueError, match="not per 'rows'"):
        sums.add_per("lm_loss", 1.0, per="rows")
    with pytest.raises(ValueError, match="negative"):
        sums.add("loss", 1.0, -1.0)
    with pytest.raises(ValueError, match="negative"):
        sums.add_count("tokens", -1.0)


_ITEM = st.tuples(
    st.sampled_from(["loss", "accuracy"]), st.floats(0, 1e6), st.integers(0, 4096), st.integers(0, 3), st.integers(0, 2)
)


@given(items=st.lists(_ITEM, max_size=40), order=st.permutations(range(4)))
def test_any_split_over_ranks_and_micro_batches_gives_the_same_means(
    items: list[tuple[str, float, int, int, int]], order: list[int]
) -> None:
    """1e-12 relative: 40 additions of numbers that are not negative err by at most 40 * 1.1e-16 each way."""
    whole = MetricSums()
    parts = [[MetricSums() for _ in range(3)] for _ in range(4)]
    for name, total, weight, rank, micro_batch in items:
        for sums in (whole, parts[rank][micro_batch]):
            sums.add(name, total, weight)
            sums.add_per(f"{name} per token", total, per="tokens")
            sums.add_count("tokens", weight)
    joined = MetricSums()
    for index in order:
        of_rank = MetricSums()
        for part in reversed(parts[index]):
            of_rank.merge(part)
        joined.merge(of_rank)
    assert joined.means().keys() == whole.means().keys()
    assert joined.means() == pytest.approx(whole.means(), rel=1e-12, abs=0.0)

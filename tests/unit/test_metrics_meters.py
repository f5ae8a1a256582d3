"""Throughput with a clock of one's own, memory against known allocations, sums that do not care how they are split."""

from __future__ import annotations

import mmap
import sys

import psutil
import pytest

from hrm_ray.metrics.meters import DeviceMemory, MemoryMeter, Throughput, peak_resident_bytes


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
    # Mapped and unmapped by itself: what the C library keeps of freed memory is its own affair.
    block = mmap.mmap(-1, 200_000_000)
    for _ in range(200):
        block.write(b"x" * 1_000_000)
    during = meter.read()
    # 5 MB of slack: the interpreter may give back or take some pages meanwhile.
    assert during["memory_gb"] - before["memory_gb"] == pytest.approx(0.2, abs=0.005)
    assert during["peak_gb"] >= during["memory_gb"]
    block.close()
    after = meter.read()
    assert after["memory_gb"] < during["memory_gb"] - 0.15
    assert after["peak_gb"] >= during["memory_gb"]
    assert set(after) == {"memory_gb", "peak_gb"}


def test_memory_of_an_accelerator_is_what_it_says() -> None:
    meter = MemoryMeter(lambda: DeviceMemory(1_500_000_000, 2_000_000_000, 3_000_000_000))
    assert meter.read() == {"memory_gb": 1.5, "peak_gb": 2.0, "reserved_gb": 3.0}


def test_a_peak_does_not_fall() -> None:
    """Where a device keeps no peak of its own, the most that was seen is one."""
    readings = iter([DeviceMemory(b, b, 9_000_000_000) for b in (1_000_000_000, 4_000_000_000, 2_000_000_000)])
    meter = MemoryMeter(lambda: next(readings))
    assert [meter.read()["peak_gb"] for _ in range(3)] == [1.0, 4.0, 4.0]


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

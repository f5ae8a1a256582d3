"""Every sink gets every record, and every sink is closed."""

from __future__ import annotations

import pytest

from hrm_ray.metrics.fanout import FanOut
from hrm_ray.types import Record


class _Sink:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[Record] = []
        self.closed = 0
        self._fails = fails

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1
        if self._fails:
            raise OSError("disk is full")


def test_writes_to_all() -> None:
    sinks = [_Sink(), _Sink()]
    record = Record("train", 1, 1.0)
    FanOut(sinks).write(record)
    assert [sink.records for sink in sinks] == [[record], [record]]


def test_closes_all_and_tells_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    sinks = [_Sink(), _Sink(fails=True), _Sink()]
    FanOut(sinks).close()
    assert [sink.closed for sink in sinks] == [1, 1, 1]
    assert capsys.readouterr().err == "warning: the metrics could not be closed: disk is full\n"
    FanOut(sinks).close(run_failed=True)
    assert [sink.closed for sink in sinks] == [2, 2, 2]
    assert capsys.readouterr().err == "", "the run's own error says it"

"""The metrics file: nothing lost but a torn last line, nothing taken for a record that is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.errors import DataError
from hrm_ray.metrics.jsonl import JsonlSink, drop_copies, read_records, to_line, truncate_after
from hrm_ray.types import Record

_RESERVED = {"NaN", "Infinity", "-Infinity"}
_NUMBERS = st.floats() | st.integers(-(2**63), 2**63)
_VALUES = _NUMBERS | st.booleans() | st.text().filter(lambda text: text not in _RESERVED) | st.lists(st.floats())
_NAMES = st.text(min_size=1).filter(lambda name: name not in {"kind", "step", "time_s"})
_RECORDS = st.builds(
    Record,
    kind=st.sampled_from(["train", "eval", "event"]),
    step=st.integers(0, 10**12),
    time_s=st.floats(0, 2e9),
    values=st.dictionaries(_NAMES, _VALUES, max_size=4),
)


def _write(path: Path, records: list[Record], append: bool = True) -> None:
    sink = JsonlSink(path, append)
    for record in records:
        sink.write(record)
    sink.close()


def _train(step: int) -> Record:
    return Record("train", step, float(step), {"loss": 1.0 / (1 + step)})


def _identity(record: Record) -> Any:
    """Compares NaN as equal, -0.0 as other than 0.0, and 1 as other than 1.0 or True."""
    return repr((record.kind, record.step, record.time_s, record.values))


@settings(max_examples=60, deadline=None)
@given(records=st.lists(_RECORDS, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    _write(path, records)
    assert [_identity(record) for record in read_records(path)] == [_identity(record) for record in records]


@settings(max_examples=8, deadline=None)
@given(records=st.lists(_RECORDS, min_size=1, max_size=3))
def test_torn_at_every_byte(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    """Wherever the file ends: the records before the cut are read, and a sink appends behind them."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = [to_line(record) for record in records]
    whole = b"".join(lines)
    ends = [sum(map(len, lines[: count + 1])) for count in range(len(lines))]
    for cut in range(len(whole) + 1):
        # A line that lacks only its newline is a whole record.
        expected = [_identity(record) for record, end in zip(records, ends, strict=True) if cut >= end - 1]
        path.write_bytes(whole[:cut])
        assert [_identity(record) for record in read_records(path)] == expected
        _write(path, [_train(7)])
        assert [_identity(record) for record in read_records(path)] == [*expected, _identity(_train(7))]
        path.write_bytes(whole[:cut])
        assert truncate_after(path, 10**12) == 0
        assert path.read_bytes() == b"".join(lines[: len(expected)])


def test_lines_are_standard_json_in_ascii(tmp_path: Path) -> None:
    values: dict[str, Any] = {"loss": math.nan, "top": math.inf, "parts": [1.0, -math.inf], "message": "Größe ✓"}
    line = to_line(Record("event", 3, 1.5, values))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert line.isascii()
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "event", "step": 3, "time_s": 1.5,
        "loss": "NaN", "top": "Infinity", "parts": [1.0, "-Infinity"], "message": "Größe ✓",
    }  # fmt: skip


def test_each_write_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(3):
        sink.write(_train(step))
        assert [record.step for record in read_records(path)] == list(range(step + 1))
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(_train(3))


def test_append_keeps_and_anew_drops(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [_train(1)])
    _write(path, [_train(2)])
    assert [record.step for record in read_records(path)] == [1, 2]
    _write(path, [_train(3)], append=False)
    assert [record.step for record in read_records(path)] == [3]


def test_long_torn_line_is_cut_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(_train(1)) + b'{"kind": "train", "text": "' + b"x" * 50_000)
    _write(path, [_train(2)])
    assert [record.step for record in read_records(path)] == [1, 2]
    assert "half-written" in caplog.text


def test_truncate_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [_train(step) for step in (1, 2, 3, 4)] + [Record("eval", 2, 5.0, {"loss": 1.0})])
    before = path.stat()
    assert truncate_after(path, 2) == 2
    assert [(record.kind, record.step) for record in read_records(path)] == [("train", 1), ("train", 2), ("eval", 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert path.stat().st_mode == before.st_mode
    assert path.stat().st_ino != before.st_ino  # replaced, not written over
    assert truncate_after(tmp_path / "none.jsonl", 2) == 0
    assert not (tmp_path / "none.jsonl").exists()


def test_truncate_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = to_line(_train(1)) + b"not json\n" + to_line(_train(9))
    path.write_bytes(content)
    with pytest.raises(DataError):
        truncate_after(path, 5)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"\n",
        b"[1, 2]\n",
        b'{"kind": "other", "step": 1, "time_s": 1}\n',
        b'{"kind": ["train"], "step": 1, "time_s": 1}\n',
        b'{"kind": "train", "step": 1.5, "time_s": 1}\n',
        b'{"kind": "train", "step": true, "time_s": 1}\n',
        b'{"kind": "train", "step": 1}\n',
        b"\xff\xfe\n",
    ],
)
def test_a_line_that_is_no_record_is_a_fault(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(_train(1)) + line + to_line(_train(2)))
    with pytest.raises(DataError, match="line 2: not a metrics record") as caught:
        read_records(path)
    assert str(path) in caught.value.faults[0].value


def test_missing_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such metrics file"):
        read_records(tmp_path / "metrics.jsonl")


def test_names_of_the_records_own_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="step"):
        to_line(Record("train", 1, 1.0, {"step": 2}))


def test_records_of_version_0_1_have_todays_names(tmp_path: Path) -> None:
    """There `loss` was the whole objective, and `lm_loss` what compares with a held-out loss."""
    text = {"loss": 3.0, "lm_loss": 2.0, "accuracy": 0.5, "lr": 0.1}
    puzzle = {**text, "exact_accuracy": 0.25}
    _write(tmp_path / "m.jsonl", [Record("train", 1, 1.0, text), Record("train", 2, 2.0, puzzle)])
    first, second = (record.values for record in read_records(tmp_path / "m.jsonl"))
    assert first == {"objective": 3.0, "loss": 2.0, "token_accuracy": 0.5, "lr": 0.1}
    assert second == {"objective": 3.0, "loss": 2.0, "cell_accuracy": 0.5, "exact_accuracy": 0.25, "lr": 0.1}


def test_what_another_run_adds_while_copies_are_dropped_stays(tmp_path: Path) -> None:
    """The other run has the file open, under the name of a link, which stays one."""
    own, log, link = tmp_path / "metrics.jsonl", tmp_path / "log.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(log)
    mine, other = JsonlSink(link, shared=True), JsonlSink(log, shared=True)
    _write(own, [_train(step) for step in range(4)])
    for step in range(4):
        mine.write(_train(step))
        other.write(_train(10 + step))
    drop_copies(link, own, 1)
    other.write(_train(14))
    for sink in (mine, other):
        sink.close()
    assert [record.step for record in read_records(log)] == [0, 10, 1, 11, 12, 13, 14]
    assert link.is_symlink()


def test_a_shared_file_is_not_written_while_it_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that holds the lock is waited for; where it holds it for too long, the line is written anyway."""
    monkeypatch.setattr("hrm_ray.metrics.jsonl._LOCK_WAIT_S", 0.0)
    log = tmp_path / "log.jsonl"
    sink, acquired = JsonlSink(log, shared=True), []
    real = FileLock.acquire

    def acquiring(lock: FileLock, timeout: float | None = None) -> Any:
        try:
            return real(lock, timeout=timeout)
        finally:
            acquired.append(lock.is_locked)

    with FileLock(f"{log}.lock"):
        monkeypatch.setattr(FileLock, "acquire", acquiring)
        sink.write(_train(0))
    sink.write(_train(1))
    sink.close()
    assert acquired == [False, True]
    assert [record.step for record in read_records(log)] == [0, 1]

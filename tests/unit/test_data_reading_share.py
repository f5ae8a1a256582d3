"""Reading within a time: where it ends, what it says of the share, and the policy for bad rows before a run."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hrm_ray.data.corpus import Corpus, CorpusReading
from hrm_ray.data.detect import detect
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.timer import Timer
from hrm_ray.errors import DataError
from hrm_ray.launch import scan_data as module
from tests.support.clocks import Ticking, standing
from tests.support.corpora import FORMATS, parquet_bytes, write, write_tar, write_zip
from tests.support.runs import TEXT, hrm

TEXTS = [f"row {number} " + "x" * 1000 for number in range(4000)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def reading_of(path: Path, timer: Timer) -> CorpusReading:
    source = TextSource(str(path))
    corpus = Corpus(source, list_parts(source).parts, 10**5, 4000)
    return CorpusReading(corpus, on_read=lambda _: timer.raise_if_up())


class Taken:
    """Rows that were taken, as a clock."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self) -> float:
        return self.rows


def read_rows(path: Path, count: int) -> CorpusReading:
    """A reading whose time is up after so many rows."""
    taken = Taken()
    reading = reading_of(path, Timer(count - 0.5, taken))
    for _ in reading:
        taken.rows += 1
    return reading


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write(folder / "a.jsonl", JSONL),
        lambda folder: write(folder / "a.csv", FORMATS["csv"](TEXTS)),
        lambda folder: write(folder / "a.json", FORMATS["json"](TEXTS)),
        lambda folder: write(folder / "a.parquet", parquet_bytes(TEXTS, 100)),
        lambda folder: write(folder / "a.arrow", FORMATS["arrow"](TEXTS)),
        lambda folder: write_tar(folder / "a.tar", {"a.jsonl": JSONL}),
        lambda folder: write_zip(
            folder / "a.zip", {f"{number:04}.txt": text.encode() for number, text in enumerate(TEXTS)}
        ),
        lambda folder: write_zip(folder / "b.zip", {"a.jsonl": JSONL}, compression=0),
    ],
    ids=["jsonl", "csv", "json", "parquet", "arrow", "tar", "zip of texts", "zip of rows"],
)
def test_the_share_that_was_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    reading = read_rows(make(tmp_path), 1000)
    assert reading.rows_read == 1000 and not reading.ended
    assert reading.share is not None and reading.share == pytest.approx(0.25, rel=0.2)


def test_all_of_it_is_read_where_there_is_time(tmp_path: Path) -> None:
    for timer in (Timer(None, Ticking()), Timer(1, standing)):
        reading = reading_of(write(tmp_path / "a.jsonl", JSONL[: JSONL.index(b"\n", 30000) + 1]), timer)
        assert len(list(reading)) == 30 and reading.ended and reading.share == 1


def test_parts_before_the_present_one_count_whole(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", JSONL)
    reading = read_rows(tmp_path, 6000)
    assert reading.rows_read == 6000
    assert reading.share == pytest.approx(6 / 16, rel=0.1)


def test_the_share_of_a_compressed_file_is_known_where_much_of_it_was_read(tmp_path: Path) -> None:
    """A decompressor takes in more than it gives."""
    noise = [random.Random(number).randbytes(500).hex() for number in range(4000)]
    content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in noise).encode())
    file = write(tmp_path / "a.jsonl.gz", content)
    few, many = read_rows(file, 100), read_rows(file, 2800)
    assert (few.rows_read, few.ended, few.share) == (100, False, None)
    assert many.share == pytest.approx(0.7, rel=0.1)


def test_a_long_way_to_the_first_row_ends_as_well(tmp_path: Path) -> None:
    """Members of another split are passed over without a row; the clock goes on with each stretch of bytes."""
    archive = write_tar(tmp_path / "a.tar.gz", {"train/a.jsonl": JSONL, "test/a.jsonl": b'{"text": "x"}\n'})
    source = TextSource(str(archive), "test")
    parts = list_parts(source).parts
    timer = Timer(0.5, Ticking())
    reading = CorpusReading(Corpus(source, parts, 10, 10), on_read=lambda _: timer.raise_if_up())
    assert list(reading) == [] and not reading.ended and reading.share is None
    whole = CorpusReading(Corpus(source, parts, 10, 10))
    assert [row.row for row, _ in whole] == [0] and whole.ended


@pytest.mark.parametrize("content", [b"{nonsense\n", b'{"txt": 1}\n'])
def test_a_bad_first_row_is_passed_over_where_such_rows_are(tmp_path: Path, content: bytes) -> None:
    text = write(tmp_path / "a.jsonl", content + b'{"text": "x"}\n')
    assert detect(TextSource(text), "skip").task == "lm"
    with pytest.raises(DataError, match="a.jsonl:1"):
        detect(TextSource(text))
    puzzle = write(tmp_path / "p.jsonl", b"{nonsense\n" + b'{"inputs": [1], "labels": [1]}\n')
    # A puzzle set is read whole, and none of it may be bad.
    with pytest.raises(DataError, match="p.jsonl:1"):
        detect(TextSource(puzzle), "skip")


def test_rows_that_are_all_bad_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 rows cannot be read, and the others contain no text"):
        detect(TextSource(write(tmp_path / "a.jsonl", b'{"txt": 1}\n{"text": ""}\n{"text": 2}\n')), "skip")


def test_a_dry_run_says_what_it_skips(tmp_path: Path) -> None:
    rows = '{"text": "some good text of a row"}\n' * 30
    data = write(tmp_path / "d.jsonl", "{nonsense\n" + rows + '{"text": 1}\n{"text": "\\u00e4"}\n')
    words = ("train", "--dataset-file", data, *TEXT, "--on-bad-row", "skip", "--ascii-only", "--dry-run")
    ran = hrm(*words)
    assert ran.code == 0, ran.err
    assert "data: 30 documents are readable, 1 left out by --ascii-only, 2 bad rows skipped\n" in ran.out
    ran = hrm(*words, "--max-train-examples", 11, "--eval-file", data, "--max-val-examples", 6)
    assert "data: 10 documents are readable, 1 bad row skipped; held out: 5 documents are readable, 1 bad" in ran.out


def test_a_dry_run_ends_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.jsonl", '{"text": "some good text of a row"}\n' * 30000 + "{nonsense\n")
    monkeypatch.setattr(module, "Timer", lambda seconds: Timer(100 * seconds, Ticking()))
    ran = hrm("train", "--dataset-file", data, *TEXT, "--dry-run")
    assert ran.code == 0, ran.err
    (said,) = [line for line in ran.out.splitlines() if line.startswith("data: ")]
    assert said.startswith("data: the first ") and "the time limit was reached there" in said and "--all" in said
    assert "about 3.3" in said or "about 1.6" in said

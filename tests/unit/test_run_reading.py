"""What a run reads before its first step: the beginning once, the rest as far as it must, shown and stoppable."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from hrm_ray.data import file_systems
from hrm_ray.data.chunk_source import AHEAD
from hrm_ray.train.loaders import HaltedSlots
from hrm_ray.train.stream_loader import StreamLoader
from hrm_ray.types import Columns
from tests.support.numbered_corpora import TOKENIZER
from tests.support.runs import TINY, computed, hrm, last_said, records, stopping_at

ROWS_OF_FILE = 4
WORDS = (
    *(*TINY, "--max-seq-len", "32", "--batch-size", "4", "--log-every", "1", "--no-packing"),
    *("--dataset-chunk-size", str(ROWS_OF_FILE), "--samples-per-block", "20"),
)
EPOCHS = ("--epochs", "3")
SHUFFLED = ("--no-linear-dataset",)


class Reads:
    """How many bytes of each file were read, how often its first byte was, and what it was before the first step."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.beginnings: dict[str, int] = {}
        self.before_training: Reads | None = None
        self.on_open: Callable[[int], None] = lambda _: None

    def copy(self) -> Reads:
        copied = Reads()
        copied.bytes, copied.beginnings = dict(self.bytes), dict(self.beginnings)
        return copied

    @property
    def at_first_step(self) -> Reads:
        assert self.before_training is not None
        return self.before_training


class CountedFile(io.FileIO):
    """A file that counts what is read of it."""

    def __init__(self, path: str, reads: Reads) -> None:
        super().__init__(path, "rb")
        self.reads, self.counted = reads, os.path.basename(path)

    def readinto(self, buffer: Any) -> int:
        begin, length = self.tell(), super().readinto(buffer) or 0
        self.reads.bytes[self.counted] = self.reads.bytes.get(self.counted, 0) + length
        if begin == 0 and length:
            self.reads.beginnings[self.counted] = self.reads.beginnings.get(self.counted, 0) + 1
        return length


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What runs of this test read of the corpus."""
    found = Reads()
    real = StreamLoader.next_batch

    def opened(own: object, address: str) -> BinaryIO:
        found.on_open(len(found.bytes))
        return cast(BinaryIO, io.BufferedReader(CountedFile(address, found), file_systems.BUFFER_BYTES))

    def first_batch(loader: StreamLoader, halted: HaltedSlots, step: int) -> list[Columns]:
        batch = real(loader, halted, step)
        found.before_training = found.before_training or found.copy()
        return batch

    monkeypatch.setattr(type(file_systems._LOCAL), "open", opened)
    monkeypatch.setattr(StreamLoader, "next_batch", first_batch)
    monkeypatch.setattr("hrm_ray.data.corpus_facts.COUNTED_BYTES", 100)
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty files of four rows, each a chunk."""
    TOKENIZER.save(tmp_path / "tokenizer")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        rows = [json.dumps({"text": f"{number}.{row} " + "xy" * (row + number % 5)}) for row in range(ROWS_OF_FILE)]
        (folder / f"{number:02}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def start(corpus: Path, *words: object) -> tuple[object, ...]:
    tokenizer = ("--tokenizer-path", corpus.parent / "tokenizer")
    usual = (*WORDS, "--bundle-dir", corpus.parent / "b", *tokenizer)
    return "train", "--dataset-file", corpus, *last_said((*usual, *words))


@pytest.mark.parametrize("words", [("--steps", "3"), EPOCHS], ids=["steps", "epochs"])
def test_the_first_step_comes_after_a_few_chunks(corpus: Path, reads: Reads, words: tuple[str, ...]) -> None:
    ran = hrm(*start(corpus, *words))
    assert ran.code == 0, ran.err
    assert len(reads.at_first_step.bytes) <= 6, "the first chunk, and what is read ahead"
    assert reads.at_first_step.beginnings["00.jsonl"] == 2, "looked at to tell the task, and read"


@pytest.mark.parametrize("vocabulary", [("--vocab-size", "300"), ("--auto-vocab-size",)])
def test_training_a_tokenizer_reads_its_sample_once(corpus: Path, reads: Reads, vocabulary: tuple[str, ...]) -> None:
    words = [word for word in start(corpus, "--steps", "2", "--tokenizer-train-examples", "40", *vocabulary)]
    at = words.index("--tokenizer-path")
    ran = hrm(*words[:at], *words[at + 2 :])
    assert ran.code == 0, ran.err
    assert len(reads.at_first_step.bytes) <= 12
    assert reads.at_first_step.beginnings["00.jsonl"] == 2
    assert max(reads.at_first_step.beginnings.values()) == 2, "once for the tokenizer, and a few for the training"


def test_a_shuffled_epoch_reads_each_file_once_and_says_so(
    corpus: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm_ray.launch.run.REPORT_EVERY_S", 0)
    ran = hrm(*start(corpus, "--steps", "2", *SHUFFLED))
    assert ran.code == 0, ran.err
    before = reads.at_first_step
    # Read again: the first to tell the task, a block of five, and what the thread of the training has read ahead.
    assert len(before.bytes) == 40 and sum(before.beginnings.values()) <= 40 + 1 + 5 + AHEAD + 1
    said = [line for line in ran.out.splitlines() if "reading the data before the first step" in line]
    assert len(said) > 40 and any("(50% of the data)" in line for line in said)


def test_short_reading_is_not_reported(corpus: Path, reads: Reads) -> None:
    assert "before the first step" not in hrm(*start(corpus, "--steps", "1", *SHUFFLED)).out


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        ("file", 0, "--stop-file before the first step"),
        (signal.SIGTERM, 75, ""),
        (signal.SIGINT, 130, ""),
    ],
)
def test_a_stop_ends_the_reading(
    corpus: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, stop: str | signal.Signals, code: int, said: str
) -> None:
    monkeypatch.setattr("hrm_ray.launch.stopping._LOOK_EVERY_S", 0)
    stop_file = corpus.parent / "stop"

    def at_the_fifth_file(files: int) -> None:
        if files == 5 and isinstance(stop, str):
            stop_file.touch()
        elif files == 5 and isinstance(stop, signal.Signals):
            os.kill(os.getpid(), stop)

    reads.on_open = at_the_fifth_file
    ran = hrm(*start(corpus, "--epochs", "1", "--stop-file", stop_file, *SHUFFLED))
    assert ran.code == code and said in ran.out, ran
    assert len(reads.bytes) <= 6 and "Traceback" not in ran.err
    assert not (corpus.parent / "b").exists() and not list(corpus.parent.glob(".b*"))


def test_checking_a_copied_corpus_is_shown_and_a_stop_ends_it(
    corpus: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of another time are read again before a resume, to see that their content is the same."""
    assert hrm(*start(corpus, "--steps", "1", *SHUFFLED)).code == 0
    for file in corpus.iterdir():
        os.utime(file, ns=(1, 1))
    monkeypatch.setattr("hrm_ray.launch.run.REPORT_EVERY_S", 0)
    monkeypatch.setattr("hrm_ray.launch.stopping._LOOK_EVERY_S", 0)
    stop_file = corpus.parent / "stop"
    reads.bytes.clear()
    reads.on_open = lambda files: stop_file.touch() if files == 5 else None
    ran = hrm("train", "--bundle-dir", corpus.parent / "b", "--resume", "--steps", "2", "--stop-file", stop_file)
    assert ran.code == 0 and "--stop-file before the first step" in ran.out, ran
    assert len(reads.bytes) <= 6 and "reading the data before the first step" in ran.out


def test_an_estimated_schedule_is_the_same_after_a_resume(corpus: Path, reads: Reads) -> None:
    """More of the corpus is known by then, and changes nothing."""
    words = ("--epochs", "1", "--lr-schedule", "linear", "--lr-min-ratio", "0", "--save-every", "0")
    assert hrm(*start(corpus, *words)).code == 0
    whole = computed(corpus.parent / "b")
    note = "schedule has about"
    assert any(note in event["message"] for event in records(corpus.parent / "b", "event"))
    with stopping_at(17):
        assert hrm(*start(corpus, *words, "--bundle-dir", corpus.parent / "c")).code == 0
    again = hrm("train", "--bundle-dir", corpus.parent / "c", "--resume")
    assert again.code == 0, again.err
    assert computed(corpus.parent / "c") == whole
    stored = json.loads((corpus.parent / "c" / "training_args.json").read_text())["data"]
    assert stored["rows_estimated"] and abs(stored["rows"] - 160) < 60


def test_ranks_that_keep_the_estimated_schedule_are_reported(corpus: Path, reads: Reads) -> None:
    """When the epoch has been counted, and again when the run is resumed."""
    adapters = ("--use-peft", "--peft-method", "adalora", "--lora-target-modules", "q_proj,v_proj")
    words = ("--epochs", "2", "--lr-schedule", "linear", *adapters)
    with stopping_at(45):
        assert hrm(*start(corpus, *words)).code == 0
    with stopping_at(46):
        assert hrm("train", "--bundle-dir", corpus.parent / "b", "--resume").code == 0
    said = [event for event in records(corpus.parent / "b", "event") if "AdaLoRA's ranks keep" in event["message"]]
    assert [event["step"] for event in said] == [40, 45]
    assert all("the run has 80 steps now" in event["message"] for event in said)


def test_the_schedule_has_a_new_length_when_an_epoch_has_been_counted(corpus: Path, reads: Reads) -> None:
    words = ("--epochs", "3", "--lr-schedule", "linear", "--lr-min-ratio", "0", "--save-every", "0", "--log-every", "1")
    assert hrm(*start(corpus, *words)).code == 0
    whole = computed(corpus.parent / "b")
    assert len(whole) == 120 and whole[-1]["lr"] == 0 and whole[-2]["lr"] > 0, "the end of 3 epochs of 40 steps"
    said = [event for event in records(corpus.parent / "b", "event") if "now has 120 steps" in event["message"]]
    assert len(said) == 1 and "Epoch 0 had 160 sequences" in said[0]["message"] and said[0]["step"] == 40
    for step in (30, 40, 55):
        folder = corpus.parent / f"c{step}"
        with stopping_at(step):
            assert hrm(*start(corpus, *words, "--bundle-dir", folder)).code == 0
        again = hrm("train", "--bundle-dir", folder, "--resume")
        assert again.code == 0, again.err
        assert computed(folder) == whole

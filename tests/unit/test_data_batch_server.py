"""Batches that one process reads for all ranks: what each rank would read for itself, and no more of it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data import batch_server
from hrm_ray.data.batches import BatchRequest
from hrm_ray.data.packing import RowForm
from hrm_ray.data.stream import StreamState
from hrm_ray.errors import DataError
from hrm_ray.train.loaders import BatchSize, StopCondition
from hrm_ray.train.stream_loader import StreamLoader
from hrm_ray.types import Columns, StopReason, StopRequested
from tests.support.numbered_corpora import Opened, Shape, cuts_of, rows_of_corpus, texts_of, write_corpus
from tests.support.pickled_calls import PickledCalls
from tests.unit.test_data_stream import CASES, corpus_of


def joined(micro_batches: Sequence[Columns]) -> dict[str, Any]:
    """All columns of an effective batch, by slot."""
    return {name: np.concatenate([micro[name] for micro in micro_batches]).tolist() for name in micro_batches[0]}


def told(opened: Opened, actions: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What a run's loaders say, action by action: of all ranks together the rows; of each rank, which must be equal,
    everything else. Gives these and how full the buffer was said to be."""
    loaders, trained, fillings = opened.loaders, False, [list[Any]() for _ in opened.loaders]
    for loader, filling in zip(loaders, fillings, strict=True):
        loader.on_fill = lambda rows, wanted, filling=filling: filling.append((rows, wanted))
    said: list[Any] = []
    for action in actions:
        if action == "skip":
            for loader in loaders:
                loader.mark_skipped()
        elif action == "save":
            said.append(same([(loader.epoch, loader.state_dict(), loader.take_consumed()) for loader in loaders]))
        else:
            rows = joined([micro for loader in loaders for micro in loader.next_batch([], 0)])
            said.append(rows)
            said.append(same([(loader.take_notes(), loader.counts(), loader.data_ended) for loader in loaders]))
            if any(rows["active"]):
                trained = True
            elif not same([loader.start_epoch(trained) for loader in loaders]):
                # Asked again after the end, it takes nothing twice.
                said.append(joined([micro for loader in loaders for micro in loader.next_batch([], 0)]))
                break
    said.append(same([(loader.epoch, loader.state_dict(), loader.take_consumed()) for loader in loaders]))
    return said, same(fillings)


def same(of_ranks: Sequence[Any]) -> Any:
    assert all(one == of_ranks[0] for one in of_ranks)
    return of_ranks[0]


@settings(max_examples=100, deadline=None)
@given(CASES, st.lists(st.sampled_from(["step", "step", "step", "skip", "save"]), max_size=30), st.data())
def test_ranks_hear_what_they_would_read(case: dict[str, Any], actions: list[str], data: st.DataObject) -> None:
    """Rows in every column, positions, consumed and skipped ranges, warnings, counts and fillings are the same whether
    one process reads for itself or for several ranks, also from a position that was saved."""
    ends = StopCondition(case["epochs"], after_block=data.draw(st.booleans()))
    with tempfile.TemporaryDirectory() as folder:
        corpus, _, _ = corpus_of(case, folder)
        cut = data.draw(st.sampled_from(cuts_of(case["effective"])))
        place: tuple[int, dict[str, Any]] | None = None
        for _ in range(data.draw(st.integers(1, 2))):
            ways = []
            for opened in (
                Opened(corpus, case["shape"], cuts_of(case["effective"])[0], ends),
                Opened(corpus, case["shape"], cut, ends, served=True),
            ):
                for loader in opened.loaders:
                    if place is not None:
                        loader.load_state_dict(*place)
                ways.append(told(opened, actions))
                found = opened.loaders[-1].epoch, opened.loaders[-1].state_dict()
                opened.close()
            assert ways[0] == ways[1]
            place = found


def test_each_rank_receives_its_share(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", texts_of([200] * 300))
    shape = Shape(samples_per_block=100, chunk_size=20, seq_len=64, shuffle_rows=40)
    received = {}
    for ranks in (1, 8):
        opened = Opened(
            corpus, shape, [BatchSize(64 // ranks, 1, n, ranks) for n in range(ranks)], StopCondition(1), served=True
        )
        assert sum(len(rows) for rows in opened.steps()) == len(rows_of_corpus(texts_of([200] * 300), shape))
        opened.close()
        assert opened.calls is not None
        received[ranks] = opened.calls.received_bytes
    assert max(received[8].values()) < 0.2 * received[1][0]


def test_no_more_than_a_few_batches_are_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the slowest rank; and rows wait in the server once, not once for each rank."""
    corpus = write_corpus(tmp_path / "c", texts_of([30] * 400))
    made = [0]
    real = batch_server.BatchReader.next

    def counted(reader: batch_server.BatchReader) -> Any:
        made[0] += 1
        return real(reader)

    monkeypatch.setattr(batch_server.BatchReader, "next", counted)
    opened = Opened(corpus, Shape(), [BatchSize(1, 1, rank, 2) for rank in range(2)], StopCondition(1), served=True)
    fast, slow = opened.loaders
    for _ in range(batch_server.AHEAD_BATCHES):
        fast.next_batch([], 0)
    assert made[0] == batch_server.AHEAD_BATCHES
    slow.next_batch([], 0)
    fast.next_batch([], 0)
    assert made[0] <= 2 * batch_server.AHEAD_BATCHES
    opened.close()


def test_a_large_batch_waits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_server, "AHEAD_BYTES", 10)
    corpus = write_corpus(tmp_path / "c", texts_of([30] * 40))
    opened = Opened(corpus, Shape(), cuts_of(4)[2], StopCondition(1), served=True)
    rows = [row for batch in opened.steps() for row in batch]
    opened.close()
    assert rows == rows_of_corpus(texts_of([30] * 40), Shape())
    assert opened.calls is not None and opened.calls.answers[0] > len(rows) // 4


def test_every_rank_raises_the_error_of_a_row_after_the_same_batches(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", texts_of([5] * 20))
    file = corpus / "0000.jsonl"
    file.write_bytes(file.read_bytes() + b"not json\n")
    opened = Opened(corpus, Shape(chunk_size=5), cuts_of(2)[2], StopCondition(1), served=True)
    taken = []
    for loader in opened.loaders:
        taken.append(0)
        for _ in range(2):  # asked again, it says the same
            with pytest.raises(DataError, match=r"0000\.jsonl:21"):
                while True:
                    taken[-1] += int(loader.next_batch([], 0)[0]["active"].sum())
        assert loader.fails_alike
    position = same([loader.state_dict() for loader in opened.loaders])
    opened.close()
    assert (
        sum(taken) == position["sequences"][0] == len(rows_of_corpus(texts_of([5] * 20), Shape(chunk_size=5))) // 2 * 2
    )


def test_an_unexpected_error_of_the_server_reaches_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*words: Any) -> Any:
        raise ZeroDivisionError("by a test")

    corpus = write_corpus(tmp_path / "c", texts_of([5] * 20))
    opened = Opened(corpus, Shape(), cuts_of(2)[2], StopCondition(1), served=True)
    monkeypatch.setattr(batch_server.BatchReader, "next", failing)
    for loader in opened.loaders:
        with pytest.raises(RuntimeError, match="(?s)could not be made.*ZeroDivisionError: by a test"):
            loader.next_batch([], 0)
    opened.close()


def test_a_stop_while_the_buffer_fills_takes_nothing_and_ends_the_reading(tmp_path: Path) -> None:
    texts = texts_of([5] * 200)
    corpus, shape = write_corpus(tmp_path / "c", texts), Shape(samples_per_block=200, chunk_size=4, shuffle_rows=50)
    opened = Opened(corpus, shape, cuts_of(4)[2], StopCondition(1), served=True)

    def stop_at(loader: StreamLoader, rows: int) -> None:
        if loader.position.sequences and rows >= 20:
            raise StopRequested(StopReason.SIGTERM)

    for loader in opened.loaders:
        loader.on_fill = lambda rows, wanted, loader=loader: stop_at(loader, rows)
    stopped, place = 0, {}
    while not stopped:
        place = same([loader.state_dict() for loader in opened.loaders])
        for loader in opened.loaders:
            try:
                loader.next_batch([], 0)
            except StopRequested:
                stopped += 1
    assert stopped == len(opened.loaders) and place["sequences"] > 0
    assert all(loader.state_dict() == place for loader in opened.loaders)
    opened.close()
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(20)
            assert not thread.is_alive()


def test_a_rank_that_has_closed_a_stream_gets_nothing_more_of_it(tmp_path: Path) -> None:
    opened = Opened(write_corpus(tmp_path / "c", texts_of([5] * 20)), Shape(), cuts_of(2)[0])
    server = batch_server.BatchServer(opened.chunks(), 2)
    request = BatchRequest(0, StreamState(), RowForm(opened.shape.seq_len), 0, 0, 2, within_block=False)
    assert server.get(0, request, range(1), 0)
    server.close(0, request)
    calls = PickledCalls(server, 2)
    with pytest.raises(RuntimeError, match="asked for after the stream was closed"):
        batch_server.ServedBatches(calls, 0).batches(request, range(1), lambda rows, wanted: None).next()
    assert server.get(1, request, range(1, 2), 0), "the other rank has not"
    server.close(1, request)
    calls.shut_down()

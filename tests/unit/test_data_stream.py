"""The stream of an epoch: every sample once, in an order that the split over ranks and interruptions do not change."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hrm_ray.train.loaders import StopCondition
from tests.support.numbered_corpora import (
    Opened,
    Row,
    Shape,
    chunks_of,
    cuts_of,
    rows_of_chunk,
    rows_of_corpus,
    texts_of,
    write_corpus,
)

CASES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(-1, 20), min_size=1, max_size=60),
        "files": st.integers(1, 4),
        "effective": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "shape": st.builds(
            Shape,
            samples_per_block=st.integers(1, 30),
            chunk_size=st.integers(1, 12),
            seq_len=st.integers(4, 16),
            shuffle_rows=st.sampled_from([0, 1, 3, 10, 100]),
            seed=st.integers(0, 2**63 - 1),
            offset=st.integers(0, 5),
            max_rows=st.one_of(st.none(), st.integers(1, 40)),
        ),
    }
)


def corpus_of(case: dict[str, Any], folder: str) -> tuple[Path, list[str], list[Row]]:
    texts = texts_of(case["lengths"])
    expected = rows_of_corpus(texts, case["shape"])
    assume(expected)
    return write_corpus(Path(folder, "corpus"), texts, case["files"]), texts, expected


@settings(max_examples=150, deadline=None)
@given(CASES, st.data())
def test_every_sequence_once_for_any_split(case: dict[str, Any], data: st.DataObject) -> None:
    """The batches of any number of ranks are those of one, and an epoch of them is the naive reckoning's."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, _, expected = corpus_of(case, folder)
        shape: Shape = case["shape"]
        runs = []
        for batches in [*cuts_of(case["effective"])[:1], data.draw(st.sampled_from(cuts_of(case["effective"])))]:
            opened = Opened(corpus, shape, batches, StopCondition(case["epochs"]))
            runs.append(list(opened.steps()))
            opened.close()
    assert runs[0] == runs[1]
    rows = [row for batch in runs[0] for row in batch]
    size = len(expected)
    assert len(rows) == size * case["epochs"]
    for epoch in range(case["epochs"]):
        taken = rows[epoch * size : (epoch + 1) * size]
        assert Counter(taken) == Counter(expected)
        assert shape.shuffle_rows or taken == expected
    per_epoch = -(-size // case["effective"])
    assert len(runs[0]) == per_epoch * case["epochs"]
    assert all(len(batch) == case["effective"] for n, batch in enumerate(runs[0], 1) if n % per_epoch)


@settings(max_examples=150, deadline=None)
@given(CASES, st.data())
def test_going_on_from_any_step_changes_nothing(case: dict[str, Any], data: st.DataObject) -> None:
    """A run that dies and goes on from its last saved place, on other ranks, trains what an undisturbed one does; what
    was trained after that place is trained again and nothing else is."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, _, _ = corpus_of(case, folder)
        cuts, ends = cuts_of(case["effective"]), StopCondition(case["epochs"])
        whole = Opened(corpus, case["shape"], cuts[0], ends)
        expected = list(whole.steps())
        whole.close()
        trained: list[list[Row]] = []
        place: tuple[int, dict[str, Any]] = (0, {})
        for _ in range(data.draw(st.integers(1, 4))):
            opened = Opened(corpus, case["shape"], data.draw(st.sampled_from(cuts)), ends)
            for loader in opened.loaders:
                loader.load_state_dict(*place)
            for _ in range(data.draw(st.integers(0, 6))):
                rows = opened.step()
                if rows is not None:
                    trained.append(rows)
            place = opened.loaders[-1].epoch, opened.loaders[-1].state_dict()
            # Steps after the place was saved are lost with the process.
            for _ in range(data.draw(st.integers(0, 3))):
                opened.step()
            opened.close()
        opened = Opened(corpus, case["shape"], data.draw(st.sampled_from(cuts)), ends)
        for loader in opened.loaders:
            loader.load_state_dict(*place)
        trained += opened.steps()
        opened.close()
    assert trained == expected


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_a_shuffled_epoch_finishes_its_blocks_one_by_one(case: dict[str, Any]) -> None:
    shape: Shape = case["shape"]
    assume(shape.shuffle_rows)
    with tempfile.TemporaryDirectory() as folder:
        corpus, texts, expected = corpus_of(case, folder)
        opened = Opened(corpus, shape, cuts_of(1)[0], StopCondition(1))
        rows = [batch[0] for batch in opened.steps()]
        opened.close()
    blocks = [
        [row for chunk in block for row in rows_of_chunk(chunk, shape.seq_len)] for block in chunks_of(texts, shape)
    ]
    remaining = [Counter(block) for block in blocks if block]
    at = 0
    while at < len(rows):
        sizes = [sum(block.values()) for block in remaining]
        found = next(n for n, block in enumerate(remaining) if Counter(rows[at : at + sizes[n]]) == block)
        at += sizes[found]
        del remaining[found]
    assert not remaining and len(rows) == len(expected)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    texts = texts_of([12] * 400)
    corpus = write_corpus(tmp_path / "c", texts)
    orders = []
    for seed in (0, 1):
        shape = Shape(samples_per_block=100, chunk_size=20, shuffle_rows=40, seed=seed)
        opened = Opened(corpus, shape, cuts_of(1)[0], StopCondition(2))
        rows = [batch[0] for batch in opened.steps()]
        opened.close()
        orders += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    assert len({tuple(order) for order in orders}) == 4
    assert all(Counter(order) == Counter(orders[0]) for order in orders)
    # Shuffled is far from sorted: neighbours of the corpus seldom stay neighbours.
    place = {row: n for n, row in enumerate(rows_of_corpus(texts, shape))}
    neighbours = sum(abs(place[a] - place[b]) == 1 for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert neighbours < 0.1 * len(orders[0])


@pytest.mark.parametrize("shuffle_rows", [0, 10])
def test_it_ends_with_a_block_and_goes_on_with_the_next(tmp_path: Path, shuffle_rows: int) -> None:
    """The last batch of a block is smaller; resumed, the run takes up the next block, and rolls into the next epoch."""
    texts = texts_of([5] * 25)
    shape = Shape(samples_per_block=10, chunk_size=4, shuffle_rows=shuffle_rows)
    corpus = write_corpus(tmp_path / "c", texts)
    blocks = [Counter(row for chunk in block for row in rows_of_chunk(chunk, 8)) for block in chunks_of(texts, shape)]
    place: tuple[int, dict[str, Any]] = (0, {})
    found = []
    for _ in range(4):
        opened = Opened(corpus, shape, cuts_of(4)[1], StopCondition(after_block=True))
        for loader in opened.loaders:
            loader.load_state_dict(*place)
        found.append(Counter(row for batch in opened.steps() for row in batch))
        place = opened.loaders[0].epoch, opened.loaders[0].state_dict()
        opened.close()
    assert all(block in found[:3] for block in blocks) and found[3] in blocks
    assert place[0] == 1
    assert shuffle_rows or found == [*blocks, blocks[0]]


@pytest.mark.parametrize("seed", range(8))
def test_a_shuffled_first_epoch_with_a_start_ends_with_its_blocks(tmp_path: Path, seed: int) -> None:
    """The chunk that would end a block may be one that is left out."""
    texts = texts_of([5] * 40)
    shape = Shape(samples_per_block=20, chunk_size=4, shuffle_rows=100, seed=seed)
    corpus = write_corpus(tmp_path / "c", texts)
    opened = Opened(corpus, shape, cuts_of(1)[0], StopCondition(after_block=True), start=2)
    rows = Counter(batch[0] for batch in opened.steps())
    opened.close()
    first = [row for chunk in chunks_of(texts, shape)[0][2:] for row in rows_of_chunk(chunk, 8)]
    second = [row for chunk in chunks_of(texts, shape)[1] for row in rows_of_chunk(chunk, 8)]
    assert rows in (Counter(first), Counter(second))


def test_it_ends_with_an_epoch_and_goes_on_with_the_next(tmp_path: Path) -> None:
    texts = texts_of([5] * 25)
    corpus = write_corpus(tmp_path / "c", texts)
    place: tuple[int, dict[str, Any]] = (0, {})
    for epoch in range(3):
        opened = Opened(corpus, Shape(), cuts_of(4)[1], StopCondition(after_epoch=True))
        for loader in opened.loaders:
            loader.load_state_dict(*place)
        assert [row for batch in opened.steps() for row in batch] == rows_of_corpus(texts, Shape())
        assert opened.loaders[0].epoch == epoch
        place = opened.loaders[0].epoch, opened.loaders[0].state_dict()
        opened.close()


@pytest.mark.parametrize("shuffle_rows", [0, 10])
def test_the_first_epoch_begins_where_it_is_told(tmp_path: Path, shuffle_rows: int) -> None:
    texts = texts_of([5] * 25)
    shape = Shape(samples_per_block=10, chunk_size=4, shuffle_rows=shuffle_rows)
    corpus = write_corpus(tmp_path / "c", texts)
    opened = Opened(corpus, shape, cuts_of(1)[0], StopCondition(2), start=4)  # block 1, chunk 1
    rows = [batch[0] for batch in opened.steps()]
    opened.close()
    later = Counter(rows_of_corpus(texts[14:20], Shape(100, 4))) + Counter(rows_of_corpus(texts[20:], Shape(100, 4)))
    assert Counter(rows[: later.total()]) == later
    assert Counter(rows[later.total() :]) == Counter(rows_of_corpus(texts, shape))


def test_a_row_that_cannot_be_read_is_raised_where_its_chunk_is_asked_for(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", texts_of([5] * 20))
    file = corpus / "0000.jsonl"
    file.write_bytes(file.read_bytes() + b"not json\n")
    opened = Opened(corpus, Shape(chunk_size=5), cuts_of(2)[0], StopCondition(1))
    taken = 0
    with pytest.raises(Exception, match=r"0000\.jsonl:21"):
        for rows in opened.steps():
            taken += len(rows)
    opened.close()
    assert taken == len(rows_of_corpus(texts_of([5] * 20), Shape(chunk_size=5))) // 2 * 2

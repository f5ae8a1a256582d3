"""Rows that come from another process are those that a trainer reads for itself, for text and for puzzles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm_ray.errors import DataError
from hrm_ray.independent.assembly import claimed_rows
from hrm_ray.independent.claims import prepare_claims
from hrm_ray.independent.sent_rows import RowServer, sent_rows
from hrm_ray.ledger import Lease
from hrm_ray.train.claimed_rows import TakenRange
from hrm_ray.train.plan import RunPlan
from tests.support.block_trainers import plan_of
from tests.support.runs import PUZZLE, TEXT, puzzle_file, text_file


def text_plan(folder: Path) -> RunPlan:
    return plan_of(text_file(folder), folder / "b", *TEXT, "--epochs", 1, "--dataset-chunk-size", 20)


def puzzle_plan(folder: Path) -> RunPlan:
    return plan_of(puzzle_file(folder), folder / "b", *PUZZLE, "--epochs", 1)


def lease(chunk: int) -> Lease:
    return Lease("trainer-0", 1, 1, 0, chunk, 0, chunk, chunk, 0, None, None)


@pytest.mark.parametrize("make", [text_plan, puzzle_plan])
def test_sent_rows_are_those_of_the_bundle(tmp_path: Path, make: Callable[[Path], RunPlan]) -> None:
    plan = make(tmp_path)
    _, blocks = prepare_claims(plan, lambda message: None)
    with closing(RowServer(plan)) as server, closing(claimed_rows(plan)) as own:

        def call(name: str, *arguments: Any) -> Any:
            answer: Callable[..., Any] = server.methods[name]
            buffers: list[pickle.PickleBuffer] = []
            sent = pickle.dumps(answer(*arguments), protocol=5, buffer_callback=buffers.append)
            return pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])  # read-only, as through Ray

        with closing(sent_rows(plan, call)) as sent:
            for chunk in range(sum(block.chunks for block in blocks)):
                count = own.sequences(lease(chunk))
                assert sent.sequences(lease(chunk)) == count > 0
                taken, places = [TakenRange(lease(chunk), 0, count)], np.arange(count)
                want, found = (rows.columns(taken, places, count + 1) for rows in (own, sent))
                assert want.keys() == found.keys()
                assert all(values.flags.writeable for values in found.values())
                assert all(np.array_equal(want[name], found[name]) for name in want)
            if make is text_plan:
                with pytest.raises(DataError, match="the data ends before chunk"):
                    sent.sequences(lease(99))


def test_the_end_does_not_wait_for_a_chunk_and_no_data_is_opened_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm_ray.independent.sent_rows.CLOSE_S", 0.0)
    server = RowServer(text_plan(tmp_path))
    assert server.chunk(0) is not None
    with server._lock:  # as a call does that is reading
        server.close()
    with pytest.raises(DataError, match="the run ends"):
        server.chunk(1)

"""A run that changes between independent trainers and a strategy trains each row of an epoch exactly once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.errors import SettingsError
from hrm_ray.independent.anchor_keeper import AnchorKeeper
from hrm_ray.independent.synchronous_start import enter_puzzles
from hrm_ray.launch import after_trainers
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.ledger import Lease, Ledger, is_anchor, open_ledger, read_ledger, rest_of_epoch
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir
from hrm_ray.train.loaders import BatchLoader, HaltedSlots, RolloutLoader, SlotLoader
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.train.stream_loader import StreamLoader
from hrm_ray.types import Columns, StopReason
from tests.support.block_trainers import Block, plan_of
from tests.support.ledgers import ledger_of, linear, reported
from tests.support.runs import PUZZLE, TEXT, hrm, puzzle_file, train

CHUNKS = ("--dataset-chunk-size", 3, "--samples-per-block", 9, "--batch-size", 2)
SHUFFLED = ("--no-linear-dataset", "--shuffle-buffer-size", 7)
PUZZLES = ("--batch-size", 2, "--halt-max-steps", 2)


class InThisProcess:
    """The keeper of anchors without a process of its own."""

    def __init__(self, plan: RunPlan) -> None:
        self._keeper = AnchorKeeper(plan)
        self.trainers: dict[str, Any] = {}

    def call_keeper(self, name: str, call: str, arguments: Sequence[Any], meanwhile: Callable[[], None]) -> Any:
        return self._keeper.methods[call](*arguments)

    def close(self) -> None:
        self._keeper.close()


@contextmanager
def recorded() -> Iterator[list[bytes]]:
    """The rows that strategies train inside, as they come."""
    rows: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (StreamLoader, RolloutLoader, SlotLoader):
            _record(patch, kind, rows)
        yield rows


def _record(patch: pytest.MonkeyPatch, kind: type[BatchLoader], rows: list[bytes]) -> None:
    real = kind.next_batch

    def next_batch(loader: Any, halted: HaltedSlots, step: int) -> list[Columns]:
        micro_batches = real(loader, halted, step)
        rows.extend(row.tobytes() for micro in micro_batches for row in micro["inputs"][micro["active"]])
        return micro_batches

    patch.setattr(kind, "next_batch", next_batch)


def lines_file(folder: Path) -> Path:
    """Text in rows, so that it has several chunks whose sequences no batch size divides."""
    path = folder / "rows.jsonl"
    rows = (json.dumps({"text": f"{number}: {'abcdefgh ' * (1 + number % 4)}"}) for number in range(64))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def trained_by_two(data: Path, bundle: Path, words: Sequence[object], turns: int) -> Counter[bytes]:
    """A bundle of two trainers, of whom one is faster, that are stopped in the middle of an epoch: the last reports are
    staged, and the checkpoint is older. Gives the rows that they have trained."""
    plan = plan_of(data, bundle, *words)
    block = Block(plan, report_updates=2)
    if isinstance(plan.data, TextData) and plan.data.text.start:
        block.ledger.start_at(plan.data.text.start)
    keeper = AnchorKeeper(plan)
    keeper.save(block.coordinator.anchor, 0)
    with ExitStack() as opened:
        trainers = [opened.enter_context(block.trainer(f"trainer-{number}", number)) for number in range(2)]
        for trainer in trainers:
            assert trainer.join() is None
        for turn in range(turns):
            for trainer, times in zip(trainers, (3, 1), strict=True):
                for _ in range(times):
                    trainer.turn()
            if turn % 2:
                block.merge()
        block.coordinator.stop = StopReason.STOP_FILE
        for trainer in trainers:
            while trainer.turn() is None:
                pass
    assert block.ledger.staged()
    block.ledger.close()
    keeper.close()
    return block.rows()


@pytest.mark.parametrize(
    ("words", "turns"),
    [
        ((*TEXT, *CHUNKS), 3),
        ((*TEXT, *CHUNKS, *SHUFFLED), 3),
        ((*PUZZLE, *PUZZLES, "--supervision", "rollout"), 2),
        ((*PUZZLE, *PUZZLES), 2),
    ],
)
def test_a_strategy_trains_the_rest_of_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[object], turns: int
) -> None:
    """Also where it is stopped and resumed in that epoch, and the ledger holds."""
    monkeypatch.setattr(after_trainers, "Children", InThisProcess)
    is_text, bundle = "--vocab-size" in words, RunDir(tmp_path / "b")
    data = lines_file(tmp_path) if is_text else puzzle_file(tmp_path, count=30)
    with recorded() as expected:
        train(data, tmp_path / "plain", *words, "--epochs", 1)
    before = trained_by_two(data, bundle.root, (*words, "--epochs", 1), turns)
    assert 0 < before.total() < len(expected)
    with read_ledger(bundle.ledger) as ledger:
        trained_until = ledger.head
        assert trained_until is not None and is_anchor(trained_until)
    with recorded() as rows:
        for limit in (trained_until.round + 3, 999):
            ran = hrm("train", "--resume", "--bundle-dir", bundle.root, "--steps", limit)
            assert ran.code == 0, ran.err
            if limit < 999:
                assert "staged report(s) merged" in ran.out
                assert "the state of the optimizer is that of trainer-" in ran.out
                assert before.total() + len(rows) < len(expected)
    assert before + Counter(rows) == Counter(expected)
    with read_ledger(bundle.ledger) as ledger:
        assert list(violations(ledger)) == []
        assert ledger.epoch == (1 if is_text else 0)


def test_trainers_go_on_from_a_strategy_on_puzzles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its position is entered into the ledger once, whether or not trainers were before it."""
    monkeypatch.setattr(after_trainers, "Children", InThisProcess)
    data = puzzle_file(tmp_path, count=30)
    words = (*PUZZLE, *PUZZLES, "--supervision", "rollout", "--epochs", 3)
    before = trained_by_two(data, tmp_path / "b", words, 1).total()
    bundle = RunDir(tmp_path / "b")
    with recorded() as rows:
        assert hrm("train", "--resume", "--bundle-dir", bundle.root, "--steps", 20).code == 0
    train(data, tmp_path / "new", *words, "--steps", 20)
    for folder, trained in ((bundle, before + len(rows)), (RunDir(tmp_path / "new"), 40)):
        checkpoint = folder.newest_checkpoint()
        assert checkpoint is not None
        with ledger_of(folder.ledger, [1]) as ledger:
            for _ in range(2):
                enter_puzzles(ledger, checkpoint, 30)
                assert list(violations(ledger)) == []
                head = ledger.head
                assert head is not None and (head.round, head.total_sequences) == (20, trained)
                rest = rest_of_epoch(ledger)
                assert (rest.epoch, rest.sequences) == divmod(trained, 30)
                assert [(one.start, one.end) for one in rest.trained] == [(0, rest.sequences)]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("words", [(*TEXT, *CHUNKS), (*PUZZLE, *PUZZLES, "--supervision", "rollout")])
def test_reports_on_a_checkpoint_of_a_strategy_are_merged_or_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[object], back: bool
) -> None:
    """Trainers that went on from a strategy and were killed before their first round."""
    monkeypatch.setattr(after_trainers, "Children", InThisProcess)
    data = lines_file(tmp_path) if "--vocab-size" in words else puzzle_file(tmp_path, count=30)
    with recorded() as expected:
        train(data, tmp_path / "plain", *words, "--epochs", 1)
    bundle = RunDir(tmp_path / "b")
    with recorded() as rows:
        train(data, bundle.root, *words, "--epochs", 1, "--steps", 3)
        checkpoint = bundle.newest_checkpoint()
        assert checkpoint is not None
        block = Block(plan_of_resumed(bundle), report_updates=2)
        if isinstance(block.plan.data, PuzzlePlan):
            enter_puzzles(block.ledger, checkpoint, block.plan.data.rows)
        _stage_one(block)
        named = ("--resume-from", checkpoint) if back else ("--resume", "--bundle-dir", bundle.root)
        ran = hrm("train", *named, "--no-parallel-independent", "--steps", 999)
        assert ran.code == 0, ran.err
        said = "staged report(s) of independent trainers are dropped" if back else "staged report(s) merged"
        assert said in ran.out, ran.out
        assert f"the state of the optimizer is that of {checkpoint}" in ran.out or back
    merged = Counter[bytes]() if back else block.rows()
    assert merged + Counter(rows) == Counter(expected)
    with read_ledger(bundle.ledger) as ledger:
        assert list(violations(ledger)) == [] and ledger.staged() == []


def plan_of_resumed(bundle: RunDir) -> RunPlan:
    words: dict[str, str | bool] = {"--resume": True, "--bundle-dir": str(bundle.root)}
    return make_plan(resolve(load_run(words)))


def _stage_one(block: Block) -> None:
    """A trainer reports from the checkpoint, and is killed with the run."""
    head = block.ledger.head
    assert head is not None
    first = block.coordinator.anchor
    block.coordinator.anchor = replace(first, round=head.round, total_sequences=head.total_sequences)
    with block.trainer("trainer-0") as trainer:
        assert trainer.join() is None
        while not block.ledger.staged():
            trainer.turn()
        _drop_unreported(block)
    block.ledger.close()


def _drop_unreported(block: Block) -> None:
    """Of the rows that were trained keep those that were reported."""
    reported = sum(one.sequences for one in block.ledger.staged())
    rows = [row for batch in block.trained["trainer-0"] for row in batch]
    block.trained["trainer-0"] = [tuple(rows[:reported])]


def test_trainers_may_go_on_where_no_row_is_in_the_middle_of_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy that ended before its first step has changed nothing."""
    monkeypatch.setattr(after_trainers, "Children", InThisProcess)
    bundle = RunDir(tmp_path / "b")
    trained_by_two(puzzle_file(tmp_path, count=30), bundle.root, (*PUZZLE, *PUZZLES, "--epochs", 1), 2)
    assert hrm("train", "--resume", "--bundle-dir", bundle.root, "--steps", 1).code == 0
    words: dict[str, str | bool] = {"--resume": True, "--bundle-dir": str(bundle.root), "--parallel-independent": True}
    assert make_plan(resolve(load_run(words | {"--launcher": "subprocess"}))).checkpoint is not None
    assert hrm("train", "--resume", "--bundle-dir", bundle.root, "--steps", 20).code == 0
    with pytest.raises(SettingsError, match="in the middle of their segments"):
        resolve(load_run(words | {"--launcher": "subprocess"}))


def test_a_shuffled_first_epoch_from_a_later_chunk_on_is_ended_by_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_trainers, "Children", InThisProcess)
    words = (*TEXT, *CHUNKS, *SHUFFLED, "--start-block-id", 1, "--epochs", 2)
    bundle = RunDir(tmp_path / "b")
    trained_by_two(lines_file(tmp_path), bundle.root, words, 2)
    ran = hrm("train", "--resume", "--bundle-dir", bundle.root)
    assert ran.code == 5 and "begins in the middle of the data" in ran.faults[0]


def test_a_strategy_needs_the_ledger_of_the_trainers(tmp_path: Path) -> None:
    bundle = RunDir(tmp_path / "b")
    trained_by_two(puzzle_file(tmp_path), bundle.root, (*PUZZLE, *PUZZLES, "--epochs", 1), 1)
    bundle.ledger.unlink()
    ran = hrm("train", "--resume", "--bundle-dir", bundle.root)
    assert (ran.code, len(ran.faults)) == (5, 1)
    assert "the ledger is missing" in ran.faults[0] and "--student-init" in ran.faults[0]


def leases_of(ledger: Ledger, sizes: Sequence[int], cuts: Sequence[int]) -> list[Lease]:
    """All chunks claimed by a worker in pieces of `cuts`, in turn."""
    generation = ledger.start_worker("0")
    leases = []
    for piece in range(sum(sizes) * 2):
        given = ledger.claim("0", generation, linear, epochs=1)
        if not isinstance(given, Lease):
            break
        ledger.measure(given.chunk, sizes[given.chunk])
        lease = given.measured(sizes[given.chunk])
        end = lease.start + cuts[piece % len(cuts)]
        if lease.end is not None and end < lease.end:
            cut = ledger.split(lease, end)
            assert isinstance(cut, Lease)
            lease = cut
        leases.append(lease)
    return leases


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_rest_of_an_epoch_is_what_is_not_trained(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cuts: list[int], data: st.DataObject
) -> None:
    with open_ledger(tmp_path_factory.mktemp("l") / "ledger.sqlite", durable=False) as opened:
        pass
    with ledger_of(opened.path, [len(sizes)]) as ledger:
        leases = leases_of(ledger, sizes, cuts)
        taken = [lease for lease in leases if data.draw(st.booleans())]
        if taken:
            reported(ledger, "r", *taken)
            ledger.commit(1, parent=None, accepted=["r"], anchor="independent/anchors/a", checksum="a")
        ledger.stop_worker("0", 1)
        rest = rest_of_epoch(ledger)
        places = {(one.chunk, place) for one in rest.trained for place in range(one.start, one.end)}
        assert places == {(one.chunk, place) for one in taken for place in range(one.start, one.end or 0)}
        assert rest.sequences == len(places) and rest.epoch == 0
        whole = [all((chunk, place) in places for place in range(size)) for chunk, size in enumerate(sizes)]
        assert all(whole[: rest.position])

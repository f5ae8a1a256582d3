"""A block trainer is the ordinary loop: alone it trains what plain training does, among others every sample once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.errors import DataError
from hrm_ray.independent.anchor_keeper import AnchorKeeper
from hrm_ray.independent.calls import Progress, Report, Reported
from hrm_ray.independent.coordinator import Merged
from hrm_ray.independent.trainer import HEAR_EVERY_S, MOST_OPEN_REPORTS, NEWCOMER_STEPS, BlockTrainer
from hrm_ray.independent.weights import AVERAGE
from hrm_ray.ledger import Lease, Refused
from hrm_ray.ledger.verify import violations
from hrm_ray.merging import TOUCHED
from hrm_ray.rundir import RunDir
from hrm_ray.train.loop import StepReport
from hrm_ray.train.strategies.single import AVERAGE as AVERAGE_FILE
from hrm_ray.train.strategies.single import WEIGHTS
from hrm_ray.types import StopReason
from tests.support.block_trainers import Block, plan_of, same, shared_of
from tests.support.runs import EXPERTS, PUZZLE, TEXT, puzzle_file, text_file, train

CHUNKS = ("--dataset-chunk-size", "3", "--samples-per-block", "9")


def lines_file(folder: Path) -> Path:
    """Text in short rows, so that it has several chunks whose sequences no batch size divides."""
    path = text_file(folder, rows=40)
    words = path.read_text(encoding="utf-8")
    path.write_text("\n".join(words[at : at + 37] for at in range(0, len(words), 37)), encoding="utf-8")
    return path


SHUFFLED = ("--no-linear-dataset", "--shuffle-buffer-size", 1, "--epochs", 2, "--lr-schedule", "constant")
"""A shuffle window is one chunk."""


@pytest.mark.parametrize(("merge_after", "order"), [(1, ("--epochs", 1)), (3, SHUFFLED)])
def test_alone_it_is_plain_training_to_the_bit(tmp_path: Path, merge_after: int, order: Sequence[object]) -> None:
    """With no outer step: whole weights, moving average included, however late the merges come."""
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, *order, "--ema", 0.9, "--dropout-rate", 0.1, "--gradient-accumulation-steps", 2)
    words = (*words, "--batch-size", 2, "--lr", 1e-2)
    train(data, tmp_path / "plain", *words)
    plain = RunDir(tmp_path / "plain").newest_checkpoint()
    assert plain is not None
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=3, whole_weights=True)
    with block.trainer() as trainer:
        ended, turns = trainer.join(), 0
        while ended is None:
            ended, turns = trainer.turn(), turns + 1
            if turns % merge_after == 0:
                block.merge()
    assert ended is StopReason.FINISHED
    assert len(trainer._chain) <= 3  # those of merged rounds are forgotten
    expected = shared_of(read_tensors(plain / WEIGHTS))
    expected |= {f"{AVERAGE}{name}": tensor for name, tensor in read_tensors(plain / AVERAGE_FILE).items()}
    assert same(block.weights(), expected)
    assert len(block.anchors) > 3
    assert list(violations(block.ledger)) == []


def run(block: Block, trainers: Sequence[BlockTrainer], pace: Sequence[int], merge_every: int = 4) -> None:
    """Turns of the trainers, `pace` of each at a time, until all have left; a merge after every few of them."""
    for trainer in trainers:
        assert trainer.join() is None
    running, turns = dict(zip(trainers, pace, strict=True)), 0
    while running:
        for trainer, times in list(running.items()):
            for _ in range(times):
                turns += 1
                if trainer in running and trainer.turn() is not None:
                    del running[trainer]
                if turns % merge_every == 0:
                    block.merge()
        assert turns < 5000


def plain_rows(data: Path, plan_words: Sequence[object], folder: Path) -> Counter[bytes]:
    """The rows of an epoch, as one trainer alone takes them."""
    block = Block(plan_of(data, folder, *plan_words), report_updates=100)
    with block.trainer() as trainer:
        run(block, [trainer], [1])
    return block.rows()


def test_alone_on_puzzles_it_is_plain_training_to_the_bit(tmp_path: Path) -> None:
    """Rollout, two epochs in the epochs' own orders; the puzzle table too."""
    data = puzzle_file(tmp_path, count=16)
    words = (*PUZZLE, "--supervision", "rollout", "--epochs", 2, "--no-linear-dataset")
    train(data, tmp_path / "plain", *words)
    plain = RunDir(tmp_path / "plain").newest_checkpoint()
    assert plain is not None
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=3, whole_weights=True)
    with block.trainer() as trainer:
        run(block, [trainer], [1])
    assert same(block.weights(), shared_of(read_tensors(plain / WEIGHTS)))


def test_three_of_unequal_speed_train_every_sample_once(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1)
    expected = plain_rows(data, words, tmp_path / "alone")
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=2)
    with ExitStack() as opened:
        trainers = [opened.enter_context(block.trainer(str(n), n)) for n in range(3)]
        run(block, trainers, [4, 2, 1])
    assert block.rows() == expected
    assert min(len(batches) for batches in block.trained.values()) > 0
    assert block.coordinator.anchor.total_sequences == expected.total()
    assert list(violations(block.ledger)) == []


def test_rows_run_to_their_end_before_a_report(tmp_path: Path) -> None:
    """Carried supervision: only as many puzzles are taken as rows have halted, and none runs over a report."""
    data = puzzle_file(tmp_path, count=22)
    words = (*PUZZLE, "--epochs", 2)
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=4)
    running: list[bool] = []
    real = block.coordinator.report

    def report(given: Report) -> Reported | Refused:
        running.extend(not bool(carry.halted.all()) for carry in trainers[int(given.trainer)].loop.carries or [])
        return real(given)

    block.coordinator.report = report  # type: ignore[method-assign]
    with ExitStack() as opened:
        trainers = [opened.enter_context(block.trainer(str(n), n)) for n in range(2)]
        run(block, trainers, [2, 1])
    assert running and not any(running)
    assert block.rows().total() == 44
    assert block.coordinator.anchor.total_sequences == 44
    assert list(violations(block.ledger)) == []


def test_a_newer_anchor_keeps_the_open_work(tmp_path: Path) -> None:
    """weights = anchor + (weights - snap), and the report has the open work alone."""
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    with block.trainer("0") as first, block.trainer("1", 1) as second:
        assert first.join() is None and second.join() is None
        second.turn()  # open work of one update
        weights = second.loop.parts.strategy.full_weights()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        start = block.weights()
        while not block.ledger.staged():
            first.turn()
        block.clock.now_s = 100.0
        second.renew()
        block.merge()
        second.renew()
        second._lay_newer_anchor()
        anchor = block.weights()
        assert not same(anchor, start)
        for name in anchor:
            learned = before[name] - start[name]
            torch.testing.assert_close(weights[name], anchor[name] + learned, rtol=0, atol=1e-6)
        second._report()
        for name, change in block.change(block.ledger.staged()[-1]).items():
            torch.testing.assert_close(change, before[name] - start[name], rtol=0, atol=1e-6)


def test_each_report_has_what_was_learned_since_the_one_before(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    with block.trainer() as trainer:
        assert trainer.join() is None
        for _ in range(2 + 2 * MOST_OPEN_REPORTS):
            trainer.turn()
        weights = trainer.loop.parts.strategy.full_weights()
    first, second = map(block.change, block.ledger.staged())
    for name, start in block.weights().items():
        torch.testing.assert_close(start + first[name] + second[name], weights[name], rtol=0, atol=1e-6)


def test_the_next_report_waits_for_the_round_of_the_last(tmp_path: Path) -> None:
    """Otherwise it would go on from an anchor with the first report and lose the second from its weights."""
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    with block.trainer() as trainer:
        assert trainer.join() is None
        for _ in range(5):
            trainer.turn()
        assert len(block.ledger.staged()) == 1
        block.merge()
        trainer.renew()
        trainer.turn()  # lays the anchor, which has the first report, and has more than enough updates for another
        assert trainer._anchor == block.anchors[1] and len(block.ledger.staged()) == 1
        second, weights = block.change(block.ledger.staged()[0]), trainer.loop.parts.strategy.full_weights()
    for name, anchor in block.weights().items():
        torch.testing.assert_close(anchor + second[name], weights[name], rtol=0, atol=1e-6)
    assert block.ledger.staged()[0].sequences == 4 * 4  # three updates of 4 rows, and that of the last turn


def test_experts_are_reported_with_the_tokens_they_were_trained_on(tmp_path: Path) -> None:
    """Every token goes to two of four experts in each of the passes that train; a report counts from the one before."""
    data = lines_file(tmp_path)
    words = (*TEXT, *EXPERTS, *CHUNKS, "--epochs", 1, "--ema", 0.9, "--no-gradient-checkpointing")
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=1)
    with block.trainer() as trainer:
        assert trainer.join() is None
        for _ in range(2):
            trainer.turn()
    for change in map(block.change, block.ledger.staged()):
        counts = {name.removesuffix(TOUCHED): tensor for name, tensor in change.items() if name.endswith(TOUCHED)}
        stacks = {name for name in block.weights() if ".mlp.experts." in name}
        assert counts.keys() == stacks
        tokens = 4 * 16 * 2  # rows, positions, experts of a token
        assert all(count.shape == (4,) and count.sum() > 0 and count.sum() % tokens == 0 for count in counts.values())
        assert max(float(count.sum()) for count in counts.values()) <= 4 * tokens
    block.merge()
    assert block.coordinator.anchor.round > 0


def rejecting(names: dict[str, str]) -> Merged:
    """A merge that takes none of the members."""
    return Merged((), names, {}, "", "", {}, 0.0)


def take_leases(block: Block, trainer: BlockTrainer) -> None:
    """The leases run out, and another claims first."""
    block.clock.now_s += 1000.0
    block.ledger.expire(block.clock.now_s)
    trainer.renew()


def end_generation(block: Block, trainer: BlockTrainer) -> None:
    """The coordinator takes the trainer for dead."""
    block.coordinator.lost(trainer.name, "scripted")


def damage_ranges(block: Block, trainer: BlockTrainer) -> None:
    """The next report comes too late."""
    for lease in trainer._held:
        block.ledger.release(lease)


@pytest.mark.parametrize("fault", [take_leases, end_generation, damage_ranges])
def test_work_that_was_taken_away_is_trained_again_from_the_anchor(
    tmp_path: Path, fault: Callable[[Block, BlockTrainer], None]
) -> None:
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1)
    plain = Block(plan_of(data, tmp_path / "plain", *words), report_updates=4, whole_weights=True)
    with plain.trainer() as trainer:
        run(plain, [trainer], [1], merge_every=1)
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=4, whole_weights=True)
    with block.trainer() as trainer:
        assert trainer.join() is None
        for _ in range(6):
            trainer.turn()
            block.merge()
        assert trainer._work.updates == 2
        fault(block, trainer)
        ended = None
        while ended is None:
            ended = trainer.turn()
            block.merge()
    assert block.coordinator.anchor.total_sequences == plain.coordinator.anchor.total_sequences
    assert list(violations(block.ledger)) == []
    assert not plain.rows() - block.rows()
    # At least the two open updates of four rows, and at most a report's.
    assert 8 <= (block.rows() - plain.rows()).total() <= 16


def test_a_rejected_report_is_dropped_from_the_weights(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    with block.trainer() as trainer:
        assert trainer.join() is None
        trainer.turn()
        trainer.turn()
        request = block.coordinator.due()
        assert request is not None
        names = {member.name: "scripted" for member in request.members}
        block.coordinator.commit(request, merged=rejecting(names))
        trainer.renew()
        trainer._lay_newer_anchor()
        own = trainer.loop.parts.strategy.full_weights()
        assert same(block.weights(), {name: own[name] for name in block.weights()})


def test_a_stop_reports_what_is_trained_and_returns_the_rest(tmp_path: Path) -> None:
    """Another trainer goes on with the rest; nothing is trained twice."""
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1)
    expected = plain_rows(data, words, tmp_path / "alone")
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=5)
    with block.trainer("0") as trainer:
        assert trainer.join() is None
        for _ in range(7):
            trainer.turn()
        block.coordinator.stop = StopReason.STOP_FILE
        trainer.renew()
        assert trainer.turn() is StopReason.STOP_FILE
    assert block.ledger.leases("0") == [] and sum(one.sequences for one in block.ledger.staged()) == 28
    block.coordinator.stop = None
    with block.trainer("1", 1) as trainer:
        run(block, [trainer], [1])
    assert block.rows() == expected


def test_a_stop_is_heard_of_in_the_middle_of_a_report(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=50)
    with block.trainer() as trainer:
        assert trainer.join() is None
        for _ in range(3):
            assert trainer.turn() is None
        block.coordinator.stop = StopReason.SIGTERM
        block.clock.now_s += HEAR_EVERY_S
        assert trainer.turn() is StopReason.SIGTERM
    assert [one.sequences for one in block.ledger.staged()] == [12]


def test_a_trainer_that_comes_back_has_its_moments_and_another_warms_up(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1, "--lr-schedule", "constant", "--lr", 0.01)
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=3)
    with block.trainer("0") as trainer:
        assert trainer.join() is None
        for _ in range(4):
            trainer.turn()
        block.coordinator.stop = StopReason.INTERRUPT
        trainer.renew()
        trainer.turn()
        moments = trainer.loop.parts.strategy.optimizer.state_dict()["state"]  # type: ignore[attr-defined]
    block.coordinator.stop = None
    block.merge()
    with block.trainer("0") as back, block.trainer("1", 1) as newcomer:
        restored = back.loop.parts.strategy.optimizer.state_dict()["state"]  # type: ignore[attr-defined]
        assert all(torch.equal(moments[n]["exp_avg"], restored[n]["exp_avg"]) for n in moments)
        assert back.join() is None and newcomer.join() is None
        assert back.loop.progress.step == 4 and newcomer.loop.progress.step == 0
        step, first = back._step, newcomer._step
        back._fill_loader()
        newcomer._fill_loader()
        whole, warmed = step(), first()
        assert whole is not None and warmed is not None
        assert whole.lr == pytest.approx(0.01) and warmed.lr == pytest.approx(0.01 / (NEWCOMER_STEPS + 1))


def test_the_learning_rate_follows_the_samples_of_all(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 9, "--lr-schedule", "linear", "--lr", 0.01, "--warmup-steps", 0)
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=2)
    with block.trainer("0") as first, block.trainer("1", 1) as second:
        assert first.join() is None and second.join() is None
        for _ in range(2 + 2 * MOST_OPEN_REPORTS):
            first.turn()  # two reports, staged
        second.renew()
        second.turn()
    assert second.loop.clock.position == pytest.approx(3.0 + 2 * MOST_OPEN_REPORTS)


def test_with_another_batch_a_trainer_begins_without_its_moments(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1)
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=2)
    with block.trainer() as trainer:
        assert trainer.join() is None
        trainer.turn()
        trainer._leave(StopReason.STOP_FILE)
    chosen = block.plan.settings.optimizer.model_copy(update={"batch_size": 2})
    block.plan = replace(block.plan, settings=block.plan.settings.model_copy(update={"optimizer": chosen}))
    with block.trainer() as trainer:
        assert trainer.join() is None
        assert trainer.loop.progress.step == 0 and trainer._warm_up_left == NEWCOMER_STEPS


def test_an_anchor_that_was_deleted_meanwhile_is_passed_over_for_the_newest(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=1)
    with block.trainer("0") as first, block.trainer("1", 1) as slow:
        assert slow.join() is None and first.join() is None
        for _ in range(2):
            first.turn()
            block.clock.now_s += 1000.0
            block.coordinator.trainers.pop("1", None)  # nobody waits for it
            block.merge()
        assert len(block.anchors) == 3
        slow._news = replace(slow._news, anchor=block.anchors[1])
        (block.run_dir.root / block.anchors[1].path).unlink()
        assert slow.join() is None
        slow._news = replace(slow._news, anchor=block.anchors[1])
        slow._lay_newer_anchor()
        assert slow._anchor == block.anchors[2]


def test_an_anchor_that_is_gone_or_damaged_is_never_laid(tmp_path: Path) -> None:
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    path = block.run_dir.root / block.coordinator.anchor.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with block.trainer() as trainer, pytest.raises(DataError, match="sha256 differs"):
        trainer.join()
    path.unlink()
    with block.trainer() as trainer, pytest.raises(DataError, match="missing"):
        trainer.join()


def test_renewals_keep_leases_while_a_step_takes_long(tmp_path: Path) -> None:
    """The thread of `run` renews; an error of it ends the trainer between two steps."""
    data = lines_file(tmp_path)
    block = Block(plan_of(data, tmp_path / "block", *TEXT, *CHUNKS, "--epochs", 1), report_updates=2)
    renewed, joined = threading.Event(), block.coordinator.join

    def renew(trainer: str, generation: int, leases: Sequence[Lease], progress: Progress) -> Refused:
        assert leases
        renewed.set()
        raise ConnectionError("scripted")

    block.coordinator.join = lambda name: replace(joined(name), renew_every_s=0.01)  # type: ignore[method-assign]
    block.coordinator.renew = renew  # type: ignore[method-assign]
    with block.trainer() as trainer:
        real = trainer.loop.step

        def step() -> StepReport | None:
            assert renewed.wait(30)
            return real()

        trainer.loop.step = step  # type: ignore[method-assign]
        with pytest.raises(ConnectionError, match="scripted"):
            trainer.run()


def test_the_first_anchor_has_the_start_weights_also_where_its_writer_was_killed(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "student", *TEXT, "--steps", 1, "--lr", 1e-2)
    student = RunDir(tmp_path / "student")
    words = (*TEXT, "--epochs", 1, "--student-init", student.root)
    plan = plan_of(data, tmp_path / "tuned", *words)
    for _ in range(2):  # the second finds what the first, killed before its answer, has left
        keeper = AnchorKeeper(plan)
        written = keeper.begin(None)
        keeper.close()
        assert same(read_tensors(RunDir(plan.bundle).root / written.path), shared_of(read_tensors(student.weights)))

"""Local runs that go on after a failure: their files are those of an undisturbed run."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import DataError, Fault, HrmRayError, UnreadableError, unreadable_if_away
from hrm_ray.launch import supervisor
from hrm_ray.train import session
from hrm_ray.train.checkpoint import Checkpointer
from hrm_ray.train.loop import TrainingLoop
from tests.support.runs import PUZZLE, TEXT, Ran, computed, failing_at, hrm, puzzle_file, records, text_file, train

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits take no time; how long they would have been."""
    waited: list[float] = []
    monkeypatch.setattr(supervisor, "wait_for", lambda wait_s, stop: waited.append(wait_s))
    return waited


def failing_step(monkeypatch: pytest.MonkeyPatch, call: int, error: Exception = FULL) -> None:
    """The call of that number to make a step raises, all others work."""
    monkeypatch.setattr(TrainingLoop, "step", failing_at(call, TrainingLoop.step, error))


def same(one: Path, other: Path) -> None:
    """That two bundles have the same weights, metrics and evaluations."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for kind in ("train", "eval"):
        assert computed(one, kind) == computed(other, kind)


def only_restart(bundle: Path) -> dict[str, Any]:
    (found,) = (entry for entry in records(bundle, "event") if "restart" in entry)
    return found


@pytest.mark.parametrize(("call", "resumed"), [(2, 0), (6, 4)])
def test_a_text_run_begins_again_or_goes_on(
    call: int, resumed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    data, held_out = text_file(tmp_path, 60), text_file(tmp_path, 9, "held_out.txt", seed=1)
    words = (*TEXT, "--steps", "8", "--save-every", "4", "--eval-every", "1", "--eval-file", held_out, "--ema", "0.9")
    train(data, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        failing_step(patch, call)
        ran = train(data, tmp_path / "b", *words, "--log-file", tmp_path / "log.jsonl")
    same(tmp_path / "whole", tmp_path / "b")
    told = only_restart(tmp_path / "b")
    assert (told["restart"], told["cause"], told["failed_step"]) == (1, "disk", call - 1)
    assert told["resumed_step"] == resumed and told["lost_s"] >= 0 and waits == [10.0]
    assert hrm("ledger", "verify", tmp_path / "b").code == 0
    log = [entry["step"] for entry in records(tmp_path, "train", "log.jsonl")]
    assert log == list(range(1, 9)), "the copy of the records is rolled back too"
    assert "restart 1: disk" in ran.out and "resumed_step" not in ran.out
    if resumed == 0:
        assert len(list((tmp_path / "b" / "tensorboard").iterdir())) == 1


def test_a_restart_whose_workers_wrote_nothing_is_in_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text_file(tmp_path, 60)
    failing_step(monkeypatch, 6)
    monkeypatch.setattr(session, "load_checkpoint", failing_at(1, session.load_checkpoint, FULL))
    train(data, tmp_path / "b", *TEXT, "--steps", "8", "--save-every", "4")
    first, second = (entry for entry in records(tmp_path / "b", "event") if "restart" in entry)
    assert (first["restart"], first["failed_step"], second["restart"], second["resumed_step"]) == (1, 5, 2, 4)
    assert "resumed_step" not in first


def test_a_restart_after_the_last_step_is_not_said_to_have_trained_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text_file(tmp_path, 20)
    monkeypatch.setattr(Checkpointer, "save_bundle", failing_at(1, Checkpointer.save_bundle, FULL))
    ran = train(data, tmp_path / "b", *TEXT, "--epochs", "1")
    assert only_restart(tmp_path / "b")["restart"] == 1 and "Nothing was trained" not in ran.out + ran.err
    assert "Nothing was trained" in hrm("train", "--bundle-dir", tmp_path / "b", "--resume").out


def test_a_branch_begins_again_from_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text_file(tmp_path, 80)
    train(data, tmp_path / "source", *TEXT, "--steps", "4")
    branch = ("train", "--resume-from", tmp_path / "source" / "checkpoints" / "step_4", "--steps", "9")
    assert hrm(*branch, "--bundle-dir", tmp_path / "whole", "--save-every", "3").code == 0
    for call, resumed in [(1, 4), (2, 4), (4, 6)]:
        bundle = tmp_path / f"b{call}"
        with monkeypatch.context() as patch:
            failing_step(patch, call)
            ran = hrm(*branch, "--bundle-dir", bundle, "--save-every", "3")
        assert ran.code == 0, ran.err
        same(tmp_path / "whole", bundle)
        assert only_restart(bundle)["resumed_step"] == resumed
        assert hrm("ledger", "verify", bundle).code == 0


def test_an_older_checkpoint_of_its_own_bundle_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later checkpoints of that bundle are another run's, and set aside."""
    data = puzzle_file(tmp_path)
    train(data, tmp_path / "b", *PUZZLE, "--steps", "6", "--save-every", "2")
    resume = ("train", "--resume-from", tmp_path / "b" / "checkpoints" / "step_2", "--steps", "5", "--lr", "0.01")
    with monkeypatch.context() as patch:
        failing_step(patch, 1)
        assert hrm(*resume).code == 0
    assert only_restart(tmp_path / "b")["resumed_step"] == 2
    assert [entry["step"] for entry in records(tmp_path / "b")] == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "b" / "checkpoints").glob("*.superseded-*"))) == 2


def away(what: str) -> DataError:
    error = DataError(Fault(what, "cannot be read (Input/output error)", "Look at the disk"))
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


def test_data_that_cannot_be_read_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    data = text_file(tmp_path, 60)
    words = (*TEXT, "--steps", "6", "--save-every", "2")
    train(data, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        failing_step(patch, 4, away("corpus.txt"))
        train(data, tmp_path / "b", *words)
    same(tmp_path / "whole", tmp_path / "b")
    assert only_restart(tmp_path / "b")["cause"] == "data unreadable" and waits == [10.0]


def always(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(loop: TrainingLoop) -> None:
        raise error

    monkeypatch.setattr(TrainingLoop, "step", failing)


CASES: list[tuple[Callable[[], Exception], int, int]] = [
    (lambda: FULL, 4, 3),
    (lambda: away("corpus.txt"), 5, 3),
    (lambda: DataError(Fault("corpus.txt", "is cut short", "Copy it again")), 5, 0),
]


@pytest.mark.parametrize(("error", "code", "restarts"), CASES)
def test_what_does_not_pass_ends_the_run_with_its_exit_code(
    error: Callable[[], Exception],
    code: int,
    restarts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    always(monkeypatch, error())
    ran: Ran = hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    assert (ran.code, len(waits)) == (code, restarts), ran.err
    assert len(ran.faults) == 1 and "Traceback" not in ran.err and len(ran.faults[0]) < 300
    assert not (tmp_path / "b").exists(), "nothing was trained"


def test_only_a_file_system_that_does_not_answer_makes_data_unreadable() -> None:
    missing = DataError(Fault("a", "no such file", ""))
    missing.__context__ = FileNotFoundError(errno.ENOENT, "No such file")
    assert unreadable_if_away(missing) is missing
    assert type(unreadable_if_away(away("a"))) is UnreadableError
    other = HrmRayError(Fault("a", "b", ""))
    other.__cause__ = OSError(errno.EIO, "")
    assert unreadable_if_away(other) is other

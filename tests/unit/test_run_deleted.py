"""A bundle, or a file in it, that is deleted while a run writes into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.progress import stored_counts
from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir
from hrm_ray.train import evaluator, session
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.world import World
from tests.support.runs import PUZZLE, TEXT, files_below, hrm, puzzle_file, records, refused, text_file, train


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Scripted: what happens to the bundle right after a step."""

    def script(number: int, happens: Callable[[], object]) -> None:
        real = TrainingLoop.step

        def stepping(loop: TrainingLoop) -> StepReport | None:
            report = real(loop)
            if loop.progress.step == number:
                happens()
            return report

        monkeypatch.setattr(TrainingLoop, "step", stepping)

    return script


def renamed(bundle: Path) -> None:
    bundle.rename(bundle.with_name("elsewhere"))


def replaced(bundle: Path) -> None:
    """By a bundle that another run is preparing."""
    shutil.rmtree(bundle)
    bundle.mkdir()
    (bundle / "training_args.json").write_text("{}")


def now_a_file(bundle: Path) -> None:
    shutil.rmtree(bundle)
    bundle.write_text("mine")


ENDINGS: dict[str, Callable[[Path], None]] = {
    "deleted": shutil.rmtree,
    "renamed": renamed,
    "replaced": replaced,
    "a file": now_a_file,
}


@pytest.mark.parametrize(
    ("ending", "noticed"),
    [*((ending, "record") for ending in ENDINGS), ("deleted", "checkpoint"), ("replaced", "evaluation")],
)
def test_the_run_ends_at_the_next_record_or_save(
    ending: str, noticed: str, tmp_path: Path, after_step: Callable[[int, Callable[[], object]], None]
) -> None:
    data, bundle = text_file(tmp_path, 60), tmp_path / "x"
    words: dict[str, tuple[object, ...]] = {
        "record": ("--log-every", 4, "--save-every", 2),
        "checkpoint": ("--log-every", 100, "--save-every", 4),
        "evaluation": ("--log-every", 100, "--eval-every", 4, "--val-split", "train", "--eval-batches", 1),
    }
    left: dict[str, bytes] = {}

    def happens() -> None:
        ENDINGS[ending](bundle)
        left.update(files_below(tmp_path))

    after_step(3, happens)
    chosen = (*TEXT[:-2], "--steps", 9, *words[noticed])
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *chosen)
    assert ran.code == 5, ran
    (fault,) = ran.faults
    assert "the bundle was deleted or moved while training" in fault and str(bundle) in fault
    assert ran.err.count("\n") == 1
    assert "step 5/" not in ran.out
    now = files_below(tmp_path)
    # A run that has moved away is closed in order: its ledger's leases are released.
    assert {name: content for name, content in now.items() if "ledger" not in name and ".in_use" not in name} == {
        name: content for name, content in left.items() if "ledger" not in name and ".in_use" not in name
    }
    assert (tmp_path / "x").exists() == (ending in ("replaced", "a file"))


def test_deleted_during_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, data = tmp_path / "x", text_file(tmp_path)

    def evaluate(*given: Any) -> dict[str, float]:
        shutil.rmtree(bundle)
        return {"loss": 1.0}

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--eval-file", data, "--steps", 2)
    assert ran.code == 5 and "deleted or moved while training" in ran.err, ran
    assert not bundle.exists()


def test_puzzles_end_at_the_next_record_too(
    tmp_path: Path, after_step: Callable[[int, Callable[[], object]], None]
) -> None:
    bundle = tmp_path / "x"
    after_step(2, lambda: shutil.rmtree(bundle))
    ran = hrm("train", "--dataset-file", puzzle_file(tmp_path), "--bundle-dir", bundle, *PUZZLE, "--steps", 9)
    assert ran.code == 5 and "deleted or moved while training" in ran.err, ran
    assert not bundle.exists()


def test_deleted_before_the_last_step_is_saved(
    tmp_path: Path, after_step: Callable[[int, Callable[[], object]], None]
) -> None:
    bundle = tmp_path / "x"
    after_step(2, lambda: shutil.rmtree(bundle))
    ran = hrm(
        "train",
        "--dataset-file",
        text_file(tmp_path),
        "--bundle-dir",
        bundle,
        *TEXT[:-2],
        "--steps",
        2,
        "--log-every",
        100,
    )
    assert ran.code == 5 and "deleted or moved while training" in ran.err, ran
    assert not bundle.exists()


def test_checkpoints_that_are_deleted_are_written_again(
    tmp_path: Path, after_step: Callable[[int, Callable[[], object]], None]
) -> None:
    bundle = tmp_path / "x"
    after_step(3, lambda: shutil.rmtree(bundle / "checkpoints"))
    train(text_file(tmp_path), bundle, *TEXT, "--steps", 4, "--save-every", 2)
    assert RunDir(bundle).checkpoint_steps() == [4]


def test_metrics_that_are_deleted_begin_again(
    tmp_path: Path, after_step: Callable[[int, Callable[[], object]], None], caplog: pytest.LogCaptureFixture
) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "x"
    after_step(2, (bundle / "metrics.jsonl").unlink)
    train(data, bundle, *TEXT, "--steps", 4)
    assert [record["step"] for record in records(bundle)] == [2, 3, 4]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "metrics.jsonl was deleted" in warning
    train(data, bundle, *TEXT, "--steps", 5, "--resume")
    assert [record["step"] for record in records(bundle)] == [2, 3, 4, 5]


@pytest.mark.parametrize(("with_journal", "deleted_after"), [(True, 1), (False, 3), (True, 4)])
def test_a_ledger_that_is_deleted_is_written_again(
    with_journal: bool,
    deleted_after: int,
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], object]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before the first checkpoint, between two, and after the last but for the one at the end."""
    data, bundle = text_file(tmp_path, 60), tmp_path / "x"

    def delete() -> None:
        for file in bundle.glob("ledger.sqlite*"):
            if with_journal or file.name == "ledger.sqlite":
                file.unlink()

    after_step(deleted_after, delete)
    train(data, bundle, *TEXT, "--steps", 5, "--save-every", 2)
    assert any("ledger.sqlite was deleted" in record.message for record in caplog.records)
    assert hrm("ledger", "verify", bundle).code == 0
    assert [file.name for file in bundle.glob("*ledger.sqlite*")] == ["ledger.sqlite"]
    train(data, bundle, *TEXT, "--steps", 7, "--resume")
    assert hrm("ledger", "verify", bundle).code == 0


def test_a_folder_of_the_same_number_is_another(tmp_path: Path) -> None:
    """File systems give a new folder the number of one that was just deleted, unless somebody has it open."""
    folder = tmp_path / "x"
    for _ in range(20):
        folder.mkdir()
        watch = FolderWatch(folder)
        assert watch.fault() is None
        folder.rmdir()
        assert watch.fault() is not None
        folder.mkdir()
        fault = watch.fault()
        assert fault is not None and "another folder took its place" in fault.reason
        watch.close()
        folder.rmdir()


def merged(bundle: Path) -> list[tuple[int, dict[str, int]]]:
    """Sequences by state in each epoch, of a ledger that must be consistent."""
    with read_ledger(RunDir(bundle).ledger) as ledger:
        assert list(violations(ledger, stored_counts(RunDir(bundle)))) == []
        return [(one.epoch, {state.name: n.sequences for state, n in one.states.items()}) for one in ledger.counts()]


@pytest.mark.parametrize("lost", ["deleted", "empty"])
def test_a_resume_without_the_ledger_is_refused_with_the_way_out(lost: str, tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "x"
    train(data, bundle, *TEXT, "--steps", 4)
    RunDir(bundle).ledger.unlink()
    if lost == "empty":
        RunDir(bundle).ledger.touch()
    before = files_below(bundle)
    resume = ("train", "--bundle-dir", bundle, "--resume", "--steps", 6)
    naming = (RunDir(bundle).ledger, "the ledger", "is missing", "--new-ledger")
    for more in ((), ("--dry-run",)):
        refused(5, *resume, *more, naming=naming)
    branch = ("train", "--resume-from", RunDir(bundle).checkpoint(4), "--bundle-dir", tmp_path / "y", "--steps", 6)
    refused(5, *branch, naming=naming)
    assert files_below(bundle) == before, "no empty ledger is left"
    assert not (tmp_path / "y").exists()
    for words, folder in ((branch, tmp_path / "y"), (resume, bundle)):
        ran = hrm(*words, "--new-ledger")
        assert ran.code == 0 and hrm("ledger", "verify", folder).code == 0, ran


def test_a_new_ledger_beside_a_sound_one_is_noted(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "x"
    train(data, bundle, *TEXT, "--steps", 2)
    resume = ("train", "--bundle-dir", bundle, "--resume", "--steps", 4, "--new-ledger", "--dry-run")
    refused(2, *resume, "--strict", naming=("--new-ledger", "the ledger is there"))
    ran = hrm(*resume)
    assert ran.code == 0 and "no effect here: --new-ledger (the ledger is there" in ran.out + ran.err, ran


def test_ranks_hear_that_a_lost_ledger_is_still_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group limits how long they wait."""
    data, bundle = text_file(tmp_path), tmp_path / "x"
    train(data, bundle, *TEXT, "--steps", 4)
    RunDir(bundle).ledger.unlink()
    answers: list[object] = []
    real = World.from_leader

    def from_leader(world: World, make: Callable[[], object]) -> object:
        answer = real(world, make)
        if "read_on" in make.__qualname__:
            answers.append(answer)
        return answer

    monkeypatch.setattr(World, "from_leader", from_leader)
    monkeypatch.setattr(session, "ANSWER_EVERY_S", 0.0)
    train(data, bundle, "--resume", "--new-ledger", "--steps", 5)
    assert len(answers) > 1 and answers == [*([True] * (len(answers) - 1)), False]


@pytest.mark.parametrize("shuffle_rows", [0, 40])
@pytest.mark.parametrize("branches", [False, True])
def test_a_new_ledger_says_what_the_lost_one_said(shuffle_rows: int, branches: bool, tmp_path: Path) -> None:
    """In the third epoch, over several chunks, in order and shuffled; the run then goes on as if nothing was lost."""
    data, bundle = tmp_path / "data", tmp_path / "x"
    data.mkdir()
    for number in range(6):
        text_file(data, 5, name=f"{number}.txt", seed=number)
    order = ("--no-linear-dataset", "--shuffle-buffer-size", shuffle_rows) if shuffle_rows else ()
    words = (*TEXT, *order, "--dataset-chunk-size", 2, "--lr-schedule", "constant", "--save-every", 3)
    train(data, tmp_path / "whole", *words, "--steps", 24)
    train(data, bundle, *words, "--steps", 20)
    RunDir(bundle).ledger.unlink()
    if branches:
        source, bundle = bundle, tmp_path / "y"
        train(data, bundle, "--resume-from", RunDir(source).checkpoint(20), "--steps", 24, "--new-ledger")
    else:
        train(data, bundle, "--resume", "--new-ledger", "--steps", 24)
    assert merged(bundle) == merged(tmp_path / "whole")
    assert RunDir(bundle).weights.read_bytes() == RunDir(tmp_path / "whole").weights.read_bytes()

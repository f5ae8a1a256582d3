"""--auto-resume: the same command starts a run, goes on with it, and leaves it alone once it has finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hrm_ray.rundir import RunDir
from hrm_ray.train.loop import StepReport, TrainingLoop
from tests.support import paused_command
from tests.support.runs import TEXT, Ran, computed, files_below, hrm, records, refused, stopping_at, text_file, train

ENDS = ("--steps", "7", "--save-every", "3")


def killed_in(monkeypatch: pytest.MonkeyPatch, step: int, *words: object) -> Ran:
    """The command, ended in a step like a process that is killed: without a save."""
    real = TrainingLoop.step

    def stepping(loop: TrainingLoop) -> StepReport | None:
        if loop.progress.step + 1 == step:
            raise KeyboardInterrupt
        return real(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "step", stepping)
        ran = hrm(*words)
    assert ran.code == 130, ran
    return ran


def test_one_command_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle, log = text_file(tmp_path), tmp_path / "b", tmp_path / "log.jsonl"
    train(data, tmp_path / "whole", *TEXT, *ENDS)
    again = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *ENDS, "--auto-resume", "--log-file", log)
    killed_in(monkeypatch, 3, *again)
    assert RunDir(bundle).checkpoint_steps() == [] and len(records(bundle)) == 2
    killed_in(monkeypatch, 6, *again)
    assert RunDir(bundle).checkpoint_steps() == [3]
    ran = hrm(*again)
    assert ran.code == 0 and f"resume  {RunDir(bundle).checkpoint(3)}" in ran.out, ran
    assert computed(bundle) == computed(tmp_path / "whole")
    assert log.read_bytes() == RunDir(bundle).metrics.read_bytes()
    before = files_below(tmp_path)
    ran = hrm(*again)
    assert (ran.code, ran.err) == (0, "") and "The run has finished: there is nothing to train" in ran.out, ran
    assert "ended   finished at step 7" in ran.out and files_below(tmp_path) == before
    ran = hrm(*again, "--steps", "9")
    assert ran.code == 0 and "ended   finished at step 9" in ran.out, ran


def test_a_damaged_newest_checkpoint(tmp_path: Path) -> None:
    """The newest whole one serves, with a warning; under --strict, and without a whole one, it is an error."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, tmp_path / "whole", *TEXT, *ENDS)
    with stopping_at(6):
        train(data, bundle, *TEXT, *ENDS)
    newest = RunDir(bundle).checkpoint(6)
    (newest / "state.json").write_text("{")
    again = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *ENDS, "--auto-resume")
    refused(5, *again, "--strict", naming=(newest, "state.json"))
    ran = hrm(*again)
    assert ran.code == 0 and f"[WARNING] step 3: {newest} is damaged: the run resumes from step_3." in ran.out, ran
    assert computed(bundle) == computed(tmp_path / "whole")
    for step in RunDir(bundle).checkpoint_steps():
        (RunDir(bundle).checkpoint(step) / "state.json").unlink()
    refused(5, *again, "--steps", "8", naming=(RunDir(bundle).checkpoint(7), "state.json"))


def test_what_it_does_not_replace(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    again = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *ENDS, "--auto-resume")
    refused(2, *again, "--resume", naming=("--auto-resume with --resume", "one of the two"))
    refused(2, *again, "--resume-from", bundle, naming=("--auto-resume with --resume-from", "one of the two"))
    bundle.mkdir()
    (bundle / "thesis.txt").write_text("of somebody")
    refused(2, *again, naming=(bundle, "thesis.txt"))
    (bundle / "thesis.txt").unlink()
    train(data, bundle, *TEXT, "--steps", "1")
    for name in ("checkpoints/step_1/manifest.json", "checkpoints/step_1"):
        path = bundle / name
        path.unlink() if path.is_file() else path.rename(bundle / "step_1")
    refused(2, *again, naming=(bundle, "no checkpoint yet"))


@pytest.mark.parametrize("left", ["reports.json", "wandb/run.wandb", "best/model.safetensors", "metrics.jsonl"])
def test_what_a_run_killed_before_its_first_checkpoint_leaves(left: str, tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "1")
    for path in list(bundle.iterdir()):
        if path.name not in ("training_args.json", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (bundle / left).parent.mkdir(exist_ok=True)
    with (bundle / left).open("a") as file:
        file.write("{}\n" if left == "reports.json" else "")
    assert (
        hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps", "2", "--auto-resume").code == 0
    )
    assert RunDir(bundle).checkpoint_steps() == [2]
    # The weights of an evaluation are all that such a run has left.
    assert (bundle / "best.superseded-1" / "model.safetensors").is_file() == (left == "best/model.safetensors")


def test_without_a_name_the_data_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    again = ("train", "--dataset-file", "corpus.txt", *TEXT, "--auto-resume", "--steps")
    assert hrm(*again, "1").code == 0
    ran = hrm(*again, "2")
    assert ran.code == 0 and "ended   finished at step 2" in ran.out
    assert RunDir(tmp_path / "artifacts" / "brains" / "corpus").checkpoint_steps() == [1, 2]


def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    again = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *ENDS, "--auto-resume")
    second = paused_command.start("hrm_ray.launch.run:run_lock", *again)
    assert hrm(*again).code == 0
    before = files_below(bundle)
    code, err = paused_command.go_on(second)
    assert code == 2 and "another run saved a checkpoint in it" in err and "Run the command again" in err
    assert files_below(bundle) == before

"""Standard output and error that are closed, full, unread or of a small encoding: no traceback, and a run goes on."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

import pytest

from hrm_ray.cli.main import main
from hrm_ray.ledger.database import fault_of
from hrm_ray.metrics.tensorboard import TensorBoardSink
from hrm_ray.rundir import RunDir
from hrm_ray.train import checkpoint
from hrm_ray.train.ledger_writer import LedgerWriter
from tests.support.runs import TEXT, failing_at, hrm, refused, text_file

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
STEPS = ("--steps", "2")


def code_of(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert isinstance(left.value.code, int)
    return left.value.code


def full(buffered: bool = True) -> IO[Any]:
    """A stream that is always full; an unbuffered one loses what it could not write."""
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (closed by the descriptor's end)
    stream.reconfigure(write_through=not buffered)
    return stream


@FULL
@pytest.mark.parametrize("buffered", [True, False])
def test_a_run_goes_on_where_its_output_is_full(
    buffered: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    with redirect_stdout(full(buffered)):
        assert code_of("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *STEPS) == 0
    said = capsys.readouterr().err
    assert "warning: standard output cannot be written (No space left" in said and "Traceback" not in said
    assert RunDir(bundle).checkpoint_steps() == [2] and RunDir(bundle).weights.is_file()


@FULL
@pytest.mark.parametrize("buffered", [True, False])
def test_other_commands_say_that_their_output_is_full(
    buffered: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("--version",), ("train", "--dataset-file", text_file(tmp_path), *TEXT, "--dry-run")):
        with redirect_stdout(full(buffered)):
            assert code_of(*words) == 4
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "cannot be written (No space left" in said and said.count("\n") == 1
    with redirect_stderr(full(buffered)):
        assert code_of("train", "--stepz", "3") == 2


def test_a_closed_output_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert code_of("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *STEPS) == 0
    assert RunDir(bundle).checkpoint_steps() == [2]


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed as on POSIX")
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints would otherwise be written into it, into the ledger for example."""
    body = (
        "import os, sys\n"
        "from hrm_ray.cli.output import prepare_streams\n"
        "prepare_streams()\n"
        "with open(sys.argv[1], 'w') as first:\n"
        "    os.write(1, b'printed'); os.write(2, b'printed')\n"
        "    print('said')\n"
    )
    file = tmp_path / "first"
    command = [sys.executable, "-c", body, str(file)]
    ran = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert (ran.returncode, file.read_text()) == (0, "")


def test_an_encoding_that_lacks_characters(tmp_path: Path) -> None:
    folder = tmp_path / "t\u00fc\u6f22"
    folder.mkdir()
    said = tmp_path / "said"
    with said.open("w", encoding="ascii") as stream, redirect_stdout(stream):
        assert code_of("train", "--dataset-file", text_file(folder), *TEXT, "--dry-run") == 0
    assert "t\\xfc\\u6f22" in said.read_text()


@pytest.mark.skipif(os.name == "nt", reason="there a working folder cannot be deleted")
def test_a_deleted_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        refused(3, "train", "--dataset-file", "x.txt", naming=("the working folder", "cd"))
    finally:
        os.chdir(tmp_path)


@FULL
def test_a_log_file_that_is_a_device(tmp_path: Path) -> None:
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(2, *words, "--log-file", "/dev/full", naming=("--log-file /dev/full", "not a file"))
    os.mkfifo(tmp_path / "pipe")
    refused(2, *words, "--log-file", tmp_path / "pipe", naming=("--log-file", "not a file"))


@pytest.mark.parametrize("fails", ["ledger", "checkpoint"])
def test_a_disk_that_is_full_in_a_run_is_one_message(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names --resume, which then goes on; what cannot be closed either adds nothing."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cannot(*words: Any) -> Any:
        raise full_disk

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardSink, "close", cannot)
        if fails == "checkpoint":
            real = checkpoint.save_tensors
            patch.setattr(checkpoint, "save_tensors", failing_at(2, real, full_disk))
        else:
            full = fault_of(sqlite3.OperationalError("database or disk is full"), RunDir(bundle).ledger)
            patch.setattr(LedgerWriter, "commit", failing_at(2, LedgerWriter.commit, full))
        words = ("--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps", "4", "--save-every", "2")
        ran = hrm("train", *words, "--max-failures", "0")
    assert ran.code == 4 and ran.err.count("\n") == 1, ran
    assert ran.err.startswith(f"error: {bundle}") and "is full" in ran.err.replace("No space left", "is full")
    assert "--resume" in ran.err and RunDir(bundle).checkpoint_steps() == [2]
    assert hrm("train", "--bundle-dir", bundle, "--resume").code == 0

"""`hrm-ray ledger`: what it says, what it ends with, and that looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_ray.ledger import Ledger, Span, SynchronousRun
from hrm_ray.rundir import RunDir
from tests.support.ledgers import claimed, ledger_of, linear, reported
from tests.support.runs import hrm, refused


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tmp_path / "brain"


@pytest.fixture
def ledger(bundle: Path) -> Ledger:
    bundle.mkdir()
    ledger = ledger_of(RunDir(bundle).ledger, [2, 2])
    run = SynchronousRun(ledger, None)
    for step in range(1, 8):
        lease = run.claim(linear)
        assert lease is not None
        run.measure(lease.chunk, 10)
        span = Span(lease.epoch, lease.chunk, 0, 10)
        run.commit_checkpoint(step, step - 1 or None, [span], f"checkpoints/step_{step}", "sum")
    generation = ledger.start_worker("w")
    for number in (1, 2):
        reported(ledger, f"bad {number}", claimed(ledger, "w", generation))
        ledger.reject(f"bad {number}", "it raised the loss")
    return ledger


def test_show_says_where_a_run_stands(bundle: Path, ledger: Ledger) -> None:
    ran = hrm("ledger", "show", bundle)
    assert (ran.code, ran.err) == (0, "")
    for part in (
        *("epoch 1", "2 blocks, 4 chunks\n", "40 sequences MERGED in 4 ranges, complete", "30 sequences MERGED"),
        *("round 7, 70 sequences, checkpoints/step_7", "round 3", "quarantined  1 range\n"),
        "epoch 1 chunk 3[0:10]: rejected 2 times; the last: it raised the loss",
    ):
        assert part in ran.out, ran.out
    assert "round 2 " not in ran.out


def test_show_writes_json(bundle: Path, ledger: Ledger, tmp_path: Path) -> None:
    place = tmp_path / "ledger.json"
    ran = hrm("ledger", "show", bundle, "--json", place)
    assert (ran.code, ran.out) == (0, f"{place}\n")
    assert json.loads(place.read_text(encoding="utf-8"))["head"] == 7
    refused(2, "ledger", "show", bundle, "--json", tmp_path / "nowhere" / "x.json", naming=("--json", "nowhere"))


@pytest.mark.parametrize("ended", [False, True])
def test_looking_changes_nothing_and_disturbs_nobody(bundle: Path, ledger: Ledger, ended: bool) -> None:
    if ended:
        ledger.close()
    before = {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix != ".sqlite-shm"}
    assert hrm("ledger", "show", bundle).code == hrm("ledger", "verify", bundle).code == 0
    assert {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix != ".sqlite-shm"} == before
    if not ended:
        ledger.start_worker("w")


def test_verify_says_that_it_holds(bundle: Path, ledger: Ledger) -> None:
    ran = hrm("ledger", "verify", bundle)
    assert ran.code == 0 and ran.out == f"{bundle}: ledger OK; 70 sequences are merged, in 7 rounds\n"


def test_verify_names_what_does_not_hold(bundle: Path, ledger: Ledger) -> None:
    ledger.database.rows("UPDATE ranges SET end = 8 WHERE chunk = 1 AND epoch = 0")
    ran = hrm("ledger", "verify", bundle)
    assert (ran.code, ran.err) == (1, "")
    assert "epoch 0, chunk 1: its ranges end at 8, but it has 10 sequences" in ran.out
    assert ran.out.splitlines()[-1] == f"{bundle}: ledger is inconsistent: 3 violations"


def test_many_violations_are_counted(bundle: Path, ledger: Ledger) -> None:
    ledger.database.rows("UPDATE epochs SET cursor = 300 WHERE epoch = 0")
    ledger.database.rows("UPDATE epochs SET start_chunk = 100")
    ledger.database.write(
        "INSERT INTO ranges VALUES (0, ?, 0, ?, 1, 0, NULL, NULL, 0, NULL, 0, 0, NULL, NULL)",
        [(chunk, chunk) for chunk in range(200, 300)],
    )
    ran = hrm("ledger", "verify", bundle)
    assert ran.code == 1 and len(ran.out.splitlines()) == 51
    assert int(ran.out.split()[-2]) > 100


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_bad_path(tmp_path: Path, command: str) -> None:
    refused(2, "ledger", command, tmp_path / "nowhere", naming=("nowhere", "no such folder"))
    refused(2, "ledger", command, tmp_path, naming=("ledger.sqlite", "no ledger of chunks"))
    RunDir(tmp_path).ledger.write_text("no database at all, but text of some length\n" * 9, encoding="utf-8")
    refused(5, "ledger", command, tmp_path, naming=("ledger.sqlite",))


def test_a_run_before_its_first_round(bundle: Path) -> None:
    bundle.mkdir()
    ledger_of(RunDir(bundle).ledger, [2], ended=False).close()
    shown, verified = hrm("ledger", "show", bundle), hrm("ledger", "verify", bundle)
    assert "no round yet" in shown.out and "1 block, 2 chunks so far" in shown.out
    assert verified.code == 0 and "nothing is merged yet" in verified.out

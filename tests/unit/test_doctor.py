"""`hrm-ray doctor`: what it asks and whom, no secret in it, and a report also where libraries are broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import Fault, UnavailableError
from hrm_ray.launch import doctor
from hrm_ray.launch.node_report import Measured, NodeReport
from hrm_ray.orchestration import cluster_look
from tests.support.runs import hrm

ROOT = Path(__file__).resolve().parents[2]
SECRET = "AKIA-VERY-SECRET"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster_look, "start_here", lambda: (5.0, 0.5))
    monkeypatch.chdir(tmp_path)


def few_options(monkeypatch: pytest.MonkeyPatch, *shown: str) -> None:
    every = list(doctor._asked())
    chosen = [each for each in every if each[0] in shown]
    assert len(chosen) == len(shown)
    monkeypatch.setattr(doctor, "_asked", lambda: iter(chosen))


def report(*words: object) -> dict[str, list[dict[str, Any]]]:
    found = json.loads(hrm("doctor", "--json", *words).out)
    assert isinstance(found, dict)
    return found


def value(part: list[dict[str, Any]], name: str) -> str:
    (found,) = (row["value"] for row in part if row["name"] == name)
    return str(found)


def test_options_are_refused_as_a_run_refuses_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every reason names this machine, not how options depend on each other; nothing is left in the folder."""
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")  # It is not asked: the question is about this machine.
    monkeypatch.setattr("hrm_ray.model.transforms.compile.compile_obstacle", lambda *_: "no compiler found")
    monkeypatch.setattr("hrm_ray.launch.preflight.find_spec", lambda name: None)
    rows = {row.name: row for row in doctor.option_rows()}
    assert rows["--device cpu"].works and rows["--launcher subprocess"].works and rows["--load-in-4bit"].works
    assert rows["--use-chunked-training"].works and rows["--amp-dtype bf16"].works
    assert "no compiler" in rows["--compile"].value and rows["--strategy zero2"].value == "DeepSpeed is not installed"
    here = ("this machine", "this is cpu", "on the CPU", "is not installed", "no compiler")
    assert [row for row in rows.values() if not row.works and not any(words in row.value for words in here)] == []
    assert list(tmp_path.iterdir()) == []


def test_the_report_has_no_secret_and_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few_options(monkeypatch, "--device cpu", "--report-to mlflow")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(SECRET)
    for name in ("AWS_ACCESS_KEY_ID", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    bundles = tmp_path / "bundles"
    plain = hrm("doctor", "--bundle-dir", bundles)
    assert plain.code == 0 and "Hugging Face      present (HF_TOKEN)" in plain.out
    assert "present (AWS_ACCESS_KEY_ID, ~/.aws/credentials)" in plain.out and "free at ~/bundles" in plain.out
    found = report("--bundle-dir", bundles)
    assert value(found["credentials"], "Google Cloud") == "none found"
    assert value(found["versions"], "torch") and value(found["ray"], "start").startswith("5.0 s")
    for text in (plain.out + plain.err, json.dumps(found)):
        assert SECRET not in text and str(tmp_path) not in text


def test_a_broken_ray_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    few_options(monkeypatch, "--launcher ray", "--device cpu")

    def broken() -> tuple[float, float]:
        raise UnavailableError(Fault("the local Ray cluster", "did not start: no socket", ""))

    monkeypatch.setattr(cluster_look, "start_here", broken)
    ran = hrm("doctor")
    assert ran.code == 0 and "NO  start  did not start: no socket" in ran.out
    assert "work here: --launcher ray, --device cpu" in ran.out


def test_without_torch_and_ray_it_still_reports() -> None:
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['ray'] = None\n"
        "from hrm_ray.cli.main import main\nmain(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "NO  devices  ModuleNotFoundError" in done.stdout and "NO  ray  ModuleNotFoundError" in done.stdout
    assert "numpy" in done.stdout and "available" in done.stdout


def test_the_nodes_of_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of that name on a node's own disk is not the shared one."""
    few_options(monkeypatch, "--device cpu")
    asked: list[Path] = []

    def reports(address: str, bundle: Path, libraries: object) -> Iterator[NodeReport]:
        assert address == "10.0.0.1:6379" and bundle.parent.is_dir() and bundle.parent.parent == tmp_path / "bundles"
        asked.append(bundle)
        amounts = {"CPU": 4.0, "GPU": 1.0}
        measured = [Measured(8 * 10**9, 10**9, folder, {"ray": "2.60.0"}) for folder in (True, False)]
        yield from (NodeReport(f"10.0.0.{number}", amounts, each) for number, each in enumerate(measured, 1))
        yield NodeReport("10.0.0.3", amounts, None, "hrm_ray is not installed there")

    monkeypatch.setattr(cluster_look, "node_reports", lambda *words: list(reports(*words)))
    ran = hrm("doctor", "--ray-address", "10.0.0.1:6379", "--bundle-dir", tmp_path / "bundles")
    assert ran.code == 1
    assert "ok  10.0.0.1  4 CPUs, 1 GPUs, 8.0 GB of memory, ray 2.60.0; sees" in ran.out
    assert "NO  10.0.0.2  4 CPUs, 1 GPUs, 8.0 GB of memory, ray 2.60.0; does not see" in ran.out
    assert "hrm_ray is not installed there" in ran.out
    assert asked and not asked[0].parent.exists()


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    few_options(monkeypatch, "--device cpu")
    ran = hrm("doctor", "--ray-address", "127.0.0.1:1")
    assert ran.code == 1 and "nothing answers there" in ran.out and "work here: --device cpu" in ran.out


def test_a_training_on_each_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is stopped so long after its first step; nothing is left."""
    monkeypatch.setattr(doctor, "TRAINING_S", 0.0)
    monkeypatch.setattr(doctor, "_on_each_device", lambda: {"cpu": SMALL, "GPU 7": ("--cuda-idz", "7")})
    monkeypatch.setattr(doctor, "TRAINED_CHARACTERS", 2000)
    said: list[str] = []
    good, bad = doctor.trainings(tmp_path, None, said.append)
    assert good.works and good.name == "cpu" and re.match(r"\d+ steps, loss \d", good.value)
    assert bad.works is False and bad.value.startswith("error: --cuda-idz: is not an option")
    assert len(said) == 2 and list(tmp_path.iterdir()) == []


def test_a_training_that_does_not_begin_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "START_S", 0.0)
    monkeypatch.setattr(doctor, "_on_each_device", lambda: {"cpu": SMALL})
    (row,) = doctor.trainings(tmp_path, None, lambda text: None)
    assert row.works is False and row.value.endswith("0 step(s) were trained") and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows kills at once")
def test_a_training_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "END_S", 0.05)
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert doctor._end(process)
    assert process.returncode


SMALL = (
    *("--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--no-use-moe", "--threads", "1"),
    *("--vocab-size", "300", "--batch-size", "2", "--max-seq-len", "16", "--device", "cpu", "--launcher", "local"),
)

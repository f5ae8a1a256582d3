"""`hrm-ray submit` and `hrm-ray stop` against a real head: exit codes come through, and a stop is saved."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hrm_ray.rundir import RunDir, verify_checkpoint
from tests.support.runs import TEXT, text_file

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.skipif(os.name == "nt", reason="heads run on Linux")]
TOKEN = "0123456789abcdef" * 4


def free_ports(count: int) -> list[int]:
    with_sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in with_sockets]
    for each in with_sockets:
        each.close()
    return ports


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture
def head() -> Iterator[str]:
    """The address of the job server of a head of its own."""
    folder = tempfile.mkdtemp(prefix="head-", dir="/tmp")
    port, dashboard, agent, client = free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", "--num-cpus=1"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--disable-usage-stats"]
    address = f"http://127.0.0.1:{dashboard}"
    with (Path(folder) / "head.log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
    try:
        while not answers(address):
            with suppress(psutil.TimeoutExpired):
                process.wait(0.2)
                raise AssertionError((Path(folder) / "head.log").read_text())
        yield address
    finally:
        below = process.children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([process, *below], timeout=10)
        for each in alive:
            each.kill()
        psutil.wait_procs(alive, timeout=5)
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    """Whether the server there asks for the token."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=1)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hrm_ray", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out + err


ROOT = Path(__file__).resolve().parents[2]


def test_jobs_of_a_real_head(head: str, tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "bundle"
    submit = ("submit", "--address", head)
    small = ("train", *TEXT, "--warmup-steps", "1", "--dataset-file", data, "--bundle-dir", bundle)
    wrong = start(*submit, "--", *small, "--steps", "2", "--batch-size", "1000000000")
    running = start(*submit, "--name", "endless", "--", *small, "--iterate", "--lr-schedule", "constant")
    assert running.stdout is not None
    for line in running.stdout:
        if "step 2" in line:
            break
    running.send_signal(signal.SIGINT)
    code, said = ended(running)
    assert code == 130 and "job endless goes on" in said and f"hrm-ray stop endless --address {head}" in said
    code, said = ended(wrong)
    assert code == 4 and said.count("error: ") == 1 and "exit code 4" in said
    again = start(*submit, "--name", "endless", "--", *small)
    code, said = ended(start("stop", bundle, "--address", head))
    assert code == 0, said
    newest = RunDir(bundle).newest_checkpoint()
    assert newest is not None
    verify_checkpoint(newest)
    code, said = ended(again)
    assert code == 2 and "--name endless" in said
    code, said = ended(start(*submit, "--follow", "endless"))
    assert code == 75 and "stopped by SIGTERM at step" in said

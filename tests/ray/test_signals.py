"""What a person or a scheduler does to a run from outside: Ctrl-C, SIGTERM, SIGKILL. POSIX signals, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from hrm_ray.launch.cluster_address import EMPTY_SETTINGS
from tests.support.ray_bodies import plan_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals to a process group"),
]


class Driver:
    """A run in a process group of its own, as a shell starts it; everything it starts carries its TMPDIR."""

    def __init__(self, temp: Path, environment: dict[str, str], body: str = "until_stopped", **changes: Any) -> None:
        self.temp = temp
        self.bundle = temp / "bundle"
        self.bundle.mkdir()
        plan = replace(plan_of(self.bundle, steps=20), **changes)
        (temp / "plan.json").write_text(json.dumps(plan.to_plain()))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.worker_group_driver", str(temp / "plan.json"), body],
            # Unbuffered: `communicate` reads past a buffer, so what a line-wise read had taken ahead would be lost.
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, start_new_session=True,
            # PyTorch keeps a folder for all programs of a user in the temporary one, unless it is told another place.
            env={"TORCHINDUCTOR_CACHE_DIR": str(temp.parent / "torchinductor"), **os.environ, **environment,
                 "TMPDIR": str(temp)},
        )  # fmt: skip

    def wait_for_records(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"record 5"):
                return
            assert line.startswith(b"record"), line
        raise AssertionError("the driver ended before it had trained")

    def interrupt_group(self, number: int = signal.SIGINT) -> None:
        """What a terminal does on Ctrl-C: every process of the foreground group gets SIGINT."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and what was printed besides records and the announcement of a stop."""
        output, _ = self.process.communicate(timeout=180)
        lines = output.decode().splitlines()
        # The announcement begins a new line.
        return self.process.returncode, [line for line in lines if line and not line.startswith(("record", "stopping"))]

    def left(self) -> list[psutil.Process]:
        """Processes alive that this driver has started, however far they are from it."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == str(self.temp) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    """Starts drivers; ends whatever is left of them."""
    started: list[Driver] = []

    def start(environment: dict[str, str] | None = None, **changes: Any) -> Driver:
        started.append(Driver(Path(tempfile.mkdtemp(prefix="d")), environment or {}, **changes))
        return started[-1]

    yield start
    for driver in started:
        for process in driver.left():
            process.kill()
        driver.process.wait()
        shutil.rmtree(driver.temp, ignore_errors=True)


@pytest.fixture
def driver(start: Callable[..., Driver]) -> Driver:
    return start()


def is_clean(driver: Driver) -> bool:
    return driver.left() == [] and {path.name for path in driver.temp.iterdir()} == {"bundle", "plan.json"}


@pytest.mark.parametrize(("name", "reason", "code"), [("SIGINT", "interrupt", 130), ("SIGHUP", "sighup", 75)])
def test_a_signal_to_the_group_finishes_the_step_saves_and_leaves_nothing(
    name: str, reason: str, code: int, driver: Driver
) -> None:
    """Ctrl-C, and the end of the terminal, reach Ray's processes too: the workers do not die of it."""
    driver.wait_for_records()
    driver.interrupt_group(signal.Signals[name])
    ended, said = driver.end()
    assert said == [f"outcome {reason} {(driver.bundle / 'saved_0').read_text()}"]
    assert ended == code
    assert is_clean(driver)


def test_ctrl_c_twice_ends_at_once(driver: Driver) -> None:
    driver.wait_for_records()
    # The worker is stopped, so that the first Ctrl-C cannot be answered and the second one must not wait for it.
    workers = [process for process in driver.left() if "RayTrainWorker" in " ".join(process.cmdline())]
    assert workers
    for worker in workers:
        worker.suspend()
    driver.interrupt_group()
    with pytest.raises(subprocess.TimeoutExpired):
        driver.process.wait(timeout=2)
    driver.interrupt_group()
    asked_s = time.monotonic()
    code, said = driver.end()
    assert (code, said) == (130, ["error KeyboardInterrupt"])
    assert time.monotonic() - asked_s < 20
    assert is_clean(driver)


def test_sigterm_finishes_the_step_saves_and_leaves_nothing(driver: Driver) -> None:
    driver.wait_for_records()
    driver.process.terminate()
    code, said = driver.end()
    assert said == [f"outcome sigterm {(driver.bundle / 'saved_0').read_text()}"]
    assert code == 75
    assert is_clean(driver)


def test_sigkill_of_the_driver_takes_everything_with_it(driver: Driver) -> None:
    driver.wait_for_records()
    assert driver.left()
    driver.process.kill()
    killed_s = time.monotonic()
    driver.process.wait()
    while driver.left():
        assert time.monotonic() - killed_s < 60, driver.left()
    print(f"all gone {time.monotonic() - killed_s:.1f} s after the driver was killed")


OPEN_TO_ALL = {"RAY_AUTH_MODE": "disabled"}
HEAD = """
import logging, sys, ray
context = ray.init(address="local", num_cpus=1, num_gpus=0, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1],
                   logging_level=logging.ERROR, log_to_driver=False)
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster with one CPU that somebody else has started."""
    temp = tempfile.mkdtemp(prefix="h")
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, temp], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **OPEN_TO_ALL},
    ) as head:  # fmt: skip
        assert head.stdout is not None
        yield next(line.split()[1] for line in head.stdout if line.startswith("address"))
        head.communicate()
    shutil.rmtree(temp, ignore_errors=True)


def test_a_given_cluster_is_used_checked_and_left_alone(start: Callable[..., Driver], cluster: str) -> None:
    first = start(OPEN_TO_ALL, ray_address=cluster)
    first.wait_for_records()
    busy = start(OPEN_TO_ALL, ray_address=cluster)
    code, said = busy.end()
    assert (code, said) == (4, ["error ResourceError"])
    first.process.send_signal(signal.SIGINT)
    code, said = first.end()
    assert said == [f"outcome interrupt {(first.bundle / 'saved_0').read_text()}"]
    too_much = start(OPEN_TO_ALL, ray_address=cluster, world_size=2)
    assert too_much.end() == (4, ["error ResourceError"])
    # Also named by the environment, as `ray job submit` does it; the CPU is free again.
    second = start({**OPEN_TO_ALL, "RAY_ADDRESS": cluster}, body="counts")
    assert second.end() == (0, ["outcome finished 20"])
    assert all(is_clean(driver) for driver in (first, busy, too_much, second))


def test_a_head_that_says_nothing_more_is_given_up_after_a_while(start: Callable[..., Driver]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        mute = start(ray_address=f"127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        connection.sendall(EMPTY_SETTINGS)
        code, said = mute.end()
        connection.close()
    assert code == 3
    assert said[-1] == "error UnavailableError"
    assert is_clean(mute)

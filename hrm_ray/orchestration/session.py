"""One run's connection to Ray: a private cluster on this machine, a cluster at an address, or the program's own.

A program that has called `ray.init` already keeps its cluster: the run uses it and leaves it as it was. Otherwise
`Session` opens a connection and closes it completely: no process is left, and no file unless the logs are kept.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.worker as ray_worker
from ray._private.state import available_resources_per_node

import hrm_ray
from hrm_ray.errors import Fault, HrmRayError, SettingsError, UnavailableError
from hrm_ray.launch.hangs import Timeouts
from hrm_ray.launch.resources import ResourceRequest, usable_cpus
from hrm_ray.openmp import SPIN_VARIABLE, limit_openmp_spin
from hrm_ray.orchestration.session_folder import keep_logs_for_a_while, make_session_folder
from hrm_ray.stop_signals import STOP_SIGNALS
from hrm_ray.types import StopPoll, StopRequested

NAMESPACE = "hrm_ray"
OBJECT_STORE_BYTES = 200 * 2**20
"""Enough for records and settings; nothing else goes through the object store without text to tokenise."""
DATA_STORE_BYTES = 600 * 2**20
"""Holds documents and tokens of a few chunks, each at most some 16 MiB of text."""
LEAST_DATA_CPUS = 1
"""CPUs that a private cluster has for Ray Data at least; its tasks compute while workers wait."""
CONNECT_TIMEOUT_S = 20.0
START_TIMEOUT_S = 90.0
"""A private cluster is up after 4 s on an idle machine; a loaded machine needs longer."""
CLOSE_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 2.0
LONGEST_TEMP_ROOT = 40
"""Ray puts Unix sockets below its folder, whose paths must stay under 107 bytes."""
SERVERS = frozenset({"gcs_server", "raylet"})
"""Names of a cluster's servers on this machine."""
STDERR_TAIL_LINES = 25
LONGEST_REASON = 400
"""Characters of Ray's own message that are shown."""

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",  # the default of current versions
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's print goes to its log twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a death is noticed (default 2 s)
    "RAY_TRAIN_METRICS_ENABLED": "0",  # no Prometheus export
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; a lost worker ends the run anyway
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the folder of the command
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning
}
LOCAL_SETTINGS = {
    "RAY_worker_niceness": "0",  # else 15: workers would yield to any other process of the machine
    "RAY_enable_metrics_collection": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a rank stuck in a collective must not delay the end by 30 s
}
KEEPALIVE_SETTINGS = ("RAY_grpc_client_keepalive_timeout_ms", "RAY_grpc_keepalive_timeout_ms")


_OWN_CONNECTION = threading.Lock()
"""Held by the session that has connected this process to Ray. A process has one connection, which all threads see."""


def restore_signal_handlers() -> None:
    """Install the command line's signal handlers again where Ray has put its own over them.

    Ray's native library takes SIGTERM below Python's table of handlers: it prints a stack trace before it passes
    the signal on. Setting the same handler again takes the signal back.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        handler = signal.getsignal(number)
        if handler is not None:  # None: it was not installed from Python
            signal.signal(number, handler)


def attached() -> bool:
    """Whether the program itself has connected this process to Ray."""
    return ray.is_initialized() and not _OWN_CONNECTION.locked()


@functools.cache
def _token() -> str:
    """One token per process: Ray's client keeps the first one it sees."""
    return secrets.token_hex(32)


def source_root() -> str:
    """The folder from which `import hrm_ray` works, in a checkout and in an installation."""
    return str(Path(hrm_ray.__path__[0]).resolve().parent)


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of every training worker, set before its libraries are loaded."""
    count = str(threads)
    environment = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "USE_LIBUV": "0",  # torch builds for Windows have no libuv; elsewhere it makes no difference here
        "PYTHONPATH": _python_path(),
    }
    environment |= {name: os.environ[name] for name in ("OMP_WAIT_POLICY", SPIN_VARIABLE) if name in os.environ}
    limit_openmp_spin(environment)
    return environment


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH", "")
    parts = [source_root(), *(part for part in before.split(os.pathsep) if part and part != source_root())]
    return os.pathsep.join(parts)


class Session:
    """A Ray connection; use `open` and, whatever happens, `close`.

    `address` None starts a cluster on this machine with exactly the resources of `request`, and some for Ray Data where
    `data` says that it will be used; unless the program is connected to Ray already.
    """

    def __init__(
        self,
        address: str | None,
        request: ResourceRequest,
        *,
        data: bool = False,
        timeouts: Timeouts = Timeouts.of(None),  # noqa: B008 - a frozen value
    ) -> None:
        self.address = address
        self.attached = attached()
        """Whether the connection is the program's own, and stays open."""
        self.private = address is None and not self.attached
        """Whether the cluster is this run's alone, and ends with it."""
        self.where = "the program's Ray cluster" if self.attached else address or "this machine"
        """The cluster's name in messages."""
        self._owns_connection = False
        self._data = data
        self._timeouts = timeouts
        self._request = request
        self.folder = make_session_folder(Path(_temp_root()))
        self._ready = threading.Event()
        self._release = threading.Event()
        self._problem: BaseException | None = None
        self._environment = _EnvironmentChanges()
        self._thread = threading.Thread(target=self._hold, name="ray-session", daemon=True)
        self._servers: list[psutil.Process] = []

    def open(self, stop: StopPoll) -> None:
        """Return when connected; raises StopRequested where `stop` says so meanwhile, or what went wrong."""
        if not self.attached:
            self._owns_connection = _OWN_CONNECTION.acquire(blocking=False)
            if not self._owns_connection:
                hint = "Start this run after that one, or in a process of its own"
                raise SettingsError(Fault("--launcher ray", "another run of this program is connected to Ray", hint))
        # Ray reads its settings from the environment, here and in every process that it starts.
        poll_s, keepalive_ms = self._timeouts.poll_s, f"{self._timeouts.keepalive_s * 1000:.0f}"
        settings = {**SETTINGS, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{poll_s:.0f}"}
        if self.private:
            settings.update(LOCAL_SETTINGS)
            # A cluster of its own is on one machine, where no connection dies in silence.
            settings.update({name: keepalive_ms for name in KEEPALIVE_SETTINGS})
            # Authentication stays on. With a token of its own the cluster is closed to other users of the machine, and
            # nothing is written to the home folder. The mode itself is fixed when Ray is imported.
            if "RAY_AUTH_MODE" not in os.environ:
                settings["RAY_AUTH_TOKEN"] = _token()
        self._environment.set({name: value for name, value in settings.items() if name not in os.environ})
        if self.private:
            self._environment.set({"PYTHONPATH": _python_path()})
        if self.attached:
            connected = ray.get_runtime_context().gcs_address
            if self.address not in (None, "auto", connected):
                reason = f"this program is connected to the Ray cluster at {connected} already"
                hint = "Leave the address out, or call ray.shutdown() first"
                raise SettingsError(Fault(f"the Ray address {self.address}", reason, hint))
            return
        self._thread.start()
        timeout_s = START_TIMEOUT_S if self.private else CONNECT_TIMEOUT_S
        deadline_s = time.monotonic() + timeout_s
        while not self._ready.wait(POLL_INTERVAL_S):
            stopped = stop()
            if stopped is not None:
                raise StopRequested(stopped)
            if time.monotonic() > deadline_s:
                raise self._explain(TimeoutError(f"no connection within {timeout_s:.0f} s"))
        if self._problem is not None:
            raise self._explain(self._problem)
        if self.private:
            self._servers = [each for each in psutil.Process().children() if _is_server(each, self.folder)]

    def lost(self) -> bool:
        """Whether a server of the private cluster has ended; without one of them nothing works for long."""
        return any(not _lives(process) for process in self._servers)

    def nodes(self) -> list[Mapping[str, float]]:
        """Total resources of each living node."""
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def free_nodes(self) -> list[Mapping[str, float]]:
        """Free resources of each node that answers; Ray itself believes in a lost node for up to a minute."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        free = available_resources_per_node()
        with ThreadPoolExecutor(max_workers=max(1, min(len(alive), 32))) as probes:
            answers = list(probes.map(_answers, alive))
        return [free.get(node["NodeID"], {}) for node, answer in zip(alive, answers, strict=True) if answer]

    def stderr_tail(self, pid: int) -> str:
        """The last lines that a worker of a private cluster wrote to its error stream; empty if there are none."""
        for log in sorted(self.folder.glob(f"session_*/logs/worker-*-{pid}.err")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(line for line in lines[-STDERR_TAIL_LINES:] if not line.startswith(":"))
        return ""

    def close(self, keep_logs: bool = False) -> None:
        """Disconnect, end every process of a private cluster, and remove the folder unless the logs are wanted."""
        processes = _processes_below(self.folder) if self.private else []
        self._release.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(CLOSE_TIMEOUT_S if self._ready.is_set() or self.private else 0.0)
        _end(processes)
        self._environment.undo()
        if self._owns_connection:
            self._owns_connection = False
            _OWN_CONNECTION.release()
        if keep_logs:
            keep_logs_for_a_while(self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _hold(self) -> None:
        """Connect, stay, disconnect.

        All in one thread that lives until the session is closed. In the main thread `ray.init` would replace the
        SIGTERM handler of the command line. And on Linux the cluster's processes get a signal when the thread that
        started them ends, so a short-lived thread would take the cluster down.
        """
        # Even with log_to_driver off, the driver prints what the raylet logs of a worker's death.
        printed, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
        if self.private and sys.platform != "win32":
            # The cluster inherits what this thread blocks, so a hung-up terminal, or a queue that warns all processes,
            # stops the driver alone, which then stops the workers in order. Ray itself blocks SIGINT.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
        try:
            # Loading torch and ray.train takes about as long as the cluster needs to come up; do both at once.
            imports = threading.Thread(target=_load_ray_train, name="load-ray-train", daemon=True)
            imports.start()
            with self._environment.recorded():
                self._connect()
            imports.join()
        except BaseException as error:  # noqa: BLE001 - the main thread explains it
            self._problem = error
        self._ready.set()
        self._release.wait()
        ray.shutdown(wait_for_processes=True)
        ray_worker._worker_logs_enabled = printed

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
        if self.address is not None:
            ray.init(address=self.address, **quiet)
            return
        # The CPUs that the workers leave free are for Ray Data.
        data_cpus = max(LEAST_DATA_CPUS, usable_cpus() - self._request.cpus) if self._data else 0
        ray.init(
            address="local",
            num_cpus=self._request.cpus + data_cpus,
            num_gpus=self._request.gpus,
            object_store_memory=DATA_STORE_BYTES if self._data else OBJECT_STORE_BYTES,
            # Nobody could reach it with this cluster's token, and ended by a signal it leaves a folder in TMPDIR.
            include_dashboard=False,
            _temp_dir=str(self.folder),
            **quiet,
        )

    def _explain(self, error: BaseException) -> HrmRayError:
        if isinstance(error, HrmRayError):
            return error
        reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".") or type(error).__name__
        if self.private:
            hint = f"Look into {self.folder}, or use --launcher local for one device"
            return UnavailableError(Fault("the local Ray cluster", f"did not start: {reason}", hint))
        hint = (
            "Check that this is the head's host:port, that Ray and Python versions agree there and here, and, "
            "if the cluster asks for a token, set RAY_AUTH_MODE=token"
        )
        return UnavailableError(Fault(f"the Ray address {self.address}", f"could not connect: {reason}", hint))


class _EnvironmentChanges:
    """Environment variables set for a while, and restored unless other code has changed them since."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}
        self._set: dict[str, str] = {}

    def set(self, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            self._before.setdefault(name, os.environ.get(name))
            os.environ[name] = self._set[name] = value

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Also undo what other code, here Ray, sets inside."""
        before = dict(os.environ)
        try:
            yield
        finally:
            for name, value in os.environ.items():
                if before.get(name) != value:
                    self._before.setdefault(name, before.get(name))
                    self._set[name] = value

    def undo(self) -> None:
        for name, value in self._set.items():
            if os.environ.get(name) == value:
                before = self._before[name]
                if before is None:
                    del os.environ[name]
                else:
                    os.environ[name] = before


def _processes_below(folder: Path) -> list[psutil.Process]:
    """The processes of the cluster whose files lie in `folder`: its servers name it, the rest are their children."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in child.cmdline()):
                found.update({process.pid: process for process in (child, *child.children(recursive=True))})
    return list(found.values())


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether the server of a node takes connections."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def _is_server(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return Path(words[0]).stem in SERVERS and any(str(folder) in word for word in words)
    return False


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _load_ray_train() -> None:
    # A missing module is reported when the worker group loads it.
    with contextlib.suppress(ImportError):
        importlib.import_module("ray.train.torch")


def _temp_root() -> str:
    root = tempfile.gettempdir()
    if sys.platform != "win32" and len(root) > LONGEST_TEMP_ROOT and os.access("/tmp", os.W_OK):
        return "/tmp"
    return root


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes to end, then kill those that did not."""
    _, alive = psutil.wait_procs(processes, timeout=5.0)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5.0)

"""One Ray connection for one run: a private cluster on this machine, or a driver on an existing one.

One job: open and close it, quietly and completely. Afterwards no process and, unless the logs are wanted, no file
of it is left. Does not start workers and does not know about training.

Three things here are not obvious:

* `ray.init` runs in a thread that lives until the session is closed. In the main thread it would replace the
  SIGTERM handler of the command line; and on Linux the cluster's processes carry a parent-death signal that fires
  when the *thread* which started them ends, so a short-lived thread would take the cluster down with it.
* A cluster of its own gets a token of its own in the environment. Token authentication stays on, nothing is
  written to the home folder, and other users of the machine cannot reach the cluster.
* `RAY_*` settings are environment variables that Ray reads in the driver and in every process that it starts.
  They are in force while the session is open and never override what the user has set; afterwards the whole
  environment is as it was before, without what Ray itself adds to it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.worker as ray_worker

import hrm_ray
from hrm_ray.errors import Fault, HrmRayError, UnavailableError
from hrm_ray.launch.resources import ResourceRequest, usable_cpus
from hrm_ray.openmp import SPIN_VARIABLE, limit_openmp_spin

NAMESPACE = "hrm_ray"
OBJECT_STORE_BYTES = 200 * 2**20
"""Without text to tokenise, records and settings are all that goes through the object store."""
DATA_STORE_BYTES = 600 * 2**20
"""Chunks on their way: documents and tokens of a handful of them, each at most some 16 MiB of text."""
LEAST_DATA_CPUS = 1
"""What a cluster of one's own offers to tasks of Ray Data at least; they compute while workers wait."""
CONNECT_TIMEOUT_S = 20.0
START_TIMEOUT_S = 90.0
"""A local cluster is up after 4 s on an idle machine; a loaded one is given time."""
CLOSE_TIMEOUT_S = 20.0
LONGEST_TEMP_ROOT = 40
"""Ray puts Unix sockets below its folder; with their names the path must stay under 107 bytes."""
STDERR_TAIL_LINES = 25
LONGEST_REASON = 400
"""Characters of Ray's own message that a person is shown."""

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",  # the default of current versions
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's print goes to its log twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a death is noticed (default 2 s)
    "RAY_TRAIN_METRICS_ENABLED": "0",  # Prometheus export: nobody listens
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; a lost worker ends the run anyway
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the folder of the command
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning
}
LOCAL_SETTINGS = {
    "RAY_worker_niceness": "0",  # else 15: any neighbour on the machine would starve training, unlike without Ray
    "RAY_enable_metrics_collection": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a rank stuck in a collective must not delay the end by 30 s
}


@functools.cache
def _token() -> str:
    """One per process, because Ray's client caches the first token it sees."""
    return secrets.token_hex(32)


def source_root() -> str:
    """The folder that makes `import hrm_ray` work: that of a checkout as well as that of an installation."""
    return str(Path(hrm_ray.__path__[0]).resolve().parent)


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of every training worker; in force before its libraries are loaded."""
    count = str(threads)
    environment = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "USE_LIBUV": "0",  # torch builds for Windows have no libuv; elsewhere it makes no difference here
        "PYTHONPATH": _python_path(),
    }
    passed_on = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", SPIN_VARIABLE) if name in os.environ}
    environment.update(passed_on)
    limit_openmp_spin(environment)
    return environment


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH", "")
    parts = [source_root(), *(part for part in before.split(os.pathsep) if part and part != source_root())]
    return os.pathsep.join(parts)


class Session:
    """A Ray connection; use `start`, `wait_until_ready` and, whatever happens, `close`.

    `address` None starts a cluster on this machine with exactly the resources of `demand`, and some for Ray Data where
    `data` says that it will be used.
    """

    def __init__(self, address: str | None, demand: ResourceRequest, *, data: bool = False) -> None:
        self.address = address
        self._data = data
        self._demand = demand
        self.folder = Path(tempfile.mkdtemp(prefix="hrm-", dir=_temp_root()))
        self._ready = threading.Event()
        self._release = threading.Event()
        self._problem: BaseException | None = None
        self._environment_before: dict[str, str] = {}
        self._processes_before: set[int] = set()
        self._thread = threading.Thread(target=self._hold, name="ray-session", daemon=True)

    @property
    def is_local(self) -> bool:
        return self.address is None

    @property
    def where(self) -> str:
        """For messages."""
        return self.address or "this machine"

    def start(self) -> None:
        """Begin to open the connection; returns at once."""
        settings = {**SETTINGS, **(LOCAL_SETTINGS if self.is_local else {})}
        if self.is_local and "RAY_AUTH_MODE" not in os.environ:
            # Ray switches authentication on by itself, and has to: it caches the mode when it is imported.
            settings["RAY_AUTH_TOKEN"] = _token()
        self._environment_before = dict(os.environ)
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
        if self.is_local:
            os.environ["PYTHONPATH"] = _python_path()
        self._processes_before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._thread.start()

    def ready(self, timeout_s: float) -> bool:
        """Wait so long; True when connected; raises what went wrong."""
        if not self._ready.wait(timeout_s):
            return False
        if self._problem is not None:
            raise self._explain(self._problem)
        return True

    @property
    def timeout_s(self) -> float:
        """How long opening may take before it counts as failed."""
        return START_TIMEOUT_S if self.is_local else CONNECT_TIMEOUT_S

    def timed_out(self) -> HrmRayError:
        """What to raise when it took longer."""
        return self._explain(TimeoutError(f"no connection within {self.timeout_s:.0f} s"))

    def nodes(self) -> list[Mapping[str, float]]:
        """Total resources of each living node."""
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def stderr_tail(self, pid: int) -> str:
        """The last lines that a worker of a local cluster wrote to its error stream; empty if there are none."""
        for log in sorted(self.folder.glob(f"session_*/logs/worker-*-{pid}.err")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(line for line in lines[-STDERR_TAIL_LINES:] if not line.startswith(":"))
        return ""

    def close(self, keep_logs: bool = False) -> None:
        """End every process of a local cluster, or leave an existing one; remove the folder unless logs are wanted."""
        children = {child.pid: child for child in psutil.Process().children(recursive=True)}
        self._release.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(CLOSE_TIMEOUT_S if self._ready.is_set() or self.is_local else 0.0)
        if self.is_local:
            _end([child for pid, child in children.items() if pid not in self._processes_before])
        for name in set(os.environ) - set(self._environment_before):
            del os.environ[name]
        os.environ.update(self._environment_before)
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _hold(self) -> None:
        """Connect, stay, disconnect: all in one thread (see the module's docstring)."""
        try:
            # Loading torch and ray.train takes about as long as the cluster needs to come up; do both at once.
            imports = threading.Thread(target=_load_ray_train, name="load-ray-train", daemon=True)
            imports.start()
            self._connect()
            imports.join()
        except BaseException as error:  # noqa: BLE001 - the main thread explains it
            self._problem = error
        self._ready.set()
        self._release.wait()
        ray.shutdown(wait_for_processes=True)

    def _connect(self) -> None:
        # Even with log_to_driver off, the driver prints the raylet's remarks on a worker's death; we tell it once.
        ray_worker._worker_logs_enabled = False
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
        if self.address is not None:
            ray.init(address=self.address, **quiet)
            return
        ray.init(
            address="local",
            num_cpus=self._demand.cpus + (self._data_cpus() if self._data else 0),
            num_gpus=self._demand.gpus,
            object_store_memory=DATA_STORE_BYTES if self._data else OBJECT_STORE_BYTES,
            include_dashboard=None,  # on where Ray's dashboard dependencies are installed
            _temp_dir=str(self.folder),
            **quiet,
        )

    def _data_cpus(self) -> int:
        """The CPUs that the workers leave free."""
        return max(LEAST_DATA_CPUS, usable_cpus() - self._demand.cpus)

    def _explain(self, error: BaseException) -> HrmRayError:
        if isinstance(error, HrmRayError):
            return error
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        if self.is_local:
            return UnavailableError(
                Fault(
                    "the local Ray cluster",
                    f"did not start: {reason}".rstrip("."),
                    f"Look into {self.folder}, or use --launcher local for one device",
                )
            )
        return UnavailableError(
            Fault(
                f"ray_address {self.address}",
                f"could not connect: {reason}".rstrip("."),
                "Check that this is the head's host:port, that Ray and Python versions agree there and here, and, "
                "if the cluster asks for a token, set RAY_AUTH_MODE=token",
            )
        )


def _load_ray_train() -> None:
    # What is missing is said when the worker group loads it, in the thread whose errors are looked at.
    with contextlib.suppress(ImportError):
        importlib.import_module("ray.train.torch")


def _temp_root() -> str:
    root = tempfile.gettempdir()
    if sys.platform != "win32" and len(root) > LONGEST_TEMP_ROOT and os.access("/tmp", os.W_OK):
        return "/tmp"
    return root


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes to end, then kill those that did not, so that none is left."""
    _, alive = psutil.wait_procs(processes, timeout=5.0)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5.0)

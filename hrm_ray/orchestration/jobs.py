"""The jobs of a Ray cluster, through the server of its head: submit one, follow it, stop it."""

from __future__ import annotations

import asyncio
import http.client
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from hrm_ray.errors import Fault, HrmRayError, ResourceError, SettingsError, UnavailableError
from hrm_ray.stop_signals import EXIT_STOPPED

ANSWER_TIMEOUT_S = 10.0
LOST_TIMEOUT_S = 60.0
"""How long a head that does not answer any more is waited for."""
POLL_S = 1.0
STOP_WAIT_S = 600
"""How long a job that is asked to stop may take to save. Ray's own 3 s are shorter than many a step."""
BUNDLE = "hrm_ray_bundle"
"""Metadata of a job: the bundle that it writes."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})

_TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of each upload and of the end of each connection."""
_LOST = (OSError, ValueError, KeyError, RuntimeError)
"""What the client raises where the head does not answer, or answers nonsense. Errors of HTTP are among them."""


class Jobs:
    """A connection to the job server at an address such as http://10.0.0.1:8265. Raises HrmRayError."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check_answers(self.address)
        for logger in _TALKATIVE:
            logging.getLogger(logger).setLevel(logging.ERROR)
        try:
            self._client = JobSubmissionClient(self.address)
            there = str(self._client._server_ray_version)
        except AuthenticationError:
            raise self._no_token() from None
        except _LOST as error:
            raise self._fault(f"what answers there is not the job server of a Ray head ({_line(error)})") from error
        if there.split(".")[:2] != ray.__version__.split(".")[:2]:
            hint = f"Install ray {there} here, or {ray.__version__} on the cluster"
            raise UnavailableError(Fault(f"--address {address}", f"Ray {there} is there, {ray.__version__} here", hint))

    def submit(self, name: str, entrypoint: str, package: Path, environment: Mapping[str, str], bundle: str) -> None:
        """Send the package and start the job. Raises SettingsError where the name is taken."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1", **environment}
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(package), "env_vars": variables},
                metadata={BUNDLE: bundle},
            )
        except AuthenticationError:
            raise self._no_token() from None
        except _LOST as error:
            if "already exists" in str(error):
                hint = "Give another --name, or none"
                raise SettingsError(Fault(f"--name {name}", "the cluster has a job of this name", hint)) from error
            if "413" in str(error):
                reason = "it is larger than the head takes"
                raise ResourceError(Fault("the package", reason, "Take data out of git")) from error
            raise self._fault(f"the job was not accepted ({_line(error)})") from error

    def follow(self, name: str, write: Callable[[str], None]) -> int:
        """Pass on what the job prints until it has ended; returns its exit code. Raises HrmRayError where the head is
        lost: the job may go on."""
        if name not in [job.submission_id for job in self._listed()]:
            raise SettingsError(Fault(f"--follow {name}", f"there is no such job at {self.address}", "Give its name"))
        printed = 0
        unwritten: list[OSError] = []

        async def tail() -> None:
            nonlocal printed
            seen = 0
            async for text in self._client.tail_job_logs(name):
                seen += len(text)
                if seen > printed:  # After a lost connection the log comes again from its beginning.
                    try:
                        write(text[max(0, len(text) - (seen - printed)) :])
                    except OSError as error:  # Nobody reads, or the disk is full: the head is well.
                        unwritten.append(error)
                        return
                    printed = seen

        lost_s: float | None = None
        while True:
            try:
                asyncio.run(tail())
                info = self._info(name)
                lost_s = None
            except _LOST as error:
                if "does not exist" in str(error):
                    reason = f"the head was started again, and job {name} is lost"
                    hint = "Submit it again: it goes on from its newest checkpoint"
                    raise UnavailableError(Fault(f"--address {self.address}", reason, hint)) from error
                lost_s = lost_s or time.monotonic()
                if time.monotonic() - lost_s > LOST_TIMEOUT_S:
                    reason = f"the head does not answer any more; job {name} may go on"
                    hint = f"Follow it again with hrm-ray submit --address {self.address} --follow {name}"
                    raise UnavailableError(Fault(f"--address {self.address}", reason, hint)) from error
            else:
                if unwritten:
                    raise unwritten[0]
                if info.status in ENDED:
                    return _exit_code(info)
            time.sleep(POLL_S)

    def find(self, target: str) -> str:
        """The name of the job that is meant by a name or by the bundle that it writes. Raises SettingsError."""
        found = self._listed()
        running = [job for job in found if job.status not in ENDED]
        for job in running:
            if target in (job.submission_id, (job.metadata or {}).get(BUNDLE)):
                return str(job.submission_id)
        ended = any(job.submission_id == target for job in found)
        reason = "the job has ended" if ended else f"no job at {self.address} has this name or writes this bundle"
        names = ", ".join(str(job.submission_id) for job in running[:5]) or "none"
        raise SettingsError(Fault(target, reason, f"Running jobs: {names}"))

    def stop(self, name: str, wait_s: float) -> str:
        """Ask a job to stop, and wait until it has saved and ended; returns its last message. Raises UnavailableError
        where it takes longer."""
        try:
            self._client.stop_job(name)
        except _LOST as error:
            raise self._fault(f"job {name} was not asked to stop ({_line(error)})") from error
        deadline_s = time.monotonic() + wait_s
        while time.monotonic() < deadline_s:
            try:
                info = self._info(name)
            except _LOST:
                info = None
            if info is not None and info.status in ENDED:
                return str(info.message or "")
            time.sleep(POLL_S)
        raise UnavailableError(
            Fault(f"job {name}", f"was asked to stop and still runs after {wait_s:.0f} s", "Give a longer --wait")
        )

    def _listed(self) -> list[Any]:
        """The jobs that were submitted, not the programs that have connected to the cluster."""
        try:
            return [job for job in self._client.list_jobs() if job.submission_id is not None]
        except _LOST as error:
            raise self._fault(f"its jobs cannot be listed ({_line(error)})") from error

    def _info(self, name: str) -> Any:
        return self._client.get_job_info(name)

    def _no_token(self) -> HrmRayError:
        reason = "the cluster asks for its token, and this command has none or another one"
        hint = "Set RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        return UnavailableError(Fault(f"--address {self.address}", reason, hint))

    def _fault(self, reason: str) -> HrmRayError:
        hint = "Give the address of the head's dashboard, such as http://HEAD:8265"
        return UnavailableError(Fault(f"--address {self.address}", reason, hint))


def _check_answers(address: str) -> None:
    """Raises SettingsError for a text that is no address of a web server, UnavailableError where none answers."""
    parts = urlsplit(address)
    hint = "Give the address of the head's dashboard, such as http://HEAD:8265"
    try:
        port, host = parts.port, parts.hostname
    except ValueError:
        port = host = None
    if parts.scheme not in ("http", "https") or not host:
        raise SettingsError(Fault(f"--address {address}", "is not the address of a web server", hint))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/api/version")
        connection.getresponse().read()
    except TimeoutError:
        reason = f"nothing answers there within {ANSWER_TIMEOUT_S:.0f} s"
        raise UnavailableError(Fault(f"--address {address}", reason, hint)) from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(Fault(f"--address {address}", f"nothing answers there ({error})", hint)) from None
    finally:
        connection.close()


def _exit_code(info: Any) -> int:
    """The exit code of the run, where the job's process had one."""
    code = info.driver_exit_code
    if info.status == "STOPPED":
        return EXIT_STOPPED
    if code is None:
        return 0 if info.status == "SUCCEEDED" else 1
    return int(code) if code >= 0 else 1


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]

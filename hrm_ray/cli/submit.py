"""The bodies of `hrm-ray submit` and `hrm-ray stop`: a run as a job on a cluster, and its end in order."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.cli.train import OWN
from hrm_ray.errors import Fault, HrmRayError, ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.job_package import ENTRY, code_package, job_options
from hrm_ray.launch.resources import gigabytes
from hrm_ray.launch.run_lock import holder_of, is_in_use
from hrm_ray.rundir import RunDir
from hrm_ray.settings.duration import seconds_of
from hrm_ray.stop_signals import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from hrm_ray.orchestration.jobs import Jobs

_POLL_S = 0.2
_NOT_IN_A_NAME = r"[^A-Za-z0-9._-]"
"""What addresses of the job server would need to escape."""
_RERUNNING = (("jobs", "train.py"), ("jobs", "independent.py"))


def run_submit(
    words: Sequence[str], *, address: str, name: str | None, env: Sequence[str], wait: bool, follow: str | None
) -> int:
    """Send a run to a cluster and follow it; returns the exit code of the run, or 130 where Ctrl-C left it alone."""
    if follow is not None:
        if words:
            raise SettingsError(Fault(f"--follow {follow}", "the job is there already", "Leave the command out"))
        return _follow(_jobs(address), follow)
    if list(words[:1]) != ["train"]:
        given = words[0] if words else "hrm-ray submit"
        hint = "Write hrm-ray submit --address http://HEAD:8265 -- train --dataset-file ... --bundle-dir ..."
        raise SettingsError(Fault(given, "only train can be submitted", hint))
    if name is not None and (not name or re.search(_NOT_IN_A_NAME, name)):
        raise SettingsError(Fault(f"--name {name}", "cannot be the name of a job", "Give letters, digits, - and _"))
    arguments = FlatCommand("submit -- train [OPTIONS]", "", OWN).parse(words[1:])
    if arguments.faults:
        raise SettingsError(arguments.faults)
    options, files, bundle = job_options(arguments.options, arguments.config)
    environment = {variable: _value_of(variable) for variable in env}
    package = code_package(Path.cwd())
    jobs = _jobs(address)
    name = name or f"{re.sub(_NOT_IN_A_NAME, '-', PurePosixPath(bundle).name)}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="hrm-ray-job-") as folder:
        package.write(Path(folder))
        for target, source in files.items():
            (Path(folder) / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, Path(folder) / target)
        print(f"code    {len(package.files)} files of {package.root}, {gigabytes(package.size_bytes)}")
        if package.left_out:
            print(f"warning: {package.left_out} Python file(s) are not in git, and so not sent", file=sys.stderr)
        sent = [f"{option}={value}" if isinstance(value, str) else option for option, value in options.items()]
        own = {option: value for option, value in arguments.own.items() if option != "--config"}
        sent += [f"{option}={value}" if isinstance(value, str) else option for option, value in own.items()]
        jobs.submit(name, shlex.join(["python", ENTRY, *sent]), Path(folder), environment, bundle)
    print(f"job     {name}\nbundle  {bundle} on the cluster", flush=True)
    if not wait:
        print(_afterwards(jobs, name))
        return 0
    return _follow(jobs, name)


def _jobs(address: str) -> Jobs:
    """A connection to the cluster's jobs; loads Ray."""
    jobs: Jobs = import_module("hrm_ray.orchestration.jobs").Jobs(address)
    return jobs


def _value_of(variable: str) -> str:
    """The value of a variable of the environment, which no message shows."""
    if "=" in variable:
        raise SettingsError(
            Fault(f"--env {variable.partition('=')[0]}", "takes a name alone; its value comes from here", "Export it")
        )
    value = os.environ.get(variable)
    if value is None:
        raise SettingsError(Fault(f"--env {variable}", "is not set here", f"Export {variable}, or leave it out"))
    return value


def _follow(jobs: Jobs, name: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = jobs.follow(name, write)
    except KeyboardInterrupt:
        print(f"\nleft alone: job {name} goes on\n{_afterwards(jobs, name)}", flush=True)
        return EXIT_INTERRUPTED
    print(f"job     {name} has ended with exit code {code}")
    return code


def _afterwards(jobs: Jobs, name: str) -> str:
    return (
        f"follow: hrm-ray submit --address {jobs.address} --follow {name}\n"
        f"stop:   hrm-ray stop {name} --address {jobs.address}"
    )


def run_stop(target: str, *, address: str | None, wait: str) -> int:
    """Stop a run so that it is saved, and wait for its end; returns 0."""
    wait_s = seconds_of(wait)
    if wait_s is None:
        raise SettingsError(Fault(f"--wait {wait}", "is not a duration", "Give one like 90s, 30m or 1h30m"))
    if address is not None:
        jobs = _jobs(address)
        name = jobs.find(target)
        print(f"stopping job {name}: its step is finished and saved", flush=True)
        message = jobs.stop(name, wait_s)
        print(f"job {name} has ended{f': {message}' if message else ''}")
        return 0
    run_dir = RunDir(Path(target))
    _stop_here(run_dir, wait_s)
    newest = run_dir.newest_whole_checkpoint() if run_dir.root.is_dir() else None
    if newest is None:
        raise HrmRayError(Fault(target, "the run has ended, and has saved no checkpoint", "Its log says why"))
    print(f"the run has ended; its newest checkpoint is {newest.name}")
    print(f"next: hrm-ray train --bundle-dir {shlex.quote(target)} --resume")
    return 0


def _stop_here(run_dir: RunDir, wait_s: float) -> None:
    """Send SIGTERM to the process of this machine that trains in a bundle, and wait until it has left it."""
    target = str(run_dir.root)
    if not run_dir.root.is_dir():
        hint = "Give the folder of a bundle, or --address http://HEAD:8265 for a job"
        raise SettingsError(Fault(target, "there is no such folder on this machine", hint))
    if not is_in_use(run_dir):
        raise SettingsError(Fault(target, "no run is training in it", "`hrm-ray runs` lists bundles"))
    holder = holder_of(run_dir)
    if holder is None or holder[0] != socket.gethostname():
        there = "another machine" if holder is None else holder[0]
        hint = "Run it there, or give --address http://HEAD:8265 for a job"
        raise UnavailableError(Fault(target, f"the run's process is on {there}", hint))
    if os.name == "nt":
        hint = "Press Ctrl-C in its window, or start runs with --stop-file"
        raise UnavailableError(Fault(target, "Windows cannot ask a process to stop", hint))
    try:
        os.kill(_asked_to_stop(holder[1]), signal.SIGTERM)
    except PermissionError:
        reason = f"its process {holder[1]} is another user's"
        raise UnavailableError(Fault(target, reason, "Stop it as that user")) from None
    except ProcessLookupError:
        return  # It has ended meanwhile.
    print(f"stopping process {holder[1]}: its step is finished and saved", flush=True)
    deadline_s = time.monotonic() + wait_s
    while is_in_use(run_dir):
        if time.monotonic() > deadline_s:
            reason = f"process {holder[1]} was asked to stop and still runs after {wait_s:.0f} s"
            raise ResourceError(Fault(target, reason, "Give a longer --wait"))
        time.sleep(_POLL_S)


def _asked_to_stop(trainer: int) -> int:
    """The process that gets the signal: the one that trains, or the job that would start it again and passes it on."""
    with suppress(psutil.Error):
        parent = psutil.Process(trainer).parent()
        if parent is not None and any(Path(word).parts[-2:] in _RERUNNING for word in parent.cmdline()):
            return parent.pid
    return trainer

"""The processes of a run of independent trainers: started, connected by a local socket with a key, served, ended."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch

from hrm_ray.errors import Fault, HrmRayError
from hrm_ray.independent.calls import Coordinator
from hrm_ray.independent.decisions import STOOD_STILL_S
from hrm_ray.independent.wire import BEGIN, FAILED, WORKING, Disconnected, methods_of, serve_one, unpacked, value_of
from hrm_ray.rundir import RunDir
from hrm_ray.train.plan import RunPlan

START_S = 120.0
"""Seconds in which a process must be connected: it imports PyTorch, on a busy machine."""
SILENT_S = 60.0
"""Seconds without a word after which the process that keeps anchors counts as frozen."""
_POLL_S = 0.05
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class ChildProcess:
    """A process of the run: its name, its number among the trainers, and what it said about its failure."""

    name: str
    number: int
    process: subprocess.Popen[bytes]
    started_s: float
    connection: Connection | None = None
    connected: threading.Event = field(default_factory=threading.Event)
    served: threading.Thread | None = None
    failure: HrmRayError | None = None
    device: str = "cpu"
    """What it trains on, for people."""

    @property
    def code(self) -> int | None:
        """Its exit code; None while it lives."""
        return self.process.poll()

    @property
    def identity(self) -> int:
        """The number of the process."""
        return self.process.pid

    @property
    def placed(self) -> bool:
        """Whether its process was started."""
        return True

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()


class Children:
    """All processes that this one has started. Closing ends those that are left."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._key = secrets.token_bytes(32)
        # Not a file-system socket: a killed process would leave its file behind.
        self._listener = Listener(("127.0.0.1", 0))
        self._children: dict[str, ChildProcess] = {}
        self._keeper: ChildProcess | None = None
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name="accepting", daemon=True)
        self._accepting.start()

    @property
    def trainers(self) -> Mapping[str, ChildProcess]:
        """The trainers whose end was not taken yet."""
        return self._children

    def start_trainer(self, name: str, number: int) -> None:
        """Start a trainer's process, which loads its libraries and waits until it is served."""
        self._start("trainer", name, number)

    def serve(self, coordinator: Coordinator) -> None:
        """Let the trainers that were started since the last call begin; their calls go to `coordinator`."""
        for child in self._children.values():
            if child.served is None:
                self._serve(child, coordinator)

    def _serve(self, child: ChildProcess, coordinator: Coordinator) -> None:
        methods = {
            **methods_of(coordinator),
            FAILED: lambda plain: _set_failure(child, plain),
        }
        child.served = threading.Thread(target=_serve, args=(child, methods), name=f"serving {child.name}", daemon=True)
        child.served.start()

    def take_ended(self) -> list[ChildProcess]:
        """The trainers that have ended since the last call, with all that they had said taken in."""
        ended = [child for child in self._children.values() if child.code is not None]
        for child in ended:
            del self._children[child.name]
            child.connected.set()
            if child.served is not None:
                child.served.join(5.0)
            if child.code == 0:
                self._remove_empty(child.name)  # it may hold the traceback of the process before this one
        return ended

    def end(self, child: ChildProcess) -> None:
        """End a process."""
        _end(child)
        self._children.pop(child.name, None)

    def call_keeper(self, name: str, call: str, arguments: Sequence[Any], meanwhile: Callable[[], None]) -> Any:
        """Call the process that keeps anchors, started where there is none; `meanwhile` is called while it works.

        Raises Disconnected where it ends or is frozen, and the error that it answers with.
        """
        if self._keeper is None:
            self._keeper = self._start("keeper", name, 0)
        keeper = self._keeper
        try:
            while not keeper.connected.wait(_POLL_S):
                self._check_started(keeper)
                meanwhile()
            if keeper.connection is None:
                raise Disconnected
            _send(keeper.connection, (call, tuple(arguments)))
            return _awaited(keeper.connection, meanwhile)
        except Disconnected:
            _end(keeper)
            self._keeper = None
            raise

    def close(self) -> None:
        """End all processes."""
        self._closed = True
        for child in [*self._children.values(), *([self._keeper] if self._keeper is not None else [])]:
            _end(child)
            if child.served is not None:
                child.served.join(5.0)  # the ledger that it calls is closed next
            self._remove_empty(child.name)
        self._children.clear()
        self._keeper = None
        with suppress(OSError):
            # Wakes the thread that accepts.
            socket.create_connection(tuple(self._listener.address), 1.0).close()
        self._accepting.join(5.0)
        with suppress(OSError):
            self._listener.close()

    def _messages(self, name: str) -> Path:
        """What a process writes to standard error."""
        return RunDir(self._plan.bundle).independent.root / f"{name}.stderr.txt"

    def _remove_empty(self, name: str) -> None:
        """Delete the file of a process that had nothing to say."""
        path = self._messages(name)
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()

    def _check_started(self, child: ChildProcess) -> None:
        if child.code is not None:
            raise Disconnected
        if time.monotonic() - child.started_s > START_S:
            raise HrmRayError(Fault(child.name, f"was not there after {START_S:.0f} s", "Use fewer trainers"))

    def _start(self, role: str, name: str, number: int) -> ChildProcess:
        task = {
            "role": role,
            "name": name,
            "number": number,
            "plan": self._plan.to_plain(),
            "address": list(self._listener.address),
            "key": self._key.hex(),
        }
        folder = RunDir(self._plan.bundle).independent.root
        folder.mkdir(exist_ok=True)
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        device = _device_of(self._plan, number)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self._plan.threads),
            **device,
        }
        with self._messages(name).open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "hrm_ray.independent.child_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
            )
        told = f"{self._plan.device} {device.get(_VISIBLE, '')}".strip()
        child = ChildProcess(name, number, process, time.monotonic(), device=told)
        if role == "keeper":
            self._keeper = child
        else:
            self._children[name] = child
        with suppress(OSError):  # it has ended already, which is seen where it is looked at
            if process.stdin is not None:
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.close()
        return child

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except ConnectionError:
                continue
            except OSError:
                return
            # A thread for each: one that connects and says nothing keeps nobody out.
            threading.Thread(target=self._greet, args=(connection,), name="greeting", daemon=True).start()

    def _greet(self, connection: Connection) -> None:
        """Take in a process that has the key and says its name; close the connection of any other."""
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            name = connection.recv()
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        child = self._children.get(name)
        if child is None and self._keeper is not None and self._keeper.name == name:
            child = self._keeper
        if child is None or child.connected.is_set():
            connection.close()
            return
        child.connection = connection
        child.connected.set()


def _serve(child: ChildProcess, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answer a trainer's calls until it is gone."""
    child.connected.wait()
    if child.connection is None:
        return
    try:
        child.connection.send(BEGIN)
        while True:
            serve_one(child.connection, methods)
    except (EOFError, OSError):
        pass
    finally:
        child.connection.close()


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise Disconnected from error


def _has_answer(connection: Connection) -> bool:
    try:
        return connection.poll(_POLL_S)
    except OSError as error:
        raise Disconnected from error


def _awaited(connection: Connection, meanwhile: Callable[[], None]) -> Any:
    """The answer to a call that was sent; `meanwhile` is called until it is there. Raises Disconnected."""
    heard_s = looked_s = time.monotonic()
    while True:
        if _has_answer(connection):
            try:
                said = connection.recv()
            except (EOFError, OSError) as error:
                raise Disconnected from error
            if said[0] != WORKING:
                return value_of(said)
            heard_s = time.monotonic()
        now_s = time.monotonic()
        if now_s - looked_s > STOOD_STILL_S:
            heard_s = now_s  # this process stood still, and the other one may have, too
        if now_s - heard_s > SILENT_S:
            raise Disconnected(f"has said nothing for {SILENT_S:.0f} s")
        looked_s = now_s
        meanwhile()


def _set_failure(child: ChildProcess, plain: Any) -> None:
    child.failure = unpacked(plain)


def _end(child: ChildProcess) -> None:
    child.process.kill()
    child.process.wait()
    child.connected.set()
    if child.connection is not None:
        with suppress(OSError):
            child.connection.close()


def _device_of(plan: RunPlan, number: int) -> dict[str, str]:
    """The GPU of a trainer: one for each, in turn where there are fewer."""
    if plan.device != "cuda":
        return {}
    visible = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    visible = visible or [str(gpu) for gpu in range(torch.cuda.device_count())]
    return {_VISIBLE: visible[number % len(visible)]}

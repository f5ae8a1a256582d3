"""Calls between the processes of a run of independent trainers."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import DataError, Fault, HrmRayError
from hrm_ray.independent import processes, wire
from hrm_ray.independent.processes import ChildProcess, Children
from hrm_ray.independent.wire import FAILED, Disconnected, call, expected, packed, serve_one, serve_one_heard
from tests.support.block_trainers import plan_of
from tests.support.runs import TEXT, text_file


def served(methods: dict[str, Callable[..., Any]]) -> Any:
    ours, theirs = Pipe()

    def serve() -> None:
        with suppress(EOFError, OSError):
            while True:
                serve_one(theirs, methods)

    threading.Thread(target=serve, daemon=True).start()
    return ours


def refuse() -> None:
    raise DataError(Fault("a file", "is gone", "Restore it"))


def fail() -> None:
    raise ZeroDivisionError("no such quotient")


def test_answers_and_errors_come_back_and_the_next_call_too() -> None:
    connection = served({"add": lambda a, b: a + b, "refuse": refuse, "fail": fail})
    assert call(connection, "add", 1, 2) == 3
    with pytest.raises(DataError, match=r"a file: is gone\. Restore it"):
        call(connection, "refuse")
    with pytest.raises(HrmRayError, match="ZeroDivisionError: no such quotient") as caught:
        call(connection, "fail")
    assert "Traceback" in caught.value.detail
    assert call(connection, "add", 2, 2) == 4


def test_a_process_that_is_gone_and_one_that_says_why() -> None:
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(Disconnected):
        call(ours, "add", 1, 2)
    ours, theirs = Pipe()
    theirs.send((FAILED, (packed(expected(ValueError("odd"))),)))
    with pytest.raises(HrmRayError, match="ValueError: odd"):
        call(ours, "merge")


def test_a_stranger_that_says_nothing_keeps_no_process_out(tmp_path: Path) -> None:
    plan = plan_of(text_file(tmp_path), tmp_path / "b", *TEXT)
    before = set(threading.enumerate())
    with closing(Children(plan)) as children:
        address, key = tuple(children._listener.address), children._key
        stranger = socket.create_connection(address)
        child = ChildProcess("trainer-0", 0, subprocess.Popen([sys.executable, "-c", ""]), 0.0)
        children._children[child.name] = child
        with pytest.raises(AuthenticationError):
            Client(address, authkey=b"wrong")
        with Client(address, authkey=key) as connection:
            connection.send(child.name)
            assert child.connected.wait(10.0) and child.connection is not None
    assert "accepting" not in [thread.name for thread in set(threading.enumerate()) - before]
    stranger.close()


def test_a_frozen_process_that_merges_is_found_and_one_that_works_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "WORKING_EVERY_S", 0.01)
    monkeypatch.setattr(processes, "SILENT_S", 0.3)
    looks: list[int] = []
    with closing(Children(plan_of(text_file(tmp_path), tmp_path / "b", *TEXT))) as children:
        ours, theirs = Pipe()
        keeper = ChildProcess("anchors", 0, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1), 0.0)
        keeper.connection, children._keeper = ours, keeper
        keeper.connected.set()
        enough = threading.Event()

        def look() -> None:
            looks.append(1)
            if len(looks) == 12:  # of 0.05 s: longer than a frozen one is waited for
                enough.set()

        merge = {"merge": lambda: enough.wait(60.0)}
        working = threading.Thread(target=serve_one_heard, args=(theirs, merge), daemon=True)
        working.start()
        assert children.call_keeper("anchors", "merge", (), look) is True
        with pytest.raises(Disconnected, match="has said nothing for"):
            children.call_keeper("anchors", "merge", (), lambda: None)
        assert keeper.process.poll() is not None and children._keeper is None

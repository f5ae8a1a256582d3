"""Calls between the processes of a run of independent trainers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import pytest

from hrm_ray.errors import DataError, Fault, HrmRayError
from hrm_ray.independent.wire import FAILED, Disconnected, call, expected, packed, serve_one


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

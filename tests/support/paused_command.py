"""`hrm-ray` as a process that waits once: `python -m tests.support.paused_command MODULE:FUNCTION WORDS...`.

When it first comes to the function it prints `waiting`, and goes on when it has read a line.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

from hrm_ray.cli import main as cli

WAITING = "waiting"


def start(place: str, *words: object) -> subprocess.Popen[str]:
    """The command, once it waits at `place`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.paused_command", place, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == WAITING:
            return process
    raise AssertionError(f"it ended without coming to {place}: {process.communicate()[1]}")


def go_on(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr, once it has ended."""
    _, err = process.communicate("\n", timeout=60)
    return process.returncode, err


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    real = vars(import_module(module))[function]
    waited: list[str] = []

    def waiting(*words: Any, **named: Any) -> Any:
        if not waited:
            print(WAITING, flush=True)
            waited.append(sys.stdin.readline())
        return real(*words, **named)

    vars(import_module(module))[function] = waiting
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()

"""Real kills in a run of independent trainers: `python -m tests.kills --kills 20 --seed 1 [--launcher subprocess|ray]`.

Trainers, the process that merges, the coordinator (with Ray a process of its own) and the command itself are killed at
named points, in an order drawn from the seed; a killed command is given again with --resume. Each row must be trained
into the last weights exactly once for each epoch, and the ledger must hold.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import TypeAlias

import torch

from hrm_ray.bundle.store import open_bundle
from hrm_ray.ledger import read_ledger
from hrm_ray.rundir import RunDir
from tests.unit.test_independent_processes import OPTIONS, command, rows_of_the_weights, text_file

Kill: TypeAlias = tuple[str, str, int]
"""Process, point, and number of the call in that process."""

POINTS = {
    "trainer-0": ("before write", "after write", "after report"),
    "trainer-1": ("before write", "after write", "after report"),
    "anchors": ("before merge", "after merge"),
    "coordinator": ("before commit", "after commit"),
    "driver": ("before commit", "after commit"),
}
EPOCHS_MORE = 4
"""Epochs that the run gets at its start, and again where it ends before the last kill."""


def drawn(kills: int, seed: int, launcher: str) -> list[Kill]:
    """Kills at random points of random processes. Without Ray the command is the coordinator."""
    draw = Random(seed)
    victims = [name for name in POINTS if launcher == "ray" or name != "coordinator"]
    chosen = [draw.choice(victims) for _ in range(kills)]
    return [(victim, draw.choice(POINTS[victim]), draw.choice((1, 2))) for victim in chosen]


def run_with(kills: list[Kill], folder: Path, launcher: str) -> tuple[int, int]:
    """Run until all are done and check the rows; returns how often the command was given, and how many rows the
    weights have learned."""
    options = [word.replace("subprocess", launcher) for word in OPTIONS]
    options[options.index("--max-failures") + 1] = str(len(kills))
    words = ["--dataset-file", str(text_file(folder)), *options]
    starts, epochs, left, begun_s = 0, EPOCHS_MORE, len(kills), time.monotonic()
    whole = False
    while left or not whole:
        if whole:
            epochs += EPOCHS_MORE
        ended = command(folder, *words, "--epochs", str(epochs), kills=kills, timeout_s=1800.0)
        starts, words = starts + 1, ["--resume"]
        # A coordinator that is killed twice in one round ends the command, which names --resume.
        gave_up = ended.returncode == 1 and "no restart: this was the second failure of its kind" in ended.stdout
        assert ended.returncode in (0, -9) or gave_up, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stdout + ended.stderr
        whole = ended.returncode == 0
        left = sum(not (folder / f"killed-{number}").exists() for number in range(len(kills)))
        print(f"{time.monotonic() - begun_s:6.0f} s  start {starts}: {left} of {len(kills)} kills left", flush=True)
    bundle = RunDir(folder / "b")
    trained = rows_of_the_weights(folder, bundle)
    with read_ledger(bundle.ledger) as ledger:
        rows = sum(ledger.sequences(chunk) or 0 for chunk in range(ledger.chunks))
    assert len(trained) == epochs * rows and set(trained.values()) == {1}
    open_bundle(bundle.root, torch.device("cpu"))
    assert list(bundle.independent.contributions.iterdir()) == []
    return starts, len(trained)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--launcher", choices=("subprocess", "ray"), default="subprocess")
    said = options.parse_args()
    kills = drawn(said.kills, said.seed, said.launcher)
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        starts, rows = run_with(kills, Path(folder), said.launcher)
    print(f"{len(kills)} kills {dict(Counter(victim for victim, _, _ in kills))}, {time.monotonic() - begun_s:.0f} s:")
    print(f"{starts} starts of the command, {rows} rows trained into the weights, each exactly once; the ledger holds")


if __name__ == "__main__":
    main()

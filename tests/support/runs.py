"""Whole runs for tests: tiny corpora and puzzle sets, and the command as a user types it, in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hrm_ray.cli import main as cli
from hrm_ray.train.loop import StepTotals, TrainingLoop
from hrm_ray.types import Columns, StopReason

TINY = (
    *("--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--no-use-moe"),
    *("--threads", "1", "--launcher", "local"),
)
"""One layer each for H and L, without experts, on one thread, in this process."""
EXPERTS = ("--use-moe", "--num-experts", "4", "--d-ff", "32")
"""After the words above: a model with experts."""
TEXT = (*TINY, "--vocab-size", "300", "--max-seq-len", "16", "--batch-size", "4", "--log-every", "1")
PUZZLE = (*TINY, "--batch-size", "4", "--log-every", "1", "--halt-max-steps", "3", "--halt-exploration-prob", "0.5")
CELLS, SYMBOLS = 6, 5


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def faults(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def hrm(*words: object) -> Ran:
    """Run `hrm-ray` on the words."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    assert isinstance(left.value.code, int)
    return Ran(left.value.code, out.getvalue(), err.getvalue())


def train(data: Path, bundle: Path, *words: object) -> Ran:
    """`hrm-ray train`; fails the test unless it ends in order. Of an option said twice the last value counts."""
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *last_said(words))
    assert ran.code == 0, ran.err
    return ran


def last_said(words: Sequence[object]) -> list[object]:
    """The words with each option's last value only, so that a test can say what differs after what is usual.

    A switch and its `--no-` form are one option.
    """
    values: dict[str, list[object]] = {}
    for number, word in enumerate(words):
        if str(word).startswith("--"):
            has_value = number + 1 < len(words) and not str(words[number + 1]).startswith("--")
            option = str(word).replace("--no-", "--", 1)
            values[option] = [word, words[number + 1]] if has_value else [word]
    if values.get("--supervision", [])[1:] == ["rollout"]:
        values.pop("--halt-exploration-prob", None)  # refused there, and part of PUZZLE
    return [part for said in values.values() for part in said]


def refused(code: int, *words: object, naming: tuple[object, ...]) -> str:
    """Run what must be refused: the exit code, one message that names all of `naming`, and no traceback."""
    ran = hrm(*words)
    assert ran.code == code, ran
    assert len(ran.faults) == 1, ran.err
    assert ran.err.count("\n") == 1 and "Traceback" not in ran.err, ran.err
    message = ran.faults[0]
    for part in naming:
        assert str(part) in message, message
    return message


def text_file(folder: Path, rows: int = 26, name: str = "corpus.txt", seed: int = 0) -> Path:
    """Text that gives about `rows` sequences of 16 tokens of a byte-level vocabulary of 300."""
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrst ,."), size=20 * rows)
    path = folder / name
    path.write_text("".join(letters), encoding="utf-8")
    return path


def puzzle_file(
    folder: Path, count: int = 14, identifiers: int = 3, name: str = "puzzles.safetensors", seed: int = 0
) -> Path:
    """Puzzles of six cells, of which some are empty (0) in the input, numbered with so many identifiers in turn."""
    rng = np.random.default_rng(seed)
    solutions = rng.integers(1, SYMBOLS, size=(count, CELLS)).astype(np.uint8)
    shown = np.where(rng.random((count, CELLS)) < 0.4, 0, solutions).astype(np.uint8)
    numbers = (np.arange(count) % identifiers).astype(np.int32)
    path = folder / name
    save_file({"inputs": shown, "labels": solutions, "puzzle_identifiers": numbers}, path)
    return path


def records(bundle: Path, kind: str = "train", name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of one kind in a bundle's metrics."""
    lines = (bundle / name).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


MEASURED = frozenset({"time_s", "memory_gb", "peak_gb", "tokens_per_s", "samples_per_s"})


def computed(bundle: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a run without what the clock and the machine decide."""
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records(bundle, kind)]


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content, by its path inside the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, reason: StopReason = StopReason.STOP_FILE) -> None:
    """Scripted: runs in this process are asked to stop while they take `step` (and any later one)."""
    real = TrainingLoop._totals

    def asked(loop: TrainingLoop, columns: list[Columns]) -> StepTotals:
        loop.stop_poll = lambda: reason if loop.progress.step + 1 >= step else None
        try:
            return real(loop, columns)
        finally:
            loop.stop_poll = lambda: None

    monkeypatch.setattr(TrainingLoop, "_totals", asked)


@contextlib.contextmanager
def stopping_at(step: int) -> Any:
    """`stop_at` for the length of a block."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        yield


def failing_at(call: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`real`, but the call of that number (from 1) raises instead."""
    calls = iter(range(1, 10**9))

    def calling(*words: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(*words, **named)

    return calling

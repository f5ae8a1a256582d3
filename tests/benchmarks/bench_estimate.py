"""The memory estimate against what training takes: `python -m tests.benchmarks.bench_estimate` prints one table.

Each case compares the estimate that `hrm-ray arch-summary` and `train --dry-run` print with the rise of resident memory
in a process that trains with the same settings. tests/unit/test_memory_estimate.py covers a larger grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_ray.model.config import model_config
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.train.memory_estimate import MemoryAccount, memory_estimate
from tests.benchmarks.bench_options import options_of
from tests.benchmarks.timing import machine, run_quietly, table

_SIZE = ("--task", "lm", "--hidden-size", "256", "--num-heads", "4", "--num-layers", "4", "--max-seq-len", "256")
_TEXT = (*_SIZE, "--batch-size", "16", "--no-moe", "--no-amp", "--no-gradient-checkpointing")
_PUZZLE = ("--task", "puzzle", "--max-seq-len", "81", "--batch-size", "64")
_WIDE = ("--hidden-size", "1024", "--batch-size", "4")
MOST_OFF = 0.15
"""Largest relative error of an estimate."""


@dataclass(frozen=True)
class Case:
    """Options on top of those of a dense text model in float32, and the vocabulary size."""

    about: str
    words: tuple[str, ...]
    vocab_size: int = 2000

    @property
    def options(self) -> dict[str, str | bool]:
        return options_of((*_TEXT, *self.words))


CASES: tuple[Case, ...] = (
    Case("text, float32", ()),
    Case("gradient checkpointing", ("--gradient-checkpointing",)),
    Case("amp", ("--amp",)),
    Case("experts, amp, checkpointing (--profile hrm-hf)", ("--use-moe", "--amp", "--gradient-checkpointing")),
    Case("batch 4 x 4 accumulated", ("--batch-size", "4", "--gradient-accumulation-steps", "4")),
    Case("vocabulary of 50,000", ("--batch-size", "4"), 50_000),
    Case("wide", _WIDE),
    Case("wide, 8-bit optimizer", (*_WIDE, "--use-8bit-optimizer")),
    Case("wide, weights bf16", (*_WIDE, "--model-dtype", "bf16")),
    Case("wide, lora on int8", (*_WIDE, "--use-peft", "--load-in-8bit")),
    Case("2 rows of 2048, window 128", ("--max-seq-len", "2048", "--batch-size", "2", "--window-size", "128")),
    Case("2 rows of 4096 in chunks of 512",
         ("--max-seq-len", "4096", "--batch-size", "2", "--use-chunked-training", "--chunk-size", "512")),
    Case("puzzles", _PUZZLE, 12),
)  # fmt: skip


def estimated(case: Case) -> MemoryAccount:
    """The estimate that the commands print."""
    options = case.options
    task: Any = options["--task"]
    settings = resolve_task(load_settings(options), task, int(options["--max-seq-len"]))
    return memory_estimate(settings, model_config(settings, case.vocab_size))


def measured_bytes(case: Case) -> int:
    """Rise of resident memory over two steps in a process of its own; Linux only."""
    words = [sys.executable, "-m", "tests.support.measured_memory", json.dumps([case.options, case.vocab_size])]
    return int(run_quietly(words)[1].splitlines()[-1])


def main() -> None:
    """Read the options, go through the cases, print and write; exit code 1 where an estimate is too far off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    said = parser.parse_args()
    found: list[dict[str, Any]] = []
    for case in CASES:
        if said.only in case.about:
            print(case.about, file=sys.stderr, flush=True)
            account = estimated(case)
            found.append({"case": case.about, "estimated": account.to_plain(), "measured_bytes": measured_bytes(case)})
    rows, off = [], []
    for one in found:
        peak, measured = one["estimated"]["peak_bytes"], one["measured_bytes"]
        off.append(peak / measured - 1)
        rows.append([one["case"], f"{peak / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{100 * off[-1]:+.1f} %"])
    print(table(("settings", "estimated MB", "measured MB", "off by"), rows))
    if said.json is not None:
        said.json.write_text(json.dumps({"machine": machine(1), "cases": found}, indent=1) + "\n", encoding="utf-8")
    furthest = max((abs(each) for each in off), default=0.0)
    print(f"furthest off by {100 * furthest:.1f} %: {'PASS' if furthest <= MOST_OFF else 'FAIL'}")
    sys.exit(furthest > MOST_OFF)


if __name__ == "__main__":
    main()

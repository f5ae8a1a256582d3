"""Real faults in a run of two Ray workers, one after the other: `python -m tests.chaos --faults 100 --seed 1`, with
`--strategy zero3` or another, and with `--data puzzle` for puzzles, whose carries last from step to step.

What the run was trained on, its weights, optimizer state and carries must be those of a run without faults.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeAlias
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from hrm_ray.launch import local, restarts
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.orchestration import worker_group
from hrm_ray.rundir import RunDir
from hrm_ray.settings.load import load_settings
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import Record, RunResult
from tests.support.faults import SURVIVED, Fault, Faulty, Kind, random_faults, rows_by_step
from tests.support.numbered_corpora import TOKENIZER, texts_of, write_corpus
from tests.support.runs import puzzle_file, records

Data: TypeAlias = Literal["text", "puzzle"]
SAVE_EVERY = 2
WAIT_S = 0.1
"""In place of the waits for a disk."""
WORDS: dict[str, str | bool] = {
    **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--no-use-moe": True, "--no-amp": True},
    **{"--launcher": "ray", "--threads": "1", "--batch-size": "4", "--log-every": "1"},
    **{"--save-every": str(SAVE_EVERY), "--ema": "0.9", "--keep": "2"},
}
TEXT = {"--max-seq-len": "16", "--samples-per-block": "60", "--dataset-chunk-size": "13"}
PUZZLES = {"--supervision": "segment", "--halt-max-steps": "3", "--halt-exploration-prob": "0.5"}
PUZZLE_KINDS: tuple[Kind, ...] = tuple(kind for kind in SURVIVED if kind not in ("chunk server", "unreadable"))
"""Puzzles are read once, before the first step."""


class Told:
    """A display that prints events."""

    def __init__(self) -> None:
        self.begun_s = time.time()

    def write(self, record: Record) -> None:
        if record.kind == "event":
            print(f"{record.time_s - self.begun_s:7.1f} s  step {record.step}: {record.values['message']}", flush=True)

    def close(self) -> None:
        pass


def plan_of(
    folder: Path,
    name: str,
    steps: int,
    max_failures: int,
    strategy: str = "ddp",
    data: Data = "text",
    *,
    world_size: int = 2,
) -> RunPlan:
    """The plan of a run on the data of `folder`, which are made where they are not there."""
    own: dict[str, str | bool] = {
        **{"--bundle-dir": str(folder / name), "--steps": str(steps), "--max-failures": str(max_failures)},
        **{"--strategy": strategy, "--world-size": str(world_size)},
    }
    (folder / name).mkdir()
    if data == "puzzle":
        return make_plan(resolve(load_settings({**WORDS, **PUZZLES, **own, "--dataset-file": str(puzzles(folder))})))
    if not (folder / "corpus").exists():
        TOKENIZER.save(folder / "tokenizer")
        write_corpus(folder / "corpus", texts_of([number % 23 for number in range(160)]), files=3)
    own |= {"--dataset-file": str(folder / "corpus"), "--tokenizer-path": str(folder / "tokenizer")}
    return make_plan(resolve(load_settings({**WORDS, **TEXT, **own})))


def puzzles(folder: Path) -> Path:
    """The puzzles of `folder`; twice the same content for the same data."""
    path = folder / "puzzles.safetensors"
    return path if path.exists() else puzzle_file(folder, count=40)


def undisturbed(rank: int, plan: RunPlan, folder: Path) -> None:
    """A rank of the run without faults and without Ray."""
    os.environ |= {"USE_LIBUV": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(minutes=5), rank=rank, world_size=2)
    Faulty(rows=folder / "undisturbed-rows")(plan, local.LocalLink(Told(), lambda: None))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own tear-down


def run_with_faults(folder: Path, faults: Sequence[Fault], strategy: str = "ddp", data: Data = "text") -> RunResult:
    """Run with the faults, and check what was trained against a run without."""
    steps = max(fault.step for fault in faults) + 3
    whole = plan_of(folder, "undisturbed", steps, 0, strategy, data)
    plan = plan_of(folder, "faulty", steps, len(faults), strategy, data)
    spawn(undisturbed, (whole, folder), nprocs=2)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with mock.patch.object(restarts, "WAITS_S", (WAIT_S,) * 3):
        result = worker_group.run(
            plan, sink=Told(), stop=lambda: None, body=Faulty(faults, rows=folder / "faulty-rows", in_background=True)
        )
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert left == [], "no process is left"
    assert result.step == steps
    assert len(result.restarts) == len(faults) == len({row.number for row in result.restarts})
    told = [entry for entry in records(plan.bundle, "event") if "restart" in entry]
    assert len(told) >= sum((row.resumed_step or 0) > 0 for row in result.restarts)
    assert rows_by_step(folder / "faulty-rows") == rows_by_step(folder / "undisturbed-rows")
    last = RunDir(whole.bundle).newest_checkpoint()
    assert last is not None and last.name == f"step_{steps}"
    files = [path.relative_to(whole.bundle) for path in last.rglob("*.safetensors")]
    assert {"optimizer.safetensors", "ema.safetensors"} <= {path.name for path in files}
    for name in (Path("model.safetensors"), *files):  # those with carries too
        theirs, ours = load_file(whole.bundle / name), load_file(plan.bundle / name)
        assert theirs.keys() == ours.keys() and all(theirs[key].equal(ours[key]) for key in theirs), name
    if data == "text":
        with read_ledger(RunDir(plan.bundle).ledger) as ledger:
            assert list(violations(ledger)) == []
    assert losses(plan) == losses(whole)
    return result


def losses(plan: RunPlan) -> list[tuple[int, dict[str, float]]]:
    """All losses of each step; of puzzles only those that have ended in the step."""
    found = records(plan.bundle)
    return [(entry["step"], {name: entry[name] for name in entry if "loss" in name}) for entry in found]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--faults", type=int, default=100)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kinds", default=",".join(SURVIVED), help="with commas between them")
    options.add_argument("--strategy", default="ddp")
    options.add_argument("--data", choices=("text", "puzzle"), default="text")
    said = options.parse_args()
    possible = PUZZLE_KINDS if said.data == "puzzle" else SURVIVED
    kinds: list[Kind] = [kind for kind in possible if kind in said.kinds.split(",")]
    faults = random_faults(said.seed, said.faults, kinds=kinds)
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.time()
        result = run_with_faults(Path(folder), faults, said.strategy, said.data)
    lost_s = sorted(row.lost_s for row in result.restarts if row.lost_s is not None)
    counts, taken_s = dict(Counter(fault.kind for fault in faults)), time.time() - begun_s
    print(f"{said.data}, {said.strategy}: {counts} in {taken_s:.0f} s:")
    print(f"weights and rows are those of the undisturbed run; lost {lost_s[len(lost_s) // 2]:.1f} s at the median")


if __name__ == "__main__":
    main()

"""What parallel-independent training learns from as many samples as one worker and as DDP.

`python -m tests.benchmarks.bench_independent_quality --out FOLDER` trains a model of 0.2 M parameters on Python's
documentation in every case of CASES, one factor apart from the base: 4 trainers, --merge-every 50, nesterov. Every case
gets the same number of samples; "a quarter" gets what one of four trainers gets. `--task sudoku` does so with 4x4
puzzles. A run that is done leaves a file of figures in FOLDER and is not run again, so the command can be stopped and
given again.

DDP is trained by one worker that accumulates one micro-batch for each worker: its gradients are those of DDP
(tests/agreement), without four processes on two cores. `ddp, Ray` is the same by four workers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hrm_ray.metrics.jsonl import read_records
from tests.benchmarks.timing import hrm_ray_command, number, table

TRAINERS = 4


@dataclass(frozen=True)
class Case:
    """Options of a way to train, how many samples a step has in batches, and the share of the samples that it gets."""

    options: str
    batches_per_step: int = 1
    share: float = 1.0
    seeds: int = 1


def independent(trainers: int = TRAINERS, merge_every: str = "50", outer: str = "nesterov", *, seeds: int = 1) -> Case:
    """A case of parallel-independent training; a step is an update of any trainer."""
    options = f"--parallel-independent --launcher subprocess --world-size {trainers}"
    return Case(f"{options} --merge-every {merge_every} --outer-optimizer {outer}", seeds=seeds)


SEEDS = 3
"""Seeds of the cases that the claims rest on."""
CASES = {
    "ddp": Case(f"--gradient-accumulation-steps {TRAINERS}", TRAINERS, seeds=SEEDS),
    "auto": independent(merge_every="auto", seeds=SEEDS),
    "base": independent(seeds=SEEDS),
    "a quarter": Case("", share=1 / TRAINERS, seeds=SEEDS),
    "one worker": Case(""),
    "merge 10": independent(merge_every="10"),
    "merge 200": independent(merge_every="200"),
    "merge end": independent(merge_every="end"),
    "outer none": independent(outer="none"),
    "outer diloco": independent(outer="diloco"),
    "momentum 0.6": independent(outer="nesterov --outer-momentum 0.6"),
    "lr 6e-3": independent(outer="nesterov --lr 6e-3"),
    "lr 12e-3": independent(outer="nesterov --lr 12e-3"),
    "lr 24e-3": independent(outer="nesterov --lr 24e-3"),
    "2 trainers": independent(2),
    "8 trainers": independent(8),
    "ddp, lr 6e-3": Case(f"--gradient-accumulation-steps {TRAINERS} --lr 6e-3", TRAINERS),
    "ddp, lr 12e-3": Case(f"--gradient-accumulation-steps {TRAINERS} --lr 12e-3", TRAINERS),
    "ddp, lr 24e-3": Case(f"--gradient-accumulation-steps {TRAINERS} --lr 24e-3", TRAINERS),
    "ddp, Ray": Case(f"--strategy ddp --launcher ray --world-size {TRAINERS}", TRAINERS),
}
"""By name, those that matter most first."""


@dataclass(frozen=True)
class Task:
    """What is trained: the words of `hrm-ray data build`, options, batch size and samples of a run, the held-out figure
    and whether less of it is better."""

    build: str
    options: str
    batch_size: int
    samples: int
    figure: str
    title: str
    less: bool
    seeds: int


TASKS = {
    "text": Task(
        "text",
        "--val-split test --no-moe --hidden-size 64 --num-heads 2 --h-layers 1 --l-layers 1 --expansion 4 --h-cycles 1"
        " --l-cycles 1 --halt-max-steps 1 --no-amp --no-gradient-checkpointing --vocab-size 512 --max-seq-len 64"
        " --no-linear-dataset --eval-batches 500 --lr 3e-3 --lr-min-ratio 0.05 --weight-decay 0.1",
        batch_size=4,
        samples=16_000,
        figure="bits_per_byte",
        title="bits per byte",
        less=True,
        seeds=SEEDS,
    ),
    "sudoku": Task(
        "sudoku --size 4 --train 20000 --test 1000",
        "--config sudoku4 --eval-every 0 --eval-batches 100",
        batch_size=16,
        samples=96_000,
        figure="exact_accuracy",
        title="exactly right",
        less=False,
        seeds=1,
    ),
}
WARM_UP_SHARE = 0.05
"""Of a run's steps."""


def train(task: Task, case: Case, seed: int, data: Path, bundle: Path, samples: int) -> dict[str, Any]:
    """Train a case and return its figures."""
    steps = round(samples * case.share) // (task.batch_size * case.batches_per_step)
    words: list[str | Path] = [
        "train",
        "--dataset-file",
        data,
        "--bundle-dir",
        bundle,
        *task.options.split(),
        *case.options.split(),
    ]
    words += ["--batch-size", str(task.batch_size), "--steps", str(steps), "--seed", str(seed), "--threads", "1"]
    words += ["--warmup-steps", str(round(WARM_UP_SHARE * steps)), "--save-every", "0", "--log-every", "100"]
    began_s = time.perf_counter()
    hrm_ray_command(words)
    records = list(read_records(bundle / "metrics.jsonl"))
    last = [record for record in records if record.kind == "eval"][-1]
    # Rounds at the end have numbers of their own, so the last may be a few above.
    if last.step < steps:
        raise RuntimeError(f"{bundle}: no evaluation of step {steps}")
    rounds = [record for record in records if record.kind == "train" and "merge_every" in record.values]
    return {
        "figure": number(last, task.figure),
        "samples": steps * task.batch_size * case.batches_per_step,
        "rounds": len(rounds),
        "anchor_loss": [one.values.get("anchor_loss") for one in rounds],
        "merge_every": rounds[-1].values["merge_every"] if rounds else None,
        "merge_s": sum(number(one, "merge_s") for one in rounds),
        "rejected": sum(number(one, "rejected_reports") for one in rounds),
        "seconds": time.perf_counter() - began_s,
    }


def run_all(
    task: Task, names: list[str], samples: int, out: Path, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every case by seed; those that a folder has are not made again."""
    data = out / "data"
    if not data.exists():
        hrm_ray_command(["data", "build", *task.build.split(), "--out", data])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    # The first seed of all cases before the second of any: what is there when it is stopped says most.
    for seed in range(task.seeds):
        for name in (name for name in names if seed < CASES[name].seeds):
            stem = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            figures, bundle = out / f"{stem}.json", out / stem
            if not figures.exists():
                shutil.rmtree(bundle, ignore_errors=True)
                made = train(task, CASES[name], seed, data, bundle, samples)
                figures.write_text(json.dumps(made), encoding="utf-8")
                shutil.rmtree(bundle)
                say(f"{name}, seed {seed}: {made['figure']:.4f} {task.title}, {made['seconds']:.0f} s")
            found[name].append(json.loads(figures.read_text(encoding="utf-8")))
    return found


def shown(task: Task, found: dict[str, list[dict[str, Any]]]) -> str:
    """The table: the mean over the seeds with its range, and against DDP."""
    rows = []
    ddp = fmean(one["figure"] for one in found["ddp"]) if "ddp" in found else None
    for name, runs in found.items():
        values = [one["figure"] for one in runs]
        middle = fmean(values)
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        every = [one["merge_every"] for one in runs]
        rows.append(
            [
                name,
                str(runs[0]["samples"]),
                f"{middle:.3f}{spread}",
                "" if ddp is None else f"{middle / ddp:.3f}",
                "" if every[0] is None else f"{fmean(one['rounds'] for one in runs):.0f}",
                "" if every[0] is None else ", ".join(map(str, every)),
                f"{sum(one['rejected'] for one in runs):.0f}" if every[0] is not None else "",
                f"{fmean(one['seconds'] for one in runs):.0f}",
            ]
        )
    return table(["case", "samples", task.title, "/ ddp", "rounds", "merge every, last", "rejected", "s a run"], rows)


def main() -> None:
    """Train what is missing and print the table; the figures as JSON besides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--samples", type=int, help="samples of a run; 16,000 texts or 96,000 puzzles by default")
    said = parser.parse_args()
    task, out = TASKS[said.task], said.out / said.task
    out.mkdir(parents=True, exist_ok=True)
    found = run_all(task, said.case, said.samples or task.samples, out, lambda text: print(text, flush=True))
    print(shown(task, found))
    (out / "all.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What parallel-independent training costs: `python -m tests.benchmarks.bench_independent PART`.

merging: the share of the time that merges take with four trainers. memory: resident memory of every process over
rounds, and its slope, under a launcher. launchers: rows a second under Ray and under subprocess, in pairs. plain: four
trainers against four plain runs side by side, in pairs. All but memory want a machine that does nothing else; speeds
are counted between the first and the last round, so no start is in them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from hrm_ray.metrics.jsonl import read_records
from hrm_ray.types import Record
from tests.benchmarks.timing import hrm_ray_command, machine, number, plain, summary, table

TRAINERS = 4
BATCH = 8
MODEL = (
    *("--val-split", "test", "--no-moe", "--hidden-size", "64", "--num-heads", "2", "--h-layers", "1"),
    *("--l-layers", "1", "--expansion", "4", "--h-cycles", "1", "--l-cycles", "1", "--halt-max-steps", "1"),
    *("--no-amp", "--no-gradient-checkpointing", "--vocab-size", "512", "--max-seq-len", "64"),
    *("--no-linear-dataset", "--batch-size", str(BATCH), "--threads", "1", "--eval-every", "0", "--save-every", "0"),
)
"""0.2 M parameters on Python's documentation."""
SETTLED_ROUNDS = 10
"""Rounds that the slope of memory leaves out."""
LOOK_EVERY_S = 0.5


def options(launcher: str, trainers: int, merge_every: str | int, updates: int) -> list[str]:
    """Options of `trainers` independent trainers with `updates` updates each."""
    words = ["--parallel-independent", "--launcher", launcher, "--world-size", str(trainers)]
    return [*words, "--merge-every", str(merge_every), "--steps", str(trainers * updates)]


def train(data: Path, bundle: Path, *words: str) -> list[Record]:
    """Train, and return the records of training: rounds, or steps of a plain run."""
    hrm_ray_command(["train", "--dataset-file", data, "--bundle-dir", bundle, *MODEL, *words])
    return training_records(bundle)


def training_records(bundle: Path) -> list[Record]:
    return [record for record in read_records(bundle / "metrics.jsonl") if record.kind == "train"]


def rows_per_s(rounds: list[Record]) -> float:
    """Rows a second of all trainers between the first round and the last whole one; the last is only a rest."""
    first, last = rounds[0], rounds[-2]
    if last is first:
        raise RuntimeError("too few rounds to measure a speed: give more --updates")
    rows = number(last, "trained_samples") - number(first, "trained_samples")
    return rows / (last.time_s - first.time_s)


def merging(data: Path, folder: Path, updates: int) -> dict[str, Any]:
    """The share of the time that merges take, by --merge-every."""
    rows, found = [], {}
    for merge_every in ("auto", "50", "10"):
        rounds = train(data, folder / f"merging-{merge_every}", *options("subprocess", TRAINERS, merge_every, updates))
        taken_s = rounds[-1].time_s - rounds[0].time_s
        merge_s = sum(number(one, "merge_s") for one in rounds[1:])
        share = merge_s / taken_s
        found[merge_every] = {"rounds": len(rounds), "share": share, "share_of_trainers": share / TRAINERS}
        last = f"{number(rounds[-1], 'merge_every'):.0f}"
        shown = [f"{merge_s / (len(rounds) - 1):.2f}", f"{100 * share:.1f} %", f"{100 * share / TRAINERS:.1f} %"]
        rows.append([merge_every, str(len(rounds)), last, *shown, f"{rows_per_s(rounds):.0f}"])
    titles = ["merge every", "rounds", "last", "s a merge", "of the clock", "of the trainers' time", "rows/s"]
    print(table(titles, rows))
    return found


def memory(data: Path, folder: Path, launcher: str, rounds: int) -> dict[str, Any]:
    """Resident memory of the run's processes over rounds."""
    words = ["--dataset-file", data, "--bundle-dir", folder / "memory", *MODEL, *options(launcher, 2, 8, 8 * rounds)]
    command = [sys.executable, "-m", "hrm_ray", "train", *map(str, words)]
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            done = count_rounds(folder / "memory" / "metrics.jsonl")
            for name, resident_mb in resident(psutil.Process(run.pid)).items():
                points[name].append((done, resident_mb))
            time.sleep(LOOK_EVERY_S)
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}: {run.stderr.read() if run.stderr else ''}")
    rows, found = [], {}
    for name, seen in sorted(points.items()):
        late = [(at, used) for at, used in seen if at >= SETTLED_ROUNDS]
        if len({at for at, _ in late}) < 5:
            continue  # a process of the start, or one that came late
        numbers, used_mb = np.array(late).T
        half = len(numbers) // 2
        slope, later = (float(np.polyfit(numbers[at:], used_mb[at:], 1)[0]) for at in (0, half))
        found[name] = {"slope_mb_per_round": slope, "later": later, "first_mb": used_mb[0], "last_mb": used_mb[-1]}
        shown = [f"{used_mb[0]:.1f}", f"{used_mb[-1]:.1f}", f"{int(numbers[-1])}", f"{slope:+.3f}", f"{later:+.3f}"]
        rows.append([name, *shown])
    print(f"launcher {launcher}, from round {SETTLED_ROUNDS} on")
    print(table(["process", "first MB", "last MB", "rounds", "MB a round", "in the second half"], rows))
    return found


def count_rounds(metrics: Path) -> int:
    """Rounds that a run has recorded so far."""
    return metrics.read_text(encoding="utf-8").count('"merge_every"') if metrics.exists() else 0


def resident(run: psutil.Process) -> dict[str, float]:
    """MB of each process of the run that has the model, by a name: what it is, and its number."""
    found = {}
    for process in [run, *run.children(recursive=True)]:
        try:
            words = " ".join(process.cmdline())
            resident_mb = process.memory_info().rss / 1e6
        except psutil.Error:
            continue  # ended meanwhile
        if process == run:
            found["command"] = resident_mb
        elif "child_process" in words or words.startswith("ray::"):
            found[f"{words.split()[0] if words.startswith('ray::') else 'child'} {process.pid}"] = resident_mb
    return found


def launchers(data: Path, folder: Path, pairs: int, updates: int) -> dict[str, Any]:
    """Rows a second under both launchers, in pairs."""
    speeds: dict[str, list[float]] = {"subprocess": [], "ray": []}
    for pair in range(pairs):
        for launcher in speeds if pair % 2 == 0 else reversed(speeds):
            rounds = train(data, folder / f"{launcher}-{pair}", *options(launcher, 2, 50, updates))
            speeds[launcher].append(rows_per_s(rounds))
    ratio = summary([ray / local for ray, local in zip(speeds["ray"], speeds["subprocess"], strict=True)])
    for launcher, measured in speeds.items():
        print(f"{launcher}: {summary(measured).shown(0)} rows/s of two trainers")
    print(f"ray / subprocess, pair by pair: {ratio.shown()} ({pairs} pairs)")
    return {"speeds": speeds, "ratio": plain(ratio)}


def beside_plain(data: Path, folder: Path, pairs: int, updates: int) -> dict[str, Any]:
    """Rows a second of four trainers, against four plain runs side by side."""
    speeds: dict[str, list[float]] = {"independent": [], "plain": []}
    for pair in range(pairs):
        for way in speeds if pair % 2 == 0 else reversed(speeds):
            if way == "independent":
                rounds = train(data, folder / f"together-{pair}", *options("subprocess", TRAINERS, 50, updates))
                speeds[way].append(rows_per_s(rounds))
            else:
                speeds[way].append(side_by_side(data, folder / f"apart-{pair}", updates))
    ratio = summary([a / b for a, b in zip(speeds["independent"], speeds["plain"], strict=True)])
    for way, measured in speeds.items():
        print(f"{way}: {summary(measured).shown(0)} rows/s of four")
    print(f"independent / plain, pair by pair: {ratio.shown()} ({pairs} pairs)")
    return {"speeds": speeds, "ratio": plain(ratio)}


def side_by_side(data: Path, folder: Path, updates: int) -> float:
    """Rows a second of four plain runs, while all four train."""
    bundles = [folder / str(number) for number in range(TRAINERS)]
    words = [*MODEL, "--steps", str(updates), "--log-every", "5"]
    runs = [
        subprocess.Popen(
            [*(sys.executable, "-m", "hrm_ray", "train", "--dataset-file", str(data)), "--bundle-dir", str(to), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for to in bundles
    ]
    if any([run.wait() for run in runs]):
        raise RuntimeError(f"a plain run in {folder} failed")
    records = [training_records(bundle) for bundle in bundles]
    first_s = max(one[1].time_s for one in records)
    last_s = min(one[-1].time_s for one in records)
    steps = 0.0
    for one in records:
        inside = [record for record in one if first_s <= record.time_s <= last_s]
        steps += (inside[-1].step - inside[0].step) / (inside[-1].time_s - inside[0].time_s)
    return steps * BATCH


def main() -> None:
    """Run a part; its figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("merging", "memory", "launchers", "plain"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1000, help="updates of each trainer (not: memory)")
    parser.add_argument("--rounds", type=int, default=110, help="rounds (memory)")
    parser.add_argument("--launcher", choices=("subprocess", "ray"), default="subprocess", help="(memory)")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as name:
        folder = Path(name)
        data = folder / "corpus"
        hrm_ray_command(["data", "build", "text", "--out", data])
        if said.part == "merging":
            found = merging(data, folder, said.updates)
        elif said.part == "memory":
            found = memory(data, folder, said.launcher, said.rounds)
        elif said.part == "launchers":
            found = launchers(data, folder, said.pairs, said.updates)
        else:
            found = beside_plain(data, folder, said.pairs, said.updates)
    print(json.dumps({**found, "machine": machine(1)}))


if __name__ == "__main__":
    main()

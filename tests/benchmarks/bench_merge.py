"""The streaming merge: `python -m tests.benchmarks.bench_merge` prints its time and memory for 2 and 8 members.

Each way runs in processes of its own, in turn: plain reading of the same files, the streaming merge, and a merge that
loads all members and averages them. Where the system allows it, files are dropped from the page cache before each run,
so that they are read from the disk of the given folder. Memory is what the process has at its peak more than before it
began.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from hrm_ray.merging import AnchorFiles, Member, OuterStep, merge_deltas
from tests.benchmarks.timing import machine, run_quietly, table

WAYS = ("read", "stream", "load all")
_READ_BYTES = 8 << 20


def make(folder: Path, members: int, megabytes: int) -> None:
    """An anchor and members in float32 with tensors of 1 to 16 MB, as the layers of a model have them."""
    sizes, left, width = [], megabytes, 16
    while left > 0:
        sizes.append(min(width, left))
        left -= sizes[-1]
        width = width // 4 or 16
    generator = torch.Generator().manual_seed(0)
    for number in range(-1, members):
        tensors = {
            f"layers.{k}.weight": torch.randn(size << 8, 1024, generator=generator) for k, size in enumerate(sizes)
        }
        save_file(tensors, place(folder, number))


def place(folder: Path, number: int) -> Path:
    """The file of a member; -1 is the anchor."""
    return folder / ("anchor.safetensors" if number < 0 else f"member{number}.safetensors")


def run_way(way: str, folder: Path, members: int) -> dict[str, float]:
    """Run one way in this process: seconds by the clock and of CPU time, and the growth of memory in MB."""
    paths = [place(folder, number) for number in range(-1, members)]
    drop(paths)
    work: dict[str, Callable[[], object]] = {
        "read": lambda: read_plainly(paths),
        "stream": lambda: merge_deltas(
            AnchorFiles(paths[0]),
            [Member(path, 1 / members, paths[0]) for path in paths[1:]],
            OuterStep(),
            AnchorFiles(folder / "out.safetensors"),
        ),
        "load all": lambda: load_all(paths[1:], folder / "out.safetensors"),
    }
    with Sampled() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        work[way]()
        found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    found["memory_mb"] = memory.grown_bytes / 1e6
    (folder / "out.safetensors").unlink(missing_ok=True)
    return found


class Sampled:
    """The largest growth of this process's resident memory inside the context, looked at every 20 ms."""

    def __init__(self) -> None:
        self.grown_bytes = 0
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.grown_bytes = max(self.grown_bytes, self._process.memory_info().rss - self._before)


def drop(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, on systems that can."""
    if sys.platform != "linux":
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(paths: Sequence[Path]) -> None:
    """Read files from their beginning to their end, one after the other."""
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_all(paths: Sequence[Path], out: Path) -> None:
    """The mean of whole files in memory."""
    trees = [load_file(path) for path in paths]
    save_file({name: torch.stack([tree[name] for tree in trees]).mean(dim=0) for name in trees[0]}, out)
    with out.open("rb+") as file:
        os.fsync(file.fileno())


def bench(folder: Path, members: int, megabytes: int, rounds: int) -> list[str]:
    """One row of the table."""
    make(folder, members, megabytes)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            words = ["--way", way, "--folder", str(folder), "--members", str(members)]
            shown = run_quietly([sys.executable, "-m", "tests.benchmarks.bench_merge", *words])[1]
            found[way].append(json.loads(shown.splitlines()[-1]))
    read_bytes = sum(place(folder, number).stat().st_size for number in range(-1, members))
    wall = {way: statistics.median(one["wall_s"] for one in runs) for way, runs in found.items()}
    cpu = {way: statistics.median(one["cpu_s"] for one in runs) for way, runs in found.items()}
    memory = {way: max(one["memory_mb"] for one in runs) for way, runs in found.items()}
    ratio = statistics.median(a["wall_s"] / b["wall_s"] for a, b in zip(found["read"], found["stream"], strict=True))
    return [
        f"{members} x {megabytes} MB",
        f"{wall['read']:.2f} s ({read_bytes / wall['read'] / 1e9:.2f} GB/s)",
        f"{wall['stream']:.2f} s ({read_bytes / wall['stream'] / 1e9:.2f} GB/s)",
        f"{ratio:.2f}",
        f"{cpu['stream']:.2f} s",
        f"{memory['stream']:.0f} MB",
        f"{wall['load all']:.2f} s",
        f"{wall['load all'] / wall['stream']:.1f}",
        f"{cpu['load all']:.2f} s",
        f"{memory['load all']:.0f} MB",
    ]


def main() -> None:
    """Print the table, or with --way run one way and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--megabytes", type=int, default=100, help="size of a member (MiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder by default")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.way is not None:
        print(json.dumps(run_way(words.way, words.folder, words.members[0])))
        return
    rows = []
    for members in words.members:
        with tempfile.TemporaryDirectory(dir=words.folder) as folder:
            rows.append(bench(Path(folder), members, words.megabytes, words.rounds))
    titles = ["members", "reading", "stream", "of the read rate", "CPU time", "memory"]
    titles += ["load all", "/ stream", "CPU time", "memory"]
    print(table(titles, rows))
    print(json.dumps(machine(1)))


if __name__ == "__main__":
    main()

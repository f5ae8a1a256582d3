"""The ledger's speed: `python -m tests.benchmarks.bench_ledger` prints claims per second and a claim's cost by size.

The calls of a run are timed at its start and far into an epoch, for data of different sizes in turn, in one process.
The cost of a call must not grow with the data. Files lie in the given folder: the speed of its disk counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hrm_ray.data.order import epoch_order
from hrm_ray.ledger import BlockLength, ClaimOrder, Lease, Ledger, Span, SynchronousRun, open_ledger
from hrm_ray.ledger.export import document
from hrm_ray.ledger.verify import violations
from tests.benchmarks.timing import Summary, in_turn, machine, plain, spent, summary, table

CHUNKS_PER_BLOCK = 25
"""100,000 samples to a block and 4,000 to a chunk."""
SEQUENCES = 100
CLAIM = "claim, CPU us"
"""Calls that do not wait for the disk are measured in CPU time, which other load changes little."""


def shuffled(chunks: int) -> ClaimOrder:
    """The keyed order, computed a thousand positions at a time as a loader does."""
    ready: dict[tuple[int, int], list[int]] = {}

    def order(epoch: int, position: int) -> int:
        key = epoch, position // 1000
        if key not in ready:
            ready.clear()
            places = np.arange(1000 * key[1], min(1000 * (key[1] + 1), chunks))
            ready[key] = epoch_order(0, epoch, chunks, linear=False).at(places).tolist()
        return ready[key][position % 1000]

    return order


class Bench:
    """One ledger of a size, and a run on it."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.chunks = chunks
        self.order = shuffled(chunks)
        self.ledger: Ledger = open_ledger(path)
        self.ledger.add_blocks(
            BlockLength(number, min(CHUNKS_PER_BLOCK, chunks - CHUNKS_PER_BLOCK * number))
            for number in range(-(-chunks // CHUNKS_PER_BLOCK))
        )
        self.ledger.end_data()
        self.run = SynchronousRun(self.ledger, None)
        self.step: int | None = None
        self.leases: list[Lease] = []
        self.trained = 0

    def claim(self, number: int) -> None:
        """That many claims."""
        for _ in range(number):
            lease = self.run.claim(self.order)
            assert lease is not None
            self.leases.append(lease)

    def measure(self) -> None:
        """Report the length of each leased chunk to the ledger."""
        for lease in self.leases:
            self.run.measure(lease.chunk, SEQUENCES)

    def commit(self) -> None:
        """Commit everything leased as one checkpoint."""
        spans = [Span(lease.epoch, lease.chunk, 0, SEQUENCES) for lease in self.leases]
        self.trained += len(spans)
        self.leases = []
        step = (self.step or 0) + 1
        self.run.commit_checkpoint(step, self.step, spans, f"checkpoints/step_{step}", "0" * 64)
        self.step = step

    def go_on(self, share: float) -> None:
        """Train until that share of the first epoch is done, a thousand chunks to a checkpoint."""
        while (left := int(share * self.chunks) - self.trained) > 0:
            with self.ledger.database.transaction(durable=True):
                self.claim(min(left, 1000))
                self.measure()
            self.commit()

    def rewind_to(self) -> None:
        """Undo the newest round."""
        head = self.ledger.head
        self.trained -= 0 if head is None else head.sequences // SEQUENCES
        before = self.step - 1 if self.step is not None and self.step > 1 else None
        self.run = SynchronousRun(self.ledger, before)
        self.step = before


def calls_in_turn(benches: list[Bench], claims: int, rounds: int) -> dict[str, list[list[float]]]:
    """What each call takes, by size: claims of untouched chunks and of returned ones, a checkpoint and its undoing."""
    taken: dict[str, list[list[float]]] = {}
    claim = [partial(bench.claim, claims) for bench in benches]
    measure, commit = [bench.measure for bench in benches], [bench.commit for bench in benches]
    for number in range(rounds):
        for name, works, unit, waits in (
            (CLAIM, claim, 1e6 / claims, False),
            ("measure, CPU us", measure, 1e6 / claims, False),
            ("checkpoint, ms", commit, 1e3, True),
            ("going back, ms", [bench.rewind_to for bench in benches], 1e3, True),
            ("claim again, CPU us", claim, 1e6 / claims, False),
        ):
            by_size = taken.setdefault(name, [[] for _ in benches])
            for values, one in zip(by_size, in_turn(number, works), strict=True):
                values.append((one.wall_s if waits else one.cpu_s) * unit)
        for bench in benches:
            bench.commit()
    return taken


def shown(found: dict[str, list[list[float]]], sizes: list[int]) -> dict[str, dict[str, Summary]]:
    """Print the calls by size with the ratio of the last size to the first, round by round; gives the figures."""
    figures: dict[str, dict[str, Summary]] = {}
    for call, by_size in found.items():
        figures[call] = {f"{size} chunks": summary(values) for size, values in zip(sizes, by_size, strict=True)}
        figures[call]["last / first"] = summary(
            [last / first for first, last in zip(by_size[0], by_size[-1], strict=True)]
        )
    titles = ("", *figures[CLAIM])
    rows = [[call, *[one.shown(2) for one in line.values()]] for call, line in figures.items()]
    print(table(titles, rows))
    claims = figures[CLAIM]
    print(
        "claims per second of CPU time: " + ", ".join(f"{1e6 / claims[f'{size} chunks'].median:.0f}" for size in sizes)
    )
    return figures


def adding(folder: Path, chunks: int) -> dict[str, float]:
    """Seconds of adding a million chunks in one call, and a block at a time."""
    blocks = [BlockLength(number, CHUNKS_PER_BLOCK) for number in range(chunks // CHUNKS_PER_BLOCK)]
    with open_ledger(folder / "at_once.sqlite") as ledger:
        at_once = spent(lambda: ledger.add_blocks(blocks)).wall_s
    with open_ledger(folder / "one_by_one.sqlite") as ledger:

        def per_parameter() -> None:
            for block in blocks:
                ledger.add_blocks([block])

        return {"at_once_s": at_once, "one_by_one_s": spent(per_parameter).wall_s, "blocks": len(blocks)}


def looking(bench: Bench) -> dict[str, float]:
    """Seconds of the answers whose time grows with the rows."""
    return {
        "rows": bench.ledger.database.rows("SELECT count(*) FROM ranges")[0][0],
        "file_bytes": bench.ledger.path.stat().st_size,
        "counts_s": spent(bench.ledger.counts).wall_s,
        "verify_s": spent(lambda: list(violations(bench.ledger))).wall_s,
        "export_s": spent(lambda: document(bench.ledger)).wall_s,
    }


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--chunks", type=int, nargs="*", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--claims", type=int, default=15, help="claims in one measurement")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--into-the-epoch", type=float, default=0.5, help="share of the epoch trained before the rest")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile; the system's temporary folder")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-", dir=said.folder) as name:
        folder = Path(name)
        figures: dict[str, Any] = {"machine": machine(1), "adding": adding(folder, max(said.chunks))}
        added = figures["adding"]
        print(
            f"adding {max(said.chunks)} chunks in {added['blocks']} blocks: {added['at_once_s']:.2f} s at once,"
            f" {added['one_by_one_s']:.2f} s one by one"
        )
        benches = [Bench(folder / f"{chunks}.sqlite", chunks) for chunks in said.chunks]
        stages = [("at the start", 0.0), (f"{said.into_the_epoch:.0%} into the epoch", said.into_the_epoch)]
        for stage, share in stages:
            for bench in benches:
                bench.go_on(share)
            found = calls_in_turn(benches, said.claims, said.rounds)
            print(f"\n{stage}, median [interval] of {said.rounds} rounds of {said.claims} claims and one checkpoint")
            figures[stage] = plain(shown(found, said.chunks))
        figures["looking"] = looking(benches[-1])
        print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in figures["looking"].items()))
        for bench in benches:
            bench.ledger.close()
    if said.json is not None:
        said.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time per training step against the matrix products alone and the reference's figures; then launchers and memory.

`python -m tests.benchmarks.bench_step --help` lists the options; `--only` chooses parts. Steps are timed as CPU time of
this process, which other load disturbs least, and always in turn with what they are compared with.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_cases import CASES, Case, build_loop
from tests.benchmarks.bench_floor import Floor, recorded_products
from tests.benchmarks.bench_memory import memory_by_segments
from tests.benchmarks.bench_start import compare_launchers, help_time
from tests.benchmarks.timing import Summary, in_turn, machine, plain, summary, table

WARM_UP_STEPS = 3
OTHER_PARTS = ("ray", "help", "memory")


@dataclass(frozen=True)
class Timed:
    """One case: milliseconds of a step and of its products, and the ratio round by round."""

    case: Case
    step_cpu_ms: Summary
    step_wall_ms: Summary
    floor_cpu_ms: Summary
    ratio: Summary
    flops: int
    products: int

    @property
    def floor_gflops_per_s(self) -> float:
        return self.flops / self.floor_cpu_ms.median / 1e6

    def to_plain(self) -> dict[str, Any]:
        tokens = self.case.batch_size * self.case.seq_len
        return {
            "about": self.case.about,
            "parameters": self.case.parameters,
            "heads": self.case.model["num_heads"],
            "tokens_per_step": tokens,
            "step_cpu_ms": plain(self.step_cpu_ms),
            "step_wall_ms": plain(self.step_wall_ms),
            "tokens_per_cpu_s": 1e3 * tokens / self.step_cpu_ms.median,
            "floor_cpu_ms": plain(self.floor_cpu_ms),
            "step_to_floor": plain(self.ratio),
            "matrix_products": self.products,
            "flops_per_step": self.flops,
            "floor_gflops_per_s": self.floor_gflops_per_s,
        }


def time_case(case: Case, rounds: int, threads: int) -> Timed:
    """Steps and the same steps' products in turn, `rounds` times each."""
    loop = build_loop(case, threads)
    for _ in range(WARM_UP_STEPS):
        loop.step()
    with recorded_products() as products:
        loop.step()
    floor = Floor(products)
    floor.run()
    pairs = [in_turn(number, (loop.step, floor.run)) for number in range(rounds)]
    return Timed(
        case,
        step_cpu_ms=summary([1e3 * step.cpu_s for step, _ in pairs]),
        step_wall_ms=summary([1e3 * step.wall_s for step, _ in pairs]),
        floor_cpu_ms=summary([1e3 * alone.cpu_s for _, alone in pairs]),
        ratio=summary([step.cpu_s / alone.cpu_s for step, alone in pairs]),
        flops=floor.flops,
        products=floor.count,
    )


def report_steps(timed: dict[str, Timed], threads: int) -> None:
    rows = [
        [
            name,
            one.step_cpu_ms.shown(1),
            f"{one.step_wall_ms.median:.1f}",
            f"{one.floor_cpu_ms.median:.1f}",
            one.ratio.shown(),
            f"{one.flops / 1e9:.1f}",
            f"{one.floor_gflops_per_s:.0f}",
        ]
        for name, one in timed.items()
    ]
    covered = 100 * min(one.ratio.coverage for one in timed.values())
    print(f"\nTime per step at {threads} thread(s); median [{covered:.0f} % interval]; floor: its products alone")
    titles = ("case", "step CPU ms", "wall ms", "floor CPU ms", "step / floor", "GFLOP", "floor GFLOP/s")
    print(table(titles, rows))
    for name, one in timed.items():
        print(f"  {name}: {one.case.about}; {one.case.parameters:,} parameters, {one.case.model['num_heads']} heads")


def against_reference(timed: dict[str, Timed], path: Path, threads: int) -> dict[str, Any] | None:
    """Print the ratios to the reference's CPU time per step and what differs; None without its figures."""
    compared = {name: one for name, one in timed.items() if one.case.reference is not None}
    if not compared:
        return None
    if not path.is_file():
        print(f"\nReference: skipped, there is no {path}; name the file with --reference")
        return None
    figures = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    rows, notes = [], []
    for name, one in compared.items():
        section, entry = one.case.reference or ("", "")
        if f"{section}_t{threads}" not in figures:
            print(f"\nReference: {name} skipped, the file has no figures at {threads} thread(s)")
            continue
        theirs = figures[f"{section}_t{threads}"]["results"][entry]
        if theirs["params"] != one.case.parameters:
            raise RuntimeError(f"{entry} has {theirs['params']:,} parameters, {name} {one.case.parameters:,}")
        ratio = one.step_cpu_ms.median / theirs["cpu_ms_median"]
        found[name] = {
            "entry": entry,
            "reference_cpu_ms": theirs["cpu_ms_median"],
            "ratio": ratio,
            "differs": one.case.differs,
        }
        rows.append([name, f"{one.step_cpu_ms.median:.1f}", f"{theirs['cpu_ms_median']:.1f}", f"{ratio:.2f}"])
        notes.append(f"  {name} with {entry}: {one.case.differs}")
    if rows:
        print(f"\nAgainst the reference's figures at {threads} thread(s), measured at another time: {path}")
        print(table(("case", "CPU ms", "reference CPU ms", "ratio"), rows))
        print("\n".join(notes))
        print("  The file does not say the reference's number of heads; it changes neither parameters nor products'")
        print("  FLOPs, only how attention is cut.")
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps timed per case (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=6, help="runs per launcher (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a step (default %(default)s)")
    parser.add_argument("--only", help=f"parts, with commas between: {', '.join([*CASES, *OTHER_PARTS])}")
    parser.add_argument("--skip-ray", action="store_true", help="time the local launcher alone")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--reference", type=Path, help="the reference's figures (speed_reference.json); without it they are left out"
    )
    chosen = parser.parse_args()
    parts = [*CASES, *OTHER_PARTS] if chosen.only is None else chosen.only.split(",")
    unknown = [part for part in parts if part not in CASES and part not in OTHER_PARTS]
    if unknown:
        parser.error(f"--only: no part is called {', '.join(unknown)}; there are {', '.join([*CASES, *OTHER_PARTS])}")
    if min(chosen.rounds, chosen.pairs, chosen.threads) < 1:
        parser.error("--rounds, --pairs and --threads must be at least 1")
    chosen.parts = parts
    return chosen


def main() -> None:
    chosen = options()
    figures: dict[str, Any] = {"machine": machine(chosen.threads)}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    timed = {}
    for name in (part for part in chosen.parts if part in CASES):
        print(f"timing {name} ...", flush=True)
        timed[name] = time_case(CASES[name], chosen.rounds, chosen.threads)
    if timed:
        report_steps(timed, chosen.threads)
        figures["steps"] = {name: one.to_plain() for name, one in timed.items()}
        if chosen.reference is not None:
            figures["reference"] = against_reference(timed, chosen.reference, chosen.threads)
    if "ray" in chosen.parts:
        figures["launchers"] = compare_launchers(chosen.pairs, chosen.threads, with_ray=not chosen.skip_ray)
    if "help" in chosen.parts:
        figures["help"] = help_time()
    if "memory" in chosen.parts:
        figures["memory"] = memory_by_segments(chosen.threads)
    figures["machine_at_the_end"] = machine(chosen.threads)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(plain(figures), indent=1) + "\n", encoding="utf-8")
        print(f"\nall figures: {chosen.json}")


if __name__ == "__main__":
    main()

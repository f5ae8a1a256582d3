"""Times an update with each option that `hrm-ray optimize` may add to save memory, against the update without it.

    python -m tests.benchmarks.bench_levers [--context 512] [--rows 4] [--rounds 7]

Updates alternate in one process on one thread, and CPU time is compared, so another load of the machine hardly counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from hrm_ray.model.config import model_config
from hrm_ray.search.optimize import CHECKPOINTING, CHUNKED, CHUNKS, EIGHT_BITS, LEVERS, Lever
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.memory_estimate import NoRows, memory_estimate, ones_batch
from hrm_ray.train.world import World

ALONE = (EIGHT_BITS, CHECKPOINTING, CHUNKED)
"""Those of one worker."""


def settings_of(context: int, rows: int, levers: tuple[Lever, ...]) -> RunSettings:
    words: dict[str, str | bool] = {
        **{"--hidden-size": "128", "--num-heads": "4", "--h-layers": "1", "--l-layers": "1", "--expansion": "4"},
        **{"--max-seq-len": str(context), "--batch-size": str(rows), "--no-amp": True},
        "--no-gradient-checkpointing": True,
    }
    settings = resolve_task(load_settings(words), "lm", None)
    leaves = {key: value for lever in levers for key, value in lever.leaves.items()}
    if CHUNKED in levers:
        leaves["memory.chunk_size"] = -(-context // CHUNKS)
    return settings.with_leaves(leaves)


def update_of(settings: RunSettings) -> Callable[[], None]:
    """A function that takes one update on random tokens."""
    config = model_config(settings, 2048)
    loop = assemble(settings, config, NoRows(), World(0, 1, torch.device("cpu"), grouped=False), 1000, resumes=True)
    batch = ones_batch(loop, config, settings.data.packing)
    batch["inputs"] = torch.randint(config.vocab_size, batch["inputs"].shape, dtype=torch.int32)

    def update() -> None:
        loop.passes([batch], lambda: defaultdict(lambda: float(batch["inputs"].numel())))
        loop.parts.strategy.step(loop.parts.grad_clip, 1e-4)

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[tuple[Lever, ...]] = [(), *((lever,) for lever in LEVERS if lever in ALONE)]
    cases += [(CHECKPOINTING, CHUNKED), (EIGHT_BITS, CHECKPOINTING, CHUNKED)]
    updates = [update_of(settings_of(args.context, args.rows, case)) for case in cases]
    taken: list[list[float]] = [[] for _ in cases]
    for number in range(1 + args.rounds):
        for update, times in zip(updates, taken, strict=True):
            began_s = time.process_time()
            update()
            if number:
                times.append(time.process_time() - began_s)
    for case, times in zip(cases, taken, strict=True):
        ratios = [mine / plain for mine, plain in zip(times, taken[0], strict=True)]
        settings = settings_of(args.context, args.rows, case)
        peak = memory_estimate(settings, model_config(settings, 2048)).peak_bytes
        name = ", ".join(lever.name for lever in case) or "none"
        print(f"{name}: {statistics.median(ratios):.2f} x the time, {peak / 1e6:.0f} MB of tensors at the peak")


if __name__ == "__main__":
    main()

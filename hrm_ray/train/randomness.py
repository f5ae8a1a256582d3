"""Seeds the random numbers of a training step, which dropout draws.

Orders of samples, exploration and initial weights have generators of their own.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, batch_idx: int, rank: int) -> None:
    """Seed PyTorch's generators of all devices from the run's seed, the batch's number and the rank.

    A resumed run and a step repeated after out of memory draw the same numbers, with no state to save. Rows draw one
    after the other, so the split into micro-batches decides which row gets which numbers.
    """
    mixed = np.random.SeedSequence((seed, batch_idx, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))

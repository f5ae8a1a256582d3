"""Where the random numbers of a training step come from.

One job: set PyTorch's generators at the start of a step. Dropout draws from them, that of adapters too. Orders of
samples, exploration and starting weights have generators of their own.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, batch_idx: int, rank: int) -> None:
    """Set the generators of all devices to a state that follows from the run's seed, the batch's number and the rank.

    So a resumed run, and a step that is done again after memory ran out, draw what they would have drawn, with no
    state to save; ranks draw different numbers. Rows of one batch draw one after the other: how a batch is cut
    decides which row gets which numbers.
    """
    mixed = np.random.SeedSequence((seed, batch_idx, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))

"""How far a run has come, as checkpoints and bundles store it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """What has been done: weight updates, batches offered (skipped ones too), updates skipped, in a row and in all."""

    step: int = 0
    batch_idx: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0

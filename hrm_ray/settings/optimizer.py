"""Settings of the optimisation: batch, learning rate, schedule, optimizer.

One job: the leaves of section `optimizer`. What they do is in `hrm_ray.train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from hrm_ray.settings.base import Section

LrSchedule: TypeAlias = Literal["cosine", "linear", "constant", "wsd"]
OptimizerKind: TypeAlias = Literal["adamw", "adam-atan2", "sgd"]


class OptimizerSettings(Section):
    """How weights are updated."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences or puzzles in one micro-batch of one worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches whose gradients are added for one weight update."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    auto_adjust_lr: bool = True
    """With experts, lower a learning rate above 1e-3 to 1e-3; otherwise it is used as given."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment of the gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment of the gradients."""
    warmup_steps: int = Field(default=0, ge=0)
    """Weight updates over which the learning rate rises linearly to its peak."""
    lr_min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the schedule, relative to the peak."""
    lr_schedule: LrSchedule = "cosine"
    """Course of the learning rate after the warm-up; wsd holds it, then lowers it over the last updates."""
    wsd_decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of all weight updates over which the wsd schedule lowers the learning rate."""
    adaptive_lr_config: Path | None = None
    """Lower the learning rate by the trend of the loss, with the thresholds in this YAML or JSON file
    (an empty one takes the defaults): a plateau lowers it, divergence steps further back."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradients; 0 leaves them as they are."""
    optimizer: OptimizerKind = "adamw"
    """The rule of the weight update."""
    use_8bit_optimizer: bool = False
    """Keep the moments of adamw in 8 bits (bitsandbytes), a quarter of the bytes."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights with this decay, and evaluate and save that."""
    puzzle_emb_lr: float = Field(default=1e-2, gt=0)
    """Learning rate of the puzzle embedding (sparse sign-SGD)."""
    puzzle_emb_weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of the puzzle embedding."""
    max_bad_steps: int = Field(default=20, ge=1)
    """Updates in a row that may be skipped for non-finite gradients before the run ends with an error."""

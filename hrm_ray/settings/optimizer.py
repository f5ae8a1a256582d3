"""Settings of the optimisation: batch size, learning rate, schedule and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hrm_ray.settings.base import Section, option
from hrm_ray.settings.needs import EXPERTS, FALLING_LR, MOMENTS, PUZZLE_EMBEDDING, TRAINED_PUZZLE_EMBEDDING, WSD


class OptimizerSettings(Section):
    """Batch, learning rate and optimizer."""

    batch_size: int = option(
        8,
        "free",
        ge=1,
        affects=("memory",),
        aliases={"--per-device-train-batch-size": None},
        replaces=("cluster.trainer_batch_sizes",),
    )
    """Sequences or puzzles in one micro-batch of one worker. With --parallel-independent also one for each trainer, as
    16,8."""
    gradient_accumulation_steps: int = option(
        1, "free", ge=1, affects=("memory",), replaces=("optimizer.effective_batch_size",)
    )
    """Micro-batches whose gradients are added up for one weight update."""
    effective_batch_size: int | None = option(
        None,
        "free",
        ge=1,
        replaces=("optimizer.gradient_accumulation_steps",),
        unset="--batch-size times --gradient-accumulation-steps times workers",
    )
    """Sequences or puzzles of one weight update; chooses --gradient-accumulation-steps for this --batch-size and
    number of workers."""
    lr: float = option(2e-4, "free", gt=0, aliases={"--learning-rate": None}, unset="2e-4, or one that fits the preset")
    """Peak learning rate."""
    auto_adjust_lr: bool = option(True, "free", needs=(EXPERTS,))
    """With experts, lower a learning rate above 1e-3 to 1e-3; otherwise the rate is used as given."""
    weight_decay: float = option(0.01, "free", ge=0, unset="0.01, or 0.1 with a preset")
    """Decoupled weight decay."""
    beta1: float = option(0.9, "free", ge=0, lt=1, needs=(MOMENTS,), aliases={"--adam-beta1": None})
    """Decay rate of the first moment of the gradients."""
    beta2: float = option(0.95, "free", ge=0, lt=1, needs=(MOMENTS,), aliases={"--adam-beta2": None})
    """Decay rate of the second moment of the gradients."""
    warmup_steps: int = option(0, "free", ge=0, unset="0, or 20 with a preset")
    """Weight updates over which the learning rate rises linearly to its peak."""
    lr_min_ratio: float = option(0.1, "free", ge=0, le=1, needs=(FALLING_LR,))
    """Learning rate at the end of the schedule, relative to the peak."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = option("cosine", "free")
    """Learning-rate schedule after the warm-up; wsd holds the rate, then lowers it over the last updates."""
    wsd_decay_ratio: float = option(0.2, "free", gt=0, le=1, needs=(WSD,))
    """Share of all weight updates over which the wsd schedule lowers the learning rate."""
    adaptive_lr_config: Path | None = option(None, "free", unset="the schedule alone")
    """Lower the learning rate when the loss stops falling or diverges, with the thresholds in this YAML or JSON file
    (an empty file takes the defaults)."""
    grad_clip: float = option(1.0, "free", ge=0, aliases={"--max-grad-norm": None})
    """Maximum norm of the gradients; 0 disables clipping."""
    optimizer: Literal["adamw", "adam-atan2", "sgd"] = option("adamw", "fixed", affects=("memory",))
    """Optimizer."""
    use_8bit_optimizer: bool = option(False, "fixed", affects=("memory",))
    """Keep the moments of adamw in 8 bits (bitsandbytes), a quarter of the memory."""
    ema: float | None = option(None, "presence_fixed", gt=0, lt=1, affects=("memory",), unset="no moving average")
    """Keep an exponential moving average of the weights with this decay, and evaluate and save the average."""
    puzzle_emb_lr: float = option(1e-2, "free", gt=0, needs=(TRAINED_PUZZLE_EMBEDDING, PUZZLE_EMBEDDING))
    """Learning rate of the puzzle embedding (sparse sign-SGD)."""
    puzzle_emb_weight_decay: float = option(0.1, "free", ge=0, needs=(TRAINED_PUZZLE_EMBEDDING, PUZZLE_EMBEDDING))
    """Weight decay of the puzzle embedding."""
    max_bad_steps: int = option(20, "free", ge=1)
    """Consecutive weight updates that may be skipped for non-finite gradients before the run ends with an error."""

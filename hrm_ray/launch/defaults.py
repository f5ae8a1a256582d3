"""Defaults of a new run without --profile: chosen from the data and the device, where the user gave no value."""

from __future__ import annotations

import math
from typing import Any

from hrm_ray.data.detect import DataFacts
from hrm_ray.launch.preflight import fits_memory
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters
from hrm_ray.settings.presets import preset_leaves
from hrm_ray.settings.resolve import MOE_LR, TEXT_SEQ_LEN
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.time_estimate import update_s

BYTES_OF_A_TOKEN = 8
"""No more bytes than that come to a token, as a rule."""
LEAST_SEQ_LEN = 16

SIZE_LEAVES = frozenset(
    f"model.{name}"
    for name in ("h_layers", "l_layers", "num_layers", "hidden_size", "num_heads", "expansion", "d_ff", "student_init")
)
"""Leaves that set the model's size: where one is given, no size is chosen."""

LR = {"nano": 3e-3, "tiny": 1.5e-3, "small": 1e-3, "medium": 6e-4, "large": 4e-4, "xlarge": 3e-4}
"""Learning rate of AdamW by preset, for the short runs of a first trial."""
WARMUP_STEPS = 20
"""Warm-up of these rates, or a tenth of a shorter run."""

BYTES_PER_TOKEN = 250
"""Bytes of text for each token of a vocabulary: a rarer token is hardly seen often enough to be learned."""
TRAINED_PER_TOKEN = 200
"""Tokens that the run trains on for each token of a vocabulary. With four times the vocabulary a run of 200 updates
learned no more than how frequent tokens are."""
LEAST_VOCABULARY, MOST_VOCABULARY = 512, 16384

TEXT_ON_CPU: dict[str, Any] = {
    "model.hidden_size": 128,
    "model.num_heads": 4,
    "model.h_layers": 1,
    "model.l_layers": 1,
    "model.expansion": 4.0,
    "data.max_seq_len": 64,
    "optimizer.batch_size": 16,
}
"""A model that learns more than the frequency of tokens in 200 updates, and these in minutes."""

SHUFFLED_BYTES = 64_000_000
"""Up to so much text is shuffled: it is read once before the first step. Neighbouring rows are alike, and a short run
on them in order learns less (3.16 against 2.72 bits per byte after 200 updates on 1 MB)."""

PUZZLES: dict[str, Any] = {
    "model.expansion": 4.0,
    "model.pos_encodings": "learned",
    "model.halt_max_steps": 8,
    "model.halt_exploration_prob": 0.5,
    "model.loss": "softmax",
    "data.linear_dataset": False,
    "optimizer.batch_size": 64,
    "optimizer.ema": 0.995,
}
PUZZLE_OPTIMIZER: dict[str, Any] = {
    "optimizer.optimizer": "adam-atan2",
    "optimizer.lr": 2e-3,
    "optimizer.weight_decay": 1.0,
    "optimizer.warmup_steps": 100,
    "optimizer.lr_min_ratio": 0.02,
}
"""The recipe sudoku4, which learns 4x4 Sudoku in two minutes on one CPU core."""
SMALL_PUZZLE = {"model.hidden_size": 64, "model.num_heads": 2, "model.h_layers": 1, "model.l_layers": 1}
LARGE_PUZZLE = {"model.hidden_size": 128, "model.num_heads": 4, "model.h_layers": 2, "model.l_layers": 2}
SMALL_PUZZLE_CELLS = 25
SMALL_PUZZLE_STEPS, LARGE_PUZZLE_STEPS = 2500, 10000


def with_defaults(settings: RunSettings, facts: DataFacts, device: str) -> RunSettings:
    """The settings with defaults for this amount of data on this device; what was given stays as it is.

    A profile leaves little open, and the settings of an earlier run nothing.
    """
    if settings.complete:
        return settings
    leaves: dict[str, Any] = {}
    if settings.run.profile is None:
        leaves = _puzzle_leaves(settings, facts) if facts.puzzle is not None else _text_leaves(settings, facts, device)
    if facts.puzzle is None:
        leaves |= _shorter_rows(settings, facts)
    if settings.memory.amp is None:
        leaves["memory.amp"] = device in ("cuda", "xpu")
    return _filled(settings, leaves)


def with_checkpointing(settings: RunSettings, config: ModelConfig, device: str, world_size: int) -> RunSettings:
    """The settings with activation checkpointing on only where an update needs it, if that was left open."""
    if settings.memory.gradient_checkpointing is not None:
        return settings
    off = _filled(settings, {"memory.gradient_checkpointing": False})
    return (
        off
        if fits_memory(off, config, device, world_size)
        else _filled(settings, {"memory.gradient_checkpointing": True})
    )


def account_of_defaults(settings: RunSettings, config: ModelConfig, device: str, threads: int) -> str | None:
    """What was chosen, and how long the run will take, in a line; None where no size was chosen or named."""
    preset = settings.model.model_preset
    if settings.run.profile is not None or settings.complete or SIZE_LEAVES & settings.given:
        return None
    kind = f"{config.num_experts} experts" if config.num_experts else "dense"
    size = f"{kind} {preset or 'model'} ({count_parameters(config).total / 1e6:.2g} million parameters)"
    precision = "mixed precision" if settings.memory.amp else "float32"
    parts = [f"{device.upper()}: {size}, {precision}"]
    if settings.memory.gradient_checkpointing:
        parts[0] += ", activation checkpointing"
    duration = expected_time(settings, config, device, threads)
    if duration is not None:
        parts.append(duration)
    if "model.model_preset" not in settings.given and config.task == "lm":
        larger = {None: "nano", "nano": "small", "tiny": "small"}.get(preset, "medium")
        parts.append(f"--model-preset {larger} for a larger model")
    return "; ".join(parts)


def expected_time(settings: RunSettings, config: ModelConfig, device: str, threads: int) -> str | None:
    """The time of the whole run, or of an update where its length is not known; None where nothing can be said.

    Only the CPU is timed: on a GPU small models wait for launches, which FLOPs do not count.
    """
    if device != "cpu":
        return None
    each_s = update_s(settings, config, threads)
    if each_s is None:
        return None
    steps = settings.run.step_limit
    if steps is None:
        return f"about {_duration(each_s)} a step"
    return f"about {_duration(each_s * steps)} for {steps} step{'' if steps == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.2g} minutes"
    return f"{seconds / 3600:.2g} hours"


def _shorter_rows(settings: RunSettings, facts: DataFacts) -> dict[str, Any]:
    """A shorter row where the text may not fill one of the default length."""
    usual = settings.data.max_seq_len or TEXT_SEQ_LEN
    if not 0 < facts.bytes < BYTES_OF_A_TOKEN * usual:
        return {}
    fits = facts.bytes // BYTES_OF_A_TOKEN
    return {"data.max_seq_len": max(LEAST_SEQ_LEN, 2 ** (fits.bit_length() - 1) if fits else 0)}


def _text_leaves(settings: RunSettings, facts: DataFacts, device: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    model = settings.model
    preset: str | None = model.model_preset
    chosen = preset is None and not SIZE_LEAVES & settings.given
    if chosen and device == "cpu":
        leaves = dict(TEXT_ON_CPU)
    elif chosen:
        preset = _preset(facts.bytes)
        leaves = {"model.model_preset": preset, **preset_leaves(preset)}
        if device == "cuda":
            leaves |= {"data.max_seq_len": 256, "optimizer.batch_size": 32}
    if chosen and 0 < facts.bytes <= SHUFFLED_BYTES:
        leaves["data.linear_dataset"] = False
    if (chosen or preset is not None) and "optimizer.optimizer" not in settings.given:
        lr = LR[preset or "nano"]
        leaves["optimizer.lr"] = min(lr, MOE_LR) if model.use_moe else lr
        leaves["optimizer.weight_decay"] = 0.1
        leaves["optimizer.warmup_steps"] = min(WARMUP_STEPS, (settings.run.step_limit or 10 * WARMUP_STEPS) // 10)
    if settings.data.vocab_size is None:
        leaves["data.vocab_size"] = _vocabulary(facts.bytes, _filled(settings, leaves))
    return leaves


def _puzzle_leaves(settings: RunSettings, facts: DataFacts) -> dict[str, Any]:
    if settings.model.model_preset is not None or SIZE_LEAVES & settings.given or facts.puzzle is None:
        return {}
    small = facts.puzzle.seq_len <= SMALL_PUZZLE_CELLS
    leaves = {**PUZZLES, **(SMALL_PUZZLE if small else LARGE_PUZZLE)}
    if "optimizer.optimizer" not in settings.given:
        leaves |= PUZZLE_OPTIMIZER
    run = settings.run
    if run.steps is None and run.step_limit is not None:
        leaves["run.steps"] = SMALL_PUZZLE_STEPS if small else LARGE_PUZZLE_STEPS
    steps = leaves.get("run.steps", run.step_limit)
    if steps is not None:
        leaves["optimizer.warmup_steps"] = min(100, steps // 10)
    return leaves


def _preset(size_bytes: int) -> str:
    """The size of a model that this much text can teach something."""
    if 0 < size_bytes < 2_000_000:
        return "nano"
    return "tiny" if 0 < size_bytes < 20_000_000 else "small"


def _vocabulary(size_bytes: int, settings: RunSettings) -> int:
    """A power of two that the text can fill, that this run can learn, and that a model of this width has room for."""
    most = min(MOST_VOCABULARY, max(LEAST_VOCABULARY, 32 * settings.model.hidden_size))
    bounds = [size_bytes / BYTES_PER_TOKEN] if size_bytes > 0 else []
    if settings.run.step_limit is not None:
        chosen = settings.optimizer
        rows = chosen.effective_batch_size or chosen.batch_size * chosen.gradient_accumulation_steps
        trained = settings.run.step_limit * rows * (settings.data.max_seq_len or TEXT_SEQ_LEN)
        bounds.append(trained / TRAINED_PER_TOKEN)
    fitting = min(bounds, default=float(most))
    return min(most, max(LEAST_VOCABULARY, 2 ** round(math.log2(max(1.0, fitting)))))


def _filled(settings: RunSettings, leaves: dict[str, Any]) -> RunSettings:
    """The settings with these leaves, by dotted key, where the user gave no value."""
    return settings.with_leaves({key: value for key, value in leaves.items() if key not in settings.given})

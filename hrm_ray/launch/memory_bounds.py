"""Bounds of what a weight update takes of memory, in closed form.

One job: say in no time what surely does not fit, and what surely does. Between them a rehearsal (train/rehearse.py)
tells.
"""

from __future__ import annotations

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters
from hrm_ray.settings.tree import RunSettings

_MARGIN = 1.5
"""Of the upper bound, over what is counted in it."""
_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_MOMENT_BYTES = {"adamw": 8, "adam-atan2": 8, "sgd": 0}
"""Of one weight: by --model-dtype, and what an optimizer keeps for it."""


def state_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """The least that weights, gradients, optimizer state and average of one worker take.

    Where all but a little is frozen, that little is not counted.
    """
    number = count_parameters(config).total
    gradient = 0 if _mostly_frozen(settings) else _WEIGHT_BYTES[settings.memory.model_dtype]
    return int((_weight_bytes(settings) + gradient + _kept_beside(settings)) * number)


def _mostly_frozen(settings: RunSettings) -> bool:
    return settings.adapt.use_peft or settings.run.expert_id is not None


def _weight_bytes(settings: RunSettings) -> float:
    """Of one weight, were they all quantised that can be."""
    if settings.memory.load_in_4bit:
        return 0.5
    return 1 if settings.memory.load_in_8bit else _WEIGHT_BYTES[settings.memory.model_dtype]


def _kept_beside(settings: RunSettings) -> int:
    """Bytes of moments and average for one weight."""
    if _mostly_frozen(settings):
        return 0
    moments = 2 if settings.optimizer.use_8bit_optimizer else _MOMENT_BYTES[settings.optimizer.optimizer]
    return moments + (4 if settings.optimizer.ema is not None else 0)


def least_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """Less than any update takes: its state, and of one micro-batch the tokens, labels and two states in 16 bits."""
    positions = settings.optimizer.batch_size * config.total_positions
    return state_bytes(settings, config) + positions * (8 + 2 * 2 * config.hidden_size)


def most_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """More than any update takes, whatever saves memory left out of account."""
    width = config.intermediate_size
    if config.num_experts:
        places = config.num_experts_per_tok * max(1.0, config.moe_capacity_factor)
        width = round((width + config.hidden_size) * places) + config.num_experts
    layers = config.bp_steps * max(config.h_layers, config.l_layers)
    if config.arch == "transformer":
        layers = config.h_layers + config.l_layers
    # Each tensor of a layer once for the graph and those of two layers once more, in float32; scores in float64.
    in_layers = 4 * (layers + 2) * (24 * config.hidden_size + 10 * width)
    in_carries = 16 * config.hidden_size * settings.optimizer.gradient_accumulation_steps
    scores = 6 * 8 * config.vocab_size
    positions = settings.optimizer.batch_size * config.total_positions
    # Weights, gradients, two moments, average, and what an update makes of them on its way.
    state = 6 * 4 * count_parameters(config).total
    return round(_MARGIN * (state + positions * (in_layers + in_carries + scores)))


def checkpoint_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """The least that one checkpoint takes, without carries."""
    return int((_weight_bytes(settings) + _kept_beside(settings)) * count_parameters(config).total)


def gigabytes(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

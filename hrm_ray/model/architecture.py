"""Turns settings into a ModelConfig."""

from __future__ import annotations

from hrm_ray.model.config import FORWARD_DTYPES, ModelConfig, swiglu_width
from hrm_ray.settings.tree import RunSettings


def model_config(
    settings: RunSettings, vocab_size: int, *, seq_len: int | None = None, puzzle_identifiers: int = 1
) -> ModelConfig:
    """The architecture that resolved settings ask for, given what the data decides."""
    chosen = settings.model
    transformer = chosen.arch == "transformer"
    width = chosen.d_ff if chosen.d_ff is not None else swiglu_width(chosen.hidden_size, chosen.expansion)
    if chosen.task is None:
        raise ValueError("the task is not resolved; see settings.resolve")
    return ModelConfig(
        task=chosen.task,
        vocab_size=vocab_size,
        seq_len=seq_len or settings.data.max_seq_len or 0,
        hidden_size=chosen.hidden_size,
        num_heads=chosen.num_heads,
        intermediate_size=width,
        h_layers=chosen.h_layers,
        l_layers=chosen.l_layers,
        h_cycles=1 if transformer else chosen.h_cycles,
        l_cycles=1 if transformer else chosen.l_cycles,
        halt_max_steps=1 if transformer else chosen.halt_max_steps,
        arch=chosen.arch,
        pos_encodings=chosen.pos_encodings,
        rope_theta=chosen.rope_theta,
        rms_norm_eps=chosen.rms_norm_eps,
        lm_mask=chosen.lm_mask,
        window_size=chosen.window_size,
        bp_steps=1 if transformer else chosen.bp_steps,
        halt_rule="none" if transformer else chosen.halt_rule,
        puzzle_emb_ndim=chosen.puzzle_emb_ndim,
        forward_dtype=FORWARD_DTYPES[settings.memory.model_dtype],
        num_puzzle_identifiers=puzzle_identifiers,
        activation=chosen.activation,
        swiglu=chosen.swiglu,
        rmsnorm=chosen.rmsnorm,
        dropout_rate=chosen.dropout_rate,
        num_experts=chosen.num_experts if chosen.use_moe else 0,
        num_experts_per_tok=chosen.num_experts_per_tok,
        moe_capacity_factor=chosen.moe_capacity_factor,
    )

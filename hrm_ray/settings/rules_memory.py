"""Which leaves about memory and precision cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _eight_bits_of_adamw(settings: RunSettings) -> Fault | None:
    chosen = settings.optimizer
    if not chosen.use_8bit_optimizer or chosen.optimizer == "adamw":
        return None
    return Fault(
        said(settings, "optimizer.use_8bit_optimizer", "optimizer.optimizer"),
        "bitsandbytes keeps the moments of adamw in 8 bits",
        "Give --optimizer adamw, or leave --use-8bit-optimizer out",
    )


def _chunks_for_text(settings: RunSettings) -> Fault | None:
    if not settings.memory.use_chunked_training or settings.model.task != "puzzle":
        return None
    return Fault(
        "--use-chunked-training with puzzles",
        "a puzzle is read with full attention, so no part of it can be computed before the rest",
        "Leave it out",
    )


def _chunks_without_prefix(settings: RunSettings) -> Fault | None:
    if not settings.memory.use_chunked_training or settings.model.lm_mask != "prefix":
        return None
    return Fault(
        said(settings, "memory.use_chunked_training", "model.lm_mask"),
        "a prompt sees itself fully, so its beginning cannot be computed before its end",
        "Give --lm-mask causal, or leave --use-chunked-training out",
    )


MEMORY_RULES: tuple[Rule, ...] = (
    Rule("chunks_for_text", ("memory.use_chunked_training", "model.task"), _chunks_for_text),
    Rule("chunks_without_prefix", ("memory.use_chunked_training", "model.lm_mask"), _chunks_without_prefix),
    Rule("eight_bits_of_adamw", ("optimizer.use_8bit_optimizer", "optimizer.optimizer"), _eight_bits_of_adamw),
)

"""Named sets of defaults. Everything that the user or a resumed run gives overrides them (see `load`)."""

from __future__ import annotations

from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "hrm-hf": {},
    "train-advanced": {
        "model.activation": "gelu",
        "model.dropout_rate": 0.1,
        "adapt.lora_r": 8,
        "data.max_seq_len": 256,
        "optimizer.batch_size": 32,
        "optimizer.lr": 5e-4,
        "optimizer.warmup_steps": 500,
        "memory.amp": False,
        "run.epochs": 3,
        "run.eval_every": 500,
        "run.save_every": 1000,
        "run.log_every": 10,
    },
}
"""Defaults that differ from the sections' own (FEATURES.md, top); hrm-hf is the sections' own."""


def profile_leaves(name: str) -> dict[str, Any]:
    """The defaults of a profile; empty for an unknown name, which validation reports."""
    return dict(PROFILES[name]) if name in PROFILES else {}

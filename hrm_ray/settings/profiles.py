"""Named sets of defaults, those of older trainers. Everything that the user or a resumed run gives overrides them (see
`load`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "hrm-hf": {
        "model.use_moe": True,
        "data.text_rows": "line",
        "data.vocab_size": 16000,
        "optimizer.grad_clip": 0.5,
        "memory.amp": True,
        "memory.gradient_checkpointing": True,
    },
    "train-advanced": {
        "model.hidden_size": 512,
        "model.num_heads": 8,
        "model.h_layers": 3,
        "model.l_layers": 3,
        "model.d_ff": 2048,
        "model.activation": "gelu",
        "model.dropout_rate": 0.1,
        "adapt.lora_r": 8,
        "data.vocab_size": 16000,
        "data.max_seq_len": 256,
        "data.linear_dataset": False,
        "data.shuffle_buffer_size": 10000,
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
"""The defaults of two older trainers (FEATURES.md, top); what a profile leaves out has the section's default."""

BUNDLE_DIRS = {
    None: Path("artifacts") / "brains",
    "hrm-hf": Path("training_data") / "actv1",
    "train-advanced": Path("output_advanced"),
}
"""The folder of bundles where --bundle-dir is not given, by profile."""


def profile_leaves(name: str) -> dict[str, Any]:
    """The defaults of a profile; empty without one, and for an unknown name, which validation reports."""
    return dict(PROFILES[name]) if name in PROFILES else {}

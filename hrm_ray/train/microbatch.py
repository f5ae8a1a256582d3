"""Turns the columns of samples that the model reads into tensors on a device."""

from __future__ import annotations

import torch

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import Batch
from hrm_ray.types import Columns


def wanted_columns(config: ModelConfig) -> frozenset[str]:
    """Names of the columns that this architecture reads."""
    if config.task == "puzzle":
        return frozenset({"inputs", "labels", "puzzle_identifiers", "active", "min_steps"})
    names = {"inputs", "labels", "active", "documents"}
    if config.pos_encodings == "learned":
        names.add("positions")
    if config.lm_mask == "prefix":
        names.add("prompt")
    return frozenset(names)


def to_batch(columns: Columns, wanted: frozenset[str], device: torch.device) -> Batch:
    """The wanted columns as tensors."""
    # Without `documents`, where every row is a single document, attention needs no mask: faster, with equal results.
    return {
        name: torch.from_numpy(values).to(device, non_blocking=True)
        for name, values in columns.items()
        if name in wanted and not (name == "documents" and not values.any())
    }

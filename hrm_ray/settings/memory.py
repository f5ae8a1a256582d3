"""Settings of memory and precision: what is kept, recomputed, narrowed or moved.

One job: the leaves of section `memory`. What they do is in `hrm_ray.model.transforms` and `hrm_ray.train`.
"""

from __future__ import annotations

from hrm_ray.settings.base import Section


class MemorySettings(Section):
    """How memory is traded for time and precision."""

    gradient_checkpointing: bool = True
    """Keep each block's input only and compute its inside again in the backward pass; same gradients."""

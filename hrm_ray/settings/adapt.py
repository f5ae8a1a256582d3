"""Settings of adapters: small trained layers beside frozen weights (PEFT)."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import field_validator

from hrm_ray.settings.base import Section, option, refusal, switch_aliases
from hrm_ray.settings.needs import ADAPTERS, MATRIX_ADAPTERS

PeftMethod: TypeAlias = Literal["lora", "adalora", "ia3", "loha", "lokr"]

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*ATTENTION_PROJECTIONS, *FFN_PROJECTIONS)
"""Names of a block's linear layers, which can have adapters."""


class AdaptSettings(Section):
    """Adapters that are trained instead of the weights."""

    use_peft: bool = option(False, "fixed", aliases=switch_aliases("--use-lora", "--lora", "--peft"))
    """Freeze the weights except the heads, and train adapters."""
    peft_method: PeftMethod = option("lora", "fixed", needs=(ADAPTERS,))
    """Adapter method: low-rank matrices (lora), the same with ranks allocated during training (adalora), learned
    scaling of activations (ia3), Hadamard (loha) or Kronecker products (lokr)."""
    lora_r: int = option(16, "fixed", ge=1, needs=(ADAPTERS, MATRIX_ADAPTERS), aliases={"--lora-rank": None})
    """Rank of the adapters; for adalora the mean final rank (the initial rank is 1.5 times as large)."""
    lora_alpha: int = option(32, "fixed", ge=1, needs=(ADAPTERS, MATRIX_ADAPTERS))
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    lora_dropout: float = option(0.05, "free", ge=0, lt=1, needs=(ADAPTERS, MATRIX_ADAPTERS))
    """Dropout on the adapters' inputs (for loha and lokr: on their ranks)."""
    lora_target_modules: str = option("q_proj,v_proj", "fixed", needs=(ADAPTERS,))
    """Layers that get an adapter, separated by commas."""

    @field_validator("lora_target_modules")
    @classmethod
    def _known_layers(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        unknown = [name for name in names if name not in PROJECTIONS]
        if unknown:
            shown = ", ".join(repr(name) for name in unknown)
            raise refusal(f"{shown} is no layer of the model", f"The layers are {', '.join(PROJECTIONS)}")
        if len(set(names)) != len(names):
            raise refusal("names a layer twice", "Name each layer once")
        return ",".join(names)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of `lora_target_modules`."""
        return tuple(self.lora_target_modules.split(","))

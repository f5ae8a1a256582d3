"""Settings of adapters: small trained parts beside frozen weights (PEFT).

One job: the leaves of section `adapt`. What they do is in `hrm_ray.model.transforms.peft`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, field_validator

from hrm_ray.settings.base import Section, refusal

PeftMethod: TypeAlias = Literal["lora", "adalora", "ia3", "loha", "lokr"]

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*ATTENTION_PROJECTIONS, *FFN_PROJECTIONS)
"""Names of a block's linear layers, which adapters can be laid beside."""


class AdaptSettings(Section):
    """Which adapters are trained in place of the weights."""

    use_peft: bool = False
    """Freeze the weights, heads apart, and train adapters beside them."""
    peft_method: PeftMethod = "lora"
    """Kind of adapter: products of two thin matrices (lora), the same with ranks shared out in training (adalora),
    factors for outputs and inputs (ia3), Hadamard (loha) or Kronecker products (lokr)."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapters; of adalora the mean rank at the end, which begins half as large again."""
    lora_alpha: int = Field(default=32, ge=1)
    """An adapter's output is multiplied by this over its rank."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs (loha and lokr: of its ranks) that dropout sets to 0 in training."""
    lora_target_modules: str = "q_proj,v_proj"
    """Layers that get an adapter, with commas between them."""

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

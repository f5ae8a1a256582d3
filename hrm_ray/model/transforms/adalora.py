"""AdaLoRA's rank schedule: adapters start with more ranks than they end with, and keep the most important ones.

Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning". The allocation is peft's;
here are its schedule, its state for checkpoints, and the loss that keeps the factors orthogonal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrm_ray.model.objective import Regulariser

if TYPE_CHECKING:
    from peft import PeftModel

_PATTERN, _UPDATES, _TOTAL_STEPS = "rank_pattern", "updates", "total_steps"


@dataclass(frozen=True)
class RankPlan:
    """When ranks are removed: none for `warmup_steps`, then some every `interval_steps`, and none in the last
    `final_steps` of `total_steps`."""

    first_rank: int
    last_rank: int
    total_steps: int
    warmup_steps: int
    final_steps: int
    interval_steps: int

    @classmethod
    def over(cls, total_steps: int, rank: int) -> RankPlan:
        """Warm-up for a tenth of the steps, the final phase for a fifth; the first rank is 1.5 times the mean rank at
        the end (the ratio of the paper's experiments)."""
        steps = max(total_steps, 1)
        return cls(
            first_rank=-(-3 * rank // 2),
            last_rank=rank,
            total_steps=steps,
            warmup_steps=steps // 10,
            final_steps=steps // 5,
            interval_steps=max(1, steps // 100),
        )

    def for_peft(self) -> dict[str, Any]:
        """The plan under AdaLoraConfig's names."""
        return {
            "init_r": self.first_rank,
            "target_r": self.last_rank,
            "total_step": self.total_steps,
            "tinit": self.warmup_steps,
            "tfinal": self.final_steps,
            "deltaT": self.interval_steps,
        }


class RankSchedule:
    """peft's rank allocator and the number of weight updates so far."""

    def __init__(self, wrapped: PeftModel, plan: RankPlan) -> None:
        self.tuner: Any = wrapped.base_model
        self.plan = plan
        self.updates = 0

    def after_update(self) -> None:
        """Read the gradients of a weight update, before they are cleared, and mask ranks as planned."""
        self.updates += 1
        if self.updates == self.plan.total_steps - self.plan.final_steps and not self.tuner.rankallocator.ipt:
            # A schedule of one step removes ranks at its first update, before peft has rated any.
            self.tuner.rankallocator.update_ipt(self.tuner.model)
        self.tuner.update_and_allocate(self.updates)

    @property
    def settled(self) -> bool:
        """Whether masked ranks are removed for good and zero in the weights. A moving average may still hold them."""
        if self.updates < self.plan.total_steps - self.plan.final_steps:
            return False
        kept = {name.replace(f".{self._adapter}", ""): mask for name, mask in self._config.rank_pattern.items()}
        return all(
            not bool(value.detach().view(-1)[~torch.tensor(kept[f"{path}.lora_E"], device=value.device)].any())
            for path, layer in self._layers()
            for value in layer.lora_E.values()
        )

    def disorder(self) -> Tensor:
        """Mean over the factors of |A A^T - 1| and |B^T B - 1| (Frobenius), float32."""
        distances = []
        for name, factor in self._factors():
            wide = factor.float()
            with torch.autocast(wide.device.type, enabled=False):
                products = wide @ wide.T if name == "lora_A" else wide.T @ wide
            distances.append(torch.linalg.matrix_norm(products - torch.eye(len(products), device=products.device)))
        return torch.stack(distances).mean()

    def regulariser(self) -> Regulariser:
        """The loss that keeps the factors orthogonal, so that their ranks can be compared."""
        return Regulariser(
            "adapter_disorder", self._config.orth_reg_weight, self.disorder, lambda: {"adapter_rank": self.mean_rank()}
        )

    def mean_rank(self) -> Tensor:
        """The mean of the layers' current ranks."""
        pattern = self._config.rank_pattern
        if not pattern:
            return torch.tensor(float(self.plan.first_rank))
        return torch.tensor(sum(sum(mask) for mask in pattern.values()) / len(pattern))

    def state(self) -> dict[str, Tensor]:
        """The state that the next update depends on, as tensors by name."""
        tensors = {
            f"{average}|{name}": tensor for average, kept in self._averages().items() for name, tensor in kept.items()
        }
        pattern = json.dumps(self._config.rank_pattern).encode()
        return tensors | {
            _UPDATES: torch.tensor(self.updates, dtype=torch.int64),
            _TOTAL_STEPS: torch.tensor(self.plan.total_steps, dtype=torch.int64),
            _PATTERN: torch.frombuffer(bytearray(pattern), dtype=torch.uint8),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, its plan included: removed ranks do not come back in a longer run."""
        self.tuner.rankallocator.reset_ipt()
        device, averages = next(self.tuner.model.parameters()).device, self._averages()
        for full_name, tensor in state.items():
            average, separator, name = full_name.partition("|")
            if separator:
                averages[average][name] = tensor.to(device)
        self.updates = int(state[_UPDATES])
        if _TOTAL_STEPS in state:  # missing in checkpoints of older versions
            self.plan = RankPlan.over(int(state[_TOTAL_STEPS]), self.plan.last_rank)
            for name, value in self.plan.for_peft().items():
                setattr(self._config, name, value)
        self._config.rank_pattern = json.loads(bytes(state[_PATTERN].tolist()))

    def _averages(self) -> dict[str, dict[str, Tensor]]:
        """The allocator's state by adapter tensor: its last importance, the mean importance and its variation."""
        allocator = self.tuner.rankallocator
        return {"ipt": allocator.ipt, "exp_avg_ipt": allocator.exp_avg_ipt, "exp_avg_unc": allocator.exp_avg_unc}

    @property
    def _adapter(self) -> str:
        name: str = self.tuner.trainable_adapter_name
        return name

    @property
    def _config(self) -> Any:
        return self.tuner.peft_config[self._adapter]

    def _layers(self) -> list[tuple[str, Any]]:
        from peft.tuners.adalora import AdaLoraLayer

        modules: dict[str, nn.Module] = dict(self.tuner.model.named_modules())
        return [(path, module) for path, module in modules.items() if isinstance(module, AdaLoraLayer)]

    def _factors(self) -> list[tuple[str, Tensor]]:
        layers = [layer for _, layer in self._layers()]
        rows = [("lora_A", factor) for layer in layers for factor in layer.lora_A.values()]
        return rows + [("lora_B", factor) for layer in layers for factor in layer.lora_B.values()]

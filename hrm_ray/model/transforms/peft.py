"""Adapters on frozen weights, through the peft library: adding them, merging them, and exporting them in peft's format.

AdaLoRA's rank schedule is in `adalora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrm_ray.model.dropout import Draws, dropout, key_of
from hrm_ray.model.layers import Block, Context
from hrm_ray.model.routing import Site
from hrm_ray.model.transforms.adalora import RankPlan, RankSchedule
from hrm_ray.model.transforms.quantise import plain_weight
from hrm_ray.settings.adapt import AdaptSettings

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""peft's name for a model's only adapter."""
HEADS = ("lm_head", "q_head")
"""Modules that are trained in full besides the adapters."""
_PREFIX = "base_model.model."
"""peft's prefix of the names of a model's tensors in an adapter file."""


class Adapters:
    """The adapters of one model, which are modules inside it; `wrapped` is peft's wrapper around the model.

    `ranks` is AdaLoRA's schedule, None for other methods.
    """

    def __init__(self, wrapped: PeftModel, ranks: RankSchedule | None) -> None:
        self.wrapped = wrapped
        self.ranks = ranks
        self._key = 0
        for block in self.model.modules():
            if isinstance(block, Block):
                self._draw_by_place(block)

    def draw_from(self, key: int) -> None:
        """What whole adapters, whose rows are no rows of the batch, draw from until the next call."""
        self._key = key

    def _draw_by_place(self, block: Block) -> None:
        """Let the adapters of `block` draw the same numbers for a row wherever and however often it is computed."""
        dropouts = _replace_dropouts(block)
        # Adapters of products (loha, lokr) drop whole rows of their weight, by PyTorch's generator.
        whole = any(any(rates.values()) for rates in _rank_dropouts(block))
        if not dropouts and not whole:
            return

        def place(_: nn.Module, args: tuple[Any, ...]) -> None:
            context: Context = args[1]
            site = (context.update, args[2])
            for each in dropouts:
                each.place = None if context.draws is None else (context.draws, site)
            if whole and context.draws is not None:
                torch.manual_seed(key_of(self._key, *site, context.draws.ahead))

        block.register_forward_pre_hook(place)

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.wrapped.get_base_model()
        return model

    def merged_weights(self) -> dict[str, Tensor]:
        """The model's tensors under their plain names with adapters merged into them; a quantised base is dequantised.
        Sums are taken in float32 and stored in the heads' type."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        dtype = next(p.dtype for name, p in self.model.named_parameters() if name.startswith(HEADS))
        merged: dict[str, Tensor] = {}
        with _evaluating(self.model), torch.no_grad():
            for path, module in self.model.named_modules():
                if path.startswith(tuple(f"{done}." for done in merged)):
                    continue
                weight = plain_weight(module)
                if isinstance(module, BaseTunerLayer):
                    weight = _with_adapter(module)
                if weight is not None:
                    merged[path] = weight.to(dtype)
            kept = {
                name: tensor
                for name, tensor in self.model.state_dict().items()
                if not name.startswith(tuple(f"{path}." for path in merged))
            }
        return kept | {f"{path}.weight": weight for path, weight in merged.items()}

    def in_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(content of adapter_config.json, tensors of adapter_model.safetensors) as peft's own loader reads them.

        The heads are included as modules that replace those of the base. Ranks that AdaLoRA has removed for good are
        left out.
        """
        from peft import get_peft_model_state_dict

        config: Any = self.wrapped.peft_config[ADAPTER]
        pattern = config.rank_pattern if self.ranks is not None else None
        if self.ranks is not None and not self.ranks.settled:
            # Until the last phase a masked rank may come back, and its weights are not zero.
            config.rank_pattern = None
        tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(self.wrapped).items()}
        described = deepcopy(config)
        if self.ranks is not None:
            # peft shortens the names in the pattern while it collects the tensors.
            config.rank_pattern = pattern
        described.inference_mode = True
        described.modules_to_save = [head for head in HEADS if head in dict(self.model.named_children())]
        for name, parameter in self.model.named_parameters():
            if name.startswith(HEADS):
                tensors[_PREFIX + name] = parameter.detach()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in described.to_dict().items()}
        return plain, tensors


class _AdapterDropout(nn.Module):
    """Dropout of the input of one adapter. peft calls it with the values alone; `place` is set by the block's hook."""

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate = rate
        self.number = number
        self.place: tuple[Draws, Site] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.place is None:
            raise ValueError("dropout in training draws from the batch's keys, and this batch has none")
        draws, site = self.place
        return dropout(x, draws.keys(site, self.number, x.shape[-1]), self.rate)


def _replace_dropouts(block: Block) -> list[_AdapterDropout]:
    """Put a dropout of ours in the place of each of peft's, and return them."""
    from peft.tuners.lora import LoraLayer

    replaced: list[_AdapterDropout] = []
    for layer in block.modules():
        # AdaLoRA's layers are LoraLayers too.
        theirs = layer.lora_dropout[ADAPTER] if isinstance(layer, LoraLayer) else None
        if isinstance(layer, LoraLayer) and isinstance(theirs, nn.Dropout):
            # 0 and 1 are the block's own.
            replaced.append(_AdapterDropout(theirs.p, 2 + len(replaced)))
            layer.lora_dropout[ADAPTER] = replaced[-1]
    return replaced


def _rank_dropouts(block: Block) -> Iterator[dict[str, float]]:
    """The rates by adapter of the layers in `block` whose adapters are products."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for layer in block.modules():
        if isinstance(layer, LycorisLayer):
            yield layer.rank_dropout


def apply_peft(model: nn.Module, chosen: AdaptSettings, *, seed: int, total_steps: int) -> Adapters:
    """Add adapters to `model` in place and freeze everything else except the heads and a puzzle table.

    Adapters are float32 whatever the weights' type. Their starting values depend on `seed` alone. `total_steps` is the
    length of AdaLoRA's schedule.
    """
    from peft import get_peft_model

    plan = RankPlan.over(total_steps, chosen.lora_r)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, _peft_config(chosen, plan))
    adapter_mark = wrapped.base_model.prefix
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter_mark in name or name.startswith(HEADS))
    ranks = RankSchedule(wrapped, plan) if chosen.peft_method == "adalora" else None
    return Adapters(wrapped, ranks)


def _with_adapter(layer: Any) -> Tensor:
    """The weight of a layer with its adapter merged, float32."""
    from peft.tuners.ia3 import IA3Layer

    weight: Tensor = layer.get_base_layer().weight.float()
    if isinstance(layer, IA3Layer):
        return weight * layer.ia3_l[ADAPTER]
    return weight + layer.get_delta_weight(ADAPTER)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside this context, so that there is no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _peft_config(chosen: AdaptSettings, plan: RankPlan) -> Any:
    """peft's configuration of the chosen method."""
    import peft

    targets = list(chosen.targets)
    lora: dict[str, Any] = {"lora_alpha": chosen.lora_alpha, "lora_dropout": chosen.lora_dropout}
    product: dict[str, Any] = {"r": chosen.lora_r, "alpha": chosen.lora_alpha, "rank_dropout": chosen.lora_dropout}
    match chosen.peft_method:
        case "lora":
            return peft.LoraConfig(r=chosen.lora_r, target_modules=targets, **lora)
        case "adalora":
            return peft.AdaLoraConfig(target_modules=targets, **lora, **plan.for_peft())
        case "ia3":
            # IA3 scales the outputs, and of the FFN's last layer the inputs (Liu et al. 2022, arXiv 2205.05638).
            inputs = [name for name in targets if name == "down_proj"]
            return peft.IA3Config(target_modules=targets, feedforward_modules=inputs)
        case "loha":
            return peft.LoHaConfig(target_modules=targets, **product)
        case "lokr":
            return peft.LoKrConfig(target_modules=targets, **product)
    raise ValueError(f"no adapters for --peft-method {chosen.peft_method}")

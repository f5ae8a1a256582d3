"""Builds the network and the objective of a configuration."""

from __future__ import annotations

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.chunked import ChunkedTextObjective, ChunkedTransformerObjective, Chunking
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.model.router_losses import NO_ROUTER_LOSSES, RouterLosses
from hrm_ray.model.text_objective import TextObjective, TransformerObjective
from hrm_ray.model.transformer import Transformer


def build_model(config: ModelConfig) -> ActV1 | Transformer:
    """The network, with uninitialised weights."""
    return Transformer(config) if config.arch == "transformer" else ActV1(config)


def build_objective(
    model: ActV1 | Transformer,
    loss: LossKind,
    *,
    supervision: str,
    halt_margin: float,
    router_losses: RouterLosses = NO_ROUTER_LOSSES,
    chunking: Chunking | None = None,
) -> AnyObjective:
    """The objective that trains `model` on its task, text in chunks where `chunking` says how."""
    if isinstance(model, Transformer):
        if chunking is not None:
            return ChunkedTransformerObjective(model, loss, chunking, router_losses)
        return TransformerObjective(model, loss, router_losses)
    if model.config.task == "puzzle":
        return PuzzleObjective(model, loss, rollout=supervision == "rollout", router_losses=router_losses)
    if chunking is not None:
        return ChunkedTextObjective(model, loss, halt_margin, chunking, router_losses)
    return TextObjective(model, loss, halt_margin, router_losses)

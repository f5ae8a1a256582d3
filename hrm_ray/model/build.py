"""Which network and which objective a configuration asks for.

One job: the two tables. Weights and settings are decided elsewhere.
"""

from __future__ import annotations

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.model.text_objective import TextObjective, TransformerObjective
from hrm_ray.model.transformer import Transformer


def build_model(config: ModelConfig) -> ActV1 | Transformer:
    """The network, with uninitialised weights."""
    return Transformer(config) if config.arch == "transformer" else ActV1(config)


def build_objective(
    model: ActV1 | Transformer, loss: LossKind, *, supervision: str, halt_margin: float
) -> AnyObjective:
    """The objective that trains `model` on its task."""
    if isinstance(model, Transformer):
        return TransformerObjective(model, loss)
    if model.config.task == "puzzle":
        return PuzzleObjective(model, loss, rollout=supervision == "rollout")
    return TextObjective(model, loss, halt_margin)

"""Weights of the original HRM, renamed and unfused into this project's layout.

Source of the layout: sapientinc/HRM (ACTV1_SPEC, section 1); published checkpoints have a leading `_orig_mod.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hrm_ray.errors import DataError, Fault

_PREFIXES = ("_orig_mod.", "model.", "inner.")
_PLAIN = {
    "embed_tokens.embedding_weight": "embedding.embed_tokens.weight",
    "embed_pos.embedding_weight": "embedding.embed_pos.weight",
    "puzzle_emb.weights": "embedding.puzzle_emb.weights",
    "lm_head.weight": "lm_head.weight",
    "q_head.weight": "q_head.weight",
    "q_head.bias": "q_head.bias",
    "H_init": "H_init",
    "L_init": "L_init",
}
_LAYER = re.compile(r"([HL]_level\.layers\.\d+)\.(self_attn|mlp)\.(qkv_proj|o_proj|gate_up_proj|down_proj)\.weight")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def bare_name(name: str) -> str:
    """`name` without the wrappers' prefixes that a reference checkpoint may carry."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def looks_like_reference(names: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the reference's fused projections."""
    return any(".qkv_proj." in name for name in names)


def split_fused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One reference tensor, or its gradient, as this project's tensors: renamed, and a fused one split by output rows.

    Raises DataError for a name that the reference does not have, and for a number of rows that cannot be split.
    """
    bare = bare_name(name)
    if bare in _PLAIN:
        return {_PLAIN[bare]: tensor}
    match = _LAYER.fullmatch(bare)
    if match is None:
        raise DataError(
            Fault(
                f"tensor {name!r}",
                "the original HRM has no such tensor",
                "Give an HRM (ACTv1) checkpoint or a bundle of this project",
            )
        )
    layer, part, projection = match.groups()
    targets = _FUSED.get(projection, (projection,))
    if tensor.dim() == 0 or tensor.shape[0] % len(targets):
        raise DataError(
            Fault(
                f"tensor {name!r} {list(tensor.shape)}",
                f"its rows cannot be split evenly into {' and '.join(targets)}",
                "Give a whole HRM (ACTv1) checkpoint",
            )
        )
    return {
        f"{layer}.{part}.{target}.weight": piece
        for target, piece in zip(targets, torch.chunk(tensor, len(targets), dim=0), strict=True)
    }


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole reference state dict in this project's names."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        converted |= split_fused(name, tensor)
    return converted

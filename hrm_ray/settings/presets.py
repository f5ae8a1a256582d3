"""Model presets, and the layers that `num_layers` sets. What the user gave overrides them (see `load`)."""

from __future__ import annotations

from typing import Any


def _dense(hidden_size: int, num_heads: int, layers_each: int) -> dict[str, Any]:
    """A model with `layers_each` layers in H and in L; without experts, since the preset's name is the whole size."""
    return {
        "model.hidden_size": hidden_size,
        "model.num_heads": num_heads,
        "model.h_layers": layers_each,
        "model.l_layers": layers_each,
        "model.expansion": 4.0,
        "model.use_moe": False,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "nano": _dense(128, 4, 2),
    "tiny": _dense(256, 4, 4),
    "small": _dense(512, 8, 5),
    "medium": _dense(768, 12, 9),
    "large": _dense(1280, 20, 9),
    "xlarge": _dense(2048, 32, 9),
}
"""Sizes by name: about 5, 15, 50, 150, 400 and 1000 million parameters, dense, at the default vocabulary (FEATURES.md,
M11). From small on with the widths, the head size of 64 and the inner width of the GPT-2 and Llama families; depth is
shared evenly by H and L, and less than theirs for the same number of parameters, since each level runs several times.
A preset is dense unless experts are asked for.
"""


def preset_leaves(name: str) -> dict[str, Any]:
    """The leaves that a preset fills; empty for an unknown name, which validation reports."""
    return dict(PRESETS[name]) if name in PRESETS else {}


def layer_leaves(num_layers: int) -> dict[str, Any]:
    """An even number of layers, half for H and half for L."""
    return {"model.h_layers": num_layers // 2, "model.l_layers": num_layers // 2}

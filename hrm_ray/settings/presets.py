"""Named sizes, and the settings that stand in for others.

One job: say which leaves a preset or `num_layers` fills, as literal tables. `load` lays them under what the user said.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "model.hidden_size": 128,
        "model.num_heads": 4,
        "model.h_layers": 2,
        "model.l_layers": 2,
        "model.expansion": 4.0,
    },
    "tiny": {
        "model.hidden_size": 256,
        "model.num_heads": 4,
        "model.h_layers": 4,
        "model.l_layers": 4,
        "model.expansion": 4.0,
    },
    "small": {
        "model.hidden_size": 512,
        "model.num_heads": 8,
        "model.h_layers": 5,
        "model.l_layers": 5,
        "model.expansion": 4.0,
    },
    "medium": {
        "model.hidden_size": 768,
        "model.num_heads": 12,
        "model.h_layers": 9,
        "model.l_layers": 9,
        "model.expansion": 4.0,
    },
    "large": {
        "model.hidden_size": 1280,
        "model.num_heads": 20,
        "model.h_layers": 9,
        "model.l_layers": 9,
        "model.expansion": 4.0,
    },
    "xlarge": {
        "model.hidden_size": 2048,
        "model.num_heads": 32,
        "model.h_layers": 9,
        "model.l_layers": 9,
        "model.expansion": 4.0,
    },
}
"""Sizes by name: about 5, 15, 50, 150, 400 and 1000 million parameters, dense, at the default vocabulary (FEATURES.md,
M11). From small on with the widths, the head size of 64 and the inner width of the GPT-2 and Llama families; depth is
shared evenly by H and L, and less than theirs for the same number of parameters, since each level runs several times.
"""

IN_PLACE_OF: dict[str, tuple[str, ...]] = {
    "model.num_layers": ("model.h_layers", "model.l_layers"),
    "model.h_layers": ("model.num_layers",),
    "model.l_layers": ("model.num_layers",),
    "model.expansion": ("model.d_ff",),
    "data.eval_file": ("data.val_split",),
    "data.val_split": ("data.eval_file",),
}
"""A leaf that the user sets takes the place of these leaves of a resumed run, which therefore fall away."""

FALLS_AWAY: dict[str, tuple[str, ...]] = {"cluster.launcher": ("cluster.ddp",)}
"""Leaves of a resumed run that another choice of the user's makes void; no rivals where both are said at once."""

SAID_EACH_TIME: frozenset[str] = frozenset({"run.resume", "run.resume_from"})
"""Leaves about one invocation only: never taken from a resumed run."""


def preset_leaves(name: str) -> dict[str, Any]:
    """The leaves that a preset fills; none for a name that is no preset (that is reported as a wrong value).

    A preset is a dense model: its name says how large all of it is.
    """
    return {**PRESETS[name], "model.use_moe": False} if name in PRESETS else {}


def layer_leaves(num_layers: int) -> dict[str, Any]:
    """An even number of layers, half for H and half for L."""
    return {"model.h_layers": num_layers // 2, "model.l_layers": num_layers // 2}

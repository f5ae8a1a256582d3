"""What options take from a bundle that they name: its architecture, its weights, or one of its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.model.config import MODEL_TYPE
from hrm_ray.rundir import RunDir, read_json

_SAME_NAME = (
    *("hidden_size", "num_heads", "h_layers", "l_layers", "h_cycles", "l_cycles", "halt_max_steps", "arch"),
    *("pos_encodings", "rope_theta", "rms_norm_eps", "rmsnorm", "activation", "swiglu", "puzzle_emb_ndim"),
)
"""Parts of an architecture that are options of the same name."""
_CHECKPOINT = re.compile(r"(?:checkpoint[-_])?(?:step_)?(\d+)")
"""Names of checkpoints in older trainers, such as checkpoint_step_1000."""


def architecture_leaves(bundle: Path) -> dict[str, Any]:
    """The options of a bundle's architecture, by dotted key; none where the path is not a bundle (a file of weights).

    What cannot be read is left to the check of the start weights, which says why.
    """
    config = _config(bundle)
    if config is None:
        return {}
    leaves = {f"model.{name}": config[name] for name in _SAME_NAME if name in config}
    if "intermediate_size" in config:
        leaves["model.d_ff"] = config["intermediate_size"]
    leaves["model.use_moe"] = bool(config.get("num_experts"))
    if leaves["model.use_moe"]:
        for name in ("num_experts", "num_experts_per_tok", "moe_capacity_factor"):
            if name in config:
                leaves[f"model.{name}"] = config[name]
    if config.get("pos_encodings") == "learned" and config.get("task") == "lm" and "seq_len" in config:
        # The table of positions has this length.
        leaves["data.max_seq_len"] = config["seq_len"]
    if leaves.get("model.arch") == "transformer":
        # It has no cycles, and their options no effect.
        for name in ("h_cycles", "l_cycles", "halt_max_steps"):
            leaves.pop(f"model.{name}", None)
    return leaves


def with_start_weights(options: Mapping[str, str | bool], *, resumes: bool) -> Mapping[str, str | bool]:
    """The command's options; where --model names a bundle, its weights are the start weights of a new run, too.

    --tokenizer-path, which is the same option, means the tokenizer alone.
    """
    model = options.get("--model")
    if not isinstance(model, str) or "--student-init" in options or _config(Path(model)) is None:
        return options
    if resumes or not RunDir(Path(model)).weights.is_file():
        return options
    return {**options, "--student-init": model}


def find_checkpoint(named: Path) -> Path:
    """The folder of a checkpoint: `named` itself, or the one that an older trainer would have called so.

    X/checkpoint_step_N is X/checkpoints/step_N, or that of the only bundle in X that has such a checkpoint. Gives
    `named` where there is none. Raises SettingsError where several bundles have one.
    """
    match = _CHECKPOINT.fullmatch(named.name)
    if named.exists() or match is None or not named.parent.is_dir():
        return named
    inside = Path("checkpoints") / f"step_{int(match[1])}"
    own = named.parent / inside
    if own.is_dir():
        return own
    found = sorted(folder / inside for folder in named.parent.iterdir() if (folder / inside).is_dir())
    if len(found) > 1:
        reason = f"{len(found)} bundles have a checkpoint of this step: {found[0]}, {found[1]}, ..."
        raise SettingsError(Fault(f"--resume-from {named}", reason, "Name one of them"))
    return found[0] if found else named


def _config(bundle: Path) -> dict[str, Any] | None:
    """config.json of a bundle; None where the folder is no bundle."""
    path = RunDir(bundle).config
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except DataError:
        return None
    return config if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE else None

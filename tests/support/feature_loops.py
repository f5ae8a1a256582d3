"""Training loops on random rows for each feature, alone or as one of several ranks.

One job: build and run them. What their results must be is in tests/agreement/test_features.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.settings.adaptive_lr import read_adaptive_lr
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.world import World
from tests.support.fail_at import script
from tests.support.features import FEATURES, base_of, words_of
from tests.support.splits import SEQ_LEN, VOCABULARY, Rows

STEPS = 4
ROWS = 8
"""Rows of the effective batch, however many ranks share them."""


@dataclass
class ConsumedRange:
    """Mean loss of every step over all ranks, and this rank's weights at the end."""

    losses: list[float]
    weights: dict[str, Tensor]


def settings_of(name: str, ranks: int, folder: Path) -> RunSettings:
    """The settings that the feature's words give a small model."""
    words = [str(folder / "adaptive.yaml") if word == "ADAPTIVE" else word for word in words_of((name,))]
    accumulation = 2 if name == "accumulation" else 1
    words += ["--hidden-size", "16", "--num-heads", "2", "--num-layers", "2", "--d-ff", "24", "--lr", "1e-3"]
    words += ["--batch-size", str(ROWS // ranks // accumulation), "--steps", "20", "--grad-clip", "0"]
    words += ["--max-seq-len", str(SEQ_LEN)]
    if FEATURES[name].starts:
        base = "_".join(base_of((name,))) or "dense"
        words += ["--student-init", str(folder / f"{base}.safetensors")]
    said: dict[str, str | bool] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            follows = place + 1 < len(words) and not words[place + 1].startswith("--")
            said[word] = words[place + 1] if follows else True
    said = {option: value for option, value in said.items() if option != "--vocab-size"}
    return resolve_task(load_settings(said), "lm")


def config_of(settings: RunSettings) -> ModelConfig:
    return model_config(settings, VOCABULARY, seq_len=SEQ_LEN)


def write_bases(folder: Path) -> None:
    """Weights that frozen bases come from, and the settings of the adaptive learning rate."""
    (folder / "adaptive.yaml").write_text("window_steps: 2\n")
    for base, name in (("dense", "checkpointing"), ("moe", "moe")):
        model = build_model(config_of(settings_of(name, 1, folder)))
        model.initialise(5)
        save_tensors(model.state_dict(), folder / f"{base}.safetensors")


def run_feature(name: str, ranks: int, folder: Path, device: str = "cpu") -> ConsumedRange:
    """Train STEPS updates as this rank's part of the group."""
    settings = settings_of(name, ranks, folder)
    world = World.here(device, 1)
    assert world.size == ranks
    path = settings.optimizer.adaptive_lr_config
    loop = assemble(
        settings, config_of(settings), Rows("lm"), world, 20,
        adaptive_lr=None if path is None else read_adaptive_lr(path),
    )  # fmt: skip
    if loop.parts.scaler is not None:
        # So low that no gradient overflows: ranks scale by their number too, and would skip other steps than one alone.
        loop.parts.scaler.scale = 1024.0
    failure = FEATURES[name].failure
    if failure is not None:
        script(loop, [failure])
    losses = []
    for _ in range(STEPS):
        report = loop.step()
        assert report is not None and report.applied
        losses.append(loop.flush_metrics()["objective"])
    weights = {key: tensor.cpu().clone() for key, tensor in loop.parts.objective.model.state_dict().items()}
    return ConsumedRange(losses, weights)


def spawned_rank(rank: int, ranks: int, folder: str) -> None:
    """A gloo process: all features one after the other."""
    os.environ["USE_LIBUV"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.save({name: run_feature(name, ranks, Path(folder)) for name in FEATURES}, Path(folder) / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort the interpreter's own tear-down now and then, when all results are long written.
    os._exit(0)

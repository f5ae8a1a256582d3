"""The tensors that trainers share: what an anchor is made of, how a trainer lays one in place, and what it reports.

An anchor holds, in float32 and by the model's names, the trained parameters and the puzzle table; where the run keeps a
moving average (--ema), that too, as `average|NAME`: it is merged as the weights are. What is not trained (starting
states, the weights below adapters) is the same everywhere and stands in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import fill_module, read_tensors, save_tensors
from hrm_ray.errors import DataError, Fault
from hrm_ray.merging import TOUCHED
from hrm_ray.model.grouped_product import SortedChoices
from hrm_ray.model.moe import Experts
from hrm_ray.rundir import file_sha256
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.strategies.single import SingleStrategy

AVERAGE = "average|"
"""Prefix of the moving average's tensors."""


def shared_tensors(loop: TrainingLoop) -> dict[str, Tensor]:
    """The tensors of a loop on one device that anchors hold, by name: not copies, but what the loop trains."""
    strategy, model = loop.parts.strategy, loop.parts.objective.model
    if not isinstance(strategy, SingleStrategy) or strategy.world.size > 1:
        raise TypeError("a block trainer has a loop on one device")
    shared = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if loop.parts.sparse is not None:
        table = loop.parts.sparse.table.weights
        shared |= {name: buffer for name, buffer in model.named_buffers() if buffer is table}
    if strategy.average is not None:
        shared |= {f"{AVERAGE}{name}": tensor for name, tensor in strategy.average.average.items()}
    return shared


def anchor_tensors(loop: TrainingLoop) -> dict[str, Tensor]:
    """The anchor that a loop's weights are, in float32."""
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in shared_tensors(loop).items()}


def save_fixed_tensors(loop: TrainingLoop, path: Path) -> None:
    """Write the model's tensors that are not trained."""
    shared = shared_tensors(loop)
    whole = loop.parts.strategy.full_weights()
    save_tensors({name: tensor for name, tensor in whole.items() if name not in shared}, path)


def load_fixed_tensors(loop: TrainingLoop, path: Path) -> None:
    """Restore what `save_fixed_tensors` wrote. Raises DataError where it belongs to another architecture."""
    shared, whole = shared_tensors(loop), loop.parts.strategy.full_weights()
    trained = {name: tensor for name, tensor in whole.items() if name in shared}
    fill_module(loop.parts.objective.model, {**trained, **read_tensors(path)}, str(path))


class SharedWeights:
    """A loop's shared tensors and their `snap`: the weights that the open work began with, in the weights' own type."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._shared = shared_tensors(loop)
        self._snap = {name: tensor.clone() for name, tensor in self._shared.items()}

    @torch.no_grad()
    def lay(self, path: Path, sha256: str, *, keep_open_work: bool) -> None:
        """Lay an anchor in place: the weights become the anchor, plus (weights - snap) with `keep_open_work`, and the
        snap the anchor.

        Raises DataError where the file is missing or is not the one with that checksum; then nothing has changed.
        """
        check_file(path, sha256)
        with safe_open(path, framework="pt") as file:
            names = frozenset(file.keys())
            if names != self._shared.keys():
                differing = sorted(names ^ self._shared.keys())
                reason = f"an anchor of another model: {differing[0]} is in only one of them"
                raise DataError(Fault(str(path), reason, "Start the trainer from the run's own bundle"))
            for name, weight in self._shared.items():
                # Rounded to the weights' type, or the rounding would be taken for something learned.
                anchor = file.get_tensor(name).to(weight.device, weight.dtype)
                if keep_open_work:
                    weight.copy_(anchor.float() + (weight.float() - self._snap[name].float()))
                else:
                    weight.copy_(anchor)
                self._snap[name].copy_(anchor)

    @torch.no_grad()
    def take_snap(self) -> None:
        """The open work begins with the present weights."""
        for name, weight in self._shared.items():
            self._snap[name].copy_(weight)

    @torch.no_grad()
    def save_change(self, path: Path, tokens: Mapping[str, Tensor]) -> str:
        """Write weights - snap in float32, and beside experts how many `tokens` each was trained on; returns the file's
        sha256. Raises DiskError."""
        change = {name: weight.float() - self._snap[name].float() for name, weight in self._shared.items()}
        of_each = [*tokens.items()]
        of_each += [(f"{AVERAGE}{name}", count) for name, count in tokens.items()]
        # Copies: a safetensors file may not hold two tensors of the same memory.
        touched = {f"{name}{TOUCHED}": count.clone() for name, count in of_each if name in change}
        return _saved({**change, **touched}, path)

    def save_weights(self, path: Path) -> str:
        """Write the weights in float32; returns the file's sha256. Raises DiskError."""
        return _saved({name: weight.float() for name, weight in self._shared.items()}, path)


class ExpertTokens:
    """Counts the tokens that each expert is trained on, so that a merge weighs experts by them.

    A layer that is recomputed in the backward pass counts twice, in all trainers alike. Compiled layers do not count:
    then a merge goes by which experts have changed.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self._counts: dict[str, Tensor] = {}
        self._names: frozenset[str] = frozenset(shared_tensors(loop))
        if loop.parts.compiled is not None:
            return
        for name, module in loop.parts.objective.model.named_modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(partial(self._count, name))

    def _count(self, name: str, module: nn.Module, given: tuple[Tensor, SortedChoices, object]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        ends = given[1].ends
        counts = ends.diff(prepend=ends.new_zeros(1)).float()
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def by_tensor(self) -> dict[str, Tensor]:
        """The tokens [experts] of each trained stack of experts since the last `reset`."""
        return {
            tensor: counts
            for name, counts in self._counts.items()
            for tensor in self._names
            if tensor.startswith(f"{name}.") and tensor.endswith(".weight")
        }

    def reset(self) -> None:
        """Begin to count again."""
        self._counts = {}


def check_file(path: Path, sha256: str) -> None:
    """Raises DataError where a file is missing or has another content than that of `sha256`."""
    hint = "Resume the run with --resume: it goes on from the newest anchor that is whole"
    if not path.is_file():
        raise DataError(Fault(str(path), "the anchor is missing", hint))
    if file_sha256(path) != sha256:
        raise DataError(Fault(str(path), "the anchor is not what was written (sha256 differs)", hint))


def _saved(tensors: Mapping[str, Tensor], path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path)
    return file_sha256(path)

"""Tensors in safetensors files: written atomically, loaded strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm_ray.atomic_files import atomic_path, unwritable
from hrm_ray.errors import DataError, Fault

_SHOWN = 2
"""Differences of an architecture that a message names: names of tensors are long."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `tensors` to `path` atomically. Raises DiskError where that fails, for example on a full disk."""
    try:
        with atomic_path(path) as temporary:
            # safetensors makes files that only their owner may read; a bundle's files have the user's usual mode.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary)
            temporary.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise unwritable(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises DataError when it is missing or cut short."""
    with _whole(path):
        return load_file(path)


def read_rows(path: Path, first: int, beyond: int) -> dict[str, Tensor]:
    """Rows first..beyond-1 of each tensor of a safetensors file; the others are not read. Raises as `read_tensors`."""
    with _whole(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name)[first:beyond] for name in file.keys()}  # noqa: SIM118 - it is no dict


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Raises DataError where `path`, which is read inside, is missing or cut short."""
    if not path.is_file():
        raise DataError(Fault(str(path), "no such file", "Give a whole bundle or checkpoint"))
    try:
        yield
    except (SafetensorError, OSError) as error:
        hint = "Copy the file again from its source, or use another checkpoint"
        raise DataError(Fault(str(path), f"is not a complete safetensors file ({error})", hint)) from None


def fill_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load `tensors` into `module`; every name and shape must agree. Raises DataError that lists the differences."""
    check_fit(module, tensors, source)
    module.load_state_dict(dict(tensors))


def check_fit(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises DataError that lists the differences, unless `tensors` have exactly the names and shapes of `module`."""
    own = module.state_dict()
    wrong = [f"{n} is missing" for n in own.keys() - tensors.keys()]
    wrong += [f"{n} is not part of this architecture" for n in tensors.keys() - own.keys()]
    wrong += [
        f"{n} has shape {list(tensors[n].shape)}, the model {list(own[n].shape)}"
        for n in own.keys() & tensors.keys()
        if tensors[n].shape != own[n].shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
        hint = "Give weights of the same architecture, or set the model options to those of the weights"
        raise DataError(Fault(source, f"the weights belong to another architecture: {shown}", hint))

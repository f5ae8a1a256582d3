"""hrm_ray trains Hierarchical Reasoning Models (HRM, ACTv1) on Ray.

In a notebook or a program:

    import hrm_ray
    result = hrm_ray.train(dataset_file="corpus", steps=500)

`evaluate`, `generate` and `solve` use what was trained. Every expected error is an `hrm_ray.errors.HrmRayError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrm_ray.types import MetricSink, RunResult

__version__ = "0.1.0"

# Importing a sub-package sets its name here: now, so that it does not replace the function `train` later.
import_module("hrm_ray.train")


def train(*, config: str | Path | None = None, sink: MetricSink | None = None, **options: Any) -> RunResult:
    """Train a model, as `hrm-ray train` does with the same options.

    `options` are those of the command in Python's spelling: `dataset_file="corpus"`, `use_moe=False`, `lr=1e-3`; their
    values may also be text, as on the command line, and None leaves an option out. `config` is a YAML file of settings
    or the name of a recipe. Progress is printed in lines, unless a `sink` takes the records.

    Returns how the run ended: `reason`, `step`, `epoch`, `figures` (the last held-out ones) and `bundle`, the folder of
    the model. In the main thread an interrupt (Ctrl-C, or a notebook's stop button) saves and ends the run with
    the reason INTERRUPT; a second one, or one before the first step, raises KeyboardInterrupt. Other signals, and the
    process, are left to the program. Raises HrmRayError, and StopRequested for a stop file before the first step.
    """
    from hrm_ray.cli.python_call import train_with

    return train_with(config, sink, options)


def evaluate(
    bundle: str | Path,
    *,
    dataset_file: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Held-out figures of a bundle, its best/ or a checkpoint, by name, as `hrm-ray evaluate` prints them.

    Without `dataset_file` on the data that its run was evaluated on. Raises HrmRayError.
    """
    from hrm_ray.launch.devices import choose_device
    from hrm_ray.launch.evaluate import evaluate_bundle

    path = None if dataset_file is None else str(dataset_file)
    kind = choose_device(device)
    return evaluate_bundle(Path(bundle), dataset_file=path, split=split, limit=limit, device=kind).figures


def generate(
    bundle: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """How a trained language model continues `prompt`; temperature 0 is greedy. Raises HrmRayError."""
    from hrm_ray.cli.python_call import generated

    return generated(Path(bundle), prompt, max_new_tokens, (temperature, top_k, top_p), seed, device)


def solve(
    bundle: str | Path,
    puzzles: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    stop_by_q: bool = False,
    device: str = "auto",
) -> list[str | list[int]]:
    """The answers of a trained model to `puzzles`, each written with one symbol per cell (0 or . is an empty one), or
    to the first `limit` of a data set.

    An answer is written in the same way, or as numbers where the puzzles have no symbols. Raises HrmRayError.
    """
    from hrm_ray.cli.python_call import solved

    chosen = None if file is None else Path(file)
    return solved(Path(bundle), list(puzzles), chosen, split, limit, stop_by_q=stop_by_q, device=device)

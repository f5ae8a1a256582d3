"""The body of `hrm-ray evaluate`: a model's held-out figures, or a table of several models'."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_ray.launch.devices import choose_device
from hrm_ray.launch.evaluate import Evaluation, evaluate_bundle
from hrm_ray.tables import aligned


def run_evaluate(
    bundles: Sequence[Path],
    *,
    dataset_file: str | None,
    split: str | None,
    limit: int | None,
    device: str,
    as_json: bool,
) -> int:
    """Print the figures; returns the exit code."""
    kind = choose_device(device)
    found = []
    for bundle in bundles:
        evaluation = evaluate_bundle(bundle, dataset_file=dataset_file, split=split, limit=limit, device=kind)
        for note in evaluation.notes:
            print(f"warning: {note}", file=sys.stderr)
        if as_json:
            print(json.dumps(evaluation.plain()), flush=True)
        found.append(evaluation)
    if not as_json:
        print(_figures(found[0]) if len(found) == 1 else figures_table(found))
    return 0


def _figures(evaluation: Evaluation) -> str:
    step = "" if evaluation.step is None else f"step {evaluation.step}, "
    lines = [f"{evaluation.bundle}: {step}on {evaluation.data}"]
    width = max(map(len, evaluation.figures))
    return "\n".join([*lines, *(f"  {name:{width}}  {value:.6g}" for name, value in evaluation.figures.items())])


def figures_table(found: Sequence[Evaluation]) -> str:
    """One line a model. Figures that only some of the models have are left empty for the others."""
    names = list(dict.fromkeys(name for each in found for name in each.figures))
    rows = [["bundle", "step", *names]]
    for each in found:
        figures = [f"{each.figures[name]:.5g}" if name in each.figures else "" for name in names]
        rows.append([each.bundle, "" if each.step is None else str(each.step), *figures])
    return aligned(rows)

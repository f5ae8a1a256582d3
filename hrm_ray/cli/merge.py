"""The body of `hrm-ray merge`: it merges members into one, and compares all on held-out data where that is given."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_ray.cli.evaluate import figures_table
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.launch.devices import choose_device
from hrm_ray.launch.evaluate import Evaluation, evaluate_bundle
from hrm_ray.launch.merge_bundles import Merged, plan_merge
from hrm_ray.tables import aligned


def run_merge(
    members: Sequence[Path],
    out: Path,
    *,
    weights: str | None,
    base: Path | None,
    force: bool,
    overwrite: bool,
    dataset_file: str | None,
    split: str | None,
    limit: int | None,
    device: str,
    as_json: bool,
) -> int:
    """Merge, and print what was merged; returns the exit code."""
    numbers = _numbers(weights) if weights is not None else None
    if dataset_file is None and (split is not None or limit is not None):
        given = f"--split {split}" if split is not None else f"--limit {limit}"
        raise SettingsError(Fault(given, "no data set is named", "Give --dataset-file too"))
    kind = choose_device(device)

    def evaluated(paths: Sequence[Path]) -> list[Evaluation]:
        if dataset_file is None:
            return []
        found = [
            evaluate_bundle(path, dataset_file=dataset_file, split=split, limit=limit, device=kind) for path in paths
        ]
        for note in dict.fromkeys(note for one in found for note in one.notes):
            print(f"warning: {note}", file=sys.stderr)
        return found

    bundles = [path for path in members if path.is_dir()]
    if dataset_file is not None and not bundles:
        reason = "no member is a bundle, so nothing says how to evaluate them"
        raise SettingsError(Fault(f"--dataset-file {dataset_file}", reason, "Give bundles, or leave it out"))
    plan = plan_merge(members, out, weights=numbers, base=base, force=force, overwrite=overwrite)
    # Data that cannot be read is refused here, while nothing is made.
    before = evaluated(bundles)
    merged = plan.run()
    after = evaluated([out])
    for note in merged.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        figures = {"evaluations": [one.plain() for one in (*before, *after)]} if before else {}
        print(json.dumps(merged.plain() | figures))
    else:
        print(_report(merged))
        if before:
            print(figures_table([*before, *after]))
    worse = _worse(before, after)
    if worse is not None:
        print(f"warning: {worse}", file=sys.stderr)
    if not as_json and bundles:
        print(f"next: hrm-ray generate {shlex.quote(str(out))} --prompt ..., or hrm-ray solve")
    return 0


def _numbers(text: str) -> list[float]:
    """The value of --weights. Raises SettingsError where it is no list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        hint = "Give one number for each member, such as --weights 2,1,1"
        raise SettingsError(Fault(f"--weights {text}", "is not a list of numbers", hint)) from None


def _report(merged: Merged) -> str:
    """What was merged, with each member's share and distance from the origin."""
    rows = [["member", "share", f"distance from {merged.origin}"]]
    rows += [[one.path, f"{one.share:.4g}", f"{one.distance:.4g}"] for one in merged.members]
    lines = [f"{merged.out}: the mean of {len(merged.members)} members", aligned(rows)]
    if merged.lora_residual is not None:
        lines.append(
            f"adapters: averaging A and B apart leaves out {100 * merged.lora_residual:.3g} % of their product"
        )
    return "\n".join(lines)


def _worse(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> str | None:
    """A warning where a member has a lower held-out loss than the result."""
    losses = {one.bundle: one.figures["loss"] for one in before if "loss" in one.figures}
    if not losses or not after or "loss" not in after[0].figures:
        return None
    best, result = min(losses, key=lambda name: losses[name]), after[0].figures["loss"]
    if result <= losses[best]:
        return None
    return f"{after[0].bundle} has a higher held-out loss ({result:.5g}) than {best} ({losses[best]:.5g})"

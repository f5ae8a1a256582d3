"""Changes to the bundle of a resumed run that are delayed until the run starts.

A launch that is refused before that leaves the bundle as it was.
"""

from __future__ import annotations

from itertools import count

from hrm_ray.metrics.jsonl import truncate_after
from hrm_ray.rundir import RunDir, write_json
from hrm_ray.settings.tree import to_plain
from hrm_ray.train.plan import RunPlan, TextData


def write_description(run_dir: RunDir, plan: RunPlan) -> None:
    """config.json and training_args.json of the run that the plan describes."""
    write_json(run_dir.config, plan.config.to_plain())
    write_json(run_dir.training_args, {"settings": to_plain(plan.settings), "data": plan.data.to_plain()})
    # Held-out documents from before the run was resumed with others.
    kept = plan.data.text.evaluation if isinstance(plan.data, TextData) else None
    for other in run_dir.data.glob("eval-*.safetensors"):
        if other.name != kept:
            other.unlink()


def rewind_to(run_dir: RunDir, plan: RunPlan, step: int) -> None:
    """Describe the run that resumes at `step`, delete later records, and rename later checkpoints (`.superseded-N`)."""
    write_description(run_dir, plan)
    for records in (run_dir.metrics, plan.settings.run.log_file):
        if records is not None:
            truncate_after(records, step)
    for later in run_dir.checkpoint_steps():
        if later > step:
            folder = run_dir.checkpoint(later)
            aside = (run_dir.checkpoints / f"{folder.name}.superseded-{number}" for number in count(1))
            folder.rename(next(place for place in aside if not place.exists()))

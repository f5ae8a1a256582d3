"""`hrm-ray train`: options, settings file and a resumed run's settings become one tree, which is run."""

from __future__ import annotations

from collections.abc import Sequence

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.settings.load import load_settings, peek_leaves

OWN = {
    "--config FILE": "YAML file of settings, in the sections below; options on the command line override it.",
    "--dry-run": "Resolve the settings, check data and devices, count parameters and memory, and start nothing.",
    "--help": "Show this page.",
}
TO_FIND_A_RUN = (
    *("run.resume", "run.resume_from", "run.bundle_dir", "run.brain_name"),
    *("data.dataset_file", "data.dataset_id"),
)
"""Options that say which run is resumed; read first, since the settings of that run are the base of the new ones."""


def train_command(argv: Sequence[str], name: str) -> int:
    """Run the command on the words after its name; gives the exit code."""
    command = FlatCommand(f"{name} [OPTIONS]", "Trains a model on text or puzzles, in this process or on Ray.", OWN)
    arguments = command.parse(argv)
    where = peek_leaves(arguments.options, arguments.config, TO_FIND_A_RUN)
    base = None
    if where["run.resume"] or where["run.resume_from"] is not None:
        from hrm_ray.cli.run import stored_settings

        base = stored_settings(where)
    known = command.own_names
    settings = load_settings(arguments.options, arguments.config, base, found=arguments.faults, also_known=known)

    from hrm_ray.cli.run import run_train

    return run_train(settings, dry_run="--dry-run" in arguments.own)

"""`hrm-ray train`: from the words of the command line to a run.

One job: options, settings file and a resumed run's settings into one tree, then hand over to `hrm_ray.cli.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hrm_ray.cli.arguments import parse_arguments
from hrm_ray.settings.load import load_settings, peek_leaves

OWN_OPTIONS = {"--config": True, "--dry-run": False, "--help": False}
OWN_HELP = (
    ("--config FILE", "YAML file of settings, in sections as below; options on the command line win over it."),
    ("--dry-run", "Resolve everything, check data and devices, count parameters and memory, and start nothing."),
    ("--help", "Show this page."),
)
ABOUT = "Trains a model on text or puzzles, in this process or on Ray."
TO_FIND_A_RUN = (
    *("run.resume", "run.resume_from", "run.bundle_dir", "run.brain_name"),
    *("data.dataset_file", "data.dataset_id"),
)
"""Leaves that say which run is resumed; read before the rest, since that run's settings lie under the rest."""


def train_command(words: Sequence[str], name: str) -> int:
    """Run the command on the words after its name; gives the exit code."""
    said = parse_arguments(words, OWN_OPTIONS)
    if "--help" in said.own:
        from hrm_ray.cli.option_help import print_option_help

        print_option_help(f"hrm-ray {name} [OPTIONS]", ABOUT, OWN_HELP)
        return 0
    config = Path(str(said.own["--config"])) if "--config" in said.own else None
    where = peek_leaves(said.options, config, TO_FIND_A_RUN)
    base = None
    if where["run.resume"] or where["run.resume_from"] is not None:
        from hrm_ray.cli.run import stored_settings

        base = stored_settings(where)
    settings = load_settings(said.options, config, base, found=said.faults, also_known=OWN_OPTIONS)

    from hrm_ray.cli.run import run_train

    return run_train(settings, dry_run="--dry-run" in said.own)

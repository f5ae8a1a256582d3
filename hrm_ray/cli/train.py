"""`hrm-ray train`: merges options, settings file and a resumed run's settings, and starts the run."""

from __future__ import annotations

from collections.abc import Sequence

from hrm_ray.cli.flat_command import FlatCommand

OWN = {
    "--config FILE": "YAML file of settings (sections as below), or a recipe such as sudoku4; options override it.",
    "--dry-run": "Resolve the settings, check data and devices, count parameters and memory, and start nothing.",
    "--help": "Show this page.",
}


def train_command(argv: Sequence[str], name: str) -> int:
    """Run the command on its arguments; returns the exit code."""
    command = FlatCommand(f"{name} [OPTIONS]", "Trains a model on text or puzzles, in this process or on Ray.", OWN)
    arguments = command.parse(argv)
    # Only now: a help page needs none of it.
    from hrm_ray.launch.run_directory import load_run

    settings = load_run(
        arguments.options,
        arguments.config,
        found=arguments.faults,
        given_again=arguments.overridden,
        also_known=command.own_names,
        # The older trainer's command has its defaults, too.
        profile="hrm-hf" if name == "train-actv1" else None,
    )

    from hrm_ray.cli.run import run_train

    return run_train(settings, dry_run="--dry-run" in arguments.own)

"""`hrm-ray train`: merges options, settings file and a resumed run's settings, and starts the run."""

from __future__ import annotations

from collections.abc import Sequence

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.settings.yaml_file import recipes

OWN = {
    "--config FILE": f"YAML file of settings, or a recipe: {', '.join(recipes())}. Options override it.",
    "--dry-run": "Resolve the settings, check data and devices, count parameters and memory, and start nothing.",
    "--optimize": "First search the longest context up to --max-seq-len and the largest micro-batch that fit into "
    "memory (or --memory-budget), as hrm-ray optimize does, then train with them; the effective batch stays.",
    "--help": "Show the options that matter most.",
    "--help-all": "Show all options.",
}
COMMON = (
    "data.dataset_file",
    "data.val_split",
    "data.text_column",
    "data.tokenizer_path",
    "data.max_seq_len",
    "model.model_preset",
    "optimizer.batch_size",
    "optimizer.effective_batch_size",
    "optimizer.lr",
    "run.steps",
    "run.epochs",
    "run.eval_every",
    "run.max_time",
    "run.sample_prompt",
    "run.brain_name",
    "run.bundle_dir",
    "run.resume",
    "run.auto_resume",
    "cluster.device",
    "cluster.world_size",
)
"""Keys of the options that `--help` shows."""
EXAMPLES = (
    "hrm-ray data build text --out corpus",
    "hrm-ray train --dataset-file corpus --val-split test --sample-prompt The --brain-name docs",
    "hrm-ray train --bundle-dir artifacts/brains/docs --resume --steps 400",
    "hrm-ray data build sudoku --size 4 --train 20000 --out sudoku4-data",
    "hrm-ray train --config sudoku4 --dataset-file sudoku4-data",
)


def train_command(argv: Sequence[str], name: str) -> int:
    """Run the command on its arguments; returns the exit code."""
    about = "Trains a model on text or puzzles, in this process or on Ray. The data decides which."
    if name == "train-actv1":
        about += " This is train --profile hrm-hf: experts, mixed precision and activation checkpointing are on, "
        about += "lines are rows, and the defaults below are those without a profile."
    command = FlatCommand(f"{name} [OPTIONS]", about, OWN, common=COMMON, examples=EXAMPLES)
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

    return run_train(settings, dry_run="--dry-run" in arguments.own, optimize="--optimize" in arguments.own)

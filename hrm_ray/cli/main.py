"""The command `hrm-ray` and its sub-commands.

Each body imports what it needs, so that help pages load neither torch nor Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer.main import get_command

from hrm_ray import __version__
from hrm_ray.cli.build_data import build_app
from hrm_ray.cli.error_handler import command, exit_code_of, training_command
from hrm_ray.cli.help_page import CommandLine
from hrm_ray.cli.output import prepare_streams
from hrm_ray.errors import Fault, SettingsError, UnavailableError
from hrm_ray.openmp import limit_openmp_spin
from hrm_ray.settings.not_built import not_built

DEVICES = ("auto", "cpu", "cuda", "xpu", "mps")


def _device(text: str) -> str:
    """The value of --device. Raises SettingsError for a kind that is planned, and wrong usage for another word."""
    planned = not_built(f"--device {text}")
    if planned is not None:
        raise SettingsError(planned)
    if text not in DEVICES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(DEVICES)}")
    return text


DeviceChoice: TypeAlias = Annotated[
    str, typer.Option(parser=_device, metavar="|".join(DEVICES), help="Device to run on.")
]

app = CommandLine("Trains Hierarchical Reasoning Models on Ray, and uses what was trained.")
data_app = CommandLine("Look at data sets and build them.")
expert_app = CommandLine("Experts that were trained one at a time.")
ledger_app = CommandLine("The ledger of a run: which chunks of the data were trained.")
app.add_typer(data_app, name="data")
app.add_typer(expert_app, name="expert")
app.add_typer(ledger_app, name="ledger")
data_app.add_typer(build_app, name="build")

FLAT_OPTIONS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For a FlatCommand: it parses all words after its name itself, `--help` included."""


@app.command(context_settings=FLAT_OPTIONS)
@training_command
def train(ctx: typer.Context) -> int:
    """Train a model on text or puzzles."""
    from hrm_ray.cli.train import train_command

    return train_command(ctx.args, "train")


@app.command(name="train-actv1", context_settings=FLAT_OPTIONS)
@training_command
def train_actv1(ctx: typer.Context) -> int:
    """As train --profile hrm-hf: with the defaults of the older HRM-HF trainer."""
    from hrm_ray.cli.train import train_command

    return train_command(ctx.args, "train-actv1")


@app.command(context_settings=FLAT_OPTIONS)
@command
def optimize(ctx: typer.Context) -> int:
    """Find the longest context and the largest micro-batch that fit into memory, by trials of the run."""
    from hrm_ray.cli.optimize import optimize_command

    return optimize_command(ctx.args)


@app.command(context_settings=FLAT_OPTIONS)
@command
def recommend(ctx: typer.Context) -> int:
    """Recommend options for a model of a size and a context in a given memory, without training."""
    from hrm_ray.cli.recommend import recommend_command

    return recommend_command(ctx.args)


@app.command(name="arch-summary", context_settings=FLAT_OPTIONS)
@command
def arch_summary(ctx: typer.Context) -> int:
    """Print parameters by part, memory and FLOPs per token of an architecture, without training."""
    from hrm_ray.cli.arch_summary import arch_summary_command

    return arch_summary_command(ctx.args)


@app.command()
@command
def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a trained bundle.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Top-k sampling; 0 disables it.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Top-p (nucleus) sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    adaptive: Annotated[
        bool, typer.Option(help="Adaptive computation: stop a token's segments when its halting head halts.")
    ] = False,
    device: DeviceChoice = "auto",
) -> int:
    """Generate text with a trained language model."""
    from hrm_ray.cli.inference import run_generate
    from hrm_ray.inference.text import Sampling

    return run_generate(
        bundle,
        prompt=prompt,
        sampling=Sampling(temperature, top_k, top_p),
        max_new_tokens=max_new_tokens,
        seed=seed,
        adaptive=adaptive,
        device=device,
    )


@app.command()
@command
def solve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a trained bundle.")],
    puzzles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PUZZLE", help="Puzzles, one word each with one symbol per cell; 0 or . is an empty cell."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Data set of puzzles to solve: a file or a folder.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of --file to solve; the test split if there is one.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Solve the first N puzzles only.", metavar="N")] = None,
    stop_by_q: Annotated[bool, typer.Option(help="Stop a puzzle's segments when its halting head halts.")] = False,
    device: DeviceChoice = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per puzzle.")] = False,
) -> int:
    """Solve puzzles with a trained model."""
    from hrm_ray.cli.inference import run_solve

    return run_solve(
        bundle,
        puzzles=puzzles or [],
        file=file,
        split=split,
        limit=limit,
        stop_by_q=stop_by_q,
        device=device,
        as_json=as_json,
    )


@app.command()
@command
def evaluate(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundles, their best/, or checkpoints (BUNDLE/checkpoints/step_N).")
    ],
    dataset_file: Annotated[
        str | None,
        typer.Option("--dataset-file", "--file", help="Data to evaluate on; else what the run was evaluated on."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of --dataset-file; for puzzles test if there is one.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Evaluate on the first N sequences or puzzles; else on as many as the run "
            "read, of other data on 1000 sequences or all puzzles.",
        ),
    ] = None,
    device: DeviceChoice = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per bundle.")] = False,
) -> int:
    """Evaluate trained models on held-out data; several give a table."""
    from hrm_ray.cli.evaluate import run_evaluate

    return run_evaluate(bundles, dataset_file=dataset_file, split=split, limit=limit, device=device, as_json=as_json)


@app.command()
@command
def merge(
    members: Annotated[
        list[Path], typer.Argument(metavar="MEMBER", help="Bundles or .safetensors files that began from one start.")
    ],
    out: Annotated[
        Path, typer.Option(help="Bundle to write; a .safetensors file where no member is a bundle.", show_default=False)
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="A number for each member; equal ones by default.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="What all members were trained from: experts and puzzle rows then count for those who trained them."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Merge members of different or unknown starts; usually worse than each of them."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at --out.")] = False,
    dataset_file: Annotated[
        str | None,
        typer.Option("--dataset-file", "--file", help="Data to compare the members and the result on."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --dataset-file.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compare on the first N sequences or puzzles.")
    ] = None,
    device: DeviceChoice = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Merge trained models into one with the weighted mean of their weights."""
    from hrm_ray.cli.merge import run_merge

    return run_merge(
        members,
        out,
        weights=weights,
        base=base,
        force=force,
        overwrite=overwrite,
        dataset_file=dataset_file,
        split=split,
        limit=limit,
        device=device,
        as_json=as_json,
    )


@app.command()
@command
def runs(
    folder: Annotated[Path | None, typer.Argument(help="Folder of bundles [default: artifacts/brains].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per bundle.")] = False,
) -> int:
    """List bundles with their size, steps, loss, best held-out figure and state, the last written first."""
    from hrm_ray.cli.runs import run_runs

    return run_runs(folder, as_json=as_json)


@app.command()
@command
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Bundles or metrics.jsonl files.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("loss.png"),
    metric: Annotated[list[str] | None, typer.Option(help="Metric to draw; may be given several times.")] = None,
) -> int:
    """Draw loss curves of runs side by side, as a PNG."""
    from hrm_ray.metrics.plots import plot_runs

    print(plot_runs(runs, out, metric))
    return 0


@app.command()
@command
def submit(
    address: Annotated[
        str, typer.Option(metavar="URL", help="The head's dashboard: http://HEAD:8265.", show_default=False)
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="-- train OPTIONS", help="The command, with the options of train.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job [default: that of the bundle and a number].")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Variable of this environment to give to the job; may be given several times."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="Follow a job that is there already.")] = None,
) -> int:
    """Train as a job on a Ray cluster: sends the code, follows the log, and ends with the run's exit code."""
    from hrm_ray.cli.submit import run_submit

    return run_submit(words or [], address=address, name=name, env=env or [], wait=wait, follow=follow)


@app.command()
@command
def stop(
    target: Annotated[str, typer.Argument(metavar="BUNDLE_OR_JOB", help="Folder of a bundle, or name of a job.")],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The head's dashboard, for a job: http://HEAD:8265.")
    ] = None,
    wait: Annotated[str, typer.Option(metavar="TIME", help="Wait this long for the save.")] = "10m",
) -> int:
    """Stop a run so that it is saved, and wait until it has ended."""
    from hrm_ray.cli.submit import run_stop

    return run_stop(target, address=address, wait=wait)


@app.command()
@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train for a minute on each device of this machine, or on the cluster.")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Running Ray cluster to examine too.")
    ] = None,
    bundle_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of bundles: whether its disk has room, and whether the cluster's nodes share it."),
    ] = None,
) -> int:
    """Report what this machine or cluster can do, and which options would not work; fit to paste into an issue."""
    from hrm_ray.cli.doctor import run_doctor

    return run_doctor(as_json=as_json, train=train, ray_address=ray_address, bundle_dir=bundle_dir)


ExpertsDir: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of stored experts [default: artifacts/experts].")
]


@expert_app.command("list")
@command
def expert_list(
    experts_dir: ExpertsDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List the stored experts with their evaluation figures before and after training."""
    from hrm_ray.cli.expert import run_list

    return run_list(experts_dir, as_json=as_json)


@expert_app.command("put")
@command
def expert_put(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Name of a stored expert.")],
    into: Annotated[Path, typer.Option(help="Bundle to put it into; it is not changed.")],
    out: Annotated[Path, typer.Option(help="Bundle to write; the folder must be new or empty.")],
    experts_dir: ExpertsDir = None,
) -> int:
    """Put a stored expert into a copy of a bundle of the same architecture."""
    from hrm_ray.cli.expert import run_put

    return run_put(identifier, into, out, experts_dir)


LedgerRun: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run's bundle.")]


@ledger_app.command("show")
@command
def ledger_show(
    run: LedgerRun,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole ledger to this JSON file.")] = None,
) -> int:
    """Show what a run has trained of its data: epochs, chunks by state, rounds, and quarantined ranges."""
    from hrm_ray.cli.ledger import run_show

    return run_show(run, json_file)


@ledger_app.command("verify")
@command
def ledger_verify(run: LedgerRun) -> int:
    """Check that a run's ledger is consistent; otherwise print each violation and exit with code 1."""
    from hrm_ray.cli.ledger import run_verify

    return run_verify(run)


@data_app.command("inspect", context_settings=FLAT_OPTIONS)
@command
def data_inspect(ctx: typer.Context) -> int:
    """Show what training would read of a data set: format, rows, blocks, chunks, tokens, bad rows and samples."""
    from hrm_ray.cli.inspect import inspect_command

    return inspect_command(ctx.args)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"hrm-ray {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Trains Hierarchical Reasoning Models on Ray, and uses what was trained."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    limit_openmp_spin(os.environ)
    prepare_streams()
    root = get_command(app)
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]

    def start() -> object:
        _check_working_folder()
        missing = not_built(f"hrm-ray {arguments[0]}")
        if missing is not None:
            raise SettingsError(missing)
        return root.main(arguments, prog_name="hrm-ray", standalone_mode=False)

    sys.exit(exit_code_of(start))


def _check_working_folder() -> None:
    """Raises UnavailableError where the working folder was deleted: libraries end the process over it."""
    try:
        Path.cwd()
    except OSError as error:
        fault = Fault("the working folder", f"it cannot be entered ({error.strerror})", "Change to another one with cd")
        raise UnavailableError(fault) from error


if __name__ == "__main__":
    main()

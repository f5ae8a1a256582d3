"""`hrm-ray data inspect`: what training would see of a data set, printed as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.load import load_settings, peek_leaves
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.rules import as_note, without_effect
from hrm_ray.settings.tree import RunSettings

if TYPE_CHECKING:
    from hrm_ray.data.inspection.puzzles import PuzzleSetFacts
    from hrm_ray.data.inspection.text import TextFacts
    from hrm_ray.data.timer import Timer

COMMAND = FlatCommand(
    "data inspect PATH [OPTIONS]",
    "Shows what training would read of a data set. Without --on-bad-row, bad rows are counted and reported; with "
    "--on-bad-row fail the first one ends the reading. Without a tokenizer, tokens are estimated from bytes.",
    {
        "PATH": "The data, named as for --dataset-file of train; or give --dataset-id for a data set of the Hub.",
        "--timeout-s S": "Read for about this many seconds; the rest is estimated [default: 5]",
        "--all": "Read all of it, however long it takes.",
        "--samples N": "Rows to show [default: 3]",
        "--json": "Print JSON.",
        "--config FILE": "YAML file of settings; options on the command line override it.",
        "--help": "Show this message and exit.",
    },
    takes=lambda option: "rows" in option.traits.affects,
    unused="does not change what is read",
    positionals=1,
    examples=('hrm-ray data inspect "logs/*.jsonl.gz" --text-column body',),
)


def inspect_command(argv: Sequence[str]) -> int:
    """Run the command on its arguments; returns the exit code."""
    arguments = COMMAND.parse(argv)
    timeout_s = arguments.number("--timeout-s", whole=False, above=0)
    samples = arguments.number("--samples", whole=True, above=-1)
    read_all, flat, faults = "--all" in arguments.own, arguments.options, arguments.faults
    if read_all and "--timeout-s" in arguments.own:
        faults.append(
            Fault("--all and --timeout-s", "--all reads all data, --timeout-s stops early", "Give one of the two")
        )
    path = next(iter(arguments.positional), None)
    if path is not None and ("--dataset-file" in flat or "--dataset-id" in flat):
        faults.append(Fault(path, "an option names the data too", "Name it once"))
    elif path is not None:
        flat["--dataset-file"] = path
    if any(peek_leaves(flat, arguments.config, ("data.prompt_column", "data.response_column")).values()):
        # Training takes pairs under this option only; here there is nothing else that the columns could mean.
        flat.setdefault("--lm-mask", "prefix")
    settings = load_settings(
        flat, arguments.config, found=faults, given_again=arguments.overridden, also_known=COMMAND.own_names
    )
    if settings.data.training_data is None:
        raise SettingsError(Fault("PATH", "there is nothing to inspect", "Give a path, an address, or --dataset-id"))
    limit_s = None if read_all else 5.0 if timeout_s is None else timeout_s
    return _inspect(settings, limit_s, 3 if samples is None else int(samples), as_json="--json" in arguments.own)


def _inspect(settings: RunSettings, timeout_s: float | None, samples: int, *, as_json: bool) -> int:
    from hrm_ray.cli.shown_data import puzzle_lines, text_lines, text_warnings
    from hrm_ray.data.detect import is_puzzle_rows, puzzle_tensors
    from hrm_ray.data.inspection.puzzles import inspect_puzzles
    from hrm_ray.data.inspection.text import inspect_text
    from hrm_ray.data.named_tokenizer import load_named
    from hrm_ray.data.parts import list_parts
    from hrm_ray.data.timer import Timer
    from hrm_ray.launch.data_sources import corpus_to_read, source_of

    timer = Timer(timeout_s)
    source = source_of(settings, evaluation=False)
    found = list_parts(source) if puzzle_tensors(source) is None else None
    fails = settings.data.on_bad_row == "fail" and "data.on_bad_row" in settings.given
    if found is None or is_puzzle_rows(found.parts[0]):
        puzzles = inspect_puzzles(
            source,
            found,
            max_rows=settings.data.max_train_examples,
            read_all=timeout_s is None,
            samples=samples,
        )
        _print_no_effect(resolve_task(settings, "puzzle", puzzles.seq_len))
        if as_json:
            _print_json("puzzle", puzzles, timer)
        else:
            print("\n".join(puzzle_lines(puzzles, timer.elapsed_s)))
        return 0
    _print_no_effect(resolve_task(settings, "lm"))
    name = settings.data.tokenizer_path
    tokenizer = None if name is None else load_named(name)
    corpus = corpus_to_read(settings, source, found.parts, evaluation=False)
    corpus = replace(corpus, on_bad_row="fail" if fails else "skip")
    facts = inspect_text(corpus, found, timer, tokenizer=tokenizer, samples=samples)
    if as_json:
        _print_json("lm", facts, timer)
    else:
        print("\n".join(text_lines(facts, corpus, name, timer.elapsed_s)))
    for warning in (*found.notes, *text_warnings(facts, skips=settings.data.on_bad_row == "skip")):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _print_no_effect(settings: RunSettings) -> None:
    no_effect = without_effect(settings)
    if no_effect:
        print(f"note: {as_note(no_effect)}", file=sys.stderr)


def _print_json(task: str, facts: TextFacts | PuzzleSetFacts, timer: Timer) -> None:
    print(json.dumps({"task": task, **asdict(facts), "elapsed_s": round(timer.elapsed_s, 3)}, indent=2))

"""`hrm-ray data inspect`: what training would see of a data set.

One job: the words of the command line into a source, a cut and a time, and the facts found into lines or JSON. What is
found is `hrm_ray.data.inspection`'s matter, how it is written `shown_data`'s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hrm_ray.cli.arguments import Arguments, parse_arguments
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.load import load_settings, peek_leaves
from hrm_ray.settings.options import spellings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings

if TYPE_CHECKING:
    from hrm_ray.data.inspection.puzzles import PuzzleSetFacts
    from hrm_ray.data.inspection.text import TextFacts
    from hrm_ray.data.timer import Timer

OWN_OPTIONS = {
    "--config": True,
    "--timeout-s": True,
    "--all": False,
    "--samples": True,
    "--json": False,
    "--help": False,
}
OWN_HELP = (
    ("PATH", "The data, named as for --dataset-file of train; --dataset-id in its place names a data set of the Hub."),
    ("--timeout-s S", "Read for at most about so many seconds; what was not read is estimated [default: 5]"),
    ("--all", "Read all of it, however long it takes."),
    ("--samples N", "Rows to show [default: 3]"),
    ("--json", "Print JSON."),
    ("--config FILE", "YAML file of settings; options on the command line win over it."),
    ("--help", "Show this page."),
)
ABOUT = (
    "Shows what training would read of a data set. Without --on-bad-row bad rows are counted and told; with "
    "--on-bad-row fail the first one ends the reading. Without a tokenizer tokens are guessed from bytes."
)
DEFAULT_TIMEOUT_S, DEFAULT_SAMPLES = 5.0, 3


def inspect_command(words: Sequence[str]) -> int:
    """Run the command on the words after its name; gives the exit code."""
    said = parse_arguments(words, OWN_OPTIONS, takes_alone=1)
    if "--help" in said.own:
        from hrm_ray.cli.option_help import print_option_help

        print_option_help(
            "hrm-ray data inspect PATH [OPTIONS]", ABOUT, OWN_HELP, lambda option: "rows" in option.traits.affects
        )
        return 0
    timeout_s = _number(said, "--timeout-s", DEFAULT_TIMEOUT_S, whole=False)
    samples = int(_number(said, "--samples", DEFAULT_SAMPLES, whole=True))
    _refuse_others(said)
    if "--all" in said.own and "--timeout-s" in said.own:
        said.faults.append(Fault("--all and --timeout-s", "one reads all, the other a part", "Give one of the two"))
    if said.alone and ("--dataset-file" in said.options or "--dataset-id" in said.options):
        said.faults.append(Fault(said.alone[0], "the data is named by an option as well", "Name it once"))
    elif said.alone:
        said.options["--dataset-file"] = said.alone[0]
    config = Path(str(said.own["--config"])) if "--config" in said.own else None
    columns = ("data.prompt_column", "data.response_column")
    if any(peek_leaves(said.options, config, columns).values()):
        # Training takes pairs under this option only; here there is nothing else that it could mean.
        said.options["--lm-mask"] = "prefix"
    settings = load_settings(said.options, config, found=said.faults, also_known=OWN_OPTIONS)
    if settings.data.training_data is None:
        raise SettingsError(Fault("PATH", "there is nothing to inspect", "Give a path, an address, or --dataset-id"))
    read_all = "--all" in said.own
    return _inspect(settings, None if read_all else timeout_s, samples, as_json="--json" in said.own)


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
    if found is None or is_puzzle_rows(found.parts[0], "fail" if fails else "skip"):
        puzzles = inspect_puzzles(
            source,
            found,
            max_rows=settings.data.max_train_examples,
            read_all=timeout_s is None,
            samples=samples,
        )
        resolve_task(settings, "puzzle", puzzles.seq_len)
        if as_json:
            _print_json("puzzle", puzzles, timer)
        else:
            print("\n".join(puzzle_lines(puzzles, timer.elapsed_s)))
        return 0
    resolve_task(settings, "lm")
    name = settings.data.tokenizer_path
    tokenizer = None if name is None else load_named(name)
    corpus = corpus_to_read(settings, source, found.parts, evaluation=False)
    corpus = replace(corpus, on_bad_row="fail" if fails else "skip")
    facts = inspect_text(corpus, found, timer, tokenizer=tokenizer, samples=samples)
    if as_json:
        _print_json("lm", facts, timer)
    else:
        print("\n".join(text_lines(facts, corpus, name, timer.elapsed_s)))
    for warning in text_warnings(facts, skips=settings.data.on_bad_row == "skip"):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _print_json(task: str, facts: TextFacts | PuzzleSetFacts, timer: Timer) -> None:
    print(json.dumps({"task": task, **asdict(facts), "elapsed_s": round(timer.elapsed_s, 3)}, indent=2))


def _number(said: Arguments, name: str, default: float, *, whole: bool) -> float:
    """The positive number given as one of the command's own options; a fault is added where it is none."""
    text = said.own.get(name)
    if not isinstance(text, str):
        return default
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if 0 <= number < float("inf") and (whole or number > 0):
        return number
    kind = "a whole number, 0 or more" if whole else "a number above 0"
    said.faults.append(Fault(f"{name} {text}", f"is not {kind}", f"Write {name} {default:g}, say"))
    return default


def _refuse_others(said: Arguments) -> None:
    for name in list(said.options):
        spelling = spellings().get(name)
        if spelling is not None and "rows" not in spelling.option.traits.affects:
            said.faults.append(Fault(name, "changes nothing of what is read", "Leave it out"))
            del said.options[name]

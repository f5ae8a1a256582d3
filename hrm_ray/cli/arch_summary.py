"""`hrm-ray arch-summary`: what an architecture costs, without training.

One job: options into a model's configuration, and the accounts of it printed as a table or as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_ray.cli.arguments import Arguments, parse_arguments
from hrm_ray.errors import Fault
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.options import Option
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings

OWN_OPTIONS = {"--config": True, "--vocab-size": True, "--json": False, "--help": False}
OWN_HELP = (
    ("--vocab-size N", "Tokens in the vocabulary [default: 16000]"),
    ("--config FILE", "YAML file of settings; options on the command line win over it."),
    ("--json", "Print JSON instead of a table."),
    ("--help", "Show this page."),
)
ABOUT = "Counts the parameters of an architecture by part, its FLOPs per token, and what training it takes of memory."
DEFAULT_SEQ_LEN = 128
SECTIONS = ("model", "memory", "adapt")
"""Sections that the summary depends on whole; of the others, the options that affect memory."""


def arch_summary_command(words: Sequence[str]) -> int:
    """Run the command on the words after its name; gives the exit code."""
    said = parse_arguments(words, OWN_OPTIONS)
    if "--help" in said.own:
        from hrm_ray.cli.option_help import print_option_help

        print_option_help("hrm-ray arch-summary [OPTIONS]", ABOUT, OWN_HELP, _counts)
        return 0
    vocab_size = _vocab_size(said)
    _refuse_other_sections(said)
    config = Path(str(said.own["--config"])) if "--config" in said.own else None
    loaded = load_settings(said.options, config, found=said.faults, also_known=OWN_OPTIONS)
    length = loaded.data.max_seq_len or DEFAULT_SEQ_LEN
    settings = resolve_task(loaded, loaded.model.task or "lm", length)
    data = settings.data
    most = data.max_vocab_size if data.auto_vocab_size else data.vocab_size
    _print_summary(settings, vocab_size or most, as_json="--json" in said.own)
    return 0


def _print_summary(settings: RunSettings, vocab_size: int, as_json: bool) -> None:
    from hrm_ray.launch.fallbacks import settle_memory_options
    from hrm_ray.model.architecture import model_config
    from hrm_ray.model.describe import summarise
    from hrm_ray.train.memory_estimate import memory_estimate

    # Nothing is computed: the device need not be here, and what it has of its own is only what offloading leaves it.
    device = "cuda" if settings.cluster.device == "cuda" else "cpu"
    settings, notes = settle_memory_options(settings, device)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    config = model_config(settings, vocab_size)
    summary, account = summarise(config), memory_estimate(settings, config, device)
    if as_json:
        print(json.dumps(summary.to_plain() | {"memory": account.to_plain()}, indent=2))
        return
    rows = f"{settings.optimizer.batch_size} x {settings.optimizer.gradient_accumulation_steps}"
    print(f"{summary.as_text()}\n\ntraining memory, batch {rows}:\n{account.as_text()}")


def _vocab_size(said: Arguments) -> int | None:
    """The number given as --vocab-size. It is not the leaf of that name, which starts at 300: puzzles have fewer."""
    text = said.own.get("--vocab-size")
    if not isinstance(text, str):
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    said.faults.append(Fault(f"--vocab-size {text}", "is not a positive whole number", "Give 1 or more"))
    return None


def _counts(option: Option) -> bool:
    return option.section in SECTIONS or "memory" in option.traits.affects


def _refuse_other_sections(said: Arguments) -> None:
    from hrm_ray.settings.options import spellings

    for name in list(said.options):
        spelling = spellings().get(name)
        if spelling is None or _counts(spelling.option):
            continue
        said.faults.append(Fault(name, "changes neither an architecture nor what it takes of memory", "Leave it out"))
        del said.options[name]

"""`hrm-ray arch-summary`: parameters, FLOPs and training memory of an architecture, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.rules import as_note, without_effect
from hrm_ray.settings.tree import RunSettings

SECTIONS = ("model", "memory", "adapt")
"""Sections that the summary depends on whole; of the others, the options that affect memory."""
COMMAND = FlatCommand(
    "arch-summary [OPTIONS]",
    "Counts the parameters of an architecture by part, its FLOPs per token, and the memory that training needs.",
    {
        "--vocab-size N": "Tokens in the vocabulary [default: 16000]",
        "--config FILE": "YAML file of settings; options on the command line override it.",
        "--json": "Print JSON instead of a table.",
        "--help": "Show the options that matter most.",
        "--help-all": "Show all options.",
    },
    takes=lambda option: option.section in SECTIONS or "memory" in option.traits.affects,
    unused="changes neither an architecture nor the memory that it needs",
    common=(
        "model.arch",
        "model.model_preset",
        "model.num_layers",
        "model.hidden_size",
        "model.num_heads",
        "model.use_moe",
        "model.num_experts",
        "model.halt_max_steps",
        "data.max_seq_len",
        "optimizer.batch_size",
        "optimizer.optimizer",
        "memory.amp",
        "memory.gradient_checkpointing",
        "memory.model_dtype",
        "adapt.use_peft",
        "cluster.device",
    ),
    examples=("hrm-ray arch-summary --model-preset small --max-seq-len 1024 --batch-size 4",),
)
DEFAULT_SEQ_LEN = 128
DEFAULT_VOCABULARY = 16000


def arch_summary_command(argv: Sequence[str]) -> int:
    """Run the command on its arguments; returns the exit code."""
    arguments = COMMAND.parse(argv)
    # Not the setting of that name, which starts at 300: puzzles have fewer.
    vocab_size = arguments.number("--vocab-size", whole=True, above=0)
    loaded = load_settings(
        arguments.options,
        arguments.config,
        found=arguments.faults,
        given_again=arguments.overridden,
        also_known=COMMAND.own_names,
    )
    settings = resolve_task(loaded, loaded.model.task or "lm", loaded.data.max_seq_len or DEFAULT_SEQ_LEN)
    data = settings.data
    most = data.max_vocab_size if data.auto_vocab_size else data.vocab_size or DEFAULT_VOCABULARY
    _print_summary(settings, int(vocab_size or most), as_json="--json" in arguments.own)
    return 0


def _print_summary(settings: RunSettings, vocab_size: int, as_json: bool) -> None:
    from hrm_ray.launch.fallbacks import settle_memory_options, without_effect_on
    from hrm_ray.model.config import model_config
    from hrm_ray.model.describe import summarise
    from hrm_ray.train.memory_estimate import memory_estimate

    # Nothing is computed, so the device need not be here; offloading matters only if its memory is not the host's.
    device = "cuda" if settings.cluster.device == "cuda" else "cpu"
    no_effect = [*without_effect(settings), *without_effect_on(settings, device)]
    if no_effect:
        print(f"note: {as_note(no_effect)}", file=sys.stderr)
    settings, notes = settle_memory_options(settings, device)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    config = model_config(settings, vocab_size)
    summary, memory = summarise(config), memory_estimate(settings, config, device)
    if as_json:
        print(json.dumps(summary.to_plain() | {"memory": memory.to_plain()}, indent=2))
        return
    rows = f"{settings.optimizer.batch_size} x {settings.optimizer.gradient_accumulation_steps}"
    print(f"{summary.as_text()}\n\ntraining memory, batch {rows}:\n{memory.as_text()}")

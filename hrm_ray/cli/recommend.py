"""`hrm-ray recommend`: options for a model of a size and a context in a given memory, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hrm_ray.cli.flat_command import Arguments, FlatCommand
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.size import bytes_of

if TYPE_CHECKING:
    from hrm_ray.search.recommend import Asked, Recommendation

SECTIONS = ("model", "memory", "adapt")
ALSO_TAKEN = ("optimizer.effective_batch_size", "cluster.world_size", "cluster.strategy", "cluster.threads")
DEFAULT_VOCABULARY = 16384
COMMAND = FlatCommand(
    "recommend [OPTIONS]",
    "Recommends options with which a model of a size and a context trains in a given memory, by estimates of what it "
    "takes. Nothing is trained. Says which single change would make fit what does not.",
    {
        "--memory SIZE": "Memory of the device, such as 24GB [default: what the device of this machine has]",
        "--parameters N": "Parameters of the model, such as 400M or 1.5B, if no sizes are given.",
        "--context N": "Tokens in a sequence [default: --max-seq-len, or 128]",
        "--vocab-size N": f"Tokens in the vocabulary [default: {DEFAULT_VOCABULARY}]",
        "--config FILE": "YAML file of settings; options on the command line override it.",
        "--json": "Print JSON.",
        "--help": "Show the options that matter most.",
        "--help-all": "Show all options.",
    },
    takes=lambda option: option.section in SECTIONS or "memory" in option.traits.affects or option.key in ALSO_TAKEN,
    unused="changes neither an architecture nor the memory that it needs",
    common=(
        "model.model_preset",
        "model.hidden_size",
        "optimizer.effective_batch_size",
        "optimizer.optimizer",
        "memory.amp",
        "memory.model_dtype",
        "cluster.device",
        "cluster.world_size",
    ),
    examples=(
        "hrm-ray recommend --memory 24GB --parameters 400M --context 8192",
        "hrm-ray recommend --model-preset small --effective-batch-size 64",
    ),
)


def recommend_command(argv: Sequence[str]) -> int:
    """Run the command on its arguments; returns the exit code."""
    arguments = COMMAND.parse(argv)
    asked, here = _asked(arguments)
    from hrm_ray.search.recommend import recommend

    recommended = recommend(asked)
    if "--json" in arguments.own:
        print(json.dumps(_plain(recommended), indent=2))
    else:
        print(_report(asked, recommended, here=here))
    return 0


def _asked(arguments: Arguments) -> tuple[Asked, bool]:
    """What is asked, and whether it is about the device of this machine. Raises SettingsError."""
    own = arguments.own
    memory, parameters = own.get("--memory"), own.get("--parameters")
    from hrm_ray.search.recommend import parameters_of

    if memory is not None and bytes_of(str(memory)) is None:
        hint = "Give a number with its unit, such as 24GB"
        arguments.faults.append(Fault(f"--memory {memory}", "is not a size of memory", hint))
    if parameters is not None and parameters_of(str(parameters)) is None:
        hint = "Give one such as 400M or 1.5B"
        arguments.faults.append(Fault(f"--parameters {parameters}", "is not a number of parameters", hint))
    vocab_size = arguments.number("--vocab-size", whole=True, above=0)
    context = arguments.number("--context", whole=True, above=1)
    options = arguments.options
    if context is not None:
        if options.keys() & {"--max-seq-len", "--seq-len"}:
            arguments.faults.append(Fault("--context with --max-seq-len", "they are the same", "Give one of the two"))
        options = {**options, "--max-seq-len": str(int(context))}
    from hrm_ray.settings.load import load_settings
    from hrm_ray.settings.resolve import resolve_task, with_effective_batch

    loaded = load_settings(
        options,
        arguments.config,
        found=arguments.faults,
        given_again=arguments.overridden,
        also_known=COMMAND.own_names,
    )
    settings = with_effective_batch(resolve_task(loaded, "lm"), loaded.cluster.world_size or 1)
    device, memory_bytes = _device(str(memory) if memory is not None else None, settings.cluster.device)
    from hrm_ray.search.recommend import Asked, with_shape

    if settings.memory.amp is None:
        settings = settings.with_leaves({"memory.amp": device == "cuda"})
    tokens = int(vocab_size or settings.data.vocab_size or DEFAULT_VOCABULARY)
    if parameters is not None:
        sizes = ("model_preset", "hidden_size", "h_layers", "l_layers", "num_layers", "num_heads", "expansion", "d_ff")
        given = [name for name in sizes if f"model.{name}" in settings.given]
        if given:
            other = f"--{given[0].replace('_', '-')}"
            fault = Fault(f"--parameters {parameters} with {other}", "both say how large the model is", "Give one")
            raise SettingsError(fault)
        settings = with_shape(settings, parameters_of(str(parameters)) or 0, tokens)
    return Asked(settings, tokens, memory_bytes, device), memory is None


def _device(memory: str | None, wanted: str) -> tuple[str, int]:
    """The kind of device and its memory: of this machine, or a GPU of the given memory unless another was named."""
    if memory is not None:
        return "cpu" if wanted == "cpu" else "cuda", bytes_of(memory) or 0
    import torch

    from hrm_ray.launch.devices import choose_device
    from hrm_ray.train.host_memory import available_memory_bytes

    if choose_device(wanted) == "cuda":
        return "cuda", min(torch.cuda.mem_get_info(number)[1] for number in range(torch.cuda.device_count()))
    return "cpu", available_memory_bytes()


def _options(asked: Asked, recommended: Recommendation) -> str:
    """The recommended options as a user writes them: what was given, and what was chosen."""
    from hrm_ray.settings.options import options
    from hrm_ray.settings.tree import to_dotted

    settings = recommended.settings
    keys = ["data.max_seq_len", "optimizer.batch_size", "optimizer.gradient_accumulation_steps"]
    keys += ["memory.gradient_checkpointing", *(key for lever in recommended.point.levers for key in lever.leaves)]
    if settings.memory.use_chunked_training:
        keys.append("memory.chunk_size")
    keys += [key for key in options() if key in settings.given]
    if asked.settings.model.model_preset is None:
        keys += [f"model.{name}" for name in ("hidden_size", "num_heads", "h_layers", "l_layers", "expansion")]
    dotted, written = to_dotted(settings), list[str]()
    for key in dict.fromkeys(keys):
        if key != "optimizer.effective_batch_size" and dotted[key] is not None:
            written.append(options()[key].written(dotted[key]))
    return " ".join(written)


def _plain(recommended: Recommendation) -> dict[str, object]:
    from hrm_ray.settings.tree import to_dotted

    keys = ("optimizer.batch_size", "optimizer.gradient_accumulation_steps", "data.max_seq_len")
    dotted = to_dotted(recommended.settings)
    levers = {key: dotted[key] for lever in recommended.point.levers for key in lever.leaves}
    return {
        "parameters": recommended.parameters,
        "settings": {key: dotted[key] for key in keys} | levers,
        "expected_bytes": recommended.expected_bytes,
        "memory": recommended.account.to_plain(),
    }


def _report(asked: Asked, recommended: Recommendation, *, here: bool) -> str:
    """The recommendation as text."""
    from hrm_ray.search.optimize import slower
    from hrm_ray.search.recommend import PLANNED

    config, point = recommended.config, recommended.point
    kind = "a GPU" if asked.device == "cuda" else "a CPU, with the process itself"
    where = "of this machine" if here else "as given"
    each = f", each of {asked.workers} workers" if asked.workers > 1 else ""
    lines = [
        f"model   {config.arch}, {recommended.parameters:,} parameters, hidden size {config.hidden_size}, layers "
        f"{config.h_layers} + {config.l_layers}, context {point.context}, vocabulary {config.vocab_size}",
        f"memory  {asked.memory_bytes / 1e9:.1f} GB {where} ({kind}{each}), of which {PLANNED:.0%} is planned with",
        f"batch   {point.batch_size} x {asked.share // point.batch_size} accumulated",
        f"expects {recommended.expected_bytes / 1e9:.1f} GB: {recommended.account.as_text()}",
        f"speed   {_speed(asked, recommended, here=here)}",
    ]
    if point.levers:
        names = ", ".join(lever.name for lever in point.levers)
        lines.append(f"saves   {names}: {slower(point.levers):.2f} x the time of an update without (docs/search.md)")
        lines += [f"note    {lever.name}: {lever.changes}" for lever in point.levers if lever.changes]
    lines.append(f"options {_options(asked, recommended)}")
    return "\n".join(lines)


def _speed(asked: Asked, recommended: Recommendation, *, here: bool) -> str:
    """What is known of it: on the CPU of this machine updates of a smaller model are timed."""
    unknown = "unknown, nobody has measured it; `hrm-ray optimize` with these options does"
    if asked.device != "cpu" or not here:
        return unknown
    from hrm_ray.launch.resources import usable_cpus
    from hrm_ray.train.time_estimate import update_s

    threads = asked.settings.cluster.threads or max(1, usable_cpus() // asked.workers)
    each_s = update_s(recommended.settings, recommended.config, threads)
    if each_s is None:
        return unknown
    return f"about {each_s:.2g} s an update with {threads} thread(s), by timed updates of a smaller model"

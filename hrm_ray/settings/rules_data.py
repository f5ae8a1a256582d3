"""Which leaves about the data, and how long a run goes through it, cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.hub_name import hub_name
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _one_training_set(settings: RunSettings) -> Fault | None:
    if settings.data.dataset_file is None or settings.data.dataset_id is None:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.dataset_id"), "both say what to train on", "Give one of the two"
    )


def _hub_config_once(settings: RunSettings) -> Fault | None:
    name, config = hub_name(settings.data.dataset_file or ""), settings.data.dataset_config
    if name is None or name.config is None or config is None or name.config == config:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.dataset_config"),
        f"the address names the configuration {name.config}, the option another one",
        "Name it once",
    )


def _hub_split_once(settings: RunSettings) -> Fault | None:
    """Only what this user said is refused: the split of an address stands above the default."""
    name, split = hub_name(settings.data.dataset_file or ""), settings.data.split
    if name is None or name.split is None or "data.split" not in settings.given or name.split == split:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.split"),
        f"the address names the split {name.split}, the option another one",
        "Name it once",
    )


def _hub_id_is_one(settings: RunSettings) -> Fault | None:
    given = settings.data.dataset_id
    if given is None or "://" not in given:
        return None
    return Fault(
        said(settings, "data.dataset_id"),
        "this is an address, not the id of a data set",
        "Give --dataset-id ORGANISATION/NAME, or the address to --dataset-file",
    )


def _stride_within_row(settings: RunSettings) -> Fault | None:
    stride, length = settings.data.stride, settings.data.max_seq_len
    if stride is None or length is None or stride <= length:
        return None
    return Fault(
        said(settings, "data.stride", "data.max_seq_len"),
        f"{stride - length} tokens between two sequences would never be trained on",
        f"Leave it out, or give less than --stride {length}",
    )


def _chunk_within_block(settings: RunSettings) -> Fault | None:
    """Only what this user said is refused: a block of fewer samples has one chunk."""
    chunk, block = settings.data.dataset_chunk_size, settings.data.samples_per_block
    if "data.dataset_chunk_size" not in settings.given or chunk <= block:
        return None
    return Fault(
        said(settings, "data.dataset_chunk_size", "data.samples_per_block"),
        "a chunk is a part of a block",
        f"Give --dataset-chunk-size {block} or less, or a larger --samples-per-block",
    )


def _iterate_without_end(settings: RunSettings) -> Fault | None:
    if not settings.run.iterate or settings.run.epochs is None:
        return None
    return Fault(
        said(settings, "run.iterate", "run.epochs"),
        "one goes on until the run is stopped, the other ends it",
        "Give one of the two",
    )


def _schedule_of_endless_run(settings: RunSettings) -> Fault | None:
    run, chosen = settings.run, settings.optimizer
    open_end = [name for name in ("iterate", "stop_after_epoch", "stop_after_block") if settings.leaf(f"run.{name}")]
    if not open_end or run.steps is not None or run.epochs is not None:
        return None
    adaptive_ranks = settings.adapt.use_peft and settings.adapt.peft_method == "adalora"
    if chosen.lr_schedule == "constant" and not adaptive_ranks:
        return None
    what = (
        "the ranks of adalora follow"
        if chosen.lr_schedule == "constant"
        else f"--lr-schedule {chosen.lr_schedule} follows"
    )
    return Fault(
        said(settings, f"run.{open_end[0]}"),
        f"{what} the length of the run, and nothing says it",
        "Give --steps or --epochs, or --lr-schedule constant without adalora",
    )


def _training_again_needs_a_run(settings: RunSettings) -> Fault | None:
    resumes = settings.run.resume or settings.run.resume_from is not None
    if not settings.data.force_train or (resumes and settings.run.epochs is not None):
        return None
    reason = "a new run has trained no chunk yet that could be trained again"
    if resumes:
        reason = "without --epochs a run trains its chunks again anyway"
    return Fault(said(settings, "data.force_train"), reason, "Leave it out, or give --resume and --epochs")


DATA_RULES: tuple[Rule, ...] = (
    Rule("one_training_set", ("data.dataset_file", "data.dataset_id"), _one_training_set),
    Rule("hub_config_once", ("data.dataset_file", "data.dataset_config"), _hub_config_once),
    Rule("hub_split_once", ("data.dataset_file", "data.split"), _hub_split_once),
    Rule("hub_id_is_one", ("data.dataset_id",), _hub_id_is_one),
    Rule("stride_within_row", ("data.stride", "data.max_seq_len"), _stride_within_row),
    Rule("chunk_within_block", ("data.dataset_chunk_size", "data.samples_per_block"), _chunk_within_block),
    Rule("iterate_without_end", ("run.iterate", "run.epochs"), _iterate_without_end),
    Rule(
        "schedule_of_endless_run",
        (
            "run.iterate",
            "run.stop_after_epoch",
            "run.stop_after_block",
            "run.steps",
            "run.epochs",
            "optimizer.lr_schedule",
            "adapt.use_peft",
            "adapt.peft_method",
        ),
        _schedule_of_endless_run,
    ),
    Rule(
        "training_again_needs_a_run",
        ("data.force_train", "run.resume", "run.resume_from", "run.epochs"),
        _training_again_needs_a_run,
    ),
)

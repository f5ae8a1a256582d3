"""Settings that depend on the data: task, supervision, exploration, loss and sequence length.

It reads no data; the caller passes what was detected.
"""

from __future__ import annotations

from typing import Any

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.model import Task
from hrm_ray.settings.rule import gives_way
from hrm_ray.settings.rules import broken_rules
from hrm_ray.settings.tree import RunSettings

TASK_DEFAULTS: dict[Task, dict[str, Any]] = {
    "lm": {"supervision": "rollout", "halt_exploration_prob": 0.0, "loss": "softmax"},
    "puzzle": {"supervision": "segment", "halt_exploration_prob": 0.1, "loss": "stablemax"},
}
"""Leaves of section `model` by task (FEATURES.md M4, M5, M14)."""

TEXT_SEQ_LEN = 128
"""Default number of tokens of a text sequence (FEATURES.md D5)."""


def resolve_task(settings: RunSettings, task_of_data: Task, puzzle_len: int | None = None) -> RunSettings:
    """The settings with every default that depends on the task filled in; all rules hold for the result.

    `puzzle_len` is the length of the data's puzzles in tokens, needed for task puzzle.
    Raises SettingsError with every contradiction, such as another task or length than the data has.
    """
    faults = _contradictions(settings, task_of_data, puzzle_len)
    if faults:
        raise SettingsError(faults)
    model: dict[str, Any] = {"task": task_of_data}
    for leaf, default in TASK_DEFAULTS[task_of_data].items():
        if settings.leaf(f"model.{leaf}") is None:
            model[leaf] = default
    length = settings.data.max_seq_len or (TEXT_SEQ_LEN if task_of_data == "lm" else puzzle_len)
    if task_of_data == "puzzle" and "data.max_seq_len" not in settings.given and puzzle_len is not None:
        # The length of a profile is meant for text.
        length = puzzle_len
    data: dict[str, Any] = {"max_seq_len": length}
    least, most = settings.data.min_vocab_size, settings.data.max_vocab_size
    if least > most and gives_way(settings, "data.min_vocab_size"):
        data["min_vocab_size"] = most
    elif least > most and gives_way(settings, "data.max_vocab_size"):
        data["max_vocab_size"] = least
    resolved = settings.model_copy(
        update={"model": settings.model.model_copy(update=model), "data": settings.data.model_copy(update=data)}
    )
    faults = broken_rules(resolved)
    if faults:
        raise SettingsError(faults)
    return resolved


def with_effective_batch(settings: RunSettings, world_size: int) -> RunSettings:
    """The settings with the accumulation that --effective-batch-size asks for.

    A batch size that the user did not give becomes the largest divisor. Raises SettingsError where there is none.
    """
    chosen, given = settings.optimizer, settings.given
    wanted = chosen.effective_batch_size
    if wanted is None:
        return settings
    workers = f" x {world_size} workers" if world_size > 1 else ""
    batch, share = chosen.batch_size, wanted // world_size
    if "optimizer.gradient_accumulation_steps" in given:
        accumulation = chosen.gradient_accumulation_steps
        if "optimizer.batch_size" not in given and wanted % (accumulation * world_size) == 0:
            batch = share // accumulation
        if batch * accumulation * world_size != wanted:
            both = f"--effective-batch-size {wanted} with --gradient-accumulation-steps {accumulation}"
            product = f"--batch-size {batch} x {accumulation}{workers} is {batch * accumulation * world_size}"
            raise SettingsError(Fault(both, product, "Give one of the two"))
    elif "optimizer.batch_size" not in given and wanted % world_size == 0:
        batch = next(size for size in range(min(batch, share), 0, -1) if share % size == 0)
    at_once = batch * world_size
    if wanted % at_once:
        below = wanted // at_once * at_once
        near = f"{below} or {below + at_once}" if below else f"{at_once}"
        value = f"--effective-batch-size {wanted}"
        what = f"--batch-size {batch}{workers} = {at_once}" if workers else f"--batch-size {batch}"
        raise SettingsError(Fault(value, f"is no multiple of {what}", f"Give {near}, or another --batch-size"))
    update = {"batch_size": batch, "gradient_accumulation_steps": wanted // at_once}
    return settings.model_copy(update={"optimizer": chosen.model_copy(update=update)})


MOE_LR = 1e-3
"""Learning rates above this are lowered to it where there are experts (FEATURES.md, M10)."""


def moderate_lr(settings: RunSettings) -> tuple[RunSettings, list[str]]:
    """The settings with a learning rate at which routers train stably, and a note if it was lowered."""
    chosen = settings.optimizer
    if not (settings.model.use_moe and chosen.auto_adjust_lr) or chosen.lr <= MOE_LR:
        return settings, []
    note = (
        f"--lr {chosen.lr:g} is lowered to {MOE_LR:g} because the model has experts; --no-auto-adjust-lr uses it as "
        "given."
    )
    return settings.model_copy(update={"optimizer": chosen.model_copy(update={"lr": MOE_LR})}), [note]


def fit_warmup(settings: RunSettings, steps: int) -> tuple[RunSettings, list[str]]:
    """The settings with a warm-up that fits into a run of `steps` weight updates, and a note if it was shortened.

    `steps` 0 is a run without an end. Only a default is shortened: raises SettingsError for a warm-up that the user
    gave.
    """
    warmup = settings.optimizer.warmup_steps
    if warmup < steps or not (warmup and steps):
        return settings, []
    if not gives_way(settings, "optimizer.warmup_steps"):
        reason = f"the run has {steps} steps, so the warm-up would last to its end"
        hint = f"Give at most --warmup-steps {max(0, steps - 1)}, or more --epochs"
        raise SettingsError(Fault(f"--warmup-steps {warmup}", reason, hint))
    shorter = steps // 10
    optimizer = settings.optimizer.model_copy(update={"warmup_steps": shorter})
    note = f"--warmup-steps {warmup} (default) is lowered to {shorter}: the run has {steps} steps."
    return settings.model_copy(update={"optimizer": optimizer}), [note]


def _contradictions(settings: RunSettings, task_of_data: Task, puzzle_len: int | None) -> list[Fault]:
    faults: list[Fault] = []
    names = {"lm": "text", "puzzle": "puzzles"}
    if settings.model.task not in (None, task_of_data):
        reason = f"the data is {names[task_of_data]}"
        faults.append(Fault(f"--task {settings.model.task}", reason, f"Give --task {task_of_data}, or other data"))
    length = settings.data.max_seq_len if "data.max_seq_len" in settings.given else None
    if task_of_data == "puzzle" and puzzle_len is not None and length not in (None, puzzle_len):
        reason = f"the puzzles of this data are {puzzle_len} tokens long and are read whole"
        faults.append(Fault(f"--max-seq-len {length}", reason, "Leave it out"))
    return faults

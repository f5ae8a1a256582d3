"""The length of the learning-rate schedule in weight updates."""

from __future__ import annotations

from hrm_ray.settings.tree import RunSettings


def schedule_length(
    settings: RunSettings, samples: int, effective_batch: int, halt_max_steps: int, *, first_samples: int | None = None
) -> int:
    """The length of the learning-rate schedule in weight updates.

    With --steps, that number (or what --epochs needs, if fewer). With --epochs alone, the batches of all epochs; in
    carried supervision a row stays for up to `halt_max_steps` updates, so the length is an upper bound, and the
    schedule may not reach its end. `first_samples` are those of the first epoch, if fewer than `samples`. --force-train
    adds one epoch.
    """
    limit = settings.run.step_limit
    if settings.run.epochs is None:
        return limit or 0
    longest = halt_max_steps if settings.model.supervision == "segment" else 1
    later = settings.run.epochs - 1 + settings.data.force_train
    first = samples if first_samples is None else first_samples
    needed = (-(-first // effective_batch) - later * (-samples // effective_batch)) * longest
    return needed if limit is None else min(limit, needed)

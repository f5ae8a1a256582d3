"""What a search found, as settings: laid over those of a run, as options, and as a file for `--config`."""

from __future__ import annotations

from typing import Any

import yaml

from hrm_ray.search.optimize import CHUNKED, Found, Search
from hrm_ray.settings.options import options
from hrm_ray.settings.tree import RunSettings, to_dotted

FILE_BEGINS = "# Written by `hrm-ray optimize`"
"""How a file of ours begins, which another search may replace."""


def found_leaves(search: Search, found: Found) -> dict[str, Any]:
    """The leaves that the search has decided, by dotted key."""
    at = search.settings_at(found.point)
    keys = ["optimizer.batch_size", "optimizer.gradient_accumulation_steps", "memory.gradient_checkpointing"]
    if found.point.context is not None:
        keys.append("data.max_seq_len")
    if search.is_text and at.data.tokenizer_path is None and not at.data.auto_vocab_size:
        # The default depends on the context, and with it the size of the model.
        keys.append("data.vocab_size")
    keys += [key for lever in found.point.levers for key in lever.leaves if key not in keys]
    if CHUNKED in found.point.levers:
        keys.append("memory.chunk_size")
    return {key: at.leaf(key) for key in keys}


def settings_with(settings: RunSettings, leaves: dict[str, Any]) -> RunSettings:
    """The settings of a user with what was found, as if the user had given it."""
    changed = settings.with_leaves({**leaves, "optimizer.effective_batch_size": None})
    given = (settings.given | leaves.keys()) - {"optimizer.effective_batch_size"}
    return changed.model_copy(update={"given": given})


def as_options(leaves: dict[str, Any]) -> str:
    """The leaves as a user writes them."""
    return " ".join(options()[key].written(value) for key, value in leaves.items())


def as_file(settings: RunSettings, about: str) -> str:
    """All that was given, as a file that `hrm-ray train --config` takes. `about` says what was found, in a line."""
    dotted = to_dotted(settings)
    sections: dict[str, dict[str, Any]] = {}
    for key in options():
        if key in settings.given and dotted[key] is not None:
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = dotted[key]
    return f"{FILE_BEGINS}: {about}.\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)}"

"""The ledger as a human-readable document, chunk_tracker_state.json, which is never read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from hrm_ray.ledger import ranges
from hrm_ray.ledger.reader import EpochCounts, LedgerBlock, LedgerReader
from hrm_ray.ledger.states import Range, State
from hrm_ray.rundir import write_json

SHUFFLED = "shuffled: 7[0:40] are the first places of chunk 7 in its window's order, not its sequences"
"""A shuffle window mixes the sequences of several chunks. Its order gives each chunk as many places as the chunk has
sequences; so counts of sequences are exact, and a chunk is trained as a whole once all places of its window are."""
_ENTRIES = 1000
"""Entries of each list at most; `..._left_out` counts the rest."""


def export(ledger: LedgerReader, path: Path) -> None:
    """Write the document atomically."""
    write_json(path, document(ledger))


def document(ledger: LedgerReader) -> dict[str, Any]:
    """The ledger in plain values: blocks, epochs with counts and ranges by state, head, rounds, quarantined ranges.

    A range is "7" for all of chunk 7, "7-19" for all of chunks 7 to 19, "7[0:40]" for its sequences 0 to 39, and
    "7[40:]" up to an end not known yet. Chunks that no epoch's list names are untouched. In a shuffled epoch the lists
    are called `places`: see SHUFFLED.
    """
    head, skipped = ledger.head, ledger.skipped()
    rounds = ({**asdict(one), "skipped_sequences": skipped.get(one.round, 0)} for one in ledger.lineage())
    aside = ({"epoch": one.epoch, "range": shown(one), "reason": one.reason} for one in ledger.quarantined())
    return {
        "data_ended": ledger.data_ended,
        "chunks": ledger.chunks,
        **_listed("blocks", _blocks(ledger.blocks())),
        "order": SHUFFLED if ledger.shuffled else "linear",
        "epoch": ledger.epoch,
        "epochs": [_epoch(ledger, one) for one in ledger.counts()],
        "head": None if head is None else head.round,
        **_listed("rounds", rounds),
        **_listed("quarantined", aside),
    }


def shown(one: Range) -> str:
    """A range in the document's notation."""
    return f"{one.chunk}[{one.start}:{'' if one.end is None else one.end}]"


def _epoch(ledger: LedgerReader, counts: EpochCounts) -> dict[str, Any]:
    """One epoch: its counts, and the chunks in each state."""
    lists = _ranges_by_state(ranges.of_epoch(ledger.database, counts.epoch))
    return {
        "epoch": counts.epoch,
        "complete": counts.complete,
        "chunks": counts.chunks,
        "untouched": counts.untouched,
        "states": {
            state.name: asdict(count) | _listed("places" if ledger.shuffled else "chunks", lists[state])
            for state, count in counts.states.items()
        },
    }


def _listed(name: str, entries: Iterable[Any]) -> dict[str, Any]:
    """The first entries under `name`, and the number of the others."""
    remaining = iter(entries)
    first = list(islice(remaining, _ENTRIES))
    left_out = sum(1 for _ in remaining)
    return {name: first, f"{name}_left_out": left_out} if left_out else {name: first}


def _blocks(blocks: list[LedgerBlock]) -> Iterator[dict[str, Any]]:
    """Blocks, with neighbours of the same length as one entry."""
    for (chunks, sealed), alike in groupby(blocks, key=lambda block: (block.chunks, block.sealed)):
        numbers = [block.block for block in alike]
        yield {"block": _span(numbers[0], numbers[-1]), "chunks": chunks, "sealed": sealed}


def _ranges_by_state(found: Iterable[Range]) -> dict[State, list[str]]:
    """The ranges of an epoch by state, neighbouring whole chunks as one entry. `found` is sorted by chunk and start."""
    lists: dict[State, list[str]] = {state: [] for state in State}
    first = last = 0
    running: State | None = None
    for chunk, parts in groupby(found, key=lambda one: one.chunk):
        alike: list[Range] = []
        for one in parts:
            if alike and alike[-1].state is one.state:
                alike[-1] = replace(alike[-1], end=one.end)
            else:
                alike.append(one)
        if len(alike) == 1 and alike[0].state is running and chunk == last + 1:
            last = chunk
            continue
        if running is not None:
            lists[running].append(_span(first, last))
        running = alike[0].state if len(alike) == 1 else None
        first = last = chunk
        if running is None:
            for one in alike:
                lists[one.state].append(shown(one))
    if running is not None:
        lists[running].append(_span(first, last))
    return lists


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"

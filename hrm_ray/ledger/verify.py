"""Checks the invariants of a ledger; each violation is a sentence.

(1) The ranges of every touched chunk lie end to end from its first sequence to its last, each in one state. (2) The
sequences MERGED are those of the rounds in the head's lineage. (3) A range is MERGED, or SKIPPED where its update was
skipped, if and only if its contribution was accepted by a round of that lineage. (4) The sequences MERGED and SKIPPED
up to a round are those that its checkpoint has counted itself, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hrm_ray.ledger import ranges
from hrm_ray.ledger.reader import LedgerReader, Round
from hrm_ray.ledger.states import Range, State

StoredCounts = Mapping[int, "tuple[int | None, int | None]"]
"""By round: samples trained and samples skipped, as its checkpoint has counted them; None where it did not."""


def violations(ledger: LedgerReader, stored: StoredCounts | None = None) -> Iterator[str]:
    """Every violation. Reads all rows. `stored` are the checkpoints' own counts."""
    yield from _blocks(ledger)
    lineage = {one.round: one for one in _sound_lineage(ledger)}
    merged = dict.fromkeys(lineage, 0)
    rounds: dict[int, int | None] = {
        number: taken for number, taken in ledger.database.each("SELECT number, round FROM contributions")
    }
    for epoch, start_chunk, cursor in ledger.database.rows("SELECT epoch, start_chunk, cursor FROM epochs"):
        yield from _epoch(ledger, epoch, start_chunk, cursor, lambda one: _standing(one, rounds, merged))
    yield from _rounds(ledger, lineage, merged)
    yield from _checkpoints(ledger, lineage, stored or {})


def _blocks(ledger: LedgerReader) -> Iterator[str]:
    expected = 0
    blocks = ledger.blocks()
    for number, block in enumerate(blocks):
        if block.block != number or block.first_chunk != expected:
            yield f"block {block.block} begins with chunk {block.first_chunk}, not block {number} with {expected}"
        if not block.sealed and (number < len(blocks) - 1 or ledger.data_ended):
            yield f"block {block.block} is open, but it is not the last one, or the data has ended"
        expected = block.first_chunk + block.chunks


def _sound_lineage(ledger: LedgerReader) -> list[Round]:
    """The lineage as far as it can be followed; it ends where it would repeat a round."""
    found: list[Round] = []
    seen: set[int] = set()
    for one in ledger.lineage():
        if one.round in seen:
            break
        seen.add(one.round)
        found.append(one)
    return found


def _epoch(
    ledger: LedgerReader, epoch: int, start_chunk: int, cursor: int, standing: Callable[[Range], Iterator[str]]
) -> Iterator[str]:
    """Invariant 1: every touched chunk once, whole, at a position of its own below the cursor; and `standing` of each
    range."""
    positions = bytearray(cursor)
    chunk, position, end, known = -1, -1, 0, ledger.chunks
    length: int | None = None
    for one in ranges.of_epoch(ledger.database, epoch):
        where = f"epoch {epoch}, chunk {one.chunk}"
        if one.chunk != chunk:
            yield from _ended(epoch, chunk, end, length)
            chunk, position, end, length = one.chunk, one.position, 0, ledger.sequences(one.chunk)
            if not start_chunk <= chunk < known:
                yield f"{where}: no block has it, or the epoch does not begin before it"
            if not 0 <= position < cursor or positions[position]:
                yield f"{where}: its position {position} is another chunk's, or was not given out"
            else:
                positions[position] = 1
        if one.position != position:
            yield f"{where}: its sequences from {one.start} are at position {one.position}, not {position}"
        if one.start != end:
            count = "no range" if one.start > end else "two ranges"
            yield f"{where}: sequences {min(end, one.start)} to {max(end, one.start)} are in {count}"
        if (one.end is None) != (length is None):
            yield f"{where}: its range from {one.start} ends at {one.end}, but the chunk has {length} sequences"
        end = one.start if one.end is None else one.end
        yield from standing(one)
    yield from _ended(epoch, chunk, end, length)
    missing = cursor - sum(positions)
    if missing:
        yield f"epoch {epoch}: {missing} of the {cursor} positions given out have no range"


def _ended(epoch: int, chunk: int, end: int, length: int | None) -> Iterator[str]:
    if length is not None and end != length:
        yield f"epoch {epoch}, chunk {chunk}: its ranges end at {end}, but it has {length} sequences"


def _standing(one: Range, rounds: dict[int, int | None], merged: dict[int, int]) -> Iterator[str]:
    """Invariant 3, and the columns that each state needs; adds up what each round has merged."""
    where = f"epoch {one.epoch}, chunk {one.chunk}, sequences from {one.start}"
    held, reported = one.worker is not None, one.contribution is not None
    committed = one.state in (State.MERGED, State.SKIPPED)
    if held != (one.state is State.LEASED) or reported != (committed or one.state is State.TRAINED):
        yield f"{where}: it is {one.state.name} with worker {one.worker} and contribution {one.contribution}"
    if one.contribution is None:
        return
    if one.contribution not in rounds:
        yield f"{where}: it is {one.state.name} by contribution {one.contribution}, which does not exist"
        return
    taken = rounds[one.contribution]
    if taken in merged and one.state is not State.SKIPPED:
        merged[taken] += one.sequences
    if one.state in (State.MERGED, State.SKIPPED) and (one.reason is None) != (one.state is State.MERGED):
        yield f"{where}: it is {one.state.name}, with the reason {one.reason!r} for a skipped update"
    if committed != (taken in merged):
        by = "no round of the lineage" if taken not in merged else f"round {taken}"
        yield f"{where}: it is {one.state.name}, but its contribution was accepted by {by}"


def _rounds(ledger: LedgerReader, lineage: dict[int, Round], merged: dict[int, int]) -> Iterator[str]:
    """Invariant 2, and that there is no round outside the lineage."""
    head = ledger.database.row("SELECT value FROM facts WHERE name = 'head'")
    if head is not None and head[0] is not None and head[0] not in lineage:
        yield f"the head is round {head[0]}, which does not exist"
    total = sum(one.sequences for one in lineage.values())
    if sum(merged.values()) != total:
        yield f"{sum(merged.values())} sequences are merged, but the rounds of the lineage count {total}"
    for one in lineage.values():
        if merged[one.round] != one.sequences:
            yield f"round {one.round} counts {one.sequences} sequences, but {merged[one.round]} are merged by it"
        before = lineage[one.parent].total_sequences if one.parent in lineage else 0
        if one.total_sequences != before + one.sequences:
            yield f"round {one.round} says {one.total_sequences} sequences in all, not {before + one.sequences}"
        if one.parent is not None and one.parent not in lineage:
            yield f"round {one.round} has the parent {one.parent}, which does not exist"
    for (stray,) in ledger.database.rows("SELECT round FROM rounds"):
        if stray not in lineage:
            yield f"round {stray} is not in the lineage of the head"
    for name, taken in ledger.database.rows("SELECT name, round FROM contributions WHERE round IS NOT NULL"):
        if taken not in lineage:
            yield f"contribution {name} was accepted by round {taken}, which is not in the lineage of the head"


def _checkpoints(ledger: LedgerReader, lineage: dict[int, Round], stored: StoredCounts) -> Iterator[str]:
    """Invariant 4. The checkpoint counts what the training loop did, the ledger what the loader handed out."""
    skipped_by_round, skipped = ledger.skipped(), 0
    for one in reversed(lineage.values()):
        skipped += skipped_by_round.get(one.round, 0)
        for name, own, counted in zip(
            ("MERGED", "SKIPPED"), (one.total_sequences, skipped), stored.get(one.round, (None, None)), strict=True
        ):
            if counted is not None and counted != own:
                yield f"round {one.round}: {own} sequences are {name} up to it, but {one.anchor} has counted {counted}"

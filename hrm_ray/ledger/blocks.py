"""Blocks as they become known, and the next chunk that nobody has touched.

One job: what data there is, as far as the ledger is told, and where each epoch's order has come to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import ranges
from hrm_ray.ledger.ranges import ClaimOrder
from hrm_ray.ledger.reader import Block, LedgerReader
from hrm_ray.ledger.states import Idle, Range


@dataclass(frozen=True)
class BlockLength:
    """How many chunks a block has: so far, or, once `sealed`, for good."""

    block: int
    chunks: int
    sealed: bool = True


def add_blocks(ledger: LedgerReader, blocks: Iterable[BlockLength]) -> None:
    """Add blocks or let the last one grow; what is known already may be told again. Inside a transaction.

    Chunks are numbered through all blocks, so only the last block can be open. Raises DataError where the data is not
    what it was, ValueError for a block out of turn.
    """
    row = ledger.database.row("SELECT block, first_chunk, chunks, sealed FROM blocks ORDER BY block DESC LIMIT 1")
    last = Block(row[0], row[1], row[2], bool(row[3])) if row is not None else Block(-1, 0, 0, True)
    changed: dict[int, Block] = {}
    for told in blocks:
        if told.block == last.block + 1 and last.sealed:
            if ledger.data_ended:
                raise _changed(ledger, told, f"the data ended with block {last.block} before")
            last = Block(told.block, last.first_chunk + last.chunks, told.chunks, told.sealed)
        elif told.block == last.block and not last.sealed:
            if told.chunks < last.chunks:
                raise _changed(ledger, told, f"it had {last.chunks} chunks before")
            last = Block(last.block, last.first_chunk, told.chunks, told.sealed)
        else:
            _check_known(ledger, told, changed.get(told.block))
            continue
        changed[last.block] = last
    ledger.database.write(
        "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", [tuple(vars(block).values()) for block in changed.values()]
    )


def next_untouched(ledger: LedgerReader, order: ClaimOrder, epochs: int | None) -> Range | Idle:
    """The next chunk in order that has no row yet, now with one: PENDING. Inside a transaction.

    Where an epoch is at its end, the next one begins: the caller has seen that nothing is PENDING.
    """
    known = ledger.chunks
    if not known:
        return Idle.DONE if ledger.data_ended else Idle.MORE_DATA
    while True:
        row = ledger.database.row("SELECT epoch, start_chunk, cursor FROM epochs ORDER BY epoch DESC LIMIT 1")
        epoch, start_chunk, cursor = row if row is not None else (-1, known, 0)
        if start_chunk + cursor < known:
            if epochs is not None and epoch >= epochs:
                return _rest(ledger, epochs)
            return _touch(ledger, order, epoch, start_chunk, cursor)
        if epoch >= 0 and not ledger.data_ended:
            return Idle.MORE_DATA
        if epochs is not None and epoch + 1 >= epochs:
            return _rest(ledger, epochs)
        ledger.database.rows("INSERT INTO epochs VALUES (?, 0, 0)", (epoch + 1,))


def _touch(ledger: LedgerReader, order: ClaimOrder, epoch: int, start_chunk: int, position: int) -> Range | Idle:
    """Write the first row of the chunk at a position, and move the epoch's cursor past it."""
    chunk = order(epoch, position)
    if chunk is None:
        return Idle.MORE_DATA
    if not start_chunk <= chunk < ledger.chunks:
        raise ValueError(f"the order of epoch {epoch} has chunk {chunk}, outside {start_chunk}..{ledger.chunks - 1}")
    untouched = Range(epoch, position, 0, int(chunk), ledger.sequences(chunk))
    ranges.add(ledger.database, untouched)
    ledger.database.rows("UPDATE epochs SET cursor = ? WHERE epoch = ?", (position + 1, epoch))
    return untouched


def _rest(ledger: LedgerReader, epochs: int) -> Idle:
    """Nothing of the epochs asked for is PENDING: is anything still on its way?"""
    return Idle.OTHERS if ledger.epoch < epochs else Idle.DONE


def _check_known(ledger: LedgerReader, told: BlockLength, added: Block | None) -> None:
    row = ledger.database.row("SELECT chunks FROM blocks WHERE block = ?", (told.block,))
    chunks = added.chunks if added is not None else row[0] if row is not None else None
    if chunks is None:
        raise ValueError(f"block {told.block} is told before the one before it is sealed")
    if told.chunks > chunks or (told.sealed and told.chunks != chunks):
        raise _changed(ledger, told, f"it had {chunks} chunks before")


def _changed(ledger: LedgerReader, told: BlockLength, reason: str) -> DataError:
    value = f"block {told.block} with {told.chunks} chunks"
    return DataError(
        Fault(value, f"the data is not what {ledger.path} knows: {reason}", "Restore the data, or train anew")
    )

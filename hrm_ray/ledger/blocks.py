"""Adds blocks as they are found, and gives the next chunk of an epoch its first row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import ranges
from hrm_ray.ledger.ranges import ClaimOrder
from hrm_ray.ledger.reader import LedgerBlock, LedgerReader
from hrm_ray.ledger.states import Idle, Range


@dataclass(frozen=True)
class BlockLength:
    """How many chunks a block has; the number is final once `sealed`."""

    block: int
    chunks: int
    sealed: bool = True


def add_blocks(ledger: LedgerReader, blocks: Iterable[BlockLength]) -> None:
    """Add blocks, or grow the last one; known blocks may be added again. Call inside a transaction.

    Chunks are numbered through all blocks, so only the last block can be open. Raises DataError where the data has
    changed, ValueError for a block out of order.
    """
    row = ledger.database.row("SELECT block, first_chunk, chunks, sealed FROM blocks ORDER BY block DESC LIMIT 1")
    last = LedgerBlock(row[0], row[1], row[2], bool(row[3])) if row is not None else LedgerBlock(-1, 0, 0, True)
    changed: dict[int, LedgerBlock] = {}
    for block in blocks:
        if block.block == last.block + 1 and last.sealed:
            if ledger.data_ended:
                raise _changed(ledger, block, f"the data ended with block {last.block} before")
            last = LedgerBlock(block.block, last.first_chunk + last.chunks, block.chunks, block.sealed)
        elif block.block == last.block and not last.sealed:
            if block.chunks < last.chunks:
                raise _changed(ledger, block, f"it had {last.chunks} chunks before")
            last = LedgerBlock(last.block, last.first_chunk, block.chunks, block.sealed)
        else:
            row = ledger.database.row("SELECT chunks FROM blocks WHERE block = ?", (block.block,))
            added = changed.get(block.block)
            chunks = added.chunks if added is not None else row[0] if row is not None else None
            if chunks is None:
                raise ValueError(f"block {block.block} is added before the one before it is sealed")
            if block.chunks > chunks or (block.sealed and block.chunks != chunks):
                raise _changed(ledger, block, f"it had {chunks} chunks before")
            continue
        changed[last.block] = last
    ledger.database.write(
        "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", [tuple(vars(one).values()) for one in changed.values()]
    )


def next_untouched(ledger: LedgerReader, order: ClaimOrder, epochs: int | None) -> Range | Idle:
    """Give the next chunk in order its first row, PENDING. Call inside a transaction, when no range is PENDING.

    At the end of an epoch the next one begins.
    """
    known = ledger.chunks
    if not known:
        return Idle.DONE if ledger.data_ended else Idle.MORE_DATA
    while True:
        row = ledger.database.row("SELECT epoch, start_chunk, cursor FROM epochs ORDER BY epoch DESC LIMIT 1")
        epoch, start_chunk, cursor = row if row is not None else (-1, known, 0)
        if start_chunk + cursor < known:
            if epochs is not None and epoch >= epochs:
                return _idle_reason(ledger, epochs)
            break
        if epoch >= 0 and not ledger.data_ended:
            return Idle.MORE_DATA
        if epochs is not None and epoch + 1 >= epochs:
            return _idle_reason(ledger, epochs)
        ledger.database.rows("INSERT INTO epochs VALUES (?, 0, 0)", (epoch + 1,))
    chunk = order(epoch, cursor)
    if chunk is None:
        return Idle.MORE_DATA
    if not start_chunk <= chunk < ledger.chunks:
        raise ValueError(f"the order of epoch {epoch} has chunk {chunk}, outside {start_chunk}..{ledger.chunks - 1}")
    untouched = Range(epoch, cursor, 0, int(chunk), ledger.sequences(chunk))
    ranges.add(ledger.database, untouched)
    ledger.database.rows("UPDATE epochs SET cursor = ? WHERE epoch = ?", (cursor + 1, epoch))
    return untouched


def _idle_reason(ledger: LedgerReader, epochs: int) -> Idle:
    """Why nothing of the requested epochs is PENDING: whether anything is still LEASED or TRAINED."""
    return Idle.OTHERS if ledger.epoch < epochs else Idle.DONE


def _changed(ledger: LedgerReader, block: BlockLength, reason: str) -> DataError:
    value = f"block {block.block} with {block.chunks} chunks"
    return DataError(Fault(value, f"the data differs from {ledger.path}: {reason}", "Restore the data, or train again"))

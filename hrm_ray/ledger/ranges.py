"""Queries and updates of the table `ranges`. The transitions between states are in `states`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TypeAlias

from hrm_ray.ledger.database import Database, SqlRow
from hrm_ray.ledger.states import Range, State, join

ClaimOrder: TypeAlias = Callable[[int, int], "int | None"]
"""(epoch, position) -> chunk number: a permutation of the epoch's chunks, and a pure function. Positions count from 0
over the chunks known, without those before the first epoch's start. None: the position is not decided yet (an order
that waits for a block's end)."""

_NAMES = tuple(field.name for field in fields(Range))
_COLUMNS = ", ".join(_NAMES)
_INSERT = f"INSERT INTO ranges ({_COLUMNS}) VALUES ({', '.join('?' for _ in _NAMES)})"
_KEY = ("epoch", "position", "start")
_PUT = (
    f"{_INSERT} ON CONFLICT ({', '.join(_KEY)})"
    f" DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _NAMES if name not in _KEY)}"
)
_STATE = _NAMES.index("state")
_STATES = tuple(State)
_UNSETTLED = ((State.PENDING, "pending"), (State.LEASED, "leased"), (State.TRAINED, "trained"))


def put(database: Database, *changed: Range) -> None:
    """Insert or replace `changed`; a range replaces the one that begins at the same sequence."""
    put_all(database, changed)


def put_all(database: Database, changed: Iterable[Range]) -> None:
    """Like `put`, for an iterable."""
    database.write(_PUT, map(_row, changed))


def add(database: Database, untouched: Range) -> None:
    """Insert the first row of a chunk in an epoch. Raises ValueError where the chunk had another position before."""
    try:
        database.rows(_INSERT, _row(untouched))
    except sqlite3.IntegrityError:
        before = at(database, untouched.epoch, untouched.chunk, untouched.start)
        place = before.position if before is not None else "?"
        raise ValueError(
            f"the order of epoch {untouched.epoch} has chunk {untouched.chunk} at two positions, {place} and"
            f" {untouched.position}"
        ) from None


def at(database: Database, epoch: int, chunk: int, start: int) -> Range | None:
    """The range that begins at a sequence, or None."""
    row = database.row(
        f"SELECT {_COLUMNS} FROM ranges WHERE epoch = ? AND chunk = ? AND start = ?", (epoch, chunk, start)
    )
    return _range(row) if row is not None else None


def first_pending(database: Database, epochs: int | None) -> Range | None:
    """Take the first PENDING range in order that has a row, of the epochs before `epochs`.

    The PENDING ranges that follow it in its chunk are joined to it, so that returned pieces are leased as one again;
    their rows are deleted, so the caller must write the result. Call inside a transaction.
    """
    row = database.row(
        f"SELECT {_COLUMNS} FROM ranges INDEXED BY pending WHERE state = 0 AND epoch < ?"
        " ORDER BY epoch, position, start LIMIT 1",
        (2**62 if epochs is None else epochs,),
    )
    if row is None:
        return None
    found = _range(row)
    while found.end is not None:
        following = at(database, found.epoch, found.chunk, found.end)
        if following is None or following.state is not State.PENDING or following.start == found.start:
            break
        database.rows(
            "DELETE FROM ranges WHERE epoch = ? AND position = ? AND start = ?",
            (following.epoch, following.position, following.start),
        )
        found = join(found, following)
    return found


def any_pending(database: Database, epochs: int | None) -> bool:
    """Whether a range with a row is PENDING, of the epochs before `epochs`."""
    statement = "SELECT 1 FROM ranges INDEXED BY pending WHERE state = 0 AND epoch < ? LIMIT 1"
    return database.row(statement, (2**62 if epochs is None else epochs,)) is not None


def expired(database: Database, now_s: float) -> list[Range]:
    """LEASED ranges that have expired by `now_s`."""
    return _many(database, "leased", "WHERE state = 1 AND expiry_s <= ?", now_s)


def leased_by(database: Database, worker: str) -> list[Range]:
    """A worker's LEASED ranges, in the order of claims."""
    return _many(database, "leased", "WHERE state = 1 AND worker = ? ORDER BY epoch, position, start", worker)


def leased(database: Database) -> list[Range]:
    """All LEASED ranges."""
    return _many(database, "leased", "WHERE state = 1")


def of_contribution(database: Database, number: int) -> list[Range]:
    """The ranges of a contribution, by its number."""
    return _many(database, "of_contribution", "WHERE contribution = ? ORDER BY epoch, position, start", number)


def quarantined(database: Database) -> list[Range]:
    """The QUARANTINED ranges, in the order of claims."""
    return _many(database, "quarantined", "WHERE state = 4 ORDER BY epoch, position, start")


def unmeasured(database: Database, chunk: int) -> list[Range]:
    """The ranges of a chunk, one per epoch, whose end is unknown because the chunk was not measured."""
    return _many(database, "unmeasured", "WHERE end IS NULL AND chunk = ?", chunk)


def earliest_epoch(database: Database) -> int | None:
    """The first epoch with a PENDING, LEASED or TRAINED range that has a row."""
    found = (
        database.row(f"SELECT min(epoch) FROM ranges INDEXED BY {index} WHERE state = {state.value}")
        for state, index in _UNSETTLED
    )
    return min((row[0] for row in found if row is not None and row[0] is not None), default=None)


def unsettled(database: Database, epoch: int) -> bool:
    """Whether an epoch has a PENDING, LEASED or TRAINED range that has a row."""
    return any(
        database.row(f"SELECT 1 FROM ranges INDEXED BY {index} WHERE state = {state.value} AND epoch = ?", (epoch,))
        for state, index in _UNSETTLED
    )


def of_epoch(database: Database, epoch: int) -> Iterator[Range]:
    """All ranges of an epoch that have a row, by chunk and start."""
    for row in database.each(f"SELECT {_COLUMNS} FROM ranges WHERE epoch = ? ORDER BY chunk, start", (epoch,)):
        yield _range(row)


def _many(database: Database, index: str, where: str, *values: object) -> list[Range]:
    # The index is named because the planner would otherwise scan the table to avoid sorting.
    rows = database.rows(f"SELECT {_COLUMNS} FROM ranges INDEXED BY {index} {where}", values)
    return [_range(row) for row in rows]


def _row(changed: Range) -> SqlRow:
    return tuple(vars(changed).values())


def _range(row: SqlRow) -> Range:
    values = list(row)
    values[_STATE] = _STATES[values[_STATE]]
    return Range(*values)

"""The ledger's rows of ranges: found, put, and the untouched ones as if they were there.

One job: ranges in and out of the database. Which transition a range makes is decided in `states`, and when, by the
callers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TypeAlias

from hrm_ray.ledger.database import Database, Row
from hrm_ray.ledger.states import Range, State, join

ClaimOrder: TypeAlias = Callable[[int, int], "int | None"]
"""(epoch, position) -> chunk number: a permutation of the epoch's chunks, pure, so that a claimed position needs no
more than its number. Positions go from 0 to the number of chunks known (less those before the first epoch's start) - 1.
None: this position is not laid down yet (an order that waits for a block's end)."""

_NAMES = tuple(field.name for field in fields(Range))
_COLUMNS = ", ".join(_NAMES)
_PLACES = ", ".join("?" for _ in _NAMES)


def put(database: Database, *changed: Range) -> None:
    """Write ranges in place of those at the same (epoch, chunk, start)."""
    put_all(database, changed)


def put_all(database: Database, changed: Iterable[Range]) -> None:
    """Write many ranges in place of those at the same (epoch, chunk, start)."""
    database.write(f"INSERT OR REPLACE INTO ranges ({_COLUMNS}) VALUES ({_PLACES})", map(_row, changed))


def add(database: Database, untouched: Range) -> None:
    """Write the first row of a chunk in an epoch. Raises ValueError where the chunk was at another position before."""
    try:
        database.rows(f"INSERT INTO ranges ({_COLUMNS}) VALUES ({_PLACES})", _row(untouched))
    except sqlite3.IntegrityError:
        before = at(database, untouched.epoch, untouched.chunk, untouched.start)
        place = before.position if before is not None else "?"
        raise ValueError(
            f"the order of epoch {untouched.epoch} has chunk {untouched.chunk} at positions {place} and"
            f" {untouched.position}"
        ) from None


def at(database: Database, epoch: int, chunk: int, start: int) -> Range | None:
    """The range that begins there."""
    row = database.row(
        f"SELECT {_COLUMNS} FROM ranges WHERE epoch = ? AND chunk = ? AND start = ?", (epoch, chunk, start)
    )
    return _range(row) if row is not None else None


def first_pending(database: Database, epochs: int | None) -> Range | None:
    """The PENDING range that has a row and comes first in order, of the epochs before `epochs`.

    It takes in the PENDING ranges that follow it in its chunk: pieces that came back are given out as one again.
    """
    row = database.row(
        f"SELECT {_COLUMNS} FROM ranges WHERE state = 0 AND epoch < ? ORDER BY epoch, position, start LIMIT 1",
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
            "DELETE FROM ranges WHERE epoch = ? AND chunk = ? AND start = ?",
            (following.epoch, following.chunk, following.start),
        )
        found = join(found, following)
    return found


def expired(database: Database, now_s: float) -> list[Range]:
    """LEASED ranges whose time has run out at `now_s`."""
    return _many(database, "WHERE state = 1 AND expiry_s <= ?", now_s)


def leased_by(database: Database, worker: str) -> list[Range]:
    """What a worker holds, in the order of claims."""
    return _many(database, "WHERE state = 1 AND worker = ? ORDER BY epoch, position, start", worker)


def leased(database: Database) -> list[Range]:
    """What is held by anyone."""
    return _many(database, "WHERE state = 1")


def of_contribution(database: Database, number: int) -> list[Range]:
    """What was trained in a report."""
    return _many(database, "WHERE contribution = ? ORDER BY epoch, position, start", number)


def quarantined(database: Database) -> list[Range]:
    """What was put aside, in the order of claims."""
    return _many(database, "WHERE state = 4 ORDER BY epoch, position, start")


def unmeasured(database: Database, chunk: int) -> list[Range]:
    """The rows of a chunk, one per epoch, whose end is not known."""
    return _many(database, "WHERE end IS NULL AND chunk = ?", chunk)


def every(database: Database, epoch: int) -> Iterator[Range]:
    """All ranges of an epoch that have a row, by chunk and start."""
    for row in database.each(f"SELECT {_COLUMNS} FROM ranges WHERE epoch = ? ORDER BY chunk, start", (epoch,)):
        yield _range(row)


def _many(database: Database, where: str, *values: object) -> list[Range]:
    return [_range(row) for row in database.rows(f"SELECT {_COLUMNS} FROM ranges {where}", values)]


def _row(changed: Range) -> Row:
    return tuple(vars(changed).values())


def _range(row: Row) -> Range:
    plain = dict(zip(_NAMES, row, strict=True))
    plain["state"] = State(plain["state"])
    return Range(**plain)

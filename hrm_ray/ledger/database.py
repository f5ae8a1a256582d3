"""The ledger's SQLite file: its tables, who may write it, and what a commit outlives.

One job: open the file as its one owner or for reading, and make transactions. It does not know what the rows mean.

Every commit outlives the death of the process: WAL keeps it in the operating system's hands. Only a `durable` one waits
for the disk (synchronous=FULL) and so outlives power loss too. Those are the commits on which something outside the
file rests: a round (checkpoints and anchors refer to it), a rollback, the generation of a worker (an older one may live
on elsewhere). A claim or a report that power loss takes is trained again. WAL keeps the order: what came before a
durable commit is durable with it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from hrm_ray.errors import DataError, Fault, HrmRayError, ResourceError, SettingsError, UnavailableError

Row: TypeAlias = tuple[Any, ...]

FORMAT = 1
_APPLICATION_ID = 0x48524C47
"""Marks the file as a ledger of ours ("HRLG")."""
_BUSY_TIMEOUT_S = 30.0
_BESIDE = ("-wal", "-shm")
"""SQLite's own files beside the ledger while it is open, and after a kill."""

_SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID",
    "INSERT INTO facts VALUES ('owner', 0), ('data_ended', 0), ('head', NULL)",
    "CREATE TABLE blocks (block INTEGER PRIMARY KEY, first_chunk INTEGER NOT NULL, chunks INTEGER NOT NULL,"
    " sealed INTEGER NOT NULL)",
    "CREATE INDEX block_of_chunk ON blocks (first_chunk)",
    "CREATE TABLE measured (chunk INTEGER PRIMARY KEY, sequences INTEGER NOT NULL)",
    # Positions from the cursor on are untouched: PENDING without a row.
    "CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, start_chunk INTEGER NOT NULL, cursor INTEGER NOT NULL)",
    "CREATE TABLE workers (worker TEXT PRIMARY KEY, generation INTEGER NOT NULL, active INTEGER NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TABLE claims (key TEXT PRIMARY KEY, worker TEXT NOT NULL, generation INTEGER NOT NULL,"
    " attempt INTEGER NOT NULL, epoch INTEGER NOT NULL, chunk INTEGER NOT NULL, start INTEGER NOT NULL) WITHOUT ROWID",
    # By position, so that what is claimed together lies together, however the order shuffles the chunks.
    "CREATE TABLE ranges (epoch INTEGER NOT NULL, position INTEGER NOT NULL, start INTEGER NOT NULL,"
    " chunk INTEGER NOT NULL, end INTEGER, state INTEGER NOT NULL, worker TEXT, generation INTEGER,"
    " attempt INTEGER NOT NULL, expiry_s REAL, failures INTEGER NOT NULL, rejections INTEGER NOT NULL,"
    " contribution INTEGER, reason TEXT,"
    " PRIMARY KEY (epoch, position, start)) WITHOUT ROWID",
    "CREATE UNIQUE INDEX of_chunk ON ranges (epoch, chunk, start)",
    # Partial indices: each holds only the rows that its question is about, so that a claim costs the same to the end.
    "CREATE INDEX pending ON ranges (epoch, position, start) WHERE state = 0",
    "CREATE INDEX leased ON ranges (expiry_s) WHERE state = 1",
    "CREATE INDEX trained ON ranges (epoch) WHERE state = 2",
    "CREATE INDEX quarantined ON ranges (epoch) WHERE state = 4",
    "CREATE INDEX unmeasured ON ranges (chunk) WHERE end IS NULL",
    "CREATE INDEX of_contribution ON ranges (contribution) WHERE contribution IS NOT NULL",
    "CREATE TABLE contributions (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, worker TEXT NOT NULL,"
    " generation INTEGER NOT NULL, base INTEGER, path TEXT NOT NULL, checksum TEXT NOT NULL,"
    " sequences INTEGER NOT NULL, round INTEGER, place INTEGER)",
    "CREATE INDEX of_round ON contributions (round, place)",
    "CREATE TABLE rounds (round INTEGER PRIMARY KEY, parent INTEGER, anchor TEXT NOT NULL, checksum TEXT NOT NULL,"
    " sequences INTEGER NOT NULL, total_sequences INTEGER NOT NULL)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)


class Database:
    """An open ledger file. Its methods may be called from several threads: they take turns."""

    def __init__(self, path: Path, connection: sqlite3.Connection, owner: int | None, durable: bool) -> None:
        self.path = path
        self._connection = connection
        self._owner = owner
        self._may_wait = durable
        self._lock = threading.RLock()
        self._open = False
        self._waits = False

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """All rows of one statement. Raises an HrmRayError where the file fails."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def row(self, statement: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row of one statement, or None."""
        found = self.rows(statement, values)
        return found[0] if found else None

    def each(self, statement: str, values: Sequence[Any] = ()) -> Iterator[Row]:
        """Rows one by one, for many; nothing may be written meanwhile."""
        with self._lock:
            try:
                yield from self._connection.execute(statement, values)
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def write(self, statement: str, many: Iterable[Sequence[Any]]) -> None:
        """One statement for each of many rows, in the open transaction."""
        with self._lock:
            try:
                self._connection.executemany(statement, many)
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[None]:
        """All or nothing of what is done inside; one inside another joins it.

        Raises DataError where another owner has opened the file since: this one is then too old to write.
        """
        with self._lock:
            if self._open:
                if durable and not self._waits:
                    raise RuntimeError("a durable transaction cannot join one that is not")
                yield
                return
            self._waits = durable
            if self._may_wait:
                self.rows(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self.rows("BEGIN IMMEDIATE")
            self._open = True
            try:
                self._check_owner()
                yield
                self.rows("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._open = False

    def copy_to(self, path: Path) -> None:
        """Copy all of it, as it is seen now, into the new file `path`."""
        with self._lock, closing(sqlite3.connect(path)) as target:
            try:
                self._connection.backup(target)
            except sqlite3.Error as error:
                raise fault_of(error, path) from error

    def close(self) -> None:
        """Give the file back; what was committed is in it."""
        with self._lock:
            self._connection.close()

    def _check_owner(self) -> None:
        found = self.row("SELECT value FROM facts WHERE name = 'owner'")
        if found is None or found[0] != self._owner:
            reason = "another process has opened this run's ledger since, and is its owner now"
            raise DataError(Fault(str(self.path), reason, "End one of the two runs of this bundle"))


def own(path: Path, durable: bool = True) -> Database:
    """Open the file at `path` for writing, made anew where there is none; whoever had it may write no more.

    That is a fence, not a lock: one left by a process that hangs or died would be in the way of the next. Without
    `durable` no commit waits for the disk: for what need not outlive power loss.
    """
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise fault_of(error, path) from error
    try:
        owner = _take_over(path, connection, durable)
    except sqlite3.Error as error:
        connection.close()
        raise fault_of(error, path) from error
    except BaseException:
        connection.close()
        raise
    return Database(path, connection, owner, durable)


def _take_over(path: Path, connection: sqlite3.Connection, durable: bool) -> int:
    """Make the tables where there are none, and count the owner; gives its number."""
    _check_kind(path, connection, empty_allowed=True)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        reason = f"its file system does not allow SQLite's write-ahead log (it gives {mode!r})"
        raise UnavailableError(Fault(str(path), reason, "Put the bundle on a local disk"))
    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk there
    connection.execute("BEGIN IMMEDIATE")
    if _check_kind(path, connection, empty_allowed=True):
        for statement in _SCHEMA:
            connection.execute(statement)
    connection.execute("UPDATE facts SET value = value + 1 WHERE name = 'owner'")
    (owner,) = connection.execute("SELECT value FROM facts WHERE name = 'owner'").fetchone()
    connection.execute("COMMIT")
    return int(owner)


def read(path: Path) -> Database:
    """Open the file for reading, as of now; neither it nor its owner notices.

    Where nothing lies beside the file nobody has it open, and it is read as if on a read-only medium: else SQLite would
    leave files beside it. Raises SettingsError where there is none, DataError for another file.
    """
    if not path.is_file():
        hint = "Give the folder of a run that hrm-ray train wrote"
        raise SettingsError(Fault(str(path), "there is no ledger of chunks", hint))
    idle = not path.with_name(path.name + _BESIDE[0]).exists()
    place = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if idle else ''}"
    try:
        connection = sqlite3.connect(
            place, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise fault_of(error, path) from error
    try:
        connection.execute("BEGIN")  # all that is read is of one moment
        _check_kind(path, connection, empty_allowed=False)
    except sqlite3.Error as error:
        connection.close()
        raise fault_of(error, path) from error
    except BaseException:
        connection.close()
        raise
    return Database(path, connection, None, durable=False)


def copy(path: Path, to: Path) -> None:
    """Copy a ledger, where there is one, as it stands now; `to` is a new file. Its owner is not disturbed."""
    if path.is_file():
        source = read(path)
        try:
            source.copy_to(to)
        finally:
            source.close()


def delete(path: Path) -> None:
    """Delete a ledger that nobody has open, with what SQLite may have left beside it: a log left behind would be
    played into the next file of that name."""
    for name in (*(path.name + ending for ending in _BESIDE), path.name):
        path.with_name(name).unlink(missing_ok=True)


def _check_kind(path: Path, connection: sqlite3.Connection, *, empty_allowed: bool) -> bool:
    """Whether the file is still empty; DataError where it is not a ledger that this version reads."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if empty_allowed and not tables and not kind:
        return True
    if kind != _APPLICATION_ID or not tables:
        raise DataError(Fault(str(path), "it is no ledger of chunks", "Restore it, or delete it and train anew"))
    if version != FORMAT:
        reason = f"it is a ledger of format {version}, and this version reads {FORMAT}"
        raise DataError(Fault(str(path), reason, "Use the version of hrm_ray that wrote it"))
    return False


def fault_of(error: sqlite3.Error, path: Path) -> HrmRayError:
    """What a failure of SQLite means for a person."""
    said = str(error)
    if "is full" in said or "disk I/O" in said:
        return ResourceError(
            Fault(str(path), f"the ledger cannot be written ({said})", "Check the disk and its free space")
        )
    if "locked" in said or "busy" in said:
        reason = f"another process has kept it locked for {_BUSY_TIMEOUT_S:g} s"
        return ResourceError(Fault(str(path), reason, "End the other run of this bundle, then go on with --resume"))
    if "unable to open" in said or "readonly" in said:
        return ResourceError(Fault(str(path), f"it cannot be opened ({said})", "Check the folder and its permissions"))
    return DataError(Fault(str(path), f"it cannot be read as a ledger ({said})", "Restore it, or train anew"))

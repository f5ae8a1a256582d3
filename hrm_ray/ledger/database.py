"""The ledger's SQLite file: its tables, its single owner, its readers, and how durable a commit is.

A commit survives the death of the process. Only a `durable` commit waits for the disk and survives power loss too: a
round (checkpoints and anchors refer to it), a rollback, a worker's generation. A claim or report lost to a power
failure is trained again; the order of commits is kept.

On a local disk the journal is a write-ahead log (WAL), in which a commit that is not durable waits for nothing. WAL
needs memory shared by all processes that have the file open, which a network file system cannot give: there the
journal is SQLite's rollback journal, and each commit waits for the disk. A reader copies the file into memory and
closes it, so that it never keeps the owner waiting.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from hrm_ray.atomic_files import atomic_path
from hrm_ray.errors import DataError, DiskError, Fault, HrmRayError, ResourceError, SettingsError

SqlRow: TypeAlias = tuple[Any, ...]

FORMAT = 2
"""Format 1 is the same without ranges that are SKIPPED; opening one for writing makes it format 2."""
_READABLE = (1, FORMAT)
_APPLICATION_ID = 0x48524C47
"""Marks the file as a ledger ("HRLG")."""
_BUSY_TIMEOUT_S = 30.0
SIDE_FILES = ("-wal", "-shm", "-journal")
"""Endings of SQLite's own files beside the ledger, while it is open and after a kill."""
_WAL_VERSION = 2
"""Byte 18 of a SQLite file whose journal is a write-ahead log."""
_LOCAL_FILE_SYSTEMS = (
    *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs", "overlay"),
    *("ramfs", "refs", "reiserfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
)

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
    """An open ledger file, or a copy of one in memory. Safe to call from several threads."""

    def __init__(self, path: Path, connection: sqlite3.Connection, owner: int | None, durable: bool) -> None:
        self.path = path
        self._connection = connection
        self._owner = owner
        self._durable = durable
        self._opened = None if owner is None else os.stat(path)
        self._lock = threading.RLock()
        self._in_transaction = False
        self._waits_for_disk = False

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[SqlRow]:
        """All rows of one statement. Raises an HrmRayError where the file fails."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def row(self, statement: str, values: Sequence[Any] = ()) -> SqlRow | None:
        """The first row of one statement, or None."""
        found = self.rows(statement, values)
        return found[0] if found else None

    def each(self, statement: str, values: Sequence[Any] = ()) -> Iterator[SqlRow]:
        """Iterate over many rows; nothing may be written meanwhile."""
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
        """A transaction: all of what is done inside, or nothing; one inside another joins it.

        Raises DataError where another owner has opened the file since.
        """
        with self._lock:
            if self._in_transaction:
                if durable and not self._waits_for_disk:
                    raise RuntimeError("a durable transaction cannot join one that is not")
                yield
                return
            self._waits_for_disk = durable
            if self._durable:
                self.rows(f"PRAGMA synchronous = {'EXTRA' if durable else 'NORMAL'}")
            self.rows("BEGIN IMMEDIATE")
            self._in_transaction = True
            try:
                self._check_owner()
                yield
                self.rows("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._in_transaction = False

    def copy_to(self, path: Path) -> None:
        """Copy all of it into the new file `path`."""
        with self._lock, closing(sqlite3.connect(path)) as target:
            try:
                self._connection.backup(target)
            except sqlite3.Error as error:
                raise fault_of(error, path) from error

    def restore(self) -> bool:
        """Write the file again where it was deleted while open; returns whether it was. Call outside a transaction.

        Raises DataError where another file has its place.
        """
        with self._lock:
            if self._opened is None:
                return False
            try:
                if os.path.samestat(self._opened, os.stat(self.path)):
                    return False
            except FileNotFoundError:
                pass
            else:
                hint = "End what writes there, then use --resume"
                raise DataError(Fault(str(self.path), "another file took the ledger's place during the run", hint))
            with atomic_path(self.path) as temporary:
                self.copy_to(temporary)
                self._connection.close()
                delete(self.path)
            restored = own(self.path, self._durable)
            self._connection, self._owner, self._opened = restored._connection, restored._owner, restored._opened
            return True

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _check_owner(self) -> None:
        found = self.row("SELECT value FROM facts WHERE name = 'owner'")
        if found is None or found[0] != self._owner:
            reason = "another process has since opened this run's ledger for writing"
            raise DataError(Fault(str(self.path), reason, "End one of the two runs of this bundle"))


def own(path: Path, durable: bool = True) -> Database:
    """Open the file for writing, created where it is missing; an earlier owner can no longer write.

    This is a fence, not a lock: a lock of a hung process would keep the next run out. Without `durable` no commit waits
    for the disk.
    """
    connection = _connect(path, "rwc")
    try:
        owner = _take_over(path, connection, durable)
    except sqlite3.Error as error:
        connection.close()
        raise fault_of(error, path) from error
    except BaseException:
        connection.close()
        raise
    return Database(path, connection, owner, durable)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open the file with a mode of SQLite's addresses: ro, rw or rwc (create)."""
    try:
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise fault_of(error, path) from error


def _take_over(path: Path, connection: sqlite3.Connection, durable: bool) -> int:
    """Create missing tables, set the journal mode and return the new owner's number."""
    wanted = "wal" if _on_local_disk(path) else "delete"
    if wanted == "delete" and _is_wal(path):
        # A ledger from a local disk. In this mode SQLite reads a write-ahead log without shared memory.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    _check_kind(path, connection, empty_allowed=True)
    # Where WAL is not possible after all SQLite stays with the rollback journal, which is right too.
    (mode,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
    if wanted == "delete" and mode != wanted:
        reason = "another process has it open, so its journal mode cannot be changed"
        raise ResourceError(Fault(str(path), reason, "End the other run of this bundle, then use --resume"))
    connection.execute("PRAGMA locking_mode = NORMAL")
    connection.execute(f"PRAGMA synchronous = {'EXTRA' if durable else 'OFF'}")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk there
    connection.execute("BEGIN IMMEDIATE")
    if _check_kind(path, connection, empty_allowed=True):
        for statement in _SCHEMA:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("UPDATE facts SET value = value + 1 WHERE name = 'owner'")
    (owner,) = connection.execute("SELECT value FROM facts WHERE name = 'owner'").fetchone()
    connection.execute("COMMIT")
    return int(owner)


def _on_local_disk(path: Path) -> bool:
    """Whether the file system is known to be local; one that is not known counts as a network's."""
    folder = path.parent.resolve()
    # The deepest mount point counts, and of several mounts on one point the last.
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    deepest = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)
    return deepest is not None and "remote" not in deepest.opts and deepest.fstype.lower() in _LOCAL_FILE_SYSTEMS


def _is_wal(path: Path) -> bool:
    """Whether the file's journal is a write-ahead log."""
    try:
        with path.open("rb") as file:
            return file.read(19)[18:] == bytes([_WAL_VERSION])
    except OSError:
        return False  # SQLite says what is wrong with the file


def read(path: Path) -> Database:
    """Open an in-memory copy of the current file; its owner can keep writing.

    Raises SettingsError where there is none, DataError for another file.
    """
    if not path.is_file():
        hint = "Give the folder of a run that hrm-ray train wrote"
        raise SettingsError(Fault(str(path), "no ledger of chunks at this path", hint))
    # No process has a WAL file open that has no log beside it; a plain read would leave SQLite's files beside it.
    closed = _is_wal(path) and not path.with_name(path.name + "-wal").exists()
    try:
        return _copy_in_memory(path, "ro&immutable=1" if closed else "ro")
    except sqlite3.OperationalError as error:
        if "readonly" not in str(error):
            raise fault_of(error, path) from error
    except sqlite3.Error as error:
        raise fault_of(error, path) from error
    # The owner was killed inside a commit: SQLite must undo it from the rollback journal, so it needs to write.
    try:
        return _copy_in_memory(path, "rw")
    except sqlite3.Error as error:
        raise fault_of(error, path) from error


def _copy_in_memory(path: Path, mode: str) -> Database:
    with closing(_connect(path, mode)) as source:
        source.execute("BEGIN")  # what is copied is of one moment
        _check_kind(path, source, empty_allowed=False)
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        source.backup(memory)
    memory.execute("PRAGMA query_only = ON")
    return Database(path, memory, None, durable=False)


def copy(path: Path, to: Path) -> None:
    """Copy a ledger, if it exists, into the new file `to`; its owner can keep writing."""
    if path.is_file():
        with closing(read(path)) as source:
            source.copy_to(to)


def delete(path: Path) -> None:
    """Delete a ledger that is not open anywhere, and SQLite's files beside it: a new file of that name would adopt a
    leftover journal."""
    for name in (*(path.name + ending for ending in SIDE_FILES), path.name):
        path.with_name(name).unlink(missing_ok=True)


def _check_kind(path: Path, connection: sqlite3.Connection, *, empty_allowed: bool) -> bool:
    """Whether the file is still empty; DataError where it is not a ledger that this version reads."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if empty_allowed and not tables and not kind:
        return True
    if kind != _APPLICATION_ID or not tables:
        raise DataError(Fault(str(path), "is not a ledger of chunks", "Restore it, or delete it and train again"))
    if version not in _READABLE:
        reason = f"has ledger format {version}; this version reads formats {', '.join(map(str, _READABLE))}"
        raise DataError(Fault(str(path), reason, "Use the version of hrm_ray that wrote it"))
    return False


def fault_of(error: sqlite3.Error, path: Path) -> HrmRayError:
    """The HrmRayError for an error of SQLite."""
    text = str(error)
    if "is full" in text or "disk I/O" in text or "locking protocol" in text:
        hint = "Check the disk's free space, then run the command again with --resume"
        if "locking protocol" in text:
            hint = "Use a file system that supports file locks"
        kind = ResourceError if "locking protocol" in text else DiskError
        return kind(Fault(str(path), f"the ledger cannot be written ({text})", hint))
    if "locked" in text or "busy" in text:
        reason = f"another process has kept it locked for {_BUSY_TIMEOUT_S:g} s"
        return ResourceError(Fault(str(path), reason, "End the other run of this bundle, then use --resume"))
    if "unable to open" in text or "readonly" in text:
        hint = "Check the folder and its permissions"
        return ResourceError(Fault(str(path), f"the ledger cannot be opened ({text})", hint))
    return DataError(Fault(str(path), f"cannot be read as a ledger ({text})", "Restore it, or train again"))

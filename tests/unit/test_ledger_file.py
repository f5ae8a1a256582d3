"""The ledger's file: one owner, readers that leave no trace, kills, power loss, and what is no ledger."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hrm_ray.errors import DataError, DiskError, HrmRayError, ResourceError, SettingsError
from hrm_ray.ledger import BlockLength, Ledger, Refused, State, delete_ledger, open_ledger, read_ledger
from hrm_ray.ledger import database as ledger_database
from hrm_ray.ledger.database import Database, fault_of
from hrm_ray.ledger.verify import violations
from tests.support.ledgers import claimed, ledger_of, linear, reported, states

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["local disk", "network"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of file system that the ledger takes its folder for; it decides the journal."""
    monkeypatch.setattr(ledger_database, "_on_local_disk", lambda path: request.param == "local disk")
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path, disk: str) -> Path:
    return tmp_path / "ledger.sqlite"


def contents(path: Path) -> dict[str, str]:
    """What lies in the ledger's folder; SQLite's shared index of the log, which is no data, left out."""
    return {
        found.name: hashlib.sha256(found.read_bytes()).hexdigest()
        for found in path.parent.iterdir()
        if not found.name.endswith("-shm")
    }


FIXTURE = ROOT / "tests" / "fixtures" / "bundles_0_1" / "text" / "ledger.sqlite"
WITHOUT_SHARED_MEMORY = "unix-dotfile"
"""SQLite's file access that gives a write-ahead log no shared memory, as network file systems do."""


@pytest.mark.skipif(sys.platform == "win32", reason="SQLite has that file access on POSIX only")
@pytest.mark.parametrize(("taken_for_local", "older"), [(True, False), (False, False), (False, True)])
def test_a_file_system_without_shared_memory_holds_a_ledger(
    tmp_path: Path, taken_for_local: bool, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is taken for a local disk. An `older` ledger, with a write-ahead log, is converted."""
    path = tmp_path / "ledger.sqlite"
    monkeypatch.setattr(ledger_database, "_on_local_disk", lambda path: taken_for_local)
    if older:
        shutil.copy(FIXTURE, path)
    genuine = ledger_database.sqlite3.connect

    def connect(place: str, **options: object) -> sqlite3.Connection:
        return genuine(place if place == ":memory:" else f"{place}&vfs={WITHOUT_SHARED_MEMORY}", **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(ledger_database.sqlite3, "connect", connect)
    with open_ledger(path) as ledger:
        ((mode,),) = ledger.database.rows("PRAGMA journal_mode")
        assert mode == "delete"
        if not older:
            ledger.add_blocks([BlockLength(0, 3)])
            claimed(ledger, "w", ledger.start_worker("w"))
        with read_ledger(path) as reader:
            assert list(violations(reader)) == [] and states(reader) == states(ledger) != []
            if older:
                assert reader.head is not None and reader.head.round == 6
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_ledger_changes_its_journal_with_its_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copy(FIXTURE, path)
    for local, mode in ((False, "delete"), (True, "wal"), (False, "delete")):
        monkeypatch.setattr(ledger_database, "_on_local_disk", lambda path, local=local: local)
        with open_ledger(path) as ledger:
            assert ledger.database.rows("PRAGMA journal_mode") == [(mode,)]
            ledger.start_worker("w")
            with read_ledger(path) as reader:
                assert reader.head is not None and reader.head.round == 6
        assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_run_that_still_writes_a_write_ahead_log_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    with ledger_of(path, [3]) as running:
        monkeypatch.setattr(ledger_database, "_on_local_disk", lambda path: False)
        monkeypatch.setattr(ledger_database, "_BUSY_TIMEOUT_S", 0.0)
        with pytest.raises(ResourceError, match="another process"):
            open_ledger(path)
        assert claimed(running, "w", running.start_worker("w")).chunk == 0


@pytest.mark.parametrize(
    ("kind", "options", "local"),
    [
        *[("ext4", "rw", True), ("xfs", "rw", True), ("NTFS", "rw,fixed", True), ("NTFS", "rw,remote", False)],
        *[("nfs4", "rw", False), ("cifs", "rw", False), ("fuse.sshfs", "rw", False), ("lustre", "rw", False)],
    ],
)
def test_the_deepest_mount_says_whether_a_disk_is_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, local: bool
) -> None:
    def mounts(all: bool) -> list[object]:
        places = {tmp_path.anchor: ("ext4", "rw"), str(tmp_path): (kind, options)}
        return [SimpleNamespace(mountpoint=place, fstype=one[0], opts=one[1]) for place, one in places.items()]

    monkeypatch.setattr(psutil, "disk_partitions", mounts)
    assert ledger_database._on_local_disk(tmp_path / "runs" / "ledger.sqlite") is local


def test_what_was_committed_is_there_after_a_reopen(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        generation = ledger.start_worker("w")
        reported(ledger, "merged", claimed(ledger, "w", generation))
        ledger.commit(1, parent=None, accepted=["merged"], anchor="a", checksum="c")
        reported(ledger, "staged", claimed(ledger, "w", generation))
        lease = claimed(ledger, "w", generation, key="k")
    with open_ledger(path) as ledger:
        assert [state for *_, state in states(ledger)] == [State.MERGED, State.TRAINED, State.PENDING]
        assert ledger.head is not None and ledger.head.round == 1 and ledger.data_ended and ledger.chunks == 3
        assert isinstance(ledger.renew(lease, 0.0, 9.0), Refused)
        assert isinstance(ledger.claim("w", generation, linear, key="k"), Refused)
        assert ledger.start_worker("w") == generation + 1
        assert claimed(ledger, "w", generation + 1).attempt == 2


def test_the_last_to_open_is_the_owner(path: Path) -> None:
    with ledger_of(path, [3]) as first, open_ledger(path) as second:
        generation = second.start_worker("w")
        for late in (lambda: first.start_worker("w"), lambda: first.claim("w", generation, linear), first.end_data):
            with pytest.raises(DataError, match="another process has since opened"):
                late()
        assert claimed(second, "w", generation).chunk == 0
        assert first.leases("w") == second.leases("w")


def test_readers_leave_no_trace(path: Path) -> None:
    ledger = ledger_of(path, [3])
    generation = ledger.start_worker("w")
    lease = claimed(ledger, "w", generation)
    before = contents(path)
    with read_ledger(path) as reader:
        assert reader.leases("w") == [lease]
        reported(ledger, "meanwhile", lease)
        assert reader.staged() == [] and reader.leases("w") == [lease]  # all of one moment
        before = contents(path)
    assert contents(path) == before
    ledger.close()
    before = contents(path)
    assert set(before) == {path.name}
    with read_ledger(path) as reader:
        assert [one.name for one in reader.staged()] == ["meanwhile"]
        with pytest.raises((sqlite3.Error, HrmRayError)):
            reader.database.rows("UPDATE facts SET value = 7")
    assert contents(path) == before and not path.with_name(f"{path.name}-shm").exists()


KILLED = """
import os, sys
from pathlib import Path
from hrm_ray.ledger import database
from tests.support.ledgers import claimed, ledger_of, reported

left = int(sys.argv[2])
database._on_local_disk = lambda path: sys.argv[3] == "local disk"
ledger = ledger_of(Path(sys.argv[1]), [3, 3])
generation = ledger.start_worker("w")
reported(ledger, "one", claimed(ledger, "w", generation), claimed(ledger, "w", generation))
reported(ledger, "two", claimed(ledger, "w", generation))
def dying_at_last(genuine):
    def dying(self, *words):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return genuine(self, *words)
    return dying
database.Database.rows = dying_at_last(database.Database.rows)
database.Database.write = dying_at_last(database.Database.write)
ledger.commit(1, parent=None, accepted=["one"], rejected={"two": "why"}, anchor="a", checksum="c")
os._exit(8)
"""


@pytest.mark.parametrize("statements", [0, 5, 9, 12, 13, 99])
def test_a_process_that_is_killed_in_a_commit_leaves_all_of_it_or_nothing(
    path: Path, disk: str, statements: int
) -> None:
    words = [sys.executable, "-c", KILLED, str(path), str(statements), disk]
    done = subprocess.run(words, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == (8 if statements == 99 else 9)
    before = contents(path)
    assert (f"{path.name}-wal" in before) == (disk == "local disk")
    with read_ledger(path) as reader:
        found = (states(reader), reader.head, reader.staged())
        assert list(violations(reader)) == []
    # An interrupted commit in the rollback journal is undone by whoever reads first.
    before.pop(f"{path.name}-journal", None)
    assert contents(path) == before
    with open_ledger(path) as ledger:
        assert (states(ledger), ledger.head, ledger.staged()) == found
        if statements == 99:
            assert [state for *_, state in states(ledger)] == [State.MERGED, State.MERGED, State.PENDING]
        else:
            assert [state for *_, state in states(ledger)] == [State.TRAINED] * 3 and ledger.head is None


def test_an_exception_inside_takes_all_of_it_back(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        generation = ledger.start_worker("w")

        def failing(epoch: int, position: int) -> int:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), ledger.database.transaction():
            claimed(ledger, "w", generation)
            ledger.claim("w", generation, failing)
        assert states(ledger) == [] and ledger.counts() == []
        assert claimed(ledger, "w", generation).chunk == 0


def test_only_what_others_rest_on_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    genuine = Database.rows

    def listening(database: Database, statement: str, *values: object) -> object:
        if statement.startswith("PRAGMA synchronous"):
            waits.append(statement.rpartition(" ")[2])
        return genuine(database, statement, *values)  # type: ignore[arg-type]

    ledger = ledger_of(path, [3])
    ledger.close()
    monkeypatch.setattr(Database, "rows", listening)
    with open_ledger(path) as ledger:
        said: dict[str, list[str]] = {}

        def call(name: str, work: Callable[[], object]) -> None:
            waits.clear()
            work()
            said[name] = list(waits)

        call("start", lambda: ledger.start_worker("w"))
        generation = 1
        call("claim", lambda: ledger.claim("w", generation, linear))
        call("measure", lambda: ledger.measure(0, 10))
        call("report", lambda: ledger.report("r", ledger.leases("w"), base=None, path="p", checksum="c"))
        call("commit", lambda: ledger.commit(1, parent=None, accepted=["r"], anchor="a", checksum="c"))
        call("rollback", lambda: ledger.rollback(None))
        ((level,),) = genuine(ledger.database, "PRAGMA synchronous")
        assert level == 3  # EXTRA, as SQLite names it
    full = {name for name, levels in said.items() if levels == ["EXTRA"]}
    assert full == {"start", "commit", "rollback"} and said["claim"] == said["report"] == ["NORMAL"]


def test_a_durable_transaction_does_not_join_another_kind(path: Path) -> None:
    with ledger_of(path, [1]) as ledger:
        with pytest.raises(RuntimeError, match="durable"), ledger.database.transaction():
            ledger.start_worker("w")
        with ledger.database.transaction(durable=True):
            ledger.start_worker("w")
            ledger.claim("w", 1, linear)
        assert len(ledger.leases("w")) == 1


def test_threads_take_turns(path: Path) -> None:
    with ledger_of(path, [40]) as ledger:
        names = [f"w{number}" for number in range(4)]
        generations = {name: ledger.start_worker(name) for name in names}

        def work(name: str) -> None:
            for _ in range(10):
                claimed(ledger, name, generations[name])

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        chunks = [lease.chunk for name in names for lease in ledger.leases(name)]
        assert sorted(chunks) == list(range(40)) and list(violations(ledger)) == []


def write_text(path: Path) -> None:
    path.write_text("this is no database, and long enough to be looked at as one. " * 20, encoding="utf-8")


def write_stranger(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()


def write_newer(path: Path) -> None:
    ledger_of(path, [1]).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def test_a_ledger_of_format_1_is_read_as_it_is_and_becomes_format_2_when_it_is_written(path: Path) -> None:
    """A version that knows no SKIPPED ranges must refuse what may have some."""

    def version(wanted: int | None = None) -> int:
        with closing(sqlite3.connect(path)) as connection:
            if wanted is not None:
                connection.execute(f"PRAGMA user_version = {wanted}")
            return int(connection.execute("PRAGMA user_version").fetchone()[0])

    ledger_of(path, [1]).close()
    assert version(1) == 1
    with read_ledger(path) as ledger:
        assert ledger.chunks == 1 and not ledger.shuffled
    assert version() == 1
    open_ledger(path).close()
    assert version() == 2


def write_torn(path: Path) -> None:
    ledger_of(path, [1]).close()
    path.write_bytes(path.read_bytes()[:8192] + b"\0" * 4096 + b"x" * 30000)


@pytest.mark.parametrize("write", [write_text, write_stranger, write_newer, write_torn])
@pytest.mark.parametrize("how", [open_ledger, read_ledger])
def test_what_is_no_ledger_is_refused_and_left_as_it_is(
    path: Path, write: Callable[[Path], None], how: Callable[[Path], Ledger]
) -> None:
    write(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"ledger\.sqlite"):
        how(path).counts()
    if write is not write_torn:
        assert path.read_bytes() == before


def test_an_empty_file_is_no_ledger_to_read(path: Path) -> None:
    path.touch()
    with pytest.raises(DataError, match="not a ledger"):
        read_ledger(path)
    with pytest.raises(SettingsError, match="no ledger"):
        read_ledger(path.with_name("other.sqlite"))
    with open_ledger(path) as ledger:  # an owner that died before its first commit leaves that
        assert ledger.chunks == 0


def test_a_folder_that_is_not_there(path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be opened"):
        open_ledger(path.parent / "nowhere" / "ledger.sqlite")


def test_a_full_disk_is_said_and_nothing_is_lost(path: Path) -> None:
    with ledger_of(path, [50_000], ended=False) as ledger:
        generation = ledger.start_worker("w")
        lease = claimed(ledger, "w", generation)
        (pages,) = ledger.database.rows("PRAGMA page_count")[0]
        ledger.database.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ResourceError, match="full"):
            ledger.add_blocks(BlockLength(number, 50_000) for number in range(10_000))
        ledger.database.rows("PRAGMA max_page_count = 100000")
        assert ledger.chunks == 50_000 and ledger.leases("w") == [lease]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        *[("database is locked", ResourceError), ("attempt to write a readonly database", ResourceError)],
        *[("disk I/O error", DiskError), ("database disk image is malformed", DataError)],
    ],
)
def test_each_failure_of_the_file_has_its_kind(said: str, kind: type[HrmRayError]) -> None:
    assert type(fault_of(sqlite3.OperationalError(said), Path("x"))) is kind


def test_a_deleted_ledger_leaves_nothing_to_be_played_back(path: Path) -> None:
    kept = ledger_of(path, [3])
    kept.start_worker("w")
    images = {found.name: found.read_bytes() for found in path.parent.iterdir()}
    kept.close()
    for name, image in images.items():  # as after a kill
        path.with_name(name).write_bytes(image)
    delete_ledger(path)
    delete_ledger(path)
    assert list(path.parent.iterdir()) == []
    with open_ledger(path) as ledger:
        assert ledger.chunks == 0 and ledger.start_worker("w") == 1

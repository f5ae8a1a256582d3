"""What a call costs does not grow with the data or with what is done: counted in SQLite's own instructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hrm_ray.ledger import BlockLength, Lease, Ledger, Span, SynchronousRun, open_ledger
from hrm_ray.ledger.verify import violations

LARGE = 20_000


def filled(path: Path, done: int) -> Ledger:
    """A ledger with that many chunks merged, one to a round, and twice as many in the data."""
    ledger = open_ledger(path, durable=False)
    ledger.add_blocks(BlockLength(number, 20) for number in range(done // 10))
    ledger.end_data()
    ledger.start_at(0)
    with ledger.database.transaction():
        write = ledger.database.write
        write("INSERT INTO measured VALUES (?, 5)", [(chunk,) for chunk in range(done)])
        write(
            "INSERT INTO ranges VALUES (0, ?, 0, ?, 5, 3, NULL, NULL, 1, NULL, 0, 0, ?, NULL)",
            [(done - 1 - chunk, chunk, chunk + 1) for chunk in range(done)],
        )
        write(
            "INSERT INTO contributions VALUES (?, ?, 'gang', 1, NULL, 'p', 'c', 5, ?, 0)",
            [(number, f"step {number}", number) for number in range(1, done + 1)],
        )
        write(
            "INSERT INTO rounds VALUES (?, ?, 'a', 'c', 5, ?)",
            [(number, number - 1 or None, 5 * number) for number in range(1, done + 1)],
        )
        write("UPDATE epochs SET cursor = ?", [(done,)])
        write("UPDATE facts SET value = ? WHERE name = 'head'", [(done,)])
    return ledger


def instructions(ledger: Ledger, work: Callable[[], object]) -> int:
    """SQLite's instructions that a piece of work takes, in tens."""
    count = [0]

    def one_more() -> int:
        count[0] += 1
        return 0

    ledger.database._connection.set_progress_handler(one_more, 10)
    work()
    ledger.database._connection.set_progress_handler(None, 0)
    return count[0]


def costs(ledger: Ledger, done: int) -> dict[str, int]:
    """What each call takes after `done` chunks."""
    run = SynchronousRun(ledger, done)
    found: dict[str, int] = {}
    given: list[Lease] = []

    def order(epoch: int, position: int) -> int:
        return position

    def claim() -> None:
        lease = run.claim(order)
        assert lease is not None
        given.append(lease)

    def spans() -> list[Span]:
        return [Span(lease.epoch, lease.chunk, 0, 5) for lease in given[:1]]

    calls: dict[str, Callable[[], object]] = {
        "claim": claim,
        "measure": lambda: run.measure(given[0].chunk, 5),
        "claim another": claim,
        "keyed": lambda: ledger.claim("gang", run.generation, order, key="key", now_s=1.0, lease_s=1.0),
        "expire": lambda: ledger.expire(9.0),
        "renew": lambda: ledger.renew(given[1], 1.0, 2.0),
        "commit": lambda: run.commit_checkpoint(done + 1, done, spans(), "a", "c"),
        "epoch": lambda: ledger.epoch,
        "complete": lambda: ledger.complete(0),
        "staged": ledger.staged,
        "quarantined": ledger.quarantined,
        "resume": lambda: SynchronousRun(ledger, done),
        "reopen": lambda: open_ledger(ledger.path, durable=False).close(),
    }
    for name, call in calls.items():
        found[name] = instructions(ledger, call)
    return found


def test_no_call_costs_more_after_many_chunks(tmp_path: Path) -> None:
    with filled(tmp_path / "small.sqlite", 40) as small, filled(tmp_path / "large.sqlite", LARGE) as large:
        assert list(violations(small)) == []
        few, many = costs(small, 40), costs(large, LARGE)
    grown = {name: (few[name], many[name]) for name in few if many[name] > 1.2 * few[name] + 5}
    assert grown == {}


def test_blocks_are_rows_and_chunks_are_not(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.sqlite", durable=False) as ledger:
        taken = instructions(ledger, lambda: ledger.add_blocks([BlockLength(0, 10**12), BlockLength(1, 10**12)]))
        assert taken < 100 and ledger.chunks == 2 * 10**12
        generation = ledger.start_worker("w")
        lease = ledger.claim("w", generation, lambda epoch, position: 10**12 + 7)
        assert isinstance(lease, Lease) and (lease.block, lease.chunk_in_block) == (1, 7)

"""The two changes of the head, commit and rollback; only the head's lineage says which ranges are MERGED."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hrm_ray.ledger import ranges, states
from hrm_ray.ledger.reader import Contribution, LedgerReader, Round
from hrm_ray.ledger.states import Range, Refused


def commit(
    ledger: LedgerReader, proposed: Round, accepted: Sequence[str], rejected: Mapping[str, str]
) -> Round | Refused:
    """Make `proposed` the head if its parent is the head; its sequence counts are filled in here.

    The same commit again changes nothing and returns the same round.
    """
    known = ledger.round(proposed.round)
    if known is not None:
        took = [contribution.name for contribution in ledger.contributions_of(known.round)]
        same = (known.parent, known.anchor, known.checksum) == (proposed.parent, proposed.anchor, proposed.checksum)
        if same and took == list(accepted):
            return known
        return Refused(f"round {known.round} is committed already, with another content")
    head = ledger.head
    if (head.round if head is not None else None) != proposed.parent:
        return Refused(f"the head is {_name(head)}, not round {proposed.parent}")
    if head is not None and proposed.round <= head.round:
        raise ValueError(f"round {proposed.round} must be numbered above its parent {head.round}")
    staged = {contribution.name: contribution for contribution in ledger.staged()}
    missing = [name for name in (*accepted, *rejected) if name not in staged]
    if missing or len({*accepted, *rejected}) < len(accepted) + len(rejected):
        return Refused(f"contributions are not staged, or named twice: {', '.join(missing) or accepted}")
    taken = [staged[name] for name in accepted]
    sequences = sum(contribution.sequences for contribution in taken)
    before = head.total_sequences if head is not None else 0
    made = Round(proposed.round, proposed.parent, proposed.anchor, proposed.checksum, sequences, before + sequences)
    ledger.database.rows("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)", tuple(vars(made).values()))
    for place, contribution in enumerate(taken):
        ledger.database.rows(
            "UPDATE contributions SET round = ?, place = ? WHERE number = ?", (made.round, place, contribution.number)
        )
        merged = [states.merge(one) for one in ranges.of_contribution(ledger.database, contribution.number)]
        ranges.put_all(ledger.database, merged)
    for name, reason in rejected.items():
        drop(ledger, staged[name], [states.reject(one, reason) for one in _ranges(ledger, staged[name])])
    ledger.database.rows("UPDATE facts SET value = ? WHERE name = 'head'", (made.round,))
    return made


def roll_back(ledger: LedgerReader, to: int | None) -> list[Round] | Refused:
    """Make round `to` the head (None: the start, before any); returns the rounds undone, newest first.

    All leases and staged contributions are dropped too, and every worker's generation ends: their weights come from
    anchors that no longer count, and a round of the same number may be committed again.
    """
    undone: list[Round] = []
    for one in ledger.lineage():
        if one.round == to:
            break
        undone.append(one)
    else:
        if to is not None:
            return Refused(f"round {to} is not in the lineage of the head, {_name(ledger.head)}")
    if not undone:
        return []
    for one in undone:
        for contribution in ledger.contributions_of(one.round):
            drop(ledger, contribution, [states.undo(part) for part in _ranges(ledger, contribution)])
        ledger.database.rows("DELETE FROM rounds WHERE round = ?", (one.round,))
    drop_staged(ledger)
    stop_all(ledger)
    ledger.database.rows("UPDATE facts SET value = ? WHERE name = 'head'", (to,))
    return undone


def drop_staged(ledger: LedgerReader) -> int:
    """Drop all staged contributions, without a failed attempt; returns how many there were."""
    staged = ledger.staged()
    for contribution in staged:
        drop(ledger, contribution, [states.undo(part) for part in _ranges(ledger, contribution)])
    return len(staged)


def stop_all(ledger: LedgerReader) -> None:
    """End every worker's generation and release its leases; no attempt is counted as failed."""
    ranges.put_all(ledger.database, [states.undo(held) for held in ranges.leased(ledger.database)])
    ledger.database.rows("UPDATE workers SET active = 0")
    ledger.database.rows("DELETE FROM claims")


def drop(ledger: LedgerReader, contribution: Contribution, changed: Sequence[Range]) -> None:
    """Delete a contribution; its ranges become `changed`."""
    ranges.put_all(ledger.database, changed)
    ledger.database.rows("DELETE FROM contributions WHERE number = ?", (contribution.number,))


def _ranges(ledger: LedgerReader, contribution: Contribution) -> list[Range]:
    return ranges.of_contribution(ledger.database, contribution.number)


def _name(head: Round | None) -> str:
    return "the start" if head is None else f"round {head.round}"

"""`hrm-ray ledger`: prints a run's ledger and checks it. It only reads, so the run may be training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from hrm_ray.bundle.progress import stored_counts
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.ledger import EpochCounts, LedgerReader, State, read_ledger
from hrm_ray.ledger.export import SHUFFLED, export, shown
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir

_LAST = 5
"""Rounds, epochs and quarantined ranges that are printed; --json has them all."""
_VIOLATIONS = 50


def run_show(run: Path, json_file: Path | None) -> int:
    """Print a run's ledger, or write it as JSON; returns the exit code."""
    with _opened(run) as ledger:
        if json_file is not None:
            if not json_file.absolute().parent.is_dir():
                raise SettingsError(Fault(f"--json {json_file}", "its folder does not exist", "Create it first"))
            export(ledger, json_file)
            print(json_file)
            return 0
        for line in _lines(run, ledger):
            print(line)
    return 0


def run_verify(run: Path) -> int:
    """Print the violations of a run's ledger; returns the exit code, 1 if there are any."""
    with _opened(run) as ledger:
        found = violations(ledger, stored_counts(RunDir(run)))
        first = list(islice(found, _VIOLATIONS))
        for sentence in first:
            print(f"{run}: {sentence}")
        if first:
            print(f"{run}: ledger is inconsistent: {len(first) + sum(1 for _ in found)} violations")
            return 1
        head = ledger.head
        trained = "nothing is merged yet" if head is None else f"{head.total_sequences} sequences are merged"
        print(f"{run}: ledger OK; {trained}, in {_counted(sum(1 for _ in ledger.lineage()), 'round')}")
    return 0


def _opened(run: Path) -> LedgerReader:
    if not run.is_dir():
        raise SettingsError(Fault(str(run), "there is no such folder", "Give the folder of a run's bundle"))
    return read_ledger(RunDir(run).ledger)


def _lines(run: Path, ledger: LedgerReader) -> list[str]:
    blocks, head = ledger.blocks(), ledger.head
    going_on = "" if ledger.data_ended else " so far"
    lines = [f"{run}: epoch {ledger.epoch}"]
    lines.append(f"  data         {_counted(len(blocks), 'block')}, {_counted(ledger.chunks, 'chunk')}{going_on}")
    epochs = ledger.counts()
    if len(epochs) > _LAST:
        lines.append(f"  epochs       0 to {len(epochs) - _LAST - 1} are not shown; --json has them")
    lines += [_epoch(counts) for counts in epochs[-_LAST:]]
    if ledger.shuffled:
        lines.append(f"  order        {SHUFFLED}")
    rounds, skipped = list(islice(ledger.lineage(), _LAST)), ledger.skipped()
    if head is None:
        lines.append("  head         no round yet")
    else:
        lines.append(f"  head         round {head.round}, {head.total_sequences} sequences, {head.anchor}")
    for one in rounds:
        passed = f" ({skipped[one.round]} skipped)" if one.round in skipped else ""
        lines.append(f"  round {one.round:<7}{one.sequences} sequences{passed}, {one.anchor}")
    aside = ledger.quarantined()
    lines.append(f"  quarantined  {_counted(len(aside), 'range')}")
    lines += [f"    epoch {one.epoch} chunk {shown(one)}: {one.reason}" for one in aside[:_LAST]]
    return lines


def _counted(count: int, noun: str) -> str:
    """A count with its noun: 1 block, 2 blocks."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _epoch(counts: EpochCounts) -> str:
    """One epoch: its untouched chunks, the ranges in each state, and whether it is complete."""
    parts = [f"{_counted(counts.untouched, 'chunk')} untouched"] if counts.untouched else []
    for state in State:
        found = counts.states.get(state)
        if found is not None:
            parts.append(f"{found.sequences} sequences {state.name} in {_counted(found.ranges, 'range')}")
    done = ", complete" if counts.complete else ""
    return f"  epoch {counts.epoch:<7}{_counted(counts.chunks, 'chunk')}: {', '.join(parts)}{done}"

"""Reads the data for `--dry-run`, in a bounded time, to find bad rows before anything starts."""

from __future__ import annotations

import shlex

from hrm_ray.data.chunks import CorpusHead, passed_over_note, read_chunks
from hrm_ray.data.corpus import CorpusReading
from hrm_ray.data.corpus_facts import check_usable
from hrm_ray.data.parts import list_parts
from hrm_ray.data.rows import unreadable
from hrm_ray.data.timer import Timer
from hrm_ray.errors import Fault
from hrm_ray.launch.data_sources import corpus_to_read, source_of
from hrm_ray.launch.resolve import ResolvedRun

READ_S = 10.0
"""Seconds that reading may take, the held-out data included."""


def scan_data(resolved: ResolvedRun, timer: Timer | None = None) -> str:
    """Read the data once, keeping nothing, for as long as `timer` allows (READ_S); a sentence of what there is.

    Puzzles were read whole when they were detected. Raises DataError for a bad row, unless such rows are skipped.
    """
    if resolved.facts.task == "puzzle":
        return f"data: all {resolved.facts.puzzle.count if resolved.facts.puzzle else 0} puzzles are sound"
    timer = timer or Timer(READ_S)
    if resolved.evaluation is None:
        return f"data: {_read(resolved, timer, evaluation=False)}"
    training = _read(resolved, timer.part(0.7), evaluation=False)
    return f"data: {training}; held out: {_read(resolved, timer, evaluation=True)}"


def _read(resolved: ResolvedRun, timer: Timer, *, evaluation: bool) -> str:
    source = source_of(resolved.settings, evaluation=evaluation)
    corpus = corpus_to_read(resolved.settings, source, list_parts(source).parts, evaluation=evaluation)
    reading = CorpusReading(corpus, on_read=lambda _: timer.raise_if_up())
    rows = bad = bad_files = left_out = 0
    passed_over: list[Fault] = []
    for chunk in read_chunks(corpus, rows=reading):
        rows += chunk.entry.rows
        bad += chunk.entry.bad
        left_out += chunk.entry.left_out
        passed_over += chunk.passed_over
        bad_files += chunk.bad_files
    whole = reading.ended or (corpus.max_rows is not None and rows >= corpus.max_rows)
    documents = max(0, rows - bad - left_out)
    if reading.ended and not documents:
        # Nothing to train on: says why, as the run would.
        check_usable(CorpusHead(corpus, lambda _: None))
    others = f", {left_out} left out by --ascii-only" if left_out else ""
    bad -= len(passed_over)
    others += f", {unreadable(bad, bad_files, 'bad ')} skipped" if bad else ""
    others += f"; warning: {passed_over_note(passed_over).removesuffix('.')}" if passed_over else ""
    if whole:
        return f"{documents} documents are readable{others}"
    share = "" if reading.share is None else f", about {100 * reading.share:.3g} % of the data"
    return (
        f"the first {documents} documents are readable{others}{share}; the time limit was reached there "
        f"(`hrm-ray data inspect {shlex.quote(source.path)} --all` reads all)"
    )

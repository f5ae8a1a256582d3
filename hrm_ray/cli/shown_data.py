"""The facts of a data set as lines of text.

Estimates are marked "about"; control characters are escaped, so that data cannot send commands to the terminal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from hrm_ray.data.chunks import CHUNK_TEXT_BYTES
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.file_systems import absolute, is_local
from hrm_ray.data.inspection.columns import TableFacts
from hrm_ray.data.inspection.figures import Figure
from hrm_ray.data.inspection.puzzles import PuzzleSetFacts
from hrm_ray.data.inspection.text import BYTES_PER_TOKEN, TextFacts
from hrm_ray.data.splits import WHOLE

_ROW_WIDTH, _NAMES, _COLUMNS = 100, 12, 30


def text_lines(facts: TextFacts, corpus: Corpus, tokenizer: str | None, elapsed_s: float) -> list[str]:
    """The facts of a text corpus; `tokenizer` is the name of the one that counted the tokens."""
    root = _root(corpus)
    lines = [f"{facts.path}: text, split {facts.split}"]
    lines.append(_line("read", _how_much(facts, elapsed_s)))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts.kinds.items())
    size = f", {_size(facts.bytes)}" if facts.bytes else ""
    lines.append(_line("parts", f"{facts.parts:,} ({kinds}){size}{_skipped(facts.skipped)}"))
    lines.append(_line("splits", _splits(facts.splits)))
    lines.append(_line("access", _access(facts.random_access)))
    lines += _column_lines(facts.table)
    lines.append(_line("rows", _rows(facts, corpus)))
    of_read = f"of the {facts.rows_read:,} rows read"
    if facts.bad:
        lines.append(_line("bad rows", f"{facts.bad:,} {of_read}"))
        lines += [f"    {_within(fault.value, root)}: {_short(fault.reason, 2 * _ROW_WIDTH)}" for fault in facts.faults]
    if facts.broken:
        lines.append(_line("broken", f"{facts.broken:,} part(s), with an unknown number of lost rows"))
        lines += [f"    {_within(fault.value, root)}: {_short(fault.reason, 2 * _ROW_WIDTH)}" for fault in facts.breaks]
    if facts.passed_over:
        lines.append(_line("no text", f"{facts.passed_over:,} file(s) without text data, passed over"))
        lines += [f"    {_within(fault.value, root)}: {_short(fault.reason, 2 * _ROW_WIDTH)}" for fault in facts.passes]
    lines += [_line("read as", _escaped(remark.replace(root, "") if root else remark)) for remark in facts.remarks]
    if facts.left_out:
        lines.append(_line("left out", f"{facts.left_out:,} {of_read}, by --ascii-only"))
    if facts.empty:
        lines.append(_line("empty", f"{facts.empty:,} {of_read}"))
    characters = f"{_number(facts.characters)} characters"
    lines.append(_line("text", f"{_about(facts.text_bytes)}{_size(facts.text_bytes.value)}, {characters}"))
    if facts.row_bytes is not None and facts.longest is not None:
        spread = facts.row_bytes
        least_most = f"{spread.least:,} to {spread.most:,} bytes a row, half of them {spread.median:,} or less"
        lines.append(_line("lengths", f"{least_most}; the longest is {_within(facts.longest.where, root)}"))
    lines.append(_line("tokens", _tokens(facts, tokenizer)))
    lines.append(_line("blocks", f"{_number(facts.blocks)} of {corpus.samples_per_block:,} rows"))
    size = f"{corpus.chunk_size:,} rows or about {CHUNK_TEXT_BYTES >> 20} MiB of text"
    lines.append(_line("chunks", f"{_number(facts.chunks)} of {size}"))
    for sample in facts.samples:
        pair = "" if sample.response is None else f"  ->  {_short(sample.response, _ROW_WIDTH // 2)}"
        shown = _short(sample.text, _ROW_WIDTH // 2 if pair else _ROW_WIDTH)
        lines.append(_line("row", f"{_within(sample.where, root)}  {shown}{pair}"))
    return lines


def text_warnings(facts: TextFacts, *, skips: bool) -> Iterator[str]:
    """Warnings: rows that cannot be read, and data without text."""
    if facts.bad:
        what = "train skips them" if skips else "train ends at the first one, unless --on-bad-row skip is given"
        yield f"{facts.bad:,} of {facts.rows_read:,} rows cannot be read; {what}."
    if facts.passed_over:
        yield f"{facts.passed_over:,} file(s) hold no text data and are passed over; train ends there under --strict."
    if not facts.whole and not facts.rows_read:
        yield "no row was read within the time; give a longer --timeout-s, or --all."
    elif not facts.text_bytes.value:
        yield f"{'the data' if facts.whole else 'what was read'} contains no text; train needs some."


def puzzle_lines(facts: PuzzleSetFacts, elapsed_s: float) -> list[str]:
    """The facts of a puzzle set."""
    whole = facts.checked == facts.puzzles.value
    checked = f"{'all' if whole else f'the first {facts.checked:,}'} puzzles, and they are valid,"
    used = "" if facts.used == facts.puzzles else f", of which the first {facts.used.value:,} are used"
    grid = f" ({facts.grid[0]} x {facts.grid[1]})" if facts.grid is not None else ""
    symbols = f": {' '.join(map(_short_symbol, facts.symbols))}" if facts.symbols else ""
    lines = [
        f"{facts.path}: puzzles ({facts.name}), split {facts.split}",
        _line("read", f"{checked} in {elapsed_s:.1f} s"),
        _line("parts", f"{facts.parts:,}, {_size(facts.bytes)}{_skipped(facts.skipped)}"),
        _line("splits", _splits(facts.splits)),
        _line("puzzles", f"{_number(facts.puzzles)}{used}"),
        _line("cells", f"{facts.seq_len:,}{grid}"),
        _line("tokens", f"{_number(facts.vocab_size)}{symbols}"),
        _line("numbers", f"{_number(facts.identifiers)} puzzle identifiers"),
    ]
    if facts.open_cells is not None:
        spread = facts.open_cells
        between = f"{spread.least:,} to {spread.most:,} a puzzle, half of them {spread.median:,} or less"
        lines.append(_line("to find", f"{between} (cells whose label is not the input)"))
    for sample in facts.samples:
        lines.append(_line("puzzle", _short(sample.puzzle, 2 * _ROW_WIDTH)))
        lines.append(_line("", _short(sample.solution, 2 * _ROW_WIDTH)))
    return lines


def _line(name: str, text: str) -> str:
    return f"  {name:9}{text}"


def _how_much(facts: TextFacts, elapsed_s: float) -> str:
    took = f"in {elapsed_s:.1f} s"
    if facts.whole:
        return f"all of it {took}"
    if facts.share is None:
        return f"the first {facts.rows_read:,} rows {took}; the rest is unknown (--all reads it)"
    return f"about {100 * facts.share:.3g} % of it {took}, the first {facts.rows_read:,} rows (--all reads the rest)"


def _rows(facts: TextFacts, corpus: Corpus) -> str:
    cut = [f"the first {corpus.offset:,} left out"] if corpus.offset else []
    cut += [f"{corpus.max_rows:,} at most"] if corpus.max_rows is not None else []
    limits = f" ({', '.join(cut)})" if cut else ""
    return f"{_number(facts.rows)}{limits}"


def _tokens(facts: TextFacts, tokenizer: str | None) -> str:
    count = _number(facts.tokens.count)
    if tokenizer is None:
        guess = f"estimated at {BYTES_PER_TOKEN} bytes per token; --tokenizer-path counts them"
        return f"{count} ({guess})"
    return f"{count} of {tokenizer}, end-of-text marks included ({facts.tokens.tokenised_rows:,} rows were tokenised)"


def _access(random: bool) -> str:
    if random:
        return "from any row on: --no-linear-dataset shuffles blocks and chunks"
    return "from the beginning only: --no-linear-dataset shuffles within --shuffle-buffer-size, not blocks and chunks"


def _splits(splits: tuple[str, ...] | None) -> str:
    if splits is None:
        return "unknown until all of it is read"
    named = ", ".join(map(_escaped, splits[:_NAMES]))
    more = f" and {len(splits) - _NAMES:,} more" if len(splits) > _NAMES else ""
    return f"{named}{more}" if WHOLE in splits else f"{WHOLE} (all of it); by name {named}{more}"


def _column_lines(table: TableFacts) -> Iterator[str]:
    if not table.rows:
        return
    yield _line("columns", f"in {table.rows:,} rows of {table.parts} part(s):")
    shown = table.columns[:_COLUMNS]
    width = min(30, max((len(_escaped(column.name)) for column in shown), default=0))
    for column in shown:
        filled = f"{100 * column.filled / table.rows:.3g} % filled"
        yield f"    {_short(column.name, 30):{width}}  {' or '.join(column.types) or 'nothing'}, {filled}"
    if len(table.columns) > _COLUMNS:
        yield f"    and {len(table.columns) - _COLUMNS} more"


def _number(figure: Figure) -> str:
    """The number; an estimate is rounded to three digits."""
    value = figure.value
    if figure.certainty == "about":
        value = round(value, min(0, 3 - len(str(value))))
    return f"{_about(figure)}{value:,}"


def _about(figure: Figure) -> str:
    return "" if figure.certainty == "exact" else f"{figure.certainty} "


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _skipped(count: int) -> str:
    return f"; {count:,} other file(s) not read" if count else ""


def _root(corpus: Corpus) -> str:
    """The common prefix of all row positions, which is not printed."""
    if not is_local(corpus.source.path) or not corpus.parts:
        return ""
    path = absolute(corpus.source.path)
    return (path if os.path.isdir(path) else os.path.dirname(path)) + os.sep


def _within(where: str, root: str) -> str:
    return _escaped(where.replace(root, "", 1) if root else where)


def _short(text: str, width: int) -> str:
    shown = _escaped(text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _short_symbol(symbol: str) -> str:
    return "(space)" if symbol == " " else _escaped(symbol)


def _escaped(text: Iterable[str]) -> str:
    """Text on one line, with characters that do not print escaped as in Python."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)

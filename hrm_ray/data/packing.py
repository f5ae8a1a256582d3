"""Text samples: rows of `seq_len` tokens cut from a token store.

Every token that follows another one of its document is the label of exactly one position; a document's first token is
never a label, because it would be predicted from another document.

- packed: the stream of all documents is cut every `seq_len` tokens; window k has the inputs stream[k*S : k*S+S].
- not packed: each document begins a row, a long one goes on in further rows, a short row is padded.
- stride N < S: a window (packed), or a long document's next row (not packed), begins N tokens after the one before;
  what it repeats is context and carries no label.
- prefix (pairs of prompt and response): a pair is never divided over rows; labels are the response's tokens and its
  end-of-text. Packed, a row takes whole pairs in their order as long as they fit; else each row is one pair.

A row consists of pieces, runs of tokens of one document; the rest is padding, which counts as a document of its own.
Memory beyond the store: packed rows need none; the other two keep 8 bytes per row or document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.data.text_store import TextStore
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.types import IGNORE_LABEL, Columns

Ints = npt.NDArray[np.int64]

# Lengths of documents are read in pieces of this many, so that a pass over a large store stays small in memory.
_SCAN = 1 << 20


@dataclass(frozen=True)
class _Pieces:
    """Runs of tokens as arrays, all int64 [P]: `row` and `column` of the first token, `source` its position in the
    stream, `length` in input positions, `end` where its document's last usable token ends, `prompt` how many of the
    positions are prompt, and `unlabelled` how many positions at the piece's start have no label."""

    row: Ints
    column: Ints
    source: Ints
    length: Ints
    end: Ints
    prompt: Ints
    unlabelled: Ints


@dataclass(frozen=True)
class RowForm:
    """How tokens become rows: `seq_len` tokens each, packed or padded, beginning `stride` tokens apart (none: as long
    as a row is); `prefix` takes pairs of prompt and response."""

    seq_len: int
    packing: bool = True
    prefix: bool = False
    stride: int | None = None


class TextSamples:
    """Packed or padded rows over a token store (types.Columns of text). Rows without any label do not exist."""

    def __init__(self, store: TextStore, form: RowForm) -> None:
        """Raises SettingsError for a row of less than 2 tokens, DataError for a store of plain documents where the
        form wants pairs."""
        self.store = store
        self.seq_len, self.prefix = form.seq_len, form.prefix
        self.cut_pairs = 0
        """Pairs that do not fit a row and lost tokens of their prompt's start or their response's end."""
        if form.seq_len < 2:
            reason = "a row needs 2 tokens or more"
            raise SettingsError(Fault(f"--max-seq-len {form.seq_len}", reason, "Give a larger --max-seq-len"))
        if form.prefix and store.prompts is None:
            reason = "these are plain documents, not pairs of prompt and response"
            raise DataError(Fault("--lm-mask prefix", reason, "Give --prompt-column and --response-column"))
        self._layout: _PackedRows | _Rows | _Pairs
        if form.prefix:
            pairs = _Pairs(store, form.seq_len, form.packing)
            self._layout, self.cut_pairs = pairs, pairs.cut
        else:
            stride = form.stride if form.stride is not None else form.seq_len
            self._layout = (_PackedRows if form.packing else _Rows)(store, form.seq_len, stride)

    def __len__(self) -> int:
        return self._layout.count

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        """The rows at `indices` (int64 [B]; -1 gives an inactive padding row) as types.Columns."""
        indices = np.asarray(indices, dtype=np.int64)
        active = np.flatnonzero(indices != -1)
        return self.tokens(indices[active]).columns(self.seq_len, self.store.pad_id, active, len(indices))

    def tokens(self, indices: npt.NDArray[np.int64]) -> RowTokens:
        """The rows at `indices` (int64 [B]) as the tokens that they hold."""
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples are 0..{len(self) - 1}, asked for {indices.min()}..{indices.max()}")
        pieces = self._layout.pieces(indices)
        held = np.minimum(pieces.end - pieces.source, pieces.length + 1)
        parts = _slices(pieces.source, held)
        return RowTokens(
            len(indices),
            _narrow((pieces.row, pieces.column, pieces.length, held, pieces.prompt, pieces.unlabelled)),
            _concatenated(self.store.tokens, parts),
            _concatenated(self.store.token_bytes, parts),
        )


_ROW, _HELD = 0, 3
"""Places in RowTokens.pieces."""


@dataclass(frozen=True)
class RowTokens:
    """Rows as the tokens that they hold, about a seventh of the size of types.Columns: what a rank is sent.

    `pieces` [6, P], in the order of their rows and in the smallest integers that hold them: row (0..count-1) and column
    of the first token, length in input positions, tokens held (one more than that where the last position has a label),
    how many of the positions are prompt, and how many at the start have no label. `tokens` and `token_bytes` [T] are
    the held tokens of all pieces one after the other.
    """

    count: int
    pieces: npt.NDArray[Any]
    tokens: npt.NDArray[Any]
    token_bytes: npt.NDArray[Any]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arrays."""
        return self.pieces.nbytes + self.tokens.nbytes + self.token_bytes.nbytes

    def slice(self, first: int, beyond: int) -> RowTokens:
        """Rows first..beyond-1; past the end there are none."""
        first, beyond = min(first, self.count), min(beyond, self.count)
        begin, end = np.searchsorted(self.pieces[_ROW], (first, beyond)).tolist()
        held = self.pieces[_HELD].astype(np.int64)
        tokens = slice(int(held[:begin].sum()), int(held[:end].sum()))
        pieces = self.pieces[:, begin:end].copy()
        if begin < end:  # else `first` may be too large for the pieces' type
            pieces[_ROW] -= first
        return RowTokens(beyond - first, pieces, self.tokens[tokens], self.token_bytes[tokens])

    def columns(self, seq_len: int, pad_id: int, places: Ints, count: int) -> Columns:
        """`count` rows as types.Columns: row r of these is row `places[r]` (ascending), all others are inactive."""
        row, column, length, held, prompts, unlabelled = self.pieces.astype(np.int64)
        row = places[row]
        within = _runs(length)
        source = within + np.repeat(np.cumsum(held) - held, length)
        slot = within + np.repeat(row * seq_len + column, length)
        labelled = (within + 1 < np.repeat(held, length)) & (within >= np.repeat(unlabelled, length))
        follower = source[labelled] + 1

        def filled_with(fill: int, values: npt.NDArray[Any], at: Ints) -> npt.NDArray[np.int32]:
            filled = np.full(count * seq_len, fill, dtype=np.int32)
            filled[at] = values
            return filled.reshape(count, seq_len)

        ordinal = np.arange(len(row)) - np.searchsorted(row, row)
        # Padding is a document of its own: numbered after the row's pieces, positions counted from its first.
        used = np.zeros(count, dtype=np.int64)
        np.add.at(used, row, length)
        documents = (
            np.broadcast_to(np.bincount(row, minlength=count)[:, None], (count, seq_len)).astype(np.int32).reshape(-1)
        )
        positions = (np.arange(seq_len)[None, :] - used[:, None]).astype(np.int32).reshape(-1)
        documents[slot] = np.repeat(ordinal, length)
        positions[slot] = within
        prompt = np.zeros(count * seq_len, dtype=bool)
        prompt[slot] = within < np.repeat(prompts, length)
        active = np.zeros(count, dtype=bool)
        active[places] = True
        return {
            "inputs": filled_with(pad_id, self.tokens[source], slot),
            "labels": filled_with(IGNORE_LABEL, self.tokens[follower], slot[labelled]),
            "label_bytes": filled_with(0, self.token_bytes[follower], slot[labelled]),
            "documents": documents.reshape(count, seq_len),
            "positions": positions.reshape(count, seq_len),
            "prompt": prompt.reshape(count, seq_len),
            "active": active,
        }


def merged_rows(parts: Sequence[tuple[RowTokens, Ints]]) -> RowTokens:
    """The rows of several parts as one: row r of a part becomes row `places[r]` of the whole, whose numbers from 0 on
    are each given once."""
    if not parts:
        return RowTokens(0, np.zeros((6, 0), np.uint8), np.zeros(0, np.uint16), np.zeros(0, np.uint8))
    if len(parts) == 1 and np.array_equal(parts[0][1], np.arange(parts[0][0].count)):
        return parts[0][0]
    pieces = np.concatenate([rows.pieces.astype(np.int64) for rows, _ in parts], axis=1)
    pieces[_ROW] = np.concatenate([places[rows.pieces[_ROW]] for rows, places in parts])
    count = sum(rows.count for rows, _ in parts)
    tokens = np.concatenate([rows.tokens for rows, _ in parts])
    token_bytes = np.concatenate([rows.token_bytes for rows, _ in parts])
    if (np.diff(pieces[_ROW]) >= 0).all():
        return RowTokens(count, _narrow(pieces), tokens, token_bytes)
    order = np.argsort(pieces[_ROW], kind="stable")
    begin = np.cumsum(pieces[_HELD]) - pieces[_HELD]
    pieces = pieces[:, order]
    slices = _slices(begin[order], pieces[_HELD])
    return RowTokens(count, _narrow(pieces), _concatenated(tokens, slices), _concatenated(token_bytes, slices))


def _slices(begin: Ints, length: Ints) -> list[slice]:
    """The runs of `length` elements from `begin` on, one after the other, those that follow each other as one: a slice
    copies many times faster than as many indices."""
    if not len(begin):
        return []
    end = begin + length
    breaks = np.flatnonzero(begin[1:] != end[:-1])
    firsts, lasts = np.concatenate(([0], breaks + 1)), np.concatenate((breaks, [len(begin) - 1]))
    return [slice(first, beyond) for first, beyond in zip(begin[firsts].tolist(), end[lasts].tolist(), strict=True)]


def _concatenated(values: npt.NDArray[Any], parts: list[slice]) -> npt.NDArray[Any]:
    return np.concatenate([values[:0], *(values[part] for part in parts)])


def _narrow(values: Ints | Sequence[Ints]) -> npt.NDArray[Any]:
    """The values, none below 0, in the smallest integers that hold them."""
    whole = np.asarray(values)
    return whole.astype(np.min_scalar_type(int(whole.max(initial=0))))


class _PackedRows:
    """Packed documents: row k is stream[k*N : k*N+S], N being the stride."""

    def __init__(self, store: TextStore, seq_len: int, stride: int) -> None:
        self._starts, self._seq_len, self._tokens, self._stride = store.starts, seq_len, len(store.tokens), stride
        # A last row that held nothing but the last end-of-text would have no label. (A document has a token before its
        # end-of-text, so with S >= 2 every other row has one.)
        self.count = int(_windows(np.array(self._tokens - 1), seq_len, stride))

    def pieces(self, rows: Ints) -> _Pieces:
        begin = rows * self._stride
        end = np.minimum(begin + self._seq_len, self._tokens)
        first = np.searchsorted(self._starts, begin, side="right") - 1
        beyond = np.searchsorted(self._starts, end, side="left")
        row = np.repeat(np.arange(len(rows)), beyond - first)
        document = _runs(beyond - first) + np.repeat(first, beyond - first)
        source = np.maximum(self._starts[document], begin[row])
        document_end = self._starts[document + 1]
        length = np.minimum(document_end, end[row]) - source
        column = source - begin[row]
        repeated = np.where(rows[row] > 0, self._seq_len - self._stride, 0)
        return _Pieces(row, column, source, length, document_end, np.zeros_like(row), np.maximum(repeated - column, 0))


class _Rows:
    """Unpacked documents: each in rows of its own."""

    def __init__(self, store: TextStore, seq_len: int, stride: int) -> None:
        self._starts, self._seq_len, self._stride = store.starts, seq_len, stride
        # The end-of-text is a label but needs no position, hence length - 1; each document has at least one row.
        needed = _windows(np.diff(store.starts) - 1, seq_len, stride)
        self._row_ends = np.cumsum(needed)
        self.count = int(self._row_ends[-1]) if len(needed) else 0

    def pieces(self, rows: Ints) -> _Pieces:
        document = np.searchsorted(self._row_ends, rows, side="right")
        before = np.where(document > 0, self._row_ends[document - 1], 0)
        end = self._starts[document + 1]
        source = self._starts[document] + (rows - before) * self._stride
        length = np.minimum(source + self._seq_len, end) - source
        zero = np.zeros_like(rows)
        repeated = np.where(rows > before, self._seq_len - self._stride, 0)
        return _Pieces(np.arange(len(rows)), zero, source, length, end, zero, repeated)


def _windows(labels: Ints, seq_len: int, stride: int) -> Ints:
    """The number of rows of `seq_len` positions, `stride` apart, that hold this many labels: `seq_len` in the first row
    and `stride` in each further one."""
    beyond = -(-(labels - seq_len) // stride)
    return np.where(labels > 0, 1 + np.maximum(beyond, 0), 0)


class _Pairs:
    """Prompts and responses, whole pairs per row, those that do not fit cut."""

    def __init__(self, store: TextStore, seq_len: int, packing: bool) -> None:
        self._store, self._seq_len = store, seq_len
        self.cut = 0
        row_starts: list[int] = []
        room = 0
        for begin in range(0, store.documents, _SCAN):
            source, end, _, cut = self._fitted(np.arange(begin, min(begin + _SCAN, store.documents)))
            self.cut += int(cut.sum())
            # The end-of-text is a label but needs no position. Each pair has a label, as the store keeps none without
            # a token.
            for pair, length in enumerate((end - source - 1).tolist(), start=begin):
                if not packing or length > room:
                    row_starts.append(pair)
                    room = seq_len
                room -= length
        self.count = len(row_starts)
        self._row_starts = np.array([*row_starts, store.documents], dtype=np.int64)

    def _fitted(self, pairs: Ints) -> tuple[Ints, Ints, Ints, npt.NDArray[np.bool_]]:
        """Where each pair's kept tokens begin and end in the stream, how many of them are prompt, and whether it was
        cut.

        S + 1 tokens fit. The prompt is cut at its start until the response has at least half of them; then the
        response at its end, end-of-text included, so that a cut answer does not teach to stop there.
        """
        if self._store.prompts is None:
            raise ValueError("the store has no pairs")
        begin, end = self._store.starts[pairs], self._store.starts[pairs + 1]
        prompt = self._store.prompts[pairs].astype(np.int64)
        response = end - begin - prompt
        fits = self._seq_len + 1
        kept_prompt = np.minimum(prompt, fits - np.minimum(response, (fits + 1) // 2))
        kept_response = np.minimum(response, fits - kept_prompt)
        source = begin + prompt - kept_prompt
        cut = (kept_prompt < prompt) | (kept_response < response)
        return source, begin + prompt + kept_response, kept_prompt, cut

    def pieces(self, rows: Ints) -> _Pieces:
        first, beyond = self._row_starts[rows], self._row_starts[rows + 1]
        row = np.repeat(np.arange(len(rows)), beyond - first)
        source, end, prompt, _ = self._fitted(_runs(beyond - first) + np.repeat(first, beyond - first))
        length = end - source - 1
        before = np.cumsum(length) - length
        first_of_row = np.searchsorted(row, row)
        column = before - before[first_of_row]
        return _Pieces(row, column, source, length, end, np.minimum(prompt, length), np.maximum(prompt - 1, 0))


def _runs(lengths: Ints) -> Ints:
    """0..n-1 for each n of `lengths`, one after the other."""
    total = int(lengths.sum())
    return np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)

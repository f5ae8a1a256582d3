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

from dataclasses import dataclass

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
        if indices.size and (indices.min() < -1 or indices.max() >= len(self)):
            raise IndexError(f"samples are 0..{len(self) - 1}, asked for {indices.min()}..{indices.max()}")
        active = indices >= 0
        where = np.flatnonzero(active)
        pieces = self._layout.pieces(indices[where])
        columns = self._fill(pieces, where, len(indices))
        columns["active"] = active
        return columns

    def _fill(self, pieces: _Pieces, where: Ints, count: int) -> Columns:
        """`count` rows filled with `pieces`; piece row r goes to row `where[r]`."""
        seq_len, stream = self.seq_len, self.store
        within = _runs(pieces.length)
        source = within + np.repeat(pieces.source, pieces.length)
        row = where[pieces.row]
        slot = within + np.repeat(row * seq_len + pieces.column, pieces.length)
        labelled = (source + 1 < np.repeat(pieces.end, pieces.length)) & (
            within >= np.repeat(pieces.unlabelled, pieces.length)
        )
        follower = source[labelled] + 1

        def column(fill: int, values: npt.NDArray[np.int32] | Ints, at: Ints) -> npt.NDArray[np.int32]:
            filled = np.full(count * seq_len, fill, dtype=np.int32)
            filled[at] = values
            return filled.reshape(count, seq_len)

        ordinal = np.arange(len(row)) - np.searchsorted(row, row)
        # Padding is a document of its own: numbered after the row's pieces, positions counted from its first.
        used = np.zeros(count, dtype=np.int64)
        np.add.at(used, row, pieces.length)
        documents = (
            np.broadcast_to(np.bincount(row, minlength=count)[:, None], (count, seq_len)).astype(np.int32).reshape(-1)
        )
        positions = (np.arange(seq_len)[None, :] - used[:, None]).astype(np.int32).reshape(-1)
        documents[slot] = np.repeat(ordinal, pieces.length)
        positions[slot] = within
        prompt = np.zeros(count * seq_len, dtype=bool)
        prompt[slot] = within < np.repeat(pieces.prompt, pieces.length)
        return {
            "inputs": column(stream.pad_id, stream.tokens[source], slot),
            "labels": column(IGNORE_LABEL, stream.tokens[follower], slot[labelled]),
            "label_bytes": column(0, stream.token_bytes[follower], slot[labelled]),
            "documents": documents.reshape(count, seq_len),
            "positions": positions.reshape(count, seq_len),
            "prompt": prompt.reshape(count, seq_len),
        }


def padding_rows(seq_len: int, count: int, pad_id: int) -> Columns:
    """`count` inactive rows."""
    shape = (count, seq_len)
    return {
        "inputs": np.full(shape, pad_id, dtype=np.int32),
        "labels": np.full(shape, IGNORE_LABEL, dtype=np.int32),
        "label_bytes": np.zeros(shape, dtype=np.int32),
        "documents": np.zeros(shape, dtype=np.int32),
        "positions": np.tile(np.arange(seq_len, dtype=np.int32), (count, 1)),
        "prompt": np.zeros(shape, dtype=bool),
        "active": np.zeros(count, dtype=bool),
    }


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

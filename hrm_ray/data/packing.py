"""Text samples: rows of `seq_len` tokens cut from a token store.

One job: TextSamples, a SampleSet. Every token that follows another one of its document is the label of exactly one
position; a document's first token is never a label, because it would be predicted from another document. Order is
order.py's.

- packed: the stream of all documents is cut every `seq_len` tokens; window k has the inputs stream[k*S : k*S+S].
- not packed: each document begins a row, a long one goes on in further rows, a short row is padded.
- prefix (pairs of prompt and response): a pair is never divided over rows; labels are the response's tokens and its
  end-of-text. Packed, a row takes whole pairs in their order as long as they fit; else each row is one pair.

A row consists of pieces, runs of tokens of one document; the rest is padding, which counts as a document of its own.
Memory: packed rows need none beyond the maps; the other two keep 8 bytes per row or document.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_ray.data.text_store import TextStore, open_text_store
from hrm_ray.errors import DataFault, Fault, SettingsError
from hrm_ray.values import IGNORE_LABEL, Columns

Ints = npt.NDArray[np.int64]

# Lengths of documents are read in pieces of this many, so that a pass over a large store stays small in memory.
_SCAN = 1 << 20


@dataclass(frozen=True)
class _Pieces:
    """Runs of tokens, all int64 [P]: `row` and `column` of the first token, `source` its place in the stream,
    `length` in input positions, `end` where its document's last usable token ends, `prompt` how many of the positions
    are prompt, and `unlabelled` how many positions at the piece's start have no label."""

    row: Ints
    column: Ints
    source: Ints
    length: Ints
    end: Ints
    prompt: Ints
    unlabelled: Ints


class TextSamples:
    """Packed or padded rows over a token store (values.Columns, text). Rows without any label do not exist."""

    def __init__(self, folder: Path, seq_len: int, packing: bool, prefix: bool, allow_short: bool = False) -> None:
        """`allow_short`: data shorter than one row is taken (held-out data); else it raises SettingsError.

        Raises DataFault for a damaged store, or one of plain documents with `prefix`, and SettingsError for a
        `seq_len` below 2.
        """
        self.store: TextStore = open_text_store(folder)
        self.seq_len, self.prefix = seq_len, prefix
        self.cut_pairs = 0
        """Pairs that do not fit a row and lost tokens of their prompt's start or their response's end."""
        meta = self.store.meta
        if seq_len < 2:
            raise SettingsError(
                Fault(f"max_seq_len {seq_len}", "a row needs 2 tokens or more", "Give a larger --max-seq-len")
            )
        if prefix and not meta.pairs:
            reason = "it holds plain documents, not pairs of prompt and response"
            raise DataFault(Fault(str(folder), reason, "Give --prompt-column and --response-column"))
        if meta.tokens < seq_len and not allow_short:
            reason = f"the data has only {meta.tokens} tokens, not one row of {seq_len}"
            raise SettingsError(
                Fault(f"max_seq_len {seq_len}", reason, f"Give --max-seq-len {meta.tokens} or less, or more data")
            )
        self._layout: _Stream | _Rows | _Pairs
        if prefix:
            pairs = _Pairs(self.store, seq_len, packing)
            self._layout, self.cut_pairs = pairs, pairs.cut
        else:
            self._layout = (_Stream if packing else _Rows)(self.store, seq_len)

    def __len__(self) -> int:
        return self._layout.count

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        """The rows at `indices` (int64 [B]; -1 gives an inactive padding row) as columns of values.Columns."""
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
        """`count` rows with `pieces` laid in; piece row r goes to row `where[r]`."""
        seq_len, stream = self.seq_len, self.store
        within = _runs(pieces.length)
        source = within + np.repeat(pieces.source, pieces.length)
        row = where[pieces.row]
        slot = within + np.repeat(row * seq_len + pieces.column, pieces.length)
        labelled = (source + 1 < np.repeat(pieces.end, pieces.length)) & (
            within >= np.repeat(pieces.unlabelled, pieces.length)
        )
        follower = source[labelled] + 1

        def laid(fill: int, values: npt.NDArray[np.int32] | Ints, at: Ints) -> npt.NDArray[np.int32]:
            column = np.full(count * seq_len, fill, dtype=np.int32)
            column[at] = values
            return column.reshape(count, seq_len)

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
            "inputs": laid(stream.meta.pad_id, stream.tokens[source], slot),
            "labels": laid(IGNORE_LABEL, stream.tokens[follower], slot[labelled]),
            "label_bytes": laid(0, stream.token_bytes[follower], slot[labelled]),
            "documents": documents.reshape(count, seq_len),
            "positions": positions.reshape(count, seq_len),
            "prompt": prompt.reshape(count, seq_len),
        }


class _Stream:
    """Packed documents: row k is stream[k*S : k*S+S]."""

    def __init__(self, store: TextStore, seq_len: int) -> None:
        self._starts, self._seq_len, self._tokens = store.starts, seq_len, store.meta.tokens
        # A last row that held nothing but the last end-of-text would have no label. (A document has a token before its
        # end-of-text, so with S >= 2 every other row has one.)
        self.count = -(-(store.meta.tokens - 1) // seq_len)

    def pieces(self, rows: Ints) -> _Pieces:
        begin = rows * self._seq_len
        end = np.minimum(begin + self._seq_len, self._tokens)
        first = np.searchsorted(self._starts, begin, side="right") - 1
        beyond = np.searchsorted(self._starts, end, side="left")
        row = np.repeat(np.arange(len(rows)), beyond - first)
        document = _runs(beyond - first) + np.repeat(first, beyond - first)
        source = np.maximum(self._starts[document], begin[row])
        document_end = self._starts[document + 1]
        length = np.minimum(document_end, end[row]) - source
        zero = np.zeros_like(row)
        return _Pieces(row, source - begin[row], source, length, document_end, zero, zero)


class _Rows:
    """Unpacked documents: each in rows of its own."""

    def __init__(self, store: TextStore, seq_len: int) -> None:
        self._starts, self._seq_len = store.starts, seq_len
        # The end-of-text is a label but needs no position, hence length - 1; each document has at least one row.
        needed = -(-(np.diff(store.starts) - 1) // seq_len)
        self._row_ends = np.cumsum(needed)
        self.count = int(self._row_ends[-1])

    def pieces(self, rows: Ints) -> _Pieces:
        document = np.searchsorted(self._row_ends, rows, side="right")
        before = np.where(document > 0, self._row_ends[document - 1], 0)
        end = self._starts[document + 1]
        source = self._starts[document] + (rows - before) * self._seq_len
        length = np.minimum(source + self._seq_len, end) - source
        zero = np.zeros_like(rows)
        return _Pieces(np.arange(len(rows)), zero, source, length, end, zero, zero)


class _Pairs:
    """Prompts and responses, whole pairs per row, those that do not fit cut."""

    def __init__(self, store: TextStore, seq_len: int, packing: bool) -> None:
        self._store, self._seq_len = store, seq_len
        self.cut = 0
        row_starts: list[int] = []
        room = 0
        for begin in range(0, store.meta.documents, _SCAN):
            source, end, _, cut = self._fitted(np.arange(begin, min(begin + _SCAN, store.meta.documents)))
            self.cut += int(cut.sum())
            # The end-of-text is a label but needs no position. Each pair has a label, as the store keeps none without
            # a token.
            for pair, length in enumerate((end - source - 1).tolist(), start=begin):
                if not packing or length > room:
                    row_starts.append(pair)
                    room = seq_len
                room -= length
        self.count = len(row_starts)
        self._row_starts = np.array([*row_starts, store.meta.documents], dtype=np.int64)

    def _fitted(self, pairs: Ints) -> tuple[Ints, Ints, Ints, npt.NDArray[np.bool_]]:
        """Where each pair's kept tokens begin and end in the stream, how many of them are prompt, and whether it was
        cut.

        S + 1 tokens fit. The prompt gives way at its start until the response has at least half of them; then the
        response at its end, end-of-text included, so that a cut answer does not teach to stop there.
        """
        assert self._store.prompts is not None, "TextSamples checks that the store holds pairs"
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
        laid = np.cumsum(length) - length
        first_of_row = np.searchsorted(row, row)
        column = laid - laid[first_of_row]
        return _Pieces(row, column, source, length, end, np.minimum(prompt, length), np.maximum(prompt - 1, 0))


def _runs(lengths: Ints) -> Ints:
    """0..n-1 for each n of `lengths`, one after the other."""
    total = int(lengths.sum())
    return np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)

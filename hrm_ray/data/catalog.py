"""The catalog of a corpus: which rows make up each chunk of each block, and a fingerprint of their text.

Entries are facts about the corpus, not about a run: they are recorded once, as the corpus is read, and are valid for
every epoch. They also show whether a corpus is still the one that a run was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import TextIO

from hrm_ray.data.parts import Part
from hrm_ray.errors import DataError, Fault

CHANGED = "Restore the earlier data, or start a new run with --student-init from this one"
"""What to do about data that is not what a run was trained on."""

_END = "end"


@dataclass(frozen=True)
class RowPosition:
    """The position of a row: number of its part, number of the row in the part, the mark at which reading can start,
    and for a text that comes in pieces the number of the piece."""

    part: int
    row: int
    mark: int | None = None
    piece: int = 0


@dataclass(frozen=True)
class ChunkStart:
    """Where a chunk begins; its number in the corpus, its block, and its number in the block; `block_rows` and
    `first_row` count the rows before it in the block and in the corpus."""

    number: int
    block: int
    chunk: int
    block_rows: int
    first_row: int
    place: RowPosition


@dataclass(frozen=True)
class ChunkEntry:
    """One chunk: where it begins, the `rows` that end in it (those that cannot be used included), how many of them are
    `bad` or were `left_out` by --ascii-only, bytes of text, and a fingerprint of all of it. `ends_block`: its block is
    full."""

    start: ChunkStart
    rows: int
    bad: int
    left_out: int
    text_bytes: int
    fingerprint: str
    ends_block: bool
    after: RowPosition | None = field(default=None, compare=False)
    """Where the next chunk begins; None in catalogs of earlier versions."""

    @property
    def number(self) -> int:
        return self.start.number

    @property
    def name(self) -> str:
        """The chunk's name in messages."""
        return f"block {self.start.block}, chunk {self.start.chunk}"

    @property
    def next(self) -> ChunkStart | None:
        """The start of the next chunk, where it is known."""
        if self.after is None:
            return None
        start, full = self.start, self.ends_block
        return ChunkStart(
            number=start.number + 1,
            block=start.block + full,
            chunk=0 if full else start.chunk + 1,
            block_rows=0 if full else start.block_rows + self.rows,
            first_row=start.first_row + self.rows,
            place=self.after,
        )


class Catalog:
    """Entries by number, from 0 without gaps; `ended` once the corpus is known to have no further chunk."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Opens the file `path`, if there is one. Only the process that `writes` adds to it.

        Raises DataError where the file is not what was written.
        """
        self._path = path
        self._writes = writes
        self._file: TextIO | None = None
        self._entries: list[ChunkEntry] = []
        self.ended = False
        if path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Sequence[ChunkEntry]:
        """All that are known, rising in number."""
        return self._entries

    def get(self, number: int) -> ChunkEntry | None:
        """The entry of a chunk, None where it is not known yet."""
        return self._entries[number] if number < len(self._entries) else None

    def add(self, entry: ChunkEntry) -> None:
        """Add an entry. Raises DataError where the catalog has another one of that number."""
        known = self.get(entry.number)
        if known is not None:
            if known != entry:
                raise changed(known.name, "it does not hold the rows that it held when it was read first")
            return
        if entry.number != len(self._entries):
            raise RuntimeError(f"chunk {entry.number} was added to a catalog of {len(self._entries)} chunks")
        self._entries.append(entry)
        self._write(json.dumps(astuple(entry), separators=(",", ":")))

    def end(self) -> None:
        """Record that there are no more chunks."""
        if not self.ended:
            self.ended = True
            self._write(json.dumps(_END))

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def block_sizes(self) -> list[int]:
        """Chunks of each block, of a catalog that has ended."""
        if not self.ended:
            raise RuntimeError("block sizes need a catalog that has ended")
        sizes: list[int] = []
        for entry in self._entries:
            if entry.start.chunk == 0:
                sizes.append(0)
            sizes[-1] += 1
        return sizes

    def _write(self, line: str) -> None:
        if not self._writes:
            return
        if self._file is None:
            self._cut_torn_line()
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
        self._file.write(line + "\n")
        self._file.flush()

    def _cut_torn_line(self) -> None:
        """Remove an incomplete last line, left by a process that died, so that the next one does not join it."""
        if self._path.is_file():
            content = self._path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with self._path.open("r+b") as file:
                    file.truncate(whole)

    def _read(self) -> None:
        content = self._path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                values = json.loads(line)
                if values == _END:
                    self.ended = True
                    continue
                (own, block, chunk, block_rows, first_row, place), *about = values
                start = ChunkStart(own, block, chunk, block_rows, first_row, RowPosition(*place))
                after = RowPosition(*about[6]) if len(about) > 6 else None
                entry = replace(ChunkEntry(start, *about[:6]), after=after)
            except (ValueError, TypeError) as error:
                hint = "Delete the bundle's folder data/; it will be rebuilt"
                reason = f"not an entry of a catalog ({error})"
                raise DataError(Fault(f"{self._path}:{number}", reason, hint)) from error
            if entry.number > len(self._entries) or (known := self.get(entry.number)) not in (None, entry):
                reason = f"found chunk {entry.number}, expected chunk {len(self._entries)}"
                hint = "Delete the bundle's folder data/; it will be rebuilt"
                raise DataError(Fault(f"{self._path}:{number}", reason, hint))
            # Two processes may have written the same entry.
            if known is None:
                self._entries.append(entry)


def check_parts(stored: Sequence[Part], now: Sequence[Part]) -> list[int]:
    """Numbers of the parts whose content may have changed since `stored` was listed: their stamps differ.

    Raises DataError where a part is new, gone, or of another size. A corpus of one file may have another name now.
    """
    alone = len(stored) == len(now) == 1
    for before, after in zip(stored, now, strict=False):
        if not alone and before.name != after.name:
            raise changed(after.address, f"`{before.name}` stood in its place when the run began")
        if (before.split, before.apart) != (after.split, after.apart):
            raise changed(after.address, "other members of it are held out now than when the run began")
        if before.bytes != after.bytes:
            raise changed(after.address, f"it has {after.bytes} bytes, and had {before.bytes} when the run began")
    if len(stored) > len(now):
        raise changed(stored[len(now)].address, "it is gone since the run began")
    if len(now) > len(stored):
        raise changed(now[len(stored)].address, "it was not there when the run began")
    return [
        number for number, (before, after) in enumerate(zip(stored, now, strict=True)) if before.stamp != after.stamp
    ]


def touching(entries: Sequence[ChunkEntry], parts: Iterable[int], count: int) -> list[ChunkEntry]:
    """The entries with rows from any of `parts`; the corpus has `count` parts."""
    wanted = set(parts)
    found = []
    for entry, follower in zip(entries, [*entries[1:], None], strict=True):
        last = follower.start.place.part if follower is not None else count - 1
        if wanted & set(range(entry.start.place.part, last + 1)):
            found.append(entry)
    return found


def changed(what: str, how: str) -> DataError:
    """The error for a corpus that is not the one of the catalog."""
    return DataError(Fault(what, f"the corpus is not what the run was trained on: {how}", CHANGED))

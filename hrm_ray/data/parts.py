"""The parts of a corpus in reading order: what a path, a pattern, a cloud address or a data set of the Hub consists of.

A part is a file or an archive, one stream of rows. Only what the choice of a split needs is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.data import hub
from hrm_ray.data.archives.members import Selection
from hrm_ray.data.archives.tars import tar_directory
from hrm_ray.data.archives.zips import zip_directory
from hrm_ray.data.file_kinds import READABLE, FileKind, is_hidden, kind_of
from hrm_ray.data.file_systems import (
    Entry,
    FileSystem,
    file_system_of,
    has_wildcards,
    in_order,
    is_local,
    real,
    require_path,
)
from hrm_ray.data.formats.columnar import has_arrow_index
from hrm_ray.data.messages import MessagesColumn
from hrm_ray.data.rows import TextColumns, TextRows
from hrm_ray.data.splits import WHOLE, check_left, has_split, missing_split, split_of
from hrm_ray.data.streams import ContainerUnreadable
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.settings.hub_name import HUB

_NAMED = 3
"""Files that a note on files passed over names."""

_RANDOM_ACCESS = frozenset({"txt", "md", "csv", "tsv", "jsonl", "parquet"})
"""Formats that can be read from any row on, if they are not compressed."""


@dataclass(frozen=True)
class TextSource:
    """Where documents come from. With `prompt_column` and `response_column` (both or none) rows are pairs."""

    path: str
    """A file, a folder, a pattern, a cloud address, or `hf://id:config:split`; a Path is taken as well."""
    split: str = WHOLE
    text_column: str = "text"
    prompt_column: str | None = None
    response_column: str | None = None
    apart: str | None = None
    """A split that is held out of this one, where the folder has no split of this one's name and so is taken whole."""
    text_rows: TextRows = "document"
    """What a row of a plain text file is."""
    as_text: str = ""
    """Patterns of names, separated by commas, of files that are read as text; see `kind_of`."""
    encoding: str | None = None
    """Encoding of text files without a byte-order mark; None: UTF-8."""
    delimiter: str | None = None
    """Character between the fields of .csv and .tsv; None: the suffix's own, or what the header shows."""
    messages_column: str | None = None
    """Column of chats; it takes the place of the others."""
    messages_in_pairs: bool = False
    """Whether chats are pairs of prompt and response."""
    strict: bool = False
    """Whether a file without text data in a folder is a bad row like others; else it is passed over."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))

    @property
    def pairs(self) -> bool:
        """True where rows are prompt and response."""
        return self.columns.pairs

    @property
    def columns(self) -> TextColumns:
        """The columns that hold the documents."""
        if self.messages_column is not None:
            return MessagesColumn(self.messages_column, pairs=self.messages_in_pairs)
        return TextColumns(self.text_column, self.prompt_column, self.response_column)


@dataclass(frozen=True)
class Part:
    """One stream of rows: a file, or an archive of files. Plain values only, since it travels to other processes."""

    name: str
    """Relative to the corpus's root, "/" between the parts; the same when the corpus moves."""
    address: str
    """What it is opened with."""
    bytes: int
    """Its size as stored; 0 where unknown."""
    stamp: str
    """Changes when the part is written again, even if its size does not; empty where unknown."""
    random_access: bool
    """Whether reading can begin at any row, given the mark of the row before it, without reading those before."""
    split: str | None = None
    """Of an archive that is the whole corpus: which members are read (None: all but `apart`)."""
    apart: str | None = None
    """Of an archive that is the whole corpus: the split of members that are not read."""
    as_text: str = ""
    """The source's patterns."""
    lenient: bool = False
    """Whether a file in it (or the part itself) that holds no text data is passed over."""

    @property
    def kind(self) -> FileKind | None:
        """Its format; None for a part of a data set of the Hub."""
        return kind_of(self.address, self.as_text)

    @property
    def undecided(self) -> bool:
        """Whether the archive's names are not known yet, so that reading must find out what `split` means."""
        return self.split == WHOLE and self.kind is not None and not _can_be_scanned(self.kind, self.address)


@dataclass(frozen=True)
class PartList:
    """The parts of a corpus in order, and the number of files (or archive members) that are no part of it. `splits` are
    the splits of its files or members (None: unknown), `notes` say what a person may miss in it."""

    parts: tuple[Part, ...]
    skipped: int
    splits: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def list_parts(source: TextSource) -> PartList:
    """The parts of `source`, by the parts of their names.

    In a folder, split NAME is its sub-folder NAME and its files NAME.*; where there are none, the split "train" is the
    whole folder, without the split `apart`; hidden names are left out. The same holds for the members of an archive
    that is the whole corpus. A file that is not an archive has only the split "train".

    Raises SettingsError for a path or columns that cannot be used, DataError for an unknown suffix, an unknown split or
    a place without readable files, UnavailableError where a cloud or the Hub cannot be reached or a library is missing.
    """
    if (source.prompt_column is None) != (source.response_column is None):
        reason = "pairs need both a prompt and a response column"
        hint = "Give both --prompt-column and --response-column, or neither"
        raise SettingsError(Fault(f"column `{source.prompt_column or source.response_column}`", reason, hint))
    if source.path.startswith(HUB):
        found, splits = hub.list_shards(source.path, source.split)
        parts = tuple(Part(shard.name, shard.address, shard.bytes, shard.stamp, False) for shard in found)
        return PartList(parts, skipped=0, splits=splits)
    file_system, path = file_system_of(source.path), source.path
    if file_system.is_folder(path):
        return _listed(source, file_system, in_order(file_system.walk(path)))
    entry = file_system.file(path)
    if entry is not None:
        return _single(source, file_system, entry)
    if has_wildcards(path):
        matched = in_order(file_system.matching(path))
        if not matched:
            raise SettingsError(Fault(path, "no file matches this pattern", "Give another, or a folder"))
        return _listed(source, file_system, matched)
    if is_local(path):
        require_path(Path(path))
    raise SettingsError(Fault(path, "nothing exists at this address", "Check the bucket and the key"))


def _listed(source: TextSource, file_system: FileSystem, found: list[Entry]) -> PartList:
    """The parts of a folder or a pattern."""
    visible = [entry for entry in found if not is_hidden(entry.name)]
    kinds = [kind_of(entry.name, source.as_text) for entry in visible]
    there = [entry for entry, kind in zip(visible, kinds, strict=True) if kind is not None]
    readable = [entry for entry in there if not entry.is_dangling]
    skipped = len(found) - len(readable)
    unread = [entry.name for entry, kind in zip(visible, kinds, strict=True) if kind is None]
    dangling = [entry.name for entry in there if entry.is_dangling]
    notes = (*_unread_notes(unread), *(_dangling_notes(dangling)))
    names = [entry.name for entry in readable]
    if has_split(source.path, names, source.split, skipped):
        chosen = [entry for entry in readable if split_of(entry.name) == source.split]
    else:
        check_left(source.path, names, source.apart)
        chosen = [entry for entry in readable if split_of(entry.name) != source.apart]
    return PartList(
        tuple(_part(source, entry, file_system, lenient=not source.strict) for entry in chosen),
        skipped,
        _splits(names),
        notes,
    )


def passed_over(names: Sequence[str], one: str, several: str) -> str:
    """A note on names that are not read, each of them `one`, together `several`: how many, and the first three."""
    shown, more = ", ".join(names[:_NAMED]), len(names) - _NAMED
    what = f"{len(names):,} {one if len(names) == 1 else several}"
    return f"passed over {what}: {shown}{f' and {more:,} more' if more > 0 else ''}."


def _unread_notes(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    note = passed_over(names, "file of another kind", "files of other kinds")
    return (f"{note.removesuffix('.')} (--as-text PATTERNS reads such files as text).",)


def _dangling_notes(names: Sequence[str]) -> tuple[str, ...]:
    return (passed_over(names, "link that leads nowhere", "links that lead nowhere"),) if names else ()


def _splits(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({split_of(name) for name in names}))


def _part(source: TextSource, entry: Entry, file_system: FileSystem, *, lenient: bool) -> Part:
    kind = kind_of(entry.name, source.as_text)
    random_access = kind is not None and kind.compression is None and kind.form in _RANDOM_ACCESS
    if kind is not None and kind.form != "parquet" and source.encoding is not None:
        # A stream that is decoded cannot be sought in.
        random_access = False
    if kind is not None and kind.compression is None and kind.form == "arrow":
        try:
            with file_system.open(entry.address) as file:
                random_access = has_arrow_index(file)
        except OSError:
            # Reading it reports what is wrong.
            random_access = False
    return Part(
        entry.name,
        entry.address,
        entry.bytes,
        entry.stamp,
        random_access,
        as_text=source.as_text,
        lenient=lenient,
    )


def _single(source: TextSource, file_system: FileSystem, entry: Entry) -> PartList:
    """The part of one file."""
    kind = kind_of(entry.name, source.as_text)
    if kind is None:
        suffix = "".join(Path(entry.name).suffixes[-1:])
        files = f"files with the suffix `{suffix}`" if suffix else "files without a suffix"
        hint = f'Give {READABLE}, or --as-text "{f"*{suffix}" if suffix else entry.name}"'
        raise DataError(Fault(source.path, f"{files} cannot be read unless --as-text names them", hint))
    if kind.is_archive:
        return _archive(source, entry, kind)
    if source.split != WHOLE:
        raise missing_split(source.path, source.split, [WHOLE])
    return PartList((_part(source, entry, file_system, lenient=False),), 0, (WHOLE,))


def _archive(source: TextSource, entry: Entry, kind: FileKind) -> PartList:
    """The part of one archive that is the whole corpus: its members are divided into splits as a folder's files are."""
    plain = (entry.name, entry.address, entry.bytes, entry.stamp)
    if not _can_be_scanned(kind, entry.address):
        part = Part(*plain, False, source.split, source.apart, source.as_text, not source.strict)
        return PartList((part,), 0)
    one_row_each = False
    try:
        if kind.form == "zip":
            directory = zip_directory(entry.address, entry.bytes, entry.stamp, source.as_text)
            names, unread = directory.names, directory.unread
        else:
            names, unread = tar_directory(entry.address, entry.bytes, entry.stamp, source.as_text)
    except ContainerUnreadable as error:
        raise DataError(error.fault) from error
    except OSError as error:
        reason = f"it cannot be read ({error.strerror or error})"
        raise DataError(Fault(source.path, reason, "Make it readable for this user")) from error
    if has_split(source.path, names, source.split, len(unread)):
        chosen = Selection(source.split)
    else:
        check_left(source.path, names, source.apart)
        chosen = Selection(None, source.apart)
    if kind.form == "zip":
        one_row_each = all(member.is_one_piece(source.text_rows) for member, _ in directory.chosen(chosen))
    part = Part(*plain, one_row_each, chosen.split, chosen.apart, source.as_text, not source.strict)
    shown = [name for name in unread if not is_hidden(name)]
    return PartList((part,), len(unread), _splits(list(names)), _unread_notes(shown))


def _can_be_scanned(kind: FileKind, address: str) -> bool:
    """Whether the names in an archive can be listed without reading it whole."""
    return kind.form == "zip" or (kind.form == "tar" and kind.compression is None and is_local(address))


def shared_part(first: TextSource, second: TextSource) -> str | None:
    """The address of a part that both sources read; None where there is none."""
    seen: dict[str, list[Part]] = {}
    for part in list_parts(first).parts:
        seen.setdefault(real(part.address), []).append(part)
    for part in list_parts(second).parts:
        for other in seen.get(real(part.address), []):
            if part.split == other.split or (None in (part.split, other.split) and not _held_out(part, other)):
                return part.address
    return None


def _held_out(first: Part, second: Part) -> bool:
    return (first.apart is not None and first.apart == second.split) or (
        second.apart is not None and second.apart == first.split
    )

"""Puzzles as samples: from a folder with dataset.json, a plain .safetensors file or .jsonl.

A plain file has `<split>.inputs`, `<split>.labels`, optional `<split>.puzzle_identifiers`; or none of the prefixes,
which is the split "train". Rows of .jsonl have lists `inputs` and `labels`.

Labels are used as they are. IGNORE_LABEL (-100) marks a cell without loss; in a folder with dataset.json the pad
token as a label does so too (reference: sapientinc/HRM, ignore_label_id). Plain files do not say which token pads, so
there every label counts, and padding rows use token 0 and identifier 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.file_systems import require_path
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.puzzles.format import DESCRIPTION, REBUILD, PuzzleFacts, read_description
from hrm_ray.data.splits import missing_split
from hrm_ray.errors import DataError, Fault, listed
from hrm_ray.rundir import file_sha256
from hrm_ray.types import IGNORE_LABEL, Columns

Tensors = dict[str, npt.NDArray[Any]]
_FINGERPRINT_ROWS = 4096


class PuzzleSamples:
    """A SampleSet of puzzles, held in memory in the width they have on disk (usually one byte per cell)."""

    def __init__(self, facts: PuzzleFacts, tensors: Tensors, source: Path, pad_labels_count: bool) -> None:
        """`tensors`: inputs and labels [N, S], optional puzzle_identifiers [N]; integers of any width. Raises
        DataError where they do not fit each other or `facts`."""
        self.facts = facts
        self._inputs, self._labels = tensors["inputs"], tensors["labels"]
        self._identifiers = tensors.get(
            "puzzle_identifiers", np.full(len(self._inputs), facts.blank_id, dtype=np.int32)
        )
        self._ignored = None if pad_labels_count else facts.pad_id
        _check_ids(self._inputs, 0, facts.vocab_size, source, "inputs", "the vocabulary")
        _check_ids(self._identifiers, 0, facts.num_puzzle_identifiers, source, "puzzle_identifiers", "the identifiers")
        counted = self._labels != IGNORE_LABEL
        if self._ignored is not None:
            counted &= self._labels != self._ignored
        _check_ids(self._labels[counted], 0, facts.vocab_size, source, "labels", "the vocabulary")
        unlabelled = np.flatnonzero(~counted.any(axis=1))
        if unlabelled.size:
            reason = "has no labels"
            raise DataError(Fault(f"{source}, sample {unlabelled[0]}", reason, "Give it labels or leave it out"))

    def __len__(self) -> int:
        return len(self._inputs)

    def first(self, count: int | None) -> PuzzleSamples:
        """The first `count` puzzles (None, or more than there are: all)."""
        if count is None or count >= len(self):
            return self
        few = copy(self)
        few._inputs, few._labels = self._inputs[:count], self._labels[:count]
        few._identifiers = self._identifiers[:count]
        return few

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        """The puzzles at `indices` (int64 [B]; -1 gives an inactive padding row) as types.Columns."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < -1 or indices.max() >= len(self)):
            raise IndexError(f"samples are 0..{len(self) - 1}, asked for {indices.min()}..{indices.max()}")
        active = indices >= 0
        taken = np.where(active, indices, 0)
        inputs, labels = self._inputs[taken].astype(np.int32), self._labels[taken].astype(np.int32)
        identifiers = self._identifiers[taken].astype(np.int32)
        if self._ignored is not None:
            labels[labels == self._ignored] = IGNORE_LABEL
        inputs[~active], labels[~active], identifiers[~active] = self.facts.pad_id, IGNORE_LABEL, self.facts.blank_id
        return {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers, "active": active}

    def fingerprint(self) -> str:
        """SHA-256 over the samples in order, independent of where and how they are stored."""
        digest = hashlib.sha256()
        for first in range(0, len(self), _FINGERPRINT_ROWS):
            columns = self.rows(np.arange(first, min(first + _FINGERPRINT_ROWS, len(self)), dtype=np.int64))
            for name in ("inputs", "labels", "puzzle_identifiers"):
                digest.update(np.ascontiguousarray(columns[name], dtype="<i4").tobytes())
        return digest.hexdigest()

    def fit_to(self, facts: PuzzleFacts) -> None:
        """For evaluation data: checks that the samples fit the training set's `facts` and takes those over, but for
        the count.

        Plain files do not say their vocabulary; an evaluation file may hold fewer tokens, but none that training does
        not know. Raises DataError where it does not fit.
        """
        own = self.facts
        for what, fits, there, known in (
            ("tokens", own.vocab_size <= facts.vocab_size, own.vocab_size, facts.vocab_size),
            ("cells", own.seq_len == facts.seq_len, own.seq_len, facts.seq_len),
            (
                "puzzle identifiers",
                own.num_puzzle_identifiers <= facts.num_puzzle_identifiers,
                own.num_puzzle_identifiers,
                facts.num_puzzle_identifiers,
            ),
        ):
            if not fits:
                reason = f"has {there} {what}, the training data has {known}"
                raise DataError(Fault(own.name, reason, "Evaluate on data of the same kind as the training data"))
        self.facts = replace(facts, count=own.count)


def open_puzzles(path: Path, split: str = "train", first: int | None = None) -> PuzzleSamples:
    """The split of the puzzle set at `path`; with `first`, only its first puzzles are read and checked. Raises
    DataError for what is no puzzle set, a missing split or damaged data."""
    require_path(path)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        return _open_built(path, split, first)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return _open_safetensors(path, split, first)
    parts = list_parts(TextSource(str(path), split)).parts
    return open_puzzle_rows([Path(part.address) for part in parts if part.kind == FileKind("jsonl", None)], first)


def puzzle_splits(path: Path) -> list[str]:
    """The splits there are at `path`, a puzzle set; rows of .jsonl are the split "train" here."""
    require_path(path)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        return sorted(read_description(path).splits)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return safetensors_splits(list(_read_tensors(path, 0)))
    return ["train"]


def _open_built(folder: Path, split: str, first: int | None) -> PuzzleSamples:
    description = read_description(folder)
    if split not in description.splits:
        raise missing_split(str(folder), split, sorted(description.splits))
    path = folder / f"{split}.safetensors"
    if not path.is_file():
        raise DataError(Fault(str(path), f"{DESCRIPTION} names this file, but it is not there", REBUILD))
    entry = description.splits[split]
    tensors = _read_tensors(path, first)
    if first is None and file_sha256(path) != entry.sha256:
        raise DataError(Fault(str(path), f"its checksum is not the one in {DESCRIPTION}", REBUILD))
    given = description.model_dump(include=set(PuzzleFacts.__dataclass_fields__) - {"count", "symbols"})
    facts = PuzzleFacts(**given, count=entry.count, symbols=tuple(description.symbols))
    _check_shapes(tensors, path, "")
    wanted = [entry.count if first is None else min(entry.count, first), facts.seq_len]
    if list(tensors["inputs"].shape) != wanted:
        reason = f"inputs are {list(tensors['inputs'].shape)}, {DESCRIPTION} says {wanted}"
        raise DataError(Fault(str(path), reason, REBUILD))
    return PuzzleSamples(facts, tensors, path, pad_labels_count=False)


def _open_safetensors(path: Path, split: str, first: int | None) -> PuzzleSamples:
    tensors = _read_tensors(path, first)
    prefix = "" if "inputs" in tensors else f"{split}."
    splits = safetensors_splits(list(tensors))
    if not splits:
        reason = f"contains no puzzles, but {listed(sorted(tensors))}"
        raise DataError(Fault(str(path), reason, "Puzzles are tensors <split>.inputs and <split>.labels [N, S]"))
    if split not in splits:
        raise missing_split(str(path), split, splits)
    for name in splits:
        _check_shapes(tensors, path, prefix and f"{name}.")
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    # The vocabulary is that of the whole file: a held-out split must not need a larger model than the training split.
    every = [tensor for name, tensor in tensors.items() if name.endswith(("inputs", "labels"))]
    identifiers = [tensor for name, tensor in tensors.items() if name.endswith("puzzle_identifiers")]
    facts = _plain_facts(path.stem, own["inputs"], every, identifiers)
    return PuzzleSamples(facts, own, path, pad_labels_count=True)


def safetensors_splits(names: Sequence[str]) -> list[str]:
    """The splits that a plain file with tensors of these names holds."""
    if "inputs" in names:
        return ["train"]
    return sorted(name[: -len(".inputs")] for name in names if name.endswith(".inputs"))


def open_puzzle_rows(paths: Sequence[Path], first: int | None = None) -> PuzzleSamples:
    """Puzzles from .jsonl files of objects with `inputs`, `labels` (lists of ids, all equally long) and optionally
    `puzzle_identifier`; the `first` ones, or all. Faults name file and line."""
    inputs: list[list[int]] = []
    labels: list[list[int]] = []
    identifiers: list[int] = []
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(inputs) == first:
                    break
                if line.strip():
                    row = _parse_row(line, f"{path}:{number}", len(inputs[0]) if inputs else None)
                    inputs.append(row[0])
                    labels.append(row[1])
                    identifiers.append(row[2])
    if not inputs:
        hint = 'Give rows like {"inputs": [...], "labels": [...]}'
        raise DataError(Fault(", ".join(map(str, paths[:1])) or "no .jsonl file", "contains no rows", hint))
    tensors: Tensors = {
        "inputs": np.array(inputs, dtype=np.int32),
        "labels": np.array(labels, dtype=np.int32),
        "puzzle_identifiers": np.array(identifiers, dtype=np.int32),
    }
    name = paths[0].stem if len(paths) == 1 else paths[0].parent.name
    facts = _plain_facts(
        name, tensors["inputs"], [tensors["inputs"], tensors["labels"]], [tensors["puzzle_identifiers"]]
    )
    return PuzzleSamples(facts, tensors, paths[0], pad_labels_count=True)


def _parse_row(line: bytes, where: str, seq_len: int | None) -> tuple[list[int], list[int], int]:
    hint = 'Give rows like {"inputs": [1, 2], "labels": [3, 2]}, lists of equal length'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(Fault(where, f"this line is not JSON ({error})", hint)) from error
    if not isinstance(row, dict):
        raise DataError(Fault(where, "this row is not an object", hint))
    for name, least in (("inputs", 0), ("labels", IGNORE_LABEL)):
        if name not in row:
            reason = f"there is no `{name}`; the row has {listed(sorted(row))}"
            raise DataError(Fault(where, reason, hint))
        values = row[name]
        if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
            raise DataError(Fault(where, f"`{name}` is not a list of whole numbers", hint))
        wrong = [value for value in values if not (0 <= value < 2**31 or value == least)]
        if wrong:
            reason = f"`{name}` contains {wrong[0]}"
            raise DataError(Fault(where, reason, f"Ids are 0 or more (labels: or {IGNORE_LABEL} for none)"))
    if "puzzle_identifiers" in row:
        raise DataError(Fault(where, "a row has one puzzle, not `puzzle_identifiers`", "Name it `puzzle_identifier`"))
    inputs, labels, identifier = row["inputs"], row["labels"], row.get("puzzle_identifier", 0)
    if len(inputs) != len(labels):
        raise DataError(Fault(where, f"{len(inputs)} inputs but {len(labels)} labels", hint))
    if seq_len is not None and len(inputs) != seq_len:
        reason = f"this row has {len(inputs)} inputs, the first row {seq_len}"
        raise DataError(Fault(where, reason, "Pad all rows to one length"))
    if type(identifier) is not int or not 0 <= identifier < 2**31:
        raise DataError(Fault(where, f"`puzzle_identifier` is {identifier!r}", "Give a whole number, 0 or more"))
    return inputs, labels, identifier


def _plain_facts(
    name: str, inputs: npt.NDArray[Any], tokens: Sequence[npt.NDArray[Any]], identifiers: Sequence[npt.NDArray[Any]]
) -> PuzzleFacts:
    """Facts of a file without description: the vocabulary is what occurs."""
    return PuzzleFacts(
        name=name,
        count=len(inputs),
        seq_len=inputs.shape[1],
        vocab_size=max(int(tensor.max()) for tensor in tokens) + 1,
        num_puzzle_identifiers=max((int(tensor.max()) for tensor in identifiers), default=0) + 1,
        pad_id=0,
        blank_id=0,
        grid=None,
        symbols=(),
    )


def _read_tensors(path: Path, first: int | None = None) -> Tensors:
    """The tensors of a file; with `first`, only the first rows of each."""
    try:
        if first is not None:
            with safe_open(path, framework="np") as file:
                return {name: file.get_slice(name)[:first] for name in file.keys()}  # noqa: SIM118
        tensors: Tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        reason = f"its {size} bytes are not a complete safetensors file ({error})"
        raise DataError(Fault(str(path), reason, "It may be cut short: copy it again")) from error
    return tensors


def _check_shapes(tensors: Tensors, path: Path, prefix: str) -> None:
    """Raises DataError unless inputs, labels and identifiers are integers of matching, non-empty shapes."""
    hint = "Inputs and labels are integers [N, S], puzzle_identifiers [N]"
    for name in ("inputs", "labels"):
        if prefix + name not in tensors:
            reason = f"has no tensor `{prefix}{name}`; its tensors are: {listed(sorted(tensors))}"
            raise DataError(Fault(str(path), reason, hint))
    inputs = tensors[f"{prefix}inputs"]
    if inputs.ndim != 2 or inputs.size == 0:
        raise DataError(Fault(str(path), f"`{prefix}inputs` has the shape {list(inputs.shape)}", hint))
    for name, shape in (("inputs", inputs.shape), ("labels", inputs.shape), ("puzzle_identifiers", inputs.shape[:1])):
        tensor = tensors.get(prefix + name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise DataError(Fault(str(path), f"`{prefix}{name}` is {list(tensor.shape)}, expected {list(shape)}", hint))
        if tensor.dtype.kind not in "iu":
            raise DataError(Fault(str(path), f"`{prefix}{name}` is {tensor.dtype}, not integers", hint))


def _check_ids(ids: npt.NDArray[Any], least: int, bound: int, source: Path, name: str, what: str) -> None:
    if ids.size and (int(ids.min()) < least or int(ids.max()) >= bound):
        wrong = int(ids.min()) if int(ids.min()) < least else int(ids.max())
        raise DataError(Fault(f"{source}, `{name}`", f"contains {wrong}, outside {what} 0..{bound - 1}", REBUILD))

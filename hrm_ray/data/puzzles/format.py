"""The puzzle data set on disk: a folder with `dataset.json` and one `<split>.safetensors` per split.

dataset.json: {"kind": "puzzle", "format": 1, "name", "seq_len", "vocab_size", "num_puzzle_identifiers", "pad_id"
(token of padding), "blank_id" (puzzle identifier of padding rows), "grid": [height, width] or null, "symbols": how
each token prints, "end_id" (token that closes a grid smaller than that, or null), "splits": {name: {"count",
"sha256"}}, "built": how it was made}."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.rundir import file_sha256

DESCRIPTION = "dataset.json"
BUILT_FILES = frozenset({DESCRIPTION, "train.safetensors", "test.safetensors"})
"""What a folder of a builder holds, and may be replaced with."""
REBUILD = "Build it again with `hrm-ray data build`, or copy it again"


class SplitEntry(BaseModel):
    """One split in dataset.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int = Field(ge=1)
    sha256: str


class Description(BaseModel):
    """dataset.json, as written and as checked on reading."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    format: int
    name: str
    seq_len: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_puzzle_identifiers: int = Field(ge=1)
    pad_id: int = Field(ge=0)
    blank_id: int = Field(ge=0)
    grid: tuple[int, int] | None
    symbols: list[str]
    end_id: int | None = None
    splits: dict[str, SplitEntry]
    built: dict[str, Any] = {}


@dataclass(frozen=True)
class PuzzleFacts:
    """What a model and a display need to know about one split of a puzzle set.

    `pad_id` is the token of padding rows, `blank_id` their puzzle identifier; `grid` is (height, width) where the
    tokens form one; `symbols` says how tokens print (empty: print the numbers); `end_id` is the token that closes a
    smaller grid below and to the right, where there is one.
    """

    name: str
    count: int
    seq_len: int
    vocab_size: int
    num_puzzle_identifiers: int
    pad_id: int
    blank_id: int
    grid: tuple[int, int] | None
    symbols: tuple[str, ...]
    end_id: int | None = None

    def render(self, tokens: npt.NDArray[Any]) -> str:
        """One sample's tokens [seq_len] as text: one line per grid row, or a single line without a grid.

        A grid is shown up to its end tokens, without trailing rows and columns of padding. Symbols are separated by
        spaces unless a space is a symbol.
        """
        between = "" if " " in self.symbols else " "
        rows = tokens.reshape(1, -1) if self.grid is None else self._inside(tokens.reshape(self.grid))
        return "\n".join(between.join(map(self._symbol, row)) for row in rows.tolist())

    def parse(self, text: str) -> npt.NDArray[np.int32]:
        """The tokens (int32 [seq_len]) of a puzzle written with `symbols`; white space that is no symbol is left out.

        Raises SettingsError for an unknown symbol, a wrong number of them, or a set whose tokens have no symbols.
        """
        tokens = {symbol: token for token, symbol in enumerate(self.symbols)}
        if not tokens or max(map(len, tokens)) != 1:
            reason = "its tokens have no symbols, so puzzles cannot be typed"
            raise SettingsError(Fault(self.name, reason, "Give --file"))
        written = [sign for sign in text if not sign.isspace() or sign in tokens]
        known = " ".join("(space)" if symbol == " " else symbol for symbol in self.symbols)
        for symbol in written:
            if symbol not in tokens:
                raise SettingsError(Fault(f"symbol {symbol!r}", f"{self.name} has no such symbol", f"Use {known}"))
        if len(written) != self.seq_len:
            reason = f"{self.name} has {self.seq_len} cells"
            raise SettingsError(Fault(f"{len(written)} symbols", reason, f"Write all cells, with {known}"))
        return np.array([tokens[symbol] for symbol in written], dtype=np.int32)

    def _symbol(self, token: int) -> str:
        return self.symbols[token] if token < len(self.symbols) else str(token)

    def _inside(self, grid: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of a grid [H, W] that is shown; one cell at the least."""
        if self.end_id is not None:
            # A first cell that closes the grid is an answer gone wrong: it is shown whole.
            height, width = (min(np.flatnonzero(line == self.end_id), default=0) for line in (grid[:, 0], grid[0]))
            grid = grid[: height or None, : width or None]
        rows, columns = (np.flatnonzero((grid != self.pad_id).any(axis=axis)) for axis in (1, 0))
        return grid[: max(rows, default=0) + 1, : max(columns, default=0) + 1]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> PuzzleFacts:
        """From what `plain` gave, also after a trip through JSON."""
        grid = None if values["grid"] is None else (int(values["grid"][0]), int(values["grid"][1]))
        return cls(**{**values, "grid": grid, "symbols": tuple(values["symbols"])})


def write_split(
    folder: Path,
    split: str,
    inputs: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    identifiers: npt.NDArray[Any] | None = None,
) -> SplitEntry:
    """Writes `<split>.safetensors` (inputs and labels [N, seq_len], uint8 or int32) and returns its entry."""
    tensors = {"inputs": np.ascontiguousarray(inputs), "labels": np.ascontiguousarray(labels)}
    if identifiers is not None:
        tensors["puzzle_identifiers"] = np.ascontiguousarray(identifiers)
    path = folder / f"{split}.safetensors"
    # Not save_file: that makes files which only their owner can read.
    path.write_bytes(save(tensors))
    return SplitEntry(count=len(inputs), sha256=file_sha256(path))


def write_description(folder: Path, description: Description) -> None:
    """Writes dataset.json."""
    text = json.dumps(description.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def square_description(
    name: str,
    side: int,
    symbols: list[str],
    splits: dict[str, SplitEntry],
    built: dict[str, Any],
    identifiers: int = 1,
    end_id: int | None = None,
) -> Description:
    """The description of a built set whose puzzles are grids of side x side cells; token 0 pads."""
    return Description(
        kind="puzzle",
        format=1,
        name=name,
        seq_len=side * side,
        vocab_size=len(symbols),
        num_puzzle_identifiers=identifiers,
        pad_id=0,
        blank_id=0,
        grid=(side, side),
        symbols=symbols,
        end_id=end_id,
        splits=splits,
        built=built,
    )


def read_description(folder: Path) -> Description:
    """Reads and checks dataset.json. Raises DataError where it is damaged or of another kind or format."""
    path = folder / DESCRIPTION
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(Fault(str(path), f"not JSON ({error})", REBUILD)) from error
    if not isinstance(raw, dict) or raw.get("kind") != "puzzle" or raw.get("format") != 1:
        raise DataError(Fault(str(path), 'it does not say "kind": "puzzle", "format": 1', REBUILD))
    try:
        return Description.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(Fault(str(path), f"the description is not complete ({wrong})", REBUILD)) from error

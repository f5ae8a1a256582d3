"""The merge of several members' changes into an anchor, the weights that they have in common.

All files are read and written in windows, so memory depends neither on the size of the model nor on the number of
members. The result is a pure function of the anchor, its momentum, and the members in their order: every value is
computed on its own, so the size of a window changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_ray.atomic_files import atomic_path, unwritable
from hrm_ray.errors import DataError, Fault
from hrm_ray.merging.lora import LoraResidual, lora_residual
from hrm_ray.merging.members import Member, MemberFigures, OpenMember, RuleOf, check_fit
from hrm_ray.merging.rules import TOUCHED, Rule, rule_of
from hrm_ray.merging.tensor_file import Array, Stored, TensorFile, TensorWriter

WINDOW_BYTES = 1 << 20
"""Bytes of a file that are read at once; larger windows took longer, for they do not stay in a core's cache."""
_BLOCK = 1 << 16
"""Values that are computed at a time: few enough for a core's cache."""


@dataclass(frozen=True)
class OuterStep:
    """What is done with the weighted sum of changes: momentum as Nesterov's, in the form of torch.optim.SGD. The
    default adds it as it is."""

    lr: float = 1.0
    momentum: float = 0.0

    @property
    def is_plain(self) -> bool:
        return self.lr == 1.0 and self.momentum == 0.0


OUTER_STEPS: Mapping[str, OuterStep] = {
    "nesterov": OuterStep(1.0, 0.3),
    "none": OuterStep(),
    "diloco": OuterStep(0.7, 0.9),
}
"""By the value of `--outer-optimizer`. 0.7 and 0.9 are those of DiLoCo (Douillard et al. 2023, arXiv 2311.08105)."""


@dataclass(frozen=True)
class AnchorFiles:
    """An anchor's weights and the momentum of the outer step, float32; None: no momentum yet, or none is kept."""

    weights: Path
    momentum: Path | None = None


@dataclass(frozen=True)
class MergeReport:
    """A merge that was written: checksums of its files, the members' figures in their order, and for LoRA adapters
    what averaging A and B apart leaves out."""

    sha256: str
    momentum_sha256: str | None
    members: tuple[MemberFigures, ...]
    lora: LoraResidual | None


def merge_deltas(
    anchor: AnchorFiles,
    members: Sequence[Member],
    outer: OuterStep,
    out: AnchorFiles,
    *,
    metadata: Mapping[str, str] | None = None,
    share: float = 1.0,
    rule: RuleOf = rule_of,
    window_bytes: int = WINDOW_BYTES,
) -> MergeReport:
    """Write `out`: the anchor plus the outer step over the members' changes, in the anchor's types.

    `share` scales the sum of changes, before the momentum, where the members are only a part of those that go the same
    way; not by rows, which count for those alone that changed them. A sole member with whole weights of this anchor is
    copied bit for bit where the outer step is plain and the share is 1. With a momentum
    `out` needs a place for it. Both files reach the disk, the weights last, under names that must be new; on any error
    neither is there. What is not finite is merged and reported: the caller decides. Raises DataError for members that
    do not fit the anchor or cannot be read, DiskError where `out` cannot be written.
    """
    if not members:
        raise ValueError("a merge needs a member")
    if outer.momentum and out.momentum is None:
        raise ValueError("an outer step with momentum needs a file for it")
    for path in (out.weights, out.momentum):
        if path is not None and path.exists():
            raise FileExistsError(f"{path}: an anchor is never overwritten, for it may be in use")
    with ExitStack() as stack:
        opened: dict[Path, TensorFile] = {}

        def read(path: Path) -> TensorFile:
            if path not in opened:
                opened[path] = stack.enter_context(TensorFile(path))
            return opened[path]

        whole = read(anchor.weights)
        merge = _Merge(
            whole,
            read(anchor.momentum) if anchor.momentum is not None and outer.momentum else None,
            [
                OpenMember(read(one.path), one.weight, read(one.base) if one.base else None, one.series)
                for one in members
            ],
            outer,
            share,
            rule,
            window_bytes,
        )
        for member in merge.members:
            check_fit(whole, member, rule)
        residual = lora_residual(whole, merge.members, window_bytes)
        with np.errstate(over="ignore", invalid="ignore"):
            checksum, momentum_checksum = merge.write(out, metadata or {})
    return MergeReport(checksum, momentum_checksum, tuple(map(OpenMember.figures, merge.members)), residual)


@dataclass(frozen=True)
class _Window:
    """`size` values of a tensor of the anchor, from number `start` on."""

    name: str
    stored: Stored
    start: int
    size: int


class _Merge:
    """One merge. The buffers are as large as a window and used for all tensors in turn."""

    def __init__(
        self,
        anchor: TensorFile,
        momentum: TensorFile | None,
        members: list[OpenMember],
        outer: OuterStep,
        share: float,
        rule: RuleOf,
        window_bytes: int,
    ) -> None:
        self.anchor = anchor
        self.share = share
        self.momentum = momentum
        self.members = members
        self.outer = outer
        self.rule = rule
        (only, *others) = members
        self.verbatim = not others and only.base is anchor and only.weight == share == 1.0 and outer.is_plain
        self.window_bytes = max(8, window_bytes // 8 * 8)
        self._buffers: dict[str, Array] = {}

    def write(self, out: AnchorFiles, metadata: Mapping[str, str]) -> tuple[str, str | None]:
        """Write the files; returns their checksums."""
        tensors = self.anchor.tensors
        averaged = {n: t for n, t in tensors.items() if self.rule(n, t.is_float) in (Rule.MEAN, Rule.ROWS)}
        try:
            with ExitStack() as stack:
                # What is entered last ends first: the momentum has its name before the weights have theirs.
                file = stack.enter_context(stack.enter_context(atomic_path(out.weights)).open("wb"))
                weights, momentum = TensorWriter(file, tensors, metadata), None
                if out.momentum is not None and self.outer.momentum:
                    floats = {name: Stored("F32", stored.shape, 0) for name, stored in averaged.items()}
                    file = stack.enter_context(stack.enter_context(atomic_path(out.momentum)).open("wb"))
                    momentum = TensorWriter(file, floats, metadata)
                for name in tensors:
                    if name in averaged:
                        self._average(name, weights, momentum)
                    else:
                        self._copy(name, weights)
        except BaseException as error:
            if out.momentum is not None:
                out.momentum.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise unwritable(out.weights, error) from error
            raise
        return weights.sha256, momentum.sha256 if momentum is not None else None

    def _average(self, name: str, weights: TensorWriter, momentum: TensorWriter | None) -> None:
        """One tensor by its rule. With the rule MEAN the whole tensor is one row, which every member changed."""
        stored = self.anchor.tensors[name]
        if stored.size == 0:
            return
        by_rows = self.rule(name, True) is Rule.ROWS and not self.verbatim and len(stored.shape) > 0
        count = stored.shape[0] if by_rows else 1
        row = stored.size // count
        window = self.window_bytes // stored.computed.itemsize
        together = max(1, window // row)
        for first in range(0, count, together):
            rows = min(together, count - first)
            if by_rows:
                shares = self._shares(name, first, rows, row)
            else:
                shares = np.array([[member.weight * self.share] for member in self.members])
            for start, size in _windows(first * row, rows * row, window):
                self._step(_Window(name, stored, start, size), shares, weights, momentum)

    def _shares(self, name: str, first: int, rows: int, row: int) -> Array:
        """Each member's share [members, rows] of rows `first` and on of a tensor: by its counts, or where it has none
        by its weight if it changed the row. The shares of a row add up to 1, or are all 0; each member of a series has
        the share of all of it."""
        parts: dict[str | int, Array] = {}
        for number, member in enumerate(self.members):
            part = parts.setdefault(number if member.series is None else member.series, np.zeros(rows))
            if name + TOUCHED in member.file.tensors:
                counts = np.zeros(rows)
                member.file.read_floats(name + TOUCHED, first, counts)
                part += counts
            else:
                np.maximum(part, member.weight * self._changed(member, name, first, rows, row), out=part)
        keys = [number if member.series is None else member.series for number, member in enumerate(self.members)]
        shares = np.stack([parts[key] for key in keys])
        total = np.sum(list(parts.values()), axis=0)
        return np.divide(shares, total, out=shares, where=total > 0)

    def _changed(self, member: OpenMember, name: str, first: int, rows: int, row: int) -> Array:
        """Which of the rows a member changed, bool [rows]; of one long row no more is read than shows a change."""
        stored, changed = self.anchor.tensors[name], np.zeros(rows, dtype=bool)
        for start, size in _windows(first * row, rows * row, _BLOCK if rows == 1 else rows * row):
            values, base = self._read(member, _Window(name, stored, start, size), None)
            differs = values != (0 if base is None else base)
            changed |= differs.any() if rows == 1 else differs.reshape(rows, row).any(axis=1)
            if changed.all():
                break
        return changed

    def _step(self, window: _Window, shares: Array, weights: TensorWriter, momentum: TensorWriter | None) -> None:
        """The outer step over one window. `shares` [members, rows] are of the rows in it, or of the row that it is a
        part of."""
        anchor, total = self._floats("anchor", window), self._floats("total", window)
        self.anchor.read_floats(window.name, window.start, anchor)
        total[:] = 0
        row = window.size // shares.shape[1]
        for member, share in zip(self.members, shares, strict=True):
            if share.any():
                values, base = self._read(member, window, anchor)
                if self.verbatim:
                    weights.write(values, window.stored.dtype)
                _add_change(total, values, base, _by_value(share, row, anchor), member)
        if self.verbatim:
            return
        before = None
        if momentum is not None:
            before = self._floats("momentum", window)
            before[:] = 0
            if self.momentum is not None:
                self.momentum.read_floats(window.name, window.start, before)
        for moved in _runs(shares.sum(axis=0) > 0, row):
            _outer_step(self.outer, anchor[moved], total[moved], None if before is None else before[moved])
        weights.write(anchor, window.stored.dtype)
        if momentum is not None and before is not None:
            momentum.write(before, "F32")

    def _read(self, member: OpenMember, window: _Window, anchor: Array | None) -> tuple[Array, Array | None]:
        """A window of a member's values, and of those that they are to be compared with, None where the values are
        changes already. `anchor` is the same window of the anchor where it was read."""
        values = self._floats("values", window)
        member.file.read_floats(window.name, window.start, values)
        if member.base is None:
            return values, None
        if member.base is self.anchor and anchor is not None:
            return values, anchor
        base = self._floats("base", window)
        member.base.read_floats(window.name, window.start, base)
        return values, base

    def _copy(self, name: str, weights: TensorWriter) -> None:
        """A tensor that no member may change."""
        stored = self.anchor.tensors[name]
        checked = [one for one in self.members if name in one.file.tensors]
        if self.rule(name, stored.is_float) is not Rule.EQUAL:
            checked = []
        # No type is wider than 8 bytes.
        for start, size in _windows(0, stored.size, self.window_bytes // 8):
            ours = self._bytes("anchor", size * stored.itemsize)
            self.anchor.read_bytes(name, start, ours)
            for member in checked:
                theirs = self._bytes("values", size * member.file.tensors[name].itemsize)
                member.file.read_bytes(name, start, theirs)
                same = not theirs.any() if member.base is None else np.array_equal(ours, theirs)
                if not same:
                    reason = f"its {name}, which training never changes, is not that of {self.anchor.path}"
                    hint = "Merge weights that were trained from the same start"
                    raise DataError(Fault(str(member.file.path), reason, hint))
            weights.write_bytes(ours)

    def _floats(self, which: str, window: _Window) -> Array:
        """The first values of a buffer, in the type that the tensor is averaged in."""
        kind = window.stored.computed
        return self._bytes(which, window.size * kind.itemsize).view(kind)

    def _bytes(self, which: str, size: int) -> Array:
        if which not in self._buffers:
            self._buffers[which] = np.empty(self.window_bytes, np.uint8)
        return self._buffers[which][:size]


def _windows(start: int, count: int, largest: int) -> Iterator[tuple[int, int]]:
    """(first, number) of the windows over `count` values from number `start` on."""
    for first in range(start, start + count, largest):
        yield first, min(largest, start + count - first)


def _by_value(share: Array, row: int, like: Array) -> Array:
    """A member's share of each row [rows] as one factor, or one for each value."""
    narrow = share.astype(like.dtype)
    return narrow if len(share) == 1 else np.repeat(narrow, row)


def _runs(moved: Array, row: int) -> Iterator[slice]:
    """The values of the rows that are moved, bool [rows], as slices of a window."""
    edges = np.flatnonzero(np.diff(moved, prepend=False, append=False))
    for first, beyond in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(first) * row, int(beyond) * row)


def _add_change(total: Array, values: Array, base: Array | None, share: Array, member: OpenMember) -> None:
    """Add `share` times the change of a member to `total`, and the change's squares to the member's figures.
    `values` is overwritten."""
    for first in range(0, total.size, _BLOCK):
        block = slice(first, first + _BLOCK)
        change = values[block]
        if base is not None:
            np.subtract(change, base[block], out=change)
        squares = float(np.dot(change, change))
        if not math.isfinite(squares):
            member.finite = member.finite and bool(np.isfinite(change).all())
            squares = float(np.square(change, dtype=np.float64).sum())
        member.squares += squares
        # Multiplied first: a fused multiplication and addition would round otherwise in some places than in others.
        np.multiply(change, share if len(share) == 1 else share[block], out=change)
        np.add(total[block], change, out=total[block])


def _outer_step(outer: OuterStep, anchor: Array, total: Array, momentum: Array | None) -> None:
    """Move `anchor`, and its `momentum`, by the sum of changes; `total` is overwritten."""
    for first in range(0, anchor.size, _BLOCK):
        block = slice(first, first + _BLOCK)
        step = total[block]
        if momentum is not None:
            kept = momentum[block]
            kept *= kept.dtype.type(outer.momentum)
            kept += step
            step += kept.dtype.type(outer.momentum) * kept
        if outer.lr != 1.0:
            step *= step.dtype.type(outer.lr)
        anchor[block] += step

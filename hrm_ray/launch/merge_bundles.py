"""Merges trained bundles or weights files into one: checks that they can be merged, and writes the result.

The merge itself is in merging/; here is what concerns bundles: architectures, tokenizers, a common start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm_ray.atomic_files import atomic_path, check_vacant
from hrm_ray.bundle.expert_store import differences
from hrm_ray.bundle.store import copied_names, read_description, save_copy
from hrm_ray.bundle.stored_settings import stored_leaves
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError, listed
from hrm_ray.launch.job_package import check_outlives_job
from hrm_ray.merging import AnchorFiles, Member, OuterStep, Rule, TensorFile, check_member, merge_deltas, rule_of
from hrm_ray.merging.rules import is_start
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import RunDir, file_sha256, read_json

_QUANTISED = (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format", ".qweight", ".qzeros")
"""Ends of the names that bitsandbytes and GPTQ give to parts of a quantised weight."""
_FORCE = "Give members of one start (--student-init), or --force: the result is then usually worse than each of them"
_START_OPTIONS = ("run.seed", "model.student_init")


@dataclass(frozen=True)
class MergedMember:
    """A member of a merge: its share of the result, and the Euclidean distance of its weights from `Merged.origin`."""

    path: str
    sha256: str
    share: float
    distance: float


@dataclass(frozen=True)
class Merged:
    """What was merged into `out`. `origin` is what the members were compared with: the base, or the first of them.
    `lora_residual` is what averaging LoRA's factors apart leaves out, relative to the averaged product."""

    out: str
    origin: str
    members: tuple[MergedMember, ...]
    lora_residual: float | None
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """JSON values, without the notes."""
        return {name: value for name, value in asdict(self).items() if name != "notes"}


@dataclass(frozen=True)
class _Source:
    """A member, or the base: the path as given, its weights, and what describes them where it is a bundle."""

    given: Path
    weights: Path
    sha256: str
    bundle: RunDir | None = None
    config: ModelConfig | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked and not yet carried out. `described` is the bundle that describes the result, None where
    it is a file; `base` is None where the members are compared with the first of them."""

    sources: tuple[_Source, ...]
    shares: tuple[float, ...]
    base: _Source | None
    described: RunDir | None
    out: Path
    force: bool
    overwrite: bool
    notes: tuple[str, ...]

    @property
    def origin(self) -> _Source:
        """What the members' weights are compared with."""
        return self.base or self.sources[0]

    def run(self) -> Merged:
        """Write the result. Raises DataError where a member's weights are not finite; then nothing is written."""
        done: list[Merged] = []
        if self.described is None:
            with atomic_path(self.out) as temporary:
                done.append(self._write(temporary))
            return done[0]
        members = [
            {"path": str(source.given), "sha256": source.sha256, "share": share}
            for source, share in zip(self.sources, self.shares, strict=True)
        ]
        base = None if self.base is None else {"path": str(self.base.given), "sha256": self.base.sha256}
        about = {"members": members, "base": base, "forced": self.force}
        save_copy(
            self.described,
            self.out,
            lambda path: done.append(self._write(path)),
            overwrite=self.overwrite,
            merged=about,
        )
        return done[0]

    def _write(self, path: Path) -> Merged:
        """Write the merged weights to `path`."""
        # The first member plus the others' differences from it, where there is no base: equal values stay as they are.
        pairs = [pair for pair in zip(self.sources, self.shares, strict=True) if pair[0] is not self.origin]
        members = [Member(source.weights, share, self.origin.weights) for source, share in pairs]
        report = merge_deltas(
            AnchorFiles(self.origin.weights), members, OuterStep(), AnchorFiles(path), rule=self._rule
        )
        distances = {self.origin.given: 0.0}
        for (source, _), figures in zip(pairs, report.members, strict=True):
            if not figures.finite:
                reason = f"its weights, or those of {self.origin.given}, have values that are not finite"
                raise DataError(Fault(str(source.given), reason, "Leave out the one whose training diverged"))
            distances[source.given] = figures.norm
        lora = report.lora
        return Merged(
            str(self.out),
            str(self.origin.given),
            tuple(
                MergedMember(str(source.given), source.sha256, share, distances[source.given])
                for source, share in zip(self.sources, self.shares, strict=True)
            ),
            lora.residual / lora.product if lora is not None and lora.product > 0 else None,
            self.notes,
        )

    def _rule(self, name: str, is_float: bool) -> Rule:
        """Rows count for those who changed them only where it is known from what: from the base."""
        found = rule_of(name, is_float)
        if found is Rule.ROWS and self.base is None:
            return Rule.MEAN
        return Rule.KEPT if self.force and is_start(name) else found


def plan_merge(
    members: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> MergePlan:
    """The weighted mean of `members`, bundles or weights files of one architecture, at `out`: a bundle that the first
    bundle among them describes, or where all are files, a .safetensors file.

    With `base`, from which all were trained, experts and puzzle rows count for those who trained them. Raises
    SettingsError for wrong use, DataError for what cannot be merged, such as members that do not begin from one start
    without `force`.
    """
    shares = _shares(members, weights)
    check_outlives_job(out, "--out")
    _check_paths(members, base, out)
    sources = tuple(map(_source, members))
    bundles = [one.bundle for one in sources if one.bundle is not None]
    described = bundles[0] if bundles else None
    _check_out(out, described, overwrite)
    first = _source(base) if base is not None else None
    everyone = [first or sources[0], *(sources if first is not None else sources[1:])]
    _check_descriptions([one for one in everyone if one.bundle is not None])
    rows = _check_tensors(everyone[0], everyone[1:])
    notes = _check_start(everyone, force)
    if rows and first is None:
        notes.append(_rows_note(rows, bundles))
    adapted = [str(bundle.root) for bundle in bundles if bundle.adapter.is_dir()]
    if adapted:
        notes.append(f"the adapters of {listed(adapted)} are part of the merged weights; {out} has none apart")
    return MergePlan(sources, shares, first, described, out, force, overwrite, tuple(notes))


def _shares(members: Sequence[Path], weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weights divided by their sum; equal ones where none are given."""
    if len(members) < 2:
        raise SettingsError(Fault(listed(map(str, members)), "a merge needs two members", "Give two or more"))
    if weights is None:
        return (1 / len(members),) * len(members)
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(members):
        reason = f"{len(weights)} weights for {len(members)} members"
        raise SettingsError(Fault(f"--weights {shown}", reason, "Give one weight for each member"))
    total = sum(weights)  # infinite where math.fsum would raise
    if not all(weight > 0 for weight in weights) or not math.isfinite(total):
        reason = "each must be a finite number above 0"
        raise SettingsError(Fault(f"--weights {shown}", reason, "Leave out a member that shall not count"))
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _check_paths(members: Sequence[Path], base: Path | None, out: Path) -> None:
    """Raises SettingsError for a path that is given twice."""
    seen: set[Path] = set()
    for path in members:
        if path.resolve() in seen:
            raise SettingsError(Fault(str(path), "is given twice", "Give it once, with a larger number in --weights"))
        seen.add(path.resolve())
    if base is not None and base.resolve() in seen:
        reason = "is a member too, and the members are compared with the base"
        raise SettingsError(Fault(f"--base {base}", reason, "Leave it out of the members, or leave out --base"))
    read = {*seen, *([base.resolve()] if base is not None else [])}
    target = out.resolve()
    if target in read or any(target in path.parents or path in target.parents for path in read):
        reason = "is, contains or lies in what is merged"
        raise SettingsError(Fault(f"--out {out}", reason, "Give another place"))


def _source(path: Path) -> _Source:
    """A bundle, or a file of weights; checksums are verified, and the header is read."""
    if path.is_dir():
        config, sha256 = read_description(path)
        found = _Source(path, RunDir(path).weights, sha256, RunDir(path), config)
    elif path.is_file():
        found = _Source(path, path, file_sha256(path))
    else:
        hint = "Give a bundle's folder, or a .safetensors file"
        raise SettingsError(Fault(str(path), "no such file or folder", hint))
    with TensorFile(found.weights) as file:
        for name, stored in file.tensors.items():
            if name.endswith(_QUANTISED) or ".quant_state" in name or (name.endswith("weight") and not stored.is_float):
                reason = f"its weights are quantised ({name}), and such numbers have no mean"
                raise DataError(Fault(str(path), reason, "Give weights in float32, bfloat16 or float16"))
    return found


def _check_out(out: Path, described: RunDir | None, overwrite: bool) -> None:
    """Raises SettingsError unless the result can be written there."""
    if described is not None:
        check_vacant(out, overwrite=overwrite, owned=copied_names(described), option="--out")
        return
    if out.suffix != ".safetensors" or out.is_dir():
        reason = "no member is a bundle, which would describe the result"
        raise SettingsError(Fault(f"--out {out}", reason, "Give NAME.safetensors, or a bundle among the members"))
    if out.exists() and not overwrite:
        raise SettingsError(Fault(f"--out {out}", "there is such a file", "Give another name, or --overwrite"))
    if not out.absolute().parent.is_dir():
        raise SettingsError(Fault(f"--out {out}", "there is no such folder", "Create it, or give another place"))


def _check_descriptions(bundles: Sequence[_Source]) -> None:
    """Raises DataError for bundles of other architectures, tokenizers or puzzles than the first one's."""
    for other in bundles[1:]:
        first = bundles[0]
        if first.bundle is None or first.config is None or other.bundle is None or other.config is None:
            raise ValueError("a weights file has no description")
        differs = differences(other.config, first.config)
        if differs:
            reason = f"is of another architecture than {first.given}: {differs}"
            raise DataError(Fault(str(other.given), reason, "Give bundles of one architecture"))
        if _vocabulary(first.bundle) != _vocabulary(other.bundle):
            what = "tokenizer" if first.config.task == "lm" else "puzzle set"
            reason = f"has another {what} than {first.given}, so its tokens stand for others"
            raise DataError(Fault(str(other.given), reason, f"Give bundles that share a {what}"))


def _vocabulary(bundle: RunDir) -> object:
    """What the ids of tokens stand for in a bundle."""
    if bundle.tokenizer.is_file():
        return TextTokenizer.of_bundle(bundle.root).fingerprint
    if not bundle.puzzle.is_file():
        return None
    facts = read_json(bundle.puzzle)
    # Its name is a path, and says nothing about the tokens.
    return {name: value for name, value in facts.items() if name != "name"} if isinstance(facts, dict) else facts


def _check_tensors(origin: _Source, others: Sequence[_Source]) -> list[str]:
    """The names of the tensors that are merged by rows where there is a base. Raises DataError unless all sources have
    the same names and shapes."""
    for other in others:
        check_member(origin.weights, Member(other.weights, 1.0, origin.weights))
    with TensorFile(origin.weights) as file:
        return [name for name, stored in file.tensors.items() if rule_of(name, stored.is_float) is Rule.ROWS]


def _rows_note(rows: Sequence[str], bundles: Sequence[RunDir]) -> str:
    """What --base would change; it names the bundle that all members started from, where their runs say so."""
    table = any("puzzle_emb" in name for name in rows)
    kinds = " and ".join((["puzzle rows"] if table else []) + (["experts"] if len(rows) > table else []))
    starts = {stored_leaves(bundle)["model.student_init"] for bundle in bundles}
    base = starts.pop() if len(starts) == 1 else None
    named = f"--base {base}" if base is not None else "--base, from which all members were trained,"
    return f"{kinds} are plain means; with {named} each counts for the members that changed it"


def _check_start(everyone: Sequence[_Source], force: bool) -> list[str]:
    """Raises DataError unless all began from the same weights, as far as that can be seen; with `force` it is noted.

    H_init and L_init are drawn with the first weights and never trained, so equal ones show one start. For models
    without them the settings of their runs decide.
    """
    first, *others = everyone
    for other in others:
        doubt = _doubt(first, other)
        if doubt is not None and not force:
            raise DataError(Fault(str(other.given), doubt, _FORCE))
        if doubt is not None:
            return [f"{other.given} {doubt}; check the result on held-out data before using it"]
    return []


def _doubt(first: _Source, other: _Source) -> str | None:
    """Why two sources may not have begun from the same weights; None where they did."""
    ours, theirs = _starts(first.weights), _starts(other.weights)
    if ours:
        differ = [name for name, value in ours.items() if value != theirs.get(name)]
        return f"was not trained from the start of {first.given} ({differ[0]} differs)" if differ else None
    if first.bundle is None or other.bundle is None:
        return f"may not come from the start of {first.given} (neither H_init nor a bundle's settings show it)"
    one, two = stored_leaves(first.bundle), stored_leaves(other.bundle)
    # A run that started from given weights drew none.
    names = _START_OPTIONS[1:] if one["model.student_init"] is not None else _START_OPTIONS
    differ = [name for name in names if one[name] != two[name]]
    if differ:
        option = f"--{differ[0].partition('.')[2].replace('_', '-')}"
        return f"was not trained from the start of {first.given} ({option} differs)"
    return None


def _starts(path: Path) -> dict[str, bytes]:
    """The initial states of the levels in a file of weights, as bytes."""
    found = {}
    with TensorFile(path) as file:
        for name, stored in file.tensors.items():
            if is_start(name):
                values = np.empty(stored.size * stored.itemsize, np.uint8)
                file.read_bytes(name, 0, values)
                found[name] = values.tobytes()
    return found

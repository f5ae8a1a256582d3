"""RunDir: the paths of a bundle's files, and checkpoint folders that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_ray.atomic_files import atomic_write, sync_folder
from hrm_ray.errors import DataError, Fault, UnreadableError, away

_STEP = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_OLD = f".old{_PARTIAL}"
_HASHED_BYTES = 2**23
"""Bytes that are hashed at a time: a thread that hashes waits for the one that trains between two blocks."""
INDEPENDENT = "independent"
"""The folder of parallel-independent training below a bundle."""
MANIFEST = "manifest.json"
DRIVER_MARKER = ".driver-"
"""How the name of a Ray driver's file begins. By this file a worker knows that its node has the same bundle."""


@dataclass(frozen=True)
class RunDir:
    """A bundle's folder: config.json, model.safetensors, best/, tokenizer.json, metadata.json, training_args.json,
    metrics.jsonl, tensorboard/, data/, ledger.sqlite, chunk_tracker_state.json, checkpoints/step_N/."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def weights(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def best(self) -> RunDir:
        """The model of the best evaluation: a bundle of its own, without checkpoints."""
        return RunDir(self.root / "best")

    @property
    def adapter(self) -> Path:
        """The trained adapters in peft's format; they are merged into model.safetensors too."""
        return self.root / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def puzzle(self) -> Path:
        """Description of the puzzle set: how its tokens are printed."""
        return self.root / "puzzle.json"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def training_args(self) -> Path:
        return self.root / "training_args.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def reports(self) -> Path:
        """The run's names at the services of --report-to, so that a resumed run goes on under them."""
        return self.root / "reports.json"

    @property
    def data(self) -> Path:
        """The corpus of the run: catalog, tokenised chunks, evaluation documents."""
        return self.root / "data"

    @property
    def ledger(self) -> Path:
        """Which chunks were trained in which checkpoint; one process writes it while the run goes on."""
        return self.root / "ledger.sqlite"

    @property
    def has_ledger(self) -> bool:
        """Whether the ledger is there. One without a byte, as a full disk or a failed copy leaves it, is lost."""
        return self.ledger.is_file() and self.ledger.stat().st_size > 0

    @property
    def chunk_tracker(self) -> Path:
        """The ledger as JSON, human-readable."""
        return self.root / "chunk_tracker_state.json"

    @property
    def independent(self) -> IndependentDir:
        """The files of parallel-independent training."""
        return IndependentDir(self.root / INDEPENDENT)

    @property
    def run_lock(self) -> Path:
        """Locked while a process trains in the bundle."""
        return self.root / ".run.lock"

    @property
    def lock_holder(self) -> Path:
        """The process that holds the lock."""
        return self.root / ".in_use.json"

    @property
    def generation(self) -> Path:
        """The number of times that a set of workers has opened the bundle, with a token of the last one."""
        return self.root / ".generation.json"

    @property
    def stacks(self) -> Path:
        """The stacks of all ranks, for each time that workers were ended because they hung."""
        return self.root / "stacks.txt"

    @property
    def preparing(self) -> Path:
        """Where a new bundle is prepared before it takes its place."""
        return self.root / ".preparing"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def partial_checkpoint(self, step: int) -> Path:
        """A new place to write a checkpoint in before it is complete: no other set of workers writes there."""
        return self.checkpoints / f"step_{step}.{secrets.token_hex(4)}{_PARTIAL}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    @property
    def only_partial_checkpoints(self) -> bool:
        """Whether the folder of checkpoints contains nothing but checkpoints that were never whole."""
        return not self.checkpoints.is_dir() or all(p.name.endswith(_PARTIAL) for p in self.checkpoints.iterdir())

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step, also where an interrupted replacement has moved it aside."""
        found = {step: self.checkpoint(step) for step in self.checkpoint_steps()}
        for aside in self.checkpoints.glob(f"step_*{_OLD}"):
            match = _STEP.fullmatch(aside.name.removesuffix(_OLD))
            if match and (aside / MANIFEST).is_file():
                found.setdefault(int(match.group(1)), aside)
        return found[max(found)] if found else None

    def newest_whole_checkpoint(self) -> Path | None:
        """The undamaged checkpoint of the highest step. Reads checkpoints until one is found."""
        folders = map(self.checkpoint, reversed(self.checkpoint_steps()))
        return next((folder for folder in folders if checkpoint_damage(folder) is None), None)

    def describe_checkpoint(self, step: int, partial: Path) -> str:
        """Write the manifest of the partial checkpoint of `step` over all its files, those in subfolders too, each of
        which has reached the disk; returns its sha256."""
        files = [path for path in _files(partial) if path != partial / MANIFEST]
        entries = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        }
        write_json(partial / MANIFEST, {"step": step, "files": entries})
        return file_sha256(partial / MANIFEST)

    def seal_checkpoint(self, step: int, partial: Path) -> Path:
        """Rename the partial checkpoint of `step`, which has its manifest, to its final name."""
        whole = self.checkpoint(step)
        if whole.exists():
            aside = _step_aside(whole)
            partial.rename(whole)
            shutil.rmtree(aside)
        else:
            partial.rename(whole)
        sync_folder(self.checkpoints)
        return whole

    def recover(self) -> None:
        """Restore what an interrupted replacement moved aside: a complete checkpoint, or best/.

        Only under the run's lock: what another process is writing just now looks as if it had been interrupted.
        """
        for aside in self.checkpoints.glob(f"step_*{_OLD}"):
            place = aside.with_name(aside.name.removesuffix(_OLD))
            if (aside / MANIFEST).is_file() and not place.exists():
                aside.rename(place)
        for aside in self.root.glob(".best.replaced-*"):
            if not self.best.root.exists():
                aside.rename(self.best.root)
        for leftover in self.root.glob(".best.*-*"):
            shutil.rmtree(leftover)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints, and the leftovers of an interrupted save."""
        for step in self.checkpoint_steps()[:-keep]:
            _step_aside(self.checkpoint(step))
        for leftover in self.checkpoints.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover)

    def remove_partial_checkpoints(self) -> None:
        """Delete what interrupted saves have left, but not what an interrupted replacement has moved aside."""
        for leftover in self.checkpoints.glob(f"*{_PARTIAL}"):
            if not leftover.name.endswith(_OLD):
                shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class IndependentDir:
    """The folder of parallel-independent training: anchors/, contributions/, trainers/NAME/, fixed.safetensors.

    Every anchor and contribution has a name that was never used before, because another process may have it mapped.
    """

    root: Path

    @property
    def anchors(self) -> Path:
        return self.root / "anchors"

    @property
    def contributions(self) -> Path:
        return self.root / "contributions"

    @property
    def fixed(self) -> Path:
        """The tensors that are not trained, and so are in no anchor."""
        return self.root / "fixed.safetensors"

    def new_anchor(self, round_: int) -> Path:
        """Where the anchor of a round is written."""
        return self.anchors / f"round-{round_:06d}.{secrets.token_hex(4)}.safetensors"

    def new_contribution(self, report: str) -> Path:
        """Where the trainer writes the change of its report of that name."""
        return self.contributions / f"{report}.{secrets.token_hex(4)}.safetensors"

    def trainer(self, name: str) -> Path:
        """The folder of one trainer: its records, and its optimizer's state."""
        return self.trainers / name

    @property
    def trainers(self) -> Path:
        return self.root / "trainers"


def _files(folder: Path) -> list[Path]:
    """All files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _step_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint before its deletion: if that is interrupted, no checkpoint looks complete that is not."""
    aside = checkpoint.with_name(f"{checkpoint.name}{_OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint: its manifest, and the size and sha256 of every file. Raises DataError, which names the newest
    whole checkpoint of the bundle."""
    damage = checkpoint_damage(folder)
    if damage is None:
        return
    whole = RunDir(folder.parent.parent).newest_whole_checkpoint()
    hint = "The bundle has no whole checkpoint: start a new run under another --brain-name"
    if whole is not None:
        hint = f"Give --resume-from {whole}, the newest whole one"
    raise DataError(Fault(*damage, hint))


def checkpoint_damage(folder: Path) -> tuple[str, str] | None:
    """What of a checkpoint is damaged, and how; None where it is whole.

    Raises UnreadableError or OSError where its disk does not answer: then nothing is known.
    """
    manifest = folder / MANIFEST
    if not folder.is_dir():
        return str(folder), "there is no such checkpoint"
    if not manifest.is_file():
        return str(folder), f"the checkpoint is incomplete ({MANIFEST} is missing)"
    try:
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in read_json(manifest)["files"].items()}
    except UnreadableError:
        raise
    except DataError as error:
        return error.faults[0].value, error.faults[0].reason
    except (KeyError, TypeError, AttributeError) as error:
        return str(manifest), f"the manifest is damaged ({error!r})"
    unknown = sorted({path.relative_to(folder).as_posix() for path in _files(folder)} - {*files, MANIFEST})
    if unknown:
        return str(folder / unknown[0]), "the file is not in the checkpoint's manifest"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return str(path), "the file is in the checkpoint's manifest, but missing"
        found = path.stat().st_size
        if found != size:
            return str(path), f"the file has {found} bytes, but was saved with {size}"
        if file_sha256(path) != sha256:
            return str(path), "the content is not what was saved (sha256 differs)"
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=1) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file of a bundle. Raises DataError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            Fault(str(path), "there is no such file", "Give a complete bundle, as hrm-ray train wrote it")
        ) from None
    except (ValueError, OSError) as error:
        kind = UnreadableError if away(error) else DataError
        raise kind(
            Fault(str(path), f"the file cannot be read as JSON ({error})", "Restore the file, or start a new run")
        ) from None

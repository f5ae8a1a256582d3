"""Checkpoints are whole or absent, checked before they are used, and never cost an earlier one."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hrm_ray.bundle import weights_file
from hrm_ray.bundle.store import open_bundle
from hrm_ray.bundle.weights_file import read_rows, save_tensors
from hrm_ray.errors import DataError
from hrm_ray.launch import supervisor
from hrm_ray.metrics import jsonl
from hrm_ray.rundir import MANIFEST, RunDir, verify_checkpoint
from hrm_ray.train import checkpoint
from tests.support.runs import (
    PUZZLE,
    TEXT,
    failing_at,
    files_below,
    hrm,
    puzzle_file,
    records,
    refused,
    text_file,
    train,
)

PACKAGE = Path(__file__).resolve().parents[2] / "hrm_ray"
SLOTS = 12
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "slots_00000000.safetensors", "state.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with puzzles.safetensors and a bundle b of five steps, with checkpoints 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("trained")
    words = (*PUZZLE, "--steps", "5", "--save-every", "2", "--ema", "0.9", "--puzzle-emb-ndim", "4")
    train(puzzle_file(folder), folder / "b", *words)
    return folder


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """A bundle of its own for one test."""
    shutil.copytree(trained / "b", tmp_path / "b")
    return tmp_path / "b"


def test_what_is_in_it(bundle: Path) -> None:
    folder = bundle / "checkpoints" / "step_5"
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, MANIFEST))
    assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == sorted(FILES)
    verify_checkpoint(folder)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_rank_reads_its_slots_alone(ranks_before: int, ranks: int) -> None:
    """Whatever number of ranks saved them; files that hold others are not opened."""
    whole = {"carry.z_h": torch.randn(SLOTS, 3, 2).bfloat16(), "feed.taken": torch.arange(SLOTS)}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        size, own = SLOTS // ranks_before, SLOTS // ranks
        for first in range(0, SLOTS, size):
            part = {name: values[first : first + size] for name, values in whole.items()}
            save_tensors(part, Path(name) / f"slots_{first:08d}.safetensors")
        opened: list[tuple[int, int, int]] = []

        def reading(path: Path, first: int, beyond: int) -> dict[str, Tensor]:
            begin = int(path.stem.removeprefix("slots_"))
            opened.append((begin, begin + first, begin + beyond))
            return read_rows(path, first, beyond)

        patched.setattr(checkpoint, "read_rows", reading)
        for first in range(0, SLOTS, own):
            opened.clear()
            found = checkpoint.slots_between(Path(name), first, first + own)
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], values[first : first + own]) for name, values in whole.items())
            assert [part for _, *ends in opened for part in range(*ends)] == list(range(first, first + own))
            assert all(begin <= part < begin + size for begin, *ends in opened for part in range(*ends))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "7", "--save-every", "2", "--keep", "2")
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["step_6", "step_7"]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "first byte": lambda path: path.write_bytes(flipped(path.read_bytes(), 0)),
    "a byte inside": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2)),
    "last byte": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 1)),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut by one": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, bundle: Path) -> None:
    for name in FILES:
        path = bundle / "checkpoints" / "step_5" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        before = files_below(bundle)
        words = ("train", "--bundle-dir", bundle, "--resume", "--steps", "6")
        refused(5, *words, naming=(path, "--resume-from", "step_4"))
        assert files_below(bundle) == before, "nothing is deleted or written"
        path.write_bytes(content)
    verify_checkpoint(bundle / "checkpoints" / "step_5")


def test_the_newest_whole_checkpoint_is_named(bundle: Path) -> None:
    """The newest has damaged weights, the one before it a damaged manifest."""
    folder = bundle / "checkpoints"
    DAMAGES["cut by one"](folder / "step_5" / "model.safetensors")
    words = ("train", "--bundle-dir", bundle, "--resume", "--steps", "6")
    refused(5, *words, naming=(f"Give --resume-from {folder / 'step_4'}, the newest whole one",))
    DAMAGES["cut in half"](folder / "step_4" / MANIFEST)
    refused(5, *words, naming=(f"--resume-from {folder / 'step_2'},",))
    DAMAGES["gone"](folder / "step_2" / "state.json")
    refused(5, *words, naming=("no whole checkpoint", "--brain-name"))


@pytest.mark.parametrize("damage", ["cut in half", "empty", "gone"])
def test_a_damaged_manifest(damage: str, bundle: Path) -> None:
    DAMAGES[damage](bundle / "checkpoints" / "step_5" / MANIFEST)
    before = files_below(bundle)
    folder = bundle / "checkpoints" / "step_5"
    refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "6", naming=(folder, MANIFEST))
    assert files_below(bundle) == before
    older = ("train", "--resume-from", bundle / "checkpoints" / "step_4", "--steps", "6")
    assert hrm(*older).code == 0, "an older one is there to go on from"


def test_a_manifest_with_any_byte_changed(bundle: Path) -> None:
    """Either it still says the same of the files, or it is refused: no other error comes of it."""
    folder = bundle / "checkpoints" / "step_5"
    content = (folder / MANIFEST).read_bytes()
    files = json.loads(content)["files"]
    accepted = 0
    for place in range(0, len(content), 2):
        for bit in (1, 16):
            changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            (folder / MANIFEST).write_bytes(changed)
            try:
                verify_checkpoint(folder)
            except DataError:
                continue
            assert json.loads(changed)["files"] == files
            accepted += 1
    assert accepted < len(content) / 8


def test_a_file_that_is_not_of_it(bundle: Path) -> None:
    """Slots of another run's rank, say, would be read along."""
    stray = bundle / "checkpoints" / "step_5" / "slots_00000004.safetensors"
    shutil.copyfile(stray.with_name("slots_00000000.safetensors"), stray)
    refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "6", naming=(stray, "manifest"))


def test_a_power_cut_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is copied before every write, rename and deletion of a run that saves each step. In the copy every
    checkpoint that bears its final name is whole, and so is best/; and `--resume` ends where the run ended, to the
    bit, whatever lay there half done. The last step is saved twice: once as any other, and after the evaluation with
    which the epoch ends."""
    data, held_out = text_file(tmp_path, rows=10), text_file(tmp_path, rows=4, name="held_out.txt", seed=1)
    words = (*TEXT, "--epochs", "1", "--save-every", "1", "--keep", "2", "--ema", "0.5", "--lr", "1e-2")
    bundle, cut = tmp_path / "b", tmp_path / "cut"
    copies: list[Path] = []

    def copy_first(real: Callable[..., Any]) -> Callable[..., Any]:
        def copying(*words: Any, **named: Any) -> Any:
            if RunDir(bundle).checkpoint_steps():
                copies.append(cut / str(len(copies)))
                shutil.copytree(bundle, copies[-1])
            return real(*words, **named)

        return copying

    def deleting(folder: Any, ignore_errors: bool = False) -> None:
        """Half a deletion is on the disk at some moment too."""
        first = next((path for path in sorted(Path(folder).rglob("*")) if path.is_file()), None)
        if first is not None:
            first.unlink()
        copy_first(real_rmtree)(folder, ignore_errors=ignore_errors)

    real_rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copy_first(os.replace))
        patch.setattr(os, "rename", copy_first(os.rename))
        patch.setattr(Path, "rename", copy_first(Path.rename))
        patch.setattr(shutil, "rmtree", deleting)
        patch.setattr("hrm_ray.bundle.weights_file.save_file", copy_first(save_file))
        train(data, bundle, *words, "--eval-every", "2", "--eval-file", held_out)
    last = RunDir(bundle).checkpoint_steps()[-1]
    assert last == 3 and len(copies) > 25
    end = files_below(bundle / "checkpoints" / f"step_{last}")
    for copy in copies:
        for step in RunDir(copy).checkpoint_steps():
            verify_checkpoint(copy / "checkpoints" / f"step_{step}")
        if (copy / "best").exists():
            open_bundle(copy / "best", torch.device("cpu"))
        ran = hrm("train", "--bundle-dir", copy, "--resume")
        assert ran.code == 0, (copy, ran.err, sorted(path.name for path in (copy / "checkpoints").iterdir()))
        assert files_below(copy / "checkpoints" / f"step_{last}") == end
        names = {"model.safetensors", "best/model.safetensors", "tokenizer.json"}
        assert {n: (copy / n).read_bytes() for n in names} == {n: (bundle / n).read_bytes() for n in names}


FULL_OS = OSError(errno.ENOSPC, "No space left on device")
FULL_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL: dict[str, tuple[Any, str, BaseException]] = {
    "weights": (weights_file, "save_file", FULL_SAFETENSORS),
    "json": (json, "dumps", FULL_OS),
    "fsync": (os, "fsync", FULL_OS),
    "replace": (os, "replace", FULL_OS),
    "metrics": (jsonl, "to_line", FULL_OS),
}


SEVEN = ("--steps", "7", "--save-every", "1", "--keep", "9")


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk(writer: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever write: one message, exit code 4, what was saved before stays whole, and no scraps are left."""
    owner, attribute, error = FULL[writer]
    real = getattr(owner, attribute)
    kept = {step: files_below(bundle / "checkpoints" / f"step_{step}") for step in (2, 4, 5)}
    for call in range(1, 60):
        copy = bundle.with_name(f"copy{call}")
        shutil.copytree(bundle, copy)
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, failing_at(call, real, error))
            ran = hrm("train", "--bundle-dir", copy, "--resume", *SEVEN, "--max-failures", "0")
        for step, files in kept.items():
            assert files_below(copy / "checkpoints" / f"step_{step}") == files
        for step in RunDir(copy).checkpoint_steps():
            verify_checkpoint(copy / "checkpoints" / f"step_{step}")
        assert not [path for path in copy.rglob("*") if path.name.endswith((".partial", ".tmp"))]
        if ran.code == 0 and (writer, call) == ("json", 1):
            continue  # the first JSON names the process that holds the lock, which a run can do without
        if ran.code == 0:
            assert call > 1
            break
        assert ran.code == 4 and len(ran.faults) == 1 and "Traceback" not in ran.err, (call, ran.err)
        assert "No space left" in ran.faults[0] and ("--resume" in ran.faults[0] or "--bundle-dir" in ran.faults[0])
    else:
        raise AssertionError("it never got through")


@pytest.mark.parametrize("writer", ["weights", "fsync"])
def test_a_disk_that_is_full_for_a_moment(writer: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever write of a training run: it waits and goes on, and ends with the files of an undisturbed run."""
    whole = bundle.with_name("undisturbed")
    shutil.copytree(bundle, whole)
    assert hrm("train", "--bundle-dir", whole, "--resume", *SEVEN).code == 0
    owner, attribute, error = FULL[writer]
    real = getattr(owner, attribute)
    waits: list[float] = []
    monkeypatch.setattr(supervisor, "wait_for", lambda wait_s, stop: waits.append(wait_s))
    for call in range(1, 60, 4 if writer == "fsync" else 1):
        copy = bundle.with_name(f"copy{call}")
        shutil.copytree(bundle, copy)
        waits.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, failing_at(call, real, error))
            ran = hrm("train", "--bundle-dir", copy, "--resume", *SEVEN)
        if ran.code == 4 and not waits:
            continue  # while the run was being prepared
        assert ran.code == 0, ran.err
        assert (copy / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert [entry["step"] for entry in records(copy)] == [entry["step"] for entry in records(whole)]
        if not waits:
            break
        assert waits == [10.0]
        (restart,) = (entry for entry in records(copy, "event") if "restart" in entry)
        assert (restart["restart"], restart["cause"]) == (1, "disk")
        assert "restart 1: disk" in ran.out
    else:
        raise AssertionError("it never got through")


def test_a_full_disk_while_the_data_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text_file(tmp_path)
    monkeypatch.setattr("hrm_ray.data.chunk_source.tokenise", failing_at(1, lambda: None, FULL_OS))
    refused(4, "train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, naming=(tmp_path / "b", "space"))
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_nothing_is_unpickled(bundle: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickling(*words: Any, **named: Any) -> Any:
        raise AssertionError("a file of a run was unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, unpickling)
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "6").code == 0
    assert hrm("solve", bundle, "--file", trained / "puzzles.safetensors", "--split", "train").code == 0


def test_the_only_torch_load_admits_tensors_alone() -> None:
    loads = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("torch", "pickle") and node.func.attr in ("load", "loads"):
                loads.append((path.name, {word.arg: ast.unparse(word.value) for word in node.keywords}))
    assert [name for name, _ in loads] == ["start_weights.py"]
    assert loads[0][1]["weights_only"] == "True"


def test_files_in_subfolders_belong_to_a_checkpoint(tmp_path: Path) -> None:
    """A strategy may write into a folder of its own: its files are described and verified like all others."""
    run_dir = RunDir(tmp_path)
    partial = run_dir.partial_checkpoint(3)
    shard = partial / "shards" / "rank_0.bin"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"half of the weights")
    run_dir.describe_checkpoint(3, partial)
    whole = run_dir.seal_checkpoint(3, partial)
    assert json.loads((whole / MANIFEST).read_text())["files"].keys() == {"shards/rank_0.bin"}
    verify_checkpoint(whole)
    sealed = whole / "shards" / "rank_0.bin"
    sealed.write_bytes(b"half of the Weights")
    with pytest.raises(DataError, match=r"rank_0\.bin.*sha256"):
        verify_checkpoint(whole)
    sealed.write_bytes(b"half of the weights")
    (whole / "shards" / "rank_1.bin").write_bytes(b"of another run")
    with pytest.raises(DataError, match=r"rank_1\.bin.*not in the checkpoint's manifest"):
        verify_checkpoint(whole)

"""Files beside an anchor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hrm_ray.independent.anchor_files import momentum_of, remove_anchor, seal_momentum, whole_momentum


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    path = tmp_path / "round-000012-ab.safetensors"
    path.write_bytes(b"weights")
    momentum_of(path).write_bytes(b"momentum")
    seal_momentum(path, hashlib.sha256(b"momentum").hexdigest())
    return path


def test_a_momentum_counts_only_as_it_was_written(anchor: Path) -> None:
    assert whole_momentum(anchor)
    momentum_of(anchor).write_bytes(b"momentuM")
    assert not whole_momentum(anchor)
    momentum_of(anchor).unlink()
    assert not whole_momentum(anchor)


def test_a_momentum_without_its_checksum_does_not_count(anchor: Path) -> None:
    (checksum,) = anchor.parent.glob("*.sha256")
    checksum.unlink()
    assert not whole_momentum(anchor)


def test_all_files_of_an_anchor_go_together(anchor: Path) -> None:
    other = anchor.with_name("round-000012-abc.safetensors")
    other.write_bytes(b"another")
    remove_anchor(anchor)
    assert list(anchor.parent.iterdir()) == [other]

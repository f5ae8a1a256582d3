"""Whole runs on corpora of other shapes than a plain file: what they train on is the same, and they go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.corpora import COMPRESSIONS, FORMATS, write, write_tar, write_zip
from tests.support.runs import TEXT, computed, hrm, refused, train

TEXTS = [f"{number} of some words, {number * 7919 % 1000}" for number in range(60)]
CONSTANT = ("--lr-schedule", "constant")
ROWS = FORMATS["jsonl"](TEXTS)

SHAPES: dict[str, Callable[[Path], str]] = {
    "packed": lambda d: str(write(d / "a.jsonl.xz", COMPRESSIONS["xz"](ROWS))),
    "parquet": lambda d: str(write(d / "a.parquet", FORMATS["parquet"](TEXTS))),
    "csv": lambda d: str(write(d / "a.csv", FORMATS["csv"](TEXTS))),
    "zip": lambda d: str(write_zip(d / "a.zip", {"train/a.jsonl": ROWS, "test/b.txt": b"x" * 99})),
    "tar": lambda d: str(write_tar(d / "a.tgz", {"train/a.jsonl": ROWS, "test/b.txt": b"x" * 99})),
    "pattern": lambda d: str(write(d / "in" / "part-1.jsonl", ROWS).parent.parent / "*" / "part-?.jsonl"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a plain file."""
    folder = tmp_path_factory.mktemp("plain")
    train(write(folder / "a.jsonl", ROWS), folder / "bundle", *TEXT, "--steps", "4", *CONSTANT)
    return folder / "bundle"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_rows_in_another_shape_train_the_same(plain: Path, tmp_path: Path, shape: str) -> None:
    address = SHAPES[shape](tmp_path)
    train(Path(address), tmp_path / "bundle", *TEXT, "--steps", "2", "--save-every", "2", *CONSTANT)
    again = hrm("train", "--bundle-dir", tmp_path / "bundle", "--resume", "--steps", "4", "--launcher", "local")
    assert again.code == 0, again.err
    assert computed(tmp_path / "bundle") == computed(plain)


def test_a_relative_pattern_is_taken_up_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here" / "logs" / "a.jsonl", ROWS)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ran = hrm("train", "--dataset-file", "logs/*.jsonl", *TEXT, "--steps", "2", "--save-every", "2", *CONSTANT)
    assert ran.code == 0, ran.err
    bundle = tmp_path / "here" / "artifacts" / "brains" / "logs"
    assert bundle.is_dir()
    monkeypatch.chdir(tmp_path / "there")
    again = hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "3", "--launcher", "local")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("shape", "words", "naming"),
    [
        ("zip", ("--split", "other"), ("a.zip", "test, train")),
        ("csv", ("--text-column", "body"), ("a.csv", "no such column; it has: n, text")),
        ("packed", ("--split", "test"), ("a.jsonl.xz", "The splits are: train")),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_run(
    tmp_path: Path, shape: str, words: tuple[str, ...], naming: tuple[str, ...]
) -> None:
    address = SHAPES[shape](tmp_path)
    refused(5, "train", "--dataset-file", address, "--bundle-dir", tmp_path / "b", *TEXT, *words, naming=naming)
    assert not (tmp_path / "b").exists()


def test_the_same_archive_held_out_is_told(tmp_path: Path) -> None:
    address = write_zip(tmp_path / "a.zip", {"a.jsonl": ROWS})
    words = ("--dataset-file", address, "--eval-file", address, "--bundle-dir", tmp_path / "b", "--steps", "1")
    assert "in both training and held-out data" in hrm("train", *words, *TEXT).out
    packed = write_zip(tmp_path / "c.zip", {"a.jsonl": ROWS, "held/b.txt": b"some words " * 30})
    apart = ("--dataset-file", packed, "--val-split", "held", "--bundle-dir", tmp_path / "d", "--steps", "1")
    ran = hrm("train", *apart, *TEXT)
    assert ran.code == 0 and "held-out data, so" not in ran.out, ran.err

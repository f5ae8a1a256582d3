"""Runs whose tokenizer has a name, or whose vocabulary's size the data decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.rundir import RunDir, read_json
from tests.support.runs import TEXT, TINY, hrm, records, refused, text_file, train
from tests.unit.test_data_named_tokenizer import cached, files_of

AUTO = (*TINY, "--max-seq-len", "16", "--batch-size", "2", "--steps", "2", "--auto-vocab-size")


def test_the_log_says_how_the_data_decided_the_size(tmp_path: Path) -> None:
    corpus = text_file(tmp_path, rows=300)
    ran = train(corpus, tmp_path / "b", *AUTO, "--min-vocab-size", "300", "--max-vocab-size", "400")
    size = TextTokenizer.load(tmp_path / "b").vocab_size
    assert 300 <= size <= 400 and "vocabulary 300 to 400, chosen from the data" in ran.out
    assert read_json(RunDir(tmp_path / "b").config)["vocab_size"] == size
    told = [record["message"] for record in records(tmp_path / "b", "event") if record["level"] == "INFO"]
    assert any(f"has {size} tokens, chosen from the data" in message for message in told)
    again = train(corpus, tmp_path / "b", "--resume", "--steps", "3", "--max-vocab-size", "400")
    assert "chosen from the data" not in again.out
    refused(2, "train", "--bundle-dir", tmp_path / "b", "--resume", "--max-vocab-size", "500", naming=("400", "500"))


def test_a_size_that_the_data_cannot_fill_is_reported(tmp_path: Path) -> None:
    words = (text_file(tmp_path), tmp_path / "b", *AUTO)
    train(*words)
    told = [record["message"] for record in records(tmp_path / "b", "event") if record["level"] == "WARNING"]
    assert any("5000 to 50000 were asked for" in message for message in told)


def test_a_size_that_may_never_come_refuses_no_run(tmp_path: Path) -> None:
    """A vocabulary of the largest size would not fit into any memory; the one chosen from the data does."""
    bounds = ("--min-vocab-size", "300", "--max-vocab-size", "100000000000")
    train(text_file(tmp_path), tmp_path / "b", *AUTO, *bounds)


def test_a_tokenizer_of_the_hub_is_taken_out_of_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tokenizer = train_bpe(["a tokenizer of the Hub"] * 3, 270, 9)
    cached(tmp_path / "hub", "org/name", files_of(tokenizer, tmp_path / "t"))
    corpus = text_file(tmp_path)
    words = [word for word in TEXT if word not in ("--vocab-size", "300")]
    train(corpus, tmp_path / "b", *words, "--steps", "1", "--model", "org/name")
    assert TextTokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint
    train(corpus, tmp_path / "b", "--resume", "--steps", "2")
    ran = hrm("train", "--dataset-file", corpus, *words, "--tokenizer-path", "org/name", "--dry-run")
    assert ran.code == 0 and "vocabulary 270" in ran.out
    unknown = (*words, "--bundle-dir", tmp_path / "c", "--model", "org/none")
    refused(3, "train", "--dataset-file", corpus, *unknown, naming=("org/none", "HF_HUB_OFFLINE"))
    missing = (*words, "--bundle-dir", tmp_path / "c", "--model", tmp_path / "none")
    refused(2, "train", "--dataset-file", corpus, *missing, naming=(tmp_path / "none", "no such file or folder"))
    assert not (tmp_path / "c").exists()

"""The built text corpus: large, held out, repeatable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_ray.data.builders import text as builder
from hrm_ray.data.builders.text import build_text
from hrm_ray.data.readers import TextSource, read_documents
from hrm_ray.errors import SettingsError


def test_the_text_corpus_is_large_and_held_out(tmp_path: Path) -> None:
    summary = build_text(tmp_path / "text")
    train = list(read_documents(TextSource(tmp_path / "text", "train")))
    test = list(read_documents(TextSource(tmp_path / "text", "test")))
    assert (len(train), len(test)) == (summary.train_documents, summary.test_documents)
    assert summary.train_bytes == sum(len(document.text.encode()) for document in train) > 500_000
    assert 0.005 < len(test) / (len(train) + len(test)) < 0.05
    texts = [document.text for document in train + test]
    assert len(set(texts)) == len(texts), "no document twice, so none held out occurs in training"
    assert not {document.text for document in train} & {document.text for document in test}
    assert any("JSONDecoder" in text for text in texts)
    with (tmp_path / "text" / "train.jsonl").open(encoding="utf-8") as file:
        assert set(json.loads(next(file))) == {"text", "source"}


def test_the_text_corpus_stops_at_its_size_and_follows_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [(f"d{number}", f"text number {number}\n") for number in range(400)] + [("again", "text number 7\n")]
    monkeypatch.setattr(builder, "python_documents", lambda: iter(documents))
    whole = build_text(tmp_path / "whole")
    assert whole.duplicates == 1 and whole.train_documents + whole.test_documents == 400
    small = build_text(tmp_path / "small", max_bytes=4000)
    assert 3980 < small.train_bytes + small.test_bytes <= 4000
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_text(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(SettingsError, match="^--max-bytes 10: "):
        build_text(tmp_path / "none", max_bytes=10)
    assert not (tmp_path / "none").exists()

"""Reading text: what a path holds, in which order, and what each kind of bad data is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hrm_ray.data.detect import detect
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_documents
from hrm_ray.errors import DataError, HrmRayError, SettingsError


def write_rows(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(source: TextSource) -> list[str]:
    return [document.text for document in read_documents(source)]


def fault_of(source: TextSource, kind: type[HrmRayError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        list(read_documents(source))
    for fault in caught.value.faults:
        assert fault.value and fault.reason and fault.hint
    return str(caught.value)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffline 1\r\nZeile 2 äöü 🙂\n".encode())
    (document,) = read_documents(TextSource(file))
    assert (document.text, document.where, document.row) == ("line 1\r\nZeile 2 äöü 🙂\n", str(file), 0)


def test_each_line_of_jsonl_is_a_document_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\u2028still one"}\n\n  \n{"text": "two", "more": 1}', encoding="utf-8")
    found = [(document.text, document.row, document.where) for document in read_documents(TextSource(file))]
    assert found == [("one\u2028still one", 0, f"{file}:1"), ("two", 1, f"{file}:4")]


def test_pairs_have_prompt_and_response(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"q": "1+1=", "a": "2"})
    (document,) = read_documents(TextSource(file, prompt_column="q", response_column="a"))
    assert (document.prompt, document.response, document.text) == ("1+1=", "2", "1+1=2")


def test_a_folder_is_read_through_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write_rows(tmp_path / "b" / "z.jsonl", {"text": "3"}, {"text": "4"})
    (tmp_path / "b" / "deeper").mkdir()
    (tmp_path / "b" / "deeper" / "a.TXT").write_text("2")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b-.txt").write_text("5")
    (tmp_path / "picture.png").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("not read")
    assert texts(TextSource(tmp_path)) == ["1", "2", "3", "4", "5"]
    assert list_parts(TextSource(tmp_path)).skipped == 2


def test_a_split_is_a_name_of_files_or_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train")
    write_rows(tmp_path / "train.jsonl", {"text": "more train"})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "part.txt").write_text("test")
    assert texts(TextSource(tmp_path, "train")) == ["more train", "train"]
    assert texts(TextSource(tmp_path, "test")) == ["test"]
    message = fault_of(TextSource(tmp_path, "valid"))
    assert "`valid`" in message and "test, train" in message


def test_without_splits_train_is_everything_and_another_name_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.txt").write_text("B")
    assert texts(TextSource(tmp_path)) == ["A", "B"]
    assert "a, b" in fault_of(TextSource(tmp_path, "test"))
    assert "The splits are: train" in fault_of(TextSource(tmp_path / "a.txt", "test"))


def test_a_path_that_is_not_there_is_a_settings_error(tmp_path: Path) -> None:
    message = fault_of(TextSource(tmp_path / "no" / "where.txt"), SettingsError)
    assert "where.txt" in message and str(tmp_path) in message and "Give" in message


def test_empty_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "empty" in fault_of(TextSource(tmp_path / "empty.txt"))
    assert "empty" in fault_of(TextSource(tmp_path / "blank.jsonl"))
    assert "empty" in fault_of(TextSource(tmp_path))
    (tmp_path / "full.txt").write_text("x")
    assert texts(TextSource(tmp_path)) == ["", "x"]


def test_a_folder_without_readable_files_says_which_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    message = fault_of(TextSource(tmp_path))
    assert ".txt" in message and ".jsonl" in message and "1 of other kinds" in message


def test_an_unknown_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    message = fault_of(TextSource(tmp_path / "a.docx"))
    assert ".docx" in message and ".jsonl" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"body": "x", "title": "y"}', ["`text`", "body, title", "--text-column"]),
        (b'["x"]', ["a list", "object"]),
        (b'{"text": 3}', ["a number", "not a string"]),
        (b'{"text": null}', ["null"]),
        (b'{"text": "x"', ["not JSON"]),
        (b"[" * 100_000, ["not JSON"]),
        (b'{"text": "caf\xe9"}', ["byte 30 (0xe9)", "UTF-8", "Convert"]),
        (b'{"text": "\\ud83d"}', ["surrogate"]),
    ],
)
def test_a_bad_line_is_told_by_file_and_line(tmp_path: Path, line: bytes, expected: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = fault_of(TextSource(file))
    assert "rows.jsonl:2" in message
    for words in expected:
        assert words in message


def test_a_text_file_in_another_encoding_names_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    message = fault_of(TextSource(file))
    assert "latin.txt" in message and "byte 3 (0xe9)" in message and "UTF-8" in message


def test_columns_of_pairs_are_checked(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"q": "x"})
    (tmp_path / "a.txt").write_text("x")
    assert "--response-column" in fault_of(TextSource(rows, prompt_column="q"), SettingsError)
    assert "--response-column" in fault_of(TextSource(rows, prompt_column="q", response_column="a"))
    assert "no column `q`" in fault_of(TextSource(tmp_path / "a.txt", prompt_column="q", response_column="a"))


def test_detect_tells_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", {"text": "abc"})
    (tmp_path / "test.txt").write_text("12345")
    facts = detect(TextSource(tmp_path, "test"))
    assert (facts.task, facts.files, facts.bytes, facts.puzzle) == ("lm", 1, 5, None)
    with pytest.raises(DataError, match="`body`"):
        detect(TextSource(tmp_path, "train", text_column="body"))


def test_detect_tells_puzzles(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", {"inputs": [0, 1], "labels": [2, 1]}, {"inputs": [0, 0], "labels": [1, 4]})
    tensors = tmp_path / "p.safetensors"
    save_file({"train.inputs": np.ones((3, 4), np.uint8), "train.labels": np.full((3, 4), 2, np.uint8)}, tensors)
    for path, count, seq_len, vocab_size in ((rows, 2, 2, 5), (tensors, 3, 4, 3)):
        facts = detect(TextSource(path))
        assert facts.task == "puzzle" and facts.puzzle is not None and facts.bytes == path.stat().st_size
        assert (facts.puzzle.count, facts.puzzle.seq_len, facts.puzzle.vocab_size) == (count, seq_len, vocab_size)


def test_text_with_a_column_named_inputs_is_text(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", {"inputs": "a", "labels": "b", "text": "t"})
    assert detect(TextSource(rows)).task == "lm"


def test_detect_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        detect(TextSource(tmp_path / "nothing"))

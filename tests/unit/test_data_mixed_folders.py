"""Folders as people have them: what is no text data is passed over with a warning, what is named itself is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from hrm_ray.data import file_systems
from hrm_ray.data.chunks import read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import BadRow, Document
from hrm_ray.errors import DataError, SettingsError
from tests.support.corpora import rows_of, shown, texts_of, write, write_tar, write_zip
from tests.support.runs import TINY, hrm, refused

posix_only = pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")


@posix_only
def test_a_link_that_leads_nowhere_is_passed_over_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "a.txt", "text " * 100)
    for name in ("b.txt", "c.txt", "d.txt", "e.txt"):
        (folder / name).symlink_to("nowhere.txt")
    for path in (folder, folder / "*.txt"):
        found = list_parts(TextSource(str(path)))
        assert [part.name for part in found.parts] == ["a.txt"] and found.skipped == 4
        assert found.notes == ("passed over 4 links that lead nowhere: b.txt, c.txt, d.txt and 1 more.",)
    assert texts_of(folder) == ["text " * 100]
    ran = hrm("train", "--dataset-file", folder, *TINY, "--dry-run")
    assert ran.code == 0 and "passed over 4 links" in ran.out + ran.err
    assert "passed over 4 links" in hrm("data", "inspect", folder).err
    refused(5, "train", "--dataset-file", folder, *TINY, "--strict", naming=("4 links", "leave out --strict"))
    with pytest.raises(SettingsError, match=r"this link leads to nowhere\.txt, which does not exist"):
        list_parts(TextSource(str(folder / "b.txt")))


@posix_only
@pytest.mark.parametrize("option", ["--dataset-file", "--eval-file", "--config", "--adaptive-lr-config", "--model"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, option: str) -> None:
    pipe = tmp_path / "p.txt"
    os.mkfifo(pipe)
    data = [] if option == "--dataset-file" else ["--dataset-file", write(tmp_path / "a.txt", "text " * 100)]
    refused(2, "train", *data, *TINY, option, pipe, naming=(pipe, "is a pipe, not a file", "Give a file"))


@posix_only
def test_a_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="is a device, not a file"):
        list_parts(TextSource("/dev/zero"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({f"key {number} of many": 1 for number in range(3000)})),
        ("a.csv", ",".join(f"column {number} {'long' * 50}" for number in range(3000)) + "\n"),
        ("a.jsonl", json.dumps({"k" * 5000: 1})),
    ],
)
def test_a_missing_column_of_many_is_told_briefly(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        message = refused(5, "train", "--dataset-file", name, *TINY, naming=("column `text`", "--text-column"))
    assert len(message.removeprefix("error: ").replace(str(tmp_path), "")) < 300, message
    assert name.endswith("jsonl") or "and 2,99" in message


def test_an_unknown_split_of_many_is_told_briefly(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / f"part{number:03}.txt", "x")
    with pytest.raises(DataError, match=r"part000, part001.* and 50 more\.$"):
        list_parts(TextSource(str(tmp_path), "test"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_where_the_first_file_is_bad_the_way_out_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"caf\xe9\nnonsense\n" if name != "a.jsonl" else b'{"text": "caf\xe9"}\n')
    refused(5, "train", "--dataset-file", tmp_path / name, *TINY, naming=("UTF-8", "--on-bad-row skip"))


NO_TEXT = {
    "a.json": b'{"name": "x", "version": 1}',
    "b.json": b"[1, 2, 3]",
    "c.json": b"// a comment\n{}",
    "d.csv": b"id,name\n1,x\n",
    "e.jsonl": b'{"id": 1}\n' * 50,
    "f.json": b'"only a string"',
}


@pytest.mark.parametrize("place", ["folder", "a.zip", "a.tar", "a.tar.gz"])
def test_files_without_text_data_are_passed_over_where_others_have_some(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    files = {**NO_TEXT, "x.txt": b"text " * 200, "y.jsonl": b'{"text": "row"}\n{"id": 2, "text": "more"}\n'}
    if place == "folder":
        for name, content in files.items():
            write(path / name, content)
    else:
        (write_zip if place.endswith("zip") else write_tar)(path, files)
    rows = rows_of(path)
    texts = [row.text for row in rows if isinstance(row, Document)]
    assert texts == ["text " * 200, "row", "more"]
    passed = [row for row in rows if isinstance(row, BadRow)]
    assert len(passed) == len(NO_TEXT) and all(row.passed_over for row in passed)
    assert not any(isinstance(row, BadRow) and row.passed_over for row in rows_of(path, strict=True))
    ran = hrm("train", "--dataset-file", path, *TINY, "--dry-run")
    assert ran.code == 0 and "passed over 6 files without text data" in ran.out + ran.err, ran
    assert (
        "a.json:1: column" in (ran.out + ran.err).replace(", column", ": column") and "and 3 more" in ran.out + ran.err
    )
    inspected = hrm("data", "inspect", path)
    assert "6 file(s) hold no text data" in inspected.err and "a.json" in inspected.out
    refused(5, "train", "--dataset-file", path, *TINY, "--strict", naming=("a.json", "column `text`"))


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("place", ["a.zip", "a.tar.gz"])
def test_reading_on_in_an_archive_counts_passed_over_files_alike(tmp_path: Path, place: str, start: int) -> None:
    files = {**NO_TEXT, "x.txt": b"text", "y.jsonl": b'{"text": "row"}\n{"id": 2, "text": "more"}\n'}
    path = (write_zip if place.endswith("zip") else write_tar)(tmp_path / place, files)
    source = TextSource(str(path))
    (part,) = list_parts(source).parts
    whole = list(read_part(part, source))
    assert [row.row for row in whole] == list(range(9))
    assert list(read_part(part, source, start)) == whole[start:]


def test_a_file_named_itself_is_strict(tmp_path: Path) -> None:
    for name, content in NO_TEXT.items():
        rows = rows_of(write(tmp_path / name, content))
        assert rows and not any(isinstance(row, BadRow) and row.passed_over for row in rows), name


def test_a_folder_without_any_text_is_an_error(tmp_path: Path) -> None:
    for name, content in NO_TEXT.items():
        write(tmp_path / "d" / name, content)
    refused(5, "train", "--dataset-file", tmp_path / "d", *TINY, naming=("6 files cannot be read", "a.json"))


def test_a_file_of_which_some_row_has_text_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"id": 1}\n{"text": "x"}\n')
    write(tmp_path / "b.jsonl", '{"text": "x"}\n{"id": 1}\n')
    rows = rows_of(tmp_path)
    assert shown(rows) == ["<bad>", "x", "x", "<bad>"]
    assert not any(isinstance(row, BadRow) and row.passed_over for row in rows)
    refused(5, "train", "--dataset-file", tmp_path, *TINY, naming=("a.jsonl:1", "--on-bad-row skip"))


def test_a_file_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", "b")
    real = file_systems._Local.open

    def opened(own: file_systems._Local, address: str) -> BinaryIO:
        if address.endswith("a.txt"):
            raise PermissionError(13, "Permission denied", address)
        return real(own, address)

    monkeypatch.setattr(file_systems._Local, "open", opened)
    bad, good = rows_of(tmp_path)
    assert isinstance(bad, BadRow) and not bad.passed_over and "no permission" in bad.fault.reason
    assert bad.whole_file
    assert isinstance(good, Document) and good.text == "b"
    refused(5, "train", "--dataset-file", tmp_path, *TINY, naming=("a.txt", "no permission", "--on-bad-row skip"))


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    for name in ("a.py", "b.rst", "LICENSE", "z.log", ".hidden"):
        write(tmp_path / "d" / name, "x")
    write(tmp_path / "d" / "t.txt", "text")
    for path in (tmp_path / "d", write_zip(tmp_path / "a.zip", {name: b"x" for name in ("t.txt", "c", "d.py")})):
        (note,) = list_parts(TextSource(str(path))).notes
        assert "--as-text PATTERNS" in note
    assert (
        list_parts(TextSource(str(tmp_path / "d")))
        .notes[0]
        .startswith("passed over 4 files of other kinds: LICENSE, a.py, b.rst and 1 more")
    )


def test_whole_files_that_are_skipped_are_counted_as_files(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.txt", b"caf\xe9" if number else b"good text " * 30)
    write(tmp_path / "x.jsonl", '{"text": 1}\n{"text": "good"}\n')
    source = TextSource(str(tmp_path))
    corpus = Corpus(source, list_parts(source).parts, 100, 100, on_bad_row="skip")
    (chunk,) = read_chunks(corpus)
    assert chunk.notes[0].startswith("1 bad row and 4 bad files skipped in block 0, chunk 0 (")
    assert chunk.entry.bad == 5

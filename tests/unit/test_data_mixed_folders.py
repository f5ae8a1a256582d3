"""Folders as people have them: what is no text data is passed over with a warning, what is named itself is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.errors import DataError, SettingsError
from tests.support.corpora import texts_of, write
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

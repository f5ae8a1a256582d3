"""Zip and tar: members as rows, splits among them, and what is refused."""

from __future__ import annotations

import io
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hrm_ray.data import streams
from hrm_ray.data.archives import zips
from hrm_ray.data.archives.tars import TarStream
from hrm_ray.data.formats import texts as text_files
from hrm_ray.data.parts import TextSource, list_parts, shared_part
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import BadRow, Row, TextRows
from hrm_ray.errors import DataError
from tests.support.corpora import (
    COMPRESSIONS,
    FORMATS,
    TAR_MODES,
    arrow_bytes,
    faults_of,
    rows_of,
    shown,
    texts_of,
    write,
    write_tar,
    write_zip,
)

ARCHIVES = ["zip", *TAR_MODES]


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    return write_zip(path, members) if path.suffix == ".zip" else write_tar(path, members)


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_members_of_every_format_in_every_archive(tmp_path: Path, suffix: str) -> None:
    members = {f"{form}/a.{form}": make([form, "x"]) for form, make in sorted(FORMATS.items())}
    members["md/a.md"] = b"md"
    members |= {f"packed/a.jsonl.{name}": pack(FORMATS["jsonl"]([name])) for name, pack in sorted(COMPRESSIONS.items())}
    members["packed/b.parquet.gz"] = COMPRESSIONS["gz"](FORMATS["parquet"](["packed"]))
    members["packed/c.arrow"] = arrow_bytes(["stream"], stream=True)
    members |= {"picture.png": b"no", ".hidden.txt": b"no", "__MACOSX/._a.txt": b"no"}
    path = write_archive(tmp_path / f"a.{suffix}", members)
    expected = [text for form in sorted(FORMATS) for text in (form, "x")]
    rows = rows_of(path)
    if suffix == "zip":
        expected[8:8] = ["md"]
        assert shown(rows) == sorted_as_paths(members, expected)
    else:
        assert shown(rows) == [*expected, "md", "bz2", "gz", "xz", "zst", "packed", "stream"]
    assert [row.row for row in rows] == list(range(len(rows)))
    assert rows[0].where.startswith(f"{path}/arrow/a.arrow")


def sorted_as_paths(members: dict[str, bytes], expected: list[str]) -> list[str]:
    folders = sorted({name.split("/")[0] for name in members if "/" in name and name[0] not in "._"})
    assert folders == ["arrow", "csv", "json", "jsonl", "md", "packed", "parquet", "tsv"]
    return [
        *("arrow", "x", "csv", "x", "json", "x", "jsonl", "x", "md"),
        *("bz2", "gz", "xz", "zst", "packed", "stream", "parquet", "x", "tsv", "x"),
    ]


def test_a_zip_is_read_in_the_order_of_paths_and_a_tar_as_it_is_stored(tmp_path: Path) -> None:
    members = {"b.txt": b"3", "a-.txt": b"2", "a/z.txt": b"1"}
    assert texts_of(write_zip(tmp_path / "a.zip", members)) == ["1", "2", "3"]
    assert texts_of(write_tar(tmp_path / "a.tar", members)) == ["3", "2", "1"]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_splits_in_an_archive_are_those_of_a_folder(tmp_path: Path, suffix: str) -> None:
    members = {"train/a.txt": b"1", "train.jsonl": FORMATS["jsonl"](["2"]), "test.txt": b"3", "other/b.txt": b"4"}
    path = write_archive(tmp_path / f"a.{suffix}", members)
    assert sorted(texts_of(path)) == ["1", "2"]
    assert texts_of(path, split="test") == ["3"]
    if suffix in ("zip", "tar"):
        with pytest.raises(DataError, match="The splits are: other, test, train"):
            list_parts(TextSource(str(path), "valid"))
    else:
        assert texts_of(path, split="valid") == ["<end>"]
        assert "The splits are: other, test, train" in faults_of(path, split="valid")[0]
    assert shared_part(TextSource(str(path)), TextSource(str(path), "test")) is None
    assert shared_part(TextSource(str(path)), TextSource(str(path))) == str(path)


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_without_splits_is_all_training_data_but_for_what_is_held_out(tmp_path: Path, suffix: str) -> None:
    path = write_archive(tmp_path / f"a.{suffix}", {"a.txt": b"1", "b/c.txt": b"2", "held/d.txt": b"3"})
    assert texts_of(path) == ["1", "2", "3"]
    assert texts_of(path, apart="held") == ["1", "2"]
    assert shared_part(TextSource(str(path), apart="held"), TextSource(str(path), "held")) is None
    only = write_archive(tmp_path / f"b.{suffix}", {"held/d.txt": b"3"})
    if suffix in ("zip", "tar"):
        assert shared_part(TextSource(str(path)), TextSource(str(path), "held")) == str(path)
        with pytest.raises(DataError, match="which is held out"):
            list_parts(TextSource(str(only), apart="held"))
    else:
        assert "which is held out" in faults_of(only, apart="held")[0]


def test_a_packed_tar_that_mixes_splits_with_others_is_told(tmp_path: Path) -> None:
    mixed = write_tar(tmp_path / "a.tar.gz", {"a.txt": b"1", "train.txt": b"2"})
    assert texts_of(mixed) == ["1", "<end>"]
    assert "train.txt belongs to the split `train`" in faults_of(mixed)[0]
    only_test = write_tar(tmp_path / "b.tar.gz", {"test/a.txt": b"1"})
    assert "The splits are: test" in faults_of(only_test)[0]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_members_of_an_archive_in_a_folder_are_all_read(tmp_path: Path, suffix: str) -> None:
    write_archive(tmp_path / f"train.{suffix}", {"test/a.txt": b"1", "b.txt": b"2"})
    write(tmp_path / "other.txt", "3")
    assert texts_of(tmp_path) == ["2", "1"] if suffix == "zip" else ["1", "2"]


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../a.txt", "leads out of the archive"),
        ("x/../../a.txt", "leads out of the archive"),
        ("..\\a.txt", "leads out of the archive"),
        ("/etc/a.txt", "absolute path"),
        ("C:\\a.txt", "absolute path"),
        ("a.zip", "an archive inside an archive"),
        ("b/a.tar.gz", "an archive inside an archive"),
    ],
)
def test_a_suspicious_member_is_refused_and_the_others_are_read(
    tmp_path: Path, suffix: str, name: str, said: str
) -> None:
    path = write_archive(tmp_path / f"x.{suffix}", {name: b"bad", "good.txt": b"good", "./fine.txt": b"fine"})
    assert sorted(texts_of(path)) == ["<bad>", "fine", "good"]
    (fault,) = faults_of(path)
    assert said in fault and "Make the archive again" in fault


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "s.txt"), (tarfile.LNKTYPE, "l.txt"), (tarfile.FIFOTYPE, "f.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("folder.txt")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    assert texts_of(path) == ["<bad>"] * 3
    assert [fault.partition("it is ")[2].partition(".")[0] for fault in faults_of(path)] == [
        *("a link", "a link", "no plain file")
    ]
    link = zipfile.ZipInfo("l.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    assert "a link" in faults_of(tmp_path / "a.zip")[0]


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"secret"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(bytes(content))
    assert "it is encrypted" in faults_of(path)[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_way_of_packing_a_zip_member(tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {number}" for number in range(50)]
    path = write_zip(tmp_path / "a.zip", {"a.jsonl": FORMATS["jsonl"](rows), "b.txt": b"text"}, method)
    assert texts_of(path) == [*rows, "text"]
    monkeypatch.setattr("hrm_ray.data.archives.members.PIECE_BYTES", 10)
    assert texts_of(path) == [*rows, "text"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_member_of_a_zip_costs_that_member(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{number}.txt": f"text {number} ".encode() * 100 for number in range(4)}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / "a.zip", members, method)
        content = bytearray(path.read_bytes())
        begin = content.index(b"PK\3\4", 10) + 40
        content[begin : begin + 8] = b"12345678"
        path.write_bytes(bytes(content))
        if not whole:
            monkeypatch.setattr("hrm_ray.data.archives.members.PIECE_BYTES", 10)
        found = texts_of(path)
        assert [text[:6] for text in found] == ["text 0", "<bad>", "text 2", "text 3"]
        assert "1.txt" in faults_of(path)[0]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_a_packed_file_that_is_damaged_costs_that_member(tmp_path: Path, suffix: str) -> None:
    for name, compress in COMPRESSIONS.items():
        packed = bytearray(compress(FORMATS["jsonl"](["a", "b"] * 500)))
        packed[len(packed) // 2 :] = b"\xff" * (len(packed) - len(packed) // 2)
        path = write_archive(tmp_path / f"a.{suffix}", {f"a.jsonl.{name}": bytes(packed), "b.txt": b"good"})
        assert texts_of(path)[-2:] == ["<bad>", "good"], name
        assert f"a.{suffix}/a.jsonl.{name}: " in faults_of(path)[-1]


def test_large_zips_and_zips_behind_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"a.txt": b"first " * 100, "b.jsonl": FORMATS["jsonl"](["second"])}
    plain = write_zip(tmp_path / "a.zip", members)
    behind = write(tmp_path / "b.zip", b"#!/bin/sh\n" + plain.read_bytes())
    assert texts_of(plain) == texts_of(behind) == ["first " * 100, "second"]
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    large = write_zip(tmp_path / "c.zip", members)
    assert b"PK\6\6" in large.read_bytes() and texts_of(large) == texts_of(plain)
    monkeypatch.undo()
    content = bytearray(large.read_bytes())
    content[content.index(b"PK\6\6")] = 0
    with pytest.raises(DataError, match="directory cannot be read"):
        list_parts(TextSource(str(write(tmp_path / "d.zip", bytes(content)))))


@pytest.mark.parametrize(("place", "value"), [(0, 0), (20, 3), (28, 200)])
def test_a_damaged_directory_of_a_zip_is_refused(tmp_path: Path, place: int, value: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"text" * 10, "b.txt": b"text"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + place] = value
    path.write_bytes(bytes(content))
    if place == 20:
        assert texts_of(path) == ["<bad>", "text"]
    else:
        with pytest.raises(DataError, match="directory cannot be read"):
            list_parts(TextSource(str(path)))


def test_a_zip_cut_short_is_not_read_as_the_archive_inside_it(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner.zip", {"inner.txt": b"inside"}).read_bytes()
    path = write_zip(tmp_path / "a.zip", {"inner.zip": inner, "b.txt": b"outside" * 100}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="directory cannot be read: there is none at the file's end"):
        list_parts(TextSource(str(path)))
    padded = write_zip(tmp_path / "b.zip", {"a.txt": b"text"})
    padded.write_bytes(padded.read_bytes() + bytes(512))
    assert texts_of(padded) == ["text"]


def test_a_zip_cut_short_is_refused_at_once(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"text" * 1000})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="directory cannot be read"):
        list_parts(TextSource(str(path)))
    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "b" / "a.zip")
    assert texts_of(tmp_path / "b") == ["<end>"]


@pytest.mark.parametrize("suffix", TAR_MODES)
def test_a_tar_cut_short_gives_the_members_before(tmp_path: Path, suffix: str) -> None:
    members = {f"{number}.txt": f"{(number + 7) ** 40}".encode() * 20 for number in range(40)}
    path = write_tar(tmp_path / f"a.{suffix}", members)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = texts_of(path)
    # What is readable of the member that is cut stays too.
    whole = "".join(text.decode() for text in members.values())
    assert found[-1] == "<end>" and whole.startswith("".join(found[:-1]))
    assert found[:-2] == [text.decode() for text in members.values()][: max(0, len(found) - 2)]
    assert len(found) > 10 or suffix in ("tar.bz2", "tar.xz")


def test_a_tar_without_its_end_or_that_is_none_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"a"})
    path.write_bytes(path.read_bytes()[:1024])
    assert texts_of(path) == ["a", "<end>"]
    other = write(tmp_path / "b.tar.gz", COMPRESSIONS["gz"](b"this is no tar at all" * 100))
    assert "not a .tar archive" in faults_of(other)[0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_dialect_of_tar(tmp_path: Path, form: int) -> None:
    names = ["a.txt", "d" * 60 + "/" + "n" * 80 + ".txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["e" * 150 + "/" + "n" * 150 + ".txt", "ünïcode/文.txt"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "x"}) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            archive.addfile(info, io.BytesIO(name.encode()))
    rows = rows_of(tmp_path / "a.tar")
    assert shown(rows) == names
    assert [row.where for row in rows] == [f"{tmp_path / 'a.tar'}/{name}" for name in names]


def test_huge_sizes_of_gnu_and_pax_are_read(tmp_path: Path) -> None:
    size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.jsonl")
        info.size = size
        members = iter(TarStream(io.BytesIO(info.tobuf(form)), "x"))
        assert next(members).size == size


def test_a_damaged_header_ends_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"a", "b.txt": b"b"})
    content = bytearray(path.read_bytes())
    content[1024] ^= 1
    path.write_bytes(bytes(content))
    assert texts_of(path) == ["a", "<end>"] and "header is damaged" in faults_of(path)[0]


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = {"a.txt": b"0" * (20 << 20)}
    with pytest.raises(DataError, match="more than 500 times as much"):
        list_parts(TextSource(str(write_zip(tmp_path / "a.zip", bomb))))
    found = rows_of(write_tar(tmp_path / "a.tar.gz", bomb))
    assert isinstance(found[-1], BadRow) and "more than 500 times as much" in str(found[-1].fault)
    monkeypatch.setattr(streams, "EXPANSION_FROM_BYTES", 1000)
    monkeypatch.setattr(zips, "EXPANSION_FROM_BYTES", 1000)
    lying = write_zip(tmp_path / "b.zip", {"a.txt": b"0" * 5000, "b.txt": b"b"})
    content = bytearray(lying.read_bytes())
    for place in (content.index(b"PK\1\2") + 24, 22):
        content[place : place + 4] = (100).to_bytes(4, "little")
    lying.write_bytes(bytes(content))
    assert texts_of(lying) == ["<bad>", "b"]
    monkeypatch.setattr(zips, "MEMBERS", 1)
    with pytest.raises(DataError, match="2 members, more than 1"):
        list_parts(TextSource(str(write_zip(tmp_path / "c.zip", {"a.txt": b"a", "b.txt": b"b"}))))


def test_an_archive_without_readable_members_is_told(tmp_path: Path) -> None:
    for suffix in ("zip", "tar"):
        path = write_archive(tmp_path / f"a.{suffix}", {"a.png": b"x"})
        with pytest.raises(DataError, match=r"no readable file \(1 of other kinds\)"):
            list_parts(TextSource(str(path)))
    for suffix in ("tar.gz", "zip"):
        (tmp_path / suffix).mkdir()
        write_archive(tmp_path / suffix / f"train.{suffix}", {"a.png": b"x"})
        assert "no readable member (1 of other kinds)" in faults_of(tmp_path / suffix)[0]


def test_members_of_other_kinds_are_counted(tmp_path: Path) -> None:
    for suffix in ("zip", "tar"):
        path = write_archive(tmp_path / f"a.{suffix}", {"a.png": b"x", "b.txt": b"x", "c": b""})
        assert list_parts(TextSource(str(path))).skipped == 2


def test_what_is_known_of_a_zip_of_text_files(tmp_path: Path) -> None:
    def part_of(path: Path, text_rows: TextRows = "document") -> tuple[bool, int | None]:
        source = TextSource(str(path), text_rows=text_rows)
        (part,) = list_parts(source).parts
        return part.random_access, known_rows(part, source)

    assert part_of(write_zip(tmp_path / "a.zip", {"a.txt": b"1", "b.md": b"2", "c.png": b""})) == (True, 2)
    assert part_of(write_zip(tmp_path / "b.zip", {"a.txt": b"1", "b.jsonl": b"{}"})) == (False, None)
    long = b"x" * (text_files.PIECE_BYTES + 1)
    assert part_of(write_zip(tmp_path / "c.zip", {"a.txt": long}, zipfile.ZIP_STORED)) == (False, 1)
    assert part_of(tmp_path / "c.zip", "mebibyte") == (False, None) == part_of(tmp_path / "a.zip", "line")
    assert part_of(tmp_path / "a.zip", "mebibyte") == (True, 2)
    assert part_of(write_tar(tmp_path / "a.tar", {"a.txt": b"1"})) == (False, None)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_a_large_member_is_not_held_in_memory(tmp_path: Path, suffix: str) -> None:
    def peak(rows: int) -> int:
        member = b"".join(b'{"text": "%d"}\n' % (number**80) for number in range(rows))
        path = write_archive(tmp_path / f"a.{suffix}", {"a.jsonl": member})
        del member
        tracemalloc.start()
        assert sum(1 for _ in lazily(path)) == rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    small, large = peak(2_000), peak(12_000)
    assert large < small + (1 << 20), (small, large)


def lazily(path: Path) -> Iterator[Row]:
    source = TextSource(str(path))
    for part in list_parts(source).parts:
        yield from read_part(part, source)


@pytest.mark.parametrize("comment", [b"", b"a comment"])
@pytest.mark.parametrize("large", [False, True])
def test_a_zip_cut_behind_an_archive_inside_it_is_refused(
    tmp_path: Path, comment: bytes, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    inner = write_zip(tmp_path / "inner.zip", {"inner.txt": b"inside"})
    with zipfile.ZipFile(inner, "a") as archive:
        archive.comment = comment
    path = write_zip(tmp_path / "a.zip", {"b.txt": b"1", "in.zip": inner.read_bytes(), "c.txt": b"2" * 9}, 0)
    whole = path.read_bytes()
    assert (b"PK\6\6" in whole) == large
    ends = whole.index(inner.read_bytes()) + inner.stat().st_size
    for stub in (b"", b"#!/bin/sh\n"):
        # Cut just behind the inner archive, and so that its end is followed by zeros.
        for cut in (whole[:ends], whole[:ends] + bytes(40)):
            write(path, stub + cut)
            with pytest.raises(DataError, match=r"directory cannot be read: it begins \d+ bytes after"):
                list_parts(TextSource(str(path)))


def test_a_zip_whose_comment_is_a_zip_is_not_read_as_that(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner.zip", {"inner.txt": b"inside"}).read_bytes()
    path = write_zip(tmp_path / "a.zip", {"b.txt": b"outside"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = inner
    with pytest.raises(DataError, match="directory cannot be read: it begins"):
        list_parts(TextSource(str(path)))

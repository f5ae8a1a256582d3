"""Every format, plain and compressed: what its rows are, and what a bad one costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrm_ray.data.file_kinds import FileKind, kind_of, stem_of
from hrm_ray.data.formats import texts as text_files
from hrm_ray.data.formats import values as json_values
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import BadRow, Document
from tests.support.corpora import COMPRESSIONS, FORMATS, arrow_bytes, faults_of, rows_of, shown, texts_of, write

TEXTS = ["one", "", 'zwei\nLinien, mit "Zeichen"', "drei\tvier 🙂", "x" * 3000, "six", "seven"]


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_in_every_compression(tmp_path: Path, form: str, compression: str) -> None:
    content = FORMATS[form](TEXTS)
    name = f"a.{form}.{compression}" if compression else f"a.{form}"
    path = write(tmp_path / name, COMPRESSIONS[compression](content) if compression else content)
    rows = rows_of(path)
    assert shown(rows) == TEXTS
    assert [row.row for row in rows] == list(range(len(TEXTS)))
    (part,) = list_parts(TextSource(str(path))).parts
    assert (part.name, part.address, part.bytes) == (name, str(path), path.stat().st_size)
    assert part.random_access == (not compression and form != "json")


@pytest.mark.parametrize("suffix", ["txt", "md", "TXT", "txt.gz", "md.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    raw = b"\xef\xbb\xbfone\r\ntwo\n"
    path = write(tmp_path / f"a.{suffix}", COMPRESSIONS[suffix[-3:].strip(".")](raw) if "." in suffix else raw)
    assert texts_of(path) == ["one\r\ntwo\n"]


def test_names_and_kinds() -> None:
    assert kind_of("a/b.JSONL.GZ") == FileKind("jsonl", "gzip") and kind_of("x.tgz") == FileKind("tar", "gzip")
    assert kind_of("x.tar.zst") == FileKind("tar", "zstd")
    assert [kind_of(name) for name in ("a.gz", "txt", "a.docx", "a.zip.gz", "a.txt.gz.gz", "")] == [None] * 6
    stems = {"a/b.v2.jsonl.gz": "b.v2", "c.tgz": "c", "c.tar.xz": "c", "d": "d", "e.docx": "e", "f.txt": "f"}
    assert {name: stem_of(name) for name in stems} == stems


def test_a_long_text_file_is_one_document_in_pieces_cut_after_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", 10)
    text = "\ufeffab\ncdefg\nhijklmnopqrstuvwx" + "äöü" * 5 + "\n"
    assert texts_of(write(tmp_path / "a.txt", text)) == [
        *("ab\n", "cdefg\n", "hijklmnopq", "rstuvwxä", "öüäöü", "äöüäö", "üäöü\n"),
    ]
    assert texts_of(write(tmp_path / "b.txt", "0123456789")) == ["0123456789"]
    assert texts_of(write(tmp_path / "c.txt", "012345678\n0")) == ["012345678\n", "0"]
    rows = rows_of(tmp_path / "a.txt")
    assert [(row.row, row.piece, row.continues) for row in rows] == [(0, piece, piece < 6) for piece in range(7)]


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (fault,) = faults_of(write(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xe9"))
    assert "byte 6 (0xe9)" in fault and "Convert" in fault


def test_json_may_be_one_object_or_objects_in_a_row(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.json", '\ufeff {"text": "a"} ')) == ["a"]
    assert texts_of(write(tmp_path / "b.json", '{"text": "a"}\n{"text": "b"}')) == ["a", "b"]
    assert texts_of(write(tmp_path / "c.json", "[ ]")) == [] == texts_of(write(tmp_path / "d.json", "\n"))


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        ('[{"text": "a"}, 3, [4], {"text": "b"}]', ["a", "<bad>", "<bad>", "b"], "a number, not an object"),
        ('[{"text": "a"}, {"body": "b"}, {"text": "c"}]', ["a", "<bad>", "c"], "it has: body"),
        ('[{"text": "a"},\n {"text": "b"', ["a", "<end>"], "a.json:2"),
        ('[{"text": "a"}', ["a", "<end>"], "does not end"),
        ('[{"text": "a"} {"text": "b"}]', ["a", "<end>"], "no comma"),
        ('[{"text": "a"}] 5', ["a", "<end>"], "follows the end"),
        ('[{"text": "a"},]', ["a", "<end>"], "not JSON"),
        ('[{"text": "a"}, {"text": nope}, {"text": "c"}]', ["a", "<end>"], "not JSON"),
        (b'[{"text": "a"}, {"text": "\xe9"}]', ["a", "<end>"], "byte 26 (0xe9)"),
        ("[" * 100_000, ["<end>"], "not JSON"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", ["<end>"], "not JSON"),
    ],
)
@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
def test_what_a_bad_json_file_costs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | bytes,
    expected: list[str],
    said: str,
    read_bytes: int,
) -> None:
    monkeypatch.setattr(json_values, "_READ_BYTES", read_bytes)
    path = write(tmp_path / "a.json", content)
    assert texts_of(path) == expected
    assert said in "\n".join(faults_of(path))


@pytest.mark.parametrize("read_bytes", [1, 5, 64])
def test_json_is_read_alike_in_any_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    path = write(tmp_path / "a.json", FORMATS["json"](TEXTS))
    whole = rows_of(path)
    monkeypatch.setattr(json_values, "_READ_BYTES", read_bytes)
    assert rows_of(path) == whole
    assert [row.where.rpartition(":")[2] for row in whole][:3] == ["2", "5", "8"]


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        ("text,n\na,1\nb\nc,3\n", ["a", "<bad>", "c"], "a.csv:3: this record has 1 fields, the header names 2"),
        ("text,n\na,1,2\nc,3\n", ["<bad>", "c"], "a.csv:2"),
        ('text\n"a" b\nc\n', ["<bad>", "c"], "separated by `,`"),
        ('text\n"a\nb"\n"c\n', ["a\nb", "<bad>"], "a.csv:4"),
        (b"text,n\na,1\n\xe9,2\nc,\xe9\nd,4\n", ["a", "<bad>", "<bad>", "d"], "byte 11 (0xe9)"),
        ("a,b\n1,2\n3,4\n", ["<end>"], "the file has no such column; it has: a, b"),
        ("text,text\n1,2\n", ["<end>"], "2 columns of this name"),
        ("\n\ntext\n\na\n", ["a"], ""),
        ("text\n", [], ""),
        ("", [], ""),
    ],
)
def test_what_a_bad_csv_record_costs(tmp_path: Path, content: str | bytes, expected: list[str], said: str) -> None:
    path = write(tmp_path / "a.csv", content)
    assert texts_of(path) == expected
    assert said in "\n".join(faults_of(path))


def test_bad_lines_of_jsonl_cost_a_row_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": 1}\nnope\n{"text": "\xe9"}\n{"text": "b"}')
    rows = rows_of(path)
    assert shown(rows) == ["a", "<bad>", "<bad>", "<bad>", "b"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "3", "4", "5", "6"]


def test_a_row_that_is_too_long_is_refused_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "separated", "values"):
        monkeypatch.setattr(f"hrm_ray.data.formats.{module}.ROW_BYTES", 100)
    long = "y" * 1000
    lines = write(tmp_path / "a.jsonl", json.dumps({"text": long}) + '\n{"text": "b"}\n')
    assert texts_of(lines) == ["<bad>", "b"] and "longer than" in faults_of(lines)[0]
    monkeypatch.setattr(json_values, "_READ_BYTES", 32)
    assert texts_of(write(tmp_path / "b.json", json.dumps([{"text": "a"}, {"text": long}]))) == ["a", "<end>"]
    assert texts_of(write(tmp_path / "c.csv", f"text\na\n{long}\nb\n")) == ["a", "<end>"]


def test_columns_of_tables_that_are_no_text(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", None, "c"]), "n": [1, 2, 3], "b": [b"x", b"y", b"z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["a", "<bad>", "c"]
    assert "null, not a string" in faults_of(tmp_path / "a.parquet")[0]
    assert "a number" in faults_of(tmp_path / "a.parquet", text_column="n")[2]
    assert "binary" in faults_of(tmp_path / "a.parquet", text_column="b")[0]
    (missing,) = faults_of(tmp_path / "a.parquet", text_column="body")
    assert "the file has no such column; it has: b, n, text" in missing


def test_a_value_of_a_table_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    data = b"abcaf\xe9z"
    wrong = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 2, 6, 7], pa.int32()).buffers()[1], pa.py_buffer(data)]
    )
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["ab", "<bad>", "z"]
    assert "byte 3 (0xe9) is not UTF-8" in faults_of(tmp_path / "a.parquet")[0]


def test_dictionaries_and_large_strings_are_text(tmp_path: Path) -> None:
    column = pa.array(["a", "b", "a"])
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int8(), pa.string()))):
        pq.write_table(pa.table({"text": column.cast(kind)}), tmp_path / f"{number}.parquet")
    assert texts_of(tmp_path) == ["a", "b", "a"] * 2


def test_arrow_streams_are_read_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", arrow_bytes(TEXTS, stream=True))
    assert texts_of(path) == TEXTS
    (part,) = list_parts(TextSource(str(path))).parts
    assert not part.random_access
    packed = write(tmp_path / "b.arrow.gz", COMPRESSIONS["gz"](path.read_bytes()))
    assert texts_of(packed) == TEXTS


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_cut_short_or_of_another_format_is_one_bad_row(tmp_path: Path, form: str) -> None:
    content = FORMATS[form](TEXTS)
    for number, bad in enumerate((content[:-20], b"{}" * 50, b"", content[:3])):
        path = write(tmp_path / f"{number}.{form}", bad)
        assert texts_of(path) == ["<end>"], number
        assert path.name in faults_of(path)[0]


def test_damage_in_the_middle_of_a_table_keeps_the_rows_before(tmp_path: Path) -> None:
    content = bytearray(arrow_bytes(["a" * 400] * 40, stream=True, rows_of_a_batch=10))
    middle = len(content) // 2
    path = write(tmp_path / "a.arrow", bytes(content[:middle]))
    rows = rows_of(path)
    assert shown(rows)[-1] == "<end>" and 10 <= len(rows) - 1 < 40


def test_pairs(tmp_path: Path) -> None:
    pair = {"prompt_column": "q", "response_column": "a"}
    path = write(tmp_path / "a.csv", "q,a\n1+1=,2\n")
    assert rows_of(path, **pair) == [Document("1+1=2", f"{path}:2", 0, path.stat().st_size, "1+1=", "2")]
    assert texts_of(write(tmp_path / "b.tsv", "q\tb\nx\ty\n"), **pair) == ["<end>"]
    (row,) = rows_of(write(tmp_path / "c.txt", "x"), **pair)
    assert isinstance(row, BadRow) and row.ends_part and "no column `q`" in str(row.fault)


def test_rows_that_are_known_without_reading(tmp_path: Path) -> None:
    def known(path: Path, **columns: Any) -> int | None:
        source = TextSource(str(path), **columns)
        (part,) = list_parts(source).parts
        return known_rows(part, source)

    assert known(write(tmp_path / "a.txt", "x")) == 1 == known(write(tmp_path / "e.md", ""))
    parquet = write(tmp_path / "a.parquet", FORMATS["parquet"](TEXTS))
    assert known(parquet) == len(TEXTS) and known(parquet, text_column="no") is None
    assert known(write(tmp_path / "b.parquet", b"x")) is None
    for form in ("jsonl", "csv", "json", "arrow"):
        assert known(write(tmp_path / f"a.{form}", FORMATS[form](TEXTS))) is None
    long = write(tmp_path / "b.txt", "x" * (text_files.PIECE_BYTES + 1))
    assert known(long) == 1 and known(long, text_rows="mebibyte") is None
    assert known(tmp_path / "a.txt", text_rows="line") is None


def test_mixed_columns_across_files_are_told_where_they_begin(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\na\n")
    write(tmp_path / "b.parquet", FORMATS["parquet"](["b"]))
    write(tmp_path / "c.jsonl", '{"body": "c"}\n')
    assert texts_of(tmp_path) == ["a", "b", "<end>"]
    assert "c.jsonl:1, column `text`: the row has no such column; it has: body" in faults_of(tmp_path)[0]


def test_a_part_reads_the_same_twice(tmp_path: Path) -> None:
    source = TextSource(str(write(tmp_path / "a.jsonl", FORMATS["jsonl"](TEXTS))))
    (part,) = list_parts(source).parts
    assert list(read_part(part, source)) == list(read_part(part, source))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_delimiter_is_found_from_the_header(tmp_path: Path, suffix: str, delimiter: str) -> None:
    content = FORMATS["csv"](TEXTS).decode().replace("n,text", f"n{delimiter}text")
    content = "".join(line[0] + delimiter + line[2:] if line[1:2] == "," else line for line in content.splitlines(True))
    path = write(tmp_path / f"a.{suffix}", content)
    rows = rows_of(path)
    assert shown(rows) == TEXTS
    own = {"csv": ",", "tsv": "\t"}[suffix]
    assert isinstance(rows[0], Document) and bool(rows[0].remark) == (delimiter != own)
    source = TextSource(str(path))
    (part,) = list_parts(source).parts
    assert shown(list(read_part(part, source, 3, rows[2].mark))) == TEXTS[3:]
    assert texts_of(path, delimiter=delimiter) == TEXTS
    assert texts_of(path, delimiter="~") == ["<end>"]


def test_a_wrong_delimiter_is_named_where_a_column_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id;words\n1;x\n")
    assert (
        "it has: id, words (separated by `;`). Name another with --text-column, or the delimiter" in faults_of(path)[0]
    )
    assert "it has: id;words (separated by `,`)" in faults_of(path, delimiter=",")[0]
    assert texts_of(path, text_column="words") == ["x"]
    # Quotes before a delimiter that is not the suffix's own are no fault of the header.
    assert texts_of(write(tmp_path / "b.csv", '"id";"text"\n"1";"a;b"\n')) == ["a;b"]
    assert texts_of(write(tmp_path / "c.csv", "text\na;b\n")) == ["a;b"]
    assert texts_of(write(tmp_path / "d.csv", "id text\n1 x\n"), delimiter=" ") == ["x"]

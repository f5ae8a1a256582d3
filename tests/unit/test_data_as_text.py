"""Text in files of any name (--as-text), as HTML, and in other encodings."""

from __future__ import annotations

import encodings.aliases
import gzip
import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.file_kinds import FileKind, kind_of
from hrm_ray.data.formats import recode
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import Document
from hrm_ray.errors import DataError
from hrm_ray.settings.data import is_text_encoding
from tests.support.corpora import TAR_MODES, faults_of, rows_of, texts_of, write, write_tar, write_zip
from tests.support.runs import TINY, hrm, records, refused, stopping_at, train

PATTERNS = "*.py,*.rst,*.html,*.log"


def test_patterns_choose_files_by_name_also_compressed() -> None:
    text, packed = FileKind("txt", None), FileKind("txt", "gzip")
    assert kind_of("a/b/X.PY", PATTERNS) == text and kind_of("x.py.gz", PATTERNS) == packed
    assert kind_of("x.html", PATTERNS) == kind_of("x.XHTML", "*.xhtml") == FileKind("html", None)
    assert kind_of("x.py") is None and kind_of("x.c", PATTERNS) is None
    # A pattern with a suffix also takes data as text, one without a suffix does not; no pattern takes archives.
    assert kind_of("a.json", "*.json") == text and kind_of("a.json.gz", "*.json") == packed
    assert kind_of("a.json", "*") == FileKind("json", None) and kind_of("a.jsonl.gz", "*.gz") == FileKind(
        "jsonl", "gzip"
    )
    assert kind_of("a.zip", "*.zip") == FileKind("zip", None)
    assert kind_of("LICENSE", "*") == kind_of("LICENSE", "licen?e") == FileKind("txt", None, guessed=True)
    assert kind_of("ls.1.gz", "*.1") == packed


FILES = {
    "a.py": b"print('a')\n",
    "b.log.gz": gzip.compress(b"log b\n"),
    "c.html": b"<p>c &amp; d</p>",
    "sub/README": b"read me\n",
    "sub/raw": b"\x00\x01\x02",
    "t.txt": b"t",
}


@pytest.mark.parametrize("place", ["folder", "a.zip", *(f"a.{suffix}" for suffix in TAR_MODES)])
def test_files_of_any_name_are_read_in_folders_and_archives(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    if place == "folder":
        for name, content in FILES.items():
            write(path / name, content)
    else:
        (write_zip if place.endswith("zip") else write_tar)(path, FILES)
    expected = ["print('a')\n", "log b\n", "c & d\n"]
    assert texts_of(path, as_text=PATTERNS) == [*expected, "t"]
    everything = [text for text in texts_of(path, as_text=f"{PATTERNS},*") if not text.startswith("<")]
    assert sorted(everything) == sorted([*expected, "read me\n", "t"])
    rows = rows_of(path, as_text=f"{PATTERNS},*")
    (passed,) = [row for row in rows if not isinstance(row, Document)]
    assert passed.passed_over and "does not look like text" in passed.fault.reason
    assert texts_of(path) == ["t"]


def test_a_file_named_itself(tmp_path: Path) -> None:
    script, licence, picture = (write(tmp_path / name, b"words") for name in ("a.py", "LICENSE", "p.png"))
    write(picture, b"\x89PNG\r\n\x00\x00")
    with pytest.raises(DataError, match=r'suffix `\.py` cannot be read unless --as-text.*, or --as-text "\*\.py"'):
        list_parts(TextSource(str(script)))
    with pytest.raises(DataError, match='without a suffix cannot be read unless --as-text.*, or --as-text "LICENSE"'):
        list_parts(TextSource(str(licence)))
    assert texts_of(script, as_text="*.py") == texts_of(licence, as_text="*") == ["words"]
    (row,) = rows_of(picture, as_text="*")
    assert not isinstance(row, Document) and not row.passed_over
    refused(2, "train", "--dataset-file", script, "--as-text", "*.py,,", naming=("--as-text", "an empty pattern"))


def test_a_run_on_source_code_resumes(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "data" / f"m{number}.py", f"def f{number}(x):\n    return x + {number}\n" * 30)
    write(tmp_path / "data" / "notes.json", '{"a": 1}')
    words = (*TINY, "--vocab-size", "300", "--max-seq-len", "16", "--as-text", "*.py", "--log-every", "1")
    train(tmp_path / "data", tmp_path / "b", *words, "--steps", "4")
    with stopping_at(2):
        hrm("train", "--dataset-file", tmp_path / "data", "--bundle-dir", tmp_path / "c", *words, "--steps", "4")
    assert hrm("train", "--bundle-dir", tmp_path / "c", "--resume").code == 0
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("b", "c")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    message = refused(
        *(2, "train", "--bundle-dir", tmp_path / "c", "--resume", "--as-text", "*.rst,*.py"),
        naming=("--as-text", "*.py"),
    )
    assert "--as-text" in message


HTML = """<!DOCTYPE html><html><head><title>A &lt;title&gt;</title><style>p {color: red}</style>
<script>if (a < b) { document.write("<p>no</p>"); }</script></head>
<body><h1>Head   line</h1><p>One&nbsp;para, <b>bo</b>ld
over lines.<p>Two<br>lines<ul><li>x<li>y</ul><![if IE]><!-- hidden --><table><tr><td>1<td>2</table>
<pre>  kept
   as is</pre>caf&eacute; &#x1F600;</body></html>"""
TEXT = (
    "A <title>\n\nHead line\n\nOne\xa0para, bold over lines.\n\nTwo\nlines\n\nx\ny\n\n1\t2\n\n  kept\n   as is\n\n"
    "café \U0001f600\n"
)


@pytest.mark.parametrize("step", [1, 3, 64, 1 << 16])
def test_html_is_read_as_its_text(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recode, "_STEP_BYTES", step)
    assert texts_of(write(tmp_path / "a.html", HTML), as_text="*.html") == [TEXT]
    latin = HTML.replace("<title>", '<meta charset="latin-1"><title>', 1).replace("&eacute;", "é").encode("latin-1")
    assert texts_of(write(tmp_path / "b.htm", latin), as_text="*.htm") == [TEXT]


@pytest.mark.parametrize("charset", ["hex", "undefined", "rot13", "zlib", "no-such"])
def test_html_that_names_no_encoding_of_text_is_utf8(tmp_path: Path, charset: str) -> None:
    write(tmp_path / "a.html", f'<meta charset="{charset}"><p>caf\xe9')
    assert texts_of(tmp_path, as_text="*.html") == ["caf\xe9\n"]


@pytest.mark.parametrize("name", ["a.html", "LICENSE"])
def test_bytes_in_a_wrong_encoding_are_bad_rows(tmp_path: Path, name: str) -> None:
    """In each encoding that Python knows: some raise errors that do not say which byte is wrong."""
    known = sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "utf_8_sig"})
    for encoding, turn in itertools.product(known, (1, -1)):
        content = f'<meta charset="{encoding}">xn--a.b-'.encode() + bytes(range(255, 0, -1))
        write(tmp_path / name, content[::turn])
        (row, *_) = rows_of(tmp_path, as_text=name, encoding=encoding if is_text_encoding(encoding) else None)
        assert isinstance(row, Document) or row.fault.reason


@given(html=st.text(alphabet="<>!-/[]&;#=\"' pabrtdscioe\n", max_size=200))
def test_html_of_any_kind_has_a_text(html: str) -> None:
    assert isinstance(recode._HtmlText().text_of(html), str)


@pytest.mark.parametrize(
    "piece", ["<![foo<p<!-- unclosed ", "<p ", "<a title='", "<!--", "<", "&", '<a b="', "<script>"]
)
def test_broken_html_takes_time_in_proportion_to_its_length(piece: str) -> None:
    began_s = time.process_time()
    recode._HtmlText().text_of(piece * (100_000 // len(piece)))
    # The standard library's parser takes minutes.
    assert time.process_time() - began_s < 5


LINES = ["Zeile äöü", "日本語", "", "end 🙂", "ж" * 30]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8"])
@pytest.mark.parametrize("form", ["txt", "csv", "jsonl", "json", "zip"])
def test_byte_order_marks_decide(tmp_path: Path, encoding: str, form: str) -> None:
    mark = "\ufeff" if encoding[-2:] in ("le", "be", "-8") else ""

    def encoded(text: str) -> bytes:
        return (mark + text).encode(encoding)

    rows = "".join(f'{{"text": "{line}"}}\n' for line in LINES)
    contents = {
        "txt": "\n".join(LINES),
        "csv": "n,text\n" + "".join(f'1,"{line}"\n' for line in LINES),
        "jsonl": rows,
        "json": f"[{','.join(rows.splitlines())}]",
    }
    if form == "zip":
        path = write_zip(tmp_path / "a.zip", {f"a.{name}": encoded(content) for name, content in contents.items()})
        expected = [*LINES, *LINES, *LINES, contents["txt"]]
    else:
        path = write(tmp_path / f"a.{form}", encoded(contents[form]))
        expected = [contents["txt"]] if form == "txt" else LINES
    rows_found = rows_of(path)
    assert [row.text for row in rows_found if isinstance(row, Document)] == expected
    first = rows_found[0]
    assert isinstance(first, Document)
    assert first.remark == ("" if encoding == "utf-8" else f"{encoding[:6].upper()} by its byte-order mark")
    assert texts_of(path, encoding="cp1252") == expected
    if form == "txt":
        assert texts_of(path, text_rows="line") == [line for line in LINES if line]


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "gb18030", "utf-16-le"])
def test_reading_from_any_row_gives_the_same_rows(tmp_path: Path, encoding: str) -> None:
    lines = {"cp1252": "äöü €", "utf-16-le": "äöü €"}.get(encoding, "日本語")
    text = "".join(f'{{"text": "{lines} {number}"}}\n' for number in range(30))
    path = write(
        tmp_path / "a.jsonl", ("\ufeff" if encoding == "utf-16-le" else "").encode(encoding) + text.encode(encoding)
    )
    source = TextSource(str(path), encoding=None if encoding == "utf-16-le" else encoding)
    (part,) = list_parts(source).parts
    whole = list(read_part(part, source))
    assert [row.text for row in whole if isinstance(row, Document)] == [f"{lines} {number}" for number in range(30)]
    for row in whole[:-1]:
        found = list(read_part(part, source, row.row + 1, row.mark))
        assert [each.row for each in found] == list(range(row.row + 1, 30)) and found[-1] == whole[-1]


@given(text=st.text(max_size=300), encoding=st.sampled_from(["utf-16", "utf-32", "utf-7", "gb18030", "utf-8-sig"]))
def test_any_text_comes_back_from_any_encoding(
    text: str, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = text.encode("utf-8", "ignore").decode("utf-8").removeprefix("\ufeff")
    path = write(tmp_path_factory.getbasetemp() / "any.txt", text.encode(encoding))
    assert texts_of(path, encoding=encoding) == [text]


def test_utf16_without_a_mark_that_is_valid_utf8_is_told(tmp_path: Path) -> None:
    (row,) = rows_of(write(tmp_path / "a.txt", "plain words\n".encode("utf-16-le")))
    assert isinstance(row, Document) and "--encoding utf-16-le" in row.remark
    assert texts_of(tmp_path / "a.txt", encoding="utf-16-le") == ["plain words\n"]


def test_bytes_that_are_not_in_the_encoding_end_the_file(tmp_path: Path) -> None:
    content = "".join(f'{{"text": "日本 {number}"}}\n' for number in range(5)).encode("shift_jis")
    path = write(tmp_path / "a.jsonl", content + b'{"text": "\xff\xff"}\n' + content)
    assert texts_of(path, encoding="shift_jis") == [*(f"日本 {number}" for number in range(5)), "<end>"]
    (fault,) = faults_of(path, encoding="shift_jis")
    assert f"byte {len(content) + 10} (0xff) is not SHIFT_JIS" in fault


@pytest.mark.parametrize(
    ("name", "known"), [("latin-1", True), ("UTF8", True), ("hex", False), ("rot13", False), ("no\0", False)]
)
def test_only_encodings_of_text_are_taken(tmp_path: Path, name: str, known: bool) -> None:
    path = write(
        tmp_path / "a.txt", "caf\xe9 " * 300 if known and name == "UTF8" else ("caf\xe9 " * 300).encode("latin-1")
    )
    ran = hrm("train", "--dataset-file", path, *TINY, "--encoding", name, "--dry-run")
    assert ran.code == (0 if known else 2)
    assert known or "is no encoding that Python knows" in ran.err


@pytest.mark.parametrize(
    ("text", "example"),
    [
        ("caf\xe9 au lait", "cp1252"),
        ("日本語のひらがな" * 5, "shift_jis"),
        ("中文" * 20, "gb18030"),
        ("編中文\n" * 20, "utf-16-le"),
        ("déjà vu, çà et là", "cp1252"),
    ],
)
def test_an_encoding_is_guessed_in_the_message(tmp_path: Path, text: str, example: str) -> None:
    path = write(tmp_path / "a.txt", text.encode(example))
    assert f"for example --encoding {example}" in faults_of(path)[0]
    assert texts_of(path, encoding=example) == [text]


def test_options_that_no_file_needs_are_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "words " * 300)
    ran = hrm("train", "--dataset-file", path, *TINY, "--as-text", "*.py", "--delimiter", ";", "--dry-run")
    assert ran.code == 0, ran.err
    said = ran.out + ran.err
    assert "--as-text *.py (no file is read only because of it)" in said
    assert "--delimiter semicolon (no file is a .csv or .tsv)" in said

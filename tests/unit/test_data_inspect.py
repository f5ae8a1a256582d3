"""`hrm-ray data inspect`: what it counts, what it estimates and says so, and what it refuses."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.data import timer
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.inspection.figures import Figure, Lengths, Spread
from hrm_ray.data.inspection.puzzles import inspect_puzzles
from hrm_ray.data.inspection.text import TextFacts, inspect_text
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.timer import Timer
from tests.support.clocks import Ticking
from tests.support.corpora import COMPRESSIONS, FORMATS, parquet_bytes, write, write_tar, write_zip
from tests.support.runs import Ran, hrm, puzzle_file, refused

TEXTS = ["one", "two äö", "", "three\n\x1b[31mred", "f" * 300]


def inspected(*words: object) -> dict[str, Any]:
    """The JSON of a command that ends in order."""
    ran = hrm("data", "inspect", *words, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def shown(*words: object) -> Ran:
    ran = hrm("data", "inspect", *words)
    assert ran.code == 0, ran.err
    return ran


def line_of(ran: Ran, name: str) -> str:
    (line,) = [line for line in ran.out.splitlines() if line.startswith(f"  {name} ")]
    return line.removeprefix(f"  {name}").strip()


def facts_of(path: Path, rows: int, *, chunk_size: int = 100, block: int = 1000, **cut: Any) -> TextFacts:
    """What is found when the time is up after about so many rows: the clock goes on with each time it is read."""
    source = TextSource(str(path))
    found = list_parts(source)
    corpus = Corpus(source, found.parts, block, chunk_size, on_bad_row="skip", **cut)
    return inspect_text(corpus, found, Timer(rows / 0.8, Ticking()))


@pytest.mark.parametrize("form", [*FORMATS, "jsonl.gz", "csv.zst", "parquet.xz"])
def test_every_format_is_counted_exactly(tmp_path: Path, form: str) -> None:
    base, _, compression = form.partition(".")
    content = FORMATS[base](TEXTS)
    file = write(tmp_path / f"a.{form}", COMPRESSIONS[compression](content) if compression else content)
    found = inspected(file, "--dataset-chunk-size", 2, "--samples-per-block", 3)
    sizes = [len(text.encode()) for text in TEXTS]
    assert found["task"] == "lm" and found["whole"] and found["share"] == 1
    assert found["rows"] == {"value": 5, "certainty": "exact"} and found["rows_read"] == 5
    assert found["text_bytes"] == {"value": sum(sizes), "certainty": "exact"}
    assert found["characters"]["value"] == sum(map(len, TEXTS))
    assert found["row_bytes"] == {"least": 0, "median": 8, "most": 300} and found["empty"] == 1
    assert found["longest"]["bytes"] == 300 and str(file) in found["longest"]["where"]
    # Blocks of 3 and 2 rows, of 2 + 1 and 2.
    assert (found["blocks"]["value"], found["chunks"]["value"]) == (2, 3)
    assert [sample["text"] for sample in found["samples"]] == TEXTS[:3]
    assert found["random_access"] == (compression == "" and base != "json")
    kinds = {"gz": "gzip", "zst": "zstd", "xz": "xz"}
    assert found["kinds"] == {f"{base} in {kinds[compression]}" if compression else base: 1}
    columns = {column["name"]: column for column in found["table"]["columns"]}
    assert columns["text"] == {"name": "text", "types": ["string"], "filled": 4} and found["table"]["rows"] == 5
    assert len(columns) == (1 if base == "json" else 2)


def test_archives_and_folders(tmp_path: Path) -> None:
    members = {"train/a.txt": b"abc", "train/b.jsonl": b'{"text": "de"}\n', "test/c.txt": b"x", "notes.pdf": b"?"}
    for archive in (write_zip(tmp_path / "a.zip", members), write_tar(tmp_path / "a.tar", members)):
        found = inspected(archive)
        assert (found["parts"], found["skipped"], found["splits"]) == (1, 1, ["test", "train"])
        assert found["rows"]["value"] == 2 and found["text_bytes"]["value"] == 5
        assert inspected(archive, "--split", "test")["rows"]["value"] == 1
    assert inspected(write_tar(tmp_path / "a.tar.gz", members))["splits"] is None
    for name, content in members.items():
        write(tmp_path / "f" / name, content)
    found = inspected(tmp_path / "f")
    assert (found["parts"], found["skipped"], found["kinds"]) == (2, 1, {"txt": 1, "jsonl": 1})
    assert inspected(tmp_path / "f" / "*" / "*.txt")["rows"]["value"] == 1
    whole = shown(tmp_path / "f" / "train", "--val-split", "a")
    assert line_of(whole, "splits") == "train (all of it); by name a, b"
    assert line_of(whole, "parts").startswith("1 (1 jsonl)")


def test_columns_of_rows_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x", "n": 1, "q": null}\n{"text": "y", "n": "many", "list": [1]}\n')
    write(tmp_path / "b.csv", "text,tag\nz,\n")
    columns = {column["name"]: column for column in inspected(tmp_path)["table"]["columns"]}
    assert {name: (column["types"], column["filled"]) for name, column in columns.items()} == {
        "text": (["string"], 3),
        "n": (["integer", "string"], 2),
        "q": ([], 0),
        "list": (["list"], 1),
        "tag": (["string"], 0),
    }
    assert "n     integer or string, 66.7 % filled" in shown(tmp_path).out


def test_bad_rows_are_told_and_do_not_fail(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "x"}\nnonsense\n{"text": 1}\n{"txt": "y"}\n{"text": null}\n')
    ran = shown(file)
    assert line_of(ran, "bad rows") == "4 of the 5 rows read"
    assert [line for line in ran.out.splitlines() if line.startswith("    a.jsonl")] == [
        "    a.jsonl:2: this line is not JSON (Expecting value: line 1 column 1 (char 0))",
        "    a.jsonl:3, column `text`: its value is a number, not a string",
        "    a.jsonl:4, column `text`: the row has no such column; it has: txt",
    ]
    assert ran.err == (
        "warning: 4 of 5 rows cannot be read; train ends at the first one, unless --on-bad-row skip is given.\n"
    )
    assert shown(file, "--on-bad-row", "skip").err == "warning: 4 of 5 rows cannot be read; train skips them.\n"
    found = inspected(file)
    assert found["bad"] == 4 and len(found["faults"]) == 3 and found["rows"]["value"] == 5
    refused(5, "data", "inspect", file, "--on-bad-row", "fail", naming=("a.jsonl:2", "JSON"))


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    content = gzip.compress(FORMATS["jsonl"]([f"{number} " + "abc" * number for number in range(400)]))
    ran = shown(write(tmp_path / "a.jsonl.gz", content[: len(content) // 2]))
    assert "the rest cannot be read" in ran.out and "1 of " in ran.err
    assert line_of(ran, "broken") == "1 part(s), with an unknown number of lost rows"


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    ran = shown(write(tmp_path / "a.parquet", parquet_bytes(TEXTS)), "--text-column", "body")
    assert "`body`: the file has no such column; it has: n, text" in ran.out
    assert "contains no text" in ran.err and "n     integer, 100 % filled" in ran.out


def test_what_options_leave_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", FORMATS["jsonl"]([*TEXTS, *TEXTS]))
    found = inspected(file, "--dataset-start-offset", 1, "--max-train-examples", 6, "--ascii-only")
    assert found["rows"] == {"value": 6, "certainty": "exact"} and found["left_out"] == 2
    assert found["text_bytes"]["value"] == len(TEXTS[3]) + 300 + 3 and found["empty"] == 1
    said = line_of(shown(file, "--dataset-start-offset", 1, "--max-train-examples", 6), "rows")
    assert said == "6 (the first 1 left out, 6 at most)"
    assert inspected(file, "--dataset-start-offset", 99)["rows"]["value"] == 0


def test_pairs(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"q": "1+1=", "a": "2", "text": "never"}\n')
    words = (file, "--prompt-column", "q", "--response-column", "a")
    found = inspected(*words)
    assert found["text_bytes"]["value"] == 5
    assert found["samples"] == [{"where": f"{file}:1", "text": "1+1=", "response": "2"}]
    assert line_of(shown(*words), "row").endswith("1+1=  ->  2")
    refused(2, "data", "inspect", file, "--prompt-column", "q", naming=("--response-column",))


def test_sample_rows_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    nasty = "a\x1b]0;x\x07\r\n\u202eb" + "c" * 500
    ran = shown(write(tmp_path / "a.txt", nasty))
    assert line_of(ran, "row").startswith("a.txt  a\\x1b]0;x\\x07\\r\\n\\u202ebccc") and ran.out.count("c...") == 1
    assert all(sign.isprintable() or sign == "\n" for sign in ran.out)
    assert len(inspected(tmp_path / "a.txt")["samples"][0]["text"]) <= 1000
    assert inspected(tmp_path / "a.txt", "--samples", 0)["samples"] == []


def test_tokens_are_counted_with_a_tokenizer_and_guessed_without(tmp_path: Path) -> None:
    train_bpe(iter(["a"]), 258, 1).save(tmp_path / "tok")
    file = write(tmp_path / "a.jsonl", FORMATS["jsonl"](TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    # A token a byte, a mark behind each document that has tokens.
    for option in ("--tokenizer-path", "--model"):
        counted = inspected(file, option, tmp_path / "tok")["tokens"]
        assert counted == {"count": {"value": size + 4, "certainty": "exact"}, "tokenised_rows": 5}
    guessed = inspected(file)["tokens"]
    assert guessed == {"count": {"value": round(size / 4) + 5, "certainty": "about"}, "tokenised_rows": 0}
    assert "estimated at 4 bytes per token" in line_of(shown(file), "tokens")
    refused(2, "data", "inspect", file, "--model", tmp_path / "none.json", naming=("none.json",))


def test_what_was_not_read_is_estimated_and_said_to_be(tmp_path: Path) -> None:
    row = '{"text": "' + "x" * 90 + '"}\n'
    found = facts_of(write(tmp_path / "a.jsonl", row * 20000), 2000)
    assert not found.whole and found.share is not None and 0.01 < found.share < 0.2
    assert 100 < found.rows_read < 3000
    assert found.rows.certainty == "about" and found.rows.value == pytest.approx(20000, rel=0.02)
    assert found.text_bytes.certainty == "about" and found.text_bytes.value == pytest.approx(1.8e6, rel=0.02)
    assert found.blocks.certainty == "about" and found.blocks.value in (20, 21)
    assert found.chunks.certainty == "about" and found.chunks.value == pytest.approx(200, rel=0.02)


def test_rows_that_a_description_tells_are_exact_although_they_were_not_read(tmp_path: Path) -> None:
    parquet = write(tmp_path / "a.parquet", parquet_bytes(["x" * 90] * 20000, 1000))
    texts = write_zip(tmp_path / "a.zip", {f"{number:04}.txt": b"abc" for number in range(300)})
    for path, rows, of_clock in ((parquet, 20000, 2000), (texts, 300, 200)):
        found = facts_of(path, of_clock)
        assert not found.whole and 0 < found.rows_read < rows
        assert found.rows == Figure(rows, "exact") and found.blocks == Figure(-(-rows // 1000), "exact")
        assert found.text_bytes.certainty == "about"


def test_a_small_part_of_a_compressed_file_tells_a_least_number_only(tmp_path: Path) -> None:
    content = ('{"text": "' + "x" * 90 + '"}\n').encode() * 20000
    found = facts_of(write(tmp_path / "a.jsonl.gz", gzip.compress(content)), 2000)
    assert found.share is None and found.rows == Figure(found.rows_read, "at least")
    assert {found.blocks.certainty, found.chunks.certainty, found.text_bytes.certainty} == {"at least"}


def test_a_cut_is_heeded_by_estimates(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "some text here"}\n' * 20000)
    found = facts_of(file, 2000, offset=100, max_rows=5000)
    assert found.rows.value == 5000 and not found.whole
    short = facts_of(file, 2000, offset=100, max_rows=50)
    assert short.rows == Figure(50) and short.whole and short.share == 1
    behind = facts_of(file, 2000, offset=15000)
    assert behind.rows_read == 0 and behind.rows.certainty == "about"
    assert behind.rows.value == pytest.approx(5000, rel=0.1)


def test_the_time_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "some text here"}\n' * 20000)
    real = Timer.__init__
    monkeypatch.setattr(timer.Timer, "__init__", lambda own, limit, clock=None: real(own, limit, Ticking()))
    ran = shown(file, "--timeout-s", 5000)
    assert "about" in line_of(ran, "read") and "--all" in line_of(ran, "read")
    assert line_of(ran, "rows").startswith("about ")
    nothing = shown(file, "--timeout-s", 1)
    assert "no row was read" in nothing.err or "1 rows" in line_of(nothing, "read")
    assert line_of(shown(file, "--all"), "rows") == "20,000"


def test_puzzles(tmp_path: Path) -> None:
    made = hrm("data", "build", "sudoku", "--out", tmp_path / "s", "--size", 4, "--train", 20, "--test", 5)
    assert made.code == 0, made.err
    found = inspected(tmp_path / "s", "--samples", 1, "--max-train-examples", 7)
    assert (found["task"], found["splits"], found["checked"]) == ("puzzle", ["test", "train"], 20)
    assert found["puzzles"] == {"value": 20, "certainty": "exact"} and found["used"]["value"] == 7
    assert (found["seq_len"], found["grid"], found["vocab_size"]["value"]) == (16, [4, 4], 6)
    (sample,) = found["samples"]
    assert len(sample["puzzle"]) == len(sample["solution"]) == 19 and "." not in sample["solution"]
    opened = sample["puzzle"].count(".")
    assert found["open_cells"]["least"] <= opened <= found["open_cells"]["most"]
    assert inspected(tmp_path / "s", "--split", "test")["puzzles"]["value"] == 5
    assert line_of(shown(tmp_path / "s"), "cells") == "16 (4 x 4)"
    noted = hrm("data", "inspect", tmp_path / "s", "--text-column", "x")
    assert noted.code == 0 and "--text-column x (it applies to text, and the data is puzzles)" in noted.err
    refused(5, "data", "inspect", tmp_path / "s", "--split", "dev", naming=("dev", "test, train"))


def test_plain_puzzle_files(tmp_path: Path) -> None:
    found = inspected(puzzle_file(tmp_path))
    assert (found["puzzles"]["value"], found["seq_len"], found["identifiers"]["value"]) == (14, 6, 3)
    rows = write(tmp_path / "p.jsonl", '{"inputs": [0, 1], "labels": [2, 1]}\n' * 3)
    found = inspected(rows)
    assert found["puzzles"]["value"] == 3 and found["open_cells"] == {"least": 1, "median": 1, "most": 1}
    assert found["samples"][0] == {"identifier": 0, "puzzle": "0 1", "solution": "2 1"}


def test_a_large_puzzle_set_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_WHOLE_TENSOR_BYTES", 10), ("_WHOLE_ROWS_BYTES", 10), ("_FIRST", 4)):
        monkeypatch.setattr(f"hrm_ray.data.inspection.puzzles.{name}", value)
    tensors = inspect_puzzles(TextSource(str(puzzle_file(tmp_path))), None)
    assert (tensors.puzzles, tensors.checked, tensors.vocab_size.certainty) == (Figure(14), 4, "at least")
    source = TextSource(str(write(tmp_path / "p.jsonl", '{"inputs": [0, 1], "labels": [2, 1]}\n' * 30)))
    rows = inspect_puzzles(source, list_parts(source))
    assert (rows.puzzles, rows.checked) == (Figure(30, "about"), 4)
    assert inspect_puzzles(source, list_parts(source), read_all=True).puzzles == Figure(30)
    assert hrm("data", "build", "sudoku", "--out", tmp_path / "s", "--size", 4, "--train", 20, "--test", 5).code == 0
    built = inspect_puzzles(TextSource(str(tmp_path / "s")), None)
    assert (built.puzzles, built.checked, built.vocab_size) == (Figure(20), 4, Figure(6))


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        ((), ("PATH", "--dataset-id")),
        (("none",), ("none", "no such file or folder")),
        (("a.txt", "b.txt"), ("b.txt", "belongs to no option")),
        (("a.txt", "--dataset-id", "org/name"), ("a.txt", "once")),
        (("a.txt", "--lr", "1"), ("--lr",)),
        (("a.txt", "--timeout-s", "soon"), ("--timeout-s soon",)),
        (("a.txt", "--timeout-s", "0"), ("--timeout-s 0",)),
        (("a.txt", "--samples", "-1"), ("--samples -1",)),
        (("a.txt", "--all", "--timeout-s", "1"), ("--all",)),
        (("a.txt", "--text-colum", "x"), ("--text-column",)),
        (("ftp://x/y",), ("ftp://",)),
    ],
)
def test_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], naming: tuple[str, ...]
) -> None:
    write(tmp_path / "a.txt", "text")
    monkeypatch.chdir(tmp_path)
    refused(2, "data", "inspect", *words, naming=naming)


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    refused(5, "data", "inspect", write(tmp_path / "a.pdf", "x"), naming=("a.pdf", ".pdf"))
    refused(5, "data", "inspect", write(tmp_path / "a.zip", "x"), naming=("a.zip",))
    (tmp_path / "empty").mkdir()
    refused(5, "data", "inspect", tmp_path / "empty", naming=("empty",))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.exe", "x")
    refused(5, "data", "inspect", tmp_path / "b.zip", naming=("b.zip", "1 of other kinds"))


def test_the_help_page() -> None:
    page = shown("--help").out
    for word in ("--timeout-s", "--all", "--json", "--text-column", "--model", "--on-bad-row", "--samples-per-block"):
        assert word in page
    assert "--packing" not in page and "--lr" not in page


def test_lengths_of_very_many_rows_stay_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.data.inspection.figures._KEPT", 64)
    lengths = Lengths()
    assert lengths.spread is None
    longest = [number for number in range(10000) if lengths.add(number * 7919 % 10000)]
    assert longest[0] == 0
    spread = lengths.spread
    assert spread is not None and (spread.least, spread.most) == (0, 9999)
    assert spread.median == pytest.approx(5000, abs=1000) and len(lengths._kept) <= 64
    few = Lengths()
    for number in (5, 3, 9):
        few.add(number)
    assert few.spread == Spread(3, 5, 9)

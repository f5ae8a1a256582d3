"""Chats: a column of messages as text, or as prompt and response."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.rows import Document
from tests.support.corpora import faults_of, rows_of, texts_of, write
from tests.support.runs import hrm, refused

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And höw?"},
    {"role": "assistant", "content": "So."},
]
SHAREGPT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "Two?"}]
WRITTEN = "System: Be brief.\n\nUser: Hello?\n\nAssistant: Hello.\n\nUser: And höw?\n\nAssistant: So."


def jsonl(path: Path, *chats: object) -> Path:
    return write(path, "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def test_chats_of_both_kinds_in_every_format(tmp_path: Path) -> None:
    expected = [WRITTEN, "User: One?\n\nAssistant: 1\n\nUser: Two?"]
    path = jsonl(tmp_path / "a.jsonl", OPENAI, SHAREGPT)
    assert texts_of(path, messages_column="messages") == expected
    write(tmp_path / "a.json", json.dumps([{"messages": OPENAI}, {"messages": SHAREGPT}]))
    assert texts_of(tmp_path / "a.json", messages_column="messages") == expected
    table = pa.table({"conversations": [OPENAI], "other": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.arrow", arrow_of(table))
    for form in ("parquet", "arrow"):
        assert texts_of(tmp_path / f"a.{form}", messages_column="conversations") == expected[:1]


def arrow_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def test_the_last_answer_is_the_response(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", OPENAI, SHAREGPT, [OPENAI[2]])
    rows = rows_of(path, messages_column="messages", messages_in_pairs=True)
    found = [(row.prompt, row.response, row.text) for row in rows if isinstance(row, Document)]
    assert found == [
        (WRITTEN.removesuffix(" So."), " So.", WRITTEN),
        ("User: One?\n\nAssistant:", " 1", "User: One?\n\nAssistant: 1"),
        ("Assistant:", " Hello.", "Assistant: Hello."),
    ]


def test_content_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = jsonl(tmp_path / "a.jsonl", [{"role": "user", "content": parts}])
    assert texts_of(path, messages_column="messages") == ["User: ab"]


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([{"role": "wizard", "content": "x"}], "message 1 has the unknown role `wizard`"),
        ([OPENAI[0], {"content": "x"}], "message 2 has no role"),
        ([{"role": "user"}], "message 1, of the user, has no text as its content"),
        ([{"role": "assistant", "content": None}], "has no text as its content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has no text as its content"),
        (["hello"], "message 1 is a string, not an object"),
        ([], "an empty list, not a list of messages"),
        ("hello", "its value is a string, not a list of messages"),
        (None, "its value is null, not a list of messages"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([{"role": ["user"], "content": "x"}], "message 1 has no role"),
    ],
)
def test_bad_chats_are_bad_rows(tmp_path: Path, chat: object, said: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", OPENAI, chat, SHAREGPT)
    assert texts_of(path, messages_column="messages")[1] == "<bad>"
    (fault,) = faults_of(path, messages_column="messages")
    assert said in fault and f"{path}:2, column `messages`" in fault and len(fault) < 300


def test_a_chat_without_an_answer_is_no_pair(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", OPENAI[:2])
    (fault,) = faults_of(path, messages_column="messages", messages_in_pairs=True)
    assert "no message is of the assistant" in fault


def test_a_missing_text_column_names_the_column_of_messages(tmp_path: Path) -> None:
    (fault,) = faults_of(jsonl(tmp_path / "a.jsonl", OPENAI))
    assert "give --messages-column messages for chats" in fault


def test_a_run_on_chats(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[OPENAI, SHAREGPT] * 12)
    words = ("train", "--dataset-file", path, "--messages-column", "messages", "--bundle-dir", tmp_path / "b")
    refused(2, *words, "--text-column", "x", naming=("--messages-column messages", "--text-column x"))
    tiny = (
        *("--hidden-size", "32", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--seq-len", "64"),
        *("--batch-size", "2", "--no-amp", "--no-gradient-checkpointing", "--no-moe", "--threads", "1"),
        *("--vocab-size", "300", "--device", "cpu", "--steps", "1"),
    )
    ran = hrm(*words, *tiny, "--lm-mask", "prefix")
    assert ran.code == 0, ran.err
    shown = hrm("data", "inspect", path, "--messages-column", "messages", "--lm-mask", "prefix", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["samples"][0]["response"]
    # No file is plain text.
    noted = hrm(*words, *tiny, "--text-rows", "line", "--bundle-dir", tmp_path / "c", "--dry-run")
    assert noted.code == 0 and "--text-rows line (no file is plain text)" in noted.out + noted.err


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", None])
def test_a_chat_template_that_is_not_used_is_noted(file: str | None, tmp_path: Path) -> None:
    train_bpe(["some text of a chat"], 300, 1).save(tmp_path / "t")
    if file == "tokenizer_config.json":
        config = json.loads((tmp_path / "t" / file).read_text(encoding="utf-8"))
        content = json.dumps({**config, "chat_template": "{{ messages }}"})
    else:
        content = "{{ messages }}"
    if file is not None:
        (tmp_path / "t" / file).write_text(content, encoding="utf-8")
    path = jsonl(tmp_path / "a.jsonl", *[OPENAI] * 12)
    words = ("train", "--dataset-file", path, "--messages-column", "messages", "--model", tmp_path / "t")
    ran = hrm(*words, "--bundle-dir", tmp_path / "b", "--seq-len", "16", "--device", "cpu", "--dry-run")
    assert ran.code == 0, ran.err
    assert ("not with the tokenizer's chat template" in ran.out + ran.err) == (file is not None)

"""Token stores and rows: no token lost, none counted twice, none predicted from another document."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.packing import TextSamples
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import StoreMeta, open_text_store, write_text_store
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataFault, SettingsError
from hrm_ray.values import IGNORE_LABEL, Columns

TOKENIZER = TextTokenizer.train(["abab abab ba"], 258, 10)  # no merges: a token is a byte, so lengths are known
EOT, PAD = TOKENIZER.end_of_text_id, TOKENIZER.pad_id


def plain(*texts: str) -> list[Document]:
    return [Document(text, "x", row) for row, text in enumerate(texts)]


def paired(*pairs: tuple[str, str]) -> list[Document]:
    return [Document(p + r, "x", row, prompt=p, response=r) for row, (p, r) in enumerate(pairs)]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


def samples_of(folder: Path, documents: list[Document], seq_len: int, packing: bool, prefix: bool) -> TextSamples:
    write_text_store(documents, TOKENIZER, folder, pairs=prefix)
    return TextSamples(folder, seq_len, packing, prefix, allow_short=True)


def every_row(samples: TextSamples) -> Columns:
    return samples.rows(np.arange(len(samples)))


def pieces(columns: Columns) -> Iterator[tuple[int, int, int]]:
    """(row, first, beyond) of each run of one document number."""
    for row, numbers in enumerate(columns["documents"].tolist()):
        at = 0
        for number, (_, run) in enumerate(itertools.groupby(numbers)):
            length = len(list(run))
            assert numbers[at] == number, "documents of a row are numbered from 0 in their order"
            yield row, at, at + length
            at += length


def check_rows(columns: Columns, seq_len: int) -> None:
    """What holds for any row, whatever the mode."""
    rows = len(columns["active"])
    for name in ("inputs", "labels", "label_bytes", "documents", "positions"):
        assert columns[name].shape == (rows, seq_len) and columns[name].dtype == np.int32, name
    assert columns["prompt"].shape == (rows, seq_len) and columns["prompt"].dtype == bool
    assert columns["active"].dtype == bool and columns["active"].all()
    labels, inputs = columns["labels"], columns["inputs"]
    assert (labels != IGNORE_LABEL).any(axis=1).all(), "a row without a label must not exist"
    assert (columns["label_bytes"][(labels == IGNORE_LABEL) | (labels == EOT)] == 0).all()
    for row, first, beyond in pieces(columns):
        assert columns["positions"][row, first:beyond].tolist() == list(range(beyond - first))
        for at in range(first, beyond - 1):
            assert labels[row, at] in (IGNORE_LABEL, inputs[row, at + 1]), "a label is the next input of its document"
        if (inputs[row, first:beyond] == PAD).all():
            assert (labels[row, first:beyond] == IGNORE_LABEL).all()
        else:
            assert not (inputs[row, first : beyond - 1] == EOT).any(), "after end-of-text comes another document"


WORDS = st.text(alphabet="ab é🙂", max_size=12)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=12), seq_len=st.integers(2, 20), packing=st.booleans())
def test_every_token_but_each_documents_first_is_a_label_once(texts: list[str], seq_len: int, packing: bool) -> None:
    if not any(texts):
        texts = [*texts, "a"]
    with TemporaryDirectory() as folder:
        samples = samples_of(Path(folder, "s"), plain(*texts), seq_len, packing, False)
        columns = every_row(samples)
        del samples  # its maps keep the files open, which Windows does not delete
    check_rows(columns, seq_len)
    labelled = columns["labels"] != IGNORE_LABEL
    expected = [token for text in texts if text for token in [*ids(text), EOT][1:]]
    assert columns["labels"][labelled].tolist() == expected
    first_bytes = sum(int(TOKENIZER.encode_documents([text])[0].bytes[0]) for text in texts if text)
    assert columns["label_bytes"].sum() == sum(len(text.encode()) for text in texts) - first_bytes
    assert not columns["prompt"].any()
    if packing:
        stream = [token for text in texts if text for token in [*ids(text), EOT]]
        flat = columns["inputs"].reshape(-1)[: len(stream)]
        assert flat.tolist() == stream[: len(flat)] and len(stream) - len(flat) in range(2)
        assert (columns["inputs"].reshape(-1)[len(stream) :] == PAD).all()
    else:
        assert len(labelled) == sum(-(-len(ids(text)) // seq_len) for text in texts if text)


PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=10).filter(lambda pairs: any(p + r for p, r in pairs))


@settings(max_examples=150, deadline=None)
@given(pairs=PAIRS, seq_len=st.integers(2, 20), packing=st.booleans())
def test_pairs_are_whole_and_labelled_on_the_response_only(
    pairs: list[tuple[str, str]], seq_len: int, packing: bool
) -> None:
    with TemporaryDirectory() as folder:
        samples = samples_of(Path(folder, "s"), paired(*pairs), seq_len, packing, True)
        columns, cut = every_row(samples), samples.cut_pairs
        del samples
    check_rows(columns, seq_len)
    real = [piece for piece in pieces(columns) if columns["inputs"][piece[0], piece[1]] != PAD]
    pairs = [pair for pair in pairs if pair[0] + pair[1]]
    assert len(real) == len(pairs), "a pair is one piece"
    expected_cuts = 0
    for (row, first, beyond), (prompt, response) in zip(real, pairs, strict=True):
        before, after = ids(prompt), [*ids(response), EOT]
        whole = len(before) + len(after) <= seq_len + 1
        expected_cuts += not whole
        marks = columns["prompt"][row, first:beyond]
        kept = int(marks.sum())
        assert marks[:kept].all(), "the prompt comes first"
        labels = columns["labels"][row, first:beyond]
        assert (labels[: max(kept - 1, 0)] == IGNORE_LABEL).all()
        tokens = [*columns["inputs"][row, first:beyond].tolist(), int(labels[-1])]
        assert tokens[:kept] == before[len(before) - kept :]
        assert tokens[kept:] == after[: len(tokens) - kept]
        assert labels[max(kept - 1, 0) :].tolist() == tokens[max(kept, 1) :]
        if whole:
            assert len(tokens) == len(before) + len(after)
        else:
            assert len(tokens) == seq_len + 1
            assert len(tokens) - kept >= min(len(after), (seq_len + 1) / 2)
            assert kept == len(before) or len(tokens) - kept <= max(len(after), 0)
    assert cut == expected_cuts
    lengths = [beyond - first for _, first, beyond in real]
    rows: list[int] = []
    for length in lengths:
        if packing and rows and rows[-1] + length <= seq_len:
            rows[-1] += length
        else:
            rows.append(length)
    assert len(rows) == len(columns["active"]), "a row takes the next pair as long as it fits"


def test_packed_rows_by_hand(tmp_path: Path) -> None:
    a, b = ids("abc"), ids("xy")
    columns = every_row(samples_of(tmp_path / "s", plain("abc", "", "xy"), 5, True, False))
    assert columns["inputs"].tolist() == [[*a, EOT, b[0]], [b[1], EOT, PAD, PAD, PAD]]
    none = IGNORE_LABEL
    assert columns["labels"].tolist() == [[a[1], a[2], EOT, none, b[1]], [EOT, none, none, none, none]]
    assert columns["label_bytes"].tolist() == [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert columns["documents"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert columns["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]


def test_unpacked_rows_by_hand(tmp_path: Path) -> None:
    a, b = ids("abcd"), ids("xy")
    columns = every_row(samples_of(tmp_path / "s", plain("abcd", "xy"), 3, False, False))
    none = IGNORE_LABEL
    assert columns["inputs"].tolist() == [a[:3], [a[3], EOT, PAD], [*b, EOT]]
    assert columns["labels"].tolist() == [a[1:], [EOT, none, none], [b[1], EOT, none]]
    assert columns["documents"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_a_row_with_nothing_but_the_last_end_of_text_does_not_exist(tmp_path: Path) -> None:
    for packing in (True, False):
        samples = samples_of(tmp_path / str(packing), plain("abcd"), 4, packing, False)
        assert len(samples) == 1 and every_row(samples)["labels"].tolist() == [[*ids("abcd")[1:], EOT]]


def test_pairs_that_fill_a_row_exactly_share_it(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "s", paired(("a", "b"), ("c", "de"), ("f", "")), 5, True, True)
    columns = every_row(samples)
    assert columns["inputs"].tolist() == [ids("abcde"), [*ids("f"), PAD, PAD, PAD, PAD]]
    assert columns["documents"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_a_long_prompt_gives_way_before_the_response(tmp_path: Path) -> None:
    columns = every_row(samples_of(tmp_path / "s", paired(("abcdefgh", "xy")), 5, True, True))
    assert columns["inputs"].tolist() == [[*ids("fgh"), *ids("xy")]]
    assert columns["labels"].tolist() == [[IGNORE_LABEL, IGNORE_LABEL, *ids("xy"), EOT]]
    assert columns["prompt"].tolist() == [[True, True, True, False, False]]


def test_a_long_response_is_cut_at_its_end_without_end_of_text(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "s", paired(("abcd", "stuvwxyz")), 5, True, True)
    columns = every_row(samples)
    assert columns["inputs"].tolist() == [[*ids("bcd"), *ids("st")]]
    assert columns["labels"].tolist() == [[IGNORE_LABEL, IGNORE_LABEL, *ids("stu")]]
    assert samples.cut_pairs == 1


@pytest.mark.parametrize(("packing", "prefix"), [(True, False), (False, False), (True, True), (False, True)])
def test_rows_come_in_any_order_and_padding_rows_weigh_nothing(tmp_path: Path, packing: bool, prefix: bool) -> None:
    documents = paired(*[("a" * (k % 5 + 1), "b" * (k % 7)) for k in range(40)])
    samples = samples_of(tmp_path / "s", documents, 6, packing, prefix)
    columns = every_row(samples)
    wanted = np.array([3, -1, 0, 3, len(samples) - 1])
    some = samples.rows(wanted)
    assert some["active"].tolist() == [True, False, True, True, True]
    for name, column in some.items():
        if name != "active":
            assert np.array_equal(column[[0, 2, 3, 4]], columns[name][wanted[[0, 2, 3, 4]]]), name
    assert (some["inputs"][1] == PAD).all() and (some["labels"][1] == IGNORE_LABEL).all()
    assert not some["label_bytes"][1].any() and not some["documents"][1].any() and not some["prompt"][1].any()
    assert some["positions"][1].tolist() == [0, 1, 2, 3, 4, 5]
    assert {name: column.shape for name, column in samples.rows(np.array([-1, -1])).items()}["inputs"] == (2, 6)
    for wrong in (-2, len(samples)):
        with pytest.raises(IndexError):
            samples.rows(np.array([wrong]))


def test_a_context_longer_than_the_data_is_refused(tmp_path: Path) -> None:
    write_text_store(plain("abc"), TOKENIZER, tmp_path / "s")
    assert len(TextSamples(tmp_path / "s", 4, True, False)) == 1
    with pytest.raises(SettingsError, match="max_seq_len 5: the data has only 4 tokens.*--max-seq-len 4 or less"):
        TextSamples(tmp_path / "s", 5, True, False)
    assert len(TextSamples(tmp_path / "s", 5, True, False, allow_short=True)) == 1
    with pytest.raises(SettingsError, match="2 tokens or more"):
        TextSamples(tmp_path / "s", 1, True, False)


def test_prefix_rows_need_pairs(tmp_path: Path) -> None:
    write_text_store(plain("abcdef"), TOKENIZER, tmp_path / "s")
    with pytest.raises(DataFault, match="--prompt-column"):
        TextSamples(tmp_path / "s", 4, True, True)


def test_the_store_counts_what_it_holds(tmp_path: Path) -> None:
    meta = write_text_store(plain("aé", "", "🙂"), TOKENIZER, tmp_path / "s")
    assert (meta.documents, meta.empty_documents, meta.tokens, meta.text_bytes) == (2, 1, 3 + 4 + 2, 7)
    store = open_text_store(tmp_path / "s")
    assert store.meta == meta and store.starts.tolist() == [0, 4, 9]
    assert store.token_bytes.sum() == 7 and store.tokens[[3, 8]].tolist() == [EOT, EOT]


def fingerprint(folder: Path, documents: list[Document], tokenizer: TextTokenizer, pairs: bool = False) -> str:
    meta: StoreMeta = write_text_store(documents, tokenizer, folder, pairs=pairs)
    return meta.fingerprint


def test_the_fingerprint_tells_content_borders_and_tokenizer(tmp_path: Path) -> None:
    base = fingerprint(tmp_path / "s", plain("ab", "c"), TOKENIZER)
    assert base == fingerprint(tmp_path / "s", plain("ab", "c"), TOKENIZER)
    others = [
        fingerprint(tmp_path / "s", plain("ab", "d"), TOKENIZER),
        fingerprint(tmp_path / "s", plain("a", "bc"), TOKENIZER),
        fingerprint(tmp_path / "s", plain("ab", "c"), TextTokenizer.train(["zzzz zzzz"], 259, 9)),
        fingerprint(tmp_path / "s", paired(("a", "b"), ("", "c")), TOKENIZER, pairs=True),
        fingerprint(tmp_path / "s", paired(("", "ab"), ("", "c")), TOKENIZER, pairs=True),
    ]
    assert len({base, *others}) == 6


def test_many_batches_are_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = paired(*[("p" * (k % 3), "r" * (k % 4)) for k in range(50)])
    whole = write_text_store(documents, TOKENIZER, tmp_path / "whole", pairs=True)
    monkeypatch.setattr("hrm_ray.data.text_store._BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("hrm_ray.data.text_store._BATCH_CHARACTERS", 7)
    parts = write_text_store(documents, TOKENIZER, tmp_path / "parts", pairs=True)
    assert (parts.documents, parts.tokens) == (whole.documents, whole.tokens)
    for name in ("tokens.bin", "bytes.bin", "starts.bin", "prompts.bin"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_failure_leaves_the_older_store_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.data.text_store._BATCH_CHARACTERS", 50)
    before = write_text_store(plain("abc"), TOKENIZER, tmp_path / "s")

    def interrupted() -> Iterator[Document]:
        yield from plain("x" * 100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_text_store(interrupted(), TOKENIZER, tmp_path / "s")
    assert open_text_store(tmp_path / "s").meta == before
    with pytest.raises(DataFault, match="token"):
        write_text_store(plain("", ""), TOKENIZER, tmp_path / "t")
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("damage", ["short", "missing", "format", "meta"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "s"
    write_text_store(plain("abc"), TOKENIZER, folder)
    meta = json.loads((folder / "meta.json").read_text())
    if damage == "short":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    elif damage == "missing":
        (folder / "starts.bin").unlink()
    elif damage == "format":
        (folder / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    else:
        (folder / "meta.json").write_text(json.dumps(meta)[:-5])
    with pytest.raises(DataFault, match="made again"):
        open_text_store(folder)

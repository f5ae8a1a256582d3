"""Token stores and rows: no token lost, none counted twice, none predicted from another document."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.packing import RowForm, TextSamples, merged_rows
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import TextStore, joined, load_store, save_store, tokenise
from hrm_ray.errors import DataError, SettingsError
from hrm_ray.types import IGNORE_LABEL, Columns

TOKENIZER = train_bpe(["abab abab ba"], 258, 10)  # no merges: a token is a byte, so lengths are known
EOT, PAD = TOKENIZER.end_of_text_id, TOKENIZER.pad_id


def plain(*texts: str) -> list[Document]:
    return [Document(text, "x", row) for row, text in enumerate(texts)]


def paired(*pairs: tuple[str, str]) -> list[Document]:
    return [Document(p + r, "x", row, prompt=p, response=r) for row, (p, r) in enumerate(pairs)]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


def samples_of(
    documents: list[Document], seq_len: int, packing: bool, prefix: bool, stride: int | None = None
) -> TextSamples:
    return TextSamples(tokenise(documents, TOKENIZER, prefix), RowForm(seq_len, packing, prefix, stride))


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
    columns = every_row(samples_of(plain(*texts), seq_len, packing, False))
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
    samples = samples_of(paired(*pairs), seq_len, packing, True)
    columns, cut = every_row(samples), samples.cut_pairs
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


def test_packed_rows_by_hand() -> None:
    a, b = ids("abc"), ids("xy")
    columns = every_row(samples_of(plain("abc", "", "xy"), 5, True, False))
    assert columns["inputs"].tolist() == [[*a, EOT, b[0]], [b[1], EOT, PAD, PAD, PAD]]
    none = IGNORE_LABEL
    assert columns["labels"].tolist() == [[a[1], a[2], EOT, none, b[1]], [EOT, none, none, none, none]]
    assert columns["label_bytes"].tolist() == [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert columns["documents"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert columns["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]


def test_unpacked_rows_by_hand() -> None:
    a, b = ids("abcd"), ids("xy")
    columns = every_row(samples_of(plain("abcd", "xy"), 3, False, False))
    none = IGNORE_LABEL
    assert columns["inputs"].tolist() == [a[:3], [a[3], EOT, PAD], [*b, EOT]]
    assert columns["labels"].tolist() == [a[1:], [EOT, none, none], [b[1], EOT, none]]
    assert columns["documents"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_a_row_with_nothing_but_the_last_end_of_text_does_not_exist() -> None:
    for packing in (True, False):
        samples = samples_of(plain("abcd"), 4, packing, False)
        assert len(samples) == 1 and every_row(samples)["labels"].tolist() == [[*ids("abcd")[1:], EOT]]


def test_pairs_that_fill_a_row_exactly_share_it() -> None:
    samples = samples_of(paired(("a", "b"), ("c", "de"), ("f", "")), 5, True, True)
    columns = every_row(samples)
    assert columns["inputs"].tolist() == [ids("abcde"), [*ids("f"), PAD, PAD, PAD, PAD]]
    assert columns["documents"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_a_long_prompt_gives_way_before_the_response() -> None:
    columns = every_row(samples_of(paired(("abcdefgh", "xy")), 5, True, True))
    assert columns["inputs"].tolist() == [[*ids("fgh"), *ids("xy")]]
    assert columns["labels"].tolist() == [[IGNORE_LABEL, IGNORE_LABEL, *ids("xy"), EOT]]
    assert columns["prompt"].tolist() == [[True, True, True, False, False]]


def test_a_long_response_is_cut_at_its_end_without_end_of_text() -> None:
    samples = samples_of(paired(("abcd", "stuvwxyz")), 5, True, True)
    columns = every_row(samples)
    assert columns["inputs"].tolist() == [[*ids("bcd"), *ids("st")]]
    assert columns["labels"].tolist() == [[IGNORE_LABEL, IGNORE_LABEL, *ids("stu")]]
    assert samples.cut_pairs == 1


@pytest.mark.parametrize(("packing", "prefix"), [(True, False), (False, False), (True, True), (False, True)])
def test_rows_come_in_any_order_and_padding_rows_weigh_nothing(packing: bool, prefix: bool) -> None:
    documents = paired(*[("a" * (k % 5 + 1), "b" * (k % 7)) for k in range(40)])
    samples = samples_of(documents, 6, packing, prefix)
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


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12),
    form=st.builds(RowForm, st.integers(2, 20), st.booleans(), st.booleans(), st.one_of(st.none(), st.integers(2, 6))),
    data=st.data(),
)
def test_rows_as_tokens_are_cut_and_joined_without_a_change(
    texts: list[tuple[str, str]], form: RowForm, data: st.DataObject
) -> None:
    """What a rank gets of rows that come from several stores in any order is what these rows are."""
    form = replace(form, stride=min(form.stride or form.seq_len, form.seq_len))
    half = len(texts) // 2
    stores = [
        TextSamples(tokenise(paired(*part), TOKENIZER, form.prefix), form) for part in (texts[:half], texts[half:])
    ]
    places = [(store, row) for store in (0, 1) for row in range(len(stores[store]))]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=12)) if places else []
    parts = []
    for number, store in enumerate(stores):
        at = np.array([place for place, (one, _) in enumerate(chosen) if one == number], dtype=np.int64)
        if len(at):
            parts.append((store.tokens(np.array([chosen[place][1] for place in at])), at))
    first, beyond = sorted((data.draw(st.integers(0, 14)), data.draw(st.integers(0, 14))))
    rows = merged_rows(parts).slice(first, beyond)
    count = rows.count + 2
    found = rows.columns(form.seq_len, PAD, np.arange(rows.count), count)
    for place, (store, row) in enumerate(chosen[first:beyond]):
        for name, values in stores[store].rows(np.array([row])).items():
            assert np.array_equal(found[name][place], values[0]), name
    assert found["active"].tolist() == [True] * len(chosen[first:beyond]) + [False] * 2


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=1, max_size=12),
    seq_len=st.integers(2, 20),
    stride=st.integers(2, 20),
    packing=st.booleans(),
)
def test_overlapping_windows_count_each_label_once(texts: list[str], seq_len: int, stride: int, packing: bool) -> None:
    """The labels are those of windows that do not overlap, and what a window repeats is what stood before."""
    stride = min(stride, seq_len)
    texts = texts if any(texts) else [*texts, "a"]
    columns = every_row(samples_of(plain(*texts), seq_len, packing, False, stride))
    check_rows(columns, seq_len)
    labelled = columns["labels"] != IGNORE_LABEL
    expected = [token for text in texts if text for token in [*ids(text), EOT][1:]]
    assert columns["labels"][labelled].tolist() == expected
    for row in range(1, len(labelled)):
        repeated = columns["inputs"][row, : seq_len - stride].tolist()
        if packing or not labelled[row, : seq_len - stride].any():
            assert repeated == columns["inputs"][row - 1, stride:].tolist()
            assert not labelled[row, : seq_len - stride].any()


def test_rows_of_one_token_are_refused() -> None:
    with pytest.raises(SettingsError, match="2 tokens or more"):
        TextSamples(tokenise(plain("abc"), TOKENIZER), RowForm(1))


def test_prefix_rows_need_pairs() -> None:
    with pytest.raises(DataError, match="--prompt-column"):
        TextSamples(tokenise(plain("abcdef"), TOKENIZER), RowForm(4, prefix=True))


@pytest.mark.parametrize(("packing", "prefix"), [(True, False), (False, False), (True, True), (False, True)])
def test_no_document_gives_no_row(packing: bool, prefix: bool) -> None:
    samples = samples_of([], 4, packing, prefix)
    assert len(samples) == 0
    for name, values in samples.rows(np.array([-1, -1])).items():
        filled = {"inputs": PAD, "labels": IGNORE_LABEL, "positions": np.arange(4)}.get(name, 0)
        assert values.shape[0] == 2 and np.array_equal(values, np.broadcast_to(filled, values.shape)), name
        assert values.dtype == (bool if name in ("prompt", "active") else np.int32), name


def test_the_store_counts_what_it_holds() -> None:
    store = tokenise(plain("aé", "", "🙂"), TOKENIZER)
    assert (store.documents, store.empty_documents, len(store.tokens)) == (2, 1, 3 + 4 + 2)
    assert store.starts.tolist() == [0, 4, 9]
    assert store.token_bytes.sum() == 7 and store.tokens[[3, 8]].tolist() == [EOT, EOT]


def same(one: TextStore, other: TextStore | None) -> bool:
    assert other is not None
    prompts = (one.prompts is None) == (other.prompts is None)
    if one.prompts is not None and other.prompts is not None:
        prompts = np.array_equal(one.prompts, other.prompts)
    arrays = [(one.tokens, other.tokens), (one.token_bytes, other.token_bytes), (one.starts, other.starts)]
    rest = (one.pad_id, one.empty_documents) == (other.pad_id, other.empty_documents)
    return prompts and rest and all(np.array_equal(a, b) for a, b in arrays)


def test_many_batches_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = paired(*[("p" * (k % 3), "r" * (k % 4)) for k in range(50)])
    whole = tokenise(documents, TOKENIZER, pairs=True)
    monkeypatch.setattr("hrm_ray.data.text_store._BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("hrm_ray.data.text_store._BATCH_CHARACTERS", 7)
    assert same(whole, tokenise(documents, TOKENIZER, pairs=True))


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("cuts", [(0, 10, 10, 50), (0, 50), (0, 1, 2, 50)])
def test_stores_join(pairs: bool, cuts: tuple[int, ...]) -> None:
    documents = paired(*[("p" * (k % 3), "é" * (k % 4)) for k in range(50)])
    parts = [tokenise(documents[a:b], TOKENIZER, pairs) for a, b in itertools.pairwise(cuts)]
    assert same(tokenise(documents, TOKENIZER, pairs), joined(parts))


@pytest.mark.parametrize("pairs", [True, False])
def test_a_store_comes_back_from_its_file(tmp_path: Path, pairs: bool) -> None:
    store = tokenise(paired(("a", "bé"), ("", ""), ("c", "")), TOKENIZER, pairs)
    save_store(store, tmp_path / "s")
    assert same(store, load_store(tmp_path / "s"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    (tmp_path / "other").touch()
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "other").stat().st_mode, "others may read it as any file"


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("texts", [[], ["a"], ["a", "bé" * 300]])
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_any_reader_of_safetensors_reads_a_store(tmp_path: Path, pairs: bool, texts: list[str], kind: type) -> None:
    store = tokenise(paired(*((text, "r") for text in texts)), TOKENIZER, pairs)
    # Not contiguous, as a slice may be.
    store = replace(store, tokens=np.repeat(store.tokens.astype(kind), 2)[::2])
    save_store(store, tmp_path / "s")
    arrays = load((tmp_path / "s").read_bytes())
    assert {name: array.dtype for name, array in arrays.items()} == {
        "tokens": kind,
        "token_bytes": store.token_bytes.dtype,
        "starts": np.int64,
        **({"prompts": np.int32} if pairs else {}),
    }
    assert all(np.array_equal(array, getattr(store, name)) for name, array in arrays.items())
    assert same(store, load_store(tmp_path / "s"))


def test_a_store_for_which_the_disk_has_no_room_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("hrm_ray.data.text_store.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_store(tokenise(plain("abc"), TOKENIZER), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["short", "missing", "byte", "other"])
def test_a_damaged_store_is_none(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "s"
    save_store(tokenise(plain("abc"), TOKENIZER), file)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "other":
        file.write_bytes(b"something else")
    else:
        file.write_bytes(content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1]))
    assert load_store(file) is None


def test_a_failed_save_leaves_the_older_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tokenise(plain("abc"), TOKENIZER)
    save_store(store, tmp_path / "s")

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_store(tokenise(plain("xyz"), TOKENIZER), tmp_path / "s")
    assert same(store, load_store(tmp_path / "s")) and len(list(tmp_path.iterdir())) == 1

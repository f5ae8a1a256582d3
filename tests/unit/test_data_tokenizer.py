"""The tokenizer: bytes add up, text comes back, training is repeatable, marks in a text are text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hrm_ray.data.bpe import LEAST_VOCABULARY, train_bpe
from hrm_ray.data.tokenizer import END_OF_TEXT, PAD, TextTokenizer
from hrm_ray.errors import DataError, SettingsError

CORPUS = [
    "the quick brown fox jumps over the lazy dog, the end",
    "Zwölf Boxkämpfer jagen Viktor 🙂",
    "日本語のテキスト",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(CORPUS, 320, 100)


@pytest.fixture(scope="module")
def lossy() -> TextTokenizer:
    """A tokenizer that drops spaces and accents, as some do: tokens do not cover the text."""
    words = {word: number for number, word in enumerate(["[UNK]", "<eos>", "the", "end", "a"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(backend, "<eos>", None)


@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_bytes_of_tokens_add_up_and_the_text_comes_back(tokenizer: TextTokenizer, texts: list[str]) -> None:
    for text, encoded in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert encoded.ids.dtype == encoded.bytes.dtype == np.int32 and encoded.ids.shape == encoded.bytes.shape
        assert encoded.bytes.sum() == len(text.encode()) and (encoded.bytes >= 0).all()
        assert tokenizer.decode(encoded.ids) == text
        assert np.array_equal(tokenizer.encode(text), encoded.ids)


@pytest.mark.parametrize("text", ["🙂", "👩‍👩‍👧‍👦 family", "漢字かな", "e\u0301", "a🙂b", "\x00\n\t \u2028", "Ω≈ç√"])
def test_characters_split_over_tokens_are_counted_once(tokenizer: TextTokenizer, text: str) -> None:
    (encoded,) = tokenizer.encode_documents([text])
    assert encoded.bytes.sum() == len(text.encode())
    assert tokenizer.decode(encoded.ids) == text


def test_each_token_of_plain_text_has_its_own_length(tokenizer: TextTokenizer) -> None:
    text = "the quick dog"
    (encoded,) = tokenizer.encode_documents([text])
    assert encoded.bytes.tolist() == [len(tokenizer.decode([token])) for token in encoded.ids]


@given(text=st.text(alphabet=st.sampled_from("the ndaäé\u0301 🙂\n"), max_size=30))
def test_bytes_add_up_where_the_tokenizer_drops_text(lossy: TextTokenizer, text: str) -> None:
    (encoded,) = lossy.encode_documents([text])
    assert encoded.bytes.sum() == (len(text.encode()) if len(encoded.ids) else 0)
    assert (encoded.bytes >= 0).all()


def test_two_trainings_give_the_same_file(tmp_path: Path) -> None:
    """In two processes, because hash seeds differ between processes and not inside one."""
    code = (
        "import sys, pathlib; from hrm_ray.data.bpe import train_bpe; "
        "from tests.unit.test_data_tokenizer import CORPUS; "
        "train_bpe(CORPUS, 320, 100).save(pathlib.Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, cwd=Path(__file__).parents[2])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_only_the_first_examples_are_trained_on() -> None:
    texts = ["aaaa bbbb"] * 3 + ["zyzyzyzy"] * 3
    assert train_bpe(texts, 300, 3).fingerprint == train_bpe(texts[:3], 300, 99).fingerprint
    assert train_bpe(texts, 300, 3).fingerprint != train_bpe(texts, 300, 6).fingerprint


def test_little_data_gives_a_smaller_vocabulary() -> None:
    assert train_bpe(["ab"], 5000, 10).vocab_size == LEAST_VOCABULARY + 1


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(SettingsError, match=f"--vocab-size {LEAST_VOCABULARY}"):
        train_bpe(["ab"], LEAST_VOCABULARY - 1, 10)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        train_bpe([""], 300, 10)


def test_a_fault_of_the_reader_comes_through_training() -> None:
    def reading():  # type: ignore[no-untyped-def]
        yield "text"
        raise SettingsError([])

    with pytest.raises(SettingsError):
        train_bpe(reading(), 300, 10)


def test_marks_written_in_a_text_are_text(tokenizer: TextTokenizer) -> None:
    text = f"a{END_OF_TEXT}b{PAD}"
    (encoded,) = tokenizer.encode_documents([text])
    assert not {tokenizer.end_of_text_id, tokenizer.pad_id} & set(encoded.ids.tolist())
    assert tokenizer.decode(encoded.ids) == text


def test_marks_are_left_out_of_decoded_text(tokenizer: TextTokenizer) -> None:
    ids = [*tokenizer.encode("the"), tokenizer.end_of_text_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, keep_marks=True) == f"the{END_OF_TEXT}{PAD}"


def test_what_is_saved_is_loaded(tokenizer: TextTokenizer, lossy: TextTokenizer, tmp_path: Path) -> None:
    for number, kind in enumerate((tokenizer, lossy)):
        folder = tmp_path / str(number)
        kind.save(folder)
        assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
        for path in (folder, folder / "tokenizer.json"):
            again = TextTokenizer.load(path)
            assert (again.fingerprint, again.vocab_size) == (kind.fingerprint, kind.vocab_size)
            assert (again.end_of_text_id, again.pad_id) == (kind.end_of_text_id, kind.pad_id)


def test_truncation_and_padding_of_a_file_are_switched_off(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    assert np.array_equal(TextTokenizer.load(tmp_path).encode(text), tokenizer.encode(text))


def test_a_hugging_face_folder_names_its_marks(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": PAD, "special": True}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer.load(tmp_path).end_of_text_id == tokenizer.pad_id


def test_a_folder_of_vocabulary_and_merges_goes_through_transformers(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    loaded = TextTokenizer.load(folder)
    text = "the quick 🙂"
    assert loaded.end_of_text_id == tokenizer.end_of_text_id
    assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="end-of-text"):
        TextTokenizer.load(tmp_path)


def test_marks_that_are_not_in_the_vocabulary_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="</s>"):
        TextTokenizer.load(tmp_path)


def test_damaged_files_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="tokenizer.json"):
        TextTokenizer.load(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)


def llama_2() -> Tokenizer:
    """SentencePiece's BPE: spaces as a sign, one put in front, unknown characters as bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({*"the quick brown fox jumps over a lazy dog▁", *"ZwölfBoxkämpfer"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=letters, limit_alphabet=40, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    trained = json.loads(backend.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(trained))


def llama_3() -> Tokenizer:
    """Byte-level BPE behind its own pattern of words, and a template that adds a mark in front."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\r\n\p{L}\p{N}]?\p{L}+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return backend


def unigram() -> Tokenizer:
    """SentencePiece's unigram model, as of T5; its normaliser folds some characters."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def wordpiece() -> Tokenizer:
    """As of BERT, which names [SEP] as its end here: letters are lowered, unknown words lost."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


FAMILIES = [(llama_2, True), (llama_3, True), (unigram, False), (wordpiece, False)]


@pytest.mark.parametrize(("family", "lossless"), FAMILIES)
def test_families_of_tokenizers_are_loaded_and_count_every_byte(
    tmp_path: Path, family: Callable[[], Tokenizer], lossless: bool
) -> None:
    family().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = TextTokenizer.load(tmp_path)
    texts = ["the quick fox, the end", "Zwölf Boxkämpfer 🙂 jagen", "日本語", "a  b\n\tc ", " ", "\u0301", "x</s>y"]
    for text, encoded in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert encoded.bytes.sum() == (len(text.encode()) if len(encoded.ids) else 0) and (encoded.bytes >= 0).all()
        assert tokenizer.end_of_text_id not in encoded.ids, "no mark is added, and one in the text is text"
        if lossless:
            assert tokenizer.decode(encoded.ids) == text


def test_a_mark_that_the_model_knows_as_a_piece_is_cut(tmp_path: Path) -> None:
    """A unigram model finds its own marks in a text; the parts around the cut keep every byte."""
    tokenizer = TextTokenizer(unigram(), "</s>", "<unk>")
    for text in ("</s>", "the</s></s>end", "a <unk> b", "</s", "the end"):
        (encoded,) = tokenizer.encode_documents([text])
        assert encoded.bytes.sum() == len(text.encode())
        assert tokenizer.end_of_text_id not in encoded.ids
        assert np.array_equal(tokenizer.encode(text), encoded.ids)

"""Puzzle sets: what is written is read, rows are columns, damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hrm_ray.data.puzzles.format import Description, PuzzleFacts, write_description, write_split
from hrm_ray.data.puzzles.samples import PuzzleSamples, open_puzzles
from hrm_ray.errors import DataError, SettingsError
from hrm_ray.types import IGNORE_LABEL

ANCHOR = Path(__file__).parents[1] / "fixtures" / "sudoku4_minimal.safetensors"

INPUTS = np.array([[1, 2, 0], [3, 1, 1]], dtype=np.uint8)
LABELS = np.array([[3, 2, 0], [3, 2, 2]], dtype=np.uint8)


def built(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    splits = {
        "train": write_split(folder, "train", INPUTS, LABELS, np.array([1, 2], dtype=np.int32)),
        "test": write_split(folder, "test", INPUTS[:1], LABELS[:1]),
    }
    description = Description(
        kind="puzzle",
        format=1,
        name="toy",
        seq_len=3,
        vocab_size=4,
        num_puzzle_identifiers=3,
        pad_id=0,
        blank_id=0,
        grid=(1, 3),
        symbols=["#", ".", "a", "b"],
        splits=splits,
    )
    write_description(folder, description.model_copy(update=changes))
    return folder


def test_what_is_built_is_read(tmp_path: Path) -> None:
    samples = open_puzzles(built(tmp_path / "toy"))
    facts = samples.facts
    assert (facts.name, facts.count, facts.seq_len, facts.vocab_size) == ("toy", 2, 3, 4)
    rows = samples.rows(np.array([1, -1, 0]))
    assert rows["inputs"].tolist() == [[3, 1, 1], [0, 0, 0], [1, 2, 0]]
    none = IGNORE_LABEL
    assert rows["labels"].tolist() == [[3, 2, 2], [none, none, none], [3, 2, none]], "the pad token is no label"
    assert rows["puzzle_identifiers"].tolist() == [2, 0, 1]
    assert rows["active"].tolist() == [True, False, True] and rows["active"].dtype == bool
    assert all(rows[name].dtype == np.int32 for name in ("inputs", "labels", "puzzle_identifiers"))
    assert open_puzzles(tmp_path / "toy", "test").rows(np.array([0]))["puzzle_identifiers"].tolist() == [0]


@pytest.mark.parametrize("index", [-2, 2])
def test_a_sample_outside_is_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.1"):
        open_puzzles(built(tmp_path / "toy")).rows(np.array([index]))


def test_the_anchor_file_is_read() -> None:
    stored = load_file(ANCHOR)
    for split, count in (("train", 20_000), ("test", 1_000)):
        samples = open_puzzles(ANCHOR, split)
        assert (len(samples), samples.facts.seq_len, samples.facts.vocab_size) == (count, 16, 6)
        rows = samples.rows(np.arange(count))
        assert np.array_equal(rows["inputs"], stored[f"{split}.inputs"])
        assert np.array_equal(rows["labels"], stored[f"{split}.labels"])
        assert not rows["puzzle_identifiers"].any() and rows["active"].all()


def test_rows_of_jsonl_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = [
        {"inputs": [0, 1], "labels": [2, -100]},
        {"inputs": [1, 1], "labels": [0, 7], "puzzle_identifier": 3},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for path in (file, tmp_path):
        samples = open_puzzles(path)
        assert (samples.facts.vocab_size, samples.facts.num_puzzle_identifiers) == (8, 4)
        rows = samples.rows(np.array([0, 1]))
        assert rows["labels"].tolist() == [[2, IGNORE_LABEL], [0, 7]], "a plain file does not say that 0 pads"
        assert rows["puzzle_identifiers"].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"inputs": [1, 2]}', "no `labels`"),
        ('{"inputs": [1, "a"], "labels": [1, 2]}', "`inputs` is not a list of whole numbers"),
        ('{"inputs": [1, true], "labels": [1, 2]}', "`inputs` is not a list of whole numbers"),
        ('{"inputs": [1, 2], "labels": []}', "`labels` is not a list"),
        ('{"inputs": [1, -100], "labels": [1, 2]}', "`inputs` contains -100"),
        ('{"inputs": [1, 2], "labels": [1, -1]}', "`labels` contains -1"),
        ('{"inputs": [1, 2], "labels": [1, 4294967296]}', "`labels` contains 4294967296"),
        ('{"inputs": [1, 2], "labels": [1, 2, 3]}', "2 inputs but 3 labels"),
        ('{"inputs": [1, 2, 3], "labels": [1, 2, 3]}', "3 inputs, the first row 2"),
        ('{"inputs": [1, 2], "labels": [1, 2], "puzzle_identifier": -1}', "`puzzle_identifier` is -1"),
    ],
)
def test_a_bad_row_is_told_by_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"inputs": [1, 2], "labels": [1, 2]}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        open_puzzles(file)
    assert "p.jsonl:2" in str(caught.value) and expected in str(caught.value)


def test_a_row_without_labels_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"inputs": [1, 2], "labels": [-100, -100]}\n')
    with pytest.raises(DataError, match="sample 0.*no label"):
        open_puzzles(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="no row"):
        open_puzzles(file)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"train.inputs": INPUTS}, "no tensor `train.labels`"),
        ({"train.inputs": INPUTS, "train.labels": LABELS[:1]}, r"`train.labels` is \[1, 3\], expected \[2, 3\]"),
        ({"train.inputs": INPUTS[0], "train.labels": LABELS[0]}, "shape"),
        ({"train.inputs": INPUTS[:0], "train.labels": LABELS[:0]}, "shape"),
        ({"train.inputs": INPUTS.astype(np.float32), "train.labels": LABELS}, "float32"),
        ({"inputs": INPUTS, "labels": LABELS, "puzzle_identifiers": INPUTS}, "puzzle_identifiers"),
        ({"weights": INPUTS}, "no puzzles, but weights"),
        ({"test.inputs": INPUTS, "test.labels": LABELS}, "The splits are: test"),
        ({"inputs": INPUTS.astype(np.int32) - 1, "labels": LABELS}, "contains -1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], expected: str) -> None:
    file = tmp_path / "p.safetensors"
    save_file(tensors, file)
    with pytest.raises(DataError, match=expected):
        open_puzzles(file)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 3}, r"contains 3, outside the vocabulary 0\.\.2"),
        ({"num_puzzle_identifiers": 2}, r"contains 2, outside the identifiers 0\.\.1|contains 2"),
        ({"seq_len": 4}, r"inputs are \[2, 3\]"),
        ({"kind": "text"}, "puzzle"),
        ({"format": 2}, "format"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_puzzles(built(tmp_path / "toy", **changes))


def test_damage_is_reported_with_a_hint(tmp_path: Path) -> None:
    folder = built(tmp_path / "toy")
    with pytest.raises(DataError, match="The splits are: test, train"):
        open_puzzles(folder, "valid")
    whole = (folder / "train.safetensors").read_bytes()
    for damaged, expected in ((whole[:-2], "cut short"), (b"", "cut short"), (whole[:-1] + b"\x07", "checksum")):
        (folder / "train.safetensors").write_bytes(damaged)
        with pytest.raises(DataError, match=expected):
            open_puzzles(folder)
    (folder / "train.safetensors").unlink()
    with pytest.raises(DataError, match="not there"):
        open_puzzles(folder)
    description = json.loads((folder / "dataset.json").read_text())
    del description["pad_id"]
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="pad_id"):
        open_puzzles(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        open_puzzles(folder)
    with pytest.raises(SettingsError, match="nothing"):
        open_puzzles(tmp_path / "nothing")


def test_evaluation_data_takes_over_the_training_datas_facts(tmp_path: Path) -> None:
    def samples(inputs: list[list[int]]) -> PuzzleSamples:
        file = tmp_path / "x.safetensors"
        save_file({"inputs": np.array(inputs), "labels": np.array(inputs)}, file)
        return open_puzzles(file)

    train = samples([[1, 5], [2, 3]])
    held_out = samples([[1, 2]])
    held_out.fit_to(train.facts)
    assert (held_out.facts.vocab_size, held_out.facts.count) == (6, 1)
    for wrong, expected in (([[1, 6]], "7 tokens"), ([[1, 2, 3]], "3 cells")):
        with pytest.raises(DataError, match=expected):
            samples(wrong).fit_to(train.facts)


def test_puzzles_are_shown_and_read_back() -> None:
    facts = PuzzleFacts("toy", 1, 4, 4, 1, 0, 0, (2, 2), ("#", ".", "a", "b"))
    assert facts.render(np.array([1, 2, 3, 0])) == ". a\nb #"
    assert facts.parse(". a\nb #").tolist() == [1, 2, 3, 0] == facts.parse(".ab#").tolist()
    assert PuzzleFacts.from_plain(json.loads(json.dumps(facts.plain()))) == facts
    for text, expected in ((".ab", "3 symbols"), (".abx", "'x'")):
        with pytest.raises(SettingsError, match=expected):
            facts.parse(text)
    plain = PuzzleFacts("toy", 1, 4, 12, 1, 0, 0, None, ())
    assert plain.render(np.array([1, 11, 3, 0])) == "1 11 3 0"
    with pytest.raises(SettingsError, match="no symbols"):
        plain.parse("1")

"""Options whose effect shows only in a whole run: --strict, how much is evaluated, where solve looks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hrm_ray.data.bpe import LONGEST_WORD, train_bpe
from hrm_ray.train.evaluate import better
from tests.support.runs import (
    PUZZLE,
    TEXT,
    computed,
    files_below,
    hrm,
    last_said,
    puzzle_file,
    records,
    refused,
    text_file,
    train,
)


def test_a_smaller_vocabulary_is_said_and_refused_when_strict(tmp_path: Path) -> None:
    """The corpus cannot give 5000 tokens: a warning in the records, an error under --strict, and then no bundle."""
    data, words = text_file(tmp_path), [*TEXT, "--steps", "1"]
    words[words.index("--vocab-size") + 1] = "5000"
    train(data, tmp_path / "b", *words)
    told = [event["message"] for event in records(tmp_path / "b", "event") if event["level"] == "WARNING"]
    assert len(told) == 1 and "5000" in told[0]
    command = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "c", *words, "--strict")
    refused(2, *command, naming=("--strict", "5000"))
    assert not (tmp_path / "c").exists()


def test_an_evaluation_reads_the_same_puzzles_however_the_batch_is_cut(tmp_path: Path) -> None:
    train_set, held_out = puzzle_file(tmp_path), puzzle_file(tmp_path, count=30, name="held.safetensors", seed=1)
    words = [*PUZZLE, "--steps", "2", "--eval-file", held_out, "--eval-batches", "3"]
    train(train_set, tmp_path / "whole", *words, "--batch-size", "8")
    train(train_set, tmp_path / "cut", *words, "--batch-size", "2", "--gradient-accumulation-steps", "4")
    counts = [records(tmp_path / name, "eval")[-1]["puzzles"] for name in ("whole", "cut")]
    assert counts == [24, 24]


def test_figures_that_are_not_finite_are_never_the_best() -> None:
    nan = {"loss": float("nan")}
    assert not better(nan, None)
    assert better({"loss": 2.0}, None)
    assert not better(nan, {"loss": 2.0})


def test_rows_with_the_plural_of_identifier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"inputs": [1, 2], "labels": [2, 1], "puzzle_identifiers": 3}) + "\n")
    refused(5, "train", "--dataset-file", path, "--dry-run", naming=("puzzle_identifiers", "puzzle_identifier"))


def test_rows_of_several_puzzles_train_the_table(tmp_path: Path) -> None:
    """.jsonl rows with `puzzle_identifier`: the table has a row for each, and those that were seen have moved."""
    path = tmp_path / "rows.jsonl"
    rows = [{"inputs": [1, 2, 0], "labels": [1, 2, 3], "puzzle_identifier": number % 4} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(path, tmp_path / "b", *PUZZLE, "--steps", "6", "--puzzle-emb-ndim", "8")
    table = load_file(tmp_path / "b" / "model.safetensors")["embedding.puzzle_emb.weights"]
    assert table.shape == (4, 8)
    assert bool((table != 0).any(dim=1).all())


def test_solve_takes_the_test_split_where_there_is_one_and_all_rows_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "sudoku"
    assert hrm("data", "build", "sudoku", "--size", 4, "--train", 20, "--test", 6, "--out", out).code == 0
    train(out, tmp_path / "b", *PUZZLE, "--steps", "1")
    assert "of 6 solved exactly" in hrm("solve", tmp_path / "b", "--file", out).out
    assert "of 20 solved exactly" in hrm("solve", tmp_path / "b", "--file", out, "--split", "train").out
    rows = tmp_path / "rows.jsonl"
    row = {"inputs": [1, 2, 3, 4] * 4, "labels": [2, 3, 4, 5] * 4}
    rows.write_text(json.dumps(row) + "\n")
    assert "of 1 solved exactly" in hrm("solve", tmp_path / "b", "--file", rows).out
    given = hrm("solve", tmp_path / "b", "1....2..3......4", "--json")
    assert given.code == 0 and json.loads(given.out)["segments"] == 3


def test_a_word_without_end_is_cut(tmp_path: Path) -> None:
    """A BPE takes time with the square of a word's length: 200,000 letters in one took minutes, cut they take none."""
    tokenizer = train_bpe(["x" * 200_000 + " and " + " " * 200_000], 300, 10)
    text = "y" * 1000 + " z" + " " * 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    longest = max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size))
    assert 1 < longest <= LONGEST_WORD


def test_data_that_has_moved(tmp_path: Path) -> None:
    """A run goes on with the same data from another place, and not with other data."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    data = text_file(first)
    train(data, tmp_path / "b", *TEXT, "--steps", "2")
    moved = data.rename(second / "elsewhere.txt")
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "4")
    refused(2, *resume, naming=(data, "no such file or folder", "--resume --dataset-file NEW_PLACE"))
    other = text_file(first, name="other.txt", seed=5)
    refused(5, *resume, "--dataset-file", other, naming=("not what the run was trained on", "--student-init"))
    assert hrm(*resume, "--dataset-file", moved).code == 0
    assert [record["step"] for record in records(tmp_path / "b")] == [1, 2, 3, 4]


def test_divergence_names_one_parameter_and_what_to_do(tmp_path: Path) -> None:
    words = (*TEXT, "--steps", "9", "--lr", "1e30", "--grad-clip", "0", "--max-bad-steps", "1", "--optimizer", "sgd")
    command = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *words)
    naming = ("gradient norm", "non-finite gradients, first in ", "more)", "start anew if there is none")
    assert len(refused(6, *command, naming=naming)) < 300


def test_weights_of_a_bundle_bring_their_tokenizer(tmp_path: Path) -> None:
    words = [*TEXT, "--steps", "1"]
    train(text_file(tmp_path), tmp_path / "a", *words)
    own = (tmp_path / "a" / "tokenizer.json").read_bytes()
    other = text_file(tmp_path, name="other.txt", seed=9)
    without = [word for word in words if word not in ("--vocab-size", "300")]
    train(other, tmp_path / "b", *without, "--student-init", tmp_path / "a")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == own
    start = ("--dataset-file", other, "--bundle-dir", tmp_path / "c", *words, "--student-init", tmp_path / "a")
    refused(2, "train", *start, naming=("--student-init", "--tokenizer-path"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("words", "naming"),
    [(("--batch-size", "1000000000"), ("memory", "batch")), (("--threads", "100000"), ("--threads 100000",))],
)
def test_sizes_that_cannot_be_are_refused_at_once(
    words: tuple[str, ...], naming: tuple[str, ...], tmp_path: Path
) -> None:
    data = text_file(tmp_path)
    usual = list(TEXT)
    usual[usual.index(words[0]) + 1] = words[1]
    refused(4, "train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *usual, naming=naming)
    assert not (tmp_path / "b").exists()


def test_every_file_of_a_bundle_is_as_readable_as_any_other(tmp_path: Path) -> None:
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "1")
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode & 0o777}


HARMLESS_TEXT = (
    *("--text-column", "t", "--eval-every", "5", "--eval-batches", "1", "--max-val-examples", "3"),
    *("--shuffle-buffer-size", "50", "--window-size", "16", "--use-chunked-training", "--chunk-size", "2048"),
    *("--no-cpu-offload", "--lora-r", "16", "--peft-method", "lora", "--num-experts", "8", "--no-auto-adjust-lr"),
    *("--dataset-config", "en", "--iterate", "--min-vocab-size", "400", "--force-train", "--optimizer-offload"),
    *("--wsd-decay-ratio", "0.1", "--halt-margin", "0.5", "--halt-rule", "none", "--rope-theta", "9", "--no-rope"),
)
HARMLESS_PUZZLES = (
    *("--no-packing", "--tokenizer-path", "nowhere", "--vocab-size", "400", "--start-block-id", "3"),
    *("--dataset-start-offset", "5", "--ascii-only", "--halt-rule", "gain", "--stride", "4", "--cache-gb", "0"),
    *("--text-column", "t", "--dataset-chunk-size", "2", "--samples-per-block", "1", "--epochs", "3", "--force-train"),
)
HARMLESS_IN_A_TRANSFORMER = (
    *("--arch", "transformer", "--h-cycles", "3", "--l-cycles", "1", "--bp-steps", "9", "--halt-max-steps", "4"),
)


@pytest.mark.parametrize(
    ("data", "words", "harmless"),
    [
        (text_file, (*TEXT, "--halt-rule", "none", "--no-rope"), HARMLESS_TEXT),
        (text_file, (*TEXT, "--arch", "transformer"), HARMLESS_IN_A_TRANSFORMER),
        (puzzle_file, (*PUZZLE, "--epochs", "3"), HARMLESS_PUZZLES),
        (puzzle_file, (*PUZZLE, "--supervision", "rollout"), ("--halt-exploration-prob", "1")),
    ],
)
def test_options_without_effect_train_the_same_and_are_noted_once(
    data: Any, words: tuple[str, ...], harmless: tuple[str, ...], tmp_path: Path
) -> None:
    """Of all of them one line; under --strict they are errors, and nothing is made."""
    file = data(tmp_path)
    train(file, tmp_path / "plain", *words, "--steps", "2")
    command = ("train", "--dataset-file", file, *last_said(words), *harmless, "--steps", "2")
    ran = hrm(*command, "--bundle-dir", tmp_path / "b")
    assert ran.code == 0, ran.err
    assert computed(tmp_path / "b") == computed(tmp_path / "plain")
    (noted,) = [event["message"] for event in records(tmp_path / "b", "event") if "no effect" in event["message"]]
    assert ran.out.count("no effect here: ") == 1 and noted in ran.out
    given = {word for word in harmless if word.startswith("--")} - {*words, "--epochs"}
    assert [word for word in given if not re.search(rf"{word}[ ,]", noted)] == []
    strict = hrm(*command, "--bundle-dir", tmp_path / "c", "--strict")
    assert strict.code == 2 and "it has no effect here" in strict.faults[0] and not (tmp_path / "c").exists()


def test_of_an_option_given_again_the_last_value_counts(tmp_path: Path) -> None:
    words = ("train", "--dataset-file", text_file(tmp_path), *TEXT, "--bundle-dir", tmp_path / "b")
    ran = hrm(*words, "--steps", "1", "--lr", "1", "--steps", "2", "--learning-rate", "2e-4", "--dry-run")
    assert ran.code == 0 and "run.steps = 2" in ran.out and "optimizer.lr = 0.0002" in ran.out
    assert (
        "\nnote    no effect here: --steps 1 (overridden by --steps 2), --lr 1 (overridden by --learning-rate 2e-4)"
        in ran.out
    )
    refused(2, *words, "--steps", "1", "--steps", "2", "--strict", naming=("--steps 1", "overridden by --steps 2"))


def test_a_resumed_run_without_a_step_left_says_so(tmp_path: Path) -> None:
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "3")
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "2").code == 0
    told = [event["message"] for event in records(tmp_path / "b", "event") if event["level"] == "WARNING"]
    assert any("at step 3 already" in message for message in told)


def test_an_option_takes_the_place_of_its_rival_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  h_layers: 1\n  l_layers: 1\n")
    words = list(TEXT)
    words[words.index("--num-layers") + 1] = "4"
    ran = hrm("train", "--dataset-file", text_file(tmp_path), "--config", config, *words, "--dry-run")
    assert ran.code == 0 and "model.h_layers = 2" in ran.out


def test_a_resume_with_other_puzzles_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Sets of another name and other solutions: what the bundle says of its puzzles stays too."""
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "2")
    before = files_below(tmp_path / "b")
    other = puzzle_file(tmp_path, name="other.safetensors", seed=4)
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "4", "--dataset-file", other)
    refused(5, *resume, naming=(other, "fingerprint"))
    assert files_below(tmp_path / "b") == before


def test_small_refusals_say_what_to_do(tmp_path: Path) -> None:
    words = ("train", "--dataset-file", text_file(tmp_path), *TEXT, "--bundle-dir", tmp_path / "b")
    stop = tmp_path / "nodir" / "stop"
    refused(2, *words, "--stop-file", stop, naming=(f"--stop-file {stop}", "there is no folder", "Make the folder"))
    endless = refused(2, *words, "--iterate", naming=("--iterate", "--lr-schedule cosine", "--lr-schedule constant."))
    assert "adalora" not in endless
    adalora = ("--iterate", "--use-peft", "--peft-method", "adalora")
    assert "constant" not in refused(2, *words, *adalora, naming=("rank schedule of adalora", "--steps or --epochs."))
    refused(2, *words, "--start-block-id", "99", naming=("one block only, which is number 0", "Leave it out"))
    refused(2, "generate", tmp_path, "--prompt", "x", "--top-p", "0", naming=("--top-p 0: must be above 0",))
    assert not (tmp_path / "b").exists()


def test_a_log_file_that_is_the_bundle_s_own_is_noted(tmp_path: Path) -> None:
    words = ("--log-file", tmp_path / "b" / "metrics.jsonl", "--steps", "2")
    ran = train(text_file(tmp_path), tmp_path / "b", *TEXT, *words)
    assert "(the run writes its metrics there anyway)" in ran.out
    assert [record["step"] for record in records(tmp_path / "b")] == [1, 2]


def test_a_dry_run_prints_what_holds(tmp_path: Path) -> None:
    """No None: a resolved value, or what it means that the option is not set."""
    words = ("train", "--dataset-file", text_file(tmp_path), *TEXT[:-2], "--dry-run")
    ran = hrm(*words)
    assert ran.code == 0 and "None" not in ran.out, ran.err
    lines = dict(line.strip().split(" = ", 1) for line in ran.out.splitlines() if line.startswith("  ") and "=" in line)
    assert lines["run.steps"] == "200" and lines["run.brain_name"] == "corpus"
    assert lines["run.bundle_dir"].endswith("artifacts/brains") and lines["model.window_size"].startswith("(all")
    assert lines["cluster.launcher"] == "local" and lines["cluster.strategy"] == "single"
    assert (lines["cluster.world_size"], lines["cluster.threads"]) == ("1", "1")
    assert lines["memory.keep_freed_memory"] in ("True", "False") and lines["memory.activations"] == "fp32"
    assert lines["optimizer.effective_batch_size"] == "4" and lines["model.num_layers"] == "2"
    assert "run.steps = (no limit)" in hrm(*words, "--epochs", "1").out
    puzzles = hrm("train", "--dataset-file", puzzle_file(tmp_path), *PUZZLE, "--dry-run").out
    assert "data.tokenizer_path = (not used: it applies to text" in puzzles and "None" not in puzzles

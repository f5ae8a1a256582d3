"""What a run leaves: the bundle's files and what they say, the metrics, and a tokenizer that is used again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tokenizers import Tokenizer, models, pre_tokenizers

from hrm_ray.bundle.store import open_bundle
from hrm_ray.train.memory_estimate import MemoryAccount
from tests.support.runs import (
    MEASURED,
    PUZZLE,
    TEXT,
    TINY,
    files_below,
    hrm,
    puzzle_file,
    records,
    refused,
    stopping_at,
    text_file,
    train,
)

CPU = torch.device("cpu")
O1 = {"batch_idx", "gradient_accumulation_steps", "physical_batch_size", "effective_batch_size", "objective"}
R10 = {"memory_gb", "peak_gb"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text bundle b of six steps, stopped at step 3 and resumed, with a log file beside it."""
    folder = tmp_path_factory.mktemp("text")
    held_out = text_file(folder, rows=5, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "6", "--eval-every", "2", "--eval-file", held_out, "--log-file", folder / "log.jsonl")
    with stopping_at(3):
        train(text_file(folder), folder / "b", *words)
    assert hrm("train", "--bundle-dir", folder / "b", "--resume").code == 0
    return folder


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puzzle")
    data = puzzle_file(folder)
    train(data, folder / "b", *PUZZLE, "--steps", "4", "--eval-file", data, "--gradient-accumulation-steps", "2")
    return folder


def plain(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files(text: Path, puzzle: Path) -> None:
    common = {"config.json", "model.safetensors", "metadata.json", "training_args.json"}
    run = {*common, "best", "checkpoints", "metrics.jsonl", "tensorboard", ".run.lock", ".generation.json"}
    text_only = {"data", "ledger.sqlite", "chunk_tracker_state.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (text / "b").iterdir()} == {*run, *tokenizer, *text_only}
    assert {path.name for path in (text / "b" / "best").iterdir()} == {*common, *tokenizer}
    assert {path.name for path in (puzzle / "b").iterdir()} == {*run, "puzzle.json"}
    assert {path.name for path in (puzzle / "b" / "best").iterdir()} == {*common, "puzzle.json"}
    for folder in (text, puzzle):
        assert not [path for path in folder.rglob("*") if ".tmp" in path.name or "building" in path.name]


def test_config(text: Path) -> None:
    config = plain(text / "b" / "config.json")
    assert config["model_type"] == "hrm_actv1"
    assert (config["task"], config["hidden_size"], config["num_heads"], config["seq_len"]) == ("lm", 32, 2, 16)
    assert (config["h_layers"], config["l_layers"], config["vocab_size"]) == (1, 1, 300)


def test_metadata(text: Path, puzzle: Path) -> None:
    for folder, steps in ((text, 6), (puzzle, 4)):
        about = plain(folder / "b" / "metadata.json")
        assert about["weights_sha256"] == sha256(folder / "b" / "model.safetensors")
        assert about["step"] == steps and about["ended"] == "finished" and about["skipped_steps"] == 0
        weights = load_file(folder / "b" / "model.safetensors")
        count = sum(tensor.size for name, tensor in weights.items() if name not in {"H_init", "L_init"})
        assert about["parameters"] == count
        evaluations = records(folder / "b", "eval")
        last = {n: v for n, v in evaluations[-1].items() if n not in {*MEASURED, "kind", "step", "best"}}
        assert about["figures"] == last
        best = plain(folder / "b" / "best" / "metadata.json")
        assert best["weights_sha256"] == sha256(folder / "b" / "best" / "model.safetensors")
        assert best["best"] == about["best"] and best["best"]["step"] == best["step"]
        assert best["step"] == [record["step"] for record in evaluations if record["best"]][-1]


def test_the_best_is_the_best(text: Path) -> None:
    evaluations = records(text / "b", "eval")
    assert [record["step"] for record in evaluations] == [2, 4, 6]
    assert plain(text / "b" / "best" / "metadata.json")["best"]["loss"] == min(r["loss"] for r in evaluations)


def test_training_args(text: Path) -> None:
    settings = plain(text / "b" / "training_args.json")["settings"]
    assert settings["model"]["hidden_size"] == 32 and settings["model"]["task"] == "lm"
    assert settings["run"]["steps"] == 6 and settings["run"]["log_file"] == str(text / "log.jsonl")
    assert settings["data"]["dataset_file"] == str(text / "corpus.txt")
    data = plain(text / "b" / "training_args.json")["data"]
    assert data["rows"] is None, "nothing asked for them to be counted"
    assert data["tokenizer"] == "trained" and data["cut"]["dataset_chunk_size"] == 4000


def test_it_opens(text: Path, puzzle: Path) -> None:
    for folder in (text, puzzle):
        for bundle in (folder / "b", folder / "b" / "best"):
            opened = open_bundle(bundle, CPU)
            stored = load_file(bundle / "model.safetensors")
            for name, tensor in opened.model.state_dict().items():
                assert (tensor.numpy() == stored[name]).all()
            assert not opened.model.training


def test_it_is_used(text: Path, puzzle: Path, tmp_path: Path) -> None:
    """Also after it was moved, and the best as well as the last."""
    shutil.copytree(text / "b", tmp_path / "moved")
    for bundle in (tmp_path / "moved", tmp_path / "moved" / "best"):
        ran = hrm("generate", bundle, "--prompt", "a cell", "--max-new-tokens", "4", "--seed", "1")
        assert ran.code == 0 and ran.out.startswith("a cell")
    shutil.copytree(puzzle / "b", tmp_path / "solver")
    for bundle in (tmp_path / "solver", tmp_path / "solver" / "best"):
        ran = hrm(
            "solve", bundle, "--file", puzzle / "puzzles.safetensors", "--split", "train", "--limit", "2", "--json"
        )
        assert ran.code == 0 and len(ran.out.splitlines()) == 2


def test_metrics(text: Path, puzzle: Path) -> None:
    for folder, shape in ((text, (4, 1, 4)), (puzzle, (4, 2, 8))):
        logged = records(folder / "b")
        assert [record["step"] for record in logged] == list(range(1, len(logged) + 1))
        for record in logged:
            assert {*O1, *R10, "lr", "grad_norm", "epoch", "skipped_steps"} <= record.keys()
            names = ("physical_batch_size", "gradient_accumulation_steps", "effective_batch_size")
            assert tuple(record[name] for name in names) == shape
            assert record["batch_idx"] == record["step"]
            # A puzzle has an answer, and so a loss, once it halts: not in the first steps of carried supervision.
            assert folder is puzzle or record["loss"] > 0
            assert 0 < record["memory_gb"] <= record["peak_gb"] < 64


def test_the_log_file_holds_the_same(text: Path) -> None:
    assert (text / "log.jsonl").read_bytes() == (text / "b" / "metrics.jsonl").read_bytes()


def test_tensorboard(text: Path) -> None:
    files = sorted((text / "b" / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 2, "one of the run until it was stopped, one of what was resumed"
    seen: dict[str, list[int]] = {}
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
    assert seen["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert seen["eval/loss"] == [2, 4, 6]


def test_resume_says_from_where(text: Path) -> None:
    told = [event["message"] for event in records(text / "b", "event")]
    assert told == [f"resumed from {text / 'b' / 'checkpoints' / 'step_3'}"]


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, puzzles = text_file(tmp_path), puzzle_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path), sorted(tmp_path.iterdir())
    monkeypatch.setattr("hrm_ray.launch.local.train", lambda *words: pytest.fail("it was started"))
    for path, words in ((data, TEXT), (puzzles, PUZZLE)):
        ran = hrm("train", "--dataset-file", path, *words, "--dry-run")
        assert ran.code == 0 and ran.err == ""
        assert "parameters" in ran.out and "nothing was started" in ran.out
        assert "optimizer.batch_size = 4" in ran.out and f"artifacts/brains/{path.stem}" in ran.out
        config = ("--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--no-moe")
        vocab, task = ("300", "lm") if path == data else ("5", "puzzle")
        counted = hrm("arch-summary", *config, "--task", task, "--vocab-size", vocab, "--json")
        assert f"{json.loads(counted.out)['total_parameters']:,} parameters" in ran.out
    assert (files_below(tmp_path), sorted(tmp_path.iterdir())) == before


SMALL = ("--hidden-size", "128", "--num-heads", "2", "--num-layers", "2", "--halt-max-steps", "1", "--bp-steps", "1")
SMALL = (*SMALL, "--h-cycles", "1", "--l-cycles", "1", "--max-seq-len", "16", "--vocab-size", "300")


def test_both_commands_tell_the_memory_of_the_settings(tmp_path: Path) -> None:
    """The same account, of the options given: more rows take more activations, an 8-bit optimizer less state."""
    data = text_file(tmp_path)
    accounts = []
    for more in ((), ("--batch-size", "64", "--use-8bit-optimizer", "--ema", "0.9")):
        words = (*SMALL, "--no-moe", *more)
        told = json.loads(hrm("arch-summary", *words, "--json").out)["memory"]
        dry = hrm("train", "--dry-run", "--dataset-file", data, *words)
        assert f"memory  of each worker {MemoryAccount(**told).as_text()}" in dry.out, dry.out
        accounts.append(told)
    plain, changed = accounts
    assert changed["activations_bytes"] > 4 * plain["activations_bytes"]
    assert changed["optimizer_bytes"] < 0.35 * plain["optimizer_bytes"]
    assert changed["average_bytes"] == plain["gradients_bytes"]


def test_arch_summary_of_what_this_machine_has_not(tmp_path: Path) -> None:
    """A GPU, with the optimizer's state in host memory; and one expert trained inside a bundle."""
    size = ("arch-summary", *SMALL, "--use-moe")
    here = json.loads(hrm(*size, "--json").out)["memory"]
    offload = hrm(*size, "--optimizer-offload", "--device", "cuda", "--json")
    assert offload.code == 0 and offload.err == ""
    there = json.loads(offload.out)["memory"]
    assert there["optimizer_bytes"] == here["optimizer_bytes"]
    assert there["peak_bytes"] < here["peak_bytes"] - 0.6 * here["optimizer_bytes"]
    one = hrm(*size, "--expert-id", "e", "--expert-index", "2", "--student-init", tmp_path / "b", "--json")
    assert one.code == 0, one.err
    assert json.loads(one.out)["memory"]["optimizer_bytes"] < 0.2 * here["optimizer_bytes"]


def test_a_row_deep_in_the_data_fails_a_dry_run(tmp_path: Path) -> None:
    row = '{"text": "some good text of a row"}\n'
    (tmp_path / "d.jsonl").write_text(row * 3000 + '{"txt": "x"}\n' + row)
    naming = ("d.jsonl:3001", "`text`", "txt")
    refused(5, "train", "--dataset-file", tmp_path / "d.jsonl", *TEXT, "--dry-run", naming=naming)
    (tmp_path / "p.jsonl").write_text('{"inputs": [0, 1], "labels": [1, 1]}\n' * 3000 + '{"inputs": [0, 1]}\n')
    refused(5, "train", "--dataset-file", tmp_path / "p.jsonl", *TINY, "--dry-run", naming=("p.jsonl:3001",))


def test_the_name_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = text_file(tmp_path)
    for words, place in (
        ((), "artifacts/brains/corpus"),
        (("--brain-name", "mine"), "artifacts/brains/mine"),
        (("--brain-name", "mine", "--save-dir", "runs"), "runs/mine"),
        (("--output-dir", "here"), "here"),
    ):
        ran = hrm("train", "--dataset-file", data.name, *TEXT, "--steps", "1", *words)
        assert ran.code == 0, ran.err
        assert (tmp_path / place / "model.safetensors").is_file()
    again = hrm("train", "--dataset-file", data.name, "--resume", "--steps", "2")
    assert again.code == 0 and plain(tmp_path / "artifacts/brains/corpus/metadata.json")["step"] == 2


def test_a_moved_bundle_is_resumed_where_it_lies(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(text / "b", tmp_path / "elsewhere")
    before = files_below(text / "b")
    from_6 = tmp_path / "elsewhere" / "checkpoints" / "step_6"
    log = ("--log-file", tmp_path / "log.jsonl")
    assert hrm("train", "--resume-from", from_6, "--steps", "7", *log).code == 0
    assert plain(tmp_path / "elsewhere" / "metadata.json")["step"] == 7
    assert files_below(text / "b") == before


def test_a_tokenizer_is_used_again(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "first", *TEXT, "--steps", "1")
    kept = (tmp_path / "first" / "tokenizer.json").read_bytes()
    other = text_file(tmp_path, name="other.txt", seed=7)
    both = ("tokenizer.json", "tokenizer_config.json")
    for number, files in enumerate((both[:1], both)):
        bundle = tmp_path / f"next{number}"
        bundle.mkdir()
        for name in files:
            shutil.copyfile(tmp_path / "first" / name, bundle / name)
        train(other, bundle, *TEXT, "--steps", "1")
        assert (bundle / "tokenizer.json").read_bytes() == kept
        assert plain(bundle / "training_args.json")["data"]["tokenizer"] == "reused"
    anew = tmp_path / "anew"
    anew.mkdir()
    shutil.copyfile(tmp_path / "first" / "tokenizer.json", anew / "tokenizer.json")
    train(other, anew, *TEXT, "--steps", "1", "--retrain-tokenizer")
    assert (anew / "tokenizer.json").read_bytes() != kept


def test_a_tokenizer_of_another_size_is_said(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "first", *TEXT, "--steps", "1")
    (tmp_path / "b").mkdir()
    shutil.copyfile(tmp_path / "first" / "tokenizer.json", tmp_path / "b" / "tokenizer.json")
    train(data, tmp_path / "b", *TEXT, "--steps", "1", "--vocab-size", "320")
    told = [event["message"] for event in records(tmp_path / "b", "event") if event["level"] == "WARNING"]
    assert len(told) == 1 and "300 tokens" in told[0] and "320" in told[0] and "--retrain-tokenizer" in told[0]


def test_a_loaded_tokenizer_with_its_own_end_mark(tmp_path: Path) -> None:
    """Its name stands in tokenizer_config.json, which must go wherever tokenizer.json goes: into best/ and a branch."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: n for n, sign in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    data, held_out = text_file(tmp_path), text_file(tmp_path, rows=5, name="held_out.txt", seed=1)
    words = (*TINY, "--max-seq-len", "16", "--tokenizer-path", folder, "--eval-file", held_out, "--steps", "2")
    train(data, tmp_path / "b", *words)
    shutil.rmtree(folder)
    for bundle in (tmp_path / "b", tmp_path / "b" / "best"):
        assert hrm("generate", bundle, "--prompt", "a", "--max-new-tokens", "2").code == 0
    step_2 = tmp_path / "b" / "checkpoints" / "step_2"
    branch = hrm("train", "--resume-from", step_2, "--bundle-dir", tmp_path / "branch", "--steps", "3")
    assert branch.code == 0, branch.err
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "3").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("b", "branch")]
    assert weights[0] == weights[1]

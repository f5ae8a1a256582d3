"""Bad input to whole commands: one message with value, reason and hint, the right exit code, nothing half made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.runs import (
    PUZZLE,
    TEXT,
    TINY,
    files_below,
    hrm,
    last_said,
    puzzle_file,
    refused,
    text_file,
    train,
)


def entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden names and sub-folders too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


GOOD_ROWS = '{"text": "one good row of text that is long enough to be cut into rows"}\n' * 40

Case = tuple[int, Callable[[Path], list[object]], tuple[str, ...]]
"""Exit code, the words for a folder, what the message must name."""

TRAINING: dict[str, Case] = {
    "wrong path": (
        2,
        lambda d: ["--dataset-file", d / "no.txt"],
        ("no.txt", "no such file or folder", "Give an existing path"),
    ),
    "no suffix": (5, lambda d: ["--dataset-file", written(d, "e", "x")], ("files without a suffix", "Give .txt")),
    "empty file": (5, lambda d: ["--dataset-file", written(d, "e.txt", "")], ("e.txt", "empty", "Give data")),
    "empty folder": (5, lambda d: ["--dataset-file", d], ("no readable file", ".jsonl")),
    "only blank rows": (
        5,
        lambda d: ["--dataset-file", written(d, "b.jsonl", '\n{"text": ""}\n')],
        ("b.jsonl", "contains no text", "Give data"),
    ),
    "missing column": (
        5,
        lambda d: ["--dataset-file", written(d, "c.jsonl", '{"body": "x", "title": "y"}\n')],
        ("c.jsonl:1", "`text`", "body, title", "--text-column"),
    ),
    "missing column far down": (
        5,
        lambda d: ["--dataset-file", written(d, "c.jsonl", GOOD_ROWS + '{"body": "x"}\n')],
        ("c.jsonl:41", "`text`", "body", "--text-column"),
    ),
    "a number for a text": (
        5,
        lambda d: ["--dataset-file", written(d, "c.jsonl", GOOD_ROWS + '{"text": 3}\n')],
        ("c.jsonl:41", "a number", "--text-column"),
    ),
    "not UTF-8": (
        5,
        lambda d: ["--dataset-file", written(d, "l.txt", b"caf\xe9 " * 99)],
        ("l.txt", "byte 3", "UTF-8", "Convert"),
    ),
    "not JSON": (
        5,
        lambda d: ["--dataset-file", written(d, "j.jsonl", GOOD_ROWS + "{oops\n")],
        ("j.jsonl:41", "not JSON", "one JSON object"),
    ),
    "another suffix": (5, lambda d: ["--dataset-file", written(d, "t.xls", "x")], (".xls", "cannot be read", ".txt")),
    "puzzle out of its vocabulary": (
        5,
        lambda d: ["--dataset-file", written(d, "p.jsonl", '{"inputs": [0, 1], "labels": [1, -7]}\n')],
        ("p.jsonl", "labels", "-7"),
    ),
    "puzzles of two lengths": (
        5,
        lambda d: [
            "--dataset-file",
            written(d, "p.jsonl", '{"inputs": [0, 1], "labels": [1, 1]}\n{"inputs": [0], "labels": [1]}\n'),
        ],
        ("p.jsonl:2",),
    ),
    "heads that do not divide": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--num-heads", "5"],
        ("--num-heads 5", "--hidden-size 32"),
    ),
    "a context longer than the data": (
        2,
        lambda d: ["--dataset-file", written(d, "s.txt", "short"), "--max-seq-len", "500"],
        ("500", "--max-seq-len"),
    ),
    "a batch of 0": (2, lambda d: ["--dataset-file", text_file(d), "--batch-size", "0"], ("--batch-size 0",)),
    "a word for a number": (2, lambda d: ["--dataset-file", text_file(d), "--steps", "many"], ("--steps many",)),
    "half a step": (2, lambda d: ["--dataset-file", text_file(d), "--steps", "1.5"], ("--steps 1.5",)),
    "an unknown option": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--batchsize", "4"],
        ("--batchsize", "--batch-size"),
    ),
    "an option of a later version": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--parallel-independent"],
        ("--parallel-independent",),
    ),
    "two workers in this process": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--world-size", "2"],
        ("--world-size 2", "--launcher local", "--launcher ray"),
    ),
    "held-out puzzles for text": (
        5,
        lambda d: ["--dataset-file", text_file(d), "--eval-file", puzzle_file(d)],
        ("puzzles.safetensors", "puzzle data", "lm", "Give held-out"),
    ),
    "held-out text for puzzles": (
        5,
        lambda d: ["--dataset-file", puzzle_file(d), "--eval-file", text_file(d), *PUZZLE],
        ("corpus.txt", "lm data", "puzzle", "Give held-out"),
    ),
    "held-out puzzles of another kind": (
        5,
        lambda d: [
            *("--dataset-file", puzzle_file(d), *PUZZLE),
            *("--eval-file", written(d, "e.jsonl", '{"inputs": [0, 1], "labels": [1, 1]}\n')),
        ],
        ("e: has 2 cells", "6", "Evaluate on"),
    ),
    "held-out data that is not there": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--eval-file", d / "no.txt"],
        ("no.txt", "no such file or folder"),
    ),
    "a split that is not there": (
        5,
        lambda d: ["--dataset-file", text_file(d), "--val-split", "test"],
        ("`test`", "corpus.txt", "train"),
    ),
    "no tokenizer in this folder": (
        5,
        lambda d: ["--dataset-file", text_file(d), "--tokenizer-path", d],
        ("tokenizer",),
    ),
    "a tokenizer cut short": (
        5,
        lambda d: [
            *("--dataset-file", text_file(d)),
            *("--tokenizer-path", written(d, "tokenizer.json", '{"version": "1.0", "trunc')),
        ],
        ("tokenizer.json", "cut short"),
    ),
    "no tokenizer at this path": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--tokenizer-path", d / "no" / "such"],
        ("such", "no such file or folder"),
    ),
    "a bundle below a file": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--bundle-dir", text_file(d) / "b"],
        ("corpus.txt", "--bundle-dir"),
    ),
    "a bundle in a file's place": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--bundle-dir", written(d, "taken", "x")],
        ("taken", "a file has this name"),
    ),
    "a log below a file": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--log-file", text_file(d) / "log.jsonl"],
        ("--log-file", "corpus.txt"),
    ),
    "a log over somebody's notes": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--log-file", written(d, "notes.txt", "mine, no newline")],
        ("--log-file", "notes.txt", "not a file of metrics"),
    ),
    "a stop file that is there": (
        2,
        lambda d: ["--dataset-file", text_file(d), "--stop-file", written(d, "stop", "")],
        ("--stop-file", "already exists", "Remove it"),
    ),
    "weights that are not there": (
        2,
        lambda d: ["--dataset-file", puzzle_file(d), *PUZZLE, "--student-init", d / "no.pt"],
        ("no.pt", "no such file"),
    ),
    "a folder without weights": (
        5,
        lambda d: ["--dataset-file", puzzle_file(d), *PUZZLE, "--student-init", d],
        ("model.safetensors", "Give a bundle"),
    ),
    "weights that are no tensors": (
        5,
        lambda d: ["--dataset-file", puzzle_file(d), *PUZZLE, "--student-init", written(d, "w.pt", "no pickle")],
        ("w.pt", "not a PyTorch file"),
    ),
    "nothing to train on": (2, lambda d: [], ("--dataset-file", "nothing to train on", "data build text")),
    "a resumed run that never was": (
        2,
        lambda d: ["--resume"],
        ("contains no run", "--resume"),
    ),
    "a checkpoint that is not there": (
        2,
        lambda d: ["--resume-from", d / "b" / "checkpoints" / "step_3"],
        ("step_3", "is not a checkpoint of a bundle"),
    ),
}


@pytest.mark.parametrize("dry", [False, True], ids=["", "dry run"])
@pytest.mark.parametrize("case", TRAINING)
def test_training(case: str, dry: bool, tmp_path: Path) -> None:
    """Also as a dry run, which reads all the data; where the message needs the tokenized data, only without."""
    if dry and case == "a context longer than the data":
        pytest.skip("how many tokens there are is known only when the tokenizer is trained")
    code, words_for, naming = TRAINING[case]
    said = words_for(tmp_path)
    tiny = case.startswith(("puzzle", "a resumed", "a checkpoint")) or "--tokenizer-path" in said or PUZZLE[-2] in said
    usual = TINY if tiny else TEXT
    words = last_said([*usual, "--bundle-dir", tmp_path / "b", *said])
    before = files_below(tmp_path), entries(tmp_path)
    refused(code, "train", *words, *(["--dry-run"] if dry else []), naming=naming)
    assert (files_below(tmp_path), entries(tmp_path)) == before


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text bundle, a puzzle bundle, and what they were trained on."""
    folder = tmp_path_factory.mktemp("bundles")
    train(text_file(folder), folder / "text", *TEXT, "--steps", "2")
    train(puzzle_file(folder), folder / "puzzle", *PUZZLE, "--steps", "2")
    return folder


def copied(bundles: Path, kind: str, tmp_path: Path) -> Path:
    shutil.copytree(bundles / kind, tmp_path / kind)
    return tmp_path / kind


def test_weights_of_another_architecture(bundles: Path, tmp_path: Path) -> None:
    """Text whose vocabulary is still to be trained is checked as soon as that is done, and before the bundle is."""
    start = ("--student-init", bundles / "text")
    data = bundles / "corpus.txt"
    for words in (("--hidden-size", "64"), ("--num-layers", "4"), ("--vocab-size", "310")):
        said = last_said([*TEXT, *words, *start])
        naming = (bundles / "text", "another architecture", "Give weights")
        refused(5, "train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *said, naming=naming)
        assert entries(tmp_path) == []
    puzzle = ("train", "--dataset-file", bundles / "puzzles.safetensors", "--bundle-dir", tmp_path / "b", *PUZZLE)
    for dry in ([], ["--dry-run"]):
        refused(5, *puzzle, *start, *dry, naming=(bundles / "text", "another architecture"))
        assert entries(tmp_path) == []
    assert hrm(*puzzle, "--student-init", bundles / "puzzle", "--steps", "1").code == 0


def test_a_pickle_that_would_run_something(bundles: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
            return written_by_a_pickle, (str(tmp_path), "harm")

    torch.save({"model": Harmful()}, tmp_path / "w.pt")
    words = ("train", "--dataset-file", bundles / "puzzles.safetensors", "--bundle-dir", tmp_path / "b", *PUZZLE)
    refused(5, *words, "--student-init", tmp_path / "w.pt", naming=("w.pt", "not a PyTorch file of tensors"))
    assert entries(tmp_path) == ["w.pt"]


def written_by_a_pickle(folder: str, name: str) -> None:
    (Path(folder) / name).touch()


def test_a_bundle_of_the_other_task(bundles: Path) -> None:
    refused(5, "generate", bundles / "puzzle", "--prompt", "x", naming=("puzzle", "`hrm-ray solve`"))
    refused(5, "solve", bundles / "text", "012340", naming=("text", "`hrm-ray generate`"))


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("solve", "--file", "x.jsonl")])
def test_no_bundle(command: tuple[str, ...], tmp_path: Path) -> None:
    refused(2, command[0], tmp_path / "no", *command[1:], naming=(tmp_path / "no", "no such bundle", "Give the folder"))
    refused(5, command[0], tmp_path, *command[1:], naming=(tmp_path, "not a bundle", "Give the folder"))


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "a flipped byte of the weights": (
        "model.safetensors",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "sha256",
    ),
    "weights cut short": ("model.safetensors", lambda content: content[: len(content) // 2], "sha256"),
    "no weights": ("model.safetensors", lambda content: None, "no final weights"),
    "a configuration cut short": ("config.json", lambda content: content[:50], "JSON"),
    "a configuration of something else": ("config.json", lambda content: b'{"model_type": "bert"}', "bert"),
    "a configuration that is a list": ("config.json", lambda content: b"[]", "config.json"),
    "no metadata": ("metadata.json", lambda content: None, "no such file"),
    "metadata of something else": ("metadata.json", lambda content: b"{}", "weights_sha256"),
    "a tokenizer cut short": ("tokenizer.json", lambda content: content[:99], "cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle(damage: str, bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    name, change, reason = DAMAGES[damage]
    content = change((bundle / name).read_bytes())
    if content is None:
        (bundle / name).unlink()
    else:
        (bundle / name).write_bytes(content)
    before = files_below(bundle)
    refused(5, "generate", bundle, "--prompt", "x", naming=(bundle, reason))
    assert files_below(bundle) == before


def test_a_bundle_without_its_tokenizer(bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    (bundle / "tokenizer.json").unlink()
    ran = hrm("generate", bundle, "--prompt", "x")
    assert ran.code == 5 and len(ran.faults) == 1 and "Traceback" not in ran.err
    assert str(bundle) in ran.faults[0] and "tokenizer" in ran.faults[0]


@pytest.mark.parametrize(
    "content",
    [None, b"{", b"[]", b"{}", b'{"settings": 3, "data": {}}', b'{"settings": {"model": {"hidden_sise": 3}}}'],
)
def test_damaged_settings_of_a_run_to_resume(content: bytes | None, bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    if content is None:
        (bundle / "training_args.json").unlink()
    else:
        (bundle / "training_args.json").write_bytes(content)
    before = files_below(bundle)
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4")
    assert ran.code == (2 if content is None else 5), ran.err
    assert len(ran.faults) == 1 and "training_args.json" in ran.faults[0] and "Traceback" not in ran.err
    assert files_below(bundle) == before


@pytest.mark.parametrize("name", ["catalog.jsonl", "parts.jsonl"])
def test_damaged_data_of_a_run_to_resume(name: str, bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    path = bundle / "data" / name
    path.write_bytes(path.read_bytes()[:40] + b"\n")
    before = files_below(bundle)
    refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "4", naming=(path,))
    assert files_below(bundle) == before


def test_a_bundle_to_resume_without_its_tokenizer(bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    (bundle / "tokenizer.json").unlink()
    message = refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "4", naming=("has no tokenizer",))
    assert "Transformers" not in message


def test_a_used_name(bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    before = files_below(bundle)
    data = bundles / "corpus.txt"
    again = ("train", "--dataset-file", data, *TEXT)
    naming = (bundle, "already contains a run", "checkpoint at step 2", "--resume", "--brain-name")
    refused(2, *again, "--bundle-dir", bundle, naming=naming)
    refused(2, *again, "--bundle-dir", tmp_path, "--brain-name", "text", naming=naming)
    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine", "thesis.tex", "years of work")
    refused(2, *again, "--bundle-dir", tmp_path / "mine", naming=("mine", "not empty", "thesis.tex"))
    assert files_below(bundle) == before and entries(tmp_path / "mine") == ["thesis.tex"]


def test_a_run_without_a_checkpoint(bundles: Path, tmp_path: Path) -> None:
    bundle = copied(bundles, "text", tmp_path)
    shutil.rmtree(bundle / "checkpoints")
    refused(2, "train", "--bundle-dir", bundle, "--resume", naming=(bundle, "no checkpoint to resume from"))


def test_a_checkpoint_outside_a_bundle(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "text" / "checkpoints", tmp_path / "lost" / "checkpoints")
    words = ("train", "--resume-from", tmp_path / "lost" / "checkpoints" / "step_2", "--steps", "3")
    ran = hrm(*words)
    assert ran.code in (2, 5) and len(ran.faults) == 1 and str(tmp_path / "lost") in ran.faults[0], ran.err


def test_a_log_file_of_a_resumed_run(bundles: Path, tmp_path: Path) -> None:
    """It is appended to, also by other runs; a resume drops what it repeats, of its own alone."""
    bundle, log = tmp_path / "b", tmp_path / "log.jsonl"
    train(bundles / "corpus.txt", bundle, *TEXT, "--steps", "2", "--log-file", log)
    assert log.read_bytes() == (bundle / "metrics.jsonl").read_bytes()
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4").code == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 2, 3, 4]
    foreign = '{"loss": 3.5}'  # as another program left it, without a newline
    log.write_text(log.read_text() + foreign)
    other = tmp_path / "other"
    train(bundles / "corpus.txt", other, *TEXT, "--steps", "2", "--log-file", log)
    # Two steps after its newest checkpoint the run was killed.
    shutil.rmtree(bundle / "checkpoints" / "step_4")
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4").code == 0
    lines = log.read_text().splitlines()
    for run in (bundle, other):
        own = (run / "metrics.jsonl").read_text().splitlines()
        assert [line for line in lines if line in own] == own
    assert lines.count(foreign) == 1 and len(lines) == len(set(lines))
    assert [json.loads(line)["step"] for line in lines if line != foreign] == [1, 2, 2, 1, 2, 2, 3, 4]
    log.write_text("something else by now")
    before = files_below(tmp_path)
    refused(2, "train", "--bundle-dir", bundle, "--resume", "--steps", "5", naming=(log, "not a file of metrics"))
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("option", ["--dataset-file", "--bundle-dir", "--log-file", "--config", "--resume-from"])
def test_a_name_that_no_file_system_takes(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"--dataset-file": text_file(tmp_path), "--bundle-dir": tmp_path / "b"} | {option: "a" * 3000}
    refused(2, "train", *(word for pair in words.items() for word in pair), *TEXT, naming=("aaa", "too long"))
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can make a file")
def test_a_log_file_that_cannot_be_made(tmp_path: Path) -> None:
    command = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(4, *command, "--log-file", "/proc/x", naming=("/proc/x", "cannot be written"))
    assert not (tmp_path / "b").exists()

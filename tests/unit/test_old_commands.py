"""Command lines of the two older trainers' guides (tests/fixtures/old_commands.txt) end here as the list says."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from hrm_ray.cli import dry_run
from hrm_ray.data.bpe import train_bpe
from hrm_ray.launch import defaults, preflight
from hrm_ray.launch.named_bundles import find_checkpoint
from hrm_ray.rundir import read_json
from tests.support.runs import Ran, hrm, records, train

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "old_commands.txt"
LINES = [line.split(maxsplit=2) for line in FIXTURE.read_text("utf-8").splitlines() if line and line[0] != "#"]
COMMANDS = {place: command for _, place, command in LINES}
PROGRAMS = {
    "aios hrm-hf train-actv1": "train-actv1",
    ".venv\\Scripts\\python.exe -m aios.cli.aios hrm-hf train-actv1": "train-actv1",
    "python -m src.training.train_advanced": "train --profile train-advanced",
}
SMALL = ("--hidden-size", "32", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--threads", "1")
"""After an old line: a model that trains at once."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides' paths stand for: a text file, a tokenizer, a data set with two splits, and a bundle."""
    folder = tmp_path_factory.mktemp("assets")
    lines = [f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs.\n" for number in range(400)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "set").mkdir()
    for split, count in (("train", 400), ("validation", 40)):
        rows = [json.dumps({"text": line}) + "\n" for line in lines[:count]]
        (folder / "set" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    train_bpe(lines, 300, 400).save(folder / "tokenizer")
    words = ("--model", folder / "tokenizer", "--use-moe", "--num-experts", "4", "--d-ff", "32", "--steps", "1")
    train(folder / "text.txt", folder / "base", *SMALL, *words, "--launcher", "local")
    return folder


def words_of(place: str, assets: Path) -> list[str]:
    """An old line as the words of hrm-ray, with the reader's own paths, on a machine without a GPU."""
    command = COMMANDS[place]
    program = next(each for each in PROGRAMS if command.startswith(each))
    words = [*PROGRAMS[program].split(), *shlex.split(command.removeprefix(program))]
    own = {"--dataset-file": assets / "text.txt", "--dataset-id": assets / "set", "--model": assets / "tokenizer"}
    for number, word in enumerate(words[:-1]):
        value = words[number + 1]
        if word in own and value != "...":
            words[number + 1] = str(assets / "base" if value.endswith("base_model") else own[word])
        if word == "--cuda-ids":
            words[number : number + 2] = ["--device", "cpu"]
    return words


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fresh folder on a machine with room for everything; neither memory nor time is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 10**13)
    monkeypatch.setattr(preflight, "usable_cpus", lambda: 8)
    monkeypatch.setattr(preflight, "most_bytes", lambda settings, config: 0)
    monkeypatch.setattr(defaults, "update_s", lambda settings, config, threads: 1.0)
    monkeypatch.setattr(dry_run, "describe_memory", lambda resolved: "memory  not traced")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def ended(ran: Ran, end: str) -> bool:
    """Whether a dry run ended as the list says, with one clear message at most."""
    assert "Traceback" not in ran.err and all(len(fault) < 300 for fault in ran.faults), ran.err
    if end == "runs":
        return ran.code == 0
    if end == "planned":
        return ran.code == 2 and "not built yet" in ran.err
    return ran.code in ((2, 3) if end == "missing" else (2,)) and len(ran.faults) == 1


@pytest.mark.parametrize(("end", "place"), [(end, place) for end, place, _ in LINES])
def test_the_line_ends_as_listed(end: str, place: str, assets: Path, unmeasured: None) -> None:
    if "--load-in-4bit" in COMMANDS[place] and (find_spec("bitsandbytes") is None or find_spec("peft") is None):
        pytest.skip("bitsandbytes or peft is not installed")
    ran = hrm(*words_of(place, assets), "--dry-run")
    assert ended(ran, end), (ran.code, ran.err)


def test_both_examples_of_a_guide_share_a_log_file(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first "minimal safe example", and the run after it."""
    monkeypatch.chdir(tmp_path)
    for bundle in ("one", "two"):
        ran = hrm(*words_of("000:100", assets), *SMALL, "--num-experts", "2", "--bundle-dir", bundle)
        assert ran.code == 0, ran.err
        assert "--eval-batches 1" in ran.out, "a note"
    log = tmp_path / "artifacts" / "brains" / "actv1" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line] == [1, 1]


def test_a_bundle_as_model_gives_weights_architecture_and_the_next_expert(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*words_of("003:209", assets), "--steps", "1", "--threads", "1", "--max-seq-len", "16", "--batch-size", "2"]
    words.remove("--use-8bit-optimizer")  # loading bitsandbytes takes seconds
    for name, index in (("python_expert", 0), ("another", 1)):
        words[words.index("--expert-id") + 1] = name
        ran = hrm(*words, "--brain-name", name)
        assert ran.code == 0, ran.err
        bundle = tmp_path / "training_data" / "actv1" / name
        stored = json.loads((bundle / "training_args.json").read_text())["settings"]["model"]
        assert (stored["expert_index"], stored["num_experts"], stored["hidden_size"]) == (index, 4, 32)
        assert Path(stored["student_init"]) == assets / "base"
        assert any(f"expert {index} of every block" in event["message"] for event in records(bundle, "event"))
    # Its tokenizer alone is another option; and what is typed against the bundle is refused with both.
    data = ("--dataset-file", assets / "text.txt")
    alone = hrm("train", *data, "--tokenizer-path", assets / "base", "--dry-run")
    assert "model.student_init = (random weights)" in alone.out
    started = hrm("train", *data, "--model", assets / "base", "--resume", "false", "--dry-run")
    assert f"model.student_init = {assets / 'base'}" in started.out
    against = hrm("train", *data, "--model", assets / "base", "--hidden-size", "64", "--dry-run")
    assert against.code == 5 and len(against.faults) == 1 and "64" in against.err and "32" in against.err


def test_an_older_name_of_a_checkpoint(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = (*SMALL, "--d-ff", "32", "--vocab-size", "300", "--batch-size", "4", "--max-seq-len", "32")
    data = ("--dataset-id", assets / "set")
    ran = hrm("train", "--profile", "train-advanced", *data, *small, "--steps", "2", "--launcher", "local")
    assert ran.code == 0, ran.err
    for name in ("checkpoint_step_2", "step_2", "checkpoint-2"):
        found = find_checkpoint(Path("output_advanced") / name)
        assert found == Path("output_advanced") / "set" / "checkpoints" / "step_2"
    assert find_checkpoint(Path("output_advanced") / "checkpoint_step_3").name == "checkpoint_step_3"
    ran = hrm("train", "--resume-from", Path("output_advanced") / "checkpoint_step_2", "--steps", "3")
    assert ran.code == 0 and "at step 3" in ran.out, ran.err
    second = tmp_path / "output_advanced" / "other" / "checkpoints" / "step_2"
    second.mkdir(parents=True)
    ran = hrm("train", "--resume-from", Path("output_advanced") / "checkpoint_step_2", "--steps", "4")
    assert ran.code == 2 and "2 bundles have a checkpoint" in ran.err


def test_rows_of_a_text_file_are_lines(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that limits and offsets mean something; and a dry run refuses what the run refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "describe_memory", lambda resolved: "memory  not traced")
    words = ("train-actv1", "--model", assets / "tokenizer", "--dataset-file", assets / "text.txt", *SMALL)
    some = hrm(*words, "--max-train-examples", "30", "--dataset-start-offset", "20", "--dry-run")
    assert re.search(r"data: 30 documents are readable", some.out), some.out
    for dry in (list[str](), ["--dry-run"]):
        ran = hrm(*words, "--dataset-start-offset", "400", "--steps", "1", *dry)
        assert ran.code == 2 and "has no more rows than that" in ran.err, ran


def test_a_short_text_has_shorter_rows(tmp_path: Path) -> None:
    data = tmp_path / "short.txt"
    data.write_text("The quick brown fox jumps over the lazy dog, and again. " * 8, encoding="utf-8")
    ran = hrm(
        "train-actv1", "--dataset-file", data, *SMALL, "--d-ff", "32", "--steps", "1", "--bundle-dir", tmp_path / "b"
    )
    assert ran.code == 0, ran.err
    assert read_json(tmp_path / "b" / "config.json")["seq_len"] == 32

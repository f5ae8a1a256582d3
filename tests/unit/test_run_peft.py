"""--use-peft, --load-in-8bit and --load-in-4bit in whole runs: exact resume, what a bundle gets, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from hrm_ray.train.checkpoint import bundle_weights
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.support.runs import (
    EXPERTS,
    PUZZLE,
    TEXT,
    computed,
    files_below,
    hrm,
    puzzle_file,
    records,
    refused,
    stopping_at,
    text_file,
    train,
)

PEFT = ("--use-peft", "--lora-target-modules", "q_proj,v_proj,up_proj,down_proj")
CASES: dict[str, tuple[str, ...]] = {
    "lora": (),
    "adalora": ("--peft-method", "adalora"),
    "ia3": ("--peft-method", "ia3"),
    "loha": ("--peft-method", "loha"),
    "lokr": ("--peft-method", "lokr"),
    "lora, int8, averaged": ("--load-in-8bit", "--ema", "0.9"),
    "adalora, nf4, 8-bit optimizer": ("--peft-method", "adalora", "--load-in-4bit", "--use-8bit-optimizer"),
    "adalora, bf16": ("--peft-method", "adalora", "--model-dtype", "bf16"),
    "lora, nf4, experts": ("--load-in-4bit", *EXPERTS, "--lora-target-modules", "q_proj,o_proj"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and two trained models, of which one has experts."""
    folder = tmp_path_factory.mktemp("base")
    data = text_file(folder)
    train(data, folder / "dense", *TEXT, "--steps", "5", "--lr", "1e-2")
    train(data, folder / "experts", *TEXT, "--steps", "5", "--lr", "1e-2", *EXPERTS)
    return folder


def words_of(case: str, base: Path, data: Path) -> tuple[str, ...]:
    start = base / ("experts" if "experts" in case else "dense")
    held_out = ("--eval-file", str(data), "--eval-every", "4", "--eval-batches", "2")
    return (*TEXT, *PEFT, *CASES[case], "--student-init", str(start), *held_out, "--lr", "1e-2", "--steps", "10")


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed(case: str, base: Path, tmp_path: Path) -> None:
    """Ten steps are five and five, to the bit, dropout and ranks included; and the loss falls."""
    data = base / "corpus.txt"
    # A checkpoint tells what was trained since the one before it.
    words = (*words_of(case, base, data), "--save-every", "5")
    train(data, tmp_path / "whole", *words)
    with stopping_at(5):
        train(data, tmp_path / "resumed", *words)
    again = hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume")
    assert again.code == 0, again.err
    whole, resumed = (files_below(tmp_path / name) for name in ("whole", "resumed"))
    exact = ("checkpoints/step_10/", "model.safetensors", "best/model.safetensors", "adapter/", "best/adapter/")
    compared = [name for name in whole if name.startswith(exact)]
    assert len(compared) >= 9
    assert [name for name in compared if whole[name] != resumed[name]] == []
    assert computed(tmp_path / "whole") == computed(tmp_path / "resumed")
    assert computed(tmp_path / "whole", "eval") == computed(tmp_path / "resumed", "eval")
    losses = [record["loss"] for record in records(tmp_path / "whole")]
    assert min(losses[-3:]) < losses[0] - 0.05
    ranks = [record["adapter_rank"] for record in records(tmp_path / "whole") if "adapter_rank" in record]
    assert ranks == sorted(ranks, reverse=True) and ranks[:1] + ranks[-1:] == ([24, 16] if "adalora" in case else [])


@pytest.mark.parametrize("case", CASES)
def test_what_a_bundle_gets(case: str, base: Path, tmp_path: Path) -> None:
    """Whole weights under their plain names, which generate and which other runs start from, with the figures that the
    adapted model had; beside them the adapter. What was frozen is as it was."""
    data = base / "corpus.txt"
    words = words_of(case, base, data)
    train(data, tmp_path / "b", *words, "--halt-max-steps", "1", "--no-amp")
    bundle, start = tmp_path / "b", base / ("experts" if "experts" in case else "dense")
    merged, before = load_file(bundle / "model.safetensors"), load_file(start / "model.safetensors")
    assert merged.keys() == before.keys()
    targets = next(word for word in reversed(words) if "_proj" in word).split(",")
    quantised, narrow = "nf4" in case or "int8" in case, "bf16" in case
    for name, tensor in before.items():
        adapted = any(f".{target}." in name and "experts" not in name for target in targets)
        held = quantised and "_proj" in name
        same = torch.equal(merged[name], tensor.bfloat16() if narrow else tensor)
        # With one segment the halting head has nothing to learn.
        if not name.startswith("q_head"):
            assert same == (not (adapted or held or name.startswith("lm_head"))), name
        if held and not adapted:
            off = float((merged[name] - tensor).abs().max() / tensor.abs().max())
            assert 0.05 < off <= 0.153 if "nf4" in case else off <= 1 / 250
    for folder in (bundle, bundle / "best"):
        assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert described["modules_to_save"] == ["lm_head", "q_head"] and described["inference_mode"]
        assert described["target_modules"] == sorted(targets)
        assert hrm("generate", folder, "--prompt", "a", "--max-new-tokens", "2").code == 0
    # The merged weights, evaluated by a run of their own that does not move them.
    still = (*TEXT, *(EXPERTS if "experts" in case else ()), *(("--model-dtype", "bf16") if narrow else ()))
    still = (*still, "--steps", "1", "--lr", "1e-30", "--weight-decay", "0", "--eval-file", str(data))
    still = (*still, "--eval-batches", "2", "--halt-max-steps", "1", "--no-amp", "--student-init", str(bundle))
    train(data, tmp_path / "still", *still)
    figures = [json.loads((tmp_path / name / "metadata.json").read_text())["figures"] for name in ("b", "still")]
    # Bfloat16 rounds the merged weights anew.
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=2e-2 if narrow else 1e-5)


def test_a_checkpoint_holds_what_is_needed(base: Path, tmp_path: Path) -> None:
    """State of the optimizer and average for what is trained only; the frozen weights in their codes."""
    data = base / "corpus.txt"
    sizes: dict[str, dict[str, int]] = {}
    for case in ("lora", "lora, int8, averaged"):
        train(data, tmp_path / case, *words_of(case, base, data))
        folder = tmp_path / case / "checkpoints" / "step_10"
        state = load_file(folder / "optimizer.safetensors")
        trained = {name.rpartition("|")[0].removeprefix("model.") for name in state}
        assert trained and all("lora_" in name or name.startswith(("lm_head", "q_head")) for name in trained)
        sizes[case] = {path.name: path.stat().st_size for path in folder.iterdir()}
        if "averaged" in case:
            assert set(load_file(folder / "ema.safetensors")) == trained
            kinds = {str(t.dtype) for n, t in load_file(folder / "model.safetensors").items() if ".codes" in n}
            assert kinds == {"torch.int8"}
    # 48 KB of projections become 12 KB of codes and 3 KB of scales.
    assert sizes["lora, int8, averaged"]["model.safetensors"] < sizes["lora"]["model.safetensors"] - 100_000


def test_adapters_are_merged_on_the_leading_rank_alone() -> None:
    """Elsewhere the model need not hold whole weights, and whoever merges needs no second copy of them."""

    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} is of no use on this rank")

    parts = SimpleNamespace(strategy=Untouched(), adapters=Untouched())
    loop = SimpleNamespace(parts=parts, world=World(1, 2, torch.device("cpu"), grouped=False))
    assert bundle_weights(cast(TrainingLoop, loop)).tensors == {}


def test_settled_ranks_stay_settled(base: Path, tmp_path: Path) -> None:
    """A run of ten steps goes on to 20 and to 30: no rank comes back, and it is said each time why."""
    words = words_of("adalora", base, base / "corpus.txt")
    train(base / "corpus.txt", tmp_path / "b", *words)
    for steps in (20, 30):
        again = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", steps)
        assert again.code == 0, again.err
    ranks = [record["adapter_rank"] for record in records(tmp_path / "b") if "adapter_rank" in record]
    assert len(ranks) == 30 and ranks[0] == 24 and set(ranks[10:]) == {16}
    notes = [r["message"] for r in records(tmp_path / "b", "event") if "AdaLoRA" in r["message"]]
    assert len(notes) == 2 and all("schedule of 10 steps" in note for note in notes) and "30 steps now" in notes[1]
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume").code == 0


def test_puzzles(tmp_path: Path) -> None:
    """Carried, with a puzzle table, which keeps its own rule beside frozen weights."""
    data = puzzle_file(tmp_path)
    words = (*PUZZLE, "--puzzle-emb-ndim", "8", "--steps", "10")
    train(data, tmp_path / "base", *words)
    words = (*words, *PEFT, "--student-init", str(tmp_path / "base"))
    train(data, tmp_path / "whole", *words)
    with stopping_at(5):
        train(data, tmp_path / "resumed", *words)
    assert hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume").code == 0
    whole, resumed = (files_below(tmp_path / name / "checkpoints" / "step_10") for name in ("whole", "resumed"))
    assert whole == resumed
    assert hrm("solve", tmp_path / "whole", "--file", data).code == 0
    table = "embedding.puzzle_emb.weights"
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
    assert not torch.equal(start[table], end[table])
    assert torch.equal(start["embedding.embed_tokens.weight"], end["embedding.embed_tokens.weight"])


def test_a_plain_run_loads_neither_library(tmp_path: Path) -> None:
    words = ["train", "--dataset-file", str(text_file(tmp_path)), "--bundle-dir", str(tmp_path / "b"), *TEXT]
    script = (
        "import sys\nfrom hrm_ray.cli.main import main\n"
        f"try:\n    main({[*words, '--steps', '1']!r})\nexcept SystemExit as left:\n    assert not left.code\n"
        "print('LOADED', sorted({'peft', 'bitsandbytes', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_an_unknown_target(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--use-peft")
    known = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    refused(2, *words, "--lora-target-modules", "q_proj,query", naming=("'query' is no layer", known))
    refused(2, *words, "--lora-target-modules", "q_proj,q_proj", naming=("twice",))
    refused(2, *words, "--lora-target-modules", "q_proj,gate_proj", "--no-swiglu", naming=("gate_proj", "SwiGLU"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("library", "words", "option"),
    [
        ("peft", ("--use-peft",), "--use-peft"),
        ("bitsandbytes", ("--use-peft", "--load-in-4bit"), "--load-in-4bit"),
    ],
)
def test_a_library_that_is_missing(
    library: str, words: tuple[str, ...], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    data = text_file(tmp_path)
    run = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, *words)
    refused(3, *run, naming=(option, f"{library} is not installed", f"pip install {library}"))
    assert not (tmp_path / "b").exists()


def test_int8_needs_no_bitsandbytes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    data = base / "corpus.txt"
    start = ("--student-init", str(base / "dense"))
    train(data, tmp_path / "b", *TEXT, *PEFT, "--load-in-8bit", *start, "--steps", "2")


def test_a_random_base_is_said(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "b", *TEXT, *PEFT, "--steps", "2")
    notes = [r["message"] for r in records(tmp_path / "b", "event") if "--use-peft" in r["message"]]
    assert len(notes) == 1 and "--student-init" in notes[0] and "random" in notes[0]
    run = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "s", *TEXT, *PEFT, "--strict")
    refused(2, *run, naming=("--use-peft", "random", "--student-init"))


@pytest.mark.parametrize(
    "words", [("--lora-r", "8"), ("--peft-method", "loha"), ("--no-use-lora",), ("--load-in-8bit",)], ids=lambda w: w[0]
)
def test_a_resumed_run_keeps_its_adapters(words: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    data, bundle = base / "corpus.txt", tmp_path / "b"
    train(data, bundle, *TEXT, "--use-lora", "--student-init", str(base / "dense"), "--steps", "2")
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4", *words)
    assert ran.code == 2 and "trained with" in ran.faults[0], ran.err


def test_adalora_of_one_step_removes_ranks_at_it(base: Path, tmp_path: Path) -> None:
    """Also of a run that is resumed for more."""
    words = (*TEXT, *PEFT, "--peft-method", "adalora", "--student-init", base / "dense")
    train(base / "corpus.txt", tmp_path / "b", *words, "--steps", "1")
    train(base / "corpus.txt", tmp_path / "b", *words, "--steps", "3", "--resume")
    ranks = [record["adapter_rank"] for record in records(tmp_path / "b")]
    assert ranks[1:] == [16, 16]

"""`hrm-ray evaluate`: the figures of a run's own evaluations, for bundles, best/ and checkpoints, on any data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.rundir import RunDir
from tests.support.runs import PUZZLE, TEXT, files_below, hrm, puzzle_file, records, refused, text_file, train

NOT_FIGURES = frozenset({"kind", "step", "time_s", "best"})
LM = (*TEXT, "--eval-batches", "2", "--eval-every", "3", "--save-every", "3", "--steps", "6", "--lr", "1e-2")
CASES: dict[str, tuple[object, ...]] = {
    "text": (*LM, "--ema", "0.9"),
    "text, amp, chunks": (*LM, "--amp", "--use-chunked-training", "--chunk-size", "8"),
    "text, bf16 weights": (*LM, "--model-dtype", "bf16"),
    "puzzles": (*PUZZLE, "--eval-batches", "2", "--eval-every", "3", "--save-every", "3", "--steps", "6"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, held-out data and a bundle of each case."""
    folder = tmp_path_factory.mktemp("evaluated")
    text_file(folder, 60)
    text_file(folder, 40, name="other.txt", seed=1)
    puzzle_file(folder)
    puzzle_file(folder, 21, name="other.safetensors", seed=1)
    for case, words in CASES.items():
        kind = ("puzzles.safetensors", "other.safetensors") if case == "puzzles" else ("corpus.txt", "other.txt")
        train(folder / kind[0], folder / case, *words, "--eval-file", folder / kind[1])
    return folder


def figures(*words: object) -> list[dict[str, Any]]:
    ran = hrm("evaluate", *words, "--json", "--device", "cpu")
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def without_names(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("bundle", "step", "data")}


@pytest.mark.parametrize("case", CASES)
def test_the_figures_are_those_of_the_run(case: str, folder: Path) -> None:
    bundle = folder / case
    before = files_below(bundle)
    evaluated = records(bundle, "eval")
    by_step = {r["step"]: {n: v for n, v in r.items() if n not in NOT_FIGURES} for r in evaluated}
    best = max(r["step"] for r in evaluated if r["best"])
    checkpoint = RunDir(bundle).checkpoint(3)
    last, of_best, earlier = figures(bundle, bundle / "best", checkpoint)
    assert without_names(last) == by_step[6]
    assert without_names(of_best) == by_step[best]
    assert without_names(earlier) == by_step[3]
    assert (last["step"], of_best["step"], earlier["step"]) == (6, best, 3)
    assert files_below(bundle) == before, "nothing is written"


def test_as_many_puzzles_as_all_workers_of_the_run_read(folder: Path, tmp_path: Path) -> None:
    """Also where their number was chosen by the program. Version 0.1 did not store it."""
    bundle = RunDir(shutil.copytree(folder / "puzzles", tmp_path / "b"))
    stored = json.loads(bundle.training_args.read_text(encoding="utf-8"))
    assert stored["settings"]["cluster"]["world_size"] is None and stored["data"]["held_out_rows"] == 2 * 4
    cells = {}
    for rows in (8, 16, None):
        stored["data"]["held_out_rows"] = rows
        if rows is None:
            del stored["data"]["held_out_rows"]
        bundle.training_args.write_text(json.dumps(stored), encoding="utf-8")
        (found,) = figures(bundle.root)
        cells[rows] = found["puzzles"]
    assert cells == {8: 8, 16: 16, None: 8}


@pytest.mark.parametrize(("case", "data"), [("text", "other.txt"), ("puzzles", "other.safetensors")])
def test_other_data_and_a_limit(case: str, data: str, folder: Path) -> None:
    bundle = folder / case
    counted = "puzzles" if case == "puzzles" else "tokens"
    (everything,) = figures(bundle, "--dataset-file", folder / data)
    (some,) = figures(bundle, "--file", folder / data, "--limit", "5")
    (own,) = figures(bundle)
    assert everything[counted] > own[counted] > some[counted]
    assert everything["loss"] != own["loss"]
    (same,) = figures(bundle, "--dataset-file", folder / data, "--limit", "8")
    assert without_names(same) == pytest.approx(without_names(own), rel=1e-6)


def test_several_bundles_give_a_table(folder: Path) -> None:
    ran = hrm("evaluate", folder / "text", folder / "text" / "best", folder / "puzzles", "--device", "cpu")
    assert ran.code == 0, ran.err
    head, *rows = ran.out.splitlines()
    assert head.split()[:3] == ["bundle", "step", "loss"] and "exact_accuracy" in head
    assert [row.split()[-1] for row in rows] != []
    assert len(rows) == 3 and rows[0].startswith(str(folder / "text"))
    alone = hrm("evaluate", folder / "text", "--device", "cpu").out
    assert "step 6, on" in alone and "other.txt" in alone and "perplexity" in alone


def test_other_data_is_evaluated_on_its_test_split(folder: Path, tmp_path: Path) -> None:
    """Where it has one: the run may have trained on the rest."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        text_file(tmp_path / split, 30, seed=len(split))
    (found,) = figures(folder / "text", "--dataset-file", tmp_path)
    assert found["data"] == f"{tmp_path}:test"
    (named,) = figures(folder / "text", "--dataset-file", tmp_path, "--split", "train")
    assert named["data"] == f"{tmp_path}:train" and named["loss"] != found["loss"]


def test_what_cannot_be_evaluated(folder: Path, tmp_path: Path) -> None:
    device = ("--device", "cpu")
    refused(2, "evaluate", tmp_path / "none", *device, naming=("none", "no such bundle"))
    refused(5, "evaluate", folder / "text", "--file", folder / "other.safetensors", *device, naming=("puzzles", "text"))
    refused(5, "evaluate", folder / "puzzles", "--file", folder / "other.txt", *device, naming=("other.txt", "text"))
    refused(2, "evaluate", folder / "text", "--split", "test", *device, naming=("--split test", "--dataset-file"))
    copy = shutil.copytree(folder / "text" / "best", tmp_path / "best")
    refused(2, "evaluate", copy, *device, naming=(copy, "held-out documents", "--dataset-file"))
    (copy / "model.safetensors").write_bytes(b"cut")
    refused(5, "evaluate", copy, *device, naming=("model.safetensors", "sha256"))
    bundle = tmp_path / "without"
    train(folder / "corpus.txt", bundle, *TEXT, "--steps", "1")
    refused(2, "evaluate", bundle, *device, naming=(bundle, "no held-out data", "--dataset-file"))

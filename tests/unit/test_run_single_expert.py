"""Training one expert of a bundle: what moves, what does not, and what is stored of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from hrm_ray.bundle import expert_store
from hrm_ray.model.build import build_objective
from hrm_ray.model.transforms.single_expert import train_single_expert
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.strategies.single import SingleStrategy
from tests.support.runs import (
    EXPERTS,
    PUZZLE,
    TEXT,
    files_below,
    hrm,
    last_said,
    puzzle_file,
    records,
    refused,
    stopping_at,
    text_file,
    train,
)
from tests.support.tiny_models import backward_all, puzzle_batch, text_batch, tiny_config, tiny_model

INDEX = 2


def words_for(kind: str) -> tuple[str, ...]:
    more = ("--puzzle-emb-ndim", "4") if kind == "puzzle" else ()
    return (*(PUZZLE if kind == "puzzle" else TEXT), *EXPERTS, *more)


@pytest.fixture(scope="module", params=["text", "puzzle"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with data, held-out data, the base bundle, and the run of an expert `first` in it."""
    folder = tmp_path_factory.mktemp("single")
    kind = request.param
    make, name = (puzzle_file, "puzzles") if kind == "puzzle" else (text_file, "corpus")
    data = make(folder)
    make(folder, name=f"held_out{data.suffix}", seed=1)
    train(data, folder / "base", *words_for(kind), "--steps", "4", "--lr", "1e-3")
    shutil.copyfile(data, folder / f"again{data.suffix}")
    assert name in data.name
    run_expert(kind, folder, "first", "--steps", "6", "--save-every", "2")
    return kind, folder


def run_expert(kind: str, folder: Path, identifier: str, *more: object) -> None:
    data = folder / ("again.safetensors" if kind == "puzzle" else "again.txt")
    held_out = folder / f"held_out{data.suffix}"
    words = [*words_for(kind), "--student-init", folder / "base", "--expert-id", identifier, "--expert-index", INDEX]
    words += ["--experts-dir", folder / "experts", "--eval-file", held_out, "--lr", "1e-3", "--weight-decay", "0.5"]
    train(data, folder / identifier, *words, *more)


def registry(folder: Path) -> dict[str, Any]:
    experts: dict[str, Any] = json.loads((folder / "experts" / "registry.json").read_text())["experts"]
    return experts


def assert_only_the_expert_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    stacks = [name for name in before if ".mlp.experts." in name]
    assert len(stacks) == 6
    for name, tensor in before.items():
        if name not in stacks:
            assert torch.equal(tensor, after[name]), name
            continue
        for expert in range(4):
            assert torch.equal(tensor[expert], after[name][expert]) == (expert != INDEX), (name, expert)


def test_everything_else_is_what_it_was_to_the_bit(made: tuple[str, Path]) -> None:
    _, folder = made
    base = load_file(folder / "base" / "model.safetensors")
    assert_only_the_expert_moved(base, load_file(folder / "first" / "model.safetensors"))
    assert_only_the_expert_moved(base, load_file(folder / "first" / "checkpoints" / "step_4" / "model.safetensors"))


def test_frozen_weights_have_no_optimizer_state(made: tuple[str, Path]) -> None:
    state = load_file(made[1] / "first" / "checkpoints" / "step_6" / "optimizer.safetensors")
    assert len({name.rpartition("|")[0] for name in state}) == 6
    for name, tensor in state.items():
        assert ".mlp.experts." in name and tensor.shape in ((), (32, 32)), name


def test_what_is_stored(made: tuple[str, Path]) -> None:
    kind, folder = made
    entry = registry(folder)["first"]
    stored = load_file(folder / "experts" / "first" / "expert.safetensors")
    final = load_file(folder / "first" / "model.safetensors")
    assert stored.keys() == {name for name in final if ".mlp.experts." in name}
    assert all(torch.equal(tensor, final[name][INDEX]) for name, tensor in stored.items())
    metadata = json.loads((folder / "base" / "metadata.json").read_text())
    assert entry["base"] == str(folder / "base") and entry["base_sha256"] == metadata["weights_sha256"]
    assert (entry["index"], entry["step"], entry["bundle"]) == (INDEX, 6, str(folder / "first"))
    evaluated = records(folder / "first", "eval")
    assert [record["step"] for record in evaluated] == [0, 6]
    assert entry["before"]["loss"] == evaluated[0]["loss"] and entry["after"]["loss"] == evaluated[1]["loss"]
    assert entry["before"] != entry["after"]
    assert any("stored in" in event["message"] for event in records(folder / "first", "event"))
    name = "exact_accuracy" if kind == "puzzle" else "loss"
    shown = hrm("expert", "list", "--experts-dir", folder / "experts")
    assert shown.code == 0 and "first" in shown.out
    assert f"{name} {entry['before'][name]:.4g} -> {entry['after'][name]:.4g}" in shown.out
    told = hrm("expert", "list", "--experts-dir", folder / "experts", "--json")
    assert json.loads(told.out)["first"] == entry


def test_a_resumed_run_is_the_same_run(made: tuple[str, Path]) -> None:
    """Stopped at step 4 and resumed where the base is gone: the same expert, the figures of before among its entry."""
    kind, folder = made
    with stopping_at(4):
        run_expert(kind, folder, "second", "--steps", "6", "--save-every", "2")
    assert "second" not in registry(folder), "a run that was stopped has not ended"
    (folder / "base").rename(folder / "gone")
    try:
        ran = hrm("train", "--bundle-dir", folder / "second", "--resume")
    finally:
        (folder / "gone").rename(folder / "base")
    assert ran.code == 0, ran.err
    one, two = registry(folder)["first"], registry(folder)["second"]
    same = ("index", "base", "base_sha256", "step", "before", "after", "model_config")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    stored = [load_file(folder / "experts" / name / "expert.safetensors") for name in ("first", "second")]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    ran = hrm("train", "--bundle-dir", folder / "second", "--resume", "--steps", "7")
    assert ran.code == 0, ran.err
    assert registry(folder)["second"]["step"] == 7, "its own run may store it again"


def test_put_back(made: tuple[str, Path]) -> None:
    """Into the bundle it comes from it gives the run's own model, to the bit; the old bundle stays as it was."""
    kind, folder = made
    before = files_below(folder / "base")
    out = folder / "put"
    ran = hrm("expert", "put", "first", "--into", folder / "base", "--out", out, "--experts-dir", folder / "experts")
    assert ran.code == 0 and "note" not in ran.err, ran.err
    assert files_below(folder / "base") == before
    ours, theirs = load_file(out / "model.safetensors"), load_file(folder / "first" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    about = json.loads((out / "metadata.json").read_text())["expert"]
    assert about["id"] == "first" and about["index"] == INDEX
    if kind == "puzzle":
        used = hrm("solve", out, "--file", folder / "puzzles.safetensors", "--split", "train")
    else:
        used = hrm("generate", out, "--prompt", "abc", "--max-new-tokens", "3")
    assert used.code == 0, used.err
    # Into another model of the same architecture it goes with a note.
    ran = hrm("expert", "put", "first", "--into", out, "--out", folder / "put2", "--experts-dir", folder / "experts")
    assert ran.code == 0 and "note: first was trained in" in ran.err


def test_refusals_of_put(made: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = made
    experts = shutil.copytree(folder / "experts", tmp_path / "experts")
    put = ("expert", "put", "first", "--experts-dir", experts, "--out", tmp_path / "out", "--into")
    unknown = ("expert", "put", "fist", "--experts-dir", experts, "--out", tmp_path / "out", "--into", folder / "base")
    refused(2, *unknown, naming=("fist", "The nearest is first"))
    refused(2, *put, tmp_path / "none", naming=(tmp_path / "none",))
    data = folder / ("puzzles.safetensors" if kind == "puzzle" else "corpus.txt")
    train(data, tmp_path / "other", *words_for(kind), "--steps", "1", "--num-experts", "3")
    refused(5, *put, tmp_path / "other", naming=("num_experts 4, not 3", "same architecture"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refused(2, *put, folder / "base", naming=("mine", "--out"))
    path = experts / "first" / "expert.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(5, *put, folder / "base", naming=(path, "sha256"))
    (experts / "registry.json").write_text('{"experts": {"first": {}}}')
    refused(5, *put, folder / "base", naming=("registry.json",))
    refused(5, "expert", "list", "--experts-dir", experts, naming=("registry.json",))


def test_refusals_of_training(made: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = made
    data = folder / ("puzzles.safetensors" if kind == "puzzle" else "corpus.txt")
    usual = last_said((*words_for(kind), "--expert-index", INDEX, "--experts-dir", folder / "experts"))
    words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *usual)
    base = ("--student-init", folder / "base")
    refused(2, *words, *base, "--expert-id", "first", naming=("--expert-id first", folder / "first"))
    other = [word if word != "4" or usual[place - 1] != "--num-experts" else "5" for place, word in enumerate(usual)]
    wrong = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *other, *base, "--expert-id", "new")
    refused(5, *wrong, naming=(folder / "base", "num_experts 4, not 5", "model options"))
    refused(5, *words, "--student-init", data, "--expert-id", "new", naming=(data,))
    for name in ("a/b", "a\\b", "..", "registry.json", "Registry.json", "registry.json.lock"):
        refused(2, *words, *base, "--expert-id", name, naming=(f"--expert-id {name}",))
    assert not (tmp_path / "b").exists()


def test_a_place_that_is_no_folder(made: tuple[str, Path], tmp_path: Path) -> None:
    """Found before anything is trained, also where a run is resumed."""
    kind, folder = made
    data = folder / ("puzzles.safetensors" if kind == "puzzle" else "corpus.txt")
    file = tmp_path / "file"
    file.touch()
    words = (*words_for(kind), "--student-init", folder / "base", "--expert-index", "0")
    words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *last_said(words))
    for place in (file, file / "below"):
        naming = (f"--experts-dir {place}", "is a file, not a folder")
        refused(2, *words, "--expert-id", "e", "--experts-dir", place, naming=naming)
        resumed = ("train", "--bundle-dir", folder / "first", "--resume", "--steps", "7", "--experts-dir", place)
        refused(2, *resumed, naming=naming)
        refused(2, "expert", "list", "--experts-dir", place, naming=naming)
    refused(2, "expert", "list", "--experts-dir", tmp_path / "none", naming=("none", "there is no such folder"))
    naming = ("--expert-id file", f"{file} is a file")
    refused(2, *words, "--experts-dir", tmp_path, "--expert-id", "file", naming=naming)
    assert not (tmp_path / "b").exists()


def test_the_vocabulary_is_the_one_that_comes_out(tmp_path: Path) -> None:
    """A corpus that has fewer tokens than are asked for: the same words train a base and an expert of it. Another
    corpus has another vocabulary, which is found once it is known."""
    words = (*last_said((*TEXT, *EXPERTS, "--vocab-size", "600")), "--steps", "1")
    data = text_file(tmp_path)
    train(data, tmp_path / "base", *words)
    there = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    assert there < 600
    expert = (*words, "--student-init", tmp_path / "base", "--expert-id", "e", "--expert-index", "0")
    expert = (*expert, "--experts-dir", tmp_path / "experts")
    train(data, tmp_path / "b", *expert)
    assert "e" in registry(tmp_path)
    other = ("train", "--dataset-file", text_file(tmp_path, name="other.txt", rows=9), "--bundle-dir", tmp_path / "c")
    refused(5, *other, *last_said((*expert, "--expert-id", "f")), naming=("embed_tokens", f"[{there}, 32]"))
    assert not (tmp_path / "c").exists()


def test_without_held_out_data_there_are_no_figures(made: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = made
    data = folder / ("puzzles.safetensors" if kind == "puzzle" else "corpus.txt")
    words = (*words_for(kind), "--student-init", folder / "base", "--expert-id", "e", "--expert-index", "0")
    train(data, tmp_path / "b", *words, "--experts-dir", tmp_path / "experts", "--steps", "1")
    entry = registry(tmp_path)["e"]
    assert entry["before"] is None and entry["after"] is None
    assert "not evaluated" in hrm("expert", "list", "--experts-dir", tmp_path / "experts").out


def test_no_experts_yet(tmp_path: Path) -> None:
    ran = hrm("expert", "list", "--experts-dir", tmp_path)
    assert ran.code == 0 and "no experts" in ran.out
    put = ("expert", "put", "a", "--into", tmp_path, "--out", tmp_path / "o", "--experts-dir", tmp_path)
    refused(2, *put, naming=("a", "--expert-id"))


@pytest.mark.parametrize("mode", ["text", "transformer", "segment", "one update"])
def test_gradients_are_those_of_the_whole_model(mode: str) -> None:
    """What one expert gets when all else is frozen is what it gets when nothing is, to the bit."""
    arch: dict[str, Any] = {"arch": "transformer", "halt_max_steps": 1} if mode == "transformer" else {"bp_steps": 4}
    arch = {"bp_steps": 1} if mode == "one update" else arch
    task = "puzzle" if mode == "segment" else "lm"
    config = tiny_config(
        task=task, num_experts=4, moe_capacity_factor=0.8, puzzle_emb_ndim=8 * (task == "puzzle"), **arch
    )
    batch = puzzle_batch(1, 3, config) if task == "puzzle" else text_batch(1, [[12], [5, 7]])
    found = []
    for single in (False, True):
        model = tiny_model(config)
        names = set(model.state_dict())
        if single:
            train_single_expert(model, INDEX)
            assert set(model.state_dict()) == names
        supervision = "segment" if task == "puzzle" else "rollout"
        objective = build_objective(model, "softmax", supervision=supervision, halt_margin=0.01).train()
        backward_all(objective, batch)
        found.append({name: p.grad for name, p in model.named_parameters()})
        if single and task == "puzzle":
            table = model.embedding.puzzle_emb
            assert table is not None and not table.taken
    whole, alone = found
    trained = {name: gradient for name, gradient in alone.items() if gradient is not None}
    assert trained.keys() == {name for name in alone if name.endswith(".own")} and len(trained) in (3, 6)
    for name, gradient in trained.items():
        stack = whole[name.removesuffix("own") + "weight"]
        assert stack is not None and torch.equal(gradient, stack[INDEX]), name


def test_the_parameter_and_its_stack_stay_one() -> None:
    """Updated in place, moved, loaded: the stack holds what the parameter is, and a stack apart from it is no model."""
    model = tiny_model(tiny_config(num_experts=4))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_single_expert(model, INDEX)
    name = "H_level.layers.0.mlp.experts.up_proj"
    projection = model.get_submodule(name)
    with torch.no_grad():
        projection.own.add_(1.0)  # type: ignore[operator, union-attr]
    moved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert torch.equal(moved[f"{name}.weight"][INDEX], state[f"{name}.weight"][INDEX] + 1)
    model.to(torch.float64)
    with torch.no_grad():
        projection.own.add_(1.0)  # type: ignore[operator, union-attr]
    assert torch.equal(model.state_dict()[f"{name}.weight"][INDEX], moved[f"{name}.weight"][INDEX].double() + 1)
    model.to(torch.float32).load_state_dict(state)
    assert torch.equal(projection.own, state[f"{name}.weight"][INDEX])  # type: ignore[arg-type]
    projection.own.data = torch.zeros_like(projection.own)  # type: ignore[arg-type, union-attr]
    with pytest.raises(RuntimeError, match="no longer shares the memory"):
        model.state_dict()


def test_an_average_of_the_expert_alone(made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With --ema the bundle holds the average in its place, and the rest as it was."""
    kind, folder = made
    loops: list[TrainingLoop] = []
    genuine = TrainingLoop.__init__

    def listening(loop: TrainingLoop, *words: Any, **named: Any) -> None:
        genuine(loop, *words, **named)
        loops.append(loop)

    monkeypatch.setattr(TrainingLoop, "__init__", listening)
    run_expert(kind, folder, "averaged", "--steps", "3", "--ema", "0.5")
    strategy = loops[-1].parts.strategy
    assert isinstance(strategy, SingleStrategy)
    ema = strategy.average
    assert ema is not None and len(ema.average) == 6
    final = load_file(folder / "averaged" / "model.safetensors")
    assert_only_the_expert_moved(load_file(folder / "base" / "model.safetensors"), final)
    for name, average in ema.average.items():
        assert torch.equal(final[name.removesuffix("own") + "weight"][INDEX], average), name


def test_two_writers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds the registry locked says so after a while; a lock file that a killed run left is no lock."""
    entry = {"index": 0, "model_config": {}, "base": "b", "base_sha256": "s", "bundle": "c", "step": 1}
    entry |= {"before": None, "after": None}
    tensors = {"a.mlp.experts.up_proj.weight": torch.ones(2, 2)}
    expert_store.store_expert(tmp_path, "one", entry, tensors)
    lock = tmp_path / "registry.json.lock"
    lock.touch()
    expert_store.store_expert(tmp_path, "two", entry, tensors)
    monkeypatch.setattr(expert_store, "_LOCK_TIMEOUT_S", 0)
    with FileLock(lock), pytest.raises(expert_store.ResourceError, match=r"registry\.json\.lock"):
        expert_store.store_expert(tmp_path, "three", entry, tensors)
    assert set(expert_store.read_registry(tmp_path)) == {"one", "two"}

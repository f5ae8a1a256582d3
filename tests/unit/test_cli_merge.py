"""`hrm-ray merge`: what it writes, what it refuses by name, and the comparison on held-out data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm_ray.bundle.store import open_bundle, save_copy
from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.rundir import RunDir
from tests.support.runs import EXPERTS, PUZZLE, TEXT, files_below, hrm, puzzle_file, refused, text_file, train

Change = Callable[[dict[str, Tensor]], None]


def variant(source: Path, out: Path, change: Change) -> Path:
    """A bundle as `source` with other weights, as if it had been trained further."""
    tensors = load_file(RunDir(source).weights)
    change(tensors)
    save_copy(RunDir(source), out, lambda path: save_tensors(tensors, path))
    return out


def moved(seed: int) -> Change:
    """Every trained tensor, moved by small random numbers."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            if not name.endswith("_init"):
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

    return change


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: start, a and b that come from it, others that do not fit it."""
    folder = tmp_path_factory.mktemp("merged")
    corpus = text_file(folder)
    train(corpus, folder / "start", *TEXT, *EXPERTS, "--steps", "1")
    train(corpus, folder / "plain", *TEXT, "--arch", "transformer", "--steps", "1")
    train(text_file(folder, name="x.txt", seed=3), folder / "words", *TEXT, *EXPERTS, "--steps", "1", "--seed", "7")
    train(puzzle_file(folder), folder / "puzzle", *PUZZLE, "--steps", "1", "--puzzle-emb-ndim", "8")
    for name, seed in (("a", 1), ("b", 2)):
        variant(folder / "start", folder / name, moved(seed))
    variant(folder / "start", folder / "foreign", lambda tensors: tensors["H_init"].add_(1))
    return folder


def merge(*words: object) -> str:
    ran = hrm("merge", *words)
    assert ran.code == 0, ran.err
    return ran.out


def weights(bundle: Path) -> dict[str, Tensor]:
    return load_file(RunDir(bundle).weights)


def test_the_result_is_a_whole_bundle_with_the_weighted_mean(folder: Path, tmp_path: Path) -> None:
    before = {name: files_below(folder / name) for name in ("a", "b")}
    out = tmp_path / "out"
    said = merge(folder / "a", folder / "b", "--weights", "3,1", "--out", out)
    assert "0.75" in said and str(folder / "b") in said
    one, two, result = weights(folder / "a"), weights(folder / "b"), weights(out)
    for name in one:
        torch.testing.assert_close(result[name], 0.75 * one[name] + 0.25 * two[name], rtol=1e-5, atol=1e-6)
    open_bundle(out, torch.device("cpu"))
    about = json.loads(RunDir(out).metadata.read_text(encoding="utf-8"))["merged"]
    assert [member["share"] for member in about["members"]] == [0.75, 0.25] and about["base"] is None
    assert hrm("generate", out, "--prompt", "ab", "--max-new-tokens", "2", "--device", "cpu").code == 0
    listed = json.loads(hrm("runs", out, "--json").out)
    assert (listed["state"], listed["damage"]) == ("merged", None)
    assert {name: files_below(folder / name) for name in ("a", "b")} == before


def test_a_base_lets_experts_count_for_those_who_trained_them(folder: Path, tmp_path: Path) -> None:
    stack = next(name for name in weights(folder / "start") if ".mlp.experts." in name)

    def train_expert(index: int) -> Change:
        return lambda tensors: tensors[stack][index].add_(2.0)

    one, two = (variant(folder / "start", tmp_path / str(k), train_expert(k)) for k in range(2))
    ran = hrm("merge", one, two, "--out", tmp_path / "mean")
    assert ran.code == 0 and "experts are plain means" in ran.err
    said = hrm("merge", one, two, "--out", tmp_path / "based", "--base", folder / "start")
    assert said.code == 0 and said.err == ""
    start = weights(folder / "start")[stack]
    for name, steps in (("mean", (1, 1, 0, 0)), ("based", (2, 2, 0, 0))):
        change = weights(tmp_path / name)[stack] - start
        assert [round(float(row.mean()), 4) for row in change] == list(steps)


def test_files_of_weights(folder: Path, tmp_path: Path) -> None:
    files = [shutil.copyfile(RunDir(folder / name).weights, tmp_path / f"{name}.safetensors") for name in "ab"]
    out = tmp_path / "out.safetensors"
    found = json.loads(merge(*files, "--out", out, "--json"))
    assert [member["share"] for member in found["members"]] == [0.5, 0.5] and found["members"][1]["distance"] > 0
    mixed = tmp_path / "mixed"
    merge(files[0], folder / "b", "--out", mixed)
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, weights(mixed)[name])
    refused(2, "merge", *files, "--out", out, naming=("--out", "there is such a file", "--overwrite"))
    merge(*files, "--out", out, "--overwrite", "--weights", "1,3")
    assert not torch.equal(load_file(out)["lm_head.weight"], weights(mixed)["lm_head.weight"])
    refused(2, "merge", *files, "--out", tmp_path / "x", naming=("no member is a bundle", "NAME.safetensors"))


def test_adapters_in_files_say_what_averaging_them_leaves_out(tmp_path: Path) -> None:
    names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    for k in range(2):
        generator = torch.Generator().manual_seed(k)
        tree = {names[0]: torch.randn(2, 6, generator=generator), names[1]: torch.randn(5, 2, generator=generator)}
        save_file(tree, tmp_path / f"{k}.safetensors")
    files, out = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors"
    refused(5, "merge", *files, "--out", out, naming=(files[1], "may not come from the start", "--force"))
    assert "averaging A and B apart leaves out" in merge(*files, "--out", out, "--force")
    save_file({names[0]: torch.zeros(3, 6), names[1]: torch.zeros(5, 3)}, files[1])
    refused(5, "merge", *files, "--out", tmp_path / "x.safetensors", naming=(files[1], "has shape [3, 6], not [2, 6]"))


def test_another_start_needs_force(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("merge", folder / "a", folder / "foreign", "--out", out)
    refused(5, *words, naming=(folder / "foreign", "not trained from the start", "H_init", "--force"))
    refused(5, "merge", folder / "a", folder / "b", "--base", folder / "foreign", "--out", out, naming=("H_init",))
    assert not out.exists()
    ran = hrm(*words, "--force")
    assert ran.code == 0 and "check the result on held-out data" in ran.err
    assert torch.equal(weights(out)["H_init"], weights(folder / "a")["H_init"])
    assert json.loads(RunDir(out).metadata.read_text(encoding="utf-8"))["merged"]["forced"] is True


def test_a_model_without_initial_states_is_told_by_its_runs_settings(folder: Path, tmp_path: Path) -> None:
    plain = folder / "plain"
    same = variant(plain, tmp_path / "same", moved(1))
    merge(plain, same, "--out", tmp_path / "out")
    stored = json.loads(RunDir(same).training_args.read_text(encoding="utf-8"))
    stored["settings"]["run"]["seed"] = 11
    RunDir(same).training_args.write_text(json.dumps(stored), encoding="utf-8")
    refused(5, "merge", plain, same, "--out", tmp_path / "x", naming=(same, "--seed differs"))
    file = RunDir(same).weights
    refused(5, "merge", plain, file, "--out", tmp_path / "x", naming=(file, "may not come from the start"))


def test_what_cannot_be_merged_is_named_and_nothing_is_made(folder: Path, tmp_path: Path) -> None:
    a, out = folder / "a", tmp_path / "out"
    tensors = weights(a)

    def file(name: str, **changes: Tensor) -> Path:
        save_file({**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}, tmp_path / name)
        return tmp_path / name

    torch.save(tensors, tmp_path / "weights.pt")
    damaged = shutil.copytree(a, tmp_path / "damaged")
    with RunDir(damaged).weights.open("ab") as stream:
        stream.write(b"x")
    head = tensors["lm_head.weight"]
    cases: dict[Path, tuple[int, tuple[str, ...]]] = {
        folder / "puzzle": (5, ("another architecture", "task")),
        folder / "words": (5, ("another tokenizer",)),
        damaged: (5, ("sha256 differs",)),
        tmp_path / "weights.pt": (5, ("file of another kind",)),
        tmp_path / "absent": (2, ("no such file or folder",)),
        file("nan.safetensors", lm_head__weight=head * torch.nan): (5, ("not finite",)),
        file("q.safetensors", lm_head__weight__absmax=torch.zeros(1)): (5, ("quantised", "absmax")),
        file("int.safetensors", lm_head__weight=head.to(torch.int8)): (5, ("quantised", "lm_head.weight")),
        file("f8.safetensors", lm_head__weight=head.to(torch.float8_e4m3fn)): (5, ("F8_E4M3",)),
        file("shape.safetensors", lm_head__weight=head[:5].clone()): (5, ("lm_head.weight has shape",)),
        file("more.safetensors", other=torch.zeros(1)): (5, ("other is not in that",)),
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for member, (code, naming) in cases.items():
        message = refused(code, "merge", a, member, "--out", out, naming=(member, *naming))
        assert len(message.replace(str(folder), "").replace(str(tmp_path), "")) < 300
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (("a",), ("two members",)),
        (("a", "a"), ("is given twice",)),
        (("a", "b", "--weights", "1"), ("--weights 1", "1 weights for 2 members")),
        (("a", "b", "--weights", "1,x"), ("--weights 1,x", "not a list of numbers")),
        (("a", "b", "--weights", "1,0"), ("--weights 1,0", "above 0")),
        (("a", "b", "--weights", "1,nan"), ("--weights 1,nan", "above 0")),
        (("a", "b", "--weights", "1e308,1e308"), ("--weights 1e+308,1e+308", "finite")),
        (("a", "b", "--base", "a"), ("--base", "is a member too")),
        (("a", "b", "--limit", "3"), ("--limit 3", "--dataset-file")),
        (("a", "b", "--dataset-file", "absent.txt"), ("absent.txt", "no such file")),
        (("a", "b", "--dataset-file", "puzzles.safetensors"), ("puzzles.safetensors", "contains puzzles")),
    ],
)
def test_wrong_use(words: tuple[str, ...], naming: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    names = {"a", "b", "absent.txt", "puzzles.safetensors"}
    placed = [folder / word if word in names else word for word in words]
    code = 5 if "puzzles.safetensors" in words else 2
    refused(code, "merge", *placed, "--out", tmp_path / "out", naming=naming)
    assert list(tmp_path.iterdir()) == []


def test_where_the_result_goes(folder: Path, tmp_path: Path) -> None:
    members = (folder / "a", folder / "b")
    for place in (folder / "a", folder / "a" / "inside", folder):
        refused(2, "merge", *members, "--out", place, "--overwrite", naming=("--out", "contains or lies in"))
    out = tmp_path / "out"
    merge(*members, "--out", out)
    first = files_below(out)
    refused(2, "merge", *members, "--out", out, naming=(out, "not empty", "--overwrite"))
    assert files_below(out) == first
    merge(*members, "--out", out, "--overwrite", "--weights", "1,2")
    assert files_below(out).keys() == first.keys() and files_below(out) != first
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    refused(2, "merge", *members, "--out", out, "--overwrite", naming=("notes.txt",))


def test_a_full_disk_leaves_an_earlier_result(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, out = (folder / "a", folder / "b"), tmp_path / "out"
    merge(*members, "--out", out)
    before = files_below(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hrm_ray.merging.tensor_file.TensorWriter._write", full)
    refused(4, "merge", *members, "--out", out, "--overwrite", naming=("No space left",))
    assert files_below(tmp_path) == before


def test_members_and_result_are_compared_on_held_out_data(folder: Path, tmp_path: Path) -> None:
    words = ("--dataset-file", folder / "x.txt", "--limit", "4", "--device", "cpu")
    said = merge(folder / "a", folder / "b", "--out", tmp_path / "out", *words)
    table = [line.split()[0] for line in said.splitlines() if line.startswith(str(folder.anchor))]
    assert table[-3:] == [str(folder / "a"), str(folder / "b"), str(tmp_path / "out")]
    # Between the start and a broken member the mean is worse than the start, and it is said.
    broken = variant(folder / "start", tmp_path / "broken", lambda tensors: tensors["lm_head.weight"].mul_(300))
    ran = hrm("merge", folder / "start", broken, "--out", tmp_path / "worse", "--json", *words)
    losses = [one["loss"] for one in json.loads(ran.out)["evaluations"]]
    assert losses[0] < losses[2] and "higher held-out loss" in ran.err and str(folder / "start") in ran.err


def test_puzzle_rows(folder: Path, tmp_path: Path) -> None:
    start = folder / "puzzle"
    table = next(name for name in weights(start) if "puzzle_emb" in name)
    one, two = (
        variant(start, tmp_path / str(row), lambda tensors, row=row: tensors[table][row].add_(1.0)) for row in range(2)
    )
    out = tmp_path / "out"
    merge(one, two, "--base", start, "--out", out)
    change = weights(out)[table] - weights(start)[table]
    assert [round(float(row.mean()), 5) for row in change] == [1, 1, *[0] * (len(change) - 2)]
    assert hrm("solve", out, "--file", folder / "puzzles.safetensors", "--limit", "1", "--device", "cpu").code == 0
    stored = json.loads(RunDir(two).puzzle.read_text(encoding="utf-8"))
    RunDir(two).puzzle.write_text(json.dumps({**stored, "symbols": ["x", *stored["symbols"][1:]]}), encoding="utf-8")
    refused(5, "merge", one, two, "--out", tmp_path / "y", naming=(two, "another puzzle set"))

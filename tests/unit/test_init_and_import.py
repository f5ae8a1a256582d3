"""Starting weights, and weights that come from the original HRM."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_ray.bundle.start_weights import start_weights
from hrm_ray.bundle.weights_file import fill_module, save_tensors
from hrm_ray.errors import DataError, SettingsError
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model
from hrm_ray.model.import_reference import bare_name, from_reference, looks_like_reference, split_fused
from hrm_ray.model.initialise import truncated_normal_
from hrm_ray.model.puzzle_objective import PuzzleObjective
from tests.support.fixtures import DEFAULT_FOLDER, Fixture
from tests.support.tiny_models import tiny_config


@pytest.mark.parametrize("std", [0.02, 1.0, 7.0])
def test_truncated_normal_has_the_deviation_asked_for(std: float) -> None:
    """200 000 values: the deviation's own error is about 0.15 %, so 1 % is over 6 sigma; cut where 2 sigma were before
    the rescaling."""
    values = truncated_normal_(torch.empty(200_000), std, torch.Generator().manual_seed(1))
    bound = 2 * std / 0.8796256610342398
    assert float(values.std()) == pytest.approx(std, rel=0.01)
    assert float(values.mean()) == pytest.approx(0, abs=0.012 * std)
    assert float(values.abs().max()) <= bound * (1 + 1e-6)
    assert float(values.abs().max()) > 0.99 * bound
    # A normal cut at 2: P(|x| < 1 | |x| < 2) = 0.6827 / 0.9545.
    inside = float((values.abs() < bound / 2).double().mean())
    assert inside == pytest.approx(0.682689 / 0.954500, abs=0.005)


def test_truncated_normal_of_deviation_zero() -> None:
    assert not truncated_normal_(torch.ones(5), 0.0, torch.Generator().manual_seed(1)).any()


@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_scales_of_the_starting_weights(arch: str, positions: str) -> None:
    """1/sqrt(fan in) for linear maps, 1/sqrt(D) for embeddings, 1 for the initial states; the halting head -5 and 0."""
    config = tiny_config(
        arch=arch,
        pos_encodings=positions,
        hidden_size=64,
        intermediate_size=96,
        vocab_size=256,
        seq_len=128,
        halt_rule="none",
    )
    model = build_model(config)
    model.initialise(3)
    for name, parameter in model.named_parameters():
        if name == "q_head.bias":
            assert parameter.tolist() == [-5.0, -5.0]
        elif name == "q_head.weight":
            assert not parameter.any()
        else:
            fan_in = 96 if "down_proj" in name else 64
            # At least 4096 values each: the deviation's error is below 1 %.
            assert float(parameter.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.05), name
    if isinstance(model, ActV1):
        for start in (model.H_init, model.L_init):
            assert 0.7 < float(start.std()) < 1.3
        assert not torch.equal(model.H_init, model.L_init)


def test_the_same_seed_gives_the_same_weights() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(np.random.default_rng().integers(2**31))  # global randomness must not matter
        model = build_model(tiny_config())
        model.initialise(seed)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    first, again, other = drawn(5), drawn(5), drawn(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert sorted(differing) == sorted(name for name in first if not name.startswith("q_head."))


def test_the_puzzle_table_starts_at_zero() -> None:
    model = build_model(tiny_config(task="puzzle", puzzle_emb_ndim=8, num_puzzle_identifiers=3))
    model.initialise(0)
    assert not model.state_dict()["embedding.puzzle_emb.weights"].any()


def fused(model: ActV1, prefix: str) -> dict[str, Tensor]:
    """The reference's state dict of `model`, made the other way round."""
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name.startswith("embedding."):
            bare = {
                "embed_tokens.weight": "embed_tokens.embedding_weight",
                "embed_pos.weight": "embed_pos.embedding_weight",
                "puzzle_emb.weights": "puzzle_emb.weights",
            }[name.removeprefix("embedding.")]
        elif ".q_proj." in name:
            bare = name.replace("q_proj", "qkv_proj")
            tensor = torch.cat([ours[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif ".gate_proj." in name:
            bare = name.replace("gate_proj", "gate_up_proj")
            tensor = torch.cat([tensor, ours[name.replace("gate_proj", "up_proj")]])
        elif any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            continue
        else:
            bare = name
        theirs[prefix + bare] = tensor
    return theirs


@pytest.mark.parametrize("prefix", ["_orig_mod.model.inner.", "model.inner.", "inner.", ""])
@pytest.mark.parametrize("changes", [{"pos_encodings": "learned"}, {"puzzle_emb_ndim": 20, "h_layers": 2}])
def test_fused_weights_are_split_as_they_were_joined(prefix: str, changes: dict[str, Any]) -> None:
    model = build_model(tiny_config(**({"task": "puzzle"} | changes)))
    assert isinstance(model, ActV1)
    model.initialise(2)
    theirs = fused(model, prefix)
    assert looks_like_reference(theirs) and not looks_like_reference(model.state_dict())
    back = from_reference(theirs)
    ours = model.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "name",
    [
        "model.inner.H_level.layers.0.self_attn.rotary.weight",
        "model.inner.H_level.layers.x.self_attn.qkv_proj.weight",
        "model.inner.M_level.layers.0.mlp.down_proj.weight",
        "model.inner.H_level.layers.0.mlp.qkv_proj.bias",
        "optimizer.lm_head.weight",
        "",
    ],
)
def test_a_tensor_that_the_reference_does_not_have(name: str) -> None:
    with pytest.raises(DataError, match="the original HRM has no such tensor"):
        split_fused(name, torch.zeros(6, 2))


@pytest.mark.parametrize(
    ("part", "rows"), [("self_attn.qkv_proj", 4), ("self_attn.qkv_proj", 2), ("mlp.gate_up_proj", 1)]
)
def test_a_fused_tensor_of_odd_height(part: str, rows: int) -> None:
    for tensor in (torch.zeros(rows, 2), torch.zeros(())):
        with pytest.raises(DataError, match="cannot be split evenly into"):
            split_fused(f"model.inner.H_level.layers.0.{part}.weight", tensor)


def test_bare_names() -> None:
    assert bare_name("_orig_mod.model.inner.lm_head.weight") == bare_name("lm_head.weight") == "lm_head.weight"


def c1() -> Fixture:
    return Fixture.open(DEFAULT_FOLDER / "c1.json")


def outputs(model: ActV1, fixture: Fixture) -> Tensor:
    objective = PuzzleObjective(model, "softmax", rollout=False).eval()
    with torch.no_grad():
        return objective.segment(fixture.batch(1), objective.initial_carry(fixture.batch(1))).logits


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("legacy", [False, True])
def test_start_from_a_reference_checkpoint(prefix: str, legacy: bool, tmp_path: Path) -> None:
    """A state dict saved by torch.save, as published: the model then gives the reference's outputs."""
    fixture = c1()
    path = tmp_path / "step_1000"
    state = {prefix + name: tensor for name, tensor in fixture.tensors("weights").items()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    config = fixture.config()
    model = build_model(config)
    model.initialise(9)
    fill_module(model, start_weights(path, config), str(path))
    assert isinstance(model, ActV1)
    assert torch.equal(outputs(model, fixture), outputs(fixture.model(), fixture))
    want = fixture.tensors("steps_eval")["step1.logits"]
    assert float((outputs(model, fixture) - want).abs().max()) <= 8e-6


def test_start_from_tensors_of_this_project(tmp_path: Path) -> None:
    """The same from .safetensors, in either naming, and from a .pt file of this project's names."""
    fixture = c1()
    model = fixture.model()
    save_tensors(fixture.tensors("weights"), tmp_path / "theirs.safetensors")
    save_tensors(model.state_dict(), tmp_path / "ours.safetensors")
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    for path in sorted(tmp_path.iterdir()):
        tensors = start_weights(path, fixture.config())
        assert tensors.keys() == model.state_dict().keys(), path.name
        assert all(torch.equal(tensors[name], t) for name, t in model.state_dict().items())


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    target, path = tmp_path / "ran", tmp_path / "weights.pt"
    payload = {"lm_head.weight": torch.zeros(1), "x": Bomb(str(target))}
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(DataError, match="not a PyTorch file of tensors"):
        start_weights(path, c1().config())
    assert not target.exists()
    if how != "pickle":
        torch.load(path, weights_only=False)
        assert target.exists(), "the file would have run code"


@pytest.mark.parametrize("content", [{"step": 3}, [torch.zeros(1)], {"model": {"w": torch.zeros(1)}}])
def test_something_else_than_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DataError, match="is not a state dict"):
        start_weights(tmp_path / "w.pt", c1().config())


# What torch's restricted unpickler raises besides UnpicklingError: EOFError, UnicodeDecodeError, RuntimeError.
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"N.", b"l", b"c\xc4G", b"\x80\x02K\x01."])
def test_any_other_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match="w.bin"):
        start_weights(path, c1().config())


@pytest.mark.parametrize("cut", [0, 7, 100, 3000])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_cut_short(cut: int, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{ending}"
    if ending == "pt":
        torch.save(c1().tensors("weights"), path)
    else:
        save_tensors(c1().tensors("weights"), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="w."):
        start_weights(path, c1().config())


@pytest.mark.parametrize("content", [b"hello", b"title\n", b"b", b"e", b"q", b"h\x01", b"j"])
def test_a_file_that_is_half_a_pickle_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    """A file of text whose first letter is an opcode of pickle, for one."""
    path = tmp_path / "w.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match="w.bin"):
        start_weights(path, c1().config())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "bundle"])
def test_a_path_that_does_not_exist_is_wrong_usage(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file or folder"):
        start_weights(tmp_path / name, c1().config())

"""--use-8bit-optimizer, --model-dtype and --optimizer-offload in whole runs: exact resume, who gets what, fallbacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm_ray.errors import SettingsError, UnavailableError
from hrm_ray.launch.fallbacks import settle_memory_options, without_effect_on
from hrm_ray.launch.preflight import checkpoint_bytes, state_bytes
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.optimizer_state import optimizer_bytes
from hrm_ray.train.storage_tracker import storage_bytes
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.world import World
from tests.support.runs import (
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
from tests.support.splits import Cut, Rows, config_for, settings_for

EIGHT, BF16, FP16 = ("--use-8bit-optimizer",), ("--model-dtype", "bf16"), ("--model-dtype", "fp16")
CASES: dict[str, tuple[str, ...]] = {
    "8 bit": EIGHT,
    "bf16, averaged": (*BF16, "--ema", "0.9"),
    "fp16": FP16,
    "bf16, adam-atan2": (*BF16, "--optimizer", "adam-atan2"),
    "bf16, sgd": (*BF16, "--optimizer", "sgd", "--lr", "1e-2"),
    "bf16 activations, amp": ("--activations", "bf16", "--amp"),
    "bf16, 8 bit, averaged": (*BF16, *EIGHT, "--ema", "0.9"),
}


@pytest.mark.parametrize("kind", ["text", "puzzle"])
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed(case: str, kind: str, tmp_path: Path) -> None:
    """Ten steps are five and five, to the bit: weights, moments, average, carries, figures."""
    if kind == "text":
        data, words = text_file(tmp_path), (*TEXT, *CASES[case])
    else:
        data, words = puzzle_file(tmp_path), (*PUZZLE, "--puzzle-emb-ndim", "8", *CASES[case])
    words = (*words, "--steps", "10", "--save-every", "4", "--keep", "9", "--eval-file", str(data))
    train(data, tmp_path / "whole", *words)
    with stopping_at(5):
        train(data, tmp_path / "resumed", *words)
    again = hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume")
    assert again.code == 0, again.err
    ends = [files_below(tmp_path / name / "checkpoints" / "step_10") for name in ("whole", "resumed")]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if ends[0][name] != ends[1][name]] == []
    for name in ("model.safetensors", "best/model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    assert computed(tmp_path / "whole") == computed(tmp_path / "resumed")
    assert computed(tmp_path / "whole", "eval") == computed(tmp_path / "resumed", "eval")


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls(case: str, tmp_path: Path) -> None:
    """Letters of one corpus repeated: 40 steps take the loss well below that of the first."""
    data = text_file(tmp_path, rows=4)
    lr = "0.3" if "sgd" in case else "3e-3"
    train(data, tmp_path / "b", *TEXT, *CASES[case], "--steps", "40", "--lr", lr, "--halt-max-steps", "1")
    losses = [record["loss"] for record in records(tmp_path / "b")]
    assert losses[-1] < 0.8 * losses[0]


def stored_types(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def test_what_a_narrow_run_leaves(tmp_path: Path) -> None:
    """Narrow weights in the checkpoint, their average and the puzzle table wide, moments wide; and a bundle that can be
    solved with and started from, in either type."""
    data = puzzle_file(tmp_path)
    words = (*PUZZLE, "--amp", "--steps", "3", "--puzzle-emb-ndim", "8")
    train(data, tmp_path / "b", *words, *BF16, "--ema", "0.9")
    folder = tmp_path / "b" / "checkpoints" / "step_3"
    weights = stored_types(folder / "model.safetensors")
    assert {name for name, kind in weights.items() if kind != "BF16"} == {"embedding.puzzle_emb.weights"}
    assert set(stored_types(folder / "ema.safetensors").values()) == {"F32"}
    moments = stored_types(folder / "optimizer.safetensors")
    assert {kind for name, kind in moments.items() if name.endswith("|exp_avg")} == {"F32"}
    slots = stored_types(folder / "slots_00000000.safetensors")
    assert slots["carry.z_h"] == "BF16"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["forward_dtype"] == "bfloat16"
    assert hrm("solve", tmp_path / "b", "--file", data).code == 0
    for name, more in (("narrow", BF16), ("wide", ())):
        train(data, tmp_path / name, *words, *more, "--student-init", tmp_path / "b", "--lr", "1e-30")
    started = load_file(tmp_path / "wide" / "model.safetensors")
    for name, weight in load_file(tmp_path / "b" / "model.safetensors").items():
        if name != "embedding.puzzle_emb.weights":
            torch.testing.assert_close(started[name], weight.float(), rtol=0, atol=0)


def test_the_puzzle_tables_rule_stays_its_own(tmp_path: Path) -> None:
    """After one step the table of an 8-bit run is that of the plain run; the weights are not."""
    data = puzzle_file(tmp_path)
    words = (*PUZZLE, "--steps", "1", "--puzzle-emb-ndim", "8", "--no-amp")
    train(data, tmp_path / "plain", *words)
    train(data, tmp_path / "eight", *words, *EIGHT)
    plain, eight = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "eight"))
    moved = plain["embedding.puzzle_emb.weights"]
    assert bool((moved != 0).any())
    assert torch.equal(moved, eight["embedding.puzzle_emb.weights"])
    state = load_file(tmp_path / "eight" / "checkpoints" / "step_1" / "optimizer.safetensors")
    assert not [name for name in state if "puzzle_emb" in name]
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("|state1")} == {torch.uint8, torch.float32}


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@pytest.mark.parametrize("eight", [False, True], ids=["adamw", "8 bit"])
@pytest.mark.parametrize("dtype", BYTES)
def test_bytes_of_weights_gradients_and_state(dtype: str, eight: bool) -> None:
    """Measured on the tensors themselves, gradients just before the update."""
    loop = components(dtype, eight)
    strategy = loop.parts.strategy
    assert isinstance(strategy, SingleStrategy)
    named = dict(loop.parts.objective.named_parameters())
    numbers = sum(parameter.numel() for parameter in named.values())
    seen: list[dict[str, Tensor]] = []
    real = strategy.step

    def step(*words: Any) -> float:
        seen.append({name: p.grad for name, p in named.items() if p.grad is not None})
        return real(*words)

    strategy.step = step  # type: ignore[method-assign]
    report = loop.step()
    assert report is not None and report.applied
    assert storage_bytes(named.values()) == BYTES[dtype] * numbers
    assert seen[0].keys() == named.keys()
    # Those of the step's three segments are added in float32.
    assert storage_bytes(seen[0].values()) == 4 * numbers
    scalars = 0 if eight else 4 * len(named)
    if not eight:
        assert optimizer_bytes(strategy.optimizer) == 8 * numbers + scalars
    else:
        small = sum(p.numel() for p in named.values() if p.numel() < 4096)
        scales = sum(8 * -(-p.numel() // 256) for p in named.values() if p.numel() >= 4096)
        assert optimizer_bytes(strategy.optimizer) == 2 * (numbers - small) + scales + 8 * small + 2048


FROZEN = {"use_peft": True, "lora_r": 2}


@pytest.mark.parametrize(
    ("dtype", "more", "near"),
    [
        ("fp32", {}, True),
        ("bf16", {"optimizer": {"use_8bit_optimizer": True, "ema": 0.9}}, True),
        ("fp32", {"adapt": FROZEN}, False),
        ("fp32", {"adapt": FROZEN, "memory": {"load_in_8bit": True}}, False),
        ("bf16", {"adapt": FROZEN, "memory": {"load_in_4bit": True}}, False),
    ],
    ids=["plain", "8 bit, averaged", "adapters", "int8", "nf4"],
)
def test_the_preflight_asks_for_no_more_than_is_taken(dtype: str, more: dict[str, Any], near: bool) -> None:
    """And for most of it where everything is trained; a checkpoint takes at least what is asked for too."""
    loop = components(dtype, False, more)
    strategy = loop.parts.strategy
    assert isinstance(strategy, SingleStrategy)
    report = loop.step()
    assert report is not None
    objective, ema = loop.parts.objective, strategy.average
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert [id(p) for p in strategy.optimizer.param_groups[0]["params"]] == [id(p) for p in trained]
    kept = optimizer_bytes(strategy.optimizer) + (storage_bytes(ema.average.values()) if ema is not None else 0)
    weights = storage_bytes([*objective.parameters(), *objective.buffers()])
    taken = weights + storage_bytes(trained) + kept
    settings = settings_of(dtype, False, more)
    asked = state_bytes(settings, config_for(settings))
    assert 0.8 * taken * near < asked <= taken
    assert checkpoint_bytes(settings, config_for(settings)) <= weights + kept


def test_float16_weights_that_leave_its_range(tmp_path: Path) -> None:
    """The update that makes them infinite ends the run, with the name of the weight and a way out; what is stored is
    sound, and goes on."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    words = (*TEXT, *FP16, "--optimizer", "sgd", "--grad-clip", "0", "--lr-schedule", "constant")
    train(data, bundle, *words, "--lr", "1e-3", "--steps", "2", "--save-every", "1")
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps", "5")
    naming = ("float16 weights at step 3", "65504", "first in ", "(and ", "--lr", "--model-dtype bf16")
    refused(6, *again, "--lr", "1e9", naming=naming)
    assert sorted(path.name for path in (bundle / "checkpoints").iterdir()) == ["step_1", "step_2"]
    assert hrm(*again, "--lr", "1e-3").code == 0
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(bundle / "model.safetensors").values())


def test_start_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "wide", *TEXT, "--steps", "1")
    path = tmp_path / "wide" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][3, 5] = -70000.0
    save_file(weights, path)
    started = (*TEXT, "--steps", "1", "--student-init", tmp_path / "wide")
    refused(
        5,
        *("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *started, *FP16),
        naming=("lm_head.weight", "70000", "65504", "--model-dtype bf16"),
    )
    train(data, tmp_path / "c", *started, *BF16)


ADALORA = {"use_peft": True, "peft_method": "adalora", "lora_r": 2, "lora_dropout": 0.0}


@pytest.mark.parametrize(("dtype", "rel"), [("bf16", 0.1), ("fp16", 0.02)])
def test_importance_goes_by_the_gradients_of_the_update(dtype: str, rel: float) -> None:
    """Clipped to a hundredth, and without the loss scale: AdaLoRA's importance, weight times gradient, under narrow
    weights is that under wide ones to the rounding of the passes (8 and 11 bits; measured 4 % and 0.6 %)."""
    found = []
    for each in ("fp32", dtype):
        loop = components(each, False, {"adapt": ADALORA, "optimizer": {"grad_clip": 0.01}})
        for _ in range(3):
            report = loop.step()
            assert report is not None and report.applied and report.norm > 0.5
        assert loop.parts.adapters is not None and loop.parts.adapters.ranks is not None
        state = loop.parts.adapters.ranks.state()
        found.append({name: float(t.sum()) for name, t in state.items() if name.startswith("exp_avg_ipt|")})
    assert len(found[0]) == 12 and min(found[0].values()) > 0
    assert found[1] == pytest.approx(found[0], rel=rel)


def settings_of(dtype: str, eight: bool, more: dict[str, Any] | None = None) -> RunSettings:
    """A text model of which the vocabulary is the larger part."""
    plain = settings_for("text", "sgd", Cut(1, 1, 4)).model_dump()
    plain["model"] |= {"d_ff": 512, "hidden_size": 64}
    plain["optimizer"] |= {"optimizer": "adamw", "use_8bit_optimizer": eight, "lr": 1e-3}
    plain["memory"] |= {"model_dtype": dtype, "amp": False}
    for section, leaves in (more or {}).items():
        plain[section] |= leaves
    return RunSettings.model_validate(plain)


def components(dtype: str, eight: bool, more: dict[str, Any] | None = None) -> TrainingLoop:
    settings = settings_of(dtype, eight, more)
    return assemble(settings, config_for(settings), Rows("lm"), World.here("cpu", 1), 20)


def chosen(*, strict: bool = False, **leaves: dict[str, Any]) -> RunSettings:
    return RunSettings.model_validate({**leaves, "cluster": {"strict": strict}})


def take_away(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had never been installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("bitsandbytes", ("--use-8bit-optimizer",)),
        ("bitsandbytes", ("--load-in-4bit", "--use-peft")),
        ("peft", ("--use-peft", "--load-in-8bit")),
    ],
)
def test_resumed_where_a_library_is_missing(
    library: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is made of it: no fallback, and no advice to leave the option out. Also into another bundle."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, *words, "--steps", "2")
    take_away(library, monkeypatch)
    before = files_below(bundle)
    for resume in (("--resume",), ("--resume-from", bundle / "checkpoints" / "step_2")):
        place = bundle if len(resume) == 1 else tmp_path / "branch"
        naming = (words[0], "was trained with it", f"{library} is not installed", f"pip install {library}", "resume")
        message = refused(3, "train", "--bundle-dir", place, *resume, "--steps", "3", naming=naming)
        assert "eave" not in message
    assert files_below(bundle) == before and not (tmp_path / "branch").exists()


def test_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain AdamW, said once, and the same from then on; with --strict an error that a missing library is."""
    take_away("bitsandbytes", monkeypatch)
    data = text_file(tmp_path)
    train(data, tmp_path / "plain", *TEXT, "--steps", "2")
    train(data, tmp_path / "b", *TEXT, "--steps", "2", *EIGHT)
    notes = [r["message"] for r in records(tmp_path / "b", "event") if "--use-8bit-optimizer" in r["message"]]
    assert len(notes) == 1 and "bitsandbytes is not installed" in notes[0] and "AdamW" in notes[0]
    assert computed(tmp_path / "b") == computed(tmp_path / "plain")
    again = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "3", *EIGHT)
    assert again.code == 0, again.err
    strict = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "s", *TEXT, *EIGHT, "--strict")
    assert strict.code == 3 and "bitsandbytes" in strict.faults[0] and not (tmp_path / "s").exists()


def test_a_bitsandbytes_that_cannot_do_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = chosen(optimizer={"use_8bit_optimizer": True})
    assert settle_memory_options(eight, "cpu") == (eight, [])

    def no_kernel(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand more")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", no_kernel)
    settled, notes = settle_memory_options(eight, "cpu")
    assert not settled.optimizer.use_8bit_optimizer
    assert len(notes) == 1 and "no kernel for this device)" in notes[0]
    with pytest.raises(UnavailableError, match="no 8-bit AdamW on cpu"):
        settle_memory_options(chosen(optimizer={"use_8bit_optimizer": True}, strict=True), "cpu")
    assert settle_memory_options(eight, "cuda") == (eight, []), "nothing is tried on a GPU by the driver"


def test_offload_where_there_is_nothing_to_offload_from(tmp_path: Path) -> None:
    """--device auto came to the CPU."""
    away = load_settings({"--optimizer-offload": True})
    assert [noted.option for noted in without_effect_on(away, "cpu")] == ["--optimizer-offload"]
    assert without_effect_on(away, "cuda") == []
    data = text_file(tmp_path)
    strict = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "s", *TEXT, "--optimizer-offload", "--strict")
    refused(2, *strict, naming=("--optimizer-offload", "host memory anyway"))
    train(data, tmp_path / "plain", *TEXT, "--steps", "2")
    train(data, tmp_path / "b", *TEXT, "--steps", "2", "--optimizer-offload")
    assert [r for r in records(tmp_path / "b", "event") if "--optimizer-offload" in r["message"]]
    assert computed(tmp_path / "b") == computed(tmp_path / "plain")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_chunks_are_offloaded_from_cuda_devices_only(device: str) -> None:
    given = load_settings({"--cpu-offload": True, "--use-chunked-training": True, "--chunk-size": "8"})
    with pytest.raises(SettingsError, match=f"from CUDA devices only, not from {device}"):
        without_effect_on(given, device)
    # Of a run that is resumed on another device.
    assert without_effect_on(given.model_copy(update={"given": frozenset()}), device) == []
    assert without_effect_on(given, "cuda") == []
    assert [noted.option for noted in without_effect_on(given, "cpu")] == ["--cpu-offload"]


@pytest.mark.parametrize(("option", "value"), [("--use-8bit-optimizer", None), ("--model-dtype", "bf16")])
def test_a_resumed_run_keeps_its_types(option: str, value: str | None, tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "2")
    words = [option] if value is None else [option, value]
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4", *words)
    assert ran.code == 2 and option in ran.faults[0] and "trained with" in ran.faults[0]

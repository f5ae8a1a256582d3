"""Adapters beside frozen weights: what is trained, what stays to the bit, and that base + adapter = merged = what peft
itself makes of the files."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import fill_module, save_tensors
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model, build_objective
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.transforms.cast_weights import cast_weights
from hrm_ray.model.transforms.peft import Adapters, apply_peft
from hrm_ray.model.transforms.quantise import quantise_projections
from hrm_ray.rundir import write_json
from hrm_ray.settings.adapt import AdaptSettings, PeftMethod
from hrm_ray.train.storage_tracker import storage_bytes
from tests.support.tiny_models import backward_all, drawing, logits_of_segments, text_batch, tiny_config, tiny_model

METHODS: list[PeftMethod] = ["lora", "adalora", "ia3", "loha", "lokr"]
BASES: dict[str, Callable[[nn.Module], None]] = {
    "float32": lambda model: None,
    "int8": lambda model: quantise_projections(model, 8),
    "nf4": lambda model: quantise_projections(model, 4),
    "bfloat16": lambda model: cast_weights(model, torch.bfloat16),
}
STEPS = 12
BATCH = drawing(text_batch(0, [[12], [5, 7], [4, 4, 4]]))


def chosen(method: PeftMethod, **more: Any) -> AdaptSettings:
    ranks = {} if method == "ia3" else {"lora_r": 4, "lora_alpha": 8}
    targets = "q_proj,v_proj,up_proj,down_proj"
    plain = {"use_peft": True, "peft_method": method, "lora_target_modules": targets, **ranks}
    return AdaptSettings.model_validate(plain | more)


def adapted(method: PeftMethod, base: str, *, seed: int = 0, **more: Any) -> tuple[nn.Module, Adapters]:
    config = tiny_config(forward_dtype="bfloat16" if base == "bfloat16" else "float32")
    model = tiny_model(config)
    BASES[base](model)
    return model, apply_peft(model, chosen(method, **more), seed=seed, total_steps=STEPS)


def train(model: nn.Module, adapters: Adapters, steps: int = STEPS) -> list[float]:
    """Losses of `steps` updates on one batch; AdaLoRA's ranks follow."""
    objective = objective_of(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        losses.append(backward_all(objective, BATCH))
        optimizer.step()
        if adapters.ranks is not None:
            adapters.ranks.after_update()
    model.eval()
    return losses


def objective_of(model: nn.Module) -> AnyObjective:
    return build_objective(model, "softmax", supervision="rollout", halt_margin=0.01)  # type: ignore[arg-type]


def logits(model: nn.Module) -> list[Tensor]:
    return logits_of_segments(objective_of(model).eval(), BATCH)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_heads_learn_and_nothing_else_moves(method: PeftMethod, base: str) -> None:
    model, adapters = adapted(method, base)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    adapter_names = {name for name in names if not name.startswith(("lm_head", "q_head"))}
    assert names - adapter_names == {"lm_head.weight", "q_head.weight", "q_head.bias"}
    layers = [name.partition(".default")[0].rpartition(".")[0] for name in adapter_names]
    assert {layer.rpartition(".")[2] for layer in layers} == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert len(set(layers)) == 8, "four in each of two levels"
    assert all(model.get_parameter(name).dtype == torch.float32 for name in adapter_names)
    assert not [name for name in names if "ranknum" in name], "a number that AdaLoRA keeps, no weight"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, adapters)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= names
    # AdaLoRA may take all ranks of a layer, whose singular values are then the zeros that they were.
    assert {name.rpartition(".default")[0][-6:] for name in names - moved} <= (
        {"lora_E"} if method == "adalora" else set()
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_base_and_adapter(method: PeftMethod, base: str) -> None:
    """Float32 sums in another order: 1e-4 on scores of size 10. Bfloat16 rounds the merged weights anew, by 2^-9 each,
    and every activation: root mean squares are compared, a tenth of what the adapters do."""
    model, adapters = adapted(method, base)
    train(model, adapters)
    weights = adapters.merged_weights()
    config = model.config
    assert isinstance(config, ModelConfig)
    plain = build_model(config)
    fill_module(plain, weights, "merged")
    assert {tensor.dtype for name, tensor in weights.items() if name.endswith(".weight")} == {
        model.lm_head.weight.dtype
    }
    unadapted = tiny_model(config)
    unadapted.lm_head.load_state_dict(plain.lm_head.state_dict())
    for own, merged, without in zip(logits(model), logits(plain), logits(unadapted), strict=True):
        if base != "bfloat16":
            torch.testing.assert_close(merged, own, rtol=0, atol=1e-4)
        off, done = (float((other - own).float().square().mean().sqrt()) for other in (merged, without))
        assert off < 0.1 * done


@pytest.mark.parametrize("method", ["lora", "adalora", "loha", "lokr"])
def test_merging_in_the_middle_of_training_drops_nothing_out(
    method: PeftMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's weight is asked for in evaluation mode, whatever the model's; older versions of peft draw there."""
    model, adapters = adapted(method, "float32", lora_dropout=0.5)
    model.train()
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    modes: list[bool] = []
    real = type(layer).get_delta_weight

    def noting(self: Any, *words: Any, **named: Any) -> Tensor:
        modes.append(self.training)
        return real(self, *words, **named)

    monkeypatch.setattr(type(layer), "get_delta_weight", noting)
    adapters.merged_weights()
    assert modes == [False] * 8 and model.training


def test_factors_of_ia3() -> None:
    """For the outputs of a layer; for the inputs of the FFN's last."""
    model, _ = adapted("ia3", "float32")
    shapes = {name.split(".")[-3]: tuple(p.shape) for name, p in model.named_parameters() if "ia3_l" in name}
    assert shapes == {"q_proj": (16, 1), "v_proj": (16, 1), "up_proj": (24, 1), "down_proj": (1, 24)}


@pytest.mark.parametrize("method", METHODS)
def test_merged_as_peft_merges(method: PeftMethod) -> None:
    """peft's merge in place, on a copy; the same sums of float32."""
    model, adapters = adapted(method, "float32")
    train(model, adapters)
    own = adapters.merged_weights()
    again, its = adapted(method, "float32")
    again.load_state_dict(model.state_dict())
    theirs = its.wrapped.merge_and_unload().state_dict()
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("steps", [STEPS // 2, STEPS])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_files(method: PeftMethod, steps: int, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` on the base as it was before training gives the trained model, heads included; of
    AdaLoRA in the middle of its schedule and at its end, where masked ranks are left out."""
    from peft import PeftModel

    model, adapters = adapted(method, "float32")
    start = adapters.in_file()[1]
    train(model, adapters, steps)
    state = adapters.ranks.state() if adapters.ranks is not None else {}
    config, tensors = adapters.in_file()
    write_json(tmp_path / "adapter_config.json", config)
    save_tensors(tensors, tmp_path / "adapter_model.safetensors")
    base = tiny_model(tiny_config())
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for own, theirs in zip(logits(model), logits(loaded.get_base_model().eval()), strict=True):
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)
    if method == "adalora":
        assert adapters.ranks is not None
        assert all(torch.equal(tensor, state[name]) for name, tensor in adapters.ranks.state().items())
        ended = steps == STEPS
        assert adapters.ranks.settled == ended
        numbers = [sum(t.numel() for n, t in named.items() if "lora_" in n) for named in (start, tensors)]
        assert (numbers[1] < numbers[0]) == ended
        adapters.ranks.after_update()
        train(model, adapters, 1)


def test_what_an_average_remembers_of_masked_ranks_is_kept() -> None:
    """Values of masked ranks that are not zero, as an average's are not, stay in the file."""
    model, adapters = adapted("adalora", "float32")
    train(model, adapters)
    assert adapters.ranks is not None and adapters.ranks.settled
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            with torch.no_grad():
                parameter.add_(0.1)
    assert not adapters.ranks.settled
    config, tensors = adapters.in_file()
    assert config["rank_pattern"] is None
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("lora_E")} == {6}


@pytest.mark.parametrize("method", METHODS)
def test_starting_values_follow_from_the_seed_alone(method: PeftMethod) -> None:
    """Whatever was drawn before; and nothing is drawn from the generators of the run."""
    model = tiny_model(tiny_config())
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    apply_peft(model, chosen(method), seed=5, total_steps=STEPS)
    assert torch.equal(torch.randn(3), expected)
    first = model.state_dict()
    again, other = (adapted(method, "float32", seed=seed)[0].state_dict() for seed in (5, 6))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    if method != "ia3":
        assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_an_adapter_changes_nothing(method: PeftMethod) -> None:
    model, _ = adapted(method, "float32")
    for own, plain in zip(logits(model), logits(tiny_model(tiny_config())), strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
def test_experts_are_frozen_beside_adapted_attention(base: str) -> None:
    """Stacks and routers stay; merged weights are those of the stacks, dequantised where they were codes."""
    config = tiny_config(num_experts=4)
    model = tiny_model(config)
    BASES[base](model)
    settings = chosen("lora", lora_target_modules="q_proj,o_proj")
    adapters = apply_peft(model, settings, seed=0, total_steps=STEPS)
    losses = train(model, adapters)
    assert losses[-1] < 0.9 * losses[0]
    plain = build_model(config)
    fill_module(plain, adapters.merged_weights(), "merged")
    for own, merged in zip(logits(model), logits(plain), strict=True):
        torch.testing.assert_close(merged, own, rtol=0, atol=1e-4)
    original = tiny_model(config).state_dict()
    for name, tensor in plain.state_dict().items():
        if "router" in name or (base == "float32" and "experts" in name):
            assert torch.equal(tensor, original[name]), name


def test_a_transformer_has_one_head() -> None:
    config = tiny_config(arch="transformer", halt_max_steps=1)
    model = tiny_model(config)
    adapters = apply_peft(model, chosen("lora"), seed=0, total_steps=STEPS)
    losses = train(model, adapters)
    assert losses[-1] < 0.9 * losses[0]
    described, tensors = adapters.in_file()
    assert described["modules_to_save"] == ["lm_head"]
    assert [name for name in tensors if "head" in name] == ["base_model.model.lm_head.weight"]
    plain = build_model(config)
    fill_module(plain, adapters.merged_weights(), "merged")
    torch.testing.assert_close(logits(plain)[0], logits(model)[0], rtol=0, atol=1e-4)


def test_one_step_gradient_reaches_adapters_of_both_levels() -> None:
    """With a gradient through the last H update alone, those of L get a zero, so that no rank waits for them."""
    config = tiny_config(bp_steps=1)
    model = tiny_model(config)
    assert isinstance(model, ActV1)
    apply_peft(model, chosen("lora"), seed=0, total_steps=STEPS)
    backward_all(objective_of(model).train(), BATCH)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "L_level" in name and parameter.grad is not None:
            assert not bool(parameter.grad.any())


def test_bytes_of_frozen_and_trained() -> None:
    """A wider model: the base in 4 bits takes a seventh, and gradients and moments are those of adapters and heads."""
    config = tiny_config(hidden_size=128, intermediate_size=256, vocab_size=19)
    numbers: dict[str, int] = {}
    for base in ("float32", "int8", "nf4"):
        model = tiny_model(config)
        BASES[base](model)
        adapters = apply_peft(model, chosen("lora"), seed=0, total_steps=STEPS)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        codes = [b for name, b in model.named_buffers() if ".quantised." in name]
        numbers[base] = storage_bytes([*frozen, *codes])
        backward_all(objective_of(model).train(), BATCH)
        assert storage_bytes(p.grad for p in model.parameters() if p.grad is not None) == storage_bytes(trained)
        heads = 4 * (19 * 128 + 2 * 128 + 2)
        adapters_bytes = 4 * 4 * 2 * ((128 + 128) * 2 + (128 + 256) * 2)
        assert storage_bytes(trained) == heads + adapters_bytes
        assert adapters.ranks is None
    projections, table = 2 * (4 * 128**2 + 3 * 128 * 256), 19 * 128
    rows = 2 * (4 * 128 + 2 * 256 + 128)
    assert numbers == {
        "float32": 4 * (projections + table),
        "int8": projections + 4 * rows + 4 * table,
        "nf4": projections // 2 + projections // 16 + 4 * table,
    }


def test_a_copy_of_the_settings_is_enough() -> None:
    """Nothing of peft's is shared between two models."""
    settings = chosen("adalora")
    first, second = (apply_peft(tiny_model(tiny_config()), settings, seed=0, total_steps=STEPS) for _ in range(2))
    train(first.model, first)
    assert second.in_file()[0]["rank_pattern"] is None
    assert deepcopy(settings) == chosen("adalora")

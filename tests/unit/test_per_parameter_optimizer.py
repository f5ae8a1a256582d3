"""Updates one parameter at a time: the inner optimizer's own numbers, narrow weights that still learn, state that rests
elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.errors import DataError
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.train.optimizer_state import OPTIMIZER_FILE, load_optimizer, optimizer_bytes, optimizer_tensors
from hrm_ray.train.optimizers import OPTIMIZERS, builder
from hrm_ray.train.per_parameter_optimizer import (
    UPDATES,
    PerParameterOptimizer,
    StateStorage,
    multiply_gradients,
)

CPU = torch.device("cpu")
KINDS = [*OPTIMIZERS, "adamw-8bit"]
SHAPES = {"wide": (80, 64), "tall": (70, 65), "square": (16, 16), "bias": (7,)}
"""Two large enough for bitsandbytes' 8 bits, two that it keeps in 32."""


def save_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], folder: Path) -> None:
    save_tensors(optimizer_tensors(optimizer, named), folder / OPTIMIZER_FILE)


def chosen(kind: str, **more: Any) -> OptimizerSettings:
    eight = kind == "adamw-8bit"
    plain = {"optimizer": "adamw" if eight else kind, "use_8bit_optimizer": eight, "lr": 1e-2, "weight_decay": 0.1}
    return OptimizerSettings.model_validate(plain | more)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(named, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def one_at_a_time(named: dict[str, nn.Parameter], kind: str, seed: int = 0) -> PerParameterOptimizer:
    return PerParameterOptimizer(named.values(), builder(chosen(kind)), seed=seed, storage=StateStorage(CPU))


def test_no_copy_of_a_weight_stays_after_an_update() -> None:
    named = parameters(torch.bfloat16)
    optimizer = one_at_a_time(named, "adamw")
    train(optimizer, named, range(2))
    assert optimizer.inner.param_groups[0]["params"] == []


def test_8_bit_moments_of_joined_tensors_change_by_name() -> None:
    """Why DeepSpeed's stages refuse the 8-bit optimizer: blocks in a joined buffer are not those of each tensor, and
    even the same blocks do not give back a first moment whose largest value is negative."""
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    def through_8_bits(values: Tensor) -> Tensor:
        return dequantize_blockwise(*quantize_blockwise(values, code=create_dynamic_map(), blocksize=256))

    joined = torch.randn(2 * 4100, generator=torch.Generator().manual_seed(0))
    kept = through_8_bits(joined)
    by_name = torch.cat([through_8_bits(part.contiguous()) for part in kept.split(4100)])
    for again in (through_8_bits(kept), through_8_bits(by_name)):
        assert 2e-3 < float((again - kept).norm() / kept.norm()) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_wide_weights_get_the_inner_optimizers_own_update(kind: str) -> None:
    """To the bit, decay, schedule and moments included; a parameter without a gradient is left alone."""
    plain, single = parameters(), parameters()
    whole, one = builder(chosen(kind))(plain.values()), one_at_a_time(single, kind)
    for optimizer, named in ((whole, plain), (one, single)):
        train(optimizer, named, range(3))
        give_gradients(named, 3)
        named["square"].grad = None
        optimizer.step()
    for name in SHAPES:
        assert torch.equal(plain[name], single[name]), name
        assert not torch.equal(plain[name], parameters()[name])
        kept = {key: value for key, value in one.state[single[name]].items() if key != UPDATES}
        assert kept.keys() == whole.state[plain[name]].keys()
        for key, value in whole.state[plain[name]].items():
            assert torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(value)), key
    assert one.state[single["square"]][UPDATES] == 3 and one.state[single["bias"]][UPDATES] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights_are_updated_in_float32(kind: str, dtype: torch.dtype) -> None:
    """The moments are those of the same gradients on float32 weights, and the first update is that one, rounded to a
    neighbour."""
    narrow, wide = parameters(dtype), {name: nn.Parameter(p.float()) for name, p in parameters(dtype).items()}
    one, whole = one_at_a_time(narrow, kind), builder(chosen(kind))(wide.values())
    for optimizer, named in ((one, narrow), (whole, wide)):
        give_gradients(named, 0)
        for name, parameter in named.items():
            parameter.grad = narrow[name].grad.to(parameter.dtype)  # type: ignore[union-attr]
        optimizer.step()
    for name, parameter in narrow.items():
        assert parameter.dtype == dtype and parameter.grad is not None and parameter.grad.dtype == dtype
        unit = wide[name].detach().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        assert bool(((parameter.float() - wide[name]).abs() <= unit).all())
        for key, value in whole.state[wide[name]].items():
            assert torch.equal(torch.as_tensor(one.state[parameter][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_arrive(dtype: torch.dtype) -> None:
    """400 updates of 1e-4 on weights of 1, whose neighbours are 1/256 (1/2048) away: together 0.04. Rounding to the
    nearest loses every one. By chance each weight takes a walk whose deviation from the mean is at most
    sqrt(400) / 2 neighbours; over 4096 weights the mean is within five standard deviations of it."""
    steps, count = 400, 4096
    weight = nn.Parameter(torch.ones(count, dtype=dtype))
    optimizer = PerParameterOptimizer(
        [weight], builder(chosen("sgd", weight_decay=0.0)), seed=1, storage=StateStorage(CPU)
    )
    nearest = torch.ones(count, dtype=dtype)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        nearest.sub_(1e-4 * torch.ones_like(nearest))
    assert torch.equal(nearest, torch.ones_like(nearest))
    spread = torch.finfo(dtype).eps / 2 * (steps / 4) ** 0.5 / count**0.5
    moved = 1 - float(weight.detach().double().mean())
    assert moved == pytest.approx(steps * 1e-4, abs=5 * spread)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3e38), (torch.float32, 3.4e38)], ids=str
)
def test_weights_beyond_their_range_are_listed(dtype: torch.dtype, largest: float) -> None:
    """Those of the last update; one that the type still holds is not. Only float16 ends where a weight may come to."""
    twins = [nn.Parameter(torch.full((300,), largest * sign, dtype=dtype)) for sign in (1, -1, 1)]
    optimizer = PerParameterOptimizer(
        twins, builder(chosen("sgd", weight_decay=0.0)), seed=0, storage=StateStorage(CPU)
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e4
    twins[0].grad = torch.full_like(twins[0], 1.0)
    twins[1].grad = torch.zeros_like(twins[1])
    twins[1].grad[7] = 1.0
    optimizer.step()
    assert [id(p) for p in optimizer.overflowed] == ([id(twins[1])] if dtype == torch.float16 else [])
    assert bool(twins[1][7].isinf()) == (dtype == torch.float16) and bool(twins[0].isfinite().all())
    twins[1].data.fill_(1.0)
    optimizer.step()
    assert optimizer.overflowed == []


def test_the_random_numbers_go_by_seed_parameter_and_update() -> None:
    def after(seed: int, steps: int) -> list[Tensor]:
        twins = {name: nn.Parameter(torch.full((64,), 1.3, dtype=torch.bfloat16)) for name in "ab"}
        optimizer = PerParameterOptimizer(twins.values(), builder(chosen("sgd")), seed=seed, storage=StateStorage(CPU))
        for _ in range(steps):
            for twin in twins.values():
                twin.grad = torch.full_like(twin, 0.05)
            optimizer.step()
        return [twin.detach().clone() for twin in twins.values()]

    once = after(3, 2)
    assert all(torch.equal(a, b) for a, b in zip(after(3, 2), once, strict=True)), "the same on every rank"
    assert not torch.equal(once[0], once[1]), "another for another parameter"
    assert not torch.equal(after(4, 2)[0], once[0]), "another for another seed"
    first, second = after(3, 1)[0].float() - 1.3, once[0].float() - after(3, 1)[0].float()
    assert not torch.equal(first > first.mean(), second > second.mean()), "another for another update"


@pytest.mark.parametrize(
    ("wrapped", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (True, torch.float16)],
    ids=["whole", "float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_five_and_five_are_ten(kind: str, wrapped: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights and state, to the bit, after a way over the disk."""

    def fresh() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        named = parameters(dtype)
        return named, one_at_a_time(named, kind) if wrapped else builder(chosen(kind))(named.values())

    straight, straight_optimizer = fresh()
    train(straight_optimizer, straight, range(10))
    half, half_optimizer = fresh()
    train(half_optimizer, half, range(5))
    save_optimizer(half_optimizer, half, tmp_path)
    rest, rest_optimizer = fresh()
    for name, parameter in rest.items():
        parameter.data.copy_(half[name].data)
    load_optimizer(rest_optimizer, rest, tmp_path)
    assert optimizer_bytes(rest_optimizer) == optimizer_bytes(half_optimizer)
    train(rest_optimizer, rest, range(5, 10))
    for name in SHAPES:
        assert torch.equal(rest[name], straight[name]), name
        for key, value in straight_optimizer.state[straight[name]].items():
            again = rest_optimizer.state[rest[name]][key]
            assert type(again) is type(value) and torch.equal(torch.as_tensor(again), torch.as_tensor(value)), key


@pytest.mark.parametrize("damage", ["shape", "name"])
def test_state_of_another_model_is_refused(damage: str, tmp_path: Path) -> None:
    named = parameters()
    optimizer = builder(chosen("adamw-8bit"))(named.values())
    train(optimizer, named, range(1))
    save_optimizer(optimizer, named, tmp_path)
    other = dict(parameters())
    if damage == "name":
        other["another"] = other.pop("wide")
    else:
        other["wide"] = nn.Parameter(torch.zeros(80, 65))
    with pytest.raises(DataError, match="wide"):
        load_optimizer(builder(chosen("adamw-8bit"))(other.values()), other, tmp_path)


def test_bytes_of_eight_bit_moments() -> None:
    """A model of 2.1 million weights: a byte per moment, and for 256 of them a scale of four; the two tables of codes
    are shared. About a quarter of AdamW's."""
    sizes = [(2048, 512), (512, 512), (512, 1536), (512,)]

    def spent(kind: str, wrapped: bool) -> int:
        named = {str(number): nn.Parameter(torch.zeros(size)) for number, size in enumerate(sizes)}
        optimizer = one_at_a_time(named, kind) if wrapped else builder(chosen(kind))(named.values())
        give_gradients(named, 0)
        optimizer.step()
        return optimizer_bytes(optimizer)

    large = sum(a * b for a, b in sizes[:3])  # type: ignore[misc]
    moments = 2 * large + 2 * 4 * large // 256 + 2 * 4 * 512 + 2 * 4 * 256
    for wrapped in (False, True):
        assert spent("adamw-8bit", wrapped) == moments
        assert spent("adamw", wrapped) == 2 * 4 * (large + 512) + 4 * len(sizes)
        assert spent("adamw-8bit", wrapped) / spent("adamw", wrapped) == pytest.approx(0.25, abs=0.01)
        assert spent("sgd", wrapped) == 0


class Watched(StateStorage):
    """Counts what moves and what is on the device at a time, where both are the same memory."""

    def __init__(self) -> None:
        super().__init__(CPU, offload=True)
        self.up: list[int] = []
        self.down: list[int] = []
        self.finished = 0
        self.here = 0
        self.most_here = 0

    def to_device(self, kept: Tensor) -> Tensor:
        self.up.append(kept.nbytes)
        self.here += kept.nbytes
        self.most_here = max(self.here, self.most_here)
        return kept.clone()

    def keep(self, used: Tensor, kept: Tensor | None = None) -> Tensor:
        self.down.append(used.nbytes)
        self.here = max(0, self.here - used.nbytes)
        return super().keep(used, kept)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sgd"])
def test_state_in_host_memory(kind: str, dtype: torch.dtype) -> None:
    """Every tensor goes up and down once per update, one parameter's at a time, into the memory it came from; the
    numbers are those of state that stays."""
    here, there, place = parameters(dtype), parameters(dtype), Watched()
    beside = one_at_a_time(here, kind)
    away = PerParameterOptimizer(there.values(), builder(chosen(kind)), seed=0, storage=place)
    train(beside, here, range(1))
    train(away, there, range(1))
    assert place.up == [], "new state comes into being on the device"
    resting = {(name, key): value for name in SHAPES for key, value in away.state[there[name]].items()}
    moving = {entry: value for entry, value in resting.items() if isinstance(value, Tensor) and value.dim() > 0}
    addresses = {entry: value.data_ptr() for entry, value in moving.items()}
    total = sum(value.nbytes for value in moving.values())
    largest = max(sum(v.nbytes for (name, _), v in moving.items() if name == each) for each in SHAPES)
    assert sum(place.down) == total and total >= optimizer_bytes(beside) - 4 * len(SHAPES)
    train(beside, here, range(1, 4))
    train(away, there, range(1, 4))
    assert sum(place.up) == 3 * total and sum(place.down) == 4 * total
    assert place.most_here == largest < total and place.finished == 4
    for (name, key), address in addresses.items():
        assert away.state[there[name]][key].data_ptr() == address
    for name in SHAPES:
        assert torch.equal(here[name], there[name])


def test_loaded_state_goes_to_its_place(tmp_path: Path) -> None:
    named, place = parameters(), Watched()
    optimizer = PerParameterOptimizer(named.values(), builder(chosen("adamw")), seed=0, storage=place)
    train(optimizer, named, range(1))
    save_optimizer(optimizer, named, tmp_path)
    place.down.clear()
    load_optimizer(optimizer, named, tmp_path)
    assert sorted(place.down) == sorted(2 * [p.nbytes for p in named.values()])


def test_gradients_are_multiplied_in_float32() -> None:
    """A float16 gradient of 1e-3, scaled by 2^15: taken off in float16 what is left of 1e-8 would be 0."""
    scale = 2.0**15
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = PerParameterOptimizer(
        [weight], builder(chosen("adamw", weight_decay=0.0)), seed=0, storage=StateStorage(CPU)
    )
    for factor in (torch.tensor(1 / scale), torch.tensor(1.0)):
        weight.grad = torch.full((4,), 1e-8 * scale, dtype=torch.float16)
        expected = float(weight.grad[0]) * float(factor)
        multiply_gradients(optimizer, [weight.grad], factor)
        optimizer.step()
        if factor != 1:
            moment = optimizer.state[weight]["exp_avg"]
            assert moment.tolist() == pytest.approx([0.1 * expected] * 4, rel=1e-6)
            assert (weight.grad * factor.half()).eq(0).all()
    optimizer.step()
    assert optimizer.gradient_factor is None, "a factor is for one update"
    plain = nn.Parameter(torch.zeros(4))
    plain.grad = torch.ones(4)
    multiply_gradients(torch.optim.SGD([plain]), [plain.grad], torch.tensor(0.5))
    assert plain.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sgd"])
def test_host_memory_may_be_taken_up_at_a_resume(kind: str, tmp_path: Path) -> None:
    """State of one way goes on in the other, to the bit."""

    def resumed(named: dict[str, nn.Parameter], away: bool) -> torch.optim.Optimizer:
        build = builder(chosen(kind))
        return (
            PerParameterOptimizer(named.values(), build, seed=0, storage=Watched()) if away else build(named.values())
        )

    straight = parameters()
    train(resumed(straight, False), straight, range(6))
    named = parameters()
    optimizer = resumed(named, False)
    for steps, away in ((range(2), False), (range(2, 4), True), (range(4, 6), False)):
        if steps.start:
            save_optimizer(optimizer, named, tmp_path)
            optimizer = resumed(named, away)
            load_optimizer(optimizer, named, tmp_path)
        train(optimizer, named, steps)
    for name in SHAPES:
        assert torch.equal(named[name], straight[name]), name

"""A mixture of experts against a naive one that goes token by token, and what its capacity must not depend on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hrm_ray.model import grouped_product
from hrm_ray.model.build import build_objective
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.grouped_product import sort_by_expert
from hrm_ray.model.moe import MixtureOfExperts
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.router_losses import RouterLosses, positions_that_count, router_terms
from hrm_ray.model.routing import Routing
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.model.transforms.cast_weights import cast_weights
from tests.support.naive_moe import Told, naive_experts, naive_feed_forward
from tests.support.tiny_models import backward_all, puzzle_batch, recorded_logits, text_batch, tiny_config, tiny_model

SITE = (4, 1)
LOSSES = RouterLosses(0.5, 0.25)


@dataclass(frozen=True)
class Case:
    """One layer, its input and what comes back to it; `counted` positions of each row count."""

    config: ModelConfig
    x: Tensor
    gradient: Tensor
    counted: list[int]
    active: Tensor


def mixture(config: ModelConfig, seed: int) -> MixtureOfExperts:
    layer = MixtureOfExperts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        # Scores far enough apart that experts are crowded.
        layer.router.weight.mul_(2)
    return layer


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> tuple[Case, int]:
    experts = draw(st.integers(2, 9))
    shape = {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_capacity_factor": draw(st.sampled_from([0.3, 0.8, 1.0, 1.25, 9.0])),
        # Widths that the grouped product takes as they are, and others.
        "hidden_size": draw(st.sampled_from([4, 6, 16])),
        "num_heads": 1,
        "intermediate_size": draw(st.sampled_from([5, 8, 24])),
        "swiglu": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "gelu", "relu"])),
    }
    config = tiny_config(**(shape | fixed))
    rows, length, seed = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, rows, length, config.hidden_size, generator=generator)
    counted = [draw(st.integers(0, length)) for _ in range(rows)]
    active = torch.tensor([draw(st.booleans()) for _ in range(rows)])
    return Case(config, x, gradient, counted, active), seed


def bent(config: ModelConfig) -> Any:
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[config.activation]


def naive(case: Case, layer: MixtureOfExperts, training: bool) -> tuple[Tensor, list[Told], dict[str, Tensor], Tensor]:
    """Outputs, what the router told of each row, and the float64 leaves: weights by name, and x."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = case.x.double().requires_grad_()
    stacks = {name.split(".")[1]: leaf for name, leaf in leaves.items() if name.startswith("experts.")}
    loader = naive_feed_forward(case.config, stacks, bent(case.config))
    rows = [
        naive_experts(case.config, leaves["router.weight"], loader, row, training=training, counted=counted)
        for row, counted in zip(x, case.counted, strict=True)
    ]
    return torch.stack([out for out, _ in rows]), [told for _, told in rows], leaves, x


def counting(case: Case) -> Tensor:
    return torch.arange(case.x.shape[1]) < torch.tensor(case.counted).unsqueeze(1)


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Float32 against float64, through three products of values of size 1: 1e-5 of the largest value, and 1e-6."""
    scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    gap = float((ours.detach().double() - theirs.detach()).abs().max()) if theirs.numel() else 0.0
    assert gap <= 1e-5 * scale + 1e-6, f"{what}: {gap} of {scale}"


@settings(max_examples=50, deadline=None)
@given(cases())
def test_training_equals_the_naive_mixture(drawn: tuple[Case, int]) -> None:
    """Outputs, drops, gradients of everything, both losses and the usage."""
    case, seed = drawn
    layer = mixture(case.config, seed).train()
    outputs, told, leaves, wide = naive(case, layer, training=True)
    # Equal probabilities may be ordered either way.
    assume(all(row.gap > 1e-5 for row in told))
    active = case.active.tolist()
    balance = sum((row.balance for row, is_active in zip(told, active, strict=True) if is_active), torch.zeros(()))
    z = sum((row.z for row, is_active in zip(told, active, strict=True) if is_active), torch.zeros(()))
    ((outputs * case.gradient).sum() + 0.5 * balance + 0.25 * z).backward()

    x, routing = case.x.clone().requires_grad_(), Routing(case.x.shape[1], counting(case))
    result = layer(x, SITE, routing)
    terms, metrics = router_terms(routing, case.active, LOSSES)
    loss = (result * case.gradient).sum() + sum(term.coefficient * term.total for term in terms)
    loss.backward()

    assert_near(result, outputs, "outputs")
    assert wide.grad is not None and x.grad is not None
    assert_near(x.grad, wide.grad, "x")
    for name, parameter in layer.named_parameters():
        theirs = leaves[name].grad
        assert parameter.grad is not None, name
        assert_near(parameter.grad, torch.zeros_like(leaves[name]) if theirs is None else theirs, name)
    assert_near(terms[0].total, torch.as_tensor(balance), "balance")
    assert_near(terms[1].total, torch.as_tensor(z), "z")
    heard = [row for row, is_active in zip(told, active, strict=True) if is_active]
    assert int(metrics["expert_usage_dropped"][0]) == sum(row.dropped for row in heard)
    shares = [sum(row.chosen[e] for row in heard) for e in range(case.config.num_experts)]
    assert metrics["expert_usage_share"][0].tolist() == shares
    assert int(metrics["expert_usage_share"][1]) == int(metrics["expert_usage_dropped"][1]) == sum(shares)
    positions = sum(row.counted for row in heard)
    assert float(metrics["expert_usage_probability"][1]) == positions
    assert float(metrics["expert_usage_probability"][0].sum()) == pytest.approx(positions, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_evaluation_drops_nothing(drawn: tuple[Case, int]) -> None:
    case, seed = drawn
    layer = mixture(case.config, seed).eval()
    outputs, told, _, _ = naive(case, layer, training=False)
    assume(all(row.gap > 1e-5 for row in told))
    routing = Routing(case.x.shape[1])
    with torch.no_grad():
        assert_near(layer(case.x, SITE, None), outputs, "outputs")
        assert torch.equal(layer(case.x, SITE, routing), layer(case.x, SITE, None))
    assert not routing.chosen and not routing.routed


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_row_in_chunks_is_the_row(drawn: tuple[Case, int], data: st.DataObject) -> None:
    """Chunk after chunk the same choices are dropped as in the whole row, and the parts of the losses and metrics add
    up; in the balance loss an expert's share is that of the row up to the chunk's end."""
    case, seed = drawn
    layer = mixture(case.config, seed).train()
    length, mask = case.x.shape[1], counting(case)
    whole = Routing(length, mask)
    want = layer(case.x, SITE, whole)
    positions = mask.sum(1)
    inner = data.draw(st.sets(st.integers(1, length), max_size=4))
    borders = [0, *sorted({*inner, length})]
    pieces, parts = [], []
    routing: Routing | None = None
    for first, stop in pairwise(borders):
        counted = mask[:, first:stop]
        routing = Routing(length, counted) if routing is None else routing.next_chunk(counted)
        pieces.append(layer(case.x[:, first:stop], SITE, routing))
        parts.append(router_terms(routing, case.active, LOSSES, positions))
    assert_near(torch.cat(pieces, dim=1), want.detach().double(), "outputs")
    assert routing is not None and torch.equal(routing.chosen[SITE], whole.chosen[SITE])
    terms, metrics = router_terms(whole, case.active, LOSSES)
    assert_near(sum((part[0][1].total for part in parts), torch.zeros(())), terms[1].total.double(), "z")
    for (first, stop), (told, _) in zip(pairwise(borders), parts, strict=True):
        assert_near(told[0].total, balance_of_chunk(case, layer, first, stop), "balance")
    for name, (total, weight) in metrics.items():
        if name != "moe_balance_loss":
            assert_near(sum((part[1][name][0] for part in parts), torch.zeros_like(total)), total.double(), name)
        added = sum((part[1][name][1] for part in parts), torch.zeros_like(weight))
        assert float(added) == pytest.approx(float(weight), rel=1e-5, abs=1e-6), name


def balance_of_chunk(case: Case, layer: MixtureOfExperts, first: int, stop: int) -> Tensor:
    """E * sum_e f_e P_e of the active rows: f over the positions before `stop`, P this chunk's part of the mean."""
    probability = layer.router(case.x).softmax(-1).detach().double()
    chosen = probability.topk(layer.chosen, dim=-1).indices
    total = torch.zeros((), dtype=torch.float64)
    for row, (counted, active) in enumerate(zip(case.counted, case.active.tolist(), strict=True)):
        picked = chosen[row, : min(stop, counted)].flatten()
        share = torch.bincount(picked, minlength=case.config.num_experts) / max(len(picked), 1)
        mean = probability[row, first : max(first, min(stop, counted))].sum(0) / max(counted, 1)
        total = total + active * case.config.num_experts * (share * mean).sum()
    return total


def test_a_site_is_heard_once() -> None:
    """A block that is computed again sees the counts of the chunks before, and adds nothing."""
    config = tiny_config(num_experts=4, moe_capacity_factor=0.5)
    layer = mixture(config, 0).train()
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    first = Routing(24)
    layer(x, SITE, first)
    second = first.next_chunk(None)
    once, told = layer(x, SITE, second), second.routed[SITE]
    again = layer(x, SITE, second)
    assert torch.equal(once, again) and second.routed[SITE] is told
    assert torch.equal(second.chosen[SITE], 2 * first.chosen[SITE])
    # A place beside this one is another router's.
    layer(x, (SITE[0], SITE[1] + 1), second)
    assert len(second.routed) == 2
    aside = second.detached()
    layer(x, SITE, aside)
    assert second.routed[SITE] is told and aside.routed[SITE] is not told


@pytest.mark.parametrize(("factor", "length", "chosen", "experts", "places"), [
    (1.25, 128, 2, 8, 40), (1.0, 7, 1, 3, 3), (1.2, 10, 2, 8, 3), (0.1, 1, 1, 8, 1), (1.1, 100, 2, 4, 55)
])  # fmt: skip
def test_capacity(factor: float, length: int, chosen: int, experts: int, places: int) -> None:
    """factor * T * k / E rounded up, where the exact product is a whole number to that."""
    config = tiny_config(num_experts=experts, num_experts_per_tok=chosen, moe_capacity_factor=factor)
    assert MixtureOfExperts(config).capacity(length, experts) == places


def objective_of(config: ModelConfig, supervision: str = "rollout") -> AnyObjective:
    model = tiny_model(config)
    return build_objective(model, "softmax", supervision=supervision, halt_margin=0.01, router_losses=LOSSES).train()


CROWDED = {"num_experts": 4, "moe_capacity_factor": 0.6}


def training_logits(objective: AnyObjective, batch: dict[str, Tensor]) -> Tensor:
    """States after the last segment of training, with drops."""
    carry = objective.initial_carry(batch)
    with torch.no_grad():
        for _ in range(objective.segments_per_step):
            carry = objective(batch, carry).carry
    states: Tensor = carry.states.z_h
    return states


def test_no_token_depends_on_a_later_one() -> None:
    """In training too, where experts are full: whoever comes later finds a place or not, and moves nobody."""
    objective = objective_of(tiny_config(**CROWDED, halt_max_steps=3))
    batch = text_batch(0, [[12], [5, 7]])
    before = training_logits(objective, batch)
    moved_later = False
    for place in range(1, 12):
        changed = {name: t.clone() for name, t in batch.items()}
        changed["inputs"][:, place] = (changed["inputs"][:, place] + 1) % 19
        after = training_logits(objective, changed)
        assert float((after[:, :place] - before[:, :place]).abs().max()) <= 1e-5
        moved_later |= bool((after[:, place] != before[:, place]).any())
    assert moved_later


@pytest.mark.parametrize("task", ["lm", "puzzle"])
def test_no_row_depends_on_another(task: str) -> None:
    """A row alone, and among rows that crowd the same experts: 1e-5, for the product of more rows is cut otherwise."""
    config = tiny_config(task=task, **CROWDED)
    objective = objective_of(config)
    batch = text_batch(0, [[12]] * 6) if task == "lm" else puzzle_batch(0, 6, config)
    together = training_logits(objective, batch)
    for row in (0, 5):
        alone = training_logits(objective, {name: t[row : row + 1] for name, t in batch.items()})
        assert float((alone[0] - together[row]).abs().max()) <= 1e-5


@pytest.mark.parametrize("mode", ["text", "transformer", "segment", "rollout"])
def test_recomputed_blocks_have_the_same_gradients(mode: str) -> None:
    """With gradient checkpointing: bit for bit, the routers' losses among them."""
    arch = (
        {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if mode == "transformer" else {"bp_steps": 4}
    )
    config = tiny_config(task="lm" if mode in ("text", "transformer") else "puzzle", h_layers=2, **CROWDED, **arch)
    batch = text_batch(3, [[12], [5, 7]]) if config.task == "lm" else puzzle_batch(3, 2, config)
    gradients = []
    for recompute in (False, True):
        objective = objective_of(config, "segment" if mode == "segment" else "rollout")
        if recompute:
            apply_activation_checkpointing(objective.model)
        backward_all(objective, batch)
        gradients.append({name: p.grad for name, p in objective.named_parameters()})
    for name, gradient in gradients[0].items():
        recomputed = gradients[1][name]
        assert gradient is not None and recomputed is not None and torch.equal(gradient, recomputed), name


def test_idle_experts_have_gradients_of_zero() -> None:
    """Also those of a batch in which a router sends every token to the same experts."""
    config = tiny_config(num_experts=4, bp_steps=6)
    objective = objective_of(config)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    backward_all(objective, text_batch(0, [[12]]))
    for name, parameter in objective.named_parameters():
        if ".experts." in name:
            assert parameter.grad is not None
            used = parameter.grad.flatten(1).any(1)
            assert int(used.sum()) == 2, name


def test_idle_rows_weigh_nothing() -> None:
    """A batch filled up with idle rows has the gradients and the usage of its real rows."""
    config = tiny_config(**CROWDED)
    few = text_batch(0, [[12], [12]])
    many = {name: torch.cat((t, t)) for name, t in few.items()}
    many["active"] = torch.tensor([True, True, False, False])
    many["labels"][2:] = -100
    found = []
    for batch in (few, many):
        objective = objective_of(config)
        loss = backward_all(objective, batch)
        output = objective(batch, objective.initial_carry(batch))
        usage = {name: pair for name, pair in output.metrics.items() if "expert_usage" in name or "moe" in name}
        found.append((loss, [p.grad for p in objective.parameters()], usage))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None and other is not None
        assert float((one - other).abs().max()) <= 1e-5 * max(float(one.abs().max()), 1e-3)
    assert len(found[0][2]) == 4
    for name, (total, weight) in found[0][2].items():
        assert torch.allclose(total.float(), found[1][2][name][0].float(), rtol=1e-5), name
        assert float(weight) == float(found[1][2][name][1]), name


def test_positions_that_count() -> None:
    labels = torch.tensor([[5, -100, 3, -100, -100], [-100] * 5, [-100, -100, 0, 0, 0], [-100, -100, -100, -100, 7]])
    assert positions_that_count(labels).int().tolist() == [[1, 1, 1, 0, 0], [0] * 5, [1] * 5, [1] * 5]


def test_padding_takes_nobodys_place() -> None:
    """Real positions of a padded row go through the experts as they would in a row of that length whatever the
    padding's tokens are, and the losses are those of the real positions."""
    config = tiny_config(**CROWDED)
    objective = objective_of(config)
    batch = text_batch(0, [[7, 5]])
    batch["labels"][:, 6:] = -100
    other = {name: t.clone() for name, t in batch.items()}
    other["inputs"][:, 7:] = (other["inputs"][:, 7:] + 3) % 19
    one, two = training_logits(objective, batch), training_logits(objective, other)
    assert float((one[:, :6] - two[:, :6]).abs().max()) <= 1e-5
    assert float((one[:, 7:] - two[:, 7:]).abs().max()) > 0.1
    assert backward_all(objective, batch) == pytest.approx(backward_all(objective, other), rel=1e-6)


@pytest.mark.parametrize("width", [24, 13])
@pytest.mark.parametrize("mode", ["text", "transformer", "segment"])
def test_nothing_asks_for_a_value(mode: str, width: int) -> None:
    """A training pass runs on tensors without content: no size depends on where tokens go, no device is waited for."""
    arch = {"arch": "transformer", "halt_max_steps": 1} if mode == "transformer" else {}
    config = tiny_config(
        task="puzzle" if mode == "segment" else "lm", num_experts=4, hidden_size=20, intermediate_size=width, **arch
    )
    batch = text_batch(0, [[12], [12]]) if config.task == "lm" else puzzle_batch(0, 2, config)
    batch.pop("documents", None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = build_objective(
            tiny_model(config), "softmax", supervision="segment", halt_margin=0.01, router_losses=LOSSES
        ).train()
        fake = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
        output = objective(fake, objective.initial_carry(fake))
        sum(term.total for term in output.terms).backward()  # type: ignore[union-attr]
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


def test_devices_without_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the experts' rows apart gives the same numbers; 1e-6, since the product of fewer rows may round else."""
    found = []
    for devices in (grouped_product._WITH_GROUPED_PRODUCT, frozenset()):
        monkeypatch.setattr(grouped_product, "_WITH_GROUPED_PRODUCT", devices)
        objective = objective_of(tiny_config(**CROWDED, bp_steps=4))
        loss = backward_all(objective, text_batch(1, [[12], [4, 8]]))
        found.append((loss, [p.grad for p in objective.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None and other is not None
        assert float((one - other).abs().max()) <= 1e-6 * max(float(one.abs().max()), 1.0)


def gradients_in(dtype: torch.dtype | None, weights: torch.dtype | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of two segments under autocast to `dtype`, with the parameters kept in `weights`."""
    objective = objective_of(tiny_config(num_experts=4, moe_capacity_factor=4.0, bp_steps=6))
    if weights is not None:
        cast_weights(objective.model, weights)
    batch = text_batch(1, [[12], [12]])
    carry = objective.initial_carry(batch)
    totals = {name: float(weight) for name, weight in objective.weights(batch, carry).items()}
    whole = 0.0
    for _ in range(objective.segments_per_step):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = objective(batch, carry)
        loss = torch.stack([t.coefficient * t.total.float() / totals[t.denominator] for t in output.terms]).sum()
        loss.backward()
        whole, carry = whole + float(loss.detach()), output.carry
    return whole, {name: p.grad.float() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "weights"), [
    (torch.bfloat16, None), (torch.float16, None), (None, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
])  # fmt: skip
def test_narrow_types(dtype: torch.dtype | None, weights: torch.dtype | None) -> None:
    """Near the float32 run: a token whose scores are close may take another expert, so only the bulk is held, by the
    angle between the gradients of all experts."""
    loss, gradients = gradients_in(dtype, weights)
    want_loss, want = gradients_in(None, None)
    assert loss == pytest.approx(want_loss, rel=0.02)
    assert gradients.keys() == want.keys()
    ours = torch.cat([g.flatten() for name, g in gradients.items() if ".mlp." in name])
    theirs = torch.cat([g.flatten() for name, g in want.items() if ".mlp." in name])
    assert float(F.cosine_similarity(ours, theirs, dim=0)) > 0.97


def test_weights_are_cast_once_in_a_pass() -> None:
    """Twelve calls of two segments' updates share two casts of each projection."""
    config = tiny_config(num_experts=4)
    layer = mixture(config, 0)
    routing = Routing(12)
    weight = layer.experts.up_proj.weight
    narrow = routing.cast(weight, torch.bfloat16)
    assert narrow is routing.cast(weight, torch.bfloat16) and not narrow.requires_grad
    assert routing.next_chunk(None).cast(weight, torch.bfloat16) is narrow
    assert routing.detached().cast(weight, torch.bfloat16) is narrow
    assert Routing(12).cast(weight, torch.bfloat16) is not narrow
    same = routing.cast(weight, torch.float32)
    assert same.data_ptr() == weight.data_ptr()


def test_the_router_is_computed_in_float32() -> None:
    layer = mixture(tiny_config(num_experts=4), 0)
    x = torch.randn(1, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.router(x), layer.router(x)) and layer.router(x).dtype == torch.float32
        scores = layer.router(x)
    assert torch.equal(scores, layer.router(x))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True), max_size=30))
def test_sorting(choices: list[list[int]]) -> None:
    experts = torch.tensor(choices, dtype=torch.long).view(-1, 2)
    order = sort_by_expert(experts, torch.bincount(experts.flatten(), minlength=7))
    want = sorted(range(2 * len(choices)), key=lambda number: (experts.flatten()[number], number))
    assert order.token.tolist() == [number // 2 for number in want]
    assert order.index.flatten().tolist() == [want.index(number) for number in range(len(want))]
    assert order.ends.tolist() == [sum(int(e) <= expert for e in experts.flatten()) for expert in range(7)]
    assert order.ends.dtype == torch.int32


def test_generation_reads_what_evaluation_reads() -> None:
    """Token by token with caches, and the whole sequence at once: no capacity in either."""
    from hrm_ray.inference.text import DecodingSession

    config = tiny_config(**CROWDED)
    model = tiny_model(config).eval()
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01).eval()
    batch = text_batch(0, [[12]])
    with recorded_logits(model) as seen, torch.no_grad():
        reader = DecodingSession(model, adaptive=False)
        first = reader.read(batch["inputs"][0, :5].tolist())[0]
        rest = [reader.read([int(token)])[0] for token in batch["inputs"][0, 5:]]
        carry = objective.initial_carry(batch)
        for _ in range(objective.segments_per_step):
            carry = objective(batch, carry).carry
        whole = model.logits(carry.states.z_h)
    assert seen
    assert torch.allclose(torch.cat((first, *rest)), whole[0], atol=1e-5)

"""Every strategy trains as one process does, and its checkpoints are those of every other.

Two gloo processes run each case of `CASES` under each strategy from the same checkpoint, accumulating two
micro-batches, and then go on from one another's checkpoints. What is compared lies in the files of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.support.splits import MEMORY
from tests.support.strategy_runs import Case, Ended, in_two_processes, trained, write_start

pytestmark = [pytest.mark.agreement, pytest.mark.slow]

STRATEGIES = ("ddp", "sharded-optimizer", "zero1", "zero2", "zero3", "fsdp")
CUT, SMALLER = "2x2x2", "2x2x2 -> 2x4x1"

_CLIPPED: dict[str, Any] = {"grad_clip": 0.3}
_LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
CASES = {
    case.name: case
    for case in (
        Case("text", optimizer="sgd"),
        Case("text-ema", more={"optimizer": {"optimizer": "adamw", "lr": 1e-3, "ema": 0.9, **_CLIPPED}}),
        Case("experts", "text-experts", more={"memory": {"gradient_checkpointing": True}}),
        Case("chunked-exact-experts", "chunked-exact-experts"),
        Case("chunked-recomputed", "chunked", more={"memory": {**MEMORY["chunked"], "gradient_checkpointing": True}}),
        Case("puzzle-ema", "puzzle-embedding", more={"optimizer": {"ema": 0.9, **_CLIPPED}}),
        Case("puzzle-rollout", "puzzle-rollout", "sgd"),
        Case("lora", more={"adapt": _LORA, "optimizer": _CLIPPED}),
        Case("not-finite-ema", more={"optimizer": {"ema": 0.9, **_CLIPPED}}, bad_steps=(1, 2, 3)),
        Case("text-ema-rank-without-rows", more={"optimizer": {"ema": 0.9, **_CLIPPED}}, rows=26),
        Case("puzzle-rank-without-rows", "puzzle-rollout", rows=26),
        Case("nf4", more={"adapt": _LORA, "memory": {"load_in_4bit": True}}),
    )
}
NARROW = {
    case.name: case
    for case in (
        Case("bf16", more={"memory": {"amp": True, "amp_dtype": "bf16"}, "optimizer": _CLIPPED}),
        Case("fp16", more={"memory": {"amp": True, "amp_dtype": "fp16"}, "optimizer": _CLIPPED}),
    )
}
_BF16: dict[str, Any] = {"memory": {"model_dtype": "bf16"}}
BF16_WEIGHTS = {
    case.name: case
    for case in (
        Case("bf16-weights", more={**_BF16, "optimizer": {"ema": 0.9}}),
        Case("bf16-weights-puzzle", "puzzle-embedding", more={**_BF16, "optimizer": {"ema": 0.9, **_CLIPPED}}),
        Case("bf16-weights-not-finite", more={**_BF16, "optimizer": _CLIPPED}, bad_steps=(1, 2, 3)),
    )
}
WHOLE_TENSORS = {
    case.name: case
    for case in (
        Case("8-bit", more={"optimizer": {"use_8bit_optimizer": True, "optimizer": "adamw", "lr": 1e-3}}),
        BF16_WEIGHTS["bf16-weights"],
        Case("one-expert", "text-one-expert-trained"),
    )
}
"""What ddp and sharded-optimizer update to the bit alike; for DeepSpeed these are other numbers, or refused."""


def strategies_of(case: Case) -> tuple[str, ...]:
    """FSDP2 trains no experts."""
    return STRATEGIES[:-1] if "experts" in case.scenario else STRATEGIES


RESUMED, BF16_RESUMED = "text-ema", "bf16-weights"
ZERO = ("zero1", "zero2", "zero3")
RUNS = [
    *((case, strategy, CUT) for case in (*CASES.values(), *NARROW.values()) for strategy in strategies_of(case)),
    *((case, strategy, CUT) for case in WHOLE_TENSORS.values() for strategy in STRATEGIES[:2]),
    *((case, strategy, CUT) for case in BF16_WEIGHTS.values() for strategy in ZERO),
    *((CASES["experts"], strategy, SMALLER) for strategy in ("sharded-optimizer", "zero1")),
]
RESUMES = [
    *((same, same) for same in STRATEGIES),
    *zip(STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True),
    *(("ddp", "zero3"), ("zero1", "ddp"), ("zero3", "zero1"), ("zero3", "sharded-optimizer")),
]
"""Each from itself, round the ring, and across. A checkpoint has one form, so what each reads and writes is enough."""
BF16_RESUMES = [*((same, same) for same in ZERO), ("zero2", "sharded-optimizer"), ("ddp", "zero3"), ("zero3", "zero1")]

Results = dict[tuple[str, ...], Ended]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder: Path = tmp_path_factory.mktemp("strategies")
    threads = torch.get_num_threads()
    found: Results = {}
    for case in (CASES | NARROW | WHOLE_TENSORS | BF16_WEIGHTS).values():
        write_start(case, folder / f"start-{case.name}")
        end = folder / f"end-{case.name}-single"
        found[case.name, "single"] = trained(case, "single", "1x1x8", folder / f"start-{case.name}", end)
    resumed = [(CASES[RESUMED], first, then) for first, then in RESUMES]
    resumed += [(BF16_WEIGHTS[BF16_RESUMED], first, then) for first, then in BF16_RESUMES]
    interrupted = [(BF16_WEIGHTS[BF16_RESUMED], strategy) for strategy in ZERO]
    mp.spawn(in_two_processes, (2, folder, RUNS, resumed, interrupted), nprocs=2)
    found |= torch.load(folder / "results.pt", weights_only=False)
    case = CASES[RESUMED]
    for first in ("single", *STRATEGIES):
        start = folder / (f"end-{case.name}-single" if first == "single" else f"end-{case.name}-{first}-{CUT}")
        end = folder / f"resumed-{first}-single"
        found[case.name, first, "then", "single"] = trained(case, "single", "1x1x8", start, end)
    torch.set_num_threads(threads)
    yield found


def gap(ours: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors with the same names."""
    assert ours.keys() == whole.keys()
    return max((float((ours[name].float() - whole[name].float()).abs().max()) for name in whole), default=0.0)


@pytest.mark.parametrize(
    ("name", "strategy"), [(name, strategy) for name, case in CASES.items() for strategy in strategies_of(case)]
)
def test_a_strategy_trains_as_one_process(results: Results, name: str, strategy: str) -> None:
    """Float32 sums in another order, four updates long: 1e-6 of values of size 1; a wrong weighing shows at 1e-2.
    A moment of adam-atan2 or a weight that it moves is as close, because every gradient here is far above rounding."""
    whole, ours = results[name, "single"], results[name, strategy, CUT]
    assert ours.losses == pytest.approx(whole.losses, rel=1e-6)
    assert ours.norms == pytest.approx(whole.norms, rel=2e-6)
    assert ours.figures == pytest.approx(whole.figures, rel=2e-6, abs=1e-5)
    assert gap(ours.weights, whole.weights) <= 1e-6
    assert gap(ours.optimizer, whole.optimizer) <= 1e-6
    assert gap(ours.average, whole.average) <= 1e-6
    assert bool(whole.average) == ("ema" in name)
    assert bool(whole.optimizer) == (CASES[name].optimizer != "sgd")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("name", NARROW)
def test_mixed_precision_rounds_as_under_ddp(results: Results, name: str, strategy: str) -> None:
    """The same micro-batches round alike in 16 bits; the float32 sums over two ranks may differ in the last bits, which
    16-bit products can make 1e-3 of a loss in four updates."""
    ddp, ours = results[name, "ddp", CUT], results[name, strategy, CUT]
    assert ours.losses == pytest.approx(ddp.losses, rel=1e-3)
    assert ours.norms == pytest.approx(ddp.norms, rel=1e-2)
    assert gap(ours.weights, ddp.weights) <= 1e-3


@pytest.mark.parametrize("name", WHOLE_TENSORS)
def test_a_sharded_optimizer_updates_to_the_bit_as_ddp(results: Results, name: str) -> None:
    ddp, ours = results[name, "ddp", CUT], results[name, "sharded-optimizer", CUT]
    assert gap(ours.weights, ddp.weights) == gap(ours.optimizer, ddp.optimizer) == gap(ours.average, ddp.average) == 0
    assert ours.losses == ddp.losses and ours.figures == ddp.figures


def assert_close_as_bfloat16(ours: Ended, theirs: Ended, steps: int) -> None:
    """Weights of size 1 in bfloat16 lie 8e-3 apart and are rounded in every update, to nearest here and stochastically
    there, so `steps` updates leave them a few of these steps apart. A row of the puzzle table moves by the sign of its
    gradient, which rounding turns round where the gradient is next to zero."""
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-2)
    assert ours.norms == pytest.approx(theirs.norms, rel=5e-2)
    rounded, there = ({n: t for n, t in e.weights.items() if "puzzle_emb" not in n} for e in (ours, theirs))
    assert gap(rounded, there) <= 4e-3 * steps
    assert gap(ours.average, theirs.average) <= 2e-3 * steps
    assert gap(without_updates(ours), without_updates(theirs)) <= 1e-3 * steps


def without_updates(ended: Ended) -> dict[str, Tensor]:
    """The optimizer state without the number from which stochastic rounding draws."""
    return {name: tensor for name, tensor in ended.optimizer.items() if not name.endswith("|updates")}


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("name", BF16_WEIGHTS)
def test_bf16_weights_under_zero(results: Results, name: str, strategy: str) -> None:
    """As one process with bf16 weights; the checkpoint has the float32 weights that are updated."""
    ours, whole = results[name, strategy, CUT], results[name, "single"]
    assert_close_as_bfloat16(ours, whole, 4)
    # The first update has the same weights; a wrong weighing of rows shows at 1e-2.
    assert ours.losses[0] == pytest.approx(whole.losses[0], rel=1e-3)
    assert ours.norms[0] == pytest.approx(whole.norms[0], rel=2e-3)
    assert {ours.weights[trained].dtype for trained in ours.average} <= {torch.float32}
    assert bool(ours.average) == ("ema" in BF16_WEIGHTS[name].more.get("optimizer", {}))


@pytest.mark.parametrize(("first", "then"), BF16_RESUMES)
def test_bf16_weights_resume_under_any_strategy(results: Results, first: str, then: str) -> None:
    whole = results[BF16_RESUMED, "zero1", "then", "zero1"]
    assert_close_as_bfloat16(results[BF16_RESUMED, first, "then", then], whole, 8)


@pytest.mark.parametrize("strategy", ZERO)
def test_an_interruption_with_bf16_weights_loses_nothing(results: Results, strategy: str) -> None:
    """The float32 weights go through the checkpoint whole, where those rounded to bfloat16 are up to 4e-3 off. Products
    in bfloat16 may round otherwise where tensors lie elsewhere in memory."""
    whole, resumed = results[BF16_RESUMED, strategy, "whole"], results[BF16_RESUMED, strategy, "resumed"]
    assert resumed.losses[0] == whole.losses[4]
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=1e-3)
    assert gap(resumed.weights, whole.weights) <= 1e-4
    assert gap(resumed.optimizer, whole.optimizer) <= 1e-4
    assert gap(resumed.average, whole.average) <= 1e-4


@pytest.mark.parametrize("strategy", ["sharded-optimizer", "zero1"])
def test_micro_batches_are_halved_where_passes_may_be_repeated(results: Results, strategy: str) -> None:
    """The sums of smaller micro-batches differ as above; capacity of experts is per micro-batch and none drops here."""
    whole, ours = results["experts", "single"], results["experts", strategy, SMALLER]
    assert ours.ended_as == (4, 1)
    assert ours.losses == pytest.approx(whole.losses, rel=1e-6)
    assert gap(ours.weights, whole.weights) <= 1e-6


@pytest.mark.parametrize(("first", "then"), [*RESUMES, *((first, "single") for first in ("single", *STRATEGIES))])
def test_every_strategy_resumes_every_other(results: Results, first: str, then: str) -> None:
    """Four updates under `first` and four more under `then`, against one process: the sum of two runs' roundings."""
    whole, ours = results[RESUMED, "single", "then", "single"], results[RESUMED, first, "then", then]
    assert ours.losses == pytest.approx(whole.losses, rel=1e-6)
    assert gap(ours.weights, whole.weights) <= 2e-6
    assert gap(ours.optimizer, whole.optimizer) <= 2e-6
    assert gap(ours.average, whole.average) <= 2e-6


@pytest.mark.parametrize(
    ("name", "strategy"), [*((RESUMED, each) for each in STRATEGIES), *((BF16_RESUMED, each) for each in ZERO)]
)
def test_a_strategy_resumes_itself_to_the_bit(results: Results, name: str, strategy: str) -> None:
    """Loading a checkpoint and saving it again changes nothing."""
    saved, again = results[name, strategy, CUT], results[name, strategy, "saved again"]
    assert gap(again.weights, saved.weights) == gap(again.optimizer, saved.optimizer) == 0
    assert gap(again.average, saved.average) == 0

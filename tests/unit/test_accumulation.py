"""What accumulation promises: the memory of one micro-batch, a steadier logged loss, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_ray.model.config import model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.microbatch import to_batch
from hrm_ray.train.storage_tracker import StorageTracker
from hrm_ray.train.world import World
from tests.support.runs import TEXT, last_said, records, text_file
from tests.support.splits import SCENARIOS, SEQ_LEN, VOCABULARY, Rows

ROOT = Path(__file__).resolve().parents[2]


def loop_of(
    batch_size: int, accumulation: int, *, scenario: str = "text", rows: int = 640, **sections: dict[str, Any]
) -> TrainingLoop:
    """A loop on random rows, with a learning rate too small to change anything that is looked at here."""
    model = {"hidden_size": 32, "num_heads": 2, "h_layers": 1, "l_layers": 1, **SCENARIOS[scenario]}
    settings = RunSettings.model_validate(
        {
            "model": model | sections.get("model", {}),
            "optimizer": {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "lr": 1e-9},
            "memory": {"amp": False} | sections.get("memory", {}),
        }
    )
    config = model_config(settings, VOCABULARY, seq_len=SEQ_LEN, puzzle_identifiers=5)
    samples = Rows(config.task, rows)
    return assemble(settings, config, samples, World.here("cpu", 1), 1000)


@pytest.mark.parametrize("scenario", ["text", "puzzle-carried"])
def test_memory_is_that_of_one_micro_batch(scenario: str) -> None:
    """Bytes of tensors at the peak of a step, beside the gradients: those of the micro-batches before are there while
    a later one computes. Carried puzzles keep 15 more carries; beside them, and beside the rows' own columns and the
    metrics' scalars, nothing may grow: 2 % of the peak."""
    peaks, carried = {}, {}
    for accumulation in (1, 16):
        loop = loop_of(2, accumulation, scenario=scenario)
        loop.step()
        with StorageTracker() as watch:
            reduce = loop.parts.strategy.reduce

            def named(
                failed: bool,
                watch: StorageTracker = watch,
                loop: TrainingLoop = loop,
                reduce: Callable[[bool], bool] = reduce,
            ) -> bool:
                parameters = loop.parts.objective.parameters()
                watch.name("gradients", [p.grad for p in parameters if p.grad is not None])
                return reduce(failed)

            loop.parts.strategy.reduce = named  # type: ignore[method-assign]
            loop.step()
        peaks[accumulation] = watch.peak_bytes(beside=("gradients",))
        carries = loop.carries or []
        carried[accumulation] = sum(
            t.nbytes for c in carries for t in (c.states.z_h, c.states.z_l, c.steps, c.halted, *c.data.values())
        )
    # While a step runs, the carries that it started from and those that it has made live side by side.
    assert peaks[16] - 2 * carried[16] <= 1.02 * peaks[1]


def test_the_logged_loss_is_steadier() -> None:
    """Of 16 times as many rows the mean's variance is a sixteenth; the issue asks for no more than half."""
    variance = {}
    for accumulation in (1, 16):
        loop = loop_of(2, accumulation)
        losses = []
        for _ in range(20):
            assert loop.step() is not None
            losses.append(loop.flush_metrics()["objective"])
        variance[accumulation] = float(np.var(losses))
    assert 0 < variance[16] <= 0.5 * variance[1]


@pytest.mark.slow
def test_two_thousand_steps_leave_nothing_behind(tmp_path: Path) -> None:
    """The slope of the process's resident memory after the first quarter: less than 1 kB a step, which 2,000 steps of
    a leak of one small tensor each would exceed; allocators' own movements are some 100 kB in all."""
    bundle = tmp_path / "b"
    words = ("--dataset-file", text_file(tmp_path, rows=400), "--bundle-dir", bundle,
             *last_said((*TEXT, "--steps", 2000, "--log-every", 20, "--save-every", 0)))  # fmt: skip
    subprocess.run([sys.executable, "-m", "hrm_ray", "train", *map(str, words)], cwd=ROOT, check=True)
    seen = [(r["step"], r["memory_gb"] * 1e9) for r in records(bundle) if r["step"] >= 500]
    steps, resident = (np.array(values, dtype=np.float64) for values in zip(*seen, strict=True))
    slope_bytes = float(np.polyfit(steps, resident, 1)[0])
    print(f"{slope_bytes:.0f} bytes a step over {len(seen)} records")
    assert slope_bytes < 1000


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_gradients_are_added_in_float32(dtype: str) -> None:
    """16 micro-batches of 4 segments: added in bfloat16 they are 0.8 % away from their sum, in float32 nothing but the
    rounding of float32."""
    loop = loop_of(2, 16, memory={"amp": False, "model_dtype": dtype}, model={"halt_max_steps": 4})
    parameter = loop.parts.objective.model.get_parameter("lm_head.weight")
    seen: list[Tensor] = []
    parameter.register_hook(lambda gradient: seen.append(gradient.double()))
    strategy = loop.parts.strategy
    summed: list[Tensor] = []
    reduce = strategy.reduce

    def noted(failed: bool) -> bool:
        assert parameter.grad is not None
        summed.append(parameter.grad.double())
        return reduce(failed)

    strategy.reduce = noted  # type: ignore[method-assign]
    assert loop.step() is not None
    assert len(seen) == 64
    exact = torch.stack(seen).sum(0)
    assert float((summed[0] - exact).norm() / exact.norm()) < 1e-6
    assert parameter.grad is None


def test_a_step_of_one_pass_keeps_its_gradients_narrow() -> None:
    """Where nothing is added up, float32 would cost memory for nothing."""
    loop = loop_of(4, 1, memory={"amp": False, "model_dtype": "bf16"}, model={"halt_max_steps": 1})
    columns = loop.parts.loader.next_batch([np.ones(4, dtype=np.bool_)], 1)
    loop.passes([to_batch(columns[0], loop.parts.wanted, loop.world.device)], lambda: defaultdict(lambda: 1.0))
    assert {p.grad.dtype for p in loop.parts.objective.parameters() if p.grad is not None} == {torch.bfloat16}


@pytest.mark.parametrize("scenario", ["text", "puzzle-carried"])
def test_the_totals_of_a_step_are_waited_for_after_its_first_forward_pass(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def begin_sum(world: World, tensor: Tensor) -> Callable[[], Tensor]:
        order.append("begun")
        return lambda: order.append("waited for") or tensor  # type: ignore[func-returns-value]

    monkeypatch.setattr(World, "begin_sum", begin_sum)
    loop = loop_of(4, 2, scenario=scenario, rows=8)
    segment = loop.parts.strategy.segment

    def noted(*words: Any) -> Any:
        order.append("forward")
        return segment(*words)

    loop.parts.strategy.segment = noted  # type: ignore[method-assign, assignment]
    report = loop.step()
    assert report is not None and report.totals["rows"] > 0
    assert order[:3] == ["begun", "forward", "waited for"] and order.count("waited for") == 1


def test_a_rank_without_rows_waits_for_the_totals_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be rows on no rank: then the epoch is over."""
    order: list[str] = []

    def begin_sum(world: World, tensor: Tensor) -> Callable[[], Tensor]:
        order.append("begun")
        return lambda: order.append("waited for") or tensor  # type: ignore[func-returns-value]

    monkeypatch.setattr(World, "begin_sum", begin_sum)
    loop = loop_of(4, 2, rows=8)
    real = loop.parts.loader.next_batch
    loop.parts.loader.next_batch = lambda halted, step: [  # type: ignore[method-assign]
        {name: np.zeros_like(values) if name == "active" else values for name, values in micro.items()}
        for micro in real(halted, step)
    ]
    loop.parts.loader.start_epoch = lambda trained: False  # type: ignore[method-assign]
    assert loop.step() is None
    assert order == ["begun", "waited for"]

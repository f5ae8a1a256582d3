"""A training step on this device: time, share of the device's product rate (MFU), memory, and what compiling costs.

Each case runs eagerly and compiled, with states in float32 and bfloat16. `python -m tests.benchmarks.bench_gpu --help`
lists the options; `--small` shrinks all cases to what a CPU does in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_ray.model.config import model_config
from hrm_ray.settings.presets import PRESETS
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.benchmarks.bench_cases import Case, RandomRows
from tests.benchmarks.timing import machine, table

WARM_UP_STEPS = 5
SETTLE_S = 3.0
"""After compiling: while compiler processes start and end, they take the processor from the steps."""
TOP_KERNELS = 12

_PUZZLE = {"task": "puzzle", "use_moe": False, "supervision": "segment", "loss": "stablemax", "expansion": 4.0}
_PUZZLE |= {"halt_max_steps": 16, "halt_exploration_prob": 0.1}
_TEXT = {"task": "lm", "supervision": "rollout", "loss": "softmax", "halt_exploration_prob": 0.0, "halt_max_steps": 2}


def _preset(name: str, **changes: Any) -> dict[str, Any]:
    filled = {key.partition(".")[2]: value for key, value in PRESETS[name].items()}
    return _TEXT | filled | changes


def _case(about: str, model: Mapping[str, Any], vocab_size: int, seq_len: int, batch_size: int) -> Case:
    return Case(about, model, vocab_size, seq_len, batch_size, parameters=0)


CASES: dict[str, Case] = {
    "puzzle_27m": _case(
        "the reference's Sudoku configuration: hidden 512, 4 + 4 layers, 384 x 81 cells",
        _PUZZLE | {"hidden_size": 512, "num_heads": 8, "h_layers": 4, "l_layers": 4, "puzzle_emb_ndim": 512},
        *(11, 81, 384),
    ),
    "text_medium": _case("preset medium, 16 x 1024 tokens, 2 segments", _preset("medium"), 16000, 1024, 16),
    "text_large": _case("preset large, 16 x 1024 tokens, 2 segments", _preset("large"), 16000, 1024, 16),
    "transformer_medium": _case(
        "transformer of preset medium, 16 x 1024 tokens",
        _preset("medium", arch="transformer", halt_max_steps=1),
        *(16000, 1024, 16),
    ),
    "experts_small": _case(
        "preset small with 8 experts, top 2, 16 x 1024 tokens, 2 segments",
        _preset("small", use_moe=True, num_experts=8, num_experts_per_tok=2),
        *(16000, 1024, 16),
    ),
}
VARIANTS: dict[str, tuple[bool, str]] = {
    "eager": (False, "fp32"),
    "compiled": (True, "fp32"),
    "eager_bf16": (False, "bf16"),
    "compiled_bf16": (True, "bf16"),
}
"""Name -> whether blocks are compiled, and the type of the states; products are in bfloat16 in all of them."""


def shrunk(case: Case) -> Case:
    """The case at a size for a CPU."""
    small = {"hidden_size": 64, "num_heads": 2, "h_layers": 1, "l_layers": 1}
    if case.model.get("puzzle_emb_ndim"):
        small["puzzle_emb_ndim"] = 64
    return replace(case, model={**case.model, **small}, batch_size=4, vocab_size=min(case.vocab_size, 500), seq_len=64)


def build_loop(case: Case, compiled: bool, activations: str, device: str, memory: Mapping[str, Any]) -> TrainingLoop:
    """A loop for the case as a run would have it."""
    settings = RunSettings.model_validate(
        {
            "model": case.model,
            "optimizer": {"batch_size": case.batch_size, "optimizer": "adam-atan2"},
            "memory": {"amp_dtype": "bf16", "activations": activations, "gradient_checkpointing": False, **memory},
            "cluster": {"compile": compiled, "strict": True},
        }
    )
    config = model_config(settings, case.vocab_size, seq_len=case.seq_len)
    world = World.here(device, torch.get_num_threads())
    return assemble(settings, config, RandomRows(case), world, 1000)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed_s(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has done `work`."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def product_rate(device: str) -> float:
    """FLOP/s of a large product in bfloat16, the median of ten."""
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times_s = [timed_s(lambda: left @ right, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(times_s)


def counted_flops(loop: TrainingLoop) -> int:
    """FLOPs of the products and attentions of a step, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        loop.step()
    return counter.get_total_flops()


def time_variant(case: Case, variant: str, steps: int, device: str, memory: Mapping[str, Any]) -> dict[str, Any]:
    """Build the loop anew and time its first step and `steps` later ones."""
    compiled, activations = VARIANTS[variant]
    torch.manual_seed(0)
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop = build_loop(case, compiled, activations, device, memory)
    first_s = timed_s(loop.step, device)
    losses = [loop.flush_metrics()["objective"]]
    for _ in range(WARM_UP_STEPS):
        loop.step()
        losses.append(loop.flush_metrics()["objective"])
    calls = loop.parts.compiled
    settled = time.monotonic() + SETTLE_S
    while calls is not None and time.monotonic() < settled:
        loop.step()
    graphs = calls.graphs if calls is not None else 0
    # As in a run, the host looks at a step's figures when the step is over.
    times_s = [timed_s(loop.step, device) for _ in range(steps)]
    result = {
        "step_ms": 1e3 * statistics.median(times_s),
        "fastest_ms": 1e3 * min(times_s),
        "first_step_s": first_s,
        "graphs": graphs,
        "recompiles": (calls.graphs if calls is not None else 0) - graphs,
        "losses": losses,
        "parameters": sum(p.numel() for p in loop.parts.objective.parameters()),
    }
    if device == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if not compiled:
        result["flops"] = counted_flops(loop)
    return result


def profiled(case: Case, variant: str, device: str, memory: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels that take most of a step, in ms, and the share of the step in which the device computes."""
    loop = build_loop(case, *VARIANTS[variant], device, memory)
    for _ in range(WARM_UP_STEPS):
        loop.step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    steps = 3
    with torch.profiler.profile(activities=kinds) as profile:
        wall_s = timed_s(lambda: [loop.step() for _ in range(steps)], device)
    spent_us = {
        event.key: (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
        if device != "cuda" or str(event.device_type).endswith("CUDA")
    }
    ordered = sorted(spent_us.items(), key=lambda item: -item[1][0])
    return {
        "busy_share": sum(us for us, _ in spent_us.values()) / 1e6 / wall_s,
        "launches_per_step": sum(count for _, count in spent_us.values()) / steps,
        "kernels": [
            {"name": name[:110], "ms_per_step": us / 1e3 / steps, "calls_per_step": count / steps}
            for name, (us, count) in ordered[:TOP_KERNELS]
        ],
    }


def report(name: str, case: Case, results: dict[str, dict[str, Any]], rate: float) -> None:
    """Print a case's table; adds MFU and tokens/s to the results."""
    flops = next((one["flops"] for one in results.values() if "flops" in one), None)
    rows = []
    for variant, one in results.items():
        one["tokens_per_s"] = 1e3 * case.batch_size * case.seq_len / one["step_ms"]
        if flops is not None:
            one["mfu"] = flops / (one["step_ms"] / 1e3) / rate
        rows.append(
            [
                variant,
                f"{one['step_ms']:.1f}",
                f"{one['tokens_per_s']:.0f}",
                f"{100 * one['mfu']:.1f} %" if flops is not None else "-",
                f"{one['peak_gb']:.1f}" if "peak_gb" in one else "-",
                f"{one['first_step_s']:.1f}",
                str(one["graphs"]),
                str(one["recompiles"]),
                f"{one['losses'][-1]:.4f}",
            ]
        )
    about = f"{case.about}; {next(iter(results.values()))['parameters']:,} parameters"
    print(f"\n{name}: {about}" + (f"; {flops / 1e12:.3f} TFLOP a step" if flops is not None else ""))
    titles = ("variant", "step ms", "tokens/s", "MFU", "peak GB", "first step s", "graphs", "recompiles", "loss")
    print(table(titles, rows), flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cuda or cpu (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed (default %(default)s)")
    parser.add_argument("--cases", default=",".join(CASES), help="with commas between (default %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="with commas between (default %(default)s)")
    parser.add_argument("--memory", type=json.loads, default={}, help="leaves of section memory, as JSON")
    parser.add_argument("--profile", default="", help="cases whose kernels are listed, compiled with bf16 states")
    parser.add_argument("--small", action="store_true", help="cases at a size for a CPU")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="begin nothing after so many seconds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    began = time.monotonic()
    figures: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "cases": {}, "profiles": {}}
    if chosen.device == "cuda":
        figures["machine"]["gpu"] = torch.cuda.get_device_name()
    rate = figures["product_flops_per_s"] = product_rate(chosen.device)
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    print(f"products in bfloat16: {rate / 1e12:.1f} TFLOP/s", flush=True)

    def left() -> bool:
        gc.collect()
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return time.monotonic() - began < chosen.time_limit_s

    cases = {name: shrunk(CASES[name]) if chosen.small else CASES[name] for name in chosen.cases.split(",")}
    for name, case in cases.items():
        results = figures["cases"][name] = {}
        for variant in chosen.variants.split(","):
            if left():
                results[variant] = time_variant(case, variant, chosen.steps, chosen.device, chosen.memory)
        if results:
            report(name, case, results, rate)
    for name in filter(None, chosen.profile.split(",")):
        if left():
            found = profiled(cases[name], "compiled_bf16", chosen.device, chosen.memory)
            figures["profiles"][name] = found
            print(f"\n{name}: busy {found['busy_share']:.2f}, {found['launches_per_step']:.0f} launches a step")
            for kernel in found["kernels"]:
                print(f"  {kernel['ms_per_step']:8.3f} ms {kernel['calls_per_step']:6.0f} x  {kernel['name']}")
    left()


if __name__ == "__main__":
    main()

"""A mixture of experts against a dense FFN of equal active size, and against a loop over masks.

`python -m tests.benchmarks.bench_moe` times forward and backward of one layer in interleaved rounds and prints a table
and JSON. The dense FFN is k times as wide as an expert, so that a token meets as many weights in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.layers import FeedForward
from hrm_ray.model.moe import MixtureOfExperts
from hrm_ray.model.router_losses import RouterLosses, router_terms
from hrm_ray.model.routing import Routing
from hrm_ray.openmp import limit_openmp_spin
from hrm_ray.train.world import World
from tests.benchmarks.timing import Spent, Summary, in_turn, machine, plain, summary, table

MARK = 1.5
"""The largest acceptable ratio to the dense FFN on a CPU."""
WARM_UP_ROUNDS = 3
SITE = (0, 0)


class MaskLoop(nn.Module):
    """The same mixture as a loop over experts, each on the rows that a mask picks; without capacity and losses."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.mixture.router(rows).softmax(-1).topk(self.mixture.chosen, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(rows.dtype)
        experts = self.mixture.experts
        assert experts.gate_proj is not None
        out = torch.zeros_like(rows)
        for expert in range(len(experts.up_proj.weight)):
            mask = chosen == expert
            picked = mask.any(-1)
            own = rows[picked]
            inner = F.silu(F.linear(own, experts.gate_proj.weight[expert]))
            inner = inner * F.linear(own, experts.up_proj.weight[expert])
            fed = F.linear(inner, experts.down_proj.weight[expert])
            out[picked] += (fed * (weights * mask).sum(-1)[picked].unsqueeze(-1)).to(out.dtype)
        return out.view(x.shape)


def build(said: argparse.Namespace) -> tuple[MixtureOfExperts, FeedForward]:
    """The mixture and the dense FFN, with weights of the size that training starts from."""
    shape: dict[str, Any] = {
        "task": "lm",
        "vocab_size": 2,
        "seq_len": said.length,
        "hidden_size": said.hidden,
        "num_heads": 1,
        "h_layers": 1,
        "l_layers": 1,
        "h_cycles": 1,
        "l_cycles": 1,
        "halt_max_steps": 1,
    }
    chosen = {"num_experts": said.experts, "num_experts_per_tok": said.chosen}
    mixture = MixtureOfExperts(ModelConfig(**shape, intermediate_size=said.width, **chosen)).train()
    dense = FeedForward(ModelConfig(**shape, intermediate_size=said.chosen * said.width)).train()
    generator = torch.Generator().manual_seed(0)
    for module in (mixture, dense):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return mixture, dense


def works(said: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward of each layer on the same input; of the mixture with its losses."""
    mixture, dense = build(said)
    loop = MaskLoop(mixture)
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(2, said.rows, said.length, said.hidden, generator=generator)
    active = torch.ones(said.rows, dtype=torch.bool)
    losses = RouterLosses(0.01, 0.001)

    def passed(layer: nn.Module, compute: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]) -> None:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=said.bf16):
            result, more = compute(leaf)
        torch.autograd.backward((result, *more), (gradient.to(result.dtype), *(torch.ones(()) for _ in more)))
        layer.zero_grad(set_to_none=True)

    def mixed(leaf: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        routing = Routing(said.length)
        result = mixture(leaf, SITE, routing)
        terms, _ = router_terms(routing, active, losses)
        return result, tuple(term.coefficient * term.total for term in terms)

    return {
        "dense": lambda: passed(dense, lambda leaf: (dense(leaf), ())),
        "experts": lambda: passed(mixture, mixed),
        "mask loop": lambda: passed(mixture, lambda leaf: (loop(leaf), ())),
    }


def measure(said: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each, and ratios round by round."""
    # Threads and freed memory as a run on the CPU has them.
    World.here("cpu", said.threads)
    all_works = works(said)
    for _ in range(WARM_UP_ROUNDS):
        for work in all_works.values():
            work()
    rounds = [in_turn(number, list(all_works.values())) for number in range(said.rounds)]
    names = list(all_works)
    figures: dict[str, Any] = {}
    for clock in ("cpu_s", "wall_s"):
        taken = {name: [_seconds(one[place], clock) for one in rounds] for place, name in enumerate(names)}
        figures[clock] = {
            "ms": {name: summary([1e3 * value for value in values]) for name, values in taken.items()},
            "to_dense": _ratio(taken["experts"], taken["dense"]),
            "to_mask_loop": _ratio(taken["experts"], taken["mask loop"]),
        }
    return figures


def _seconds(spent: Spent, clock: str) -> float:
    return spent.cpu_s if clock == "cpu_s" else spent.wall_s


def _ratio(above: list[float], below: list[float]) -> Summary:
    return summary([a / b for a, b in zip(above, below, strict=True)])


def report(said: argparse.Namespace, figures: dict[str, Any]) -> None:
    rows = []
    for clock, title in (("cpu_s", "CPU"), ("wall_s", "wall")):
        one = figures[clock]
        shown = [one["ms"][name].shown(1) for name in ("dense", "experts", "mask loop")]
        rows.append([title, *shown, one["to_dense"].shown(), one["to_mask_loop"].shown()])
    kind = "bf16 autocast" if said.bf16 else "float32"
    print(
        f"\n{said.experts} experts, {said.chosen} a token, {said.hidden} x {said.width}, {said.rows} x {said.length} "
        f"tokens, {kind}, {said.threads} thread(s), {said.rounds} rounds: forward + backward, median [95 % interval]"
    )
    print(table(("clock", "dense ms", "experts ms", "mask loop ms", "experts / dense", "experts / mask loop"), rows))
    ratio = figures["cpu_s"]["to_dense"]
    verdict = "PASS" if ratio.high <= MARK else "FAIL" if ratio.low > MARK else "undecided"
    print(f"mark: at most {MARK} times the dense FFN of equal active size: {verdict}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="width of the model (default %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="inner width of an expert (default %(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="experts (default %(default)s)")
    parser.add_argument("--chosen", type=int, default=2, help="experts a token goes through (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in each (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    said = parser.parse_args()
    if min(said.hidden, said.width, said.chosen, said.rows, said.length, said.rounds, said.threads) < 1:
        parser.error("every number must be at least 1")
    if said.experts < max(2, said.chosen):
        parser.error("--experts must be at least 2 and no less than --chosen")
    return said


def main() -> None:
    said = options()
    as_the_command = dict(os.environ)
    limit_openmp_spin(as_the_command)
    if as_the_command != dict(os.environ):
        # How OpenMP's threads wait is read when torch is loaded: begin again as the command hrm-ray would.
        sys.exit(subprocess.run([sys.executable, *sys.orig_argv[1:]], env=as_the_command, check=False).returncode)
    about = machine(said.threads)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    figures = measure(said)
    report(said, figures)
    if said.json is not None:
        written = {"machine": about, "shape": {k: v for k, v in vars(said).items() if k != "json"}, **figures}
        said.json.write_text(json.dumps(plain(written), indent=1) + "\n", encoding="utf-8")
        print(f"all figures: {said.json}")


if __name__ == "__main__":
    main()

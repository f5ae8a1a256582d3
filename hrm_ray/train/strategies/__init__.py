"""The table of strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from hrm_ray.train.precision import Precision
from hrm_ray.train.strategies.base import Strategy
from hrm_ray.train.strategies.ddp import DdpStrategy
from hrm_ray.train.strategies.fsdp import FsdpStrategy
from hrm_ray.train.strategies.sharded_optimizer import ShardedOptimizerStrategy
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.strategies.zero import Zero2Strategy, Zero3Strategy, ZeroStrategy
from hrm_ray.train.world import World

STRATEGIES: dict[str, Callable[[World, Precision], Strategy]] = {
    "single": SingleStrategy,
    "ddp": DdpStrategy,
    "sharded-optimizer": ShardedOptimizerStrategy,
    "zero1": ZeroStrategy,
    "zero2": Zero2Strategy,
    "zero3": Zero3Strategy,
    "fsdp": FsdpStrategy,
}
"""--strategy -> its class."""

"""Looks at a running cluster: the resources of its nodes, and what each says of itself.

Called before a run has started as well as by it; a connection that is opened for a look is closed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.node_report import NodeReport, installed, measure
from hrm_ray.launch.resources import ResourceRequest
from hrm_ray.orchestration.session import Session, restore_signal_handlers, worker_environment

REPORT_TIMEOUT_S = 20.0
"""A node answers within 3 s where its machine has time."""


def cluster_nodes(address: str) -> list[Mapping[str, float]]:
    """Total resources of each living node of the cluster. Raises SettingsError or UnavailableError."""
    with _connected(address) as session:
        return session.nodes()


def node_reports(address: str, bundle: Path, libraries: Sequence[str]) -> list[NodeReport]:
    """What the nodes of the cluster say of themselves. Raises SettingsError or UnavailableError."""
    with _connected(address):
        return ask_nodes(bundle, libraries)


def start_here() -> tuple[float, float]:
    """Seconds until a cluster of this machine alone has started, and until a task on it has run. Raises
    UnavailableError."""
    began_s = time.monotonic()
    session = Session(None, ResourceRequest(1, 1, 0))
    try:
        session.open(lambda: None)
        restore_signal_handlers()
        started_s = time.monotonic()
        ray.get(ray.remote(installed).remote(()), timeout=REPORT_TIMEOUT_S)
        return started_s - began_s, time.monotonic() - started_s
    finally:
        session.close()


@contextmanager
def _connected(address: str) -> Iterator[Session]:
    session = Session(address, ResourceRequest(1, 1, 0))
    try:
        if not session.attached:
            check_address(address)
        session.open(lambda: None)
        restore_signal_handlers()
        yield session
    finally:
        session.close()


def ask_nodes(bundle: Path, libraries: Sequence[str], timeout_s: float = REPORT_TIMEOUT_S) -> list[NodeReport]:
    """What each living node says of itself, by a task that takes no CPU."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    environment = {"env_vars": {"PYTHONPATH": worker_environment(1)["PYTHONPATH"]}}

    def ask(node: Mapping[str, Any]) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(measure).options(
            num_cpus=0, max_retries=0, runtime_env=environment, scheduling_strategy=there
        )
        return task.remote(str(bundle), list(libraries))

    asked = [ask(node) for node in nodes]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    return [_report(node, task, task in answered, timeout_s) for node, task in zip(nodes, asked, strict=True)]


def _report(node: Mapping[str, Any], task: Any, answered: bool, timeout_s: float) -> NodeReport:
    name, resources = node["NodeManagerAddress"], node["Resources"]
    if not answered:
        ray.cancel(task, force=True)
        return NodeReport(name, resources, None, f"does not answer within {timeout_s:.0f} s")
    try:
        return NodeReport(name, resources, ray.get(task))
    except ray.exceptions.RayError as error:
        missing = "No module named 'hrm_ray" in str(error)
        reason = "hrm_ray is not installed there" if missing else f"cannot be asked ({type(error).__name__})"
        return NodeReport(name, resources, None, reason)

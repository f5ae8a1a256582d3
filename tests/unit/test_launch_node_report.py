"""What a run needs against what the nodes of a cluster say of themselves: pure values, no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hrm_ray.errors import HrmRayError, ResourceError, UnavailableError
from hrm_ray.launch.node_report import Measured, Need, NodeReport, check_nodes, installed, measure, table
from hrm_ray.launch.resources import ResourceRequest

GB = 10**9
VERSIONS = {"hrm_ray": "0.2.0", "torch": "2.13.0+cpu", "ray": "2.60.0"}
NEED = Need(ResourceRequest(4, 2, 0), 2 * GB, 3 * GB, VERSIONS)
NODE = Measured(16 * GB, 100 * GB, True, {**VERSIONS, "torch": "2.13.1+cu128"})
HEAD = NodeReport("10.0.0.1", {"CPU": 0.0}, replace(NODE, versions={"hrm_ray": "0.1"}))
"""It takes no workers, so what it lacks is no fault."""


def nodes(*measured: Measured | None, silent: str = "does not answer within 20 s") -> list[NodeReport]:
    found = [
        NodeReport(f"10.0.0.{number}", {"CPU": 4.0}, each, "" if each else silent)
        for number, each in enumerate(measured, 2)
    ]
    return [HEAD, *found]


def refusal(kind: type[HrmRayError], reports: list[NodeReport], need: Need = NEED) -> str:
    with pytest.raises(kind) as caught:
        check_nodes(need, reports, "10.0.0.1:6379")
    assert caught.value.detail == table(need, reports)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_nodes_that_have_everything_are_accepted() -> None:
    check_nodes(NEED, nodes(NODE, NODE), "auto")
    check_nodes(NEED, nodes(NODE, NODE, None), "auto")
    check_nodes(NEED, nodes(None, None), "auto")
    any_version = replace(NEED, versions={"deepspeed": ""})
    check_nodes(any_version, nodes(*[replace(NODE, versions={"deepspeed": "0.19.8"})] * 2), "auto")


def test_each_shortage_is_told_with_its_node() -> None:
    message = refusal(ResourceError, nodes(replace(NODE, memory_bytes=3 * GB), replace(NODE, memory_bytes=1 * GB)))
    assert "--world-size 4: each worker needs 2.0 GB of memory" in message and "Use --world-size 1" in message
    message = refusal(ResourceError, nodes(NODE, replace(NODE, disk_bytes=GB)))
    assert message.startswith("disk of node 10.0.0.3: checkpoints take 3.0 GB, 1.0 GB are free")
    older = replace(NODE, versions={**VERSIONS, "torch": "2.12.0"})
    message = refusal(UnavailableError, nodes(NODE, older))
    assert message.startswith("node 10.0.0.3: has torch 2.12.0, but this command 2.13.0+cpu")
    message = refusal(UnavailableError, nodes(NODE, NODE), replace(NEED, versions={**VERSIONS, "deepspeed": ""}))
    assert "node 10.0.0.2: deepspeed is not installed there" in message
    message = refusal(UnavailableError, nodes(NODE, None, silent="hrm_ray is not installed there"))
    assert message.startswith("node 10.0.0.3: hrm_ray is not installed there")


def test_the_table_has_a_row_for_each_node() -> None:
    shown = table(NEED, nodes(NODE, None, replace(NODE, folder=False, versions={}))).splitlines()
    assert shown[0].split() == ["CPUs", "GPUs", "memory", "disk", "hrm_ray", "torch", "ray"]
    assert shown[1].startswith("4 workers, each  2") and "2.0 GB" in shown[1] and shown[1].endswith("2.60.0")
    assert shown[2].startswith("10.0.0.1") and shown[3].split()[:5] == ["10.0.0.2", "4", "0", "16.0", "GB"]
    assert shown[4].endswith("does not answer within 20 s")
    assert "no folder" in shown[5] and shown[5].split()[-3:] == ["none"] * 3


def test_this_machine_measures_itself(tmp_path: Path) -> None:
    found = measure(str(tmp_path / "b"), ["torch", "no-such-library"])
    assert found.folder and found.memory_bytes > 0 and found.disk_bytes > 0
    assert found.versions == installed(["torch"]) and set(found.versions) == {"hrm_ray", "torch"}
    assert not measure(str(tmp_path / "away" / "b"), []).folder

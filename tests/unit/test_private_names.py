"""Every private name of a library that the package uses, with the files that use it.

A private name may change in any release. These tests fail when the installed version no longer has one, when the
package uses one that is not listed, and when a listed one is no longer used.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hrm_ray"

FOREACH = "train/optimizers.py"
LISTED = [
    # module, an expression with its names that fails or is False where the name is gone, the files that use it
    ("torch", "torch._foreach_norm", ["train/strategies/single.py"]),
    ("torch", "torch._foreach_lerp_", [FOREACH, "train/strategies/single.py"]),
    ("torch", "torch._foreach_mul_", [FOREACH, "train/per_parameter_optimizer.py", "train/strategies/fsdp.py"]),
    ("torch", "torch._foreach_addcmul_", [FOREACH]),
    ("torch", "torch._foreach_sqrt", [FOREACH]),
    ("torch", "torch._foreach_div_", [FOREACH]),
    ("torch", "torch._foreach_add_", [FOREACH]),
    ("torch", "torch.ops.aten._local_scalar_dense", ["train/fake_tensors.py"]),
    ("torch", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", ["model/attention.py"]),
    ("torch", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", ["model/attention.py"]),
    ("torch._dynamo", "torch._dynamo.config.recompile_limit", ["model/transforms/compile.py"]),
    ("torch._dynamo.exc", "torch._dynamo.exc.TorchDynamoException", ["model/transforms/compile.py"]),
    ("torch._dynamo.utils", "torch._dynamo.utils.counters['stats']", ["model/transforms/compile.py"]),
    ("torch", "torch.nn.Module._apply", ["model/moe.py", "train/fake_tensors.py"]),
    ("torch", "torch.nn.Linear(1, 1)._parameters['weight']", ["train/fake_tensors.py"]),
    ("torch", "torch.nn.BatchNorm1d(1)._buffers['running_mean']", ["train/fake_tensors.py"]),
    ("torch", "torch.empty(1).untyped_storage()._cdata", ["train/storage_tracker.py"]),
    ("torch._subclasses.fake_tensor", "torch._subclasses.fake_tensor.FakeTensorMode", ["train/fake_tensors.py"]),
    (
        "torch.utils._python_dispatch",
        "torch.utils._python_dispatch.TorchDispatchMode",
        ["train/fake_tensors.py", "train/storage_tracker.py"],
    ),
    ("torch.utils._pytree", "torch.utils._pytree.tree_leaves", ["train/storage_tracker.py"]),
    ("torch", "torch.nn.Module()._forward_hooks == {}", ["train/strategies/zero.py"]),
    ("torch", "torch.nn.Module()._forward_pre_hooks == {}", ["train/strategies/zero.py"]),
    ("torch", "torch.nn.Module()._state_dict_pre_hooks == {}", ["train/strategies/fsdp.py"]),
    (
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        ["train/strategies/zero.py"],
    ),
    (
        "torch.distributed",
        "torch.distributed.distributed_c10d._get_default_group",
        ["train/world.py"],
    ),
    ("torch.distributed", "torch.distributed.ProcessGroup._get_sequence_number_for_group", ["train/world.py"]),
    ("ray._private.worker", "ray._private.worker._worker_logs_enabled in (True, False)", ["orchestration/session.py"]),
    ("sys", "sys._current_frames", ["orchestration/heartbeats.py"]),
    ("ray._private.state", "ray._private.state.available_resources_per_node", ["orchestration/session.py"]),
    ("inspect", "'\"_temp_dir\"' in inspect.getsource(__import__('ray').init)", ["orchestration/session.py"]),
    (
        "ray.train.torch",
        "ray.train.torch.TorchTrainer._create_default_callbacks",
        ["orchestration/worker_group_trainer.py"],
    ),
    (
        "ray.train.torch",
        "ray.train.torch.TorchTrainer._initialize_and_run_controller",
        [],  # orchestration/worker_group_trainer.py overrides it
    ),
    (
        "ray.train.v2._internal.constants",
        "ray.train.v2._internal.constants.get_env_vars_to_propagate",
        ["orchestration/worker_group_trainer.py"],
    ),
    (
        "ray.train.v2._internal.execution.controller",
        "ray.train.v2._internal.execution.controller.TrainController",
        ["orchestration/worker_group_trainer.py"],
    ),
    ("ray.actor", "ray.actor.ActorHandle._actor_id", ["orchestration/independent_coordinator.py"]),
    (
        "ray.dashboard.modules.dashboard_sdk",
        "'_server_ray_version' in ray.dashboard.modules.dashboard_sdk.SubmissionClient.__init__.__code__.co_names",
        ["orchestration/jobs.py"],
    ),
]
BY_CLASS_NAME = [
    # private classes that are compared by name
    (
        "ray.train.v2._internal.callbacks.datasets",
        "ray.train.v2._internal.callbacks.datasets.DatasetsCallback",
        "orchestration/worker_group_trainer.py",
    ),
    (
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback",
        "orchestration/worker_group_trainer.py",
    ),
    (
        "ray.train.v2._internal.exceptions",
        "ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError",
        "orchestration/worker_group.py",
    ),
    ("typer", "'ClickException' in [kind.__name__ for kind in typer.BadParameter.__mro__]", "cli/error_handler.py"),
]
PUBLIC = {"_replace", "_fields", "_asdict", "_exit"}
"""Public methods of named tuples, and os._exit."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC and name != "_"


def exists(module: str, expression: str) -> bool:
    importlib.import_module(module)
    root = module.partition(".")[0]
    return eval(expression, {root: importlib.import_module(root)}) is not False


@pytest.mark.parametrize(("module", "expression"), [(entry[0], entry[1]) for entry in (*LISTED, *BY_CLASS_NAME)])
def test_the_installed_version_has_the_name(module: str, expression: str) -> None:
    assert exists(module, expression), f"{expression} is gone: change the code that uses it, or the version's bound"


def test_a_name_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        exists("torch", "torch._foreach_of_another_version_")
    with pytest.raises(ModuleNotFoundError):
        exists("ray._private.of_another_version", "ray._private.of_another_version.x")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Every name that the package defines."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def used_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of libraries in a module: in imports, attributes, keywords and calls such as getattr.

    `own` are names that the package defines. On `self` and `cls` they are its own; elsewhere only those are that this
    module defines without overriding a library's.
    """
    overriding = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_super(node.value)}
    own_here = own_names([tree]) - overriding
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hrm_ray"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in (own if is_self(node.value) else own_here):
                yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None and is_private(node.arg) and node.arg not in own:
            yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            yield from (word for word in words if is_private(word) and word not in own)


def in_expression(expression: str) -> set[str]:
    return set(filter(is_private, re.findall(r"(?<![A-Za-z0-9_])_\w+", expression)))


def test_every_private_name_in_use_is_listed() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    own = own_names(list(trees.values()))
    used = {(path.relative_to(PACKAGE).as_posix(), n) for path, tree in trees.items() for n in used_names(tree, own)}
    listed = {(file, name) for _, expression, files in LISTED for file in files for name in in_expression(expression)}
    assert used - listed == set(), "list these in this test, or use a public name"
    assert listed - used == set(), "no longer used: take these off the list"


def test_the_scan_finds_each_way_to_use_a_private_name() -> None:
    source = """
import torch._one
from torch.two import _two
from torch._three.four import public
class Own(torch.nn.Module):
    def _own(self):
        super()._own()
        self._kept = self._own()
        public._five(_six=1)._kept
        public._own()
        public._elsewhere
        self._elsewhere
        getattr(public, "_seven")
        public._replace()
"""
    tree = ast.parse(source)
    found = sorted(used_names(tree, own_names([tree]) | {"_elsewhere"}))
    assert found == ["_elsewhere", "_five", "_one", "_own", "_own", "_seven", "_six", "_three", "_two"]


def test_classes_are_compared_by_name_in_listed_files_only() -> None:
    pattern = re.compile(r"type\(\w+\)\.__name__ (==|!=|in|not in) |__mro__")
    files = {path for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert {path.relative_to(PACKAGE).as_posix() for path in files} == {file for *_, file in BY_CLASS_NAME}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *optional["hub"], *optional["dev"])]


def test_every_dependency_has_an_upper_bound_that_allows_the_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line.partition(";")[0]) for line in lines if line and not line.startswith("#")]
    tested = {one.name.lower().replace("_", "-"): str(one.specifier).removeprefix("==") for one in pinned}
    for requirement in requirements():
        name = requirement.name.lower().replace("_", "-")
        assert any(bound.operator == "<" for bound in requirement.specifier), f"{name} has no upper bound"
        assert name in tested, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(tested[name]), f"{name} {tested[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize("library", ["torch", "ray", "typer"])
def test_libraries_with_private_names_in_use_are_bound_to_the_tested_minor_version(library: str) -> None:
    (requirement,) = [one for one in requirements() if one.name == library]
    (bound,) = [one.version for one in requirement.specifier if one.operator == "<"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = [line.partition("==")[2].partition(";")[0] for line in lines if line.startswith(f"{library}==")]
    major, minor = (int(part) for part in pinned.split(".")[:2])
    assert bound == f"{major}.{minor + 1}"

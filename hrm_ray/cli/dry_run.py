"""What `hrm-ray train --dry-run` prints: notes, every setting as it holds, memory, and what can be read of the data."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from hrm_ray.launch.defaults import expected_time
from hrm_ray.launch.devices import LAUNCHERS
from hrm_ray.launch.node_report import NodeReport, check_nodes, measure, table
from hrm_ray.launch.preflight import need_of, needed_memory
from hrm_ray.launch.resolve import ResolvedRun, effective_batch
from hrm_ray.launch.resources import WORKER_MEMORY_BYTES, check_cluster, gigabytes, usable_cpus
from hrm_ray.launch.scan_data import scan_data
from hrm_ray.model.attention_backends import FLASH_MODULES
from hrm_ray.model.transforms.compile import compiles
from hrm_ray.settings.options import options
from hrm_ray.settings.rules import as_note
from hrm_ray.settings.tree import RunSettings, to_dotted
from hrm_ray.train.attention_choice import kernel_of
from hrm_ray.train.precision import activation_dtype


def print_dry_run(resolved: ResolvedRun) -> None:
    """Print it; takes some seconds."""
    # A run has the notes in its records, which the display shows.
    print("".join(f"warning {note}\n" for note in resolved.notes), end="")
    if resolved.no_effect:
        print(f"note    {as_note(resolved.no_effect)}")
    print("\n".join(f"  {key} = {value}" for key, value in resolved_values(resolved).items()))
    print(describe_memory(resolved))
    if resolved.defaults is None:
        duration = expected_time(resolved.settings, resolved.config, resolved.devices.device, resolved.devices.threads)
        print(f"time    {duration or 'is not estimated for this device or size'}")
    print(scan_data(resolved))
    print_nodes(resolved)
    print("dry run: nothing was started or written")


def print_nodes(resolved: ResolvedRun) -> None:
    """What the run asks of its machines, and what each has. Raises HrmRayError where that does not suffice."""
    devices, bundle = resolved.devices, resolved.location.run_dir.root
    request = devices.request
    need = need_of(resolved.settings, resolved.config, request, devices.strategy, devices.device, bundle)
    if devices.ray_address is None:
        own = {"CPU": float(usable_cpus()), "GPU": float(request.gpus and torch.cuda.device_count())}
        print(table(need, [NodeReport("this machine", own, measure(str(bundle), list(need.versions)))]))
        return
    look = import_module(LAUNCHERS[devices.launcher]).node_reports
    reports: list[NodeReport] = look(devices.ray_address, bundle, list(need.versions))
    print(table(need, reports))
    check_cluster(request, [report.resources for report in reports], devices.ray_address)
    check_nodes(need, reports, devices.ray_address)


def resolved_values(resolved: ResolvedRun) -> dict[str, Any]:
    """Every setting by its dotted key, as it holds in this run; of one that is not set, what that means."""
    settings, devices, root = resolved.settings, resolved.devices, resolved.location.run_dir.root
    values = to_dotted(settings)
    chosen: dict[str, Any] = {
        "cluster.launcher": devices.launcher,
        "cluster.world_size": devices.world_size,
        "cluster.strategy": devices.strategy,
        "cluster.ray_address": "(none: the local launcher uses no cluster)" if devices.launcher == "local" else None,
        "cluster.device": devices.device,
        "cluster.cuda_ids": None if devices.device == "cuda" else "(none: the device is no GPU with CUDA)",
        "cluster.threads": devices.threads,
        "model.model_preset": settings.model.model_preset or "(no preset)",
        "model.d_ff": resolved.config.intermediate_size,
        "model.num_layers": settings.model.h_layers + settings.model.l_layers,
        "run.steps": settings.run.step_limit or "(no limit)",
        "run.resume_from": resolved.location.checkpoint,
        "run.bundle_dir": root.parent if settings.run.bundle_dir is None else settings.run.bundle_dir,
        "optimizer.effective_batch_size": effective_batch(settings, devices),
    }
    if settings.run.brain_name is None:
        named = settings.run.bundle_dir is not None
        chosen["run.brain_name"] = "(none: --bundle-dir is the bundle's own folder)" if named else root.name
    # What depends on the GPU is left to the run: a dry run uses none.
    if not devices.ray_address and devices.device != "cuda":
        device = torch.device(devices.device)
        chosen["cluster.compile"] = compiles(settings, device)
        chosen["model.use_flash_attn"] = kernel_of(settings, resolved.config, device) in FLASH_MODULES
        chosen["memory.activations"] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[
            activation_dtype(settings.memory, device)
        ]
        if devices.device == "cpu":
            chosen["memory.keep_freed_memory"] = resolved.keep_freed_memory
    values.update({key: value for key, value in chosen.items() if value is not None})
    if devices.ray_address:
        values["cluster.ray_address"] = devices.ray_address
    if devices.visible_gpus:
        values["cluster.cuda_ids"] = devices.visible_gpus
    return values | {key: _meaning_of_unset(key, settings) for key, value in values.items() if value is None}


def _meaning_of_unset(key: str, settings: RunSettings) -> str:
    traits = options()[key].traits
    missing = next((needs for needs in traits.needs if not needs.holds(settings)), None)
    return f"({traits.unset})" if missing is None else f"(not used: {missing.because})"


def describe_memory(resolved: ResolvedRun) -> str:
    """The memory that each worker will need, from a traced update (takes some seconds)."""
    account = needed_memory(resolved.settings, resolved.config, resolved.devices.device)
    process = gigabytes(WORKER_MEMORY_BYTES)
    lines = [f"memory  of each worker {account.as_text()}, and about {process} for Python and PyTorch"]
    if resolved.devices.device == "cpu" and resolved.keep_freed_memory:
        lines.append("        freed memory is kept, as enough is free (faster, at up to three times the memory)")
    return "\n".join(lines)

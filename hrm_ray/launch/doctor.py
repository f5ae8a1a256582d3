"""What this machine can do, as a report: versions, devices, disk, memory, credentials, and which options work here.

Whether an option works is asked of `resolve`, as a run asks it. Nothing here imports Ray, and torch only inside
functions: where a library is broken, the report says so and goes on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import hrm_ray
from hrm_ray.errors import HrmRayError
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.options import options

DISTRIBUTION = "hrm-ray"
ASKED_SECTIONS = ("cluster", "memory", "adapt", "optimizer")
"""Sections of the settings whose options may depend on the machine."""
ASKED_BESIDES = {"model.use_flash_attn": ("",), "run.report_to": ("wandb", "mlflow")}
"""Options of other sections that do, with their values; an empty one: it is a switch."""
ASKED_WITH: Mapping[str, Mapping[str, str | bool]] = {
    "--amp-dtype": {"--amp": True},
    "--load-in-4bit": {"--use-peft": True},
    "--load-in-8bit": {"--use-peft": True},
    "--launcher subprocess": {"--parallel-independent": True},
    "--use-chunked-training": {"--chunk-size": "8", "--chunk-gradients": "exact"},
}
"""By option: others that it needs to mean something."""
PROBED_RUN: Mapping[str, str | bool] = {
    **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--no-use-moe": True, "--max-seq-len": "16"},
    **{"--vocab-size": "300", "--batch-size": "1", "--steps": "1", "--warmup-steps": "0", "--threads": "1"},
}
"""A run that every machine has room for."""
TRAINING_S = 60.0
"""How long `--train` trains on a device, from its first step."""
START_S = 300.0
"""How long it waits for that step. Ray alone may take a minute on a machine that is in use."""
END_S = 30.0
"""How long a training may take to end after it was asked to; one that hangs in a library never ends."""
POLL_S = 0.5
TRAINED_CHARACTERS = 200_000
CREDENTIALS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "Amazon S3": (("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"), "~/.aws/credentials"),
    "Google Cloud": (("GOOGLE_APPLICATION_CREDENTIALS",), "~/.config/gcloud/application_default_credentials.json"),
    "Azure": (("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_ID"), "~/.azure"),
    "Hugging Face": (("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "~/.cache/huggingface/token"),
    "Weights & Biases": (("WANDB_API_KEY",), "~/.netrc"),
    "Ray": (("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"),
}
"""By service: environment variables, and a file, that hold credentials. Their content is never read."""


@dataclass(frozen=True)
class Row:
    """A line of the report. `works`: whether it does, where that is the question."""

    name: str
    value: str
    works: bool | None = None


@dataclass(frozen=True)
class Part:
    """Lines of the report under one title."""

    title: str
    rows: tuple[Row, ...]

    @property
    def works(self) -> bool:
        """Whether nothing in it was found not to work."""
        return all(row.works is not False for row in self.rows)


def examine(title: str, rows: Callable[[], Iterator[Row]]) -> Part:
    """A part of the report; where a library is broken, it ends with what the library says."""
    found: list[Row] = []
    try:
        found += rows()
    except Exception as error:  # noqa: BLE001 (the report is for machines on which something is broken)
        found.append(Row(title, _reason(error), False))
    return Part(title, tuple(Row(row.name, without_home(row.value), row.works) for row in found))


def _reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, HrmRayError):
        return str(error.faults[0])
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}"


def without_home(text: str) -> str:
    """The text with ~ for the home folder, which mostly has the user's name."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def versions() -> Iterator[Row]:
    """The system, Python, hrm_ray, and each library that it declares, with what it asks for where that is not there."""
    yield Row("system", platform.platform())
    yield Row("python", platform.python_version())
    yield Row("hrm_ray", hrm_ray.__version__)
    try:
        declared = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        yield Row(DISTRIBUTION, "is not installed here, only found on the path: what it needs is not known")
        declared = [Requirement("torch"), Requirement("ray")]
    for each in declared:
        optional = each.marker is not None and "extra" in str(each.marker)
        if optional or (each.marker is not None and not each.marker.evaluate()):
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield Row(each.name, f"is not installed ({each.specifier} is needed)", False)
            continue
        fits = each.specifier.contains(found, prereleases=True)
        yield Row(each.name, found if fits else f"{found}, but {each.specifier} is needed", None if fits else False)


def devices() -> Iterator[Row]:
    """Each kind of device, whether it is there, and what torch says of it; how several workers would be connected."""
    import torch
    import torch.distributed as dist

    from hrm_ray.launch.devices import choose_device
    from hrm_ray.launch.resources import usable_cpus

    for kind in options()["cluster.device"].choices:
        try:
            chosen = choose_device(kind)
        except HrmRayError as error:
            yield Row(kind, error.faults[0].reason, False if kind == "auto" else None)
            continue
        yield Row(kind, chosen if kind == "auto" else "is there", True)
    yield Row("CPUs", f"{usable_cpus()} usable of {os.cpu_count()}")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        size = f"{about.total_memory / 2**30:.0f} GiB"
        yield Row(f"GPU {number}", f"{about.name}, {size}, compute capability {about.major}.{about.minor}")
    if torch.version.cuda is not None:
        yield Row("CUDA of torch", str(torch.version.cuda))
    there = dist.is_available()
    yield Row("gloo", "is there" if there and dist.is_gloo_available() else "this torch has none", None)
    yield Row("NCCL", "is there" if there and dist.is_nccl_available() else "this torch has none", None)


def compilers() -> Iterator[Row]:
    """The compilers that are there, and whether torch.compile has what it needs on the best device."""
    for name in ("cc", "g++", "clang", "cl", "nvcc"):
        if shutil.which(name) is not None:
            yield Row(name, "is there")
    yield Row("Triton", "is there" if find_spec("triton") is not None else "is not installed")
    import torch

    from hrm_ray.launch.devices import choose_device
    from hrm_ray.model.transforms.compile import compile_obstacle

    device = choose_device("auto")
    obstacle = compile_obstacle(load_settings({}), torch.device(device))
    yield Row(f"torch.compile on {device}", obstacle or "can be used", obstacle is None or None)


def storage(bundle_dir: Path) -> Iterator[Row]:
    """Disk where bundles go and where Ray keeps its files, and memory."""
    from hrm_ray.launch.resources import gigabytes
    from hrm_ray.train.host_memory import available_memory_bytes

    yield Row("memory", f"{gigabytes(available_memory_bytes())} available")
    places = {"bundles": bundle_dir, "temporary files": Path(tempfile.gettempdir()), "shared memory": Path("/dev/shm")}
    for name, place in places.items():
        there = place.absolute()
        while not there.exists():
            there = there.parent
        if name == "shared memory" and there != place:
            continue
        free = f"{gigabytes(shutil.disk_usage(there).free)} free at {place}"
        writable = os.access(there, os.W_OK)
        yield Row(name, free if writable else f"{place} cannot be written", writable)


def credentials() -> Iterator[Row]:
    """Which credentials are there; none is read."""
    for service, (variables, file) in CREDENTIALS.items():
        found = [name for name in variables if os.environ.get(name)]
        path = Path(file).expanduser()
        if path.exists():
            found.append(file)
        yield Row(service, f"present ({', '.join(found)})" if found else "none found")
    yield Row("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "not set"))


def option_rows() -> Iterator[Row]:
    """Each option that may depend on the machine: whether a small run with it would start here, or why it would not."""
    for shown, flags in _asked():
        reason = _why_refused(flags)
        yield Row(shown, "works" if reason is None else reason, reason is None)


def _asked() -> Iterator[tuple[str, dict[str, str | bool]]]:
    """The options to ask about, as written and as flat options."""
    plain = load_settings({})
    for key, option in options().items():
        values: Sequence[str] = ASKED_BESIDES.get(key, ())
        if option.section in ASKED_SECTIONS and option.name != "strict":
            values = ("",) if option.is_switch else option.choices
        for value in values:
            shown = f"{option.flag} {value}".rstrip()
            added = ASKED_WITH.get(option.flag, ASKED_WITH.get(shown))
            # An option that needs another one, such as a size of adapters, says nothing about the machine.
            if added is not None or all(need.holds(plain) for need in option.traits.needs):
                yield shown, {option.flag: value or True, **(added or {})}


def _why_refused(flags: Mapping[str, str | bool]) -> str | None:
    """Why a small run with these options would not start here as asked; None where it would."""
    from hrm_ray.launch.resolve import resolve

    with _without_cluster(), tempfile.TemporaryDirectory(prefix="hrm-ray-doctor-") as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("A small text. " * 200, encoding="utf-8")
        place = {"--dataset-file": str(corpus), "--bundle-dir": str(Path(folder) / "bundle")}
        try:
            resolved = resolve(load_settings({**PROBED_RUN, **place, **flags}))
        except HrmRayError as error:
            return error.faults[0].reason
        except ImportError as error:
            return _reason(error)
    option = next(iter(flags))
    for effect in resolved.no_effect:
        if effect.option.partition(" ")[0] == option:
            return effect.reason
    # Fallbacks are notes. That of --use-peft is a doubt about the run, not about the machine.
    notes = [note.partition(": ")[2].rstrip(".") for note in resolved.notes if note.startswith(f"{option}:")]
    return notes[0] if notes and option != "--use-peft" else None


@contextmanager
def _without_cluster() -> Iterator[None]:
    """Without the address of a running cluster in the environment: this machine is asked about."""
    before = os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def trainings(bundle_dir: Path | None, ray_address: str | None, say: Callable[[str], None]) -> Iterator[Row]:
    """A training of a minute on each device of this machine, or on the cluster: its steps, loss and speed."""
    runs = {f"the cluster at {ray_address}": ("--ray-address", str(ray_address))} if ray_address else _on_each_device()
    if bundle_dir is not None:
        bundle_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hrm-ray-doctor-", dir=bundle_dir) as folder:
        corpus = Path(folder) / "corpus.txt"
        sources = sorted(Path(hrm_ray.__path__[0]).rglob("*.py"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
        corpus.write_text(text[:TRAINED_CHARACTERS], encoding="utf-8")
        for number, (name, words) in enumerate(runs.items()):
            say(f"training on {name} for {TRAINING_S:.0f} s")
            yield _training(name, corpus, Path(folder) / f"bundle-{number}", words)


def _on_each_device() -> dict[str, tuple[str, ...]]:
    """The options that name each device of this machine."""
    import torch

    from hrm_ray.launch.devices import choose_device

    found: dict[str, tuple[str, ...]] = {}
    for kind in options()["cluster.device"].choices:
        try:
            chosen = choose_device(kind)
        except HrmRayError:
            continue
        if kind == "cuda":
            gpus = range(torch.cuda.device_count())
            found |= {f"GPU {number}": ("--device", kind, "--cuda-ids", str(number)) for number in gpus}
        elif kind == chosen:
            found[kind] = ("--device", kind)
    return {name: (*words, "--launcher", "local") for name, words in found.items()}


def _training(name: str, corpus: Path, bundle: Path, words: Sequence[str]) -> Row:
    from hrm_ray.metrics.jsonl import read_records
    from hrm_ray.rundir import RunDir

    # Compiling may take a minute by itself; whether it is possible is said among the options.
    stop_file, log = bundle.with_suffix(".stop"), bundle.with_suffix(".log")
    command = [sys.executable, "-m", "hrm_ray", "train", "--dataset-file", str(corpus), "--bundle-dir", str(bundle)]
    command += ["--stop-file", str(stop_file), "--steps", "100000", "--no-compile", "--log-every", "1", *words]
    metrics = RunDir(bundle).metrics
    with log.open("wb") as said, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as process:
        try:
            _wait_for_end(process, metrics, stop_file)
        finally:
            hung = _end(process)
    steps = [record for record in read_records(metrics) if record.kind == "train"] if metrics.is_file() else []
    if process.returncode or not steps:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((line for line in lines if line.startswith("error: ")), "")
        ended = f"it hung, and was killed after {END_S:.0f} s" if hung else f"exit code {process.returncode}"
        return Row(name, first or f"{ended}, {len(steps)} step(s) were trained", False)
    last: Mapping[str, Any] = steps[-1].values
    return Row(name, f"{steps[-1].step} steps, loss {last['loss']:.3g}, {last['tokens_per_s']:,.0f} tokens/s", True)


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End the training where it has not ended itself; whether it had to be killed."""
    process.terminate()  # It does nothing to a process that has ended.
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    return False


def _wait_for_end(process: subprocess.Popen[bytes], metrics: Path, stop_file: Path) -> None:
    """Wait until the training has ended; it is stopped TRAINING_S after its first step, or START_S without one."""
    ends_s, trains = time.monotonic() + START_S, False
    while process.poll() is None and time.monotonic() < ends_s:
        if not trains and metrics.is_file() and '"train"' in metrics.read_text(encoding="utf-8", errors="replace"):
            ends_s, trains = time.monotonic() + TRAINING_S, True
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    if trains and process.poll() is None:
        stop_file.touch()
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_S)

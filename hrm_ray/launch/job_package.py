"""The package of a job on a Ray cluster: the code that goes with it, the words of its command, and what must not be
written into it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

import hrm_ray
from hrm_ray.errors import Fault, ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.resources import gigabytes
from hrm_ray.settings.load import load_settings, read_options
from hrm_ray.settings.options import options
from hrm_ray.settings.yaml_file import is_recipe

UNPACKED = ("runtime_resources", "working_dir_files")
"""Folders of Ray's session below which a job's package lies on a node."""
ENTRY = "jobs/train.py"
MOST_BYTES = 90 * 2**20
"""The head's server takes 100 MiB in one request."""
LEFT_OUT = ("tests/", "docs/", ".git")
"""What no job needs: the fixtures of the tests are most of the checkout, and Ray obeys .gitignore files."""
_NAMED_DATA = ("data.dataset_file", "data.eval_file")
_PATHS = ("model.student_init", "run.bundle_dir", "run.experts_dir", "run.resume_from", "run.stop_file", "run.log_file")
"""Options that name a folder or file on the cluster."""
_OF_ANOTHER_RUN = ("run.resume", "run.auto_resume", "run.resume_from", "model.student_init")
"""Options with which settings come from a bundle on the cluster."""


def check_outlives_job(path: Path, option: str) -> None:
    """Raises SettingsError for a bundle inside the unpacked package of a job, which is removed with the job."""
    if UNPACKED in pairwise(path.absolute().parts):
        reason = "it would lie in the job's unpacked package, which is removed when the job has ended"
        raise SettingsError(Fault(f"{option} {path.name}", reason, _absolute(option)))


def _absolute(option: str) -> str:
    return f"Give {option} an absolute path on a disk that stays, such as {option} /mnt/bundles/NAME"


@dataclass(frozen=True)
class CodePackage:
    """The files of a checkout that a job needs, by their paths below `root`."""

    root: Path
    files: tuple[str, ...]
    size_bytes: int
    left_out: int
    """Python files of hrm_ray that git does not track, which the job therefore lacks."""

    def write(self, folder: Path) -> None:
        """Copy the files into `folder`."""
        for name in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name, target)


def code_package(folder: Path) -> CodePackage:
    """What git tracks in the checkout of hrm_ray at `folder`, or in the one that this command comes from, as it is now
    on the disk. Raises UnavailableError where neither is a checkout, ResourceError where it is too large."""
    root = _checkout(folder) or _checkout(Path(hrm_ray.__path__[0]))
    if root is None:
        hint = "Run it in a checkout of hrm_ray with git, or use `ray job submit --working-dir FOLDER`"
        raise UnavailableError(Fault("the code", "neither this folder nor hrm_ray's own is a git checkout of it", hint))
    tracked = _git(root, "ls-files") or []
    files = [name for name in tracked if not name.startswith(LEFT_OUT) and (root / name).is_file()]
    sizes = {name: (root / name).stat().st_size for name in files}
    size = sum(sizes.values())
    if size > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        named = ", ".join(f"{name[-24:]} {gigabytes(sizes[name])}" for name in largest)
        reason = f"{gigabytes(size)}, a head takes {MOST_BYTES >> 20} MiB; the largest files: {named}"
        raise ResourceError(Fault("the package", reason, "Take data out of git"))
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "hrm_ray/*.py") or []
    return CodePackage(root, tuple(files), size, len(untracked))


def _checkout(folder: Path) -> Path | None:
    """The root of the git checkout of hrm_ray that the folder lies in."""
    found = _git(folder, "rev-parse", "--show-toplevel")
    root = Path(found[0]) if found else None
    return (
        root if root is not None and all((root / name).is_file() for name in (ENTRY, "hrm_ray/__init__.py")) else None
    )


def _git(folder: Path, *words: str) -> list[str] | None:
    """What git prints, by line; None where it fails or is not installed."""
    name = "-z" if words[0] == "ls-files" else None
    command = ["git", *words[:1], *([name] if name else []), *words[1:]]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:
        return None
    if done.returncode:
        return None
    text = done.stdout.decode("utf-8", errors="surrogateescape")
    return [part for part in (text.split("\0") if name else text.splitlines()) if part]


def job_options(
    given: Mapping[str, str | bool], config: Path | None
) -> tuple[dict[str, str | bool], dict[str, Path], str]:
    """The options as the job gets them; the user's files that go into its package, by their name there; and the bundle.

    A place must be an address, or an absolute path on the cluster: a job's working folder is its unpacked package, and
    data of this machine is not sent. Raises SettingsError.
    """
    parsed = read_options(given, also_known=("--config",))
    faults = list(parsed.faults)
    found, files = dict(given), dict[str, Path]()
    for key in (*_NAMED_DATA, *_PATHS):
        value, option = parsed.values.get(key), options()[key].flag
        if isinstance(value, str) and not _on_cluster(value):
            hint = "Give an address, or an absolute path on the cluster" if key in _NAMED_DATA else _absolute(option)
            faults.append(Fault(f"{option} {value}", "a job finds no relative path: its folder is its package", hint))
    tokenizer = parsed.values.get("data.tokenizer_path")
    if isinstance(tokenizer, str) and not _on_cluster(tokenizer) and Path(tokenizer).exists():
        hint = "Give an absolute path on the cluster, or a name on the Hugging Face Hub"
        faults.append(Fault(f"--tokenizer-path {tokenizer}", "the file is on this machine, not on the cluster", hint))
    bundle = parsed.values.get("run.bundle_dir")
    if not isinstance(bundle, str):
        faults.append(Fault("--bundle-dir", "a job's own folder is removed with it", _absolute("--bundle-dir")))
    rate = parsed.values.get("optimizer.adaptive_lr_config")
    for option, file in (("--config", config), ("--adaptive-lr-config", rate)):
        if file is None or (option == "--config" and is_recipe(config)) or not Path(str(file)).is_file():
            continue
        target = f".job/{option[2:]}/{Path(str(file)).name}"
        files[target] = Path(str(file))
        found = {name: value for name, value in found.items() if _flag(name) != option}
        found[option] = target
    if faults:
        raise SettingsError(faults)
    if not any(parsed.values.get(key) for key in _OF_ANOTHER_RUN) and _is_settings_file(config):
        load_settings(given, config)  # Wrong values and options that do not go together need no cluster to be found.
    if config is not None and "--config" not in found:
        found["--config"] = str(config)
    name = parsed.values.get("run.brain_name")
    return found, files, str(bundle) if name is None else str(PurePosixPath(str(bundle)) / str(name))


def _is_settings_file(config: Path | None) -> bool:
    """Whether the settings are all known here: without a file, or with one that is no description of a run."""
    return config is None or is_recipe(config) or (config.is_file() and config.suffix in (".yaml", ".yml"))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _on_cluster(value: str) -> bool:
    return "://" in value or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()

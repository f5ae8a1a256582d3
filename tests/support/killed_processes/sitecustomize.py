"""Python reads this at its start where a test puts its folder on PYTHONPATH: processes of a run of independent trainers
log which rows they train and what they merge, and kill themselves at named points.

HRM_KILLS: a JSON list of [process, point, number of the call in that process], each done once, and those of a process
in their order. "trainer" is whichever trainer comes there first. Under --launcher ray the coordinator is a process of
its own, at whose points the driver and the raylet are killed too.
HRM_AUDIT: the folder of logs. HRM_HIDDEN: folders that Ray's processes of this node do not see, as on another machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_CALLS: Counter[str] = Counter()
AUDIT = Path(os.environ.get("HRM_AUDIT", "."))
IN_RAY = any(Path(word).name == "default_worker.py" for word in sys.orig_argv)


def point(process: str, name: str) -> None:
    """Die here, if that is the next kill of this process."""
    _CALLS[name] += 1
    for number, (victim, where, call) in enumerate(json.loads(os.environ.get("HRM_KILLS", "[]"))):
        done = AUDIT / f"killed-{number}"
        here = victim == process or (victim == "trainer" and process.startswith("trainer-"))
        here |= IN_RAY and process == "driver" and victim in ("coordinator", "raylet")
        if here and not done.exists():
            if where == name and _CALLS[name] >= call:
                done.write_text(f"{victim} {where}")
                pid = os.getpid()
                if IN_RAY and victim == "driver":
                    pid = int((AUDIT / "driver.pid").read_text())
                elif victim == "raylet":
                    pid = os.getppid()
                os.kill(pid, signal.SIGKILL)
            return


def log(name: str, values: Any) -> None:
    with (AUDIT / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def around(owner: Any, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
    """Replace a function by one that calls `before(*arguments)` and `after(result, *arguments)` too."""
    genuine = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = genuine(*arguments, **named)
        if after is not None:
            after(result, *arguments)
        return result

    setattr(owner, name, replaced)


def watch_trainer() -> None:
    from hrm_ray.independent.trainer import BlockTrainer
    from hrm_ray.independent.weights import SharedWeights
    from hrm_ray.independent.wire import RemoteCoordinator
    from hrm_ray.train.claimed_rows import ClaimedText

    fed: list[tuple[int, int, int, int]] = []
    names: list[str] = []

    def write_point(where: str) -> None:
        point(names[0], where)

    around(BlockTrainer, "join", lambda self: names.__setitem__(slice(None), [self.name]), None)
    around(BlockTrainer, "_begin_from_anchor", lambda self, leases: fed.clear(), None)
    around(
        ClaimedText,
        "columns",
        lambda self, taken, *rest: fed.extend((o.lease.epoch, o.lease.chunk, o.start, o.end) for o in taken),
        None,
    )

    def trained(result: Any, self: BlockTrainer) -> None:
        if result[1]:
            log("reports", [f"{self.name}-{self._joined.generation}-{self._reports + 1}", list(fed)])
        fed.clear()

    around(BlockTrainer, "_trained", None, trained)
    around(
        SharedWeights,
        "save_change",
        lambda *_: write_point("before write"),
        lambda *_: write_point("after write"),
    )
    around(RemoteCoordinator, "report", None, lambda *_: write_point("after report"))


def watch_keeper() -> None:
    from hrm_ray.independent import anchor_keeper

    def merged(report: Any, anchor: Any, members: Any, outer: Any, out: Any) -> None:
        log("merges", [report.sha256, anchor.weights.name, out.weights.name, [one.path.name for one in members]])
        point("anchors", "after merge")

    around(anchor_keeper, "merge_deltas", lambda *_: point("anchors", "before merge"), merged)


def watch_driver() -> None:
    from hrm_ray.independent.coordinator import LedgerCoordinator

    around(
        LedgerCoordinator,
        "commit",
        lambda *_: point("driver", "before commit"),
        lambda *_: point("driver", "after commit"),
    )


class AfterImport:
    """A finder that calls a function when a module was loaded: Ray's processes load ours late, and some never."""

    def __init__(self, watches: dict[str, Callable[[], None]]) -> None:
        self.watches = watches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        watch = self.watches.pop(name, None)
        spec = None if watch is None else importlib.util.find_spec(name)
        if watch is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_watch(module: Any) -> None:
            load(module)
            watch()

        spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec


def hide(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: files below the hidden folders are not there."""
    if (event == "open" or event.startswith("os.")) and arguments and isinstance(arguments[0], str | os.PathLike):
        name = os.path.abspath(os.fspath(arguments[0]))
        if any(name == hidden or name.startswith(f"{hidden}{os.sep}") for hidden in HIDDEN):
            raise FileNotFoundError(2, "hidden from this node", name)


HIDDEN = [os.path.abspath(folder) for folder in os.environ.get("HRM_HIDDEN", "").split(os.pathsep) if folder]
if IN_RAY and HIDDEN:
    sys.addaudithook(hide)
if "hrm_ray.independent.child_process" in sys.orig_argv:
    watch_trainer()
    watch_keeper()
elif "hrm_ray" in sys.orig_argv:
    (AUDIT / "driver.pid").write_text(str(os.getpid()))
    watch_driver()
elif IN_RAY and "HRM_AUDIT" in os.environ:
    watches = {"trainer": watch_trainer, "anchor_keeper": watch_keeper, "coordinator": watch_driver}
    finder: Any = AfterImport({f"hrm_ray.independent.{name}": watch for name, watch in watches.items()})
    sys.meta_path.insert(0, finder)

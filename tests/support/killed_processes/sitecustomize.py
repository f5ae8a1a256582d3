"""Python reads this at its start where a test puts its folder on PYTHONPATH: processes of a run of independent trainers
log which rows they train and what they merge, and kill themselves at named points.

HRM_KILLS: a JSON list of [process, point, number of the call in that process], each done once, and those of a process
in their order. HRM_AUDIT: the folder of logs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CALLS: Counter[str] = Counter()
AUDIT = Path(os.environ.get("HRM_AUDIT", "."))


def point(process: str, name: str) -> None:
    """Die here, if that is the next kill of this process."""
    _CALLS[name] += 1
    for number, (victim, where, call) in enumerate(json.loads(os.environ.get("HRM_KILLS", "[]"))):
        done = AUDIT / f"killed-{number}"
        if victim == process and not done.exists():
            if where == name and _CALLS[name] >= call:
                done.write_text(f"{victim} {where}")
                os.kill(os.getpid(), signal.SIGKILL)
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


if "hrm_ray.independent.child_process" in sys.orig_argv:
    watch_trainer()
    watch_keeper()
elif "hrm_ray" in sys.orig_argv:
    watch_driver()

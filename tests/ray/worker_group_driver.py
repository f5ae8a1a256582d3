"""A driver process, for tests that send it signals: `python -m tests.ray.worker_group_driver PLAN.json BODY`.

Prints one line per event: `record N` for records, `outcome REASON STEP`, or `error KIND`; exits like the command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hrm_ray.errors import HrmRayError
from hrm_ray.launch.stopping import StopWatch
from hrm_ray.orchestration import worker_group
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import Record, StopRequested
from tests.support import ray_bodies


class PrintedRecords:
    """A display of the barest kind."""

    def write(self, record: Record) -> None:
        print("record", record.step, flush=True)

    def close(self) -> None:
        pass


def main() -> int:
    plan = RunPlan.from_plain(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        with StopWatch(None) as watch:
            watch.begin()
            outcome = worker_group.run(plan, sink=PrintedRecords(), stop=watch.poll, body=vars(ray_bodies)[sys.argv[2]])
    except KeyboardInterrupt:
        print("error KeyboardInterrupt", flush=True)
        return 130
    except StopRequested as stopped:
        print("stopped", stopped.reason.value, flush=True)
        return stopped.reason.exit_code
    except HrmRayError as error:
        print("error", type(error).__name__, flush=True)
        return error.exit_code
    print("outcome", outcome.reason.value, outcome.step, flush=True)
    return outcome.reason.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""Trains in a job on a cluster: `ray job submit --working-dir . -- python jobs/train.py --dataset-file ...`.

The options are those of `hrm-ray train`. The command is run again with --auto-resume where it was ended from outside
(exit code 75) or failed (1), and not after 2 to 6, which it would end with again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hrm_ray of the job's package


def main(*options: str) -> None:
    try:
        from hrm_ray.cli.error_handler import exit_code_of
        from hrm_ray.cli.rerun import run_until_done
    except ImportError as error:  # The cluster lacks a library, or has a Python older than 3.10.
        where = f"the Python {sys.version_info.major}.{sys.version_info.minor} that runs jobs on this cluster"
        print(f"error: {error.name}: cannot be imported by {where} ({error}). Install hrm-ray there.", file=sys.stderr)
        sys.exit(3)

    sys.exit(exit_code_of(lambda: run_until_done([*options, *sys.argv[1:]])))


if __name__ == "__main__":
    main()

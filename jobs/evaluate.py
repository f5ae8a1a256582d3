"""Evaluates bundles in a job: `ray job submit --working-dir . -- python jobs/evaluate.py BUNDLE ...`.

The options are those of `hrm-ray evaluate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hrm_ray of the job's package

if __name__ == "__main__":
    from hrm_ray.cli.main import main

    main(["evaluate", *sys.argv[1:]])

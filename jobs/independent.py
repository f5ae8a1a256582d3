"""As jobs/train.py, with trainers that share no step: `... -- python jobs/independent.py --world-size N ...`.

They are Ray actors on the nodes of the cluster.
"""

from __future__ import annotations

from train import main

if __name__ == "__main__":
    main("--parallel-independent", "--launcher", "ray", "--ray-address", "auto")

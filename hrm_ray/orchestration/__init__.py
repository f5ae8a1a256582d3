"""All that uses Ray. Nothing else imports it."""

import os

_RAYLET = "RAY_RAYLET_PID"
_ours = os.environ.setdefault(_RAYLET, str(os.getpid())) == str(os.getpid())
# Ray reads the variable when it is loaded, and a raylet sets it for its own workers. Without it Ray ends a driver whose
# raylet was killed and whose parent is process 1, as in a container: that driver could not open another cluster.
import ray  # noqa: E402, F401

if _ours:
    del os.environ[_RAYLET]

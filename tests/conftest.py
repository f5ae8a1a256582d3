"""What all tests share: random inputs that are the same in every run, no time limit on a busy machine, and signals that
arrive."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("steady")

# Tests that run beside each other share the cores; torch and OpenMP read this when they are loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run in the background, or under nohup, ignores these, and so would every process that a test starts.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL), ("SIGUSR1", signal.SIG_DFL)):
    if name in signal.Signals.__members__ and signal.getsignal(signal.Signals[name]) is signal.SIG_IGN:
        signal.signal(signal.Signals[name], default)

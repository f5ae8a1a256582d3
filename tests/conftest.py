"""What all tests share: random inputs that are the same in every run, and no time limit on a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("steady")

"""What tensors a piece of code makes, beyond those that were there.

One job: two figures of train/live_bytes.py's account that only tests ask for.
"""

from __future__ import annotations

from hrm_ray.train import live_bytes


class LiveBytes(live_bytes.LiveBytes):
    """Counts as its base does; what existed before the context counts as such."""

    @property
    def made(self) -> int:
        """The most bytes alive at once of what was made inside the context."""
        before = sum(life.bytes for life in self._lives if life.born == 0)
        return self.peak_bytes() - before

    @property
    def largest(self) -> int:
        """The largest storage that was made inside the context."""
        return max(life.bytes for life in self._lives if life.born > 0)

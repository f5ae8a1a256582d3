"""Settings as the options that would say them.

One job: the way back, for round trips through the command line.
"""

from __future__ import annotations

from hrm_ray.settings.options import options
from hrm_ray.settings.tree import RunSettings


def to_options(settings: RunSettings) -> dict[str, str | bool]:
    """The options that would say these settings in full; leaves that are None have none."""
    said: dict[str, str | bool] = {}
    for key, option in options().items():
        value = settings.leaf(key)
        if value is not None:
            said[option.flag] = value if option.is_switch else str(value)
    return said

"""Names of data sets of the Hugging Face Hub, `hf://id:config:split`, in their parts."""

from __future__ import annotations

import re
from typing import NamedTuple

HUB = "hf://"

# The colon after a Windows drive belongs to the id: it may be a folder with the layout of a data set.
_NAME = re.compile(r"hf://(?P<id>(?:[A-Za-z]:(?=[\\/]))?[^:]*)(?::(?P<config>[^:]*))?(?::(?P<split>.*))?", re.DOTALL)


class HubName(NamedTuple):
    """The id (ORGANISATION/NAME, or a folder), and configuration and split where they are named."""

    id: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        parts = [self.id, self.config or "", self.split or ""]
        return HUB + ":".join(parts).rstrip(":")


def hub_name(address: str) -> HubName | None:
    """The parts of an `hf://` address; None for another one. An empty configuration or split is none: `hf://id::test`."""
    found = _NAME.fullmatch(address)
    if found is None:
        return None
    return HubName(found["id"], found["config"] or None, found["split"] or None)

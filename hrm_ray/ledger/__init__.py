"""The ledger of chunks: which worker trains which range, what was reported, and which rounds are in the lineage."""

from __future__ import annotations

from hrm_ray.ledger.blocks import BlockLength
from hrm_ray.ledger.database import copy as copy_ledger
from hrm_ray.ledger.database import delete as delete_ledger
from hrm_ray.ledger.epoch_rest import EpochRest, TrainedRange, rest_of_epoch
from hrm_ray.ledger.owner import Ledger, open_ledger
from hrm_ray.ledger.ranges import ClaimOrder
from hrm_ray.ledger.reader import (
    Contribution,
    EpochCounts,
    LedgerBlock,
    LedgerReader,
    Round,
    StateCount,
    is_anchor,
    read_ledger,
)
from hrm_ray.ledger.states import Idle, Lease, Range, Refused, Span, State
from hrm_ray.ledger.synchronous import SynchronousRun

__all__ = [
    "BlockLength",
    "ClaimOrder",
    "Contribution",
    "EpochCounts",
    "EpochRest",
    "Idle",
    "Lease",
    "Ledger",
    "LedgerBlock",
    "LedgerReader",
    "Range",
    "Refused",
    "Round",
    "Span",
    "State",
    "StateCount",
    "SynchronousRun",
    "TrainedRange",
    "copy_ledger",
    "delete_ledger",
    "is_anchor",
    "open_ledger",
    "read_ledger",
    "rest_of_epoch",
]

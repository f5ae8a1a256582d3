"""How each tensor of a model is merged, by its name and type.

The names are those of the model (`model/`) and of peft; a merge knows nothing else of either.
"""

from __future__ import annotations

from enum import Enum

TOUCHED = ".touched"
"""End of the name of a tensor [rows] of a contribution that says how much each row of another tensor was trained."""

_STARTS = ("H_init", "L_init")
_ROWS = (".mlp.experts.", "puzzle_emb.weights")


class Rule(Enum):
    """How a tensor is merged."""

    MEAN = "the weighted mean of the members' changes"
    ROWS = "each row (first dimension) by the members that changed it; a row that none changed stays"
    EQUAL = "copied, and must be equal in all members"
    KEPT = "copied from the anchor, whatever the members have"


def rule_of(name: str, is_float: bool) -> Rule:
    """The rule of a tensor: stacked experts and the puzzle table by rows, other float tensors by their mean.

    Whole numbers, booleans and the initial states of the two levels, which are drawn with the first weights and never
    trained, must be equal: otherwise the members began from other weights.
    """
    if not is_float or is_start(name):
        return Rule.EQUAL
    return Rule.ROWS if any(part in name for part in _ROWS) else Rule.MEAN


def is_start(name: str) -> bool:
    """Whether a tensor is an initial state of one of the two levels."""
    return name.rpartition(".")[2] in _STARTS

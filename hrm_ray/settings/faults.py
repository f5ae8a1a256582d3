"""Turns pydantic errors and unknown names into messages for the user."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from hrm_ray.errors import Fault

_BOUNDS = {
    "greater_than_equal": ("ge", "must be {} or more"),
    "greater_than": ("gt", "must be above {}"),
    "less_than_equal": ("le", "must be {} or less"),
    "less_than": ("lt", "must be below {}"),
}
"""pydantic's error type: the key of the bound in its context, and the reason, which needs no hint."""

_KINDS = {
    "int_": ("is not a whole number", "Give a whole number"),
    "float_": ("is not a number", "Give a number"),
    "bool_": ("is neither true nor false", "Give true or false"),
    "path_": ("is not a path", "Give the path of a file or folder"),
    "string_": ("is not text", "Give text, in quotation marks where YAML would read something else"),
}
"""Beginning of pydantic's error type: reason and hint."""


def fault_of_error(error: Any, quoted: str) -> Fault:
    """The fault in one entry of `ValidationError.errors()`; `quoted` is the setting as the user wrote it."""
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind in _BOUNDS:
        bound, reason = _BOUNDS[kind]
        return Fault(quoted, reason.format(_number(context[bound])), "")
    if kind == "literal_error":
        choices = [part.strip().strip("'") for part in context["expected"].replace(" or ", ", ").split(",")]
        near = nearest(str(error["input"]), choices, at_most=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        return Fault(quoted, "is not one of the choices", f"Choose one of {', '.join(choices)}{hint}")
    if kind == "finite_number":
        return Fault(quoted, "is not a finite number", "Give a finite number")
    if kind == "extra_forbidden":
        return Fault(quoted, "is not a setting", "Leave it out")
    if kind == "refused":
        return Fault(quoted, context["reason"], context["hint"])
    for beginning, (reason, hint) in _KINDS.items():
        if kind.startswith(beginning):
            return Fault(quoted, reason, hint)
    return Fault(quoted, f"cannot be used ({error['msg']})", "See `hrm-ray train --help` for the allowed values")


def nearest(name: str, known: Iterable[str], at_most: int = 3) -> list[str]:
    """The known names that are most similar to `name`, best first; empty if none is similar."""
    # Without the dashes that all options begin with, which would make short ones similar.
    by_word = {each.lstrip("-"): each for each in known}
    return [by_word[word] for word in get_close_matches(name.lstrip("-"), by_word, n=at_most, cutoff=0.6)]


def hint_of_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint for an unknown name: the most similar names, or `otherwise`."""
    near = nearest(name, known)
    if not near:
        return otherwise
    return f"The nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"


def _number(value: Any) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)

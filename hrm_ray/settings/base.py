"""What every section of the settings has in common: frozen, closed, finite numbers, help from docstrings.

One job: the base class. The leaves are in the section files, the rules between leaves in `rules`.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """One section of the tree. Leaves take text as well as typed values, so that options and YAML meet here."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _neither_switch_nor_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true/false where a number or a text belongs (Python counts True as 1), and empty text."""
        if isinstance(value, str) and not value.strip():
            raise refusal("is empty", "Give a value, or leave it out")
        name = info.field_name
        if isinstance(value, bool) and name is not None and bool not in plain_types(cls.model_fields[name].annotation):
            raise refusal("is the value of a switch, which this is not", "Give a number or text")
        return value


def refusal(reason: str, hint: str) -> PydanticCustomError:
    """What a section's own check raises; the message for the user is made of the same two parts."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "hint": hint})


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The types an annotation allows, with `Annotated` and `None` taken off: `Annotated[int, ...] | None` -> (int,)."""
    if get_origin(annotation) is Annotated:
        return plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in plain_types(part) if kind is not type(None))
    return (annotation,)

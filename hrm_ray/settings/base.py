"""The base class of the settings' sections, and `option`, which declares a field with its properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from hrm_ray.settings.needs import Needs

OnResume: TypeAlias = Literal["fixed", "presence_fixed", "free", "dropped"]
"""What a resumed run may do to an option: `fixed` must stay (tensors or the meaning of the saved state follow from it);
`presence_fixed` may change its value, but not whether it is given; `free` may change; `dropped` is not taken from the
stored run at all."""
Effect: TypeAlias = Literal["rows", "memory"]
"""What else an option changes: the rows that `data inspect` sees, the memory that `arch-summary` estimates."""


@dataclass(frozen=True)
class Traits:
    """The properties of an option besides its type, default and help; see `option`."""

    on_resume: OnResume
    needs: tuple[Needs, ...] = ()
    affects: tuple[Effect, ...] = ()
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    replaces_stored: tuple[str, ...] = ()
    unset: str | None = None
    legacy_default: Any = None

    def __call__(self, schema: dict[str, Any]) -> None:
        """Pydantic calls this when it makes a JSON schema; traits add nothing to it."""


def option(
    default: Any,
    on_resume: OnResume,
    *,
    needs: tuple[Needs, ...] = (),
    affects: tuple[Effect, ...] = (),
    aliases: Mapping[str, str | None] | Mapping[str, str] | None = None,
    replaces: tuple[str, ...] = (),
    replaces_stored: tuple[str, ...] = (),
    unset: str | None = None,
    legacy_default: Any = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field of the settings, which is an option of the command line. Its docstring is the help text.

    `needs`: conditions without which it changes nothing. `aliases`: other spellings, each with the value that it sets
    (None: a value follows). `replaces`: options that it overrides where they were given earlier (in the file, or in
    the stored run); `replaces_stored`: only in the stored run. `unset`: what holds where nothing is given, if
    that is not always the default.
    `legacy_default`: the value in runs that are older than the option. `ge`, `gt`, `le`, `lt`: bounds.
    """
    traits = Traits(on_resume, needs, affects, aliases or {}, replaces, replaces_stored, unset, legacy_default)
    # A callable `json_schema_extra` is the only place where pydantic keeps a foreign object with the field.
    return Field(default=default, json_schema_extra=traits, ge=ge, gt=gt, le=le, lt=lt)


def switch_aliases(*names: str) -> Mapping[str, str]:
    """Other spellings of a switch, each with its `--no-` form."""
    return {name: "true" for name in names} | {f"--no-{name[2:]}": "false" for name in names}


class Section(BaseModel):
    """One section of the tree. Leaves take text as well as typed values: options and YAML are checked alike."""

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
    def _reject_empty_and_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse empty text, and true/false for a number or text."""
        if isinstance(value, str) and not value.strip():
            raise refusal("is empty", "Give a value, or leave it out")
        name = info.field_name
        # Python counts True as 1, so pydantic would take it for a number.
        if isinstance(value, bool) and name is not None and bool not in plain_types(cls.model_fields[name].annotation):
            raise refusal("is a boolean; this option takes a number or text", "Give a number or text")
        return value


def refusal(reason: str, hint: str) -> PydanticCustomError:
    """The error that a section's own check raises; `fault_of_error` turns it into a Fault with this reason and hint."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "hint": hint})


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The types an annotation allows, without `Annotated` and `None`: `Annotated[int, ...] | None` -> (int,)."""
    if get_origin(annotation) is Annotated:
        return plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in plain_types(part) if kind is not type(None))
    return (annotation,)

"""The base of records whose fields are choices."""

from __future__ import annotations

import typing
from typing import Any, Literal

from slimsam_jax import limits
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range, quoted


class Record:
    """Checks the choices of a record: those of a `Literal`, flags, records in it, and numbers by its `RANGES`.

    Raises:
      InputError: a field is none of them; names it.
    """

    RANGES: typing.ClassVar[dict[str, Range]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name, hint in hints.items():
            value, allowed = getattr(self, name), typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            if allowed and value not in allowed:
                raise InputError(f"{name} {value!r} is none of {', '.join(map(str, allowed))}")
            if hint is bool and not isinstance(value, bool):
                raise InputError(f"{name} {quoted(value)} is neither True nor False")
            if isinstance(hint, type) and issubclass(hint, Record) and not isinstance(value, hint):
                raise InputError(f"{name} {quoted(value)} is no {hint.__name__}")
        for name, allowed in self.RANGES.items():
            if not _is_word(getattr(self, name), hints[name]):
                limits.check(name, getattr(self, name), allowed)


def _is_word(value: Any, hint: Any) -> bool:
    """Whether a field that may be a number is one of the words beside it, such as "auto", or None where it may be."""
    beside = typing.get_args(hint)
    if value is None:
        return type(None) in beside
    return isinstance(value, str) and any(value in typing.get_args(each) for each in beside)

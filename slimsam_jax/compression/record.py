"""The base of records whose fields are choices."""

from __future__ import annotations

import typing
from typing import Literal

from slimsam_jax import limits
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range


class Record:
    """Checks the choices of a record: those of a `Literal`, and numbers by its `RANGES`."""

    RANGES: typing.ClassVar[dict[str, Range]] = {}

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            allowed = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, allowed))}")
        for name, allowed in self.RANGES.items():
            if not isinstance(value := getattr(self, name), str | None):  # "auto", and what is not given
                limits.check(name, value, allowed)

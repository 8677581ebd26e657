"""Functions and dataclasses as the parser shall see them: help texts as paragraphs, and no `(default: None)`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import docstring_parser  # which the parser brings along, for the same
import tyro

UNSAID = (None, ())  # what is done by default then, the help text says


def postponed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to the parser, but not called by it: the result is a `functools.partial`. Of a dataclass likewise."""
    if isinstance(function, type):
        return _record(function)
    signature = inspect.signature(function)
    hints = _described(function, {name: each.default for name, each in signature.parameters.items()})
    wrapper = functools.wraps(function)(lambda *args, **kw: functools.partial(function, *args, **kw))
    del wrapper.__wrapped__  # whose types the parser would take
    parameters = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items()]
    wrapper.__annotations__, wrapper.__signature__ = hints, signature.replace(parameters=parameters)
    return wrapper


def finished(parsed: Any, arguments: Any) -> Any:
    """What the parser made of `postponed(arguments)`: the function's result, or the dataclass."""
    if isinstance(parsed, functools.partial):
        return parsed()
    return arguments(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)})


def _record(record: type) -> type:
    """A dataclass of the same fields."""
    fields = {field.name: field for field in dataclasses.fields(record)}
    hints = _described(record, {name: field.default for name, field in fields.items()})
    again = lambda field: dataclasses.field(default=field.default, default_factory=field.default_factory)
    given = [(name, hints[name], again(field)) for name, field in fields.items()]
    copy = dataclasses.make_dataclass(record.__name__, given, frozen=True)
    copy.__doc__ = record.__doc__
    return copy


def _described(function: Callable[..., Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """{name: type, with its help text} of the parameters."""
    hints = typing.get_type_hints(function, include_extras=True)
    described = inspect.getmro(function)[:-1][::-1] if isinstance(function, type) else (function,)  # what it inherits
    params = (each for one in described for each in docstring_parser.parse_from_object(one).params)
    texts = {each.arg_name: each.description or "" for each in params}
    for name, default in defaults.items():
        text = " ".join(texts[name].split()) if name in texts else None
        unsaid = any(default is each for each in UNSAID)
        hints[name] = Annotated[hints[name], tyro.conf.arg(help=text, help_behavior_hint="" if unsaid else None)]
    return hints

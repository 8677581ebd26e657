"""`--set`: fields of a recipe's records by name, as text. `prune.round_to=8` sets it in every step that prunes."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal

from slimsam_jax.compression.old_names import what_became_of
from slimsam_jax.compression.plan import check
from slimsam_jax.compression.steps import Distill, DistillMasks, Initialize, Pretrain, Prune, Quantize, Quirks, Recipe
from slimsam_jax.errors import InputError, printable

KINDS = {"prune": Prune, "distill": Distill, "initialize": Initialize, "quantize": Quantize}
KINDS |= {"masks": DistillMasks, "pretrain": Pretrain}  # with what `distill.` does not set in them
ALSO = {"distill": (DistillMasks, Pretrain)}  # what they have in common: Adam, augmentation, validation
HELD_BY_STEPS = ("part", "align", "train", "order", "encoder", "padding")  # of which each step of a recipe has its own


def change(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with fields set by "kind.field=value", kind one of `KINDS` and quirks.

    Raises:
      InputError: there is no such field, the value is not one of its type, or does not go with the others.
    """
    changed = settled(recipe, settings)
    check(changed)
    return changed


def settled(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """As `change`, but for steps that do not go together: which those are depends on the model."""
    given: dict[str, Any] = {}
    for setting in map(str, settings):
        name, equals, text = setting.partition("=")
        shown = f"--set {printable(setting, 60)}"
        if name in given:
            raise InputError(f"{shown}: {name} is set twice")
        if name not in FIELDS and (answer := what_became_of(setting)):
            raise InputError(f"{shown}: {printable(answer, 200)}")
        if name in FIELDS and not equals:
            raise InputError(f"{shown}: say what it shall be, {name}=VALUE")
        if name not in FIELDS:
            nearest = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0)
            raise InputError(f"{shown}: no such choice; the nearest are {', '.join(nearest)} (NAME=VALUE)")
        try:
            given[name] = _parse(FIELDS[name], text)
        except (ValueError, KeyError):
            raise InputError(f"{shown}: {printable(text, 60)!r} is no {_called(FIELDS[name])}") from None
    for name in given:
        _check_read(name, recipe)
    return tuple(map(_changed, recipe, _shared_out(recipe, given)))


def _check_read(name: str, recipe: Recipe) -> None:
    """Raises InputError for a choice that no step of the recipe has."""
    kind, _, field = name.partition(".")
    held_by = (Prune, Distill) if kind == "quirks" else (KINDS[kind], *ALSO.get(kind, ()))
    steps = [type(step) for step in recipe if isinstance(step, held_by)]
    if not steps:
        raise InputError(f"--set {kind}...: the recipe has no such step, and leaves it unread")
    if kind != "quirks" and not any(field in _flat(step) for step in steps):
        raise InputError(f"--set {name}...: no step of the recipe has this choice, and it would be left unread")


def explain(option: str) -> str | None:
    """Returns a sentence for whoever types a choice, or its name of 0.2, as an option; None if it is none.

    Args:
      option: "--criterion=fisher" or "--prune.min-keep".
    """
    name, _, value = option.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    if name in FIELDS:
        return f"it is a choice of the recipe: --set {name}={value or 'VALUE'}"
    answer = what_became_of(f"{name}={value or 'VALUE'}")
    return answer and f"{answer}{' (--set NAME=VALUE)' if 'called' in answer else ''}"


def _fields() -> dict[str, Any]:
    """{"prune.round_to": int, "distill.lr": ..., "quirks.tied_embedding": bool, ...}: names and their types."""
    found, common = {}, {*_flat(Distill)}
    for kind, record in {**KINDS, "quirks": Quirks}.items():
        for name, hint in _flat(record).items():
            if name not in HELD_BY_STEPS and not (name in common and record in ALSO["distill"]):
                found[f"{kind}.{name}"] = hint
    return found


def _flat(record: type) -> dict[str, Any]:
    """Fields of a record and of the records in it, but `Quirks`, by name and type."""
    found: dict[str, Any] = {}
    for name, hint in _hints(record).items():
        if dataclasses.is_dataclass(hint):
            found |= _flat(hint) if hint is not Quirks else {}
        else:
            found[name] = hint
    return found


def _hints(record: type) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record)}


FIELDS = _fields()


def _parse(hint: Any, text: str) -> Any:
    """Text as a value of a type; of several types ("auto" or a number) the first that takes it.

    Raises:
      ValueError, KeyError: it is none.
    """
    if typing.get_origin(hint) is Literal:
        return text  # the record says what there is
    options = typing.get_args(hint)
    if type(None) in options:
        options = tuple(option for option in options if option is not type(None))
    if options:
        words = [word for option in options for word in typing.get_args(option)]
        return text if text in words else _parse(options[0], text)
    parse = {bool: lambda t: {"true": True, "false": False}[t.lower()], int: int, float: float}
    return parse.get(hint, str)(text)


def _called(hint: Any) -> str:
    options = typing.get_args(hint)
    return _called(options[0]) if options else getattr(hint, "__name__", str(hint))


def _shared_out(recipe: Recipe, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What each step takes of what is given.

    Optimizer steps are of those that have a number of their own, and batch norms of those before integers. Where a
    recipe has none of the kind all take it.
    """
    where = lambda *kinds: {index for index, step in enumerate(recipe) if isinstance(step, kinds)}
    trained, distilled = where(Distill, *ALSO["distill"]), where(Distill)
    integers, every = min(where(Quantize), default=len(recipe)), range(len(recipe))
    taken_by = {
        "distill.steps": {index for index in trained if recipe[index].optimizer.steps} or trained,
        "distill.batch_norm": {index for index in distilled if index < integers} or distilled,
    }
    takes = lambda index: {name: value for name, value in given.items() if index in taken_by.get(name, every)}
    return [takes(index) for index in every]


def _changed(record: Any, given: dict[str, Any]) -> Any:
    """A step with the fields that are given for its kind; of records in it, too."""
    kinds = [kind for kind, cls in KINDS.items() if isinstance(record, (cls, *ALSO.get(kind, ())))]
    own = {name.partition(".")[2]: value for name, value in given.items() if name.partition(".")[0] in kinds}
    quirks = {name.partition(".")[2]: value for name, value in given.items() if name.startswith("quirks.")}
    return _replaced(record, own, quirks) if own or quirks else record


def _replaced(record: Any, own: dict[str, Any], quirks: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Quirks):
            changes[field.name] = dataclasses.replace(value, **quirks)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _replaced(value, own, {})
        elif field.name in own:
            changes[field.name] = own[field.name]
    return dataclasses.replace(record, **changes)

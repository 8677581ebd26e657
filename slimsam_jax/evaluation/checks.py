"""What an evaluation can be asked for, checked before JAX is there: each raises InputError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from slimsam_jax import limits
from slimsam_jax.cli.checks import check_seed
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range, quoted

Protocol = Literal["point", "point-center", "box", "box-noisy", "clicks", "everything", "agreement"]


def check_choices(models: Sequence[Any], data: Sequence[str], protocols: Sequence[str], boxes: Path | None) -> None:
    """Raises InputError for models, data and protocols that do not go together."""
    for name, values in (("--model", models), ("--data", data)):
        if not values:
            raise InputError(f"{name} needs at least one value")
    if any(model is other for i, model in enumerate(models) for other in models[:i]) or _twice(models):
        raise InputError("--model has a model twice")
    for protocol in protocols:
        if protocol not in get_args(Protocol):
            raise InputError(f"--protocol {quoted(protocol)} is none of {', '.join(get_args(Protocol))}")
    if "agreement" in protocols and len(models) < 2:
        raise InputError("--protocol agreement needs at least two models: it compares with the first")
    if boxes and (len(data) > 1 or not _is_coco(data[0])):
        raise InputError("--boxes needs one COCO .json as --data, or a folder with annotations.json: the ground truth")


def check_numbers(clicks: int, points_per_side: int, seed: int, resamples: int) -> None:
    """Raises InputError for a number out of its range."""
    limits.check("--clicks", clicks, Range(1, limits.PROMPT_POINTS - 1, True))  # and one point that ends them
    limits.check("--points-per-side", points_per_side, limits.SEARCH["points_per_side"])
    limits.check("--resamples", resamples, Range(1, 10**6, True))
    check_seed(seed)


def names_of(models: Sequence[Any]) -> list[str]:
    """What the columns are called: names of files or folders, or all of the paths where those are the same.

    Models that are no paths are called by their places: "model 2".
    """
    paths = [model if isinstance(model, Path) else Path(f"model {i}") for i, model in enumerate(models, 1)]
    names = [path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _twice(models: Sequence[Any]) -> bool:
    paths = [model for model in models if isinstance(model, Path)]
    return len(set(paths)) < len(paths)


def _is_coco(location: str) -> bool:
    """By its name; what is in it is seen when it is read."""
    from slimsam_jax.data.sources import coco

    path = coco.file_of(location)
    return path.suffix == ".json" and (path.is_file() or path == Path(location).expanduser())

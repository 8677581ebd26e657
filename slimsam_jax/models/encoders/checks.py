"""What all encoder families ask of an architecture, before anything is built of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from slimsam_jax.models.config import WIDEST


def check_widths(record: Any, names: Collection[str]) -> None:
    """Raises ValueError unless these fields are whole numbers from 1 to `WIDEST`."""
    for name in names:
        check_width(name, getattr(record, name))


def check_width(name: str, width: Any) -> None:
    """Raises ValueError unless `width` is a whole number from 1 to `WIDEST`."""
    if type(width) is not int or not 1 <= width <= WIDEST:
        raise ValueError(f"{name} {width!r:.40} is no whole number from 1 to {WIDEST}")


def check_image_size(image_size: Any, stride: int) -> None:
    """Raises ValueError unless it is (height, width) in pixels, multiples of the embedding's stride."""
    whole = isinstance(image_size, tuple) and all(type(side) is int and 0 < side <= WIDEST for side in image_size)
    if not whole or len(image_size) != 2:
        raise ValueError(f"image_size {image_size!r:.40} must be (height, width) in pixels, at most {WIDEST}")
    if any(side % stride for side in image_size):
        raise ValueError(f"image_size {image_size} must be multiples of the embedding's stride {stride}")


def pair(image_size: int | Collection[int]) -> tuple[int, ...]:
    """One side, or (height, width), as a tuple."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)

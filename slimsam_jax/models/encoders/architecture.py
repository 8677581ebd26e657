"""What the architectures of encoder families share: a block's widths, and what is asked of sizes beforehand."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, Self

from slimsam_jax.models.config import DEEPEST, WIDEST, check_pixels


class AsJson:
    """Gives a frozen record to JSON and takes it back; its fields are values, tuples, and tuples of such records."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_json` (JSON turns tuples into lists).

        Raises:
          ValueError: an unknown or missing field, or one out of range.
        """
        try:
            return _record(cls, fields)
        except TypeError as error:
            raise ValueError(f"not an architecture of slimsam_jax: {error}") from None


def _record(kind: type, fields: Any) -> Any:
    """A record of JSON's values; raises TypeError for what is none."""
    if not isinstance(fields, Mapping):
        raise TypeError(f"a {kind.__name__} is an object, not {fields!r:.40}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(name, hints.get(name), value) for name, value in fields.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    """A field by its type; of longer lists than any architecture has the rest is left out, so that they are refused."""
    if dataclasses.is_dataclass(hint):
        return _record(hint, value)
    if typing.get_origin(hint) is not tuple:
        return value
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is a list, not {value!r:.40}")
    return tuple(_value(name, typing.get_args(hint)[0], each) for each in value[: DEEPEST + 1])


def check_widths(record: Any, names: Collection[str]) -> None:
    """Raises ValueError unless these fields are whole numbers from 1 to `WIDEST`."""
    for name in names:
        check_width(name, getattr(record, name))


def check_width(name: str, width: Any) -> None:
    """Raises ValueError unless `width` is a whole number from 1 to `WIDEST`."""
    if type(width) is not int or not 1 <= width <= WIDEST:
        raise ValueError(f"{name} {width!r:.40} is no whole number from 1 to {WIDEST}")


def check_image_size(image_size: Any, stride: int) -> None:
    """Raises ValueError unless it is (height, width) in pixels, not too many, multiples of the embedding's stride."""
    whole = isinstance(image_size, tuple) and all(type(side) is int and 0 < side <= WIDEST for side in image_size)
    if not whole or len(image_size) != 2:
        raise ValueError(f"image_size {image_size!r:.40} must be (height, width) in pixels, at most {WIDEST}")
    check_pixels(image_size)
    if any(side % stride for side in image_size):
        raise ValueError(f"image_size {image_size} must be multiples of the embedding's stride {stride}")


def pair(image_size: int | Collection[int]) -> tuple[int, ...]:
    """One side, or (height, width), as a tuple."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


@dataclasses.dataclass(frozen=True)
class Block:
    """Widths of a transformer block.

    Attributes:
      heads: attention heads.
      key_dim, value_dim: channels per head of q and k, and of v.
      mlp_dim: hidden channels of the MLP.

    Raises:
      ValueError: one is no width.
    """

    heads: int
    key_dim: int
    value_dim: int
    mlp_dim: int

    def __post_init__(self):
        check_widths(self, ("heads", "key_dim", "value_dim", "mlp_dim"))


def block_of(attention: Mapping[str, Any], mlp_dim: int) -> Block:
    """Of an attention's parameters, arrays or shapes, with q and k kernels [C, n, d] and v's [C, n, e]."""
    _, heads, key_dim = attention["q"]["kernel"].shape
    return Block(heads, key_dim, attention["v"]["kernel"].shape[2], mlp_dim)

"""A row of a conversion table, and the rows of common layers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from einops import rearrange

VECTOR, LINEAR, CONV, CONV_TRANSPOSE = "c -> c", "o i -> i o", "o i h w -> h w i o", "i o h w -> h w o i"


class Row(NamedTuple):
    """One array. `path` is ours, slash-separated; `sizes` settles axes that the pattern splits."""

    name: str
    path: str
    pattern: str
    sizes: dict[str, int]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Converts an array to our layout; a view, where there can be one."""
        return rearrange(array, self.pattern, **self.sizes)

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """Returns our shape of an array of their shape, for which nothing is allocated."""
        return self.to_ours(np.broadcast_to(np.float32(0), theirs)).shape

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        ours, theirs = self.pattern.split(" -> ")[::-1]
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}", **self.sizes))


def _layer(name: str, path: str, kernel: str, bias: str | None = VECTOR) -> list[tuple[str, str, str]]:
    rows = [(f"{name}.weight", f"{path}/kernel", kernel)]
    return rows + ([(f"{name}.bias", f"{path}/bias", bias)] if bias else [])


def _norm(name: str, path: str) -> list[tuple[str, str, str]]:
    return [(f"{name}.weight", f"{path}/scale", VECTOR), (f"{name}.bias", f"{path}/bias", VECTOR)]


def _attention(name: str, path: str, projections: str, out: str) -> list[tuple[str, str, str]]:
    rows = [_layer(f"{name}.{p}", f"{path}/{p}", "(n d) c -> c n d", "(n d) -> n d") for p in projections.split()]
    return [*itertools.chain(*rows), *_layer(f"{name}.{out}", f"{path}/{out}", "o (n d) -> n d o")]

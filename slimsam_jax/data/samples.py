"""Long lists of samples, each made when it is asked for: eleven million `Sample`s would take 15 GB."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from slimsam_jax.data.sample import Sample


class Lazy(Sequence[Sample]):
    """Samples of one place that are made when asked for, such as those of a shard."""

    def names(self, start: int, stop: int) -> bytes:
        """Returns the names of some, one a line, in the bytes that `encoded` gives."""
        return b"\n".join(encoded(self[place].name) for place in range(start, stop))

    def annotated(self) -> np.ndarray:
        """Returns [n] bool: which have annotations. No sample need be made for that."""
        return np.array([sample.load_annotations is not None for sample in self], bool)


class Samples(Sequence[Sample]):
    """Several lists of samples behind one another, or some of their samples. A slice is one of these, too.

    Args:
      parts: lists, or `Lazy` ones.
      index: [n] int, which samples of all parts, in which order; None for all.
    """

    def __init__(self, parts: Iterable[Sequence[Sample]], index: np.ndarray | None = None):
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)
        total = int(self.ends[-1]) if self.parts else 0
        self.index = None if index is None else np.asarray(index, np.uint32 if total < 2**32 else np.int64)
        self.length = total if index is None else len(index)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> Sample | Samples:
        if isinstance(place, slice):
            return self.take(np.arange(*place.indices(self.length)))
        place = operator.index(place)
        if not -self.length <= place < self.length:
            raise IndexError(f"sample {place} of {self.length}")
        place %= self.length
        number = place if self.index is None else int(self.index[place])
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part][number - (int(self.ends[part - 1]) if part else 0)]

    def take(self, places: np.ndarray) -> Samples:
        """Returns the samples at these places, in this order."""
        return Samples(self.parts, places if self.index is None else self.index[places])

    def annotated(self) -> Samples:
        """Returns those with annotations."""
        known = [part.annotated() if isinstance(part, Lazy) else Lazy.annotated(part) for part in self.parts]
        flags = np.concatenate([np.zeros(0, bool), *known])
        return self.take(np.flatnonzero(flags if self.index is None else flags[self.index]))

    def names(self) -> Iterator[bytes]:
        """Yields the encoded names, some at a time, one a line."""
        for part, start, stop in self._runs():
            yield part.names(start, stop) if isinstance(part, Lazy) else Lazy.names(part, start, stop)

    def _runs(self) -> Iterator[tuple[Sequence[Sample], int, int]]:
        """Yields (part, start, stop) of samples that lie behind one another, of all in their order."""
        index = np.arange(self.length) if self.index is None else self.index.astype(np.int64)
        cuts = np.flatnonzero(np.diff(index) != 1) + 1
        for first, stop in zip(np.r_[0, cuts].tolist(), np.r_[cuts, len(index)].tolist(), strict=True):
            number, last = (int(index[first]), int(index[stop - 1]) + 1) if stop > first else (0, 0)
            while number < last:
                part = int(np.searchsorted(self.ends, number, side="right"))
                before, end = (int(self.ends[part - 1]) if part else 0), min(last, int(self.ends[part]))
                yield self.parts[part], number - before, end - before
                number = end


def take(samples: Sequence[Sample], places: np.ndarray) -> Sequence[Sample]:
    """Returns the samples at these places: of a list a list, of a long one a long one."""
    return samples.take(places) if isinstance(samples, Samples) else [samples[place] for place in places]


def annotated(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Returns the samples with annotations."""
    if isinstance(samples, Samples):
        return samples.annotated()
    return [sample for sample in samples if sample.load_annotations]


def joined(*parts: Sequence[Sample]) -> Sequence[Sample]:
    """Returns the samples of several lists behind one another."""
    if any(isinstance(part, Samples) for part in parts):
        return Samples(parts)
    return [sample for part in parts for sample in part]


def digest_of_names(samples: Sequence[Sample]) -> str:
    """Hashes the samples' names, one a line (sha256)."""
    sha256, before = hashlib.sha256(), b""
    for names in samples.names() if isinstance(samples, Samples) else [Lazy.names(samples, 0, len(samples))]:
        sha256.update(before + names)
        before = b"\n"
    return sha256.hexdigest()


def encoded(name: str) -> bytes:
    """Encodes a name, which may be no UTF-8."""
    return name.encode(errors="surrogatepass")

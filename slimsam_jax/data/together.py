"""Splits samples over processes, and gathers once what each has made of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from slimsam_jax import sharding
from slimsam_jax.data.reading import map_readable
from slimsam_jax.data.sample import Sample, check_share
from slimsam_jax.data.samples import digest_of_names
from slimsam_jax.errors import InputError
from slimsam_jax.progress import track


def check_same(samples: Sequence[Sample]) -> None:
    """Raises InputError, in all processes, unless all see the same samples, which they are to share."""
    if jax.process_count() == 1:
        return
    found = sharding.gather_json([len(samples), digest_of_names(samples)])
    other = next((index for index, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        (first, _), (count, _) = found[0], found[other]
        raise InputError(
            f"the processes do not see the same images: process 0 has {first}, and process {other} {count}"
            f"{' of other names' * (count == first)}; all of them need the same files, and may list all folders"
        )


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Returns this process's share: the i-th of every n, for the i-th of n processes."""
    return items[jax.process_index() :: jax.process_count()]


def gathered(results: Sequence[Any]) -> list[Any]:
    """Gathers results of the items of each process's `share`, anything that JSON takes, in the order of all items."""
    parts = sharding.gather_json(list(results))
    every: list[Any] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        every[index :: len(parts)] = part
    return every


def map_together(
    function: Callable[[Sample], Any], samples: Sequence[Sample], name: str, max_broken: float = 1.0
) -> tuple[dict[Sample, Any], dict[str, str]]:
    """`map_readable` by all processes, each with its share of the samples; returns the same in all, in their order.

    Results of several processes have gone through JSON: tuples are lists then, and numbers the same.

    Args:
      name: what is done, for the progress.
      max_broken: the share of all samples that may be unreadable; several processes count in the end, together.

    Raises:
      InputError: the processes do not see the same samples.
      RunError: more are unreadable. Of several processes in all of them.
    """
    if jax.process_count() == 1:
        return map_readable(function, track(samples, name), len(samples), max_broken)
    check_same(samples)
    own = share(samples)
    results, skipped = map_readable(function, track(own, name))
    pairs = gathered([[results.get(sample), skipped.get(sample.name)] for sample in own])
    broken = {sample.name: reason for sample, (_, reason) in zip(samples, pairs, strict=True) if reason is not None}
    if max_broken < 1:
        check_share(broken, len(samples), max_broken)
    usable = zip(samples, pairs, strict=True)
    return {sample: result for sample, (result, reason) in usable if reason is None}, broken

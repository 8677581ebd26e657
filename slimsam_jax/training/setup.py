"""Sets up what every training needs: batch size, dtype, images to learn from and to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from slimsam_jax import data, sharding
from slimsam_jax.data import Sample
from slimsam_jax.data.sample import too_many
from slimsam_jax.data.samples import take
from slimsam_jax.data.together import check_same
from slimsam_jax.errors import InputError


class Options(Protocol):
    """The options that every training shares, see `compression.options.Options`."""

    images: tuple[str, ...]
    val: tuple[str, ...]
    batch: int | None
    accumulate: int
    fsdp: int
    dtype: str

    def broken_share(self) -> float:
        """Returns the share of images that may be unreadable."""


def batch_size(options: Options) -> int:
    """Chooses how many images a step has, over all processes."""
    devices, parts = sharding.device_count(), options.accumulate
    if devices % options.fsdp:
        raise InputError(f"--fsdp {options.fsdp} does not divide the {devices} devices")
    batch = options.batch or devices * parts * -(-4 // (devices * parts))
    if batch % (devices * parts):
        times = f" times the {parts} parts of --accumulate" if parts > 1 else ""
        raise InputError(f"--batch {batch} must be a multiple of the {devices} devices{times}")
    return batch


def check_batch(options: Options, batch: int, images: int) -> None:
    """Raises InputError if somebody asked for a step of more images than there are."""
    asked = "--batch" if options.batch else "--accumulate"
    if (options.batch or options.accumulate > 1) and batch > max(images, sharding.device_count()):
        raise InputError(f"{asked} {getattr(options, asked[2:])} is more than the {images} images to learn from")


def split_images(options: Options) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Splits samples into those to learn from, and those to measure on.

    Raises:
      InputError: there are none, or the processes do not see the same.
    """
    images = data.find(options.images or [data.embedded_images()])
    check_same(images)
    if options.val:
        val = data.find(options.val)
        check_same(val)
        return images, val
    held_out = np.arange(0, len(images), max(8, -(-len(images) // 50)))
    others = np.delete(np.arange(len(images)), held_out)
    return take(images, others) if len(others) else images, take(images, held_out)


def some_of(samples: Sequence[Sample], limit: int | None, seed: int) -> Sequence[Sample]:
    """Draws `limit` samples without replacement, keeping their order."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
    return take(samples, np.sort(chosen))


def too_many_of_val(
    options: Options, images: Sequence[Sample], val: Sequence[Sample], broken: Mapping[str, str]
) -> str | None:
    """Returns a complaint if too many of `val` are `broken`; held out, they are counted as a share of all --images."""
    if options.val:
        return too_many(broken, len(val), options.broken_share(), "images of --val")
    return too_many(broken, len(images) + len(val), options.broken_share())


def compute_dtype(options: Options) -> Any:
    if options.dtype == "auto":
        return jnp.float32 if sharding.platform() == "cpu" else jnp.bfloat16
    return jnp.dtype(options.dtype)

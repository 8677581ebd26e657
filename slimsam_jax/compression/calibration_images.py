"""The calibration set: images that importance and statistics are estimated from, as batches on the devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.steps import Prune
from slimsam_jax.data import Sample
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.prompted import AnnotatedBatches
from slimsam_jax.models.config import Config

Batch = dict[str, Any]
Calibration = Callable[[str], Iterable[Batch]]  # what it is for -> batches, the same images at each call


def calibration_stream(
    step: Prune, samples: Sequence[Sample], config: Config, batch: int, seed: int, max_broken: float = 1.0
) -> Batches:
    """What a step that prunes looks at: images, with annotations if it reads those; this process's share."""
    part = jax.process_index(), jax.process_count()
    if step.needs_labels:
        # Images without annotations are passed over, too, and are not broken: distillation counts those.
        return AnnotatedBatches(samples, config, batch, seed, part)
    drawn = {"part": part, "extra": _with_seed, "max_broken": max_broken, "frame": config.frame}
    return Batches(samples, config.image_size, batch, seed, **drawn)


def _with_seed(sample: Sample, size: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Gives an image the seed of its noise, whatever batch and device it comes to."""
    return {"seed": random.integers(2**32, dtype=np.uint32)}


def batches_of(images: int, batch: int) -> int:
    """Counts the batches that make up about `images` images.

    Of 8 images and more these are multiples of 8, the same on 1, 2, 4 and 8 devices.
    """
    return max(1, (images - images % 8 if images >= 8 else images) // batch)


def on_devices(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The first `count` batches of a stream, on all devices."""
    mesh = sharding.make_mesh()
    return (sharding.shard_batch(batch, mesh) for batch in itertools.islice(batches, count))

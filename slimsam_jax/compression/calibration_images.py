"""The calibration set: images that importance and statistics are estimated from, as batches on the devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

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
    return Batches(samples, config.image_size, batch, seed, part=part, max_broken=max_broken, frame=config.frame)


def on_devices(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The first `count` batches of a stream, on all devices."""
    mesh = sharding.make_mesh()
    return (sharding.shard_batch(batch, mesh) for batch in itertools.islice(batches, count))

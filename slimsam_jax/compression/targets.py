"""What the frozen models give for each image, kept in memory: a small set of images is seen many times."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import trainer
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.steps import Distill
from slimsam_jax.data import Sample
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam, embedding_shapes, run_encoder

ROOM = 2**28  # bytes that targets may take: those of 24 images of the small SAM are 63 MB, of 200 too many


class Targets:
    """Called with an image, gives its targets [1, ...] as numpy; computed when first asked for, in any thread.

    Args:
      previous: the model that was pruned.
      names: of the terms of the loss; those that are no features of the frozen models are not kept.
    """

    def __init__(self, run: Run, step: Distill, previous: Sam, names: Sequence[str]):
        self.run, self.names, self.previous = run, names, previous
        encode = functools.partial(run_encoder, dtype=run.dtype, attention=run.options.attention)
        configs = previous.config, run.teacher.config
        self.program = jax.jit(functools.partial(trainer.frozen_features, encode, *configs, step))
        encoder = previous.params["image_encoder"]
        self.frozen = {"previous": jax.tree.map(lambda leaf: jnp.asarray(leaf, run.dtype), encoder)}
        self.known: dict[Sample, Any] = {}
        self.lock = threading.Lock()  # the first call compiles for the others

    def __call__(self, sample: Sample) -> dict[str, Any]:
        with self.lock:
            if sample not in self.known:
                self.known[sample] = self._compute(sample)
        return self.known[sample]

    def _compute(self, sample: Sample) -> dict[str, Any]:
        image, cache = sample.image(), self.run.cache
        embedding = cache.read(sample) if cache else encode_image(self.run.teacher, image).embedding
        embedding = jax.tree.map(lambda x: np.asarray(x)[None], embedding)
        frame, size = self.run.teacher.config.frame.place(image)
        if not self._features():
            return {"embedding": embedding}
        found = self.program(self.frozen, {"image": frame[None], "size": size[None], "embedding": embedding})
        return jax.device_get({name: found[name] for name in found if name in self.names})

    def _features(self) -> bool:
        """Whether anything is compared besides the embedding and what is made of it."""
        return not set(self.names) <= {"embedding", "direction", "masks", "iou"}

    def bytes_per_image(self) -> int:
        config, row = self.run.teacher.config, jax.ShapeDtypeStruct
        embedding = jax.tree.map(lambda leaf: row((1, *leaf.shape), leaf.dtype), embedding_shapes(config))
        batch = {"image": row((1, *config.image_size, 3), np.uint8), "size": row((1, 2), np.int32)}
        found = {"embedding": embedding}
        if self._features():
            found = jax.eval_shape(self.program, self.frozen, {**batch, "embedding": embedding})
        kept = jax.tree.leaves({name: found[name] for name in found if name in self.names})
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def embeddings(run: Run, step: Any, steps: int) -> Callable[[Sample], dict[str, np.ndarray]] | None:
    """A function that gives the teacher's {"embedding": [h, w, C]} of an image, where it is cached or kept in memory.

    None where a step had better compute it.
    """
    if kept := remembered(run, step, steps, run.teacher, ["embedding"]):
        return lambda sample: {"embedding": kept(sample)["embedding"][0]}
    return (lambda sample: {"embedding": run.cache.read(sample)}) if run.cache else None


def remembered(run: Run, step: Distill, steps: int, previous: Sam, names: Sequence[str]) -> Targets | None:
    """`Targets` where they save work: images come again, as they are, and those of all fit into `ROOM`.

    With several devices none: programs of reader threads would run between those that wait for each other.
    """
    count, config = len(run.images), run.teacher.config
    again = steps * run.batch > count and not step.augment.flip and step.augment.crop == 1
    least = 4 * count * sum(leaf.size for leaf in jax.tree.leaves(embedding_shapes(config)))
    if not again or least > ROOM or sharding.device_count() > 1:
        return None
    targets = Targets(run, step, previous, names)
    return targets if count * targets.bytes_per_image() <= ROOM else None

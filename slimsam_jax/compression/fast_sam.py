"""Prunes a FastSAM by the groups of its jaxpr, which know what C2f splits and joins; nothing here does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.letterbox import fit, letterbox
from slimsam_jax.inference.predictor import AnyImage, as_image
from slimsam_jax.models.fast_sam import Config, FastSam, Network, abstract_params, config_of
from slimsam_jax.models.fast_sam_config import STRIDE
from slimsam_jax.pruning.choosing import Allocation
from slimsam_jax.pruning.gradients import disturbed_gradients
from slimsam_jax.pruning.importance import WITHOUT_GRADIENT, Criterion

TRACED_SIDE = 64  # pixels; groups do not depend on it


@functools.lru_cache(maxsize=8)
def groups_of(config: Config) -> pruning.Grouping:
    """The groups of a FastSAM. Nothing crosses any of them: masked and cut are the same function.

    Of the outputs as they leave the network, so that bins, coefficients and prototypes stay.
    """
    images = jax.ShapeDtypeStruct((1, TRACED_SIDE, TRACED_SIDE, 3), jnp.float32)
    return pruning.find_groups(functools.partial(raw, config), abstract_params(config), images)


def raw(config: Config, params: Any, images: jax.Array) -> jax.Array:
    """All outputs of the network in a row, [b, ...] -> [b, n]: what a slim model should give, too."""
    outputs, _ = Network(config).apply({"params": params}, images)
    return jnp.concatenate([leaf.reshape(len(images), -1) for leaf in jax.tree.leaves(outputs)], axis=1)


def prune(
    model: FastSam,
    ratio: float = 0.5,
    criterion: Criterion = "magnitude",
    images: Iterable[AnyImage] = (),
    allocation: Allocation = "local",
    round_to: int = 1,
    min_keep: float = 0.1,
    seed: int = 0,
) -> FastSam:
    """Cuts channels, without training.

    The statistics of batch norms are those of the wide model, which the slim one's channels no longer have exactly.

    Args:
      model: to prune; it stays as it is.
      ratio: share of the channels to remove, see `pruning.select`.
      criterion: "magnitude" and "random" need no images; "taylor" and "fisher" take gradients of the disturbed loss.
      images: as `predict` takes them.
      allocation: "local": the same share of every group; "global": all compete.
      round_to, min_keep: see `pruning.select`.
      seed: of the noise, and of "random".

    Raises:
      InputError: no images for a criterion that needs some, or the ratio leaves nothing.
    """
    config, params = model.config, jax.device_get(model.params)
    grouping, gradients = groups_of(config), None
    if criterion not in WITHOUT_GRADIENT:
        frames = (frame_of(image, config.image_size) for image in images)  # one at a time: 13 MB each at 1024 px
        if (first := next(frames, None)) is None:
            raise InputError(f"criterion {criterion!r} needs images; {', '.join(WITHOUT_GRADIENT)} need none")
        embed = functools.partial(raw, config)
        gradients = jax.device_get(
            disturbed_gradients(embed, params, itertools.chain([first], frames), jax.random.key(seed))
        )
    scores = pruning.score(params, grouping, gradients, criterion, seed=seed)
    keep = pruning.select(scores, ratio, allocation, round_to, min_keep)
    slim = pruning.shrink(params, grouping, keep)
    narrow = dataclasses.replace(config_of(slim, config.image_size), batch_norm=config.batch_norm)
    provenance = {"pruned": {"ratio": ratio, "criterion": criterion}, "teacher": model.provenance}
    return FastSam(narrow, jax.device_put(slim), provenance)


def frame_of(image: AnyImage, side: int) -> np.ndarray:
    """An image as the network takes it in training: square, [1, side, side, 3] float32 in 0..1."""
    return Square(side).place(as_image(image))[0][None].astype(np.float32) / 255


class Square(NamedTuple):
    """How images come into a square frame, as `Batches` asks it; see `imaging.frames.Frame`.

    Attributes:
      side: of the frame in pixels.
    """

    side: int

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def place(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """[side, side, 3] uint8 with grey bars, and the [2] int32 size of the image in it."""
        place = fit((image.height, image.width), self.side, rectangle=False, stride=STRIDE)
        return letterbox(np.asarray(image), place), np.array(place.size, np.int32)

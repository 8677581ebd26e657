"""What MobileSAM's class has and ours has not: arrays that are never run, and shapes that it cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from converters.tables.strict import State
from slimsam_jax.models.encoders.tiny_vit_config import Config, original_stride

CLASSIFIER = tuple(
    f"image_encoder.{name}" for name in ("norm_head.weight", "norm_head.bias", "head.weight", "head.bias")
)
CLASSES = 1000
COUNTER = ".num_batches_tracked"


def is_kept(name: str) -> bool:
    """Whether nothing of ours reads this array: the classifier's, or a batch norm's counter."""
    return name.endswith(COUNTER) or name in CLASSIFIER


def fresh(norms: Sequence[str], config: Config) -> State:
    """Such arrays as a new model has them, but for a classifier of zeros.

    Args:
      norms: names of the batch norms.
    """
    dim = config.stages[-1].dim
    arrays = (np.ones(dim), np.zeros(dim), np.zeros((CLASSES, dim)), np.zeros(CLASSES))
    classifier = {name: array.astype(np.float32) for name, array in zip(CLASSIFIER, arrays, strict=True)}
    return classifier | {norm + COUNTER: np.zeros((), np.int64) for norm in norms}


def check(kept: Mapping[str, np.ndarray], norms: Sequence[str], config: Config, where: str) -> None:
    """Raises InputError unless the counters, and the classifier, are all there or all away, and fit the encoder."""
    from slimsam_jax import checkpoint

    counters, found = {norm + COUNTER for norm in norms}, set(kept)
    expected = (counters if found & counters else set()) | (set(CLASSIFIER) if found & set(CLASSIFIER) else set())
    checkpoint.check_names(found, expected, where)
    dim, classes = config.stages[-1].dim, kept[CLASSIFIER[-1]].shape[:1] if CLASSIFIER[-1] in kept else ()
    shapes = dict(zip(CLASSIFIER, ((dim,), (dim,), (*classes, dim), classes), strict=True))
    checkpoint.check_shapes({name: (array.shape, shapes.get(name, ())) for name, array in kept.items()}, where)


def other_classes(kept: Mapping[str, np.ndarray]) -> str:
    """Why the original's class cannot hold this classifier; "" if it can."""
    classes = kept[CLASSIFIER[-1]].size if CLASSIFIER[-1] in kept else CLASSES
    return "" if classes == CLASSES else f"it has {classes} classes, not {CLASSES}"


def obstacle(config: Config) -> str:
    """Why the original's class cannot hold this encoder; "" if it can."""
    stages, entries = config.stages, [(stage.entry_dim, stage.dim) for stage in config.stages]
    blocks = [(block, stage) for stage in stages for block in stage.blocks]
    first, stage = blocks[0]
    whole = lambda b, s: s.dim == b.heads * b.key_dim == b.heads * b.value_dim and b.heads == s.blocks[0].heads
    reasons = {
        "heads that are not together as wide as their stage": not all(whole(*pair) for pair in blocks),
        "MLPs that are not one multiple of their stages' widths": any(
            b.mlp_dim * stage.dim != first.mlp_dim * s.dim for b, s in blocks
        ),
        "MBConvs of different widths": len(set(config.conv_blocks)) > 1,
        "a stem that is not half as wide as the first stage": config.stem_dim != config.conv_dim // 2,
        "downsamplings that are not as wide as what they lead to": any(hidden != dim for hidden, dim in entries),
        "widths that mean other strides to it": any(s.stride != original_stride(s.dim) for s in stages),
        "other stages than four, of strides 4, 8, 16 and 16": [s.stride for s in stages] != [2, 2, 1],
        "another image size than 1024": config.image_size != (1024, 1024),
        "another embedding than of 256 channels": config.out_chans != 256,
    }
    return next((f"it has {reason}" for reason, there in reasons.items() if there), "")

"""Quantises a SAM: integers in the place of the weights of its layers, of all three parts, and of layers' inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import data
from slimsam_jax.compression.input_ranges import PERCENTILE, divisors, with_ranges, without_worst
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.mixed_bits import FLOAT, check_share, choose, finer, restored, room_within
from slimsam_jax.data import Sample
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT
from slimsam_jax.models.heads import kind_of
from slimsam_jax.models.kinds import check_sam
from slimsam_jax.models.sam import (
    Architecture,
    Embedding,
    Params,
    Sam,
    embedding_of,
    encode,
    folded,
    image_encoder,
    preprocess,
)
from slimsam_jax.progress import track
from slimsam_jax.quantization import (
    Statistics,
    any_quantized,
    capture,
    tinysam_function,
    weights,
)
from slimsam_jax.quantization.sensitivity import sensitivity
from slimsam_jax.quantization.training import nodes_of

PROMPTS = 8  # of each image of the calibration set
AT_ONCE = 4  # images
ENCODER = "image_encoder/"


def quantize(
    sam: Sam, images: str | Path | Sequence[Any], /, step: Quantize | None = None, seed: int = 0, **choices: Any
) -> Sam:
    """Makes a model of integers. What it computes with them, all that takes a model computes.

    Example:
      ```python
      import slimsam_jax

      small = slimsam_jax.quantize(slimsam_jax.load("slim77"), "photos", weights=4)
      slimsam_jax.save(small, "slim77_int4")
      ```

    Args:
      sam: the model, whose weights are numbers with a fraction.
      images: unlabelled ones to calibrate with: locations, as `compress` takes them, or samples.
      step: what becomes integers, and how.
      seed: of the order of images, and of prompts.
      choices: fields of `Quantize` in the place of `step`.

    Raises:
      InputError: no image can be read, a choice is invalid, or the model is one of integers already.
    """
    check_not_quantized(check_sam(sam), "quantised again")
    if step and choices:
        raise InputError(f"a step says all of its choices: give a step, or {', '.join(choices)}")
    places = [images] if isinstance(images, str | os.PathLike) else list(images)
    if not places:
        raise InputError("there are no images to calibrate with: give a folder of some")
    samples = places if isinstance(places[0], Sample) else data.find(places)
    new, skipped = quantized(sam, samples, step or Quantize(**choices), seed)
    for reason in skipped.values():
        print(f"skipped: {reason}", flush=True)
    return new


def quantized(
    sam: Sam, samples: Sequence[Sample], step: Quantize, seed: int = 0, max_broken: float = 1.0
) -> tuple[Sam, dict[str, str]]:
    """As `quantize`, with why some images could not be read, {name: reason}. Batch norms are folded into weights first.

    Raises:
      InputError: `Quantize.share` is too small for the model.
      RunError: more than this share of them.
    """
    sam = folded(sam)
    check_share(step, sam.params)
    data.check_one_is_readable(samples)
    alone = step.method == "tinysam"  # it reads one batch
    count, size = min(step.images, len(samples), AT_ONCE if alone else len(samples)), sam.config.image_size
    at_once = count if alone else AT_ONCE
    batches = Batches(samples, size, at_once, seed, max_broken=max_broken, frame=sam.config.frame)
    try:
        taken = list(itertools.islice(batches, -(-count // at_once)))
    finally:
        batches.close()
    percentiles = (PERCENTILE,) if step.ranges == "percentile" else ()
    params = with_integers(sam, step, see(sam, taken, seed, percentiles, step.head or alone, not alone))
    note = {"quantized": dataclasses.asdict(step) | {"calibration_images": count, "seed": seed}}
    return dataclasses.replace(sam, params=params, provenance={**sam.provenance, **note}), batches.skipped


def check_not_quantized(sam: Sam, what: str) -> None:
    """Raises InputError for a model of integers, which can only be used."""
    if any_quantized(sam.params):
        raise InputError(f"this model is quantised, and integers cannot be {what}: take the model that it was made of")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the layers of a SAM see of a calibration set.

    Attributes:
      encoder, head: statistics by the path of the kernel; no head's if it is left out.
      images: inputs of the image encoder, a batch each; `prompts`: inputs of the head, an image each.
    """

    encoder: dict[str, Statistics]
    head: dict[str, Statistics]
    images: list[tuple[Any, ...]]
    prompts: list[tuple[Any, ...]]


def see(
    sam: Sam,
    batches: Sequence[dict[str, np.ndarray]],
    seed: int,
    percentiles: Sequence[float] = (),
    head: bool = True,
    statistics: bool = True,
) -> Seen:
    """Captures statistics of all layers.

    Args:
      batches: images, as `data.Batches` gives them.
      seed: of prompts.
      percentiles: of ranges, see `capture`.
      head: also of prompt encoder and decoder.
      statistics: or inputs and prompts alone, for method tinysam.
    """
    shown = lambda items, name: track(items, f"quantize: {name}", len(batches), per_item=AT_ONCE, compiles=True)
    images = [(batch["image"], batch["size"]) for batch in batches]
    of = lambda *what: _kernels(capture(*what)) if statistics else {}
    encoder = of(_embed_of(sam), sam.params["image_encoder"], shown(images, "image encoder"), percentiles)
    prompts = list(prompted(sam, shown(batches, "decoder"), seed)) if head else []
    return Seen(encoder, of(_decode_of(sam), sam.params, prompts) if head else {}, images, prompts)


def _kernels(seen: dict[str, Statistics]) -> dict[str, Statistics]:
    """Layers alone: not what else is multiplied by, such as a positional encoding's frequencies of many turns."""
    return {path: each for path, each in seen.items() if path.endswith("kernel")}


def with_integers(sam: Sam, step: Quantize, seen: Seen) -> Params:
    """The parameters of a SAM, quantised by what was seen."""
    if step.method == "tinysam":
        return {**sam.params, "image_encoder": jax.device_put(tinysam_encoder(sam, step, seen))}
    encoder, how = sam.params["image_encoder"], (step.group, step.method)
    own = *how, divisors(seen.encoder, step)
    new = weights.quantize(encoder, seen.encoder, step.weights, *own)
    errors = lambda integers: sensitivity(_embed_of(sam), encoder, integers, seen.images[:1])
    rest = _head(sam, step, seen, how) if step.head else sam.params
    if step.share:
        new, rest = _within_share(sam, step, seen, new, rest, own)
    if step.activations:
        new = with_ranges(new, seen.encoder, step)
        if step.float_inputs:
            new = without_worst(new, errors(new), step.float_inputs)
    return jax.device_put({**rest, "image_encoder": new})


def _within_share(
    sam: Sam, step: Quantize, seen: Seen, encoder: Params, head: Params, own: tuple[Any, ...]
) -> tuple[Params, Params]:
    """Encoder and the rest with more bits where masks need them, as many as `Quantize.share` leaves room for."""
    ranged = with_ranges(encoder, seen.encoder, step) if step.activations else encoder
    room = room_within(step, sam.params, {**head, "image_encoder": ranged})
    masks, before = _masks_of(sam, seen.prompts[: len(seen.images[0][0])]), sam.params["image_encoder"]
    found = sensitivity(lambda *inputs: [each for each, _ in masks(*inputs)], before, encoder, seen.images[:1])
    found = {ENCODER + path: each for path, each in found.items()} | _head_errors(sam, seen, head)
    errors = {path: by_weights for path, (by_weights, _) in found.items()}
    chosen = choose(errors, nodes_of({**head, "image_encoder": encoder}), room)
    of = lambda bits, inside: [path for path in chosen if chosen[path] == bits and path.startswith(ENCODER) == inside]
    short = lambda bits: [path.removeprefix(ENCODER) for path in of(bits, True)]
    encoder = restored(encoder, finer(before, seen.encoder, short(8), own), short(8))
    head = restored(head, finer(sam.params, seen.head, of(8, False), own[:2]), of(8, False))
    return restored(encoder, before, short(FLOAT)), restored(head, sam.params, of(FLOAT, False))


def _masks_of(sam: Sam, prompts: Sequence[tuple[Any, ...]]) -> Callable[..., list[Any]]:
    """A function of (image encoder, images, sizes) that gives masks and predicted IoU of each image's prompts."""

    def masks(encoder: Params, images: jax.Array, sizes: jax.Array) -> list[Any]:
        embeddings = embed(sam.config, encoder, images, sizes)
        of = lambda index, prompt: _decode(sam.config, sam.params, embedding_of(embeddings, index), *prompt[1:3])
        return [of(index, prompt)[:2] for index, prompt in enumerate(prompts)]

    return masks


def tinysam_encoder(sam: Sam, step: Quantize, seen: Seen, search: tinysam_function.Search | None = None) -> Params:
    """An image encoder by TinySAM's scheme, on the first batch of images and their prompts."""
    (images, sizes), how = seen.images[0], (curvature, (step.weights, step.activations), search)
    masks = _masks_of(sam, seen.prompts[: len(images)])
    function = lambda encoder, images: masks(encoder, images, sizes)
    return tinysam_function.quantize(function, sam.params["image_encoder"], (images,), *how)


def curvature(results: list[Any], key: jax.Array) -> jax.Array:
    """What has squared gradients whose mean is the second derivative of KL(masks) + KL(IoU), at no error.

    Of a logit of probability p that is p (1 - p): so random signs times its root. IoU counts by its square.
    """
    keys = jax.random.split(key, 2 * len(results)).reshape(-1, 2)
    signs = lambda key, x: jax.random.rademacher(key, x.shape, x.dtype) / x.size**0.5
    spread = lambda logits: jax.lax.stop_gradient(jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)))
    each = [
        (signs(a, masks) * spread(masks) * masks).sum() + (signs(b, iou) * iou).sum()
        for (masks, iou), (a, b) in zip(results, keys, strict=True)
    ]
    return sum(each)


def _head(sam: Sam, step: Quantize, seen: Seen, how: tuple[Any, ...]) -> Params:
    """The parameters of a SAM with integers in prompt encoder and decoder."""
    head = weights.quantize(sam.params, seen.head, step.weights, *how)
    if step.float_weights:
        head = restored(head, sam.params, list(_head_errors(sam, seen, head))[: step.float_weights])
    return head


def _head_errors(sam: Sam, seen: Seen, head: Params) -> dict[str, tuple[float, float]]:
    """What each layer of prompt encoder and decoder costs the masks."""
    some = seen.prompts[:: -(-len(seen.prompts) // AT_ONCE)]
    return sensitivity(lambda *inputs: _decode_of(sam)(*inputs)[0], sam.params, head, some)


def _embed_of(sam: Sam) -> Callable[..., Embedding]:
    return lambda encoder, images, sizes: embed(sam.config, encoder, images, sizes)


def _decode_of(sam: Sam) -> Callable[..., Any]:
    return lambda params, *inputs: _decode(sam.config, params, *inputs)


def embed(config: Architecture, encoder: Params, images: jax.Array, sizes: jax.Array) -> Embedding:
    """[b, h, w, C] embeddings, float32, batch norms as they are; what `encode` computes, as a function of weights."""
    pixels = preprocess(config, images, sizes)
    with jax.default_matmul_precision("highest"):
        return image_encoder(config, attention="plain").apply({"params": encoder}, pixels)[0]


def _decode(config: Architecture, head: Params, embedding: Any, points: Any, labels: Any, *masks: Any) -> Any:
    return kind_of(config.head).decode(config.head, head, embedding, points, labels, *masks)


def prompted(sam: Sam, batches: Iterator[dict[str, np.ndarray]], seed: int) -> Iterator[tuple[Any, ...]]:
    """What the head of a SAM is calibrated with: embeddings, random prompts, and masks where it takes some.

    Clicks on and off the object, boxes, and points that are none; a quarter are boxes alone, a quarter a click alone,
    filled up with tokens that are no point, as they are asked for most. So many points that each of the decoder's
    projections is computed by itself. (With few tokens it multiplies two of them, `models.transformer`.)
    """
    random, head = np.random.default_rng(seed), sam.config.head
    takes = lambda labels, masked=False: kind_of(head).refusal(np.array(labels), masked) is None
    kinds = [label for label in (0, 1, NOT_A_POINT) if takes([[label]])]
    heads = getattr(head, "decoder_heads", 8)
    count = max(4, math.ceil(head.out_chans / 2 / heads) - 1 - head.multimask_outputs)
    for batch in batches:
        embeddings = encode(sam.config, sam.params, batch["image"], batch["size"])
        for index, size in enumerate(batch["size"]):
            embedding = embedding_of(embeddings, index)
            points = (random.random((PROMPTS, count, 2)) * size[::-1]).astype(np.float32)
            labels = random.choice(kinds, (PROMPTS, count)).astype(np.int32)
            labels[:, 0] = 1
            if takes([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]):
                boxes = slice(0, PROMPTS // 2)
                labels[boxes, :2] = BOX_TOP_LEFT, BOX_BOTTOM_RIGHT
                points[boxes, :2] = np.sort(points[boxes, :2], axis=1)
            if takes([[1, NOT_A_POINT]]):
                labels[PROMPTS // 4 : PROMPTS // 2, 2:] = labels[PROMPTS // 2 : 3 * PROMPTS // 4, 1:] = NOT_A_POINT
            inputs = (embedding, points, labels)
            if takes(labels, True):
                masks = _decode(sam.config, sam.params, *inputs)[0][:, 0, :, :, None]
                inputs = (*inputs, masks, jnp.arange(PROMPTS) % 2 == 0)
            yield inputs

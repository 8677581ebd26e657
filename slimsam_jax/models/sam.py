"""The parts of SAM joined: architecture and parameters, images -> embeddings -> mask logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.config import Config, Thresholds
from slimsam_jax.models.encoders import FAMILIES, family_of, name_of
from slimsam_jax.models.heads import kind_of
from slimsam_jax.quantization.codes import any_quantized, dequantize
from slimsam_jax.quantization.running import quantizes_inputs
from slimsam_jax.quantization.running import run as run_quantized

Params = dict[str, Any]
Architecture = Config | SamConfig  # of a ViT, or of any family's encoder
Embedding = Any  # [h, w, C], with axes before them of images or prompts; or a dict of such maps, as SAM 2's are

# Above this many numbers that the backward pass would keep (images x tokens x channels x blocks) each block is computed
# again instead: more than one image of ViT-B at 1024 px on an accelerator. Not on a CPU, whose compiler merges the
# second computation with the first and keeps all the same.
REMAT_ABOVE = 2**26


@dataclasses.dataclass(frozen=True)
class Sam:
    """An architecture with its parameters: what every loader returns and every tool takes.

    Attributes:
      config: the architecture.
      params: {"image_encoder": ..., "prompt_encoder": ..., "mask_decoder": ...}, float32.
      provenance: where it came from; free-form JSON, carried along on disk.
      thresholds: of everything mode, if the model has some of its own; they are no part of `config`, by which compiled
        programs are distinguished.
      kept: arrays of a published file that nothing of ours reads, on the host, under their names there, for the way
        back: TinyViT's classifier, say. They are neither trained nor counted.
    """

    config: Architecture
    params: Params
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    thresholds: Thresholds | None = None
    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    engine: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def family(self) -> str:
        """That of its image encoder."""
        return name_of(self.config.encoder)

    @property
    def encoder(self) -> Params:
        """The parameters of the image encoder."""
        return self.params["image_encoder"]

    def refusal(self, labels: np.ndarray, masked: bool) -> str | None:
        """Why prompts of labels [p, n], or with previous masks, cannot be taken, in a line; None if they can."""
        return kind_of(self.config.head).refusal(labels, masked)


make, QUANTIZES = Sam, True  # see `models.kinds`


def architecture(family: str, fields: dict[str, Any]) -> Architecture:
    """Inverse of `to_json` of a config.

    Raises:
      KeyError: there is no such family of encoders.
      ValueError: an unknown or missing field, or one out of range.
    """
    return Config.from_json(fields) if family == "vit" else SamConfig.from_json(FAMILIES[family], fields)


def last_arrays(config: Architecture) -> set[str]:
    """Paths in the last block, decoder layer and mask: whether they are there is seen sooner than what all are."""
    own = getattr(family_of(config.encoder), "last_arrays", lambda encoder: [])
    lasts = {
        "mask_decoder/transformer/layers_{}/norm1/scale": config.decoder_depth,
        "mask_decoder/output_hypernetworks_mlps_{}/layers_0/kernel": 1 + config.multimask_outputs,
    }
    found = {f"image_encoder/{path}" for path in own(config.encoder)}
    return found | {name.format(count - 1) for name, count in lasts.items() if count}


def image_encoder(config: Architecture, dtype: Any = jnp.float32, remat: bool = False, **options: Any) -> nn.Module:
    """The module of its family.

    Args:
      options: of the family's `ImageEncoder`, such as a ViT's attention; those that it has not are left out.
    """
    module = family_of(config.encoder).ImageEncoder
    known = {field.name for field in dataclasses.fields(module)}
    options = {name: value for name, value in options.items() if name in known}
    return module(config.encoder, dtype=dtype, remat=remat, **options)


def init(config: Architecture, key: jax.Array) -> Params:
    """Random parameters of the shapes that `config` asks for; see `abstract_params` for shapes alone."""
    keys = jax.random.split(key, 3)
    images = jnp.zeros((1, *config.image_size, 3))
    encoder = image_encoder(config, attention="plain").init(keys[0], images)["params"]  # traced the soonest
    return {"image_encoder": encoder, **kind_of(config.head).init(config.head, keys[1:])}


@functools.lru_cache(maxsize=32)  # tracing takes a second or two, and a run asks for the same few models
def abstract_params(config: Architecture) -> Params:
    """The parameter tree as shapes, not to be changed; costs no memory, whatever the size."""
    own = getattr(family_of(config.encoder), "abstract_params", None)
    if own is not None:
        return {**abstract_head(config.head), "image_encoder": own(config.encoder)}
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    traced = lambda images: image_encoder(config).init(jax.random.key(0), images)["params"]
    return {**abstract_head(config.head), "image_encoder": jax.eval_shape(traced, images)}


@functools.lru_cache(maxsize=32)
def abstract_head(head: Any) -> Params:
    """The same of what is the same for a SAM and its slim ones: all but the image encoder."""
    return jax.eval_shape(lambda: kind_of(head).init(head, jax.random.split(jax.random.key(0), 2)))


def run_encoder(
    config: Architecture,
    encoder: Params,
    batch: dict[str, jax.Array],
    dtype: Any = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
):
    """(embedding, features) of a batch {"image": uint8, "size"}; an embedding may be a dict of maps.

    Args:
      encoder: the image encoder's parameters.
      dtype: of the computation; the parameters' if None.
      mesh: of the devices that the batch is split over; None for one device.
      attention: how it is computed where there is a choice, see `models.relative_attention`.
    """
    pixels = preprocess(config, batch["image"], batch["size"])
    model = encoder_for(config, len(pixels), dtype or _dtype(encoder), attention, mesh)
    return model.apply({"params": encoder}, pixels)


def encoder_for(
    config: Architecture, images: int, dtype: Any, attention: str = "auto", mesh: Mesh | None = None
) -> nn.Module:
    """For batches of so many images, over all devices of a mesh."""
    kept = getattr(family_of(config.encoder), "kept_elements", lambda encoder: 0)
    large = -(-images // (mesh.size if mesh else 1)) * kept(config.encoder) > REMAT_ABOVE
    remat = large and sharding.platform() != "cpu"
    return image_encoder(config, dtype, remat=remat, attention=attention, mesh=mesh)


def embedding_shapes(config: Architecture) -> Any:
    """One image's embedding as shapes, [h, w, C] float32 or a dict of such maps, of which nothing is traced."""
    row = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    own = getattr(family_of(config.encoder), "embedding_shapes", None)
    if own is None:
        return row((*config.grid, config.out_chans))
    return {name: row(shape) for name, shape in own(config.encoder).items()}


def embedding_of(embeddings: Embedding, index: int) -> Embedding:
    """One image's of a batch's: without the first axis."""
    return jax.tree.map(lambda array: array[index], embeddings)


def _dtype(encoder: Params) -> Any:
    return jax.tree.leaves(encoder)[0].dtype


def dequantized(sam: Sam) -> Sam:
    """The same with float32 parameters: those that its integers stand for, if it has some."""
    return dataclasses.replace(sam, params=jax.jit(dequantize)(sam.params)) if any_quantized(sam.params) else sam


def folded(sam: Sam) -> Sam:
    """The same without what inference need not do: of TinyViT batch norms, of other families itself."""
    fold = getattr(family_of(sam.config.encoder), "for_inference", None)
    if fold is None:
        return sam
    encoder, params = fold(sam.config.encoder, sam.params["image_encoder"])
    config = sam.config.with_encoder(encoder)
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": params})


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode(
    config: Architecture, params: Params, images: jax.Array, sizes: jax.Array, dtype: Any = jnp.float32
) -> Embedding:
    """uint8 images -> embeddings. One compilation per batch size.

    Args:
      params: the whole SAM's, or at least {"image_encoder": ...}; integers are computed with as they say.
      images, sizes: as `preprocess` takes them.

    Returns:
      [b, h, w, C] float32, or a dict of such maps (`embedding_shapes`).
    """
    pixels = preprocess(config, images, sizes)
    # `quantize` has folded batch norms; in folders from before it did, codes are of the weights as they are.
    sam = Sam(config, params) if quantizes_inputs(params) else folded(Sam(config, dequantize(params)))
    apply = lambda encoder, pixels: image_encoder(sam.config, dtype).apply({"params": encoder}, pixels)[0]
    # Where float32 is asked for, accelerators shall not multiply in fewer bits, as they do by default.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        return run_quantized(apply, sam.params["image_encoder"], pixels)


def decode(
    config: Architecture,
    params: Params,
    embedding: Embedding,
    points: jax.Array,
    labels: jax.Array,
    masks=None,
    masked=None,
):
    """Decodes p prompts. One compilation per (p, n), shared by a teacher and its slim models.

    Args:
      embedding: [h, w, C], one image's, or [p, h, w, C], that of each prompt; or a dict of such maps.
      points, labels, masks, masked: as SAM's `PromptEncoder` takes them, from `prompt_points`, whatever the kind of
        head; `inference.decode.check_labels` refuses beforehand what it cannot take.

    Returns:
      masks: [p, 1 + multimask_outputs, 4h, 4w] logits; the original's `multimask_output=False`
        is index 0, `True` the rest. Index 0 of a decoder without a single mask is the best of the rest.
      iou: [p, 1 + multimask_outputs] predicted IoU.
    """
    parts = {name: params[name] for name in ("prompt_encoder", "mask_decoder")}
    outputs = kind_of(config.head).decode(config.head, parts, embedding, points, labels, masks, masked)
    return outputs if config.single_mask else _best_first(*outputs)


def in_training(config: Architecture) -> Architecture:
    """The same without what a decoder does at inference alone: of SAM 2 an unstable mask is not replaced."""
    if not getattr(config.head, "dynamic_multimask", False):
        return config
    return dataclasses.replace(config, head=dataclasses.replace(config.head, dynamic_multimask=False))


def decode_tokens(config: Architecture, params: Params, embedding: jax.Array, points: jax.Array, labels: jax.Array):
    """Decodes p prompts as `decode`, with the transformer's output tokens, of the IoU and of each mask.

    Returns:
      masks, iou and tokens [p, 2 + multimask_outputs, C].
    """
    parts = {name: params[name] for name in ("prompt_encoder", "mask_decoder")}
    masks, iou, tokens = kind_of(config.head).decode_tokens(config.head, parts, embedding, points, labels)
    return (*((masks, iou) if config.single_mask else _best_first(masks, iou)), tokens)


@jax.jit
def _best_first(masks: jax.Array, iou: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[p, m, h, w], [p, m] with the best of 1.. by predicted IoU at 0, the others as they are."""
    best = 1 + iou[:, 1:].argmax(1)[:, None]
    first = jnp.take_along_axis(masks, best[..., None, None], 1), jnp.take_along_axis(iou, best, 1)
    return tuple(jnp.concatenate([own, rest[:, 1:]], 1) for own, rest in zip(first, (masks, iou), strict=True))


def preprocess(config: Architecture, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Normalises a batch in the model frame; padding is zero after normalising, as in the original.

    Args:
      images: [b, H, W, 3] uint8 RGB, or float32 of that range, each in the top left corner of its frame.
      sizes: [b, 2] int, the part of each frame that is image; both as `config.frame.place` gives them.

    Returns:
      [b, H, W, 3] float32.
    """
    height, width = config.image_size
    pixels = (images.astype(jnp.float32) - jnp.array(config.pixel_mean)) / jnp.array(config.pixel_std)
    rows = jnp.arange(height)[:, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, :] < sizes[:, 1, None, None]
    return jnp.where((rows & columns)[..., None], pixels, 0.0)

"""Checks ONNX files: the same image and prompts through JAX and through onnxruntime, compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image

from slimsam_jax.errors import RunError
from slimsam_jax.imaging import overlap
from slimsam_jax.imaging.frames import Whole
from slimsam_jax.imaging.prompts import BOX_TOP_LEFT, prompt_points
from slimsam_jax.imaging.transforms import resized_shape, to_model_frame
from slimsam_jax.inference.ranking import ranking, ranks_by_stability, stability_scores
from slimsam_jax.models import sam as jax_sam
from slimsam_jax.models.heads import kind_of
from slimsam_jax.models.sam import Architecture, Sam
from slimsam_jax.models.sam2_head import LARGEST_LOW_RES

Opened = Callable[[Path], Any]  # what has `run`, as a session of onnxruntime
Outputs = list[tuple[np.ndarray, np.ndarray]]  # (masks, IoU) of each prompt that a layout knows


class Prompt(NamedTuple):
    """One prompt and JAX's outputs.

    Attributes:
      points, labels: [1, n, 2] (x, y) in pixels of the image, [1, n] int32.
      mask: [1, 4h, 4w, 1] logits, or None.
      low: [1, m, 4h, 4w] logits, m = 1 + multimask_outputs.
      iou: [1, m]: what masks are ranked by, see `inference.ranking`.
    """

    points: np.ndarray
    labels: np.ndarray
    mask: np.ndarray | None
    low: np.ndarray
    iou: np.ndarray


class Reference(NamedTuple):
    """JAX's outputs for an image.

    Attributes:
      image: [h0, w0, 3] uint8.
      frame: [H, W, 3], the image in the model frame, and `size`, its (height, width) there.
      maps: {"embedding": [h, w, C]}, and of SAM 2 the finer maps.
      pixels: [1, H, W, 3], the frame normalised.
      prompts: a point, a box, and, unless the model takes no such prompts, the point with a mask.
    """

    config: Architecture
    image: np.ndarray
    frame: np.ndarray
    size: tuple[int, int]
    maps: dict[str, np.ndarray]
    pixels: np.ndarray
    prompts: tuple[Prompt, ...]


class Errors(NamedTuple):
    """The largest differences, each relative to the largest value; and the mean IoU of the masks."""

    embedding: float
    masks: float
    iou: float
    agreement: float


def reference(sam: Sam, image: Image.Image) -> Reference:
    """Asks JAX, in float32: the image's middle as a point, its middle half as a box, the point with its own mask."""
    config, original_size = sam.config, (image.height, image.width)
    frame, size = config.frame.place(image)
    embedding = jax_sam.embedding_of(jax_sam.encode(config, sam.params, frame[None], size[None]), 0)
    pixels = np.asarray(jax_sam.preprocess(config, frame[None], size[None]))
    size = tuple(map(int, size))
    height, width = original_size
    point = prompt_points(np.array([[[width / 2, height / 2]]]), np.ones((1, 1)))
    box = prompt_points(boxes=np.array([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]]))

    def ask(points: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None) -> Prompt:
        placed = config.frame.points(points, size, original_size)
        low, iou = map(np.asarray, jax_sam.decode(config, sam.params, embedding, placed, labels, mask))
        return Prompt(points, labels, mask, low, ranking(sam, low, iou))

    prompts = [ask(*point), ask(*box)]
    if kind_of(config.head).refusal(point[1], masked=True) is None:
        prompts.append(ask(*point, mask=prompts[0].low[:, :1].transpose(0, 2, 3, 1)))
    maps = {name: np.asarray(value) for name, value in maps_of(embedding).items()}
    return Reference(config, np.asarray(image), frame, size, maps, pixels, tuple(prompts))


def maps_of(embedding: jax_sam.Embedding) -> dict[str, np.ndarray]:
    """An embedding, or several maps, by their names."""
    return embedding if isinstance(embedding, dict) else {"embedding": embedding}


MAPS = {"image_embeddings": "embedding", "image_embed": "embedding"}  # what graphs call them
FINER = {f"high_res_feats_{i}": f"high_res_{i}" for i in (0, 1)}
MAPS |= FINER
# What encoders give, by the name of their input: finer maps are SAM 2's alone.
OUTPUTS = dict.fromkeys(("images", "batched_images"), ("image_embeddings", *FINER)) | {"image": (*FINER, "image_embed")}
OUTPUTS["pixel_values"] = ("image_embeddings",)  # and positions behind it


def fitted_points(expected: Reference, prompt: Prompt) -> np.ndarray:
    """The prompt's points as tools made for Segment Anything give them, whatever the model's frame."""
    original_size = expected.image.shape[:2]
    return to_model_frame(prompt.points, resized_shape(original_size, expected.config.image_size), original_size)


def session(model: Path | bytes, kernels: bool = False, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """Opens a model on the CPUs that this process may use; by itself, onnxruntime binds threads to all that there are.

    Its threads sleep while they wait for each other: spinning takes the core from the one that is waited for, where
    others work beside it.

    Args:
      kernels: of integers, for layers whose inputs are quantised; else they compute in float32 what integers stand for.
      optimized: a file to write the graph into that is run.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its warnings are about its own optimisations, and what it logs it also raises
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Integers of weights become floats when a model is opened. By itself, onnxruntime 1.32 would quantise the inputs of
    # their layers as well: a larger error, and twice the time where there is no VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "0" if kernels else "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
        name = f"{optimized.name}_data"  # a graph beyond protobuf's limit is not written otherwise
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def encode(encoder: Path, inputs: dict[str, np.ndarray], opened: Opened = session) -> dict[str, np.ndarray]:
    """What an encoder's graph gives for its one input, by the names of the decoder's inputs."""
    (name,) = inputs
    return dict(zip(OUTPUTS[name], opened(encoder).run(None, inputs), strict=False))


def compare_sam(
    expected: Reference, encoder: Path, decoder: Path, return_single_mask: bool = False, opened: Opened = session
) -> Errors:
    """Measures models of the layout `sam`: masks at low resolution and at the image's own.

    Args:
      opened: what runs a file.
    """
    config, original_size = expected.config, expected.image.shape[:2]
    fitted = expected.frame[: expected.size[0], : expected.size[1]]
    image = expected.image if isinstance(config.frame, Whole) else fitted
    maps = encode(encoder, {"images": image.transpose(2, 0, 1)[None]}, opened)
    run, actual, target = opened(decoder).run, [], []
    for prompt in expected.prompts:
        mask = np.zeros((1, *prompt.low.shape[2:], 1)) if prompt.mask is None else prompt.mask
        inputs = {
            **maps,
            "point_coords": fitted_points(expected, prompt),
            "point_labels": prompt.labels,
            "mask_input": mask.transpose(0, 3, 1, 2),
            "has_mask_input": [prompt.mask is not None],
            "orig_im_size": original_size,
        }
        full, iou, low = run(None, {name: np.asarray(value, np.float32) for name, value in inputs.items()})
        kept = [chosen(prompt)] if return_single_mask else slice(None)
        resized = config.frame.resize_masks(prompt.low[:, kept], expected.size, original_size)
        actual += [(low, iou), (full, iou)]
        wanted = scores(config, prompt.iou[:, kept], low)
        target += [(prompt.low[:, kept], wanted), (resized, wanted)]
    return errors(expected, maps, actual, target)


def chosen(prompt: Prompt) -> int:
    """Returns the output of Meta's `return_single_mask`: the first for more than two points, else the best other."""
    return 0 if prompt.points.shape[1] > 2 else 1 + int(prompt.iou[0, 1:].argmax())


def scores(config: Architecture, iou: np.ndarray, low: np.ndarray) -> np.ndarray:
    """JAX's `iou`; but stability is that of the model's own logits: a pixel more moves that of a small mask by much."""
    return stability_scores(low) if ranks_by_stability(config) else iou


def compare_transformers_js(expected: Reference, encoder: Path, decoder: Path, opened: Opened = session) -> Errors:
    """Measures models of the layout `transformers_js`, which takes no mask prompts."""
    pixels = expected.pixels.transpose(0, 3, 1, 2)
    embedding, positions = opened(encoder).run(None, {"pixel_values": pixels})
    run, actual, target = opened(decoder).run, [], []
    for prompt in expected.prompts:
        if prompt.mask is not None:
            continue
        given = slice(None) if BOX_TOP_LEFT in prompt.labels else slice(-1)  # it appends the "not a point" itself
        inputs = {
            "input_points": fitted_points(expected, prompt)[None, :, given],
            "input_labels": prompt.labels[None, :, given].astype(np.int64),
            "image_embeddings": embedding,
            "image_positional_embeddings": positions,
        }
        iou, masks = run(None, inputs)
        actual.append((masks[0], iou[0]))
        target.append((prompt.low[:, 1:], scores(expected.config, prompt.iou[:, 1:], masks[0])))
    return errors(expected, {"image_embeddings": embedding}, actual, target)


def compare_sam2(
    expected: Reference, encoder: Path, decoder: Path, return_single_mask: bool = False, opened: Opened = session
) -> Errors:
    """Measures models of the layout `sam2`, which gives masks at low resolution within limits."""
    config, original_size = expected.config, expected.image.shape[:2]
    maps = encode(encoder, {"image": expected.pixels.transpose(0, 3, 1, 2)}, opened)
    run, actual, target = opened(decoder).run, [], []
    kept, limit = slice(0, 1) if return_single_mask else slice(1, None), LARGEST_LOW_RES
    for prompt in expected.prompts:
        given = slice(None) if BOX_TOP_LEFT in prompt.labels else slice(-1)  # it appends the "not a point" itself
        mask = np.zeros((1, *prompt.low.shape[2:], 1)) if prompt.mask is None else prompt.mask
        inputs = {
            **maps,
            "point_coords": config.frame.points(prompt.points, expected.size, original_size)[:, given],
            "point_labels": prompt.labels[:, given],
            "mask_input": mask.transpose(0, 3, 1, 2),
            "has_mask_input": [prompt.mask is not None],
        }
        actual.append(run(None, {name: np.asarray(value, np.float32) for name, value in inputs.items()}))
        target.append((prompt.low[:, kept].clip(-limit, limit), prompt.iou[:, kept]))
    return errors(expected, maps, actual, target)


def compare_efficient_sam(expected: Reference, encoder: Path, decoder: Path, opened: Opened = session) -> Errors:
    """Measures models of the layout `efficient_sam`, all prompts at once: each has two points, one perhaps void."""
    original_size = expected.image.shape[:2]
    points, labels = (np.stack([getattr(p, name) for p in expected.prompts], axis=1) for name in ("points", "labels"))
    images = (expected.image.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    maps = encode(encoder, {"batched_images": images}, opened)
    inputs = {
        **maps,
        "batched_point_coords": np.where(labels[..., None] < 0, -1, points).astype(np.float32),  # as JAX places them
        "batched_point_labels": labels.astype(np.float32),
        "orig_im_size": np.array(original_size),
    }
    full, iou, low = opened(decoder).run(None, inputs)
    target = [(prompt.low[:, 1:], prompt.iou[:, 1:]) for prompt in expected.prompts]
    resize = lambda masks: expected.config.frame.resize_masks(masks, expected.size, original_size)
    actual = [(low[i : i + 1], iou[:, i]) for i in range(len(target))]
    actual += [(full[:, i], iou[:, i]) for i in range(len(target))]
    return errors(expected, maps, actual, target + [(resize(masks), scores) for masks, scores in target])


def errors(expected: Reference, maps: dict[str, np.ndarray], actual: Outputs, target: Outputs) -> Errors:
    """Compares all outputs; raises RunError for values that are not finite."""
    pairs = list(zip(actual, target, strict=True))
    channels_last = {MAPS[name]: array.transpose(0, 2, 3, 1) for name, array in maps.items()}
    return Errors(
        max(largest_error(array, expected.maps[name][None]) for name, array in channels_last.items()),
        max(largest_error(f[0], w[0]) for f, w in pairs),
        max(largest_error(f[1], w[1]) for f, w in pairs),
        float(np.mean([overlap.iou(f[0] > 0, w[0] > 0).mean() for f, w in pairs])),
    )


def largest_error(actual: np.ndarray, target: np.ndarray) -> float:
    """Returns the largest difference over the largest value.

    Raises:
      RunError: shapes differ, or a value of `actual` is not finite.
    """
    if actual.shape != target.shape or not np.isfinite(actual).all():
        what = "values that are not finite" if actual.shape == target.shape else f"{actual.shape}, not {target.shape}"
        raise RunError(f"the ONNX model gives {what}")
    return float(np.abs(actual - target).max() / (np.abs(target).max() or 1))  # stability may be 0 of all masks

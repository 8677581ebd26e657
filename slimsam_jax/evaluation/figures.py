"""Draws the figure of an evaluation: scores of one model against another's, and its worst images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimsam_jax.data import Annotation
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError, printable
from slimsam_jax.evaluation.compare import Measured
from slimsam_jax.evaluation.protocols import PROMPTS
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.files import replacing
from slimsam_jax.imaging.draw import draw_masks
from slimsam_jax.imaging.prompts import Prompts, clicks_at, point_grid
from slimsam_jax.inference.decode import decode_prompts, encode_image, original_masks
from slimsam_jax.models.sam import Sam

SHOWN = {"clicks": "iou_1", "everything": "ar_1000"}  # of what is measured by a protocol; else IoU
WORST = 4
MASKS = 6  # drawn per image, the largest


def draw(names: Sequence[str], sams: Sequence[Sam], measured: Measured, protocols: Protocols, out: Path) -> None:
    """Writes a PNG. Above, each image's score by the first protocol; below, the images that lost most, as masks.

    With one model: its scores in order, and its worst images beside their annotations.

    Raises:
      InputError: no protocol scored an image.
    """
    from matplotlib.figure import Figure

    measures = {name: f"{name}/{SHOWN.get(name, 'iou')}" for name in protocols.names}
    known = {key for scores in measured.scores.values() for key in scores[0]}
    scored = [(name, key) for name, key in measures.items() if key in known]
    if not scored:
        raise InputError("there is no score per image to draw: measure by a protocol too, such as box")
    protocol, key = scored[0]
    images = [name for name, scores in measured.scores.items() if key in scores[0]]
    values = np.array([[model[key] for model in measured.scores[name]] for name in images]).T
    figure = Figure(figsize=(13, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 7))
    _scatter(
        above.subplots(1, max(1, len(sams) - 1), squeeze=False)[0],
        names,
        values,
        label="AR@1000" if protocol == "everything" else f"{protocol} IoU",
    )
    loss = (values[:1] - values[1:]) if len(sams) > 1 else 1 - values
    worst = np.argsort(-loss.max(axis=0), kind="stable")[:WORST]
    for column, i in zip(below.subplots(2, len(worst), squeeze=False).T, worst, strict=True):
        image, annotations = read_annotated(measured.samples[images[i]])
        prompts = _prompts(annotations, protocol, protocols, (image.height, image.width))
        shown = [0, int(loss[:, i].argmax()) + 1] if len(sams) > 1 else [0]
        if len(shown) == 1:
            truth = np.stack([annotations[k].mask for k in largest(annotations)])
            _show(column[0], f"{images[i]}: annotations", image, truth)
        for axis, model in zip(column[-len(shown) :], shown, strict=True):
            masks = _masks(sams[model], image, prompts)
            _show(axis, f"{images[i]}: {names[model]}, {values[model, i]:.3f}", image, masks)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _scatter(axes: Sequence[Any], names: Sequence[str], values: np.ndarray, label: str) -> None:
    """Plots scores [models, images] of each further model against the first's."""
    if len(values) == 1:
        axes[0].plot(np.sort(values[0]), ".")
        axes[0].set(xlabel="images, in order", ylabel=f"{label} of {names[0]}")
        return
    for axis, name, other in zip(axes, names[1:], values[1:], strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axis.plot(values[0], other, ".")
        axis.set(xlabel=f"{label} of {names[0]}", ylabel=f"{label} of {name}", aspect="equal")


def _masks(sam: Sam, image: Image.Image, prompts: Prompts) -> np.ndarray:
    encoded = encode_image(sam, image)
    return original_masks(sam, encoded, decode_prompts(sam, encoded, prompts)[0][:, 0])


def _show(axis: Any, title: str, image: Image.Image, masks: np.ndarray) -> None:
    axis.imshow(draw_masks(image, masks))
    axis.set_title(printable(title, 80), fontsize=8, parse_math=False)  # $ is no formula in a file's name
    axis.axis("off")


def _prompts(annotations: Sequence[Annotation], protocol: str, protocols: Protocols, size: tuple[int, int]) -> Prompts:
    """Makes the prompts that the largest objects were measured by; of clicks the first one, and of everything too."""
    if protocol == "agreement":
        return clicks_at(point_grid(size, protocols.grid)[:MASKS, 0])
    prompts = PROMPTS["point-center" if protocol in SHOWN else protocol](annotations, protocols.seed)
    return Prompts(*(array[largest(annotations)] for array in prompts))


def largest(annotations: Sequence[Annotation]) -> np.ndarray:
    """Returns indices of the annotations to draw, small ones last."""
    return np.argsort([-a.mask.sum() for a in annotations], kind="stable")[:MASKS]

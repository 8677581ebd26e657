"""Writes the `README.md` of a Hugging Face folder: what the model is, how to load it, its numbers, its origin."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimsam_jax.errors import reading
from slimsam_jax.files import read_json

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam

RANDOM = "random weights"
REPORT_LIMIT = 8 << 20  # bytes of a report.json, which names every image that was skipped

USE = """import torch
from PIL import Image
from transformers import SamModel, SamProcessor

model, processor = SamModel.from_pretrained("{name}"), SamProcessor.from_pretrained("{name}")
image = Image.open("image.jpg").convert("RGB")
inputs = processor(image, input_points=[[[image.width / 2, image.height / 2]]], return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0]
"""
USE_SAM2 = """import torch
from PIL import Image
from transformers import Sam2Model, Sam2Processor

model, processor = Sam2Model.from_pretrained("{name}"), Sam2Processor.from_pretrained("{name}")
image = Image.open("image.jpg").convert("RGB")
points, labels = [[[[image.width / 2, image.height / 2]]]], [[[1]]]
inputs = processor(images=image, input_points=points, input_labels=labels, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0]
"""

CARD = """---
library_name: transformers
pipeline_tag: mask-generation
tags:
- segment-anything
- sam
- slimsam
- model-compression
---

# {name}

{summary}

## Use it

```python
{use}```

`masks` are three for the point; `outputs.iou_scores` is how good the model thinks they are.

`pipeline("mask-generation", model="{name}")` finds all masks of an image. It needs torchvision as well.
{thresholds}{numbers}
## Where it comes from

{origin}

## Licence

The code, slimsam_jax, is Apache-2.0. {licence} The images that they learned
from have terms of their own.
"""
DERIVED = """The weights derive from those of `{teacher}`
and stay under their licence (Meta's own Segment Anything checkpoints are Apache-2.0)."""
TRAINED = "The weights began as random ones\nand are under the terms that whoever trained them gives."
CONTINUED = """The weights are under the terms that
whoever trained them gives, and stay under those of what their training began with, as said above."""


def text(sam: Sam, original: Sam, name: str, folder: Path) -> str:
    """Writes the card.

    Args:
      sam: what is published.
      original: what it was padded from, or `sam` itself.
      name: of the folder that it is published in.
      folder: where `original` was read from; numbers come from a `report.json` there.

    Raises:
      InputError: the report or the provenance is damaged.
    """
    with reading(f"the provenance of {folder}"):
        parts = {"origin": origin(original.provenance), "licence": licence(original.provenance)}
    from slimsam_jax.models.encoders import name_of

    use = USE_SAM2 if name_of(sam.config.encoder) == "hiera" else USE
    return CARD.format(
        name=name,
        use=use.format(name=name),
        summary=summary(sam, original),
        thresholds=thresholds(sam),
        numbers=numbers(folder, sam, original),
        **parts,
    )


def summary(sam: Sam, original: Sam) -> str:
    """Describes size and frame, and what padding has to do with them."""
    from slimsam_jax.profiling import sam_costs

    macs = lambda model: f"{sam_costs.encoder_macs(model.config).total / 1e9:.2f} G"
    size = lambda model: f"{sam_costs.sam_parameters(model.config) / 1e6:.2f} M"
    side = sam.config.image_size[0]
    words = f"A Segment Anything model for images of {side} x {side} pixels: {size(sam)} parameters, "
    words += f"{macs(sam)}\nmultiply-accumulates in the image encoder."
    if "teacher" in original.provenance:
        words += "\nMade slim with slimsam_jax, a JAX version of [SlimSAM](https://arxiv.org/abs/2312.05284)."
    if sam.config != original.config:
        words += (
            "\nIts blocks differ in width, which `transformers` cannot express, so they are padded with zeros to equal "
            f"ones:\nit gives what the unpadded model of {size(original)} parameters and {macs(original)} gives."
        )
    return words


def thresholds(sam: Sam) -> str:
    """Says how to ask for all masks, as no field of the folder holds the model's thresholds; empty if it has none."""
    if not sam.thresholds:
        return ""
    arguments = ", ".join(f"{name}={value:.3g}" for name, value in sam.thresholds.to_json().items())
    return (
        "\nFor all masks of an image the usual thresholds are SAM-H's. This model has others, which no file here\n"
        "holds; pass them to `transformers`' pipeline, as to `segment_anything`'s `SamAutomaticMaskGenerator`:\n\n"
        f'```\npipeline("mask-generation", model=...)(image, {arguments})\n```\n'
    )


def numbers(folder: Path, sam: Sam, original: Sam) -> str:
    """Writes a section with the table of the run that made `original`; empty without its `report.json` beside it."""
    path = folder / "report.json"
    if not os.path.lexists(path):
        return ""
    report = read_json(path, REPORT_LIMIT)
    with reading(path):
        if report["provenance"] != original.provenance:
            return ""
        return _table(report, "" if sam.config == original.config else ", before padding")


def _table(report: dict[str, Any], when: str) -> str:
    from slimsam_jax.compression.report import ROWS

    lines = ["", "## Numbers", "", "| | teacher | slim |", "|---|---|---|"]
    for key, label, cell in ROWS:
        if key in report["teacher"]:
            lines.append(f"| {label} | {cell(report['teacher'][key])} | {cell(report['slim'][key])} |")
    lines.append(f"| agreement with the teacher's masks | | {100 * report['agreement']:.2f} % |")
    annotated = f"{report['annotated_images']} of them with annotations"
    lines += ["", f"Measured by the run that made it{when}, on {report['images']} images, {annotated}.", ""]
    return "\n".join(lines)


def licence(provenance: dict[str, Any]) -> str:
    """Says whose licence the weights have: by what they were made from."""
    file, own = teacher(provenance), provenance.get("training", provenance)
    if "options" in own and "teacher" not in own:
        if not (own["init"] or own.get("decoder")):
            return TRAINED
        if "history" in provenance:  # its words stand in the place of the file's name
            return CONTINUED
    return DERIVED.format(teacher=file) if file != RANDOM else TRAINED


def origin(provenance: dict[str, Any]) -> str:
    """Lists teacher, images, command and versions, as far as they are known."""
    history, provenance = provenance.get("history"), provenance.get("training", provenance)
    digest = lambda source: f" (sha256 `{source['sha256']}`)" if "sha256" in source else ""
    if "teacher" not in provenance:
        if "options" in provenance:  # a training's, which has a start instead
            part = "" if provenance["init"] or not provenance.get("decoder") else " (prompt encoder and decoder alone)"
            start = history or f"`{teacher(provenance)}`{part}"
            return f"Trained on masks of {provenance['images']['count']} images, from\n{start}."
        return f"Converted from `{teacher(provenance)}`{digest(provenance)}."
    count, versions = provenance["images"]["count"], provenance["versions"].items()
    own = " by steps of its own, otherwise as by" if provenance["options"].get("recipe", "") is None else ""
    return (
        f"Compressed from `{teacher(provenance)}`{digest(provenance['teacher'])} with\n{count} images{own}:\n\n"
        f"```\n{command(provenance['options'])}\n```\n\n"
        f"with {', '.join(f'{name} {version}' for name, version in versions)}."
    )


def teacher(provenance: dict[str, Any]) -> str:
    """Names the file that the weights derive from."""
    provenance = provenance.get("training", provenance)  # of a model that ships, in float16
    if "teacher" in provenance:
        return provenance["teacher"]["file"]
    if "options" in provenance:
        begun = provenance["init"] or provenance.get("decoder")  # a prompt encoder and a mask decoder alone
        return begun["file"] if begun else RANDOM
    return str(provenance.get("source", "an unnamed file"))


def command(options: dict[str, Any]) -> str:
    """Rebuilds the command line of a run. Of paths the last part: how a machine is laid out is nobody's business."""
    from slimsam_jax.compression.options import Options

    usual = {field.name: field.default for field in dataclasses.fields(Options)}
    words = ["python", "-m", "slimsam_jax.compress"]
    for name, value in options.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if name == "cache" or value is None or value == usual.get(name) or not values:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            paths = name in ("teacher", "images", "val")
            words += [_last_part(str(value)) if paths else str(value) for value in values]
    return shlex.join(words)


def _last_part(path: str) -> str:
    """Shortens `tfds:data/prepared` to `tfds:prepared`, `data/images` to `images`."""
    kind, colon, rest = path.rpartition(":")
    return kind + colon + Path(rest).name

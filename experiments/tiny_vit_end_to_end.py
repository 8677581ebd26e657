"""A small TinyViT-SAM from the small SAM to PyTorch: distilled by the embedding alone, pruned by half, distilled.

    python -m experiments.tiny_vit_end_to_end --images TRAIN --val VAL --out FOLDER

Through the public doors: `compress` with a list of steps makes the TinyViT, `compress --recipe taylor` halves it,
`evaluate` measures both beside the small SAM, `to_torch` writes them, and PyTorch's masks are compared with ours.
Stopped, it goes on where it was. Minutes on one core.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import slimsam_jax
from converters import to_torch
from slimsam_jax.compression.steps import Distill, Initialize, Losses, Optimizer, Validation
from slimsam_jax.data import embedded_images, embedded_teacher
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.models.encoders.tiny_vit_config import Config, uniform

# Of 256 pixels, as the small SAM; strides 2, 2, 1 as the original's. Its widths would make it 1024.
DIMS, DEPTHS, HEADS, WINDOWS = (24, 48, 64, 96), (1, 1, 2, 1), (2, 3, 4, 6), (8, 8, 16, 8)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      images: to learn from, as compress takes them; the photographs in the package if none.
      val: to measure on, annotated or not; an eighth of the images if none.
      steps: of 8 images each, for the TinyViT.
      slim_steps: of each of the two distillations after a cut.
      ratio: share of the channels to remove.
    """

    out: Path
    images: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    steps: int = 600
    slim_steps: int = 100
    ratio: float = 0.5
    seed: int = 0


def encoder() -> Config:
    config = uniform(DIMS, DEPTHS, HEADS, WINDOWS, image_size=256)
    *stages, last = config.stages
    return dataclasses.replace(config, stages=(*stages, dataclasses.replace(last, stride=1)))


def compressed(options: Options, name: str, **how) -> Path:
    """The model folder of a run, which is done, continued or begun."""
    out = options.out / name
    if not (out / "report.json").exists():
        shared = {"images": options.images, "val": options.val, "seed": options.seed, "batch": 8, "save_every": 50}
        slimsam_jax.compress(**shared, **how, out=out, resume=out.exists())
    return out


def main(options: Options) -> None:
    once = Validation(validations=2)
    learn = Distill("none", Losses(features=0.0), Optimizer(lr=2e-3), validation=once, batch_norm="recalibrated")
    first = [Initialize(encoder()), learn]
    models = [embedded_teacher(), compressed(options, "tiny", recipe=first, steps=options.steps // 2)]
    how = {"recipe": "taylor", "set": ("distill.validations=1", "distill.lr=auto"), "ratio": options.ratio}
    models.append(compressed(options, "slim", teacher=models[1], **how, steps=options.slim_steps))
    data = options.val or (str(embedded_images()),)
    protocols = ["point", "box", "agreement"] if options.val else ["agreement"]
    result = slimsam_jax.evaluate(models, data, protocols, seed=options.seed).measure_costs()
    result.print_table()
    result.save_json(options.out / "scores.json")
    for model in models[1:]:
        print(model.name, "in PyTorch:", in_pytorch(model))


def in_pytorch(model: Path) -> dict[str, float]:
    """Largest difference of the logits, and IoU of the masks, of the written .pth and ours for one image."""
    from tests.helpers.peers import segment_anything

    path = model / "model.pth"
    sam = slimsam_jax.load(model)
    to_torch.save_sam(sam, path)
    stock = segment_anything()
    from converters import tiny_vit_sam_torch

    image = np.asarray(slimsam_jax.data.read_image(embedded_images() / "dog.jpg"))
    predictor = slimsam_jax.SamPredictor(sam)
    predictor.set_image(image)
    points, labels = np.array([[image.shape[1] // 2, image.shape[0] // 2]]), np.array([1])
    ours, _, low = predictor.predict(points, labels)
    peer = stock.SamPredictor(tiny_vit_sam_torch.load(path))
    peer.set_image(image)
    masks, _, theirs = peer.predict(points, labels)
    return {
        "logits": float(np.abs(low - theirs).max()),
        "iou": float(np.mean([iou(a, b) for a, b in zip(ours, masks, strict=True)])),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))

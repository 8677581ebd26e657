"""What both sides of the benchmark share: what is timed (`Options`), and what a side runs (`Step`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slimsam_jax.compression.steps import Distill
from slimsam_jax.models import config as configs
from slimsam_jax.models.config import Config
from slimsam_jax.models.relative_attention import Form

TEACHERS = {"vit_p50": "vit_b", "vit_p77": "vit_b", "small_p50": "small"}  # of the presets that are slim
STAGES = ("embedding-stage", "bottleneck-stage")


def distillation_of(what: str) -> Distill:
    """Returns the paper's distillation after the cut of that part, at the default's choices."""
    return Distill("bottleneck" if what == "embedding-stage" else "stream+embedding")


class Step(NamedTuple):
    """What one side runs.

    Attributes:
      run: does it once and waits for the end.
      images: that it takes each time.
      peak: the most memory that the device has held so far, in bytes.
      where: the device and the precision.
      outcome: what of a run's result is to be compared with the other side's, as JSON.
    """

    run: Callable[[], object]
    images: int
    peak: Callable[[], int]
    where: str
    outcome: Callable[[Any], Any] = lambda result: None


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
      preset: the architecture, 1024 px; "small" is the embedded teacher's, 256 px. The stages need a slim one.
      images: timed in each turn, at least.
      turns: of each side.
      batch: images per step of distillation, ours; the reference takes one after the other, and updates after four.
        Of data, on both sides.
      attention: how ours computes it (`models/relative_attention.py`).
      cached: the teacher's embeddings come from disk (`--cache`), ours; the reference cannot.
      compile: forward by `torch.compile` in bfloat16, instead of the reference's eager float32.
      onnxruntime: forward by onnxruntime, too, of our own export, in each turn; on a CPU.
      photos: of everything: a folder of images, of which the first `images` are taken; ours if not given.
      side: "jax", "torch" and "onnxruntime" are the turns themselves.
    """

    what: Literal[
        "forward", "importance", "embedding-stage", "bottleneck-stage", "evaluation", "everything", "data"
    ] = "forward"
    preset: Literal["vit_b", "vit_l", "vit_h", "vit_p50", "vit_p77", "small", "small_p50"] = "vit_b"
    images: int = 2
    turns: int = 2
    batch: int = 4
    attention: Form = "auto"
    cached: bool = False
    compile: bool = False
    onnxruntime: bool = False
    photos: Path | None = None
    side: Literal["both", "jax", "torch", "onnxruntime"] = "both"


def architectures(preset: str) -> tuple[Config, Config, Config]:
    """(slim model, the same with only its embedding pruned, teacher) of a preset; three times itself if not slim."""
    slim, teacher = configs.preset(preset), configs.preset(TEACHERS.get(preset, preset))
    return slim, dataclasses.replace(teacher, embed_dim=slim.embed_dim), teacher

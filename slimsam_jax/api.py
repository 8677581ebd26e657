"""What a user of the package calls: `load`, `save`, `compress`, `evaluate`, `predict`. The programs call these, too.

JAX is imported where it is used, so that `--help` and wrong options need not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slimsam_jax.cli.checks import as_path, check_share, is_path, several
from slimsam_jax.compression.options import Options, announce, with_choices
from slimsam_jax.compression.steps import Recipe, Step
from slimsam_jax.evaluation.checks import Protocol, check_choices, check_numbers

if TYPE_CHECKING:
    import numpy as np

    from slimsam_jax.evaluation.run import Evaluation
    from slimsam_jax.inference.fast_sam_predictor import FastPrediction
    from slimsam_jax.inference.fast_sam_prompts import Clip
    from slimsam_jax.inference.predictor import AnyImage, Prediction
    from slimsam_jax.models.fast_sam import FastSam
    from slimsam_jax.models.sam import Sam


def load(
    path: Path | str,
    image_size: int | tuple[int, int] | None = None,
    heads: int | Sequence[int] | None = None,
    single_mask: bool | None = None,
    engine: Literal["jax", "onnxruntime", "auto"] = "jax",
) -> Sam | FastSam:
    """Loads any SAM we can read, float32, with its origin and sha256 in `provenance`.

    Example:
      ```python
      import slimsam_jax

      sam = slimsam_jax.load("sam_vit_b_01ec64.pth")
      print(sam.config.embed_dim, sam.config.image_size)
      ```

    Args:
      path: a `.pth` in `segment_anything` layout (fused qkv, or q, k, v apart as SlimSAM trains it, or a whole pickled
        module) or another family's (docs/export.md), a Hugging Face `SamModel` or `Sam2Model` folder, or one of ours.
      image_size: pixels of the model frame, one side or (height, width), if no array tells it. Default: 1024.
      heads: of the encoder's attention, one number or one a block, if no array tells them (EfficientSAM).
      single_mask: whether the decoder's first mask is for use, which no array tells: TinySAM returns the other three
        alone. Without it the best of them by predicted IoU stands in. Default: not of a TinyViT called tinysam*.
      engine: what computes the image encoder wherever the model predicts; see docs/predict.md.

    Raises:
      InputError: missing, unreadable, or not a SAM; names what is missing and surplus. Or not for the engine.
    """
    from converters import from_torch
    from converters.onnx.engine import engaged

    return engaged(from_torch.load(path, image_size, heads, single_mask), engine)


def save(sam: Sam | FastSam, folder: Path | str) -> None:
    """Writes a model folder, `model.safetensors` and `config.json`; existing files of these names are replaced.

    Example:
      ```python
      import slimsam_jax

      slimsam_jax.save(slimsam_jax.load("sam_vit_b_01ec64.pth"), "sam_b")
      ```

    Raises:
      InputError: not a model.
      OSError, RunError: the folder cannot be written; no partial file is left behind.
    """
    from slimsam_jax import checkpoint

    checkpoint.save(_model(sam), as_path(folder, "folder"))


class Compressed(NamedTuple):
    """A slim model, and how good it is.

    Attributes:
      sam: the model, as it lies in the output folder; a FastSam of a FastSAM.
      report: what `report.json` holds besides the provenance: sizes, times, agreement with the teacher, mIoU.
    """

    sam: Sam
    report: dict[str, Any]


def compress(
    teacher: Path | str | None = None,
    images: Path | str | Sequence[Path | str] = (),
    *,
    val: Path | str | Sequence[Path | str] = (),
    ratio: float | None = None,
    budget: str | None = None,
    recipe: str | Sequence[Step] = "default",
    student: Path | str | None = None,
    set: Sequence[str] = (),
    uniform: bool = False,
    steps: int | None = None,
    batch: int | None = None,
    limit: int | None = None,
    importance_images: int = 100,
    seed: int = 0,
    out: Path | str = "slim",
    resume: bool = False,
    save_every: int = 100,
    accumulate: int = 1,
    fsdp: int = 1,
    attention: Literal["auto", "plain", "rows", "folded"] = "auto",
    cache: Path | str | None = None,
    cache_as: Literal["float16", "int8"] = "float16",
    max_broken: float = 0.1,
    strict: bool = False,
    distributed: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Compressed:
    """Makes a SAM slim with unlabelled images: prunes its image encoder, and distils what is left.

    Example:
      ```python
      import slimsam_jax

      slim, report = slimsam_jax.compress("sam_vit_b_01ec64.pth", "photos", ratio=0.77, out="slim77")
      print(report["agreement"], report["slim"]["parameters"])
      ```

    Args:
      teacher: the SAM or FastSAM to compress, a path as `load` takes it; None for the small SAM in the package.
      images: folders of images, .tar shards, COCO .json files, or "tfds:DIR"; none for the photographs in the package.
      val: what to measure on, of the same kinds; none for an eighth of the images, held out.
      ratio: share of the channels to remove, 0.5 without a `budget`; 0.77 leaves 18 % of the small SAM's encoder.
      budget: instead of that what the slim model may cost: "params=9.1M", "macs=47G" or "latency=120ms".
      recipe: its name, or a list of steps (`compression.steps`).
      student: what a recipe that begins with another encoder distils into: a preset's name, or a model's path.
      set: single choices that differ from the recipe's: "prune.round_to=8".
      out: the folder to write; it must not exist, or be empty, unless `resume` is given.

    All others are those of the command, `compression.options.Options`. It says what it does, as the command.

    Raises:
      InputError: bad options or files; nothing has been written then.
      RunError, OSError: a fault while running, which `resume` continues after. Or, when all is written, too many images
        of `val` could not be measured on.
    """
    fields = dict(locals())
    fields |= {name: tuple(map(str, several(fields[name]))) for name in ("images", "val")}
    fields |= {n: as_path(fields[n], n) for n in ("teacher", "student", "cache") if fields[n] is not None}
    fields |= {"out": as_path(out, "out"), "set": tuple(several(set))}
    own = {} if isinstance(recipe, str) else {"recipe": "default"}
    return compress_with(Options(**fields | own), recipe if own else None)


def compress_with(options: Options, recipe: Recipe | None = None) -> Compressed:
    """`compress` for options in one record, as the command parses them.

    Args:
      recipe: the steps, if not those that the options name; `options.set` changes these, too.
    """
    options, recipe = with_choices(options, recipe)
    options.check()
    if options.distributed:
        from slimsam_jax.sharding import join_processes

        join_processes(options.distributed)
    else:
        announce(options, recipe)
    from slimsam_jax import checkpoint
    from slimsam_jax.compression.dispatch import run
    from slimsam_jax.compression.student import is_path as is_a_model
    from slimsam_jax.data import embedded_teacher

    student = load(options.student) if is_a_model(options.student) else None  # a preset is made later
    report = run(options, load(options.teacher or embedded_teacher()), recipe, student)
    return Compressed(checkpoint.load(options.out), report)


def evaluate(
    models: Sam | Path | str | Sequence[Sam | Path | str],
    data: Path | str | Sequence[Path | str],
    protocols: Protocol | Sequence[Protocol] = (),
    *,
    boxes: Path | str | None = None,
    clicks: int = 10,
    points_per_side: int = 32,
    seed: int = 0,
    resamples: int = 10_000,
    max_broken: float = 0.1,
    strict: bool = False,
    distributed: str | None = None,
    engine: Literal["jax", "onnxruntime", "auto"] = "jax",
) -> Evaluation:
    """Measures SAMs on the same annotated images, and how much they differ from the first.

    Example:
      ```python
      import slimsam_jax

      result = slimsam_jax.evaluate(["sam_vit_b_01ec64.pth", "slim77"], "annotated", ["point", "agreement"])
      print(result.summary["point/iou"][1]["difference_interval"])
      result.save_json("scores.json")
      ```

    Args:
      models: paths as `load` takes them, or models.
      data: folders in SA-1B's layout, .tar shards, a COCO .json, or "tfds:DIR".
      protocols: what a prompt is: "point" (the annotation's own), "point-center", "box", "box-noisy", "clicks",
        "everything", or "agreement" with the first model, which needs no annotations; none for point and box, or with
        `boxes` for none.
      boxes: a detector's boxes as prompts, in COCO's results format: COCO AP.
      clicks, points_per_side: how many, for "clicks"; of the grid, for "everything".
      seed: of the noise on boxes and of the intervals.
      resamples: of the bootstrap, for the intervals.
      max_broken, strict: the share of images that may be unreadable; none may be.
      distributed: as of `compress`: several processes share the images, and all return the same.
      engine: as of `load`, of models that are paths.

    Returns:
      The means with their intervals in `summary`, the scores of each image in `measured`.

    Raises:
      InputError: bad arguments or files, no image to measure on, or clicks for a model that takes no background.
      RunError: too many images are unreadable.
    """
    chosen = [as_path(model, "a model") if is_path(model) else _model(model) for model in several(models)]
    places, boxes = [str(place) for place in several(data)], None if boxes is None else as_path(boxes, "boxes")
    names = tuple(dict.fromkeys(several(protocols))) or (() if boxes else ("point", "box"))
    check_choices(chosen, places, names, boxes)
    check_numbers(clicks, points_per_side, seed, resamples)
    check_share(max_broken)
    if distributed:
        from slimsam_jax.sharding import join_processes

        join_processes(distributed, preemption=False)
    from slimsam_jax.evaluation.run import run
    from slimsam_jax.evaluation.scores import Protocols

    how = Protocols(names, clicks=clicks, points_per_side=points_per_side, seed=seed)
    reading = lambda path: load(path, engine=engine)
    return run(chosen, reading, places, how, boxes, resamples, 0.0 if strict else max_broken)


def predict(
    sam: Sam | FastSam | Path | str,
    image: AnyImage,
    points: np.ndarray | Sequence[Sequence[float]] | None = None,
    labels: np.ndarray | Sequence[int] | None = None,
    box: np.ndarray | Sequence[float] | None = None,
    multimask_output: bool = False,
    text: str | None = None,
    clip: Clip | None = None,
) -> Prediction | FastPrediction:
    """Segments one object of an image. For many prompts on one use `SamPredictor` or `FastSamPredictor`.

    Example:
      ```python
      import slimsam_jax

      slim = slimsam_jax.load("slim77")
      masks, scores, _ = slimsam_jax.predict(slim, "truck.jpg", points=[[500, 375], [90, 80]], labels=[1, 0])
      print(masks.shape, scores)
      ```

    Args:
      sam: the model, or its path.
      image: a path, a PIL image, or [h0, w0, 3] uint8 RGB.
      points: [n, 2] (x, y) in pixels of the image.
      labels: [n], 1 on the object, 0 beside it; all 1 if None.
      box: [4] x0, y0, x1, y1 in pixels.
      multimask_output: three masks of different extent instead of one; of a FastSAM up to three.
      text: instead of points and a box, words for a FastSAM, which `clip`, of `load_clip`, compares with its masks.

    Returns:
      masks [C, h0, w0] bool, their predicted IoU [C] (of an EdgeSAM their stability), their logits [C, 4h, 4w] as
        decoded; C is 1 or 3. Of a FastSAM see `FastPrediction`.

    Raises:
      InputError: no model, no image, no prompt, or one that the model cannot take.
    """
    from slimsam_jax.inference.fast_sam_predictor import check_text, predictor_for
    from slimsam_jax.inference.ranking import how_to_rank

    predictor = predictor_for(load(sam) if is_path(sam) else sam)
    check_text(predictor, text, clip, points, labels, box)
    predictor.set_image(image)
    if text is not None:
        return predictor.text(text, multimask_output)
    return predictor.predict(points, labels, box, multimask_output=multimask_output, **how_to_rank(predictor.model))


def _model(value: Any) -> Sam | FastSam:
    """Raises InputError for what is no model."""
    from slimsam_jax.models.kinds import check_model

    return check_model(value)

"""An evaluation from models and data to a table: what `python -m slimsam_jax.evaluate` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slimsam_jax.checkpoint import sha256
from slimsam_jax.data import find
from slimsam_jax.data.sources import coco
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation import bootstrap, detections, figures, tables
from slimsam_jax.evaluation import costs as costing
from slimsam_jax.evaluation.checks import names_of
from slimsam_jax.evaluation.compare import Measured, measure_models
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.files import write_json
from slimsam_jax.inference.decode import check_labels
from slimsam_jax.inference.engine import name_of
from slimsam_jax.models.sam import Sam


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What models scored on the same images.

    Attributes:
      names: what the models are called.
      summary: {"point/iou": [one dict per model]} with "mean", its 95 % "interval" and the number of "images"; of all
        but the first model also the "difference" to it and "difference_interval". Shares, not per cent.
      measured: the scores of each image, and what could not be read.
      sams: the models.
      paths: where each was loaded from; None of one that was given as it is.
      protocols: how it was measured.
      boxes: a detector's boxes, if there were some.
      resamples: of the bootstrap.
      costs: of each model, if they were measured: see `measure_costs`.
    """

    names: list[str]
    summary: tables.Summary
    measured: Measured
    sams: list[Sam]
    paths: list[Path | None]
    protocols: Protocols
    boxes: Path | None
    resamples: int
    costs: costing.Costs | None = None

    def measure_costs(self) -> Evaluation:
        """With what the models cost on this machine beside what they score: see `costs.measure`."""
        return dataclasses.replace(self, costs=costing.measure(self.sams))

    def print_table(self) -> None:
        """Prints costs and summary, and which images and protocols are not in it."""
        if self.costs:
            costing.print_table(self.names, self.costs)
        for reason in self.measured.skipped.values():
            print(f"skipped: {reason}")
        tables.print_table(self.names, self.summary)
        print(f"{len(self.measured.samples)} images")
        known = {key.partition("/")[0] for key in self.summary}
        if missing := [name for name in self.protocols.names if name not in known]:
            print(f"not measured, as none of the images is annotated: {', '.join(missing)}")

    def save_json(self, path: Path | str) -> None:
        """Writes all numbers, per image too, with the hashes of models and data."""
        models = {
            name: {"path": where and str(where), "sha256": where and sha256(where), "provenance": sam.provenance}
            | ({} if name_of(sam) == "jax" else {"engine": name_of(sam)})
            for name, where, sam in zip(self.names, self.paths, self.sams, strict=True)
        }
        if self.costs:
            models = {name: {**models[name], "costs": cost} for name, cost in zip(self.names, self.costs, strict=True)}
        made_by = {"models": models, "boxes": self.boxes and sha256(self.boxes), "resamples": self.resamples}
        write_json(Path(path), made_by | tables.as_json(self.names, self.measured, self.protocols, self.summary))

    def save_markdown(self, path: Path | str) -> None:
        """Writes the summary as a table, and costs as another."""
        more = f"\n{costing.markdown(self.names, self.costs)}" if self.costs else ""
        tables.write_markdown(Path(path), self.names, self.summary, more)

    def save_figure(self, path: Path | str) -> None:
        """Writes a PNG: each image's score of one model against the first's, and masks of the worst images."""
        figures.draw(self.names, self.sams, self.measured, self.protocols, Path(path))


def run(
    models: Sequence[Sam | Path],
    load: Callable[[Path], Sam],
    data: Sequence[str],
    protocols: Protocols,
    boxes: Path | None,
    resamples: int,
    max_broken: float,
) -> Evaluation:
    """See `api.evaluate`, which checks the arguments first.

    Args:
      load: reads a model.
    """
    samples = find(data)
    detected = detections.read_boxes(boxes) if boxes else None
    truth = detections.read_truth(coco.file_of(data[0]), detected) if boxes else None
    paths = [model if isinstance(model, Path) else None for model in models]
    sams = [load(model) if isinstance(model, Path) else model for model in models]
    check_clicks(names_of(models), sams, protocols)
    measured = measure_models(sams, samples, protocols, detected, max_broken)
    summary = bootstrap.summarise(list(measured.scores.values()), protocols.seed, resamples)
    if boxes:
        ids = [sample.image_id for sample in measured.samples.values()]
        summary |= detections.precisions(truth, list(measured.results.values()), ids, protocols.seed, resamples)
    return Evaluation(names_of(models), summary, measured, sams, paths, protocols, boxes, resamples)


def check_clicks(names: Sequence[str], sams: Sequence[Sam], protocols: Protocols) -> None:
    """Raises InputError, before anything is measured, for models that take no background points if those are asked."""
    if "clicks" not in protocols.names:
        return
    for name, sam in zip(names, sams, strict=True):
        try:
            check_labels(sam, np.array([[1, 0]]))
            check_labels(sam, np.array([[1, 1]]), masked=True)
        except InputError as error:
            raise InputError(f"{name} cannot be measured by --protocol clicks, so leave one out: {error}") from None

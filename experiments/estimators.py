"""How many images an importance estimator needs: the reference's sum of gradients against root mean squares.

    python -m experiments.estimators run --teacher slimsam_jax/assets/sam_small_v2 --images bsds_train --val bsds_val
    python -m experiments.estimators table

For n images: Spearman's rank correlation of the scores from two disjoint sets of n (the mean over
groups), and the embedding's relative error after cutting half of the embedding by them.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from converters.from_torch import load
from experiments import results
from slimsam_jax import cli, data, pruning
from slimsam_jax.compression import gradients as sam_gradients
from slimsam_jax.compression import prune, vit_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import on_devices
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.selection import choose
from slimsam_jax.data.batches import Batches
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam

FILE = results.FOLDER / "estimators.jsonl"
COUNTS = (1, 2, 5, 10, 20, 50, 100)
EMBEDDING = RECIPES["taylor"][0]  # the step that cuts the embedding
ESTIMATORS = {"sum": ("sum", 1), "rms": ("rms", 1), "rms, 4 probes": ("rms", 4)}


def run(
    teacher: Path, images: Path, val: Path, seeds: tuple[int, ...] = (0, 1, 2), counts: tuple[int, ...] = COUNTS
) -> None:
    """Measure what is not measured yet.

    Args:
      teacher: the SAM, called by the name of its file or folder.
      images: folder to take scores from.
      val: folder of which every fourth photograph is measured on.
      seeds: of images and noise.
      counts: images of a set.
    """
    results.check_committed()
    sam, paths = load(teacher), data.find([images])
    judged = [sample.image() for sample in data.find([val])[::4]]
    true = [encode_image(sam, image).embedding for image in judged]
    for seed, name in itertools.product(seeds, ESTIMATORS):
        stream = Batches(paths, sam.config.image_size, 1, seed)
        singles = list(itertools.islice(stream, 2 * max(COUNTS)))
        for count in counts:
            key = {"teacher": teacher.stem, "estimator": name, "images": count, "seed": seed}
            if results.find(FILE, key):
                continue
            halves = singles[:count], singles[-count:]
            grads = [gradients(sam, name, half, 2 * seed + i) for i, half in enumerate(halves)]
            slim = cut(sam, grads[0])
            slim_embeddings = [encode_image(slim, image).embedding for image in judged]
            error = float(np.mean(list(map(relative_error, slim_embeddings, true))))
            numbers = {"rank_correlation": rank_correlations(sam, *grads), "error": error}
            results.append(FILE, key | numbers)
            print(key, numbers, flush=True)


def gradients(sam: Sam, name: str, batches: list[Any], seed: int) -> Any:
    reduce, samples = ESTIMATORS[name]
    step = dataclasses.replace(EMBEDDING, grad_reduction=reduce, noise_samples=samples)
    calibration = lambda _: on_devices(iter(batches), len(batches))
    return jax.device_get(sam_gradients.gradients(sam, step, calibration, seed))


def cut(sam: Sam, grads: Any) -> Sam:
    """Cuts half of the embedding."""
    keep = choose(sam.config, sam.params["image_encoder"], grads, EMBEDDING, Target(0.5))
    return prune.cut(sam, keep, EMBEDDING)


def rank_correlations(sam: Sam, one: Any, other: Any) -> dict[str, float]:
    """Computes rank correlations per kind of group, means over groups."""
    encoder = jax.device_get(sam.params["image_encoder"])
    grouping, means = vit_groups.groups_of(sam.config), {}
    for label, kind in (("embedding", "embedding"), ("attention", "attn"), ("mlp", "mlp")):
        names = vit_groups.of_kind(grouping, kind)
        scores = [pruning.score(encoder, grouping, grads, only=names) for grads in (one, other)]
        means[label] = float(np.mean([spearmanr(scores[0][name], scores[1][name]).statistic for name in names]))
    return means


def table() -> None:
    """Write experiments/tables/estimators.md."""
    lines = [
        "| teacher | images | estimator | rank correlation: embedding | attention | MLP | error at half of it |",
        "|---|---|---|---|---|---|---|",
    ]
    teachers = dict.fromkeys(entry["teacher"] for entry in results.read(FILE))
    for teacher, count, name in itertools.product(teachers, COUNTS, ESTIMATORS):
        runs = results.find(FILE, {"teacher": teacher, "estimator": name, "images": count})
        if runs:
            ranks = [np.mean([r["rank_correlation"][kind] for r in runs]) for kind in ("embedding", "attention", "mlp")]
            errors = [r["error"] for r in runs]
            spread = f"{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})"
            cells = [results.called(teacher), str(count), name, *(f"{rank:.3f}" for rank in ranks), spread]
            lines.append(f"| {' | '.join(cells)} |")
    title, command = "Images that an importance estimator needs", "python -m experiments.estimators table"
    results.write_table("estimators", title, lines, command, "../estimators.md")


if __name__ == "__main__":
    cli.run({"run": run, "table": table})

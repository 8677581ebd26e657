"""The beginning of a compression run: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import __version__, checkpoint, data, sharding
from slimsam_jax.compression import found_groups, widths
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.plan import Planned, check, describe, optimizer_steps, planned
from slimsam_jax.compression.quantize import check_not_quantized
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Augment, Distill, DistillMasks, Initialize, Pretrain, Prune, Recipe
from slimsam_jax.compression.student import begins_anew, resolved, say_if_larger
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.compression.validation import IMAGES, Score, validator
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import annotated
from slimsam_jax.data.reading import map_readable, read_annotated
from slimsam_jax.data.samples import digest_of_names
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.encoders import FAMILIES, family_of, name_of
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.heads import kind_of
from slimsam_jax.models.heads import name_of as name_of_head
from slimsam_jax.models.kinds import check_sam
from slimsam_jax.models.sam import Architecture, Sam
from slimsam_jax.profiling.sam_costs import sam_parameters
from slimsam_jax.progress import say
from slimsam_jax.training.run_folder import RunFolder
from slimsam_jax.training.setup import batch_size, check_batch, compute_dtype, some_of, split_images, too_many_of_val

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options


def prepare(options: Options, teacher: Sam, recipe: Recipe | None = None, student: Sam | None = None) -> Run:
    """Everything that can be refused is refused here, before anything is written."""
    batch, own = batch_size(options), recipe is not None
    recipe = recipe if own else change(RECIPES[options.recipe], options.set)
    named = str(options.student) if options.student else None
    recipe = resolved(recipe, check_sam(student) if student else named, teacher.config)
    target = Target(options.channel_ratio(), Budget.parse(options.budget) if options.budget is not None else None)
    check(recipe)
    check_not_quantized(teacher, "compressed")
    if student:
        check_not_quantized(student, "trained")
    prunes = [step for step in recipe if isinstance(step, Prune)]
    check_combinations(options, recipe, target, own)
    if options.uniform and not teacher.config.uniform:
        raise InputError("--uniform needs a teacher whose blocks are alike, and this one's are not")
    config = check_encoders(recipe, teacher.config)
    images, val = find_images(options, batch)
    if any(step.needs_labels for step in prunes):
        annotated(images)
    if not options.resume:  # a latency may be measured otherwise the second time
        checked = widths.check if name_of(config.encoder) == "vit" else found_groups.check
        checked(config, target, prunes, options.uniform)
    say_bases(config, prunes)
    if begins_anew(recipe) and not prunes and sharding.is_main():
        say_if_larger(sam_parameters(config), sam_parameters(teacher.config))
    return run_of(options, recipe, target, teacher, (images, val), batch, own, validator, student)


def find_images(options: Options, batch: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """What to learn from, and what to measure on; raises InputError if they cannot be used."""
    images, val = split_images(options)
    images = some_of(images, options.limit, options.seed)
    check_batch(options, batch, len(images))
    for paths in (images, val):
        data.check_one_is_readable(paths)
    _, broken = map_readable(lambda sample: read_annotated(sample) and None, val[:IMAGES])  # as validation will
    if complaint := too_many_of_val(options, images, val, broken):
        raise InputError(complaint)
    return images, val


def run_of(
    options: Options,
    recipe: Recipe,
    target: Target,
    teacher: Sam | FastSam,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    batch: int,
    own: bool,
    judge: Callable[[Any, Sequence[Sample], str, dict[str, str]], Score],
    student: Sam | None = None,
) -> Run:
    """A run of steps that have been checked; its folder is there then.

    Args:
      samples: to learn from, and to measure on.
      own: the recipe is none that the options name.
      judge: (teacher, samples, `Validation.validate_by`, `Run.unread`) -> a function that scores students.
      student: to begin with, if --student is a model's path.
    """
    images, val = samples
    counts = optimizer_steps(recipe, len(images), batch, options.steps)
    dtype, plan = compute_dtype(options), planned(recipe, counts)
    if sharding.is_main():
        announce(dtype, plan, batch, len(images), len(val))
    origin = provenance(options, recipe, teacher, samples, counts, batch, own)
    if student:
        origin["student"] = {"file": options.student.name, "sha256": checkpoint.sha256(options.student)}
    where = (options.cache, teacher, origin["teacher"]["sha256"], options.cache_as)
    cache = TeacherCache(*where) if options.cache else None
    judged = [each.step for each in plan if each.optimizer_steps and not isinstance(each.step, Pretrain)]
    measures = {step.validation.validate_by for step in judged} if sharding.is_main() else set()
    unread: dict[str, str] = {}
    scores = {measure: judge(teacher, val, measure, unread) for measure in measures}
    folder = RunFolder(options.out, origin, options.resume)
    return Run(
        options, plan, target, teacher, images, val, batch, dtype, cache, scores, folder, origin, student, unread
    )


def say_bases(config: Architecture, prunes: Sequence[Prune]) -> None:
    """What of a family is projected, and how channels are chosen elsewhere; of SAM's ViT all is, but for MLPs."""
    where = getattr(family_of(config.encoder), "ROTATES", "")
    if where and any(step.criterion == "projection" for step in prunes) and sharding.is_main():
        say("bases", f"of {where}")


def announce(dtype: Any, plan: Sequence[Planned], batch: int, images: int, val: int) -> None:
    """What `options.announce` could not know yet."""
    say("device", f"{sharding.device_count()} x {sharding.devices()[0].device_kind}, {jnp.dtype(dtype).name}")
    done = ", ".join(
        each.name + (f" ({each.optimizer_steps} steps of {batch} images)" if each.optimizer_steps else "")
        for each in plan
    )
    say("steps", f"{done}; {images} images to learn from, {val} to measure on")


def check_encoders(recipe: Recipe, config: Architecture) -> Architecture:
    """Raises InputError for a step that is not of the encoder which is there when its turn comes.

    Returns:
      The architecture of the student, but for its widths.
    """
    another = False  # encoder than that whose features a distillation could compare
    for step in recipe:
        if isinstance(step, Initialize) and step.encoder is not None:
            try:
                name_of(step.encoder)
                config, another = with_encoder(config, step.encoder), True
            except ValueError as error:
                raise InputError(f"the encoder to initialize does not fit the teacher: {error}") from None
        another = another and not isinstance(step, Prune)
        if isinstance(step, Distill):
            check_distill(step, config, another)
        if isinstance(step, DistillMasks):
            check_prompts(step, config.head)
        if isinstance(step, Pretrain) and not getattr(family_of(config.encoder), "LEAVES_OUT", False):
            families = ", ".join(name for name, family in FAMILIES.items() if getattr(family, "LEAVES_OUT", False))
            raise InputError(f"a {name_of(config.encoder)} cannot leave patches out; pre-training is for {families}")
    return config


def check_distill(step: Distill, config: Architecture, another: bool) -> None:
    """Raises InputError for a distillation that the encoder is not made for.

    Args:
      another: it is another one than the model's before the last cut.
    """
    family = name_of(config.encoder)
    if another and step.align != "none":
        raise InputError("another encoder has no features like the teacher's: Distill(align='none')")
    if step.batch_norm == "recalibrated" and not getattr(config.encoder, "batch_norm", False):
        raise InputError(f"this {family} has no batch norms to recalibrate: leave distill.batch_norm out")
    if not step.losses.padding and getattr(config.head, "MAPS", 1) > 1:
        raise InputError(f"padding=False is for embeddings of one map, and a {family} gives several")


def check_prompts(step: DistillMasks, head: Any) -> None:
    """Raises InputError for prompts in the loop that the teacher's head cannot take."""
    if not hasattr(kind_of(head), "decode_tokens"):
        raise InputError(f"prompts in the loop are not for {name_of_head(head)}, whose embedding has several maps")
    prompting = step.prompting
    clicks = np.zeros((1, prompting.rounds - 1), np.int32) + (prompting.click == "missed")
    for first in ((1, NOT_A_POINT), (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)):
        if reason := kind_of(head).refusal(np.concatenate([[first], clicks], axis=1), False):
            raise InputError(
                f"{reason} (--set masks.click=missed gives foreground clicks alone, masks.rounds=2 fewer of them)"
            )


def check_combinations(options: Options, recipe: Recipe, target: Target, own: bool = False) -> None:
    """Raises InputError for choices that do not go together; `own` is a recipe that the options do not name."""
    prunes = [step for step in recipe if isinstance(step, Prune)]
    parts = [step.part for step in prunes]
    if not prunes and (options.ratio is not None or target.budget):
        raise InputError("this recipe cuts nothing: leave --ratio and --budget out; --student says how small it gets")
    shares = [step for step in prunes if step.ratio is not None]  # lists of steps share out a --ratio
    if shares and (target.budget or (options.ratio is not None and not own)):
        raise InputError("prune.ratio and --ratio or --budget both say how much to cut; give one of them")
    if "all" in parts:
        raise InputError("a cut of all parts is of a FastSAM; a SAM is cut by its embedding, or by its bottleneck")
    for step in prunes:
        if target.budget and step.normalizer == "gaussian" and step.criterion != "projection":
            raise InputError("--budget needs scores that are not negative; add --set prune.normalizer=none")
        if step.head_channels == "whole" and (options.uniform or target.budget):
            raise InputError(
                "head_channels whole goes neither with --uniform nor with --budget: they fix the number of heads"
            )
    if target.budget and len(set(parts)) < len(parts):
        raise InputError("a --budget is met in one cut of each part; several cuts in a row share out a --ratio")
    if target.budget and target.budget.kind == "latency" and jax.process_count() > 1:
        raise InputError("--budget latency is measured by one process; give params= or macs=, or no --distributed")
    if options.cache and any(getattr(step, "augment", Augment()) != Augment() for step in recipe):
        raise InputError("--cache holds the teacher's embeddings of whole images; it goes with neither flip nor crop")


def provenance(
    options: Options,
    recipe: Recipe,
    teacher: Sam | FastSam,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    counts: list[int],
    batch: int,
    own: bool,
) -> dict[str, Any]:
    """Where a slim model comes from, for its config.json; a resumed run must agree in all of it.

    Args:
      samples: to learn from, and to measure on.
      own: the recipe is none that the options name.
    """
    path = Path(options.teacher or data.embedded_teacher())
    packages = ("jax", "flax", "optax", "numpy")
    # They decide the masks of everything mode, and may be changed by hand.
    thresholds = teacher.thresholds.to_json() if teacher.thresholds else "none"
    computed = {"batch": batch, "dtype": jnp.dtype(compute_dtype(options)).name}  # whatever "auto" was
    same = {"sha256": checkpoint.sha256(path), "thresholds": thresholds, "provenance": teacher.provenance}
    return {
        "teacher": {"file": path.name, **same},
        "images": named(samples[0]),
        "val": named(samples[1]),
        "options": {**options.fixing_the_result(), **computed, "recipe": None if own else options.recipe},
        "recipe": describe(recipe),
        "optimizer_steps": counts,
        "versions": {"slimsam_jax": __version__, **{name: version(name) for name in packages}},
    }


def named(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many samples there are, and a hash of their names."""
    return {"count": len(samples), "sha256_of_names": digest_of_names(samples)}

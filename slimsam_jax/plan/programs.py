"""Lists the compiled programs that a compression consists of: its own functions, on shapes in place of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import mask_distill, pretrain, prune, trainer, widths
from slimsam_jax.compression.budget import Target, group_costs
from slimsam_jax.compression.calibration_images import batches_of
from slimsam_jax.compression.gradients import of_an_image
from slimsam_jax.compression.loss_terms import terms
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.projection import statistics
from slimsam_jax.compression.steps import Distill, DistillMasks, Initialize, Pretrain, Prune, Quantize
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import family_of, name_of
from slimsam_jax.models.relative_attention import Form
from slimsam_jax.models.sam import Architecture, Sam, abstract_params, encode
from slimsam_jax.plan.hardware import Precision
from slimsam_jax.profiling import sam_costs
from slimsam_jax.pruning.gradients import accumulator

Shape = jax.ShapeDtypeStruct
SEEN = Shape((), jnp.int32)  # images before a batch


class How(NamedTuple):
    """What the programs of a run depend on, besides its steps.

    Attributes:
      batch: images of an optimizer step, over all devices.
      dtype, parts, fsdp, attention: see `compression.trainer.make_trainer`.
      calibration: images that importance is estimated from.
      cached: the teacher's embeddings come with the batches.
      uniform: all blocks are cut alike.
    """

    batch: int
    dtype: Any
    parts: int
    fsdp: int
    attention: Form
    calibration: int
    cached: bool = False
    uniform: bool = False


class Program(NamedTuple):
    """A program, and how often a run calls it.

    Attributes:
      name: "distill", or "prune-bottleneck: statistics of heads".
      kind: "prune", "distill", "evaluate" or "encode".
      function: jitted.
      args: shapes, placed on the devices, and what is static.
      images: in a call.
      calls: in the whole run.
      resident: bytes on a device that the run keeps besides the arguments: the models it has loaded.
      precision: of nearly all its products.
    """

    name: str
    kind: str
    function: Any
    args: tuple[Any, ...]
    images: int
    calls: int
    resident: int = 0
    precision: Precision = "bfloat16"


def programs(
    plan: Sequence[Planned], config: Architecture, target: Target, how: How, only: Collection[str] = ()
) -> Iterator[Program]:
    """Yields the programs of a run in its order, of a teacher of this architecture.

    Cuts leave every block the same share, as nothing is known of the channels; a real cut's blocks differ.

    Args:
      only: kinds of programs; all if there are none.

    Raises:
      InputError: a program of these kinds cannot be planned, such as a distillation of integers.
    """
    wanted = lambda kind: not only or kind in only
    check_distillations(plan, only)
    teacher = student = previous = abstract(config)
    for planned in plan:
        step = planned.step
        if isinstance(step, Prune):
            slim = abstract(cut(student.config, step, widths.target_of(step, target), how.uniform))
            yield from _pruning(planned, student, slim, teacher, how) if wanted("prune") else ()
            previous, student = student, slim
        elif isinstance(step, Initialize):
            if step.encoder is not None:
                student = abstract(with_encoder(student.config, step.encoder))
        elif trains(planned) and wanted("distill"):
            yield from _training(planned, student, previous, teacher, how)
    models = {"teacher": teacher} | ({"slim model": student} if student is not teacher else {})
    for kind, dtype in (("evaluate", jnp.float32), ("encode", how.dtype)):
        for name, sam in models.items() if wanted(kind) else ():
            yield _encoding(f"{kind}: the {name}", kind, sam, dtype)


def check_distillations(plan: Sequence[Planned], only: Collection[str] = ()) -> None:
    """Raises InputError if one is wanted that cannot be planned, before anything is compiled."""
    integers = False
    for planned in plan:
        integers |= isinstance(planned.step, Quantize)
        if integers and trains(planned) and (not only or "distill" in only):
            raise InputError(f"{planned.name}, beside integers, is not planned: take --recipe default")


def trains(planned: Planned) -> bool:
    """Whether a step consists of optimizer steps that can be planned."""
    return not isinstance(planned.step, Prune | Initialize | Quantize) and planned.optimizer_steps > 0


def abstract(config: Architecture) -> Sam:
    """A SAM whose parameters are shapes."""
    return Sam(config, abstract_params(config))


def cut(config: Architecture, step: Prune, target: Target, uniform: bool = False) -> Architecture:
    """The architecture after a step, with the widths that it chooses where all blocks' channels gain alike.

    Raises:
      InputError: it is no ViT of SAM's, whose widths after a cut can be said beforehand.
    """
    if name_of(config.encoder) != "vit":
        raise InputError(f"a cut of a {name_of(config.encoder)} is not planned: its widths come out of its channels")
    if step.quirks.rounded_selection:
        return _cut_as_reference(config, step.part, target.channel_ratio(config))
    if step.part == "embedding":
        return dataclasses.replace(config, embed_dim=widths.embedding_width(config, target, step))
    kind = target.budget.kind if target.budget else step.allocation
    prices = group_costs(config, kind if kind in ("params", "macs") else "macs")
    # A gain per cost that falls alike from each block's first channel to its last: all keep the same share.
    gains = {name: table[1] * (1 - np.arange(len(table) - 1) / (len(table) - 1)) for name, table in prices.items()}
    return widths.with_widths(config, widths.bottleneck_widths(config, gains, target, step, uniform))


def _cut_as_reference(config: Config, part: str, ratio: float) -> Config:
    """SlimSAM's widths: rounded down, of the embedding and MLPs to a multiple of the heads."""
    heads = config.blocks[0].heads
    width = lambda size, unit: unit * int(size * (1 - ratio) / unit)
    if part == "embedding":
        return dataclasses.replace(config, embed_dim=width(config.embed_dim, heads))
    cut = lambda b: dataclasses.replace(b, head_dim=width(b.head_dim, 1), mlp_dim=width(b.mlp_dim, heads))
    return dataclasses.replace(config, blocks=tuple(map(cut, config.blocks)))


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def held(*sams: Sam) -> int:
    """Bytes of the models that a run has loaded, in float32, each once: on its first device, besides what is placed."""
    return sum(size(sam.params) for sam in {id(sam): sam for sam in sams}.values())


def _images(count: int, config: Architecture) -> dict[str, Shape]:
    frame = Shape((count, *config.image_size, 3), jnp.uint8)
    return {"image": frame, "size": Shape((count, 2), jnp.int32)}


def _seeds(count: int) -> dict[str, Shape]:
    """Of what is drawn for each image."""
    return {"seed": Shape((count,), jnp.uint32)}


# -------------------------------------------------------------------------------------------------- prune


def _pruning(planned: Planned, student: Sam, slim: Sam, teacher: Sam, how: How) -> Iterator[Program]:
    step, devices = planned.step, sharding.device_count()
    calls, mesh = batches_of(how.calibration, devices), sharding.make_mesh()
    batch = sharding.shard_batch(_images(devices, student.config) | _seeds(devices), mesh)
    key, kept = jax.eval_shape(lambda: jax.random.key(0)), held(student, teacher)
    named = lambda what: f"{planned.name}: {what}"
    precision = "exact" if step.criterion == "projection" else "float32"  # moments ask for it, gradients do not
    make = lambda what, function, *args: Program(named(what), "prune", function, args, devices, calls, kept, precision)
    if step.criterion != "projection":
        if step.reads_gradients:
            yield make("importance", *_importance(student, step, batch, key, mesh))
        return
    if step.part == "embedding":
        yield make("statistics of the stream", *_statistics(student, ("stream",), batch, key, mesh))
        return
    yield make("statistics of heads", *_statistics(student, prune.parts_of(step), batch, key, mesh))
    if sam_costs.encoder_macs(student.config).total >= prune.MASKED_BELOW:  # else by the same program
        blocks = zip(student.config.blocks, slim.config.blocks, strict=True)
        heads = tuple(dataclasses.replace(block, head_dim=narrow.head_dim) for block, narrow in blocks)
        narrow = abstract(dataclasses.replace(student.config, blocks=heads))
        yield make("statistics of MLPs", *_statistics(narrow, prune.parts_of(step)[1:], batch, key, mesh))


def _importance(sam: Sam, step: Prune, batch: Any, key: Any, mesh: Any) -> tuple[Any, ...]:
    if step.needs_labels:
        raise InputError("importance by the loss of masks is not planned; the other steps are, with --only distill")
    encoder = sharding.replicate(sam.params["image_encoder"], mesh)
    add = accumulator(of_an_image(sam, step, 0), step.grad_reduction, mesh)
    return add, encoder, encoder, batch, key, SEEN


def _statistics(sam: Sam, parts: tuple[str, ...], batch: Any, key: Any, mesh: Any) -> tuple[Any, ...]:
    found, add = statistics.programs(prune.statistic_of(sam.config, parts, mesh))
    encoder = sharding.replicate(sam.params["image_encoder"], mesh)
    total = sharding.replicate(jax.eval_shape(found, encoder, batch, key, SEEN), mesh)
    return add, total, encoder, batch, key, SEEN


# -------------------------------------------------------------------------------------------------- train


def _training(planned: Planned, student: Sam, previous: Sam, teacher: Sam, how: How) -> Iterator[Program]:
    make = {Distill: _distill, DistillMasks: _distill_masks, Pretrain: _pretrain}[type(planned.step)]
    made, batch, weights = make(planned, student, previous, teacher, how)
    batch = sharding.shard_batch(batch, made.mesh)
    weights = {name: Shape((), jnp.float32) for name in weights}
    args = (made.state, made.frozen, batch, weights, Shape((), jnp.float32))
    calls, kept, precision = planned.optimizer_steps, held(student, previous, teacher), jnp.dtype(how.dtype).name
    yield Program(planned.name, "distill", made.step, args, how.batch, calls, kept, precision)


def _how(how: How) -> tuple[Any, ...]:
    return how.dtype, how.parts, how.fsdp, how.attention


def _embeddings(how: How, config: Architecture) -> dict[str, Any]:
    """Those of the teacher, if they come with the batch."""
    return {"embedding": Shape((how.batch, *config.grid, config.out_chans), jnp.float32)} if how.cached else {}


def _distill(planned: Planned, student: Sam, previous: Sam, teacher: Sam, how: How) -> tuple[Any, Any, Any]:
    step, config = planned.step, teacher.config
    made = trainer.make_trainer(student, previous, teacher, step, *_how(how))
    batch = _images(how.batch, config) | _embeddings(how, config)
    if step.losses.masks:
        batch["points"] = Shape((how.batch, step.losses.points, 2, 2), jnp.float32)
        batch["labels"] = Shape((how.batch, step.losses.points, 2), jnp.int32)
    # The terms of the first step, of which later ones are some.
    return made, batch, terms(step, 0, planned.optimizer_steps, family_of(student.config.encoder).FEATURES)


def _distill_masks(planned: Planned, student: Sam, previous: Sam, teacher: Sam, how: How) -> tuple[Any, Any, Any]:
    step, config = planned.step, teacher.config
    made = mask_distill.make_trainer(student, teacher, step, *_how(how), how.cached)
    each = (how.batch, step.prompting.prompts)
    prompts = {"points": Shape((*each, 2, 2), jnp.float32), "labels": Shape((*each, 2), jnp.int32)}
    masks = Shape((*each, *(4 * side for side in config.grid)), jnp.float32)
    more = {"masks": masks} | _seeds(how.batch)
    return made, _images(how.batch, config) | prompts | more | _embeddings(how, config), step.losses.weights()


def _pretrain(planned: Planned, student: Sam, previous: Sam, teacher: Sam, how: How) -> tuple[Any, Any, Any]:
    made = pretrain.make_trainer(student, teacher, planned.step, how.dtype, how.parts, how.fsdp, how.cached)
    batch = _images(how.batch, teacher.config) | _seeds(how.batch)
    return made, batch | _embeddings(how, teacher.config), ["embedding"]


# -------------------------------------------------------------------------------------------------- encode


def _encoding(name: str, kind: str, sam: Sam, dtype: Any) -> Program:
    """The encoder alone, an image on one device, as validation and the predictor call it (in float32)."""
    mesh = sharding.make_mesh(devices=sharding.devices()[:1])
    encoder, batch = sharding.replicate((sam.params["image_encoder"], _images(1, sam.config)), mesh)
    args = (sam.config, {"image_encoder": encoder}, batch["image"], batch["size"], dtype)
    precision = "exact" if dtype == jnp.float32 else "bfloat16"  # as `encode` asks for it
    return Program(name, kind, encode, args, 1, 0, precision=precision)

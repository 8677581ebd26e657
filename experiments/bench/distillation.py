"""Images per second and peak memory of a training step of `--recipe mobile_sam`, ours against a plain PyTorch loop.

    python -m experiments.bench.distillation --student vit_t --batch 2
    python -m experiments.bench.distillation --student efficient_sam_ti --teacher vit_b

Both sides take the squared error of the embedding relative to its variance, and Adam; batch norms keep their
statistics. The teacher's embeddings come from a cache, or from its encoder beside the student's (`--teacher`). Weights
and images are random, which changes no time. PyTorch's side is `distillation_original.py`; turns are those of
`experiments.bench.families`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Literal

import tyro

from experiments.bench import turns
from experiments.bench.options import Step


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
      teacher: whose embeddings are learned; "cached" are there already.
      batch: images per step, of both sides.
      images: timed in each turn, at least.
      turns: of each side.
      image_size: side in pixels; the published models' is 1024.
      side: "jax" and "torch" are the turns themselves.
    """

    student: Literal["vit_t", "efficient_sam_ti", "rep_vit_m1"] = "vit_t"
    teacher: Literal["cached", "vit_b"] = "cached"
    batch: int = 2
    images: int = 8
    turns: int = 3
    image_size: int = 1024
    side: Literal["both", "jax", "torch"] = "both"


def main(options: Options) -> None:
    turns.take(options, make_step, compare)


def make_step(options: Options) -> Step:
    if options.side == "torch":  # PyTorch and JAX in one process would share its threads and its memory
        from experiments.bench import distillation_original

        return distillation_original.make_step(options)
    import jax
    import jax.numpy as jnp

    from slimsam_jax.profiling.memory import peak_memory

    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16  # what --dtype auto is
    device = f"{len(os.sched_getaffinity(0))} cores" if on_cpu else jax.devices()[0].device_kind
    return Step(our_step(options, dtype), options.batch, peak_memory, f"{device}, {jnp.dtype(dtype).name}")


def our_step(options: Options, dtype):
    """What `compress` runs for each batch, from the host's arrays to the new parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.bench.ours import images, random_model
    from slimsam_jax import sharding
    from slimsam_jax.compression.recipes.mobile_sam import EMBEDDING
    from slimsam_jax.compression.trainer import make_trainer
    from slimsam_jax.models import config as configs
    from slimsam_jax.models.composed import with_encoder
    from slimsam_jax.models.encoders import presets
    from slimsam_jax.models.sam import Sam, image_encoder

    cached = options.teacher == "cached"
    size = (options.image_size,) * 2
    of_teacher = dataclasses.replace(configs.preset("vit_b"), image_size=size)
    config = with_encoder(of_teacher, presets.encoder(options.student, of_teacher))
    first = jax.jit(functools.partial(image_encoder(config).init, jax.random.key(0)))
    student = Sam(config, {"image_encoder": first(jnp.zeros((1, *size, 3)))["params"]})
    teacher = Sam(of_teacher, {}) if cached else random_model(of_teacher, 0)
    trainer = make_trainer(student, teacher, teacher, EMBEDDING, dtype, known=cached)
    batch, state = images(of_teacher, options.batch), trainer.state
    if cached:
        shape = (options.batch, 1, *of_teacher.grid, of_teacher.out_chans)
        batch["targets"] = {"embedding": np.random.default_rng(1).standard_normal(shape).astype(np.float16)}

    def run() -> float:
        nonlocal state
        on_device = sharding.shard_batch(batch, trainer.mesh)
        state, terms = trainer.step(state, trainer.frozen, on_device, {"embedding": 1.0}, 1e-4)
        return float(jax.block_until_ready((state, terms))[1]["loss"])

    return run


def compare(options: Options) -> None:
    ours, theirs = turns.taken("experiments.bench.distillation", options)
    what = f"mobile_sam's step, {options.student}, {options.teacher}, batch {options.batch}, {options.image_size} px"
    print(turns.summary(what, ours, theirs))


if __name__ == "__main__":
    main(tyro.cli(Options))

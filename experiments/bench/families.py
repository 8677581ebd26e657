"""Images per second and peak memory of other families' image encoders, ours against PyTorch modules, taking turns.

    python -m experiments.bench.families --preset vit_t
    python -m experiments.bench.families --preset efficient_sam_ti
    python -m experiments.bench.families --preset rep_vit_m1

The originals are no packages; PyTorch's side is modules of their shape and names (`families_original.py`), which
the golden vectors of the originals agree with. Weights are random, which changes no time. Ours folds batch norms into
convolutions, as `SamPredictor` does; PyTorch's keeps them, as MobileSAM and EdgeSAM do, unless `--fused`.

Every turn is a process of its own, as in `bench.py`, and compilation and the first image are not counted.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

import tyro

from experiments.bench import turns
from experiments.bench.options import Step


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
      images: timed in each turn.
      turns: of each side.
      image_size: side in pixels; the published models' is 1024.
      fused: PyTorch's batch norms are multiplied into its convolutions, too.
      side: "jax" and "torch" are the turns themselves.
    """

    preset: Literal["vit_t", "efficient_sam_ti", "efficient_sam_s", "rep_vit_m1"] = "vit_t"
    images: int = 5
    turns: int = 5
    image_size: int = 1024
    fused: bool = False
    side: Literal["both", "jax", "torch"] = "both"


def main(options: Options) -> None:
    turns.take(options, make_step, compare)


def make_step(options: Options) -> Step:
    if options.side == "torch":  # PyTorch and JAX in one process would share its threads and its memory
        from experiments.bench import families_original

        return families_original.make_step(options)
    import jax
    import numpy as np

    from slimsam_jax.profiling.memory import peak_memory

    module, params = our_encoder(options)
    image = np.random.default_rng(0).standard_normal((1, *module.config.image_size, 3)).astype(np.float32)

    @jax.jit
    def embed(params, image):
        with jax.default_matmul_precision("highest"):  # as `sam.encode` has it
            return module.apply({"params": params}, image)[0]

    cores = len(os.sched_getaffinity(0))
    device = f"{cores} cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return Step(lambda: jax.block_until_ready(embed(params, image)), 1, peak_memory, f"{device}, fp32")


def our_encoder(options: Options):
    """The Flax module that inference runs, and random parameters for it."""
    import jax
    import jax.numpy as jnp

    family = family_of(options.preset)
    config = dataclasses.replace(family.PRESETS[options.preset], image_size=(options.image_size,) * 2)
    images = jnp.zeros((1, *config.image_size, 3))
    params = jax.jit(family.ImageEncoder(config).init)(jax.random.key(0), images)["params"]
    if hasattr(family, "for_inference"):
        config, params = family.for_inference(config, params)
    return family.ImageEncoder(config), jax.device_put(jax.device_get(params))


def family_of(preset: str):
    """The module of the family that has the preset."""
    from slimsam_jax.models.encoders import FAMILIES

    return next(family for family in FAMILIES.values() if preset in getattr(family, "PRESETS", ()))


def compare(options: Options) -> None:
    ours, theirs = turns.taken("experiments.bench.families", options)
    print(turns.summary(f"forward, {options.preset}, {options.image_size} px", ours, theirs))


if __name__ == "__main__":
    main(tyro.cli(Options))

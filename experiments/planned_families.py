"""Plans one image through each family on an H100 that is not here: a column of tables/families.md.

    pip install -e '.[plan-gpu]'
    python -m experiments.planned_families
    python -m experiments.families table

The program is the one that the predictor calls, at 1024 px in bfloat16, as `slimsam plan --only encode` compiles it; of
FastSAM the whole network. No weights are made, and nothing runs. What is planned is not planned again.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from experiments import families, results
from slimsam_jax import cli, sharding
from slimsam_jax.compression.budget import Target
from slimsam_jax.errors import RunError
from slimsam_jax.models import fast_sam
from slimsam_jax.plan.__main__ import ENVIRONMENT
from slimsam_jax.plan.hardware import Hardware, compiled_elsewhere, named
from slimsam_jax.plan.measure import measure
from slimsam_jax.plan.programs import How, Program, programs

ON = "h100"
HOW = How(batch=1, dtype=jnp.bfloat16, parts=1, fsdp=1, attention="auto", calibration=8)


def run() -> None:
    """Plan the families that have no row yet."""
    os.environ.update(ENVIRONMENT)  # the plug-in reads it, too
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
    results.check_committed()
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there says nothing of its memory
    hardware = named(ON)
    with sharding.targeting(hardware.devices), compiled_elsewhere(hardware):
        for name, config in families.CONFIGS.items():
            if not results.find(families.PLANNED, {"model": name, "on": ON}):
                entry = {"model": name, "on": ON, **planned(config(), hardware)}
                results.append(families.PLANNED, entry)
                print(entry, flush=True)


def planned(config: Any, hardware: Hardware) -> dict[str, Any]:
    """Compiles a model's program; raises RunError if the compiler failed or did not say its memory."""
    needs = measure(program_of(config), hardware)
    if needs.problem or needs.peak is None:
        raise RunError(f"not compiled: {needs.problem}")
    return {name: getattr(needs, name) for name in ("peak", "temporaries", "flops", "flash")}


def program_of(config: Any) -> Program:
    """The program that answers for one image, on shapes placed on the first device."""
    if not isinstance(config, fast_sam.Config):
        return next(programs((), config, Target(0.5), HOW, ("encode",)))
    mesh = sharding.make_mesh(devices=sharding.devices()[:1])
    images = jax.ShapeDtypeStruct((1, *families.PIXELS, 3), jnp.uint8)
    params, images = sharding.replicate((fast_sam.abstract_params(config), images), mesh)
    return Program("detect", "encode", fast_sam.detect, (config, params, images, HOW.dtype), 1, 0)


if __name__ == "__main__":
    cli.run(run)

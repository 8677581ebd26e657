"""Our side of `experiments.bench`: what `slimsam_jax.compress` runs, on random weights and images."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.options import Options, Step, distillation_of
from slimsam_jax import sharding
from slimsam_jax.compression.loss_terms import terms
from slimsam_jax.compression.trainer import make_trainer
from slimsam_jax.models.config import Config
from slimsam_jax.models.sam import Sam, init, run_encoder
from slimsam_jax.profiling.memory import peak_memory
from slimsam_jax.pruning import gradients


def make_step(options: Options, slim: Config, previous: Config, teacher: Config) -> Step:
    encode = functools.partial(run_encoder, attention=options.attention)
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16  # what --dtype auto is
    cores = f"{len(os.sched_getaffinity(0))} cores"
    where = f"{cores if device.platform == 'cpu' else device.device_kind}, {jnp.dtype(dtype).name}"
    if options.what == "forward":
        return Step(forward(slim, encode, dtype), 1, peak_memory, where)
    if options.what == "importance":
        return Step(disturbed_gradient(slim, encode), 1, peak_memory, where)
    models = (slim, previous, teacher) if options.what == "bottleneck-stage" else (previous, teacher, teacher)
    return Step(distillation(models, options, dtype), options.batch, peak_memory, where)


def random_model(config: Config, seed: int) -> Sam:
    return Sam(config, jax.jit(functools.partial(init, config))(jax.random.key(seed)))


def images(config: Config, count: int) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (count, *config.image_size, 3), np.uint8)
    return {"image": images, "size": np.tile(np.int32(config.image_size), (count, 1))}


def forward(config: Config, encode: Callable, dtype: Any) -> Callable[[], object]:
    embed = jax.jit(lambda params, batch: encode(config, params, batch, dtype)[0])
    params, batch = random_model(config, 0).params["image_encoder"], images(config, 1)
    return lambda: jax.block_until_ready(embed(params, batch))


def disturbed_gradient(config: Config, encode: Callable) -> Callable[[], None]:
    """Computes the default's disturbed gradient; in float32 whatever the device."""
    embed = lambda params, batch: encode(config, params, batch)[0]
    accumulate, key = gradients.accumulator(gradients.disturbed(embed), "rms"), jax.random.key(0)
    params, batch = random_model(config, 0).params["image_encoder"], images(config, 1)
    total = jax.tree.map(jnp.zeros_like, params)

    def run() -> None:
        nonlocal total
        total = jax.block_until_ready(accumulate(total, params, batch, key, 0))

    return run


def distillation(models: tuple[Config, Config, Config], options: Options, dtype: Any) -> Callable[[], None]:
    """Takes first steps of the default's distillation, which `models` (student, previous, teacher) is for."""
    student, previous, teacher = (random_model(config, seed) for seed, config in enumerate(models))
    if models[1] == models[2]:
        previous = teacher  # as in a run before any cut; another model's features would be computed, too
    step = distillation_of(options.what)
    steps = 10**6  # so that progress stays where all terms count
    trainer = make_trainer(student, previous, teacher, step, dtype, attention=options.attention)
    weights, batch = terms(step, 0, steps), images(models[0], options.batch)
    if options.cached:
        batch["embedding"] = np.zeros((options.batch, *models[0].grid, models[0].out_chans), np.float16)
    state = trainer.state

    def run() -> None:
        nonlocal state
        on_device = sharding.shard_batch(batch, trainer.mesh)
        state, terms = trainer.step(state, trainer.frozen, on_device, weights, 1e-4)
        jax.block_until_ready((state, terms))

    return run

"""Times the image encoder and its blocks on this machine, for one image."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.config import Block, Config
from slimsam_jax.models.encoders.vit import EncoderBlock
from slimsam_jax.models.sam import abstract_params, encode


def interleaved(runs: Sequence[Callable[[], Any]], turns: int = 9, seconds: float = 10.0) -> list[float]:
    """Times functions by turns, 3 to `turns` within `seconds`, after one that compiles. Returns median seconds."""
    table: list[list[float]] = []
    for run in runs:
        jax.block_until_ready(run())
    start = time.perf_counter()
    while len(table) < 3 or (len(table) < turns and time.perf_counter() - start < seconds):
        table.append([_seconds(run) for run in runs])
    return np.median(table, axis=0).tolist()


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def encoder_seconds(configs: Sequence[Config]) -> list[float]:
    """Times encoders with weights of their shapes, float32. Returns the seconds of each."""

    def runner(config: Config) -> Callable[[], Any]:
        shapes = abstract_params(config)["image_encoder"]
        params = {"image_encoder": jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)}
        return encoder_runner(config, params)

    return interleaved([runner(config) for config in configs], turns=15)


def encoder_runner(config: Config, params: Any, dtype: Any = jnp.float32) -> functools.partial[Any]:
    """Makes a function that encodes one black image."""
    frame, size = np.zeros((1, *config.image_size, 3), np.uint8), np.array([config.image_size], np.int32)
    return functools.partial(encode, config, params, frame, size, dtype)


def block_seconds(config: Config, blocks: Sequence[Block]) -> list[float]:
    """Times single blocks in an encoder of this embedding and grid, float32. Returns the seconds of each."""
    tokens = jnp.ones((1, *config.grid, config.embed_dim))

    def runner(block: Block) -> Callable[[], Any]:
        module = EncoderBlock(block, config.attention_span(block))
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
        params = {"params": jax.device_put(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), shapes))}

        @jax.jit
        def apply(params, tokens):
            with jax.default_matmul_precision("highest"):  # as `encode` has it
                return module.apply(params, tokens)[0]

        return lambda: apply(params, tokens)

    return interleaved([runner(block) for block in blocks], turns=25)

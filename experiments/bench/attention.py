"""Measures the forms of attention on this device: error, milliseconds and memory of the image encoder in each.

    python -m experiments.bench.attention --preset vit_p77

Errors are of the embedding's largest value, against "plain" in float32 with exact matrix products. Memory is what the
compiled program needs beside parameters and image (XLA's own count), so all forms can be measured in one process.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench.ours import images, random_model
from slimsam_jax.errors import InputError
from slimsam_jax.models import config as configs
from slimsam_jax.models.sam import run_encoder


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      dtype: of the computation; "auto" is bfloat16 but on a CPU, as `compress --dtype auto`.
      runs: timed, after one that is not; each waits for its end.
    """

    preset: Literal["vit_b", "vit_l", "vit_h", "vit_p50", "vit_p77", "small", "small_p50"] = "vit_p77"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    runs: int = 20


def main(options: Options) -> None:
    config, device = configs.preset(options.preset), jax.devices()[0]
    dtype = jnp.dtype("float32" if device.platform == "cpu" else "bfloat16")
    dtype = dtype if options.dtype == "auto" else jnp.dtype(options.dtype)
    params, batch = random_model(config, 0).params["image_encoder"], images(config, 1)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(encoder(config, "plain", jnp.float32)(params, batch))
    for form in ("plain", "rows", "folded"):
        row = {"preset": options.preset, "form": form, "dtype": dtype.name, "device": device.device_kind}
        try:
            numbers = measured(encoder(config, form, dtype), params, batch, expected, options.runs)
        except InputError as error:  # no kernel for this device
            numbers = {"refused": str(error)}
        print(json.dumps(row | numbers), flush=True)


def encoder(config: Any, form: Any, dtype: Any) -> Any:
    return jax.jit(lambda params, batch: run_encoder(config, params, batch, dtype, attention=form)[0])


def measured(embed: Any, params: Any, batch: Any, expected: np.ndarray, runs: int) -> dict[str, float]:
    """Measures {"error", "ms" (median), "ms_least", "mb", "flash_kernels"} of a form."""
    program = embed.lower(params, batch).compile()
    params, batch = jax.device_put((params, batch))
    output, seconds = np.asarray(program(params, batch)), []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(params, batch))
        seconds.append(time.perf_counter() - start)
    return {
        "error": float(np.abs(output - expected).max() / np.abs(expected).max()),
        "ms": round(1e3 * float(np.median(seconds)), 3),
        "ms_least": round(1e3 * min(seconds), 3),
        "mb": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "flash_kernels": program.as_text().count('custom_call_target="__cudnn$fmha'),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))

"""onnxruntime's side of `experiments.bench`: the encoder as `to-onnx` and `--engine onnxruntime` export it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import flax.traverse_util
import numpy as np

from converters import to_onnx
from converters.onnx.check import session
from converters.onnx.layouts import sam_encoder
from experiments.bench.options import Options, Step
from experiments.bench.ours import images, random_model
from slimsam_jax.models.config import Config
from slimsam_jax.profiling.memory import peak_memory


def make_step(options: Options, config: Config) -> Step:
    """The exported encoder of random weights; peak memory counts the export, and JAX, which is then idle."""
    flat = flax.traverse_util.flatten_dict(random_model(config, 0).params, sep="/")
    model = sam_encoder(config, {name: np.asarray(array) for name, array in flat.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        to_onnx.save(model, path)
        opened = session(path)
    image = {"images": images(config, 1)["image"].transpose(0, 3, 1, 2)}
    where = f"{len(os.sched_getaffinity(0))} cores, float32"
    return Step(lambda: opened.run(None, image), 1, peak_memory, where)

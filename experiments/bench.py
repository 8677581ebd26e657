"""Images per second and peak memory of the importance pass, ours against PyTorch's, taking turns.

    python -m experiments.bench --preset vit_b --image-size 1024

PyTorch's is the loop of SlimSAM (prune_distill_step1.py:107-121) around the original encoder of
`segment_anything` (needs `pip install -e '.[test]'`): teacher forward, student forward, backward, batch 1. Ours needs
no teacher. Weights are random, which changes no time. Every turn is a process of its own, so that peak memory
is that of one side; compilation and one image of warm-up are not counted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import tyro


def main(
    preset: Literal["vit_b", "vit_l", "vit_h", "vit_p50", "vit_p77"] = "vit_b",
    image_size: int = 1024,
    images: int = 2,
    turns: int = 2,
    side: Literal["both", "jax", "torch"] = "both",
) -> None:
    """Time both sides.

    Args:
      images: how many are timed in each turn.
      turns: of each side.
      side: "jax" and "torch" are the turns themselves.
    """
    if side != "both":
        step = {"jax": jax_step, "torch": torch_step}[side](preset, image_size)
        print(json.dumps(timed(step, images)))
        return
    found: dict[str, list[dict[str, float]]] = {"jax": [], "torch": []}
    for _ in range(turns):
        for name, results in found.items():
            command = [sys.executable, "-m", "experiments.bench", "--preset", preset, "--image-size", str(image_size)]
            command += ["--images", str(images), "--side", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(name, results[-1], flush=True)
    ratios = [t["seconds"] / j["seconds"] for j, t in zip(*found.values(), strict=True)]
    memory = [j["peak_gb"] / t["peak_gb"] for j, t in zip(*found.values(), strict=True)]
    print(
        f"importance, {preset} at {image_size} px, {len(os.sched_getaffinity(0))} cores: "
        f"{min(ratios):.2f} to {max(ratios):.2f} times PyTorch's images/s, {max(memory):.2f} of its peak memory"
    )


def timed(step: Callable[[], None], images: int) -> dict[str, float]:
    start = time.perf_counter()
    step()
    warm = time.perf_counter()
    for _ in range(images):
        step()
    return {
        "seconds": (time.perf_counter() - warm) / images,
        "first": warm - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def jax_step(preset: str, image_size: int) -> Callable[[], None]:
    import jax

    from slimsam_jax.models import config as configs
    from slimsam_jax.models.features import run_encoder
    from slimsam_jax.models.sam import init
    from slimsam_jax.pruning import importance

    config = configs.preset(preset, image_size)
    params = jax.jit(lambda key: init(config, key)["image_encoder"])(jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (1, image_size, image_size, 3), np.uint8)
    batch = {"image": image, "size": np.full((1, 2), image_size, np.int32)}
    embed = lambda params, batch: run_encoder(config, params, batch)[0]
    accumulate, key = importance.accumulator(importance.disturbed(embed), "rms"), jax.random.key(0)
    total = jax.tree.map(jax.numpy.zeros_like, params)

    def step() -> None:
        nonlocal total
        total = jax.block_until_ready(accumulate(total, params, batch, key))

    return step


def torch_step(preset: str, image_size: int) -> Callable[[], None]:
    import torch

    from slimsam_jax.models import config as configs
    from tests.peers import stock_sam

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = configs.preset(preset, image_size)
    teacher, student = (stock_sam(config).image_encoder for _ in range(2))
    image = torch.randn(1, 3, image_size, image_size)

    def step() -> None:
        with torch.no_grad():
            target = teacher(image)
        noise = torch.normal(mean=0, std=0.01, size=target.shape)
        torch.nn.functional.mse_loss(student(image), target + noise).backward()

    return step


if __name__ == "__main__":
    tyro.cli(main)

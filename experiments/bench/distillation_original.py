"""PyTorch's side of `distillation.py`: the loop that a user would write for MobileSAM's distillation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import mse_loss

from experiments.bench import families_original, original
from experiments.bench.options import Step
from slimsam_jax.models.config import preset

if TYPE_CHECKING:
    from experiments.bench.distillation import Options

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of SAM's pixels


def make_step(options: Options) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    run = distillation(options, device)
    name = f"{cores} cores" if device.type == "cpu" else torch.cuda.get_device_name()
    peak = lambda: original.peak(device)
    return Step(lambda: (run(), original.wait(device))[0], options.batch, peak, f"{name}, fp32")


def distillation(options: Options, device: torch.device) -> Callable[[], float]:
    """Takes a step on a batch of uint8 images from the host."""
    side, grid = options.image_size, options.image_size // 16
    student = families_original.encoder(options.student, side).to(device)
    images = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8)
    known = torch.randn(options.batch, 256, grid, grid).half()
    teacher = None
    if options.teacher != "cached":
        teacher = original.encoder(dataclasses.replace(preset(options.teacher), image_size=(side, side)), device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)

    def run() -> float:
        pixels = (images.to(device).float() - mean) / std
        with torch.no_grad():
            target = known.to(device).float() if teacher is None else teacher(pixels)
        loss = mse_loss(student(pixels), target) / target.var(unbiased=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run

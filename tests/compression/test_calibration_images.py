"""Images of the calibration set: the same, with the same noise, on any number of devices and processes."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from helpers.models import tiny_config
from slimsam_jax import data
from slimsam_jax.compression import calibration_images
from slimsam_jax.compression.recipes import RECIPES


def test_an_image_keeps_its_seed_in_any_batch_and_process(tmp_path, monkeypatch):
    for i in range(8):
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    samples = data.find([tmp_path])

    def seen(batch: int, processes: int = 1) -> dict[int, list[int]]:
        """{image: its seeds} of two passes; images are told apart by their grey."""
        found = []
        monkeypatch.setattr(calibration_images.jax, "process_count", lambda: processes)
        for process in range(processes):
            monkeypatch.setattr(calibration_images.jax, "process_index", lambda process=process: process)
            stream = calibration_images.calibration_stream(RECIPES["default"][0], samples, tiny_config(), batch, 0)
            for each in itertools.islice(stream, 16 // batch):
                found += zip(each["image"][:, 0, 0, 0].tolist(), each["seed"].tolist(), strict=True)
            stream.close()
        return {grey: sorted(seed for image, seed in found if image == grey) for grey in range(8)}

    alone = seen(1)
    assert alone == seen(4) == seen(8) == seen(4, processes=2)
    assert len({seed for seeds in alone.values() for seed in seeds}) == 16


def test_batches_of():
    counts = {devices: calibration_images.batches_of(28, devices) * devices for devices in (1, 2, 4, 8)}
    assert set(counts.values()) == {24}
    assert [calibration_images.batches_of(images, 1) for images in (1, 7, 8, 15, 100)] == [1, 7, 8, 8, 96]
    assert calibration_images.batches_of(3, 8) == 1

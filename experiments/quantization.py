"""What integers cost: agreement of a quantised SAM with its own float one.

    python -m experiments.quantization run sam_small_256.pth --calibration bsds_train --images bsds_val --seeds 0 1 2
    python -m experiments.quantization table

Statistics are captured once a seed; each row is a choice of `Quantize`. Agreement is `evaluate`'s: single masks for a
grid of 4 x 4 points an image. The size is that of model.safetensors and config.json together.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tyro.conf import Positional

from converters.from_torch import load_sam
from experiments import results
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.compression import quantize
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.data.batches import Batches
from slimsam_jax.evaluation.scores import agreement, relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam, dequantized
from slimsam_jax.quantization.running import quantizes_inputs

FILE = results.FOLDER / "quantization.jsonl"

# Ten layers of the decoder make nearly all of its error: both of `output_upscaling`, eight of image-to-token attention.
ROWS = {
    "W8, largest weight": {"method": "absmax"},
    "W8": {},
    "W8, 10 layers float": {"float_weights": 10},
    "W6, 10 layers float": {"weights": 6, "float_weights": 10},
    "W4, largest weight": {"weights": 4, "method": "absmax"},
    "W4, 10 layers float": {"weights": 4, "float_weights": 10},
    "W4 in groups of 32, 10 layers float": {"weights": 4, "group": 32, "float_weights": 10},
    "W4, 10 layers of 8 bits in each part": {"weights": 4, "fine_weights": 10},
    "W4, 16 layers of 8 bits in each part, 10 float": {"weights": 4, "fine_weights": 16, "float_weights": 10},
    "W3, 10 layers float": {"weights": 3, "float_weights": 10},
    "W8A8, ranges, 10 layers float": {"activations": 8, "float_weights": 10},
    "W8A8, ranges, 10 layers float, 6 inputs float": {"activations": 8, "float_inputs": 6, "float_weights": 10},
    "W8A8, tokens, 10 layers float": {"activations": 8, "ranges": "token", "float_weights": 10},
    **{
        f"W{bits}A{bits}, encoder alone, {name}": {"weights": bits, "activations": bits, "head": False, **how}
        for bits in (8, 6)
        for name, how in {
            "largest weight and ranges": {"method": "absmax"},
            "TinySAM's scheme": {"method": "tinysam"},
            "ranges": {},
            "tokens": {"ranges": "token"},
        }.items()
    },
    "W4A8, tokens, 10 layers float": {"weights": 4, "activations": 8, "ranges": "token", "float_weights": 10},
}


class Bench:
    """A model with what it gives for some images."""

    def __init__(self, sam: Sam, images: list[Any]):
        self.sam, self.images = sam, images
        self.encoded = [encode_image(sam, image) for image in images]
        self.bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(sam.params))

    def measure(self, new: Sam) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(new, folder)
            size = sum((Path(folder) / name).stat().st_size for name in ("model.safetensors", "config.json"))
        # Weights alone need no program of their own: what they stand for is computed with the float model's.
        new = new if quantizes_inputs(new.params) else dequantized(new)
        encoded = [encode_image(new, image) for image in self.images]
        pairs = list(zip(self.encoded, encoded, strict=True))
        agree = [agreement([(self.sam, a), (new, b)], 4)[1].mean() for a, b in pairs]
        errors = [relative_error(b.embedding, a.embedding) for a, b in pairs]
        return {
            "agreement": float(np.mean(agree)),
            "embedding_error": float(np.mean(errors)),
            "megabytes": size / 1e6,
            "share": size / self.bytes,
        }


def run(
    model: Positional[Path],
    calibration: str,
    images: str,
    seeds: tuple[int, ...] = (0,),
    limit: int = 20,
    calibration_images: int = 16,
    rows: tuple[str, ...] = tuple(ROWS),
) -> None:
    """Measure rows that are not measured yet, and add them to experiments/results/quantization.jsonl.

    Args:
      model: the float model.
      calibration, images: folders of images to calibrate with and to measure on.
      seeds: of calibration images and prompts.
      limit: images to measure on, the first ones.
      calibration_images: how many of a seed.
      rows: of `ROWS`.
    """
    results.check_committed()
    sam = load_sam(model)
    bench = Bench(sam, [sample.image() for sample in data.find([images])[:limit]])
    for seed in seeds:
        batches = Batches(data.find([calibration]), sam.config.image_size, 4, seed, frame=sam.config.frame)
        batches = list(itertools.islice(batches, calibration_images // 4))
        key = {"model": model.stem, "seed": seed, "images": limit, "calibration_images": calibration_images}
        missing = [name for name in rows if not results.find(FILE, {**key, "row": name})]
        seen = quantize.see(sam, batches, seed) if missing else None
        for name in missing:
            step = Quantize(**ROWS[name])
            row = bench.measure(dataclasses.replace(sam, params=quantize.with_integers(sam, step, seen)))
            results.append(FILE, {**key, "row": name, **row})
            print(name, seed, row, flush=True)


def table() -> None:
    """Write experiments/tables/quantization.md: means over seeds, with their spread if there are several."""
    head = "| model | weights (W), inputs (A), bits | agreement | embedding error | size | of float32 | seeds, images |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    entries = results.read(FILE)
    for model, name in itertools.product(dict.fromkeys(entry["model"] for entry in entries), ROWS):
        own = [entry for entry in entries if (entry["model"], entry["row"]) == (model, name)]
        if not own:
            continue
        mean = lambda key, own=own: float(np.mean([entry[key] for entry in own]))
        spread = f" ± {100 * np.std([entry['agreement'] for entry in own], ddof=1):.2f}" if len(own) > 1 else ""
        cells = [f"{100 * mean('agreement'):.2f}{spread} %", f"{mean('embedding_error'):.1e}"]
        cells += [f"{mean('megabytes'):.2f} MB", f"{100 * mean('share'):.1f} %", f"{len(own)}, {own[0]['images']}"]
        lines.append(f"| {' | '.join([model, name, *cells])} |")
    command = "python -m experiments.quantization table"
    results.write_table("quantization", "Integers", lines, command, "../../docs/quantization.md")


if __name__ == "__main__":
    cli.run({"run": run, "table": table})

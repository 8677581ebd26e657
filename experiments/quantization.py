"""What integers cost: agreement of a quantised SAM with its own float one.

    python -m experiments.quantization run MODEL --calibration bsds_train --images bsds_val --seeds 0 1 2
    python -m experiments.quantization slim MODEL --calibration bsds_train --images bsds_val --seeds 0 1 2
    python -m experiments.quantization table

Statistics are captured once a seed; each row is a choice of `Quantize`, some with a distillation behind it. `slim`
cuts and distils the model first, by the default recipe. Agreement is `evaluate`'s: single masks for a grid of 4 x 4
points an image. The size is that of model.safetensors and config.json together.
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
from slimsam_jax.api import compress_with
from slimsam_jax.compression import quantize
from slimsam_jax.compression.distill import distill
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.compression.recipes.integers import MEND
from slimsam_jax.data.batches import Batches
from slimsam_jax.evaluation.scores import agreement, relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam, dequantized, folded
from slimsam_jax.quantization.running import quantizes_inputs

FILE = results.FOLDER / "quantization.jsonl"
CALIBRATION = 16  # images, unless a row says otherwise
STEPS = 100  # of a distillation after quantising, of four images each
SHARE, SHARE_8 = 0.197, 0.297  # of arrays; with the names of them all a file has 20 and 30 % of float32's size

TOKENS, BALANCED = {"activations": 8, "ranges": "token"}, {"activations": 8, "balance": 0.75}
ALONE = {  # schemes for weights and inputs of the encoder, the decoder's weights being floats
    "largest weight and ranges": {"method": "absmax"},
    "TinySAM's scheme": {"method": "tinysam"},
    "ranges": {},
    "balanced, ranges": {"balance": 0.75},
    "balanced, tokens": {"balance": 0.75, "ranges": "token"},
}
# Ten layers of the decoder make nearly all of its error: both of `output_upscaling`, eight of image-to-token attention.
ROWS = {
    "W8, largest weight": {"method": "absmax"},
    "W8": {},
    "W8, 10 layers float": {"float_weights": 10},
    "W8, some float, within 30 %": {"share": SHARE_8},
    "W6, 10 layers float": {"weights": 6, "float_weights": 10},
    "W4, largest weight": {"weights": 4, "method": "absmax"},
    "W4, 10 layers float": {"weights": 4, "float_weights": 10},
    "W4 in groups of 32, 10 layers float": {"weights": 4, "group": 32, "float_weights": 10},
    "W4 and W8 within 20 %": {"weights": 4, "share": SHARE},
    "W3, 10 layers float": {"weights": 3, "float_weights": 10},
    "W8A8, ranges, 10 layers float": {"activations": 8, "float_weights": 10},
    "W8A8, ranges, 10 layers float, 6 inputs float": {"activations": 8, "float_inputs": 6, "float_weights": 10},
    "W8A8, balanced, ranges, 10 layers float, 6 inputs float": {**BALANCED, "float_inputs": 6, "float_weights": 10},
    "W8A8, tokens, 10 layers float": {**TOKENS, "float_weights": 10},
    "W8A8, balanced, tokens, 10 layers float": {**BALANCED, **TOKENS, "float_weights": 10},
    "W8A8, balanced, tokens, 10 layers float, 6 inputs float": {
        **BALANCED,
        **TOKENS,
        "float_inputs": 6,
        "float_weights": 10,
    },
    "W4A8, tokens, 10 layers float": {"weights": 4, **TOKENS, "float_weights": 10},
    "W4A8 and W8A8 within 20 %, balanced, tokens": {"weights": 4, **BALANCED, **TOKENS, "share": SHARE},
    **{
        f"W{bits}A{bits}, encoder alone, {name}": {"weights": bits, "activations": bits, "head": False, **how}
        for bits in (8, 6)
        for name, how in ALONE.items()
    },
    **{
        f"W6A6, encoder alone, balanced, {name}, 6 inputs float": {
            **{"weights": 6, "activations": 6, "head": False},
            **{"balance": 0.75, "ranges": ranges, "float_inputs": 6},
        }
        for name, ranges in (("ranges", "minmax"), ("tokens", "token"))
    },
    f"W6A6, encoder alone, ranges, {STEPS} steps": {"weights": 6, "activations": 6, "head": False, "steps": STEPS},
}
SLIM = ("W8, some float, within 30 %", "W4 and W8 within 20 %")


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
    calibration_images: int = CALIBRATION,
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
    for seed in seeds:
        key = {"model": model.stem, "seed": seed, "images": limit, "calibration_images": calibration_images}
        measure_rows(model, key, calibration, images, rows)


def slim(
    teacher: Positional[Path],
    calibration: str,
    images: str,
    ratios: tuple[float, ...] = (0.5, 0.77),
    seeds: tuple[int, ...] = (0,),
    steps: int | None = None,
    folder: Path = Path("slim_models"),
    limit: int = 20,
    calibration_images: int = CALIBRATION,
    rows: tuple[str, ...] = SLIM,
) -> None:
    """Compress a model by the default recipe, once a ratio and seed, then measure rows of what comes out.

    Args:
      teacher: the model to compress.
      ratios: of channels to remove.
      steps: half of the compression's optimizer steps, of four images each, as compress takes it.
      folder: where slim models are kept, TEACHER-RATIO-SEED-STEPS each: those that are there are not made again.

    The others are those of `run`; a seed is also the compression's.
    """
    results.check_committed()
    for ratio, seed in itertools.product(ratios, seeds):
        name, out = f"slim{100 * ratio:.0f}", folder / f"{teacher.stem}-{ratio:g}-{seed}-{steps}"
        if not (out / "report.json").exists():
            resume = out.exists()
            cut = {"teacher": teacher, "images": (calibration,), "ratio": ratio, "steps": steps, "seed": seed}
            compress_with(Options(**cut, out=out, resume=resume))
        key = {"model": name, "seed": seed, "images": limit, "calibration_images": calibration_images}
        key |= {"distilled": True, "teacher": teacher.stem, "steps": steps}
        measure_rows(out, key, calibration, images, rows)


def measure_rows(path: Path, key: dict[str, Any], calibration: str, images: str, rows: tuple[str, ...]) -> None:
    """Measures rows of one model with one seed, but for those that there are.

    Args:
      path: of the model.
      key: of the entries, without the row; images, seed and calibration_images are read from it.
    """
    missing = [name for name in rows if not results.find(FILE, {**key, "row": name})]
    if not missing:
        return
    sam = folded(load_sam(path))
    bench = Bench(sam, [sample.image() for sample in data.find([images])[: key["images"]]])
    batches = Batches(data.find([calibration]), sam.config.image_size, 4, key["seed"], frame=sam.config.frame)
    batches = list(itertools.islice(batches, key["calibration_images"] // 4))
    seen = quantize.see(sam, batches, key["seed"])
    for name in missing:
        fields = dict(ROWS[name])
        steps, step = fields.pop("steps", 0), Quantize(**fields)
        new = dataclasses.replace(sam, params=quantize.with_integers(sam, step, seen))
        if steps:
            new = mended(path, sam, new, step, steps, calibration, key["seed"])
        row = bench.measure(new)
        results.append(FILE, {**key, "row": name, **row})
        print(key["model"], name, key["seed"], row, flush=True)


def mended(path: Path, sam: Sam, new: Sam, step: Quantize, steps: int, images: str, seed: int) -> Sam:
    """A quantised model after the distillation towards its float self that `slimsam quantize --steps` adds."""
    mend = dataclasses.replace(MEND, optimizer=dataclasses.replace(MEND.optimizer, steps=steps))
    with tempfile.TemporaryDirectory() as folder:
        options = Options(teacher=path, images=(images,), seed=seed, out=Path(folder) / "run")
        whole = prepare(options, sam, (step, mend))
        with whole.folder:
            return distill(whole, whole.plan[-1], new, sam)


def table() -> None:
    """Write experiments/tables/quantization.md: means over seeds, with their spread if there are several."""
    head = "| model | weights (W), inputs (A), bits | agreement | embedding error | size | of float32 | seeds, images |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    entries = results.read(FILE)
    for (model, images), name in itertools.product(dict.fromkeys(map(_kind, entries)), ROWS):
        own = [entry for entry in entries if (_kind(entry), entry["row"]) == ((model, images), name)]
        if not own:
            continue
        mean = lambda key, own=own: float(np.mean([entry[key] for entry in own]))
        spread = f" ± {100 * np.std([entry['agreement'] for entry in own], ddof=1):.2f}" if len(own) > 1 else ""
        cells = [f"{100 * mean('agreement'):.2f}{spread} %", f"{mean('embedding_error'):.1e}"]
        cells += [f"{mean('megabytes'):.2f} MB", f"{100 * mean('share'):.1f} %", f"{len(own)}, {images}"]
        lines.append(f"| {' | '.join([model, name, *cells])} |")
    command = "python -m experiments.quantization table"
    results.write_table("quantization", "Integers", lines, command, "../quantization.md")


def _kind(entry: dict[str, Any]) -> tuple[str, str]:
    """What a row has in common with those that it may be averaged with: model and images, as the table says them."""
    count = entry["calibration_images"]
    return _called(entry), f"{entry['images']}{'' if count == CALIBRATION else f', calibrated with {count}'}"


def _called(entry: dict[str, Any]) -> str:
    if not entry.get("distilled"):
        return results.called(entry["model"])
    steps = "" if entry["steps"] is None else f" by `--steps {entry['steps']}`"
    return f"{entry['model']} of {results.called(entry['teacher'])}, distilled{steps}"


if __name__ == "__main__":
    cli.run({"run": run, "slim": slim, "table": table})

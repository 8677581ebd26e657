"""What integers cost in time: encoders of a quantised SAM in onnxruntime beside float32's, by turns.

    python -m experiments.quantization_latency run slimsam_jax/assets/sam_small_v2 --calibration bsds_train
    python -m experiments.quantization_latency run slim77 --calibration bsds_train --quantized slim77_int4
    python -m experiments.quantization_latency table

Every row's encoder is exported, opened as `to-onnx` says that it be opened, and all are run one after the other, so
that a busy machine is fair to them. Beside milliseconds it takes the process's CPU time, which others on the machine
disturb less. Medians over turns, and with them the quartiles of the ratio to float32 in the same turn. Of models that
`slimsam quantize` has made, decoders are timed, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tyro.conf import Positional

from converters import to_onnx
from converters.from_torch import load_sam
from converters.onnx.check import OUTPUTS
from converters.onnx.integers import check_integers
from converters.onnx.kernels import Opened
from experiments import results
from experiments.quantization import ROWS
from slimsam_jax import cli, data
from slimsam_jax.compression import quantize
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import Sam, folded
from slimsam_jax.quantization import any_quantized, is_quantized

FILE = results.FOLDER / "quantization_latency.jsonl"
DECODER = ", decoder"  # behind a row's name
CHOSEN = (
    "W8",
    "W4, 10 layers float",
    "W8A8, ranges, 10 layers float",
    "W8A8, tokens, 10 layers float",
    "W4A8, tokens, 10 layers float",
)


def run(
    model: Positional[Path],
    calibration: str,
    rows: tuple[str, ...] = (),
    quantized: tuple[Path, ...] = (),
    turns: int = 21,
    calibration_images: int = 4,
) -> None:
    """Time encoders and decoders, and add them to experiments/results/quantization_latency.jsonl.

    Args:
      model: the float model.
      calibration: a folder of images to calibrate with; the first one is what encoders are given.
      rows: of `experiments.quantization.ROWS`, without their shares: the encoder alone. Default: five of them, or none
        where `quantized` is given.
      quantized: folders that `slimsam quantize` has made of the model, both parts of each.
      turns: in each of which every file runs once.
      calibration_images: how many.
    """
    results.check_committed()
    sam = folded(load_sam(model))
    wholes = made_of(sam, model, quantized)
    batches = Batches(data.find([calibration]), sam.config.image_size, 4, 0, frame=sam.config.frame)
    batches = list(itertools.islice(batches, -(-calibration_images // 4)))
    height, width = batches[0]["size"][0]
    image = np.ascontiguousarray(np.moveaxis(batches[0]["image"][:1, :height, :width], -1, 1))
    rows = rows or (() if quantized else CHOSEN)
    encoders = integers(sam, batches, rows) if rows else {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Opened] = {}
        for name, own in {"float32": sam, **encoders, **wholes}.items():
            decoder = bool(wholes) and name not in encoders
            files |= opened(own, Path(folder) / str(len(files)), image, name, decoder)
        taken = times(files, turns)
    called = model.stem if model.is_file() else model.name
    for name, file in files.items():
        entry = {"model": called, "row": name, "turns": turns, "vnni": vnni()}
        entry |= summary(taken[name], taken["float32" + DECODER * name.endswith(DECODER)])
        results.append(FILE, {**entry, "kernels": file.counts})
        print(entry, file.counts, flush=True)


def integers(sam: Sam, batches: list[dict[str, Any]], rows: tuple[str, ...]) -> dict[str, Sam]:
    """The model with an encoder of integers as each row says."""
    seen, made = quantize.see(sam, batches, 0, head=False), {}
    plain = {"head": False, "float_weights": 0, "share": 0.0, "method": "absmax"}  # times do not depend on it
    for row in rows:
        fields = {name: value for name, value in {**ROWS[row], **plain}.items() if name != "steps"}
        params = quantize.with_integers(sam, Quantize(**fields), seen)
        made[row.partition(", 10 layers")[0]] = dataclasses.replace(sam, params=params)
    return made


def made_of(sam: Sam, model: Path, folders: Sequence[Path]) -> dict[str, Sam]:
    """What `whole` says of each folder.

    Raises:
      InputError: one was made of another model than `sam`, which `model` is, two have one name, or no graph can have
        the integers.
    """
    found: dict[str, Sam] = {}
    for path in folders:
        name, own = whole(path)
        if own.config != sam.config:
            raise InputError(f"{path} was made of another model than {model}: its config.json says other sizes")
        if name in found:
            raise InputError(f"--quantized: two folders would be called {name} in the table; rename one")
        found[name] = own
    return found


def whole(path: Path) -> tuple[str, Sam]:
    """What a folder that `slimsam quantize` made is called in the table, and its model."""
    sam = load_sam(path)
    nodes = [leaf for leaf in jax.tree.leaves(sam.params, is_leaf=is_quantized) if is_quantized(leaf)]
    if not nodes:
        raise InputError(f"{path} is not quantised: give what `slimsam quantize` made of the model")
    check_integers(sam, str(path), ("integers",))
    bits = " and ".join(f"W{bits}" for bits in sorted({node.bits for node in nodes}))
    inputs = {node.input_bits for node in nodes if node.range is not None}
    return f"{bits}{''.join(f', A{bits}' for bits in inputs)} ({path.name})", sam


def vnni() -> bool | None:
    """Whether the processor multiplies and adds bytes in one instruction; None where Linux does not say."""
    path = Path("/proc/cpuinfo")
    return "vnni" in path.read_text() if path.is_file() else None


def opened(sam: Sam, folder: Path, image: np.ndarray, name: str, decoder: bool = True) -> dict[str, Opened]:
    """A model's encoder, and perhaps its decoder, in onnxruntime, integers as kernels compute them.

    Each was run once, which prepares weights.

    Args:
      image: [1, 3, h, w] uint8, scaled to fit.
      name: of the encoder; the decoder has `DECODER` behind it.
    """
    files, given = {}, {"images": image}
    models = to_onnx.models(sam, "sam", np.float32, integers=any_quantized(sam.params))
    for part, graph in zip(("", DECODER) if decoder else ("",), models, strict=False):
        to_onnx.save(graph, folder / f"{len(files)}.onnx")
        files[name + part] = file = Opened(folder / f"{len(files)}.onnx")
        given = one_click(file.run(None, given), image.shape[2:])
    return files


def one_click(maps: Sequence[np.ndarray], size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a decoder is asked: a click in the middle of an image of `size`, whose encoder gave `maps`."""
    h, w = maps[0].shape[2:]
    asked = {
        "point_coords": [[[size[1] / 2, size[0] / 2], [0, 0]]],
        "point_labels": [[1, -1]],
        "mask_input": np.zeros((1, 1, 4 * h, 4 * w)),
        "has_mask_input": [0],
        "orig_im_size": size,
    }
    named = dict(zip(OUTPUTS["images"], maps, strict=False))
    return named | {name: np.asarray(value, np.float32) for name, value in asked.items()}


def times(files: dict[str, Opened], turns: int) -> dict[str, np.ndarray]:
    """[turns, 2] of each file: wall seconds and CPU seconds of the whole process, by turns."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for _ in range(turns):
        for name, file in files.items():
            before = time.process_time()
            taken[name].append((file.seconds(), time.process_time() - before))
    return {name: np.array(each) for name, each in taken.items()}


def summary(own: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    """Medians in milliseconds, and quartiles of the CPU time's ratio to float32's in the same turn."""
    wall, cpu = (1000 * np.median(own, 0)).tolist()
    return {"ms": wall, "cpu_ms": cpu, "ratio": np.quantile(own[:, 1] / plain[:, 1], (0.25, 0.5, 0.75)).tolist()}


def table() -> None:
    """Write experiments/tables/quantization_latency.md: the last measurement of each row."""
    head = (
        "| model | encoder, or decoder | ms | CPU ms | of float32's (quartiles) | kernels of integers | VNNI | turns |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    last = {(entry["model"], entry["row"]): entry for entry in results.read(FILE)}
    for (model, row), entry in last.items():
        low, middle, high = entry["ratio"]
        kernels = ", ".join(f"{count} {kind}" for kind, count in entry["kernels"].items()) or "none"
        cells = [f"{entry['ms']:.0f}", f"{entry['cpu_ms']:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", kernels]
        cells += [{True: "yes", False: "no", None: "?"}[entry["vnni"]], str(entry["turns"])]
        lines.append(f"| {' | '.join([results.called(model), row, *cells])} |")
    command = "python -m experiments.quantization_latency table"
    page = "../quantization.md"
    results.write_table("quantization_latency", "Integers: milliseconds", lines, command, page)


if __name__ == "__main__":
    cli.run({"run": run, "table": table})

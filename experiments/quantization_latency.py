"""What integers cost in time: encoders of a quantised SAM in onnxruntime beside float32's, by turns.

    python -m experiments.quantization_latency run sam_small_256.pth --calibration bsds_train
    python -m experiments.quantization_latency table

Every row's encoder is exported, opened as `to-onnx` says that it be opened, and all are run one after the other, so
that a busy machine is fair to them. Beside milliseconds it takes the process's CPU time, which others on the machine
disturb less. Medians over turns, and with them the quartiles of the ratio to float32 in the same turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from converters import to_onnx
from converters.from_torch import load_sam
from converters.onnx.kernels import Opened
from experiments import results
from experiments.quantization import ROWS
from slimsam_jax import cli, data
from slimsam_jax.compression import quantize
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.data.batches import Batches
from slimsam_jax.models.sam import Sam

FILE = results.FOLDER / "quantization_latency.jsonl"
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
    rows: tuple[str, ...] = CHOSEN,
    turns: int = 21,
    calibration_images: int = 4,
) -> None:
    """Time the encoders of rows, and add them to experiments/results/quantization_latency.jsonl.

    Args:
      model: the float model.
      calibration: a folder of images to calibrate with; the first one is what encoders are given.
      rows: of `experiments.quantization.ROWS`.
      turns: in each of which every encoder runs once.
      calibration_images: how many.
    """
    results.check_committed()
    sam = load_sam(model)
    batches = Batches(data.find([calibration]), sam.config.image_size, 4, 0, frame=sam.config.frame)
    batches = list(itertools.islice(batches, -(-calibration_images // 4)))
    seen = quantize.see(sam, batches, 0, head=False)
    height, width = batches[0]["size"][0]
    image = np.moveaxis(batches[0]["image"][:1, :height, :width], -1, 1)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": opened(sam, Path(folder) / "float32", False)}
        plain = {"head": False, "float_weights": 0, "share": 0.0, "method": "absmax"}  # times do not depend on it
        for row in rows:
            fields = {name: value for name, value in {**ROWS[row], **plain}.items() if name != "steps"}
            new = dataclasses.replace(sam, params=quantize.with_integers(sam, Quantize(**fields), seen))
            files[row.partition(", 10 layers")[0]] = opened(new, Path(folder) / str(len(files)), True)
        taken = times(files, np.ascontiguousarray(image), turns)
    for name, file in files.items():
        entry = {"model": model.stem, "row": name, "turns": turns, "vnni": vnni()}
        entry |= summary(taken[name], taken["float32"])
        results.append(FILE, {**entry, "kernels": file.counts})
        print(entry, file.counts, flush=True)


def vnni() -> bool | None:
    """Whether the processor multiplies and adds bytes in one instruction; None where Linux does not say."""
    path = Path("/proc/cpuinfo")
    return "vnni" in path.read_text() if path.is_file() else None


def opened(sam: Sam, folder: Path, integers: bool) -> Opened:
    """The encoder of a model in onnxruntime, as its kernels of integers compute it."""
    encoder, _ = to_onnx.models(sam, "sam", np.float32, integers=integers)
    to_onnx.save(encoder, folder / "encoder.onnx")
    return Opened(folder / "encoder.onnx")


def times(files: dict[str, Opened], image: np.ndarray, turns: int) -> dict[str, np.ndarray]:
    """[turns, 2] of each file: wall seconds and CPU seconds of the whole process, by turns."""
    for file in files.values():
        file.run(None, {"images": image})  # the first run prepares weights
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
    head = "| model | encoder | ms | CPU ms | of float32's (quartiles) | kernels of integers | VNNI | turns |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    last = {(entry["model"], entry["row"]): entry for entry in results.read(FILE)}
    for (model, row), entry in last.items():
        low, middle, high = entry["ratio"]
        kernels = ", ".join(f"{count} {kind}" for kind, count in entry["kernels"].items()) or "none"
        cells = [f"{entry['ms']:.0f}", f"{entry['cpu_ms']:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", kernels]
        cells += [{True: "yes", False: "no", None: "?"}[entry["vnni"]], str(entry["turns"])]
        lines.append(f"| {' | '.join([results.called(model), row, *cells])} |")
    command = "python -m experiments.quantization_latency table"
    page = "../../docs/quantization.md"
    results.write_table("quantization_latency", "Integers: milliseconds", lines, command, page)


if __name__ == "__main__":
    cli.run({"run": run, "table": table})

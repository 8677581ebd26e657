"""Computes image encoders by onnxruntime: exported once into the user's cache folder, checked and timed against JAX.

On CPUs it is often faster than XLA. Prompts and masks stay with JAX. What needs onnx is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from slimsam_jax import __version__, sharding
from slimsam_jax.checkpoint import sha256
from slimsam_jax.cli.compilation import machine
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import cache_folder, keep_within, read_json, replacing, write_json
from slimsam_jax.inference.engine import Engine

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam

Name = Literal["auto", "jax", "onnxruntime"]
FOLDER = "encoders"  # of the cache: the demo keeps folders in "onnx", which files that are trusted may not lie beside
ROOM = 2**32  # bytes of all exported encoders: SAM-B's has 0.36 GB
LARGEST_ERROR = 1e-4  # relative to the largest value
Run = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def engaged(sam: Any, engine: Name) -> Any:
    """Returns the model with the engine that is asked for, which is said in a line if it is not JAX.

    Args:
      engine: "auto" is onnxruntime if this model's encoder was exported on this machine and measured faster then.

    Raises:
      InputError: it is not installed, or not for this model.
      RunError: it computes something else than JAX.
    """
    if engine == "jax" or (engine == "auto" and jax.process_count() > 1):  # several give the numbers of one
        return sam
    known = _measured(sam)
    if engine == "auto" and not (known and known["onnxruntime"] < known["jax"]):
        return sam
    check(sam)
    path = _folder() / f"{digest(sam)}.onnx"
    run = _opened(path) if known and _record(path).get("sha256") == sha256(path) else None
    if not run:
        run, known = _exported(sam, path)
    times = f"{known['onnxruntime']:.3g} s an image; JAX took {known['jax']:.3g} s when it was exported"
    if sharding.is_main():
        print(f"the image encoder runs on onnxruntime: {times} (--engine jax takes JAX)", flush=True)
    return dataclasses.replace(sam, engine=Engine("onnxruntime", sam.params, run))


def check(sam: Any) -> None:
    """Raises InputError for a model that onnxruntime is not for, and if it is not installed."""
    from converters import to_onnx
    from slimsam_jax.imaging.frames import Fitted
    from slimsam_jax.models.kinds import check_sam
    from slimsam_jax.quantization import any_quantized

    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--engine onnxruntime needs {' and '.join(missing)}: pip install 'slimsam_jax[onnx]'")
    if sharding.platform() != "cpu":
        raise InputError(f"--engine onnxruntime is for CPUs, and this is a {sharding.platform()}: leave it out")
    to_onnx.check_model(check_sam(sam), "the model")
    if not isinstance(sam.config.frame, Fitted) or any_quantized(sam.params):
        raise InputError("--engine onnxruntime is for models of Segment Anything's frame that are not quantised")
    if sum(leaf.nbytes for leaf in jax.tree.leaves(sam.params["image_encoder"])) > to_onnx.LARGEST_FILE:
        raise InputError("--engine onnxruntime is for encoders of less than 2 GB, which one ONNX file can hold")


def _measured(sam: Any) -> dict[str, float] | None:
    """Seconds for an image, {engine: s}, as measured when this model was exported on this machine; None if it was not.

    None, too, if onnxruntime is not for this model. Nothing is hashed then, nor where nothing was ever exported.
    """
    folder = cache_folder(FOLDER)
    if not folder or not any(folder.glob("*.json")):
        return None
    try:
        check(sam)
        path = folder / f"{digest(sam)}.onnx"
        if not path.is_file():  # the large files of a cache are removed by hand, and by `keep_within`
            return None
        known = _record(path)["seconds"][_here()]
        return {name: float(known[name]) for name in ("jax", "onnxruntime")}
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _here() -> str:
    """Names what times depend on: this machine, and who computes."""
    import onnxruntime

    return f"{machine()} onnxruntime {onnxruntime.__version__} jax {jax.__version__}"


def _record(path: Path) -> dict[str, Any]:
    """Reads what is noted of an exported encoder; empty if there is nothing."""
    try:
        record = read_json(path.with_suffix(".json"))
    except InputError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("seconds"), dict) else {}


def _folder() -> Path:
    folder = cache_folder(FOLDER)
    if not folder:
        raise InputError(
            "--engine onnxruntime keeps the exported encoder in the user's cache folder, and there is none"
        )
    return folder


def digest(sam: Sam) -> str:
    """Hashes what an exported encoder depends on."""
    from flax.traverse_util import flatten_dict

    hashed = hashlib.sha256(f"{__version__} {sam.config}".encode())
    for name, array in sorted(flatten_dict(sam.params["image_encoder"], sep="/").items()):
        array = np.asarray(array)
        hashed.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()[:32]


def _opened(path: Path) -> Run | None:
    """Opens an exported encoder; None if it is gone, or damaged."""
    from converters.onnx.check import session

    try:
        opened = session(path)
    except Exception:  # onnxruntime's errors are of many kinds
        return None
    os.utime(path)  # used: the oldest go first

    def run(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        (embedding,) = opened.run(None, {"images": frame[None, : size[0], : size[1]].transpose(0, 3, 1, 2)})
        return embedding[0].transpose(1, 2, 0)

    return run


def _exported(sam: Sam, path: Path) -> tuple[Run, dict[str, float]]:
    """Exports an encoder, compares it with JAX, and times both; keeps the file and the record."""
    import flax.traverse_util

    from converters import to_onnx
    from converters.onnx.layouts import sam_encoder
    from slimsam_jax.models.sam import folded

    if sharding.is_main():
        print("exporting the image encoder for onnxruntime, once", flush=True)
    plain = folded(sam)
    flat = flax.traverse_util.flatten_dict(plain.params, sep="/")
    model = sam_encoder(plain.config, {name: np.asarray(array) for name, array in flat.items()})
    with replacing(path) as temporary:
        to_onnx.save(model, temporary)
        run = _opened(temporary)
        if not run:
            raise RunError("onnxruntime cannot open the exported encoder; --engine jax does without it")
        known = _compared(sam, run)
    seconds = {**_record(path).get("seconds", {}), _here(): known}  # of other machines with this home folder, too
    write_json(path.with_suffix(".json"), {"sha256": sha256(path), "seconds": seconds})
    keep_within(path.parent, ROOM)
    return run, known


def _compared(sam: Sam, run: Run) -> dict[str, float]:
    """Times JAX and onnxruntime by turns; raises RunError if they do not give the same for an image."""
    from slimsam_jax.models.sam import encode
    from slimsam_jax.profiling.latency import interleaved

    height, width = sam.config.image_size
    size = (height, max(1, 3 * width // 4))
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    runs = [lambda: encode(sam.config, sam.params, frame[None], np.array([size])), lambda: run(frame, size)]
    expected, actual = np.asarray(runs[0]())[0], runs[1]()
    error = float(np.abs(actual - expected).max() / np.abs(expected).max())
    if not error <= LARGEST_ERROR:  # NaN, too
        raise RunError(f"onnxruntime's embedding differs from JAX's by {error:.1e}; --engine jax does without it")
    return dict(zip(("jax", "onnxruntime"), interleaved(runs, turns=5), strict=True))

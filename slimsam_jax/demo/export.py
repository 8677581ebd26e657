"""Exports the models of the page to ONNX, once, into the user's cache."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimsam_jax import __version__
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.checks import names_of

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam


# What needs JAX or onnx is imported where it is used: --help should not wait for it.

Dtype = Literal["float32", "float16", "int8"]
BYTES = {"float32": 4, "float16": 2, "int8": 1}  # of a weight
LARGEST_FILE = 2**31 - 2**24  # bytes; browsers hold no larger array


def fingerprint(sam: Sam, dtype: Dtype) -> str:
    """Hashes the weights, the architecture, the dtype, and the code that writes ONNX."""
    import flax.traverse_util
    import numpy as np

    import converters
    from slimsam_jax.models.sam import dequantized

    sam = dequantized(sam)
    digest = hashlib.sha256(json.dumps([sam.config.to_json(), dtype]).encode())
    for path, array in sorted(flax.traverse_util.flatten_dict(sam.params, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(array))
    folder = Path(converters.__file__).parent
    for source in (folder / "to_onnx.py", *sorted(folder.glob("onnx/*.py"))):
        digest.update(source.read_bytes())
    digest.update(f"{__version__} {version('onnxruntime') if dtype == 'int8' else ''}".encode())  # which quantises
    return digest.hexdigest()[:16]


def check_size(sam: Sam, dtype: Dtype) -> None:
    """Raises InputError if the encoder is too large for a browser, before it is exported for minutes."""
    from slimsam_jax.profiling import sam_costs

    if sam_costs.encoder_parameters(sam.config) * BYTES[dtype] > LARGEST_FILE:
        smaller = " or ".join(other for other in BYTES if BYTES[other] < BYTES[dtype])
        advice = f"try --dtype {smaller}" if smaller else "take a smaller model"
        raise InputError(f"the encoder is too large for a browser in {dtype}; {advice}")


def exported(sam: Sam, dtype: Dtype, cache: Path) -> tuple[Path, Path]:
    """Returns encoder.onnx and decoder.onnx of a model, written only if the cache has none of this model."""
    from converters import to_onnx
    from slimsam_jax import data

    folder = cache / "onnx" / fingerprint(sam, dtype)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        image = data.read_image(data.embedded_images() / "dog.jpg")
        to_onnx.export(sam, folder, "sam", (dtype,), image)
    encoder, decoder = (folder / f"{stem}{to_onnx.SUFFIXES[dtype]}.onnx" for stem in to_onnx.STEMS["sam"])
    return encoder, decoder


def describe(name: str, sam: Sam, files: tuple[Path, Path]) -> dict[str, Any]:
    """Describes a model for the page."""
    from converters import to_onnx
    from slimsam_jax.models.config import Thresholds
    from slimsam_jax.models.encoders import name_of
    from slimsam_jax.profiling import sam_costs

    return {
        "name": name,
        "family": name_of(sam.config.encoder),
        "image_size": sam.config.image_size,
        "score": to_onnx.score_of(sam.config),
        "parameters": sam_costs.sam_parameters(sam.config),
        "encoder_macs": sam_costs.encoder_macs(sam.config).total,
        "bytes": sum(path.stat().st_size for path in files),
        "thresholds": (sam.thresholds or Thresholds()).to_json(),
        **limits(sam),
    }


def limits(sam: Sam) -> dict[str, Any]:
    """What the page has to know of a model's frame and of the prompts that it cannot take.

    `whole`: the encoder takes images as they are, and fills its frame. `no_background`: why there are no background
    points, or None. `most_points`: of a prompt, a box being two; None for any number.
    """
    import numpy as np

    from slimsam_jax.imaging.frames import Whole
    from slimsam_jax.models.heads import kind_of

    head = kind_of(sam.config.head)
    return {
        "whole": isinstance(sam.config.frame, Whole),
        "no_background": head.refusal(np.array([[1, 0]]), masked=False),
        "most_points": getattr(head, "MOST_POINTS", None),
    }


def prepare(paths: tuple[Path, ...], dtype: Dtype, cache: Path) -> list[tuple[dict[str, Any], tuple[Path, Path]]]:
    """Reads the models and exports them. Returns the description of each, and its two files.

    Raises:
      InputError: not a model, or one that is too large for a browser.
    """
    from converters import to_onnx
    from converters.from_torch import load_sam as load

    models = []
    for path, name in zip(paths, names_of(paths), strict=True):
        sam = load(path)
        to_onnx.check_model(sam, str(path))
        check_size(sam, dtype)
        print(f"{path}:", flush=True)
        files = exported(sam, dtype, cache)
        print(f"  in {files[0].parent}", flush=True)
        models.append((describe(name, sam, files), files))
    return models

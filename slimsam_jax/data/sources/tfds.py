"""Reads TensorFlow Datasets in the features of its own `segment_anything`, without TensorFlow."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimsam_jax import cli
from slimsam_jax.data.sample import Sample
from slimsam_jax.errors import InputError, printable, reading
from slimsam_jax.files import read_bytes, regular

MOST_OF_INFO = 2**20  # bytes of features.json and dataset_info.json
CLASSES = ("pythonclassname", "type", "jsonfeature")
OWN = "tensorflow_datasets.core.features."  # of features.json, else tfds imports whatever module that names


def samples(folder: Path, split: str = "train") -> list[Sample]:
    """Lists all images of a prepared data set; the encoded bytes are given as they were stored.

    Args:
      folder: the one with dataset_info.json, or one above it that holds no second.

    Raises:
      InputError: no such data set, of other features, or stored otherwise than as array_record.
    """
    folder = _prepared(folder)
    with reading(f"the TFDS data set {folder}"):
        _check(folder)
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        if not {"image", "annotations"} <= set(builder.info.features):
            raise InputError(f"{folder} has not the features of tfds' segment_anything (image, annotations)")
        skip = {"image": {"content": tfds.decode.SkipDecoding()}}
        _check_records(builder.info.splits[split], folder)
        source = builder.as_data_source(split, decoders=skip)
        return [_sample(f"{folder}/{split}/{i}", source, i) for i in range(len(source))]


def _check(folder: Path) -> None:
    """Raises InputError or ValueError unless tfds can be trusted with the descriptions of a data set."""
    read_bytes(folder / "dataset_info.json", MOST_OF_INFO)
    for name in _classes(json.loads(read_bytes(folder / "features.json", MOST_OF_INFO))):
        if not str(name).startswith(OWN):
            raise ValueError(f"a feature of the foreign class {printable(name)}")


def _classes(description: Any) -> Iterator[Any]:
    """Yields what a features.json, parsed, names as classes: in protobuf's spellings, or as `type` in older ones.

    So old ones that hold JSON as text are refused, too.
    """
    waiting = [description]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from (v for k, v in here.items() if k.replace("_", "").lower() in CLASSES)
            here = list(here.values())
        waiting += here if isinstance(here, list) else []


def _check_records(split: Any, folder: Path) -> None:
    """Raises InputError or ValueError unless the files of a split are there, and can hold what it says they do."""
    paths = [regular(Path(path)) for path in split.filepaths]
    if any(path.parent != folder for path in paths):
        raise ValueError("files of another folder")
    size = sum(path.stat().st_size for path in paths)
    if split.num_examples > size:
        raise ValueError(f"{split.num_examples} images in {size} bytes")


def _prepared(folder: Path) -> Path:
    folders = sorted(info.parent for info in folder.rglob("dataset_info.json")) if folder.is_dir() else []
    if len(folders) != 1:
        raise InputError(
            f"tfds:{folder} holds {len(folders) or 'no'} prepared data sets (dataset_info.json), and one is needed; "
            f"{cli.called('data')} prepare makes one"
        )
    return folders[0]


def _sample(name: str, source: Any, index: int) -> Sample:
    return Sample(name, functools.partial(_read, source, index), functools.partial(_annotations, source, index))


def _read(source: Any, index: int) -> bytes:
    return source[index]["image"]["content"]


def _annotations(source: Any, index: int) -> list[dict[str, Any]]:
    """Reads annotations; boxes are rounded, as TFDS keeps them as shares of the image in float32."""
    record = source[index]
    height, width = int(record["image"]["height"]), int(record["image"]["width"])
    columns = record["annotations"]
    rows = [_row(columns, i) for i in range(len(columns["id"]))]
    return [fields | {name: _xywh(fields[name], height, width) for name in ("bbox", "crop_box")} for fields in rows]


def _row(columns: dict[str, Any], index: int) -> dict[str, Any]:
    """Takes a row out of TFDS's dicts of lists, which stand for lists of dicts, also within."""
    return {name: _row(c, index) if isinstance(c, dict) else c[index] for name, c in columns.items()}


def _xywh(box: np.ndarray, height: int, width: int) -> list[float]:
    top, left, bottom, right = np.asarray(box, np.float64)
    return np.round([left * width, top * height, (right - left) * width, (bottom - top) * height], 3).tolist()

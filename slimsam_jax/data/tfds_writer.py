"""Writes images and annotations as a TFDS data set (ArrayRecord), without TensorFlow.

The stock `segment_anything` builder downloads 10 TB through Apache Beam and cannot use what lies on a disk; this
one has its features, so that whatever reads the one reads the other.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from slimsam_jax.data.sample import Annotation, Sample, parse
from slimsam_jax.errors import InputError, printable, reading, writing
from slimsam_jax.files import new_folder
from slimsam_jax.imaging import rle
from slimsam_jax.progress import track


def prepare(samples: Sequence[Sample], out: Path) -> dict[str, str]:
    """Writes `out`/sa1b/1.0.0; images are stored as the bytes they are, in the order given.

    Returns:
      {name: reason} of the samples that cannot be used, which are left out.

    Raises:
      InputError: not one can be used.
      RunError: the folder cannot be written.
    """
    with new_folder(out) as folder:
        return write(samples, folder)


def write(samples: Sequence[Sample], folder: Path, first: int = 0) -> dict[str, str]:
    """Writes `folder`/sa1b/1.0.0, see `prepare`.

    Args:
      first: the number of the first sample, in a data set of which these are a part.
    """
    tfds.disable_progress_bar()
    builder = Sa1b(samples, first, data_dir=folder, file_format="array_record")
    downloads = folder / "downloads"  # made for nothing
    with writing(folder), contextlib.redirect_stdout(None):  # it talks of downloads
        builder.download_and_prepare(download_dir=downloads)
    shutil.rmtree(downloads, ignore_errors=True)
    return builder.skipped


class Unusable(InputError):
    """Not one image can be used.

    Attributes:
      skipped: {name: reason}.
    """

    def __init__(self, skipped: dict[str, str]):
        super().__init__(f"no image can be used; the last: {next(reversed(skipped.values()), 'none')}")
        self.skipped = skipped


class Sa1b(tfds.core.GeneratorBasedBuilder):
    """Images with masks, in the features of tfds' `segment_anything`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, samples: Sequence[Sample] = (), first: int = 0, **kw: Any):
        self.samples, self.first, self.skipped = samples, first, {}
        super().__init__(**kw)

    def _info(self) -> tfds.core.DatasetInfo:
        number, text, box = tfds.features.Scalar(np.uint64), np.str_, tfds.features.BBoxFeature()
        share = tfds.features.Scalar(np.float64)
        annotation = {
            "area": number,
            "bbox": box,
            "crop_box": box,
            "id": number,
            "point_coords": tfds.features.Tensor(shape=(1, 2), dtype=np.float64),
            "predicted_iou": share,
            "segmentation": {"counts": text, "size": tfds.features.Tensor(shape=(2,), dtype=np.uint64)},
            "stability_score": share,
        }
        image = {"file_name": text, "height": np.uint64, "image_id": np.uint64, "width": np.uint64}
        features = {
            "image": {"content": tfds.features.Image(), **image},
            "annotations": tfds.features.Sequence(annotation),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, sample in enumerate(track(self.samples, "prepare"), self.first):
            try:
                yield index, record(sample, index)
            except InputError as error:
                self.skipped[sample.name] = str(error)
        if len(self.skipped) == len(self.samples):
            raise Unusable(self.skipped)


def record(sample: Sample, index: int) -> dict[str, Any]:
    """Converts a sample to the features of `segment_anything`. Its id is the number in its name, or `index`.

    Raises:
      InputError: the image or its annotations cannot be read.
    """
    content, image = sample.read(), sample.image()
    digits = re.search(r"\d+$", PurePath(sample.name).stem)
    number = int(digits.group()[-21:]) if digits else index  # more than 64 bits are left out below
    described = {
        "content": io.BytesIO(content),
        "file_name": printable(PurePath(sample.name).name),  # which may be no UTF-8, as text must be
        "height": image.height,
        "width": image.width,
        "image_id": number if number < 2**64 else index,
    }
    with reading(f"the annotation of {sample.name}"):
        rows = sample.rows(image.size[::-1])
        annotations = [_annotation(fields, i, image.size) for i, fields in enumerate(rows)]
    return {"image": described, "annotations": annotations}


def _annotation(fields: dict[str, Any], index: int, size: tuple[int, int]) -> dict[str, Any]:
    parsed = parse(fields, size[::-1])
    area = int(fields.get("area", parsed.mask.sum()))
    if not 0 <= area < 2**63:
        raise ValueError("an area that is none")
    return {
        "area": area,
        "bbox": _share(parsed.box, size),
        "crop_box": _share(parsed.crop_box, size),
        "id": parsed.id if parsed.id >= 0 else index,
        "point_coords": parsed.point[None],
        "predicted_iou": float(fields.get("predicted_iou", 0)),
        "segmentation": _segmentation(parsed),
        "stability_score": float(fields.get("stability_score", 0)),
    }


def _segmentation(parsed: Annotation) -> dict[str, Any]:
    encoded = rle.encode(parsed.mask)
    return {"counts": encoded["counts"], "size": np.array(encoded["size"], np.uint64)}


def _share(box: np.ndarray, size: tuple[int, int]) -> tfds.features.BBox:
    """Converts corners in pixels to TFDS's box, which lies within 0 and 1."""
    left, top, right, bottom = (np.clip(box / np.array([*size, *size]), 0, 1)).tolist()
    return tfds.features.BBox(ymin=top, xmin=left, ymax=bottom, xmax=right)

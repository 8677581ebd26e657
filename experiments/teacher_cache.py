"""What the teacher's cache loses by its precision: in the embedding, and in the masks that are decoded from it.

    python -m experiments.teacher_cache MODEL IMAGES --limit 20

Prints a line for each precision, and writes nothing.
"""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from converters.from_torch import load_sam
from slimsam_jax import cli, data
from slimsam_jax.compression.stored_embeddings import Layout, Precision
from slimsam_jax.evaluation.scores import agreement, relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import embedding_shapes


def main(model: Positional[Path], images: Positional[str], limit: int = 20) -> None:
    """Measure each precision on some images.

    Args:
      model: the teacher.
      images: a folder, of which the first images are taken.
      limit: how many.
    """
    sam = load_sam(model)
    encoded = [encode_image(sam, sample.image()) for sample in data.find([images])[:limit]]
    for precision in typing.get_args(Precision):
        layout = Layout(embedding_shapes(sam.config), precision)
        stored = [each._replace(embedding=layout.unpacked(layout.packed(each.embedding))) for each in encoded]
        stored = [each._replace(embedding=each.embedding.astype(np.float32)) for each in stored]
        pairs = list(zip(stored, encoded, strict=True))
        errors = [relative_error(a.embedding, b.embedding) for a, b in pairs]
        agree = [float(agreement([(sam, b), (sam, a)], 4)[1].mean()) for a, b in pairs]
        print(
            f"{precision}: {layout.bytes} bytes an image, squared error {np.mean(errors):.2e} of the variance "
            f"({max(errors):.2e} at most), agreement {100 * np.mean(agree):.3f} % ({100 * min(agree):.2f} at least)"
        )


if __name__ == "__main__":
    cli.run(main)

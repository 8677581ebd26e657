"""FastSAM in ONNX: at any frame, of any widths, the same boxes, scores, coefficients and prototypes."""

from __future__ import annotations

import numpy as np
import pytest

from converters.onnx import fast_sam
from helpers.fast_sam_models import random_fast_sam
from helpers.models import SQUARE, random_sam
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError, RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("onnx") / "fast"
    checkpoint.save(random_fast_sam(), root)
    return root


def test_the_file_gives_what_jax_gives(folder, tmp_path, capsys):
    fast_sam.main(folder, tmp_path / "new" / "fast.onnx")
    assert "largest error relative to the largest value: boxes" in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)  # neither the frame nor one image
    found = fast_sam.errors(random_fast_sam(), tmp_path / "new" / "fast.onnx", images)
    assert set(found) == set(fast_sam.OUTPUTS) and max(found.values()) < 1e-5


def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_sam, "SHORTCUTS", (2, 4, 6))
    with pytest.raises(RunError, match="differs from JAX"):
        fast_sam.write(random_fast_sam(), tmp_path / "x.onnx", np.zeros((1, 64, 64, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_what_is_refused(folder, tmp_path):
    checkpoint.save(random_sam(SQUARE), tmp_path / "sam")
    (tmp_path / "there.onnx").touch()
    for source, name, message in (
        (folder, "there.onnx", "must end in .onnx, and not exist yet"),
        (folder, "fast.pt", "must end in .onnx"),
        (tmp_path / "sam", "x.onnx", "is no FastSAM; python -m converters.to_onnx writes"),
    ):
        with pytest.raises(InputError, match=message):
            fast_sam.main(source, tmp_path / name)
    assert not (tmp_path / "x.onnx").exists()

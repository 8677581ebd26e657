"""Milliseconds of models that `slimsam quantize` has made: encoder and decoder, each beside its own in float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments import quantization_latency, results
from helpers.models import SQUARE, random_sam, tiny_config
from slimsam_jax import checkpoint, data
from slimsam_jax.errors import InputError
from slimsam_jax.quantization import Quantized
from slimsam_jax.quantization.codes import storage


@pytest.fixture()
def folders(monkeypatch, tmp_path):
    """slim77, and slim77_int4: one layer of the encoder in 4 bits."""
    monkeypatch.setattr(results, "check_committed", lambda: None)
    monkeypatch.setattr(results, "machine", dict)
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(quantization_latency, "FILE", tmp_path / "latency.jsonl")
    sam = random_sam(SQUARE)
    encoder = sam.params["image_encoder"]
    kernel = encoder["blocks_0"]["mlp_lin1"]["kernel"]
    scale = np.abs(kernel).max(0, keepdims=True) / 7
    node = Quantized(np.round(kernel / scale).astype(storage(4)), scale, bits=4)
    block = {**encoder["blocks_0"], "mlp_lin1": {**encoder["blocks_0"]["mlp_lin1"], "kernel": node}}
    small = dataclasses.replace(sam, params={**sam.params, "image_encoder": {**encoder, "blocks_0": block}})
    checkpoint.save(sam, tmp_path / "slim77")
    checkpoint.save(small, tmp_path / "slim77_int4")
    return tmp_path / "slim77", tmp_path / "slim77_int4"


def test_both_parts_are_timed_beside_float32(folders):
    model, small = folders
    where = {"calibration": str(data.embedded_images()), "rows": (), "turns": 2}
    quantization_latency.run(model, quantized=(small,), **where)
    found = {entry["row"]: entry for entry in results.read(quantization_latency.FILE)}
    assert list(found) == ["float32", "float32, decoder", "W4 (slim77_int4)", "W4 (slim77_int4), decoder"]
    assert {name: entry["kernels"] for name, entry in found.items() if entry["kernels"]} == {
        "W4 (slim77_int4)": {"MatMulNBits": 1}
    }
    assert all(found[name]["ratio"] == [1, 1, 1] for name in ("float32", "float32, decoder"))
    quantization_latency.table()
    assert "| slim77 | W4 (slim77_int4), decoder |" in (results.TABLE_FOLDER / "quantization_latency.md").read_text()
    with pytest.raises(InputError, match="slim77 is not quantised"):
        quantization_latency.run(model, quantized=(model,), **where)


def test_folders_that_cannot_be_timed_are_refused_first(folders, tmp_path, monkeypatch):
    """Before an image is read, which there is none of."""
    model, small = folders
    run = lambda *quantized: quantization_latency.run(model, "", quantized=quantized)
    with pytest.raises(InputError, match=r"two folders would be called W4 \(slim77_int4\)"):
        run(small, small)
    sam = checkpoint.load(small)
    encoder = sam.params["image_encoder"]
    node = encoder["blocks_0"]["mlp_lin1"]["kernel"]
    two = dataclasses.replace(node, range=np.ones(3, np.float32))
    block = {**encoder["blocks_0"], "mlp_lin1": {**encoder["blocks_0"]["mlp_lin1"], "kernel": two}}
    sam = dataclasses.replace(sam, params={**sam.params, "image_encoder": {**encoder, "blocks_0": block}})
    monkeypatch.setattr(quantization_latency, "load_sam", lambda path: sam)
    with pytest.raises(InputError, match="inputs of two ranges"):
        run(small)
    other = random_sam(tiny_config())
    monkeypatch.setattr(
        quantization_latency, "load_sam", lambda path: other if path == model else checkpoint.load(path)
    )
    with pytest.raises(InputError, match=r"slim77_int4 was made of another model than .*slim77: its config.json"):
        run(small)

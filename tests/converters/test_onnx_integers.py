"""Integers of weights and inputs in ONNX: what JAX computes with them, in float32 and in kernels of integers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import onnx
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from converters import to_onnx
from converters.onnx import integers, kernels
from converters.onnx.apart import Apart, check_codes, limit_of
from converters.onnx.check import MAPS, OUTPUTS, Errors, Reference, maps_of
from converters.onnx.graph import ANTIALIASED, BILINEAR, FLOAT, Graph
from helpers.family_models import SLIM_TINY_VIT, edge_sam, efficient_sam, sam2, tiny_vit_sam
from helpers.models import random_sam, tiny_config
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.models.sam import encode, folded
from slimsam_jax.quantization import Quantized
from slimsam_jax.quantization.codes import storage

CONFIG = tiny_config(image_size=(64, 64), decoder_depth=1, multimask_outputs=1)
CONFIG = dataclasses.replace(CONFIG, blocks=CONFIG.blocks[:1])
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
STATIC, SYMMETRIC, TOKENS = ([0.05, 90], [0.05, 128], [])
INSIDE = 7  # linear layers of the encoder


@pytest.fixture(scope="module")
def sam():
    return random_sam(CONFIG, 1)


def quantized(sam, span, bits=8, input_bits=8, divided=False):
    """With integers of the encoder's layers, by their largest weights; inputs with ranges but for the first layer's.

    Args:
      divided: their channels are divided first.
    """

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not path.endswith("kernel"):
            return leaf
        axes = tuple(range(leaf.ndim - 1))
        if path.split("/")[-2] in "qkv":  # a single head's axis counts as one that is summed over
            axes = tuple(axis for axis in axes if axis == 0 or leaf.shape[axis] == 1)
        scale = np.abs(np.asarray(leaf)).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)
        codes = np.round(np.asarray(leaf) / scale).astype(np.int8).astype(storage(bits))
        own = None if span is None or "patch" in path else np.array(span, np.float32)
        node = Quantized(codes, scale.astype(np.float32), own, bits, axes, input_bits)
        if own is None or not divided:
            return node
        sizes = [n if axis in (axes if leaf.ndim < 4 else (2,)) else 1 for axis, n in enumerate(leaf.shape)]
        return dataclasses.replace(node, divisor=np.linspace(0.5, 2, np.prod(sizes), dtype=np.float32).reshape(sizes))

    encoder = jax.tree_util.tree_map_with_path(one, sam.params["image_encoder"])
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})


@pytest.mark.parametrize(
    ("span", "bits", "input_bits", "suffix", "kernel", "divided"),
    [
        (STATIC, 8, 8, "_uint8", "MatMulIntegerToFloat", False),
        (SYMMETRIC, 8, 8, "_int8", "MatMulIntegerToFloat", False),
        (TOKENS, 6, 6, "_quantized", "MatMulInteger", False),
        (STATIC, 4, 8, "_q4", "MatMulNBits", False),
        (STATIC, 8, 8, "_uint8", "MatMulIntegerToFloat", True),
        (TOKENS, 6, 6, "_quantized", "MatMulInteger", True),
    ],
    ids=["static", "symmetric", "tokens of 6 bits", "4 by 8 bits", "static, divided", "tokens, divided"],
)
def test_embeddings_are_those_of_jax(span, bits, input_bits, suffix, kernel, divided, sam, tmp_path):
    own = quantized(sam, span, bits, input_bits, divided)
    encoder, _ = to_onnx.models(own, "sam", np.float32, integers=True)
    onnx.checker.check_model(encoder, full_check=True)
    check_codes(encoder.graph, own)
    onnx.save(encoder, tmp_path / "encoder.onnx")
    expected = np.asarray(encode(own.config, own.params, IMAGE, np.array([[64, 64]])))
    in_floats, opened = (kernels.Opened(tmp_path / "encoder.onnx", kind) for kind in (False, True))
    for each in (in_floats, opened):
        (embedding,) = each.run(None, {"images": IMAGE.transpose(0, 3, 1, 2)})
        saturates = each is opened and span is SYMMETRIC and not vnni()
        atol = (0.2 if saturates else 3e-6) * np.abs(expected).max()
        np.testing.assert_allclose(embedding.transpose(0, 2, 3, 1), expected, atol=atol)
    # Of signed inputs that q, k and v share, onnxruntime computes the products in float32.
    assert opened.counts == {kernel: INSIDE - 3 * (span is SYMMETRIC)}
    assert integers.suffix_of(own) == suffix
    types = {node.op_type for node in encoder.graph.node}
    assert ("QuantizeLinear" in types) == (span is not TOKENS)


def vnni() -> bool:
    """Whether the processor adds products of bytes in 32 bits; onnxruntime's of signed inputs saturate at 16 else."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def mixed(sam):
    """With an encoder of every kind of integers, one layer after the other, but for depthwise ones."""
    kinds = [flat(quantized(sam, span, bits)) for span, bits in ((None, 8), (None, 4), (STATIC, 8), (TOKENS, 8))]
    names = [path for path, leaf in flat(sam).items() if path.endswith("kernel") and leaf.shape[-2:-1] != (1,)]
    leaves = flat(sam) | {name: kind[name] for name, kind in zip(names, itertools.cycle(kinds), strict=False)}
    return dataclasses.replace(sam, params={**sam.params, "image_encoder": unflatten_dict(leaves, sep="/")})


def flat(sam):
    return flatten_dict(sam.params["image_encoder"], sep="/")


def short_tiny_vit():
    first, last = SLIM_TINY_VIT.stages
    stages = dataclasses.replace(first, blocks=first.blocks[:1]), last
    return tiny_vit_sam(dataclasses.replace(SLIM_TINY_VIT, conv_blocks=(12,), stages=stages))


@pytest.mark.parametrize("family", [short_tiny_vit, edge_sam, efficient_sam, sam2])
def test_other_families_embeddings_are_those_of_jax(family):
    """Whose batch norms are folded before, as `quantize` does it.

    SAM 2's encoder resizes with antialiasing, of an opset that has a reduction's axes as an input.
    """
    own = mixed(folded(family()))
    size = own.config.image_size
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    encoder, _ = to_onnx.models(own, "sam", np.float32, integers=True)
    onnx.checker.check_model(encoder, full_check=True)
    found = kernels.session(encoder.SerializeToString()).run(None, {"images": image.transpose(0, 3, 1, 2)})
    expected = maps_of(encode(own.config, own.params, image, np.array([size])))
    names = [MAPS[name] for name in OUTPUTS["images"][: len(found)]]
    assert set(names) == set(expected)
    for name, each in zip(names, found, strict=True):
        wanted = np.asarray(expected[name])
        errors = np.abs(each.transpose(0, 2, 3, 1) - wanted) / np.abs(wanted).max()
        # Where an input is half a step from two codes, float32's rounding decides, and few values move by little.
        assert np.median(errors) < 1e-6 and errors.max() < to_onnx.LARGEST_ERROR
    check_codes(encoder.graph, own)
    assert {"MatMulNBits", "MatMulInteger", "QuantizeLinear"} <= {node.op_type for node in encoder.graph.node}


def test_an_encoder_may_differ_by_twice_what_codes_of_inputs_change():
    """Or where they change nothing, by as much as any other graph; what decoders get behind it is JAX's."""
    reference = lambda maps: Reference(None, None, None, (), {"embedding": maps}, None, ())
    maps = np.linspace(-2, 2, 3 * 4 * 5).reshape(4, 5, 3)
    assert limit_of(reference(maps), reference(maps), 1e-3) == 1e-3
    assert limit_of(reference(maps), reference(maps + 0.2), 1e-3) == pytest.approx(0.4 / 2.2)
    found, positions = maps.transpose(2, 0, 1)[None] + 0.1, np.ones(2)
    encoder = Apart(SimpleNamespace(run=lambda names, inputs: [found, positions]), reference(maps))
    sent = encoder.run(None, {"pixel_values": maps})
    np.testing.assert_array_equal(sent[0][0].transpose(1, 2, 0), maps)
    assert sent[1] is positions
    assert encoder.completed(Errors(0.0, 0.25, 0.0, 1.0)) == Errors(pytest.approx(0.05), 0.25, 0.0, 1.0)


@pytest.mark.parametrize("fault", ["range", "weights", "decoder"])
def test_a_wrong_graph_of_quantised_inputs_is_not_kept(fault, sam, tmp_path, monkeypatch):
    """Inputs of one layer as they are, its weights or those of the decoder 1 % too large; float32 is right."""
    own, right = quantized(sam, STATIC), to_onnx.models

    def wrong(sam, layout, dtype, single, integers):
        params = flatten_dict(sam.params, sep="/")
        if fault == "range":
            path = "image_encoder/blocks_0/mlp_lin2/kernel"
            params[path] = dataclasses.replace(params[path], range=None)
        elif fault == "weights":
            path = "image_encoder/blocks_0/mlp_lin2/kernel"
            params[path] = dataclasses.replace(params[path], scale=1.01 * params[path].scale)
        else:
            (path,) = [path for path in params if path.endswith("output_upscaling_3/kernel")]
            params[path] = 1.01 * params[path]
        changed = dataclasses.replace(sam, params=unflatten_dict(params, sep="/"))
        return right(changed if integers else sam, layout, dtype, single, integers)

    monkeypatch.setattr(to_onnx, "models", wrong)
    with pytest.raises(RunError, match=r"differs from JAX.*nothing is written"):
        to_onnx.export(own, tmp_path / "out", "sam", ("integers",), Image.fromarray(IMAGE[0]))
    assert not list(tmp_path.iterdir())


def test_batch_norms_behind_integers_are_refused():
    own = quantized(tiny_vit_sam(), None)
    with pytest.raises(InputError, match="m has batch norms behind its integers: quantise the model again"):
        integers.check_integers(own, "m", ["integers"])
    integers.check_integers(quantized(folded(tiny_vit_sam()), None), "m", ["integers"])


@pytest.mark.parametrize(("how", "opset"), [(BILINEAR, 17), (ANTIALIASED, 18)], ids=["17", "18"])
def test_reductions_are_the_same_in_both_opsets(how, opset):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    g = Graph({})
    same = g.op("Resize", "x", "", "", np.array(x.shape), **how)
    found = {kind: (g.reduce(kind, same, (1, -1)), (2, 1, 4, 1)) for kind in ("ReduceMax", "ReduceMean")}
    model = g.model("m", CONFIG, {"x": (FLOAT, x.shape)}, found)
    onnx.checker.check_model(model, full_check=True)
    largest, mean = kernels.session(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_array_equal(largest, x.max((1, 3), keepdims=True))
    np.testing.assert_allclose(mean, x.mean((1, 3), keepdims=True), atol=1e-6)
    assert model.opset_import[0].version == opset


def test_a_graph_that_is_none_is_one_line(tmp_path):
    g = Graph({})
    model = g.model("m", CONFIG, {"x": (FLOAT, (1, 2))}, {"y": (g.op("Absolute", "x"), (1, 2))})
    with pytest.raises(RunError, match=r"cannot write x\.onnx"):
        to_onnx.save(model, tmp_path / "x.onnx")


@pytest.mark.parametrize("span", [[0.1, 5], [0.1, 8]], ids=["unsigned", "signed"])
def test_inputs_of_fewer_bits_are_cut_off(span):
    """Where their codes end, long before those of 8 bits do."""
    one, span = np.ones((1, 2), np.float32), np.array(span, np.float32)
    g = Graph({"w/kernel": Quantized(np.eye(2, dtype=np.int8), one, span, input_bits=4)})
    model = g.model("m", CONFIG, {"x": (FLOAT, (1, 2))}, {"y": (g.linear("x", "w"), (1, 2))})
    (found,) = kernels.session(model.SerializeToString()).run(None, {"x": np.float32([[-9, 9]])})
    np.testing.assert_allclose(found[0], [-0.1 * span[1], 0.1 * (15 - span[1])], rtol=1e-6)


def test_four_bits_beside_float16(sam, tmp_path):
    """Within what float16 itself costs."""
    own = quantized(sam, None, 4)
    encoder, _ = to_onnx.models(own, "sam", np.float16, integers=True)
    onnx.checker.check_model(encoder, full_check=True)
    expected = np.asarray(encode(own.config, own.params, IMAGE, np.array([[64, 64]])))
    (found,) = kernels.session(encoder.SerializeToString()).run(None, {"images": IMAGE.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, atol=3e-3 * np.abs(expected).max())
    with pytest.raises(InputError, match="weights of 4 bits alone"):
        integers.check_integers(quantized(sam, None), "m", ["integers_float16"])
    with pytest.raises(InputError, match="weights of 4 bits alone"):
        integers.check_integers(quantized(sam, STATIC, 4), "m", ["integers_float16"])


def test_files_of_one_name_are_refused(sam):
    with pytest.raises(InputError, match="files of one name"):
        integers.check_integers(quantized(sam, None), "m", ["int8", "integers"])
    integers.check_integers(quantized(sam, STATIC), "m", ["int8", "integers"])


def test_the_command_measures_and_says_what_is_slower(sam, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "by_turns", lambda files: [0.1, 0.101 if files[0].first else 0.3])
    monkeypatch.setattr(kernels.Opened, "first", property(lambda self: "images" in self._asked[1]), raising=False)
    to_onnx.export(quantized(sam, STATIC), tmp_path / "out", "sam", ("integers",), Image.fromarray(IMAGE[0]))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encoder_uint8.onnx", "decoder_uint8.onnx"}
    printed = capsys.readouterr().out
    assert "masks agree to" in printed and "MB" in printed
    assert f"encoder {INSIDE} MatMulIntegerToFloat; decoder none" in printed
    assert "encoder: 101.0 ms, float32 100.0 ms" in printed
    assert printed.endswith("slower than float32 here: decoder\n") and "VNNI" not in printed


def test_the_command_says_where_kernels_give_other_masks(sam, tmp_path, capsys, monkeypatch):
    """As those of signed inputs do on some processors; the graph itself is measured before, in float32."""
    whole = kernels.Opened.run
    saturated = lambda self, names, inputs: [
        np.minimum(array, 0.1 * array.max()) for array in whole(self, names, inputs)
    ]
    opened = kernels.Opened.__init__

    def init(self, path, kernels=True, counted=True):
        opened(self, path, kernels, counted)
        if kernels:
            self.run = saturated.__get__(self)

    monkeypatch.setattr(kernels.Opened, "__init__", init)
    monkeypatch.setattr(kernels, "SECONDS", 0.1)
    to_onnx.export(quantized(sam, STATIC), tmp_path / "out", "sam", ("integers",), Image.fromarray(IMAGE[0]))
    assert "without VNNI: quantise\n  with unsigned inputs" in capsys.readouterr().out


def test_time_is_taken_by_turns():
    class Fake:
        def __init__(self, *seconds):
            self.left = list(seconds)

        def seconds(self):
            order.append(self)
            return self.left.pop(0)

    order, a, b = [], Fake(*[9] * 1, *range(7)), Fake(*[0.1] * 8)
    slow = Fake(20, 20)
    assert kernels.by_turns([a, b]) == [0, 0.1]  # the first run warms up, and is so long that there is but one turn
    assert order == [a, b, a, b]
    assert kernels.by_turns([slow]) == [20]
    assert kernels.by_turns([Fake(*[0.01, 3, 1, 2, 9, 1, 2, 2])]) == [2]

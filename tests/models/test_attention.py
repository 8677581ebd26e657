"""The forms of attention compute one function: values and gradients, and against the original's arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.models import random_sam, tiny_config
from helpers.peers import segment_anything
from slimsam_jax.errors import InputError
from slimsam_jax.models import flash_attention
from slimsam_jax.models import relative_attention as attention
from slimsam_jax.models.config import GLOBAL, Block
from slimsam_jax.models.encoders.vit import ImageEncoder

SHAPES = [(2, 6, 5, 2, 7), (1, 3, 3, 4, 8), (3, 2, 7, 1, 1)]  # b, h, w, n, d: rectangles, odd widths, a single channel


def random_inputs(b: int, h: int, w: int, n: int, d: int, dtype=np.float32):
    random = np.random.default_rng(7)
    normal = lambda *shape: random.standard_normal(shape).astype(dtype)
    return (*(normal(b, h, w, n, d) for _ in range(3)), normal(2 * h - 1, d), normal(2 * w - 1, d))


def value_and_gradient(inputs, form: str):
    """Compiled anew, since the limit of "rows" is read while tracing."""
    objective = lambda inputs: (attention.attend(*inputs, form) ** 2).sum()
    return jax.jit(jax.value_and_grad(objective))(inputs)


def original(q, k, v, rel_pos_h, rel_pos_w) -> np.ndarray:
    """`segment_anything`'s attention between its projections (image_encoder.py:224-236), in float64."""
    package = segment_anything().modeling.image_encoder
    b, h, w, n, d = q.shape
    flat = lambda x: torch.from_numpy(x).double().permute(0, 3, 1, 2, 4).reshape(b * n, h * w, d)
    logits = flat(q) * d**-0.5 @ flat(k).transpose(-2, -1)
    tables = (torch.from_numpy(table).double() for table in (rel_pos_h, rel_pos_w))
    logits = package.add_decomposed_rel_pos(logits, flat(q), *tables, (h, w), (h, w))
    out = logits.softmax(-1) @ flat(v)
    return out.view(b, n, h, w, d).permute(0, 2, 3, 1, 4).numpy()


@pytest.mark.parametrize("form", ["auto", "plain", "rows", "folded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_equals_the_original(form, shape):
    inputs = random_inputs(*shape)
    np.testing.assert_allclose(attention.attend(*inputs, form), original(*inputs), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_have_the_same_gradients(shape, monkeypatch):
    inputs = random_inputs(*shape)
    expected = value_and_gradient(inputs, "plain")
    chex.assert_trees_all_close(value_and_gradient(inputs, "folded"), expected, rtol=1e-5, atol=1e-5)
    tokens = shape[1] * shape[2]
    limits = {"two heads": 2 * tokens**2, "a head": tokens**2, "four rows": 4 * shape[2] * tokens, "a row": 1}
    for limit in limits.values():
        monkeypatch.setitem(attention.LOGITS_AT_ONCE, "cpu", limit)
        chex.assert_trees_all_close(value_and_gradient(inputs, "rows"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1, 7), (2, 6, 5, 2, 7)])
def test_the_kernel_for_tpus_has_the_same_values_and_gradients(shape, monkeypatch):
    """JAX's Pallas kernel, interpreted; a width of v that is not that of q; two tiles, and part of one."""
    inputs = random_inputs(*shape)
    expected = value_and_gradient(inputs, "plain")
    monkeypatch.setattr(flash_attention, "TILE", 128)
    interpreted = functools.partial(flash_attention.splash, interpret=True)
    monkeypatch.setattr(flash_attention, "attend", interpreted)
    for ours, theirs in zip(*map(jax.tree.leaves, (value_and_gradient(inputs, "folded"), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    half = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    error = np.abs(attention.attend(*half, "folded").astype(np.float32) - original(*inputs)).mean()
    assert 0 < error < 0.03 * np.abs(original(*inputs)).mean()


def test_what_the_kernel_for_tpus_takes(monkeypatch):
    device = type("Device", (), {"platform": "tpu"})
    mesh = type("Mesh", (), {"size": 4})
    inputs = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    choice = lambda *q, mesh=None: attention.choose("auto", inputs(*q), mesh)
    monkeypatch.setattr(attention.sharding, "_target", (device,))
    assert choice((1, 64, 64, 12, 64)) == "folded"
    assert choice((1, 64, 64, 12, 64), jnp.float32) == "rows"  # the kernel would multiply in fewer bits
    assert choice((25, 14, 14, 12, 64)) == "folded"  # 196 tokens are filled up to whole tiles
    monkeypatch.setattr(attention.sharding, "_target", (device,) * 4)
    assert choice((4, 64, 64, 12, 64), mesh=mesh) == "folded"
    assert choice((4, 64, 64, 12, 64)) == choice((2, 64, 64, 12, 64), mesh=mesh) == "rows"
    with pytest.raises(InputError, match="folded cannot run on this TPU: 2 images are not split evenly over the 4"):
        attention.choose("folded", inputs((2, 64, 64, 12, 64)), mesh)


def test_large_logits_do_not_overflow():
    q, k, v, *tables = random_inputs(1, 3, 3, 1, 4)
    inputs = (1e3 * q, 1e3 * k, v, *tables)
    for form in ("plain", "rows", "folded"):
        np.testing.assert_allclose(attention.attend(*inputs, form), original(*inputs), atol=1e-5)


def test_float64_is_computed_in_float64(monkeypatch):
    with jax.enable_x64(True):
        inputs = random_inputs(*SHAPES[0], np.float64)
        monkeypatch.setitem(attention.LOGITS_AT_ONCE, "cpu", 1)
        for form in ("auto", "plain", "rows"):
            np.testing.assert_allclose(attention.attend(*inputs, form), original(*inputs), atol=1e-13)


@pytest.mark.parametrize("form", ["plain", "rows", "folded"])
def test_half_precision_is_near(form):
    inputs = random_inputs(*SHAPES[0])
    half = attention.attend(*(jnp.asarray(x, jnp.bfloat16) for x in inputs), form)
    assert half.dtype == jnp.bfloat16
    error = np.abs(half.astype(np.float32) - original(*inputs)).mean()
    assert 0 < error < 0.03 * np.abs(original(*inputs)).mean()


def test_the_encoder_takes_a_form():
    """Window padding, a rectangular grid and different widths per block included."""
    config = dataclasses.replace(tiny_config(), blocks=(Block(2, 5, 11, 3), Block(2, 7, 23, GLOBAL)))
    encoder = {"params": random_sam(config).params["image_encoder"]}
    images = np.random.default_rng(0).standard_normal((2, *config.image_size, 3)).astype(np.float32)
    plain, *others = (
        ImageEncoder(config, attention=form).apply(encoder, images)[0] for form in ("plain", "rows", "folded")
    )
    chex.assert_trees_all_close(*others, plain, atol=1e-5)
    with pytest.raises(InputError, match="attention 'flash' is none of auto, plain, rows, folded"):
        ImageEncoder(config, attention="flash").apply(encoder, images)


SHARDED = """
import re, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from slimsam_jax.models import relative_attention as attention
attention.LOGITS_AT_ONCE["cpu"] = 2000
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
place = lambda shape, *axes: jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, PartitionSpec(*axes)))
images = [place((8, 6, 5, 2, 7), "data") for _ in range(3)]
for form in sys.argv[1:]:
    inputs = (*images, place((11, 7)), place((9, 7)), form)
    compiled = jax.jit(attention.attend, static_argnums=5).lower(*inputs).compile()
    print(form, re.findall("all-[a-z]+|collective-permute", compiled.as_text()))
"""


def test_nothing_moves_between_devices():
    """Images are split over four devices, in a process of its own, and attention needs none of another device's."""
    command = [sys.executable, "-c", SHARDED, "plain", "rows", "folded"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == "plain []\nrows []\nfolded []\n"


def test_auto_keeps_all_logits_only_where_they_are_few(monkeypatch):
    q = jax.ShapeDtypeStruct(SHAPES[0], jnp.float32)
    assert attention.choose("auto", q) == "plain"
    monkeypatch.setitem(attention.LOGITS_AT_ONCE, "cpu", 100)
    assert attention.choose("auto", q) == "rows"


def test_only_a_batch_that_is_split_takes_the_logits_of_many_devices(monkeypatch):
    """Eight images on one of eight devices are not split over them, as the predictor's are not."""
    device, mesh = type("Device", (), {"platform": "cpu"}), type("Mesh", (), {"size": 8})
    monkeypatch.setattr(attention.sharding, "_target", (device,) * 8)
    monkeypatch.setitem(attention.LOGITS_AT_ONCE, "cpu", 8 * 2 * 30**2 // 8)  # those of one image
    q, table = jax.ShapeDtypeStruct((8, 6, 5, 2, 7), jnp.float32), jax.ShapeDtypeStruct((6, 6, 7), jnp.float32)
    assert [attention.choose("auto", q, each) for each in (None, mesh)] == ["rows", "plain"]
    sizes, evenly = [], attention.evenly
    monkeypatch.setattr(attention, "evenly", lambda total, most: sizes.append(most) or evenly(total, most))
    for each in (None, mesh):
        other = jax.ShapeDtypeStruct((5, 5, 7), jnp.float32)
        jax.eval_shape(functools.partial(attention.by_rows, mesh=each), q, q, q, table, other)
    assert sizes == [1, 0, 12, 2]  # rows of 8 images, and heads


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "obstacle"),
    [
        ("9.0", jnp.bfloat16, 64, ""),
        ("8.0", jnp.bfloat16, 64, "192 channels per head"),
        ("8.0", jnp.float16, 0, ""),
        ("9.0", jnp.float32, 64, "not float32"),
        ("7.5", jnp.bfloat16, 64, "capability 8.0, not '7.5'"),
        ("gfx90a", jnp.bfloat16, 64, "not 'gfx90a'"),
        ("10.0", jnp.bfloat16, 64, ""),
        ("10.3", jnp.bfloat16, 64, "needs cuDNN 9.11"),
    ],
)
def test_flash_attention_is_used_where_it_can_run(monkeypatch, capability, dtype, width, obstacle):
    """What cuDNN takes, as jax documents it; the kernel itself needs a GPU."""
    device = type("Device", (), {"platform": "gpu", "compute_capability": capability})
    monkeypatch.setattr(attention.sharding, "_target", (device,))
    monkeypatch.setattr(flash_attention, "_cudnn_version", lambda: 91002)
    q = jax.ShapeDtypeStruct((1, 64, 64, 12, width), dtype)
    assert attention.choose("rows", q) == "rows"
    assert attention.choose("auto", q) == ("rows" if obstacle else "folded")
    if obstacle:
        with pytest.raises(InputError, match=obstacle):
            attention.choose("folded", q)
    else:
        assert attention.choose("folded", q) == "folded"

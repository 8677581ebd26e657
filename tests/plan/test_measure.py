"""Counting operations, reading a compiler's complaint, and looking for the largest batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from slimsam_jax import sharding
from slimsam_jax.plan.early import Memory
from slimsam_jax.plan.hardware import CHIPS, Hardware
from slimsam_jax.plan.measure import expected, largest, needs_of, used
from slimsam_jax.plan.operations import flops
from slimsam_jax.plan.programs import Program

A, B = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
ONE = 2 * 4 * 8 * 16  # operations of a product of theirs


def of(function, *inputs) -> int:
    return flops(jax.make_jaxpr(function)(*inputs).jaxpr)


def test_loops_and_branches_are_counted():
    assert of(jnp.matmul, A, B) == ONE
    assert of(jax.jit(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(5))), A, B) == 5 * ONE
    branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: (a[:1] @ b).sum())
    assert of(branches, A, B) == ONE


def test_what_is_computed_again_for_the_backward_pass_is_counted_again():
    step = lambda keep: jax.grad(lambda a, b: (keep(lambda a, b: jnp.sin(a @ b))(a, b) ** 2).sum())
    assert of(step(lambda f: f), A, B) == 2 * ONE  # forward, and back to a
    assert of(step(jax.checkpoint), A, B) == 3 * ONE


def test_what_each_device_does_is_counted_for_all():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    spec = PartitionSpec(mesh.axis_names)
    own = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert of(own, A, B) == ONE * mesh.size


def test_a_kernel_of_cudnn_is_counted_without_being_there(monkeypatch):
    """Its equation is made of shapes; that it can be made at all here stands for the GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    q = jax.ShapeDtypeStruct((2, 64, 3, 16), jnp.bfloat16)
    for name in ("check_compute_capability", "check_cudnn_version"):
        monkeypatch.setattr(kernels, name, lambda *_: 92800)
    attend = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn").astype(jnp.float32).sum()
    product = 2 * 2 * 3 * 64 * 64 * 16
    assert of(attend, q) == 2 * product
    assert of(jax.grad(attend), q) == (2 + 5) * product


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000])
def test_the_largest_that_fits_takes_few_tries(limit):
    tries = []
    fits = lambda n: tries.append(n) or n <= limit
    assert largest(fits) == limit
    assert len(tries) == len(set(tries)) <= 2 * np.log2(limit + 2) + 3


@pytest.mark.parametrize(("guess", "tries"), [(100, 5), (101, 8), (90, 11), (9000, 16), (2, 15), (None, 15)])
def test_a_guess_saves_tries(guess, tries):
    """Of 100 that fit, guessed at once, or one too many, too few, far off, or not at all."""
    asked = []
    assert largest(lambda n: asked.append(n) or n <= 100, 4096, lambda: guess) == 100
    assert len(asked) == len(set(asked)) == tries


@pytest.mark.parametrize("guess", [None, 5, 6, 7, 20])
@pytest.mark.parametrize(("before", "recomputed"), [(6, 8), (3, 4), (1, 2), (0, 2)])
def test_what_fits_again_once_blocks_are_recomputed(before, recomputed, guess):
    """Of images that keep everything few fit, of those whose blocks are computed again in the backward pass 20."""
    assert largest(lambda n: n <= (before if n < recomputed else 20), 4096, lambda: guess) == 20


def test_what_should_fit_if_each_takes_the_same():
    assert expected({1: 50, 2: 60}, 100) == 6
    assert expected({1: 50, 2: 60}, 99) == 5
    assert expected({1: 50}, 100) is None and expected({1: 50, 2: 50}, 100) is None


@pytest.mark.parametrize("guess", [None, 10**6])
def test_no_more_than_the_most_is_tried(guess):
    assert largest(lambda n: n <= 10**6, 40, lambda: guess) == 40


def test_what_the_compiler_would_have_needed():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.09G of 15.75G hbm. Exceeded by 4.34G."
    assert used(said) == int(20.09 * 2**30)
    assert used("RESOURCE_EXHAUSTED: for some other reason") is None


@pytest.mark.parametrize(
    ("chip", "precision", "peak"),
    [("h100", "bfloat16", 989), ("h100", "float32", 495), ("h100", "exact", 67), ("v5e", "float32", 197)],
)
def test_the_arithmetic_s_peak_is_that_of_its_precision(chip, precision, peak):
    program = Program("encode", "encode", None, (), 1, 0, precision=precision)
    needs = needs_of(program, Hardware(chip, CHIPS[chip], ()), 1e15, "", Memory(0, 0, 0, 0))
    assert needs.roofline_seconds == pytest.approx(1e3 / peak)

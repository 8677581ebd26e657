"""Targets that are kept in memory are those that a step would compute."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.images import samples
from helpers.models import SQUARE, random_sam
from slimsam_jax.compression import targets, trainer
from slimsam_jax.compression.loss_terms import terms
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.steps import Augment, Distill
from slimsam_jax.imaging.transforms import resize_and_pad
from slimsam_jax.models.sam import run_encoder


def a_run(material, **changes):
    images = samples(sorted((material / "images").iterdir()))
    fields = {"teacher": random_sam(SQUARE), "images": images, "batch": 2, "cache": None}
    fields |= {"dtype": jnp.float32, "options": Options()}
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize("align", ["bottleneck", "stream"])
def test_they_are_those_that_a_step_computes(material, align):
    step = Distill(align)
    run, previous = a_run(material), random_sam(SQUARE, 1)
    known = targets.Targets(run, step, previous, sorted(terms(step, 0, 10)))
    frames, sizes = zip(*(resize_and_pad(s.image(), SQUARE.image_size) for s in run.images[:2]), strict=True)
    batch = {"image": np.stack(frames), "size": np.stack(sizes)}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(known, run.images[:2]))
    frozen = {"teacher": run.teacher.params["image_encoder"], "previous": previous.params["image_encoder"]}
    encode = functools.partial(run_encoder, dtype=jnp.float32)
    of = jax.jit(functools.partial(trainer._target_features, encode, SQUARE, SQUARE, step))
    found, wanted = of({}, {**batch, "targets": stacked}), of(frozen, batch)
    assert set(found) == set(terms(step, 0, 10))
    for name, trees in found.items():
        for one, other in zip(jax.tree.leaves(trees), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_each_is_computed_once(material, monkeypatch):
    run = a_run(material)
    known = targets.Targets(run, Distill("stream+embedding"), run.teacher, ["embedding"])
    computed, compute = [], known._compute
    monkeypatch.setattr(known, "_compute", lambda sample: computed.append(sample) or compute(sample))
    assert known(run.images[0]) is known(run.images[0])
    assert computed == run.images[:1] and known.bytes_per_image() == known(run.images[0])["embedding"].nbytes


def test_they_are_kept_where_that_saves_work(material, monkeypatch):
    def kept(run, steps=6, **augment):
        step = Distill("stream+embedding", augment=Augment(**augment))
        return targets.remembered(run, step, steps, run.teacher, ["embedding"]) is not None

    run = a_run(material)
    room = 6 * 4 * 4 * SQUARE.out_chans * 4
    monkeypatch.setattr(targets, "ROOM", room)
    assert kept(run)
    assert not kept(run, steps=3)  # each image comes once
    for change in ({"flip": True}, {"crop": 0.5}):
        assert not kept(run, **change)
    monkeypatch.setattr(targets, "ROOM", room - 1)
    assert not kept(run)
    monkeypatch.setattr(targets, "ROOM", room)
    monkeypatch.setattr(targets.sharding, "device_count", lambda: 2)
    assert not kept(run)

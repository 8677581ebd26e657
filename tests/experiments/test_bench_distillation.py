"""Both sides of the benchmark of a training step take steps of the same loss."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest
import torch
import tyro

from experiments.bench import distillation, distillation_original, turns
from helpers.peers import segment_anything


@pytest.fixture()
def options():
    segment_anything()
    return distillation.Options(student="efficient_sam_ti", images=2, batch=2, image_size=32)


def test_both_learn_what_they_are_given(options):
    """An error relative to the variance begins near 1 where nothing is known, whatever the scale; and it falls."""
    for run in (
        distillation.our_step(options, jnp.float32),
        distillation_original.distillation(options, torch.device("cpu")),
    ):
        losses = [run() for _ in range(4)]
        assert 0.9 < losses[0] < 2.5 and losses[-1] < losses[0] - 0.01


def test_a_turn(options, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process, which other tests share
    assert tyro.cli(distillation.Options, args=turns.flags(options)) == options
    distillation.main(tyro.cli(distillation.Options, args=[*turns.flags(options), "--side=torch"]))
    turn = json.loads(capsys.readouterr().out)
    assert turn["seconds"] > 0 and turn["where"].endswith("fp32")

"""PyTorch's side of the families' benchmark is the originals' encoders, and its turn is counted."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import tyro

from experiments.bench import families, families_original, turns
from helpers.shared import shared


@pytest.mark.parametrize(("file", "heads"), [("tiny_vit_sam", None), ("efficient_sam", 3), ("edge_sam", None)])
def test_modules_are_the_originals(file, heads):
    with np.load(shared(f"golden/{file}.npz")) as arrays:
        state = {name[17:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("sd/image_encoder.")}
        image, wanted = torch.from_numpy(arrays["preprocessed"]), arrays["image_embedding"]
    image = image.reshape(1, *image.shape[-3:])
    module = families_original.build(state, image.shape[-1], heads).eval()
    known = module.state_dict().keys()
    assert {name for name in state if name not in known} <= {n for n in state if n.startswith(("head.", "norm_head."))}
    module.load_state_dict({name: state[name] for name in known})
    with torch.no_grad():
        for found in (module(image), families_original.fused(module)(image)):
            np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_published_shapes_are_those_of_our_presets():
    """The counts of both sides' parameters."""
    for preset, count in (("vit_t", 5_743_892), ("efficient_sam_ti", 6_163_840), ("rep_vit_m1", 5_517_552)):
        module = families_original.encoder(preset, 64)
        assert sum(parameter.numel() for parameter in module.parameters()) == count


def test_a_turn(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process, which other tests share
    options = families.Options("rep_vit_m1", images=1, image_size=64, fused=True)
    assert tyro.cli(families.Options, args=turns.flags(options)) == options
    families.main(tyro.cli(families.Options, args=[*turns.flags(options), "--side=torch"]))
    turn = json.loads(capsys.readouterr().out)
    assert turn["seconds"] > 0 and "fused" in turn["where"]


def test_every_preset_has_its_encoder():
    presets = get_args(get_type_hints(families.Options)["preset"])
    assert len(presets) == 4 and all(families.family_of(preset).PRESETS[preset] for preset in presets)

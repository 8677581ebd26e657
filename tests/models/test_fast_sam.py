"""FastSAM's network against arrays of the original, layer by layer; its architecture as data; its counts.

The vectors are in the shared material; a part of them, with the weights of five layers, is in tests/golden.
"""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import fast_sam as table
from helpers import golden_fast_sam as golden_arrays
from helpers.fast_sam_models import TINY
from helpers.golden_fast_sam import thinned
from helpers.shared import shared
from slimsam_jax.models import fast_sam
from slimsam_jax.models.fast_sam import Config, Network, Outputs, Stage, decode
from slimsam_jax.models.fast_sam_config import MOST_BLOCKS, PRESETS, config_of, scaled
from slimsam_jax.profiling.fast_sam_costs import macs_of, parameters_of

COUNTED = json.loads(golden_arrays.COUNTS.read_text())
NAMES = {"fast_sam_s": (0.33, 0.5, 1024), "fast_sam_x": (1, 1.25, 512)}
CONFIG = scaled(0.33, 0.25, 1024, image_size=192)


@pytest.fixture(scope="module", params=["subset", "whole"])
def golden(request):
    """(arrays, parameters): of the subset, where weights are missing, zeros."""
    if request.param == "whole":
        with np.load(shared("golden/fast_sam.npz")) as stored:
            arrays = dict(stored)
        state = {name[3:]: array for name, array in arrays.items() if name.startswith("sd/")}
    else:
        arrays, shapes = golden_arrays.subset(), fast_sam.abstract_params(CONFIG)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        state = table.to_state_dict(CONFIG, zeros)
        state |= {name[3:]: array for name, array in arrays.items() if name.startswith("sd/")}
    return arrays, table.from_state_dict(state, image_size=192)


@pytest.fixture(scope="module")
def computed(golden):
    """Outputs and {golden name: array in the original's layout}; one program for both sets of arrays."""
    arrays, (config, params) = golden
    pixels = arrays["letterboxed_bgr_uint8"][None, ..., ::-1].astype(np.float32) / 255
    return run(config, params, pixels)


@jax.jit
def everything_of(params, pixels):
    (outputs, given), kept = Network(CONFIG).apply(
        {"params": params}, pixels, capture_intermediates=True, mutable=["intermediates"]
    )
    return outputs, given, kept["intermediates"]["prototypes"]["upsample"]["__call__"][0], decode(outputs)


def run(config: Config, params, pixels) -> dict[str, np.ndarray]:
    assert config == CONFIG
    outputs, given, upsampled, decoded = everything_of(params, pixels)
    first = lambda array: np.moveaxis(np.asarray(array), -1, 1)
    found = {f"layer/{number}": first(array) for number, array in given.items()}
    found |= {"layer/proto.upsample": first(upsampled), "raw/prototypes": first(outputs.prototypes)}
    for level, pair in enumerate(zip(outputs.boxes, outputs.scores, strict=True)):
        found[f"raw/{level}"] = first(jnp.concatenate(pair, axis=-1))
    rows = [array.reshape(1, -1, 32) for array in outputs.coefficients]
    return found | {"raw/mask_coefficients": first(jnp.concatenate(rows, axis=1)), "decoded": first(decoded)}


def test_every_layer_is_the_original_s(golden, computed):
    arrays, _ = golden
    whole = "layer/21" in arrays
    names = [name for name in arrays if name in computed and (whole or name.startswith("layer/"))]
    assert len(names) == (14 + 7 if whole else 4)
    for name in sorted(set(names) - {"decoded"}):
        found = computed[name] if whole else thinned(name, computed[name])
        np.testing.assert_allclose(found, arrays[name], atol=1e-3, err_msg=name)
        assert np.abs(found - arrays[name]).mean() < 2e-5, name


def test_boxes_scores_and_coefficients(golden, computed):
    """Decoded from the original's logits, and of the whole file from its image on."""
    arrays, _ = golden
    last = lambda array: np.moveaxis(array, 1, -1)
    levels = [last(arrays[f"raw/{level}"]) for level in range(3)]
    counts = np.cumsum([level[0, ..., 0].size for level in levels])[:-1]
    coefficients = [
        rows.reshape(*level.shape[:3], 32)
        for rows, level in zip(np.split(last(arrays["raw/mask_coefficients"]), counts, axis=1), levels, strict=True)
    ]
    outputs = Outputs(tuple(a[..., :64] for a in levels), tuple(a[..., 64:] for a in levels), tuple(coefficients), None)
    found = [np.moveaxis(np.asarray(decode(outputs)), -1, 1)]
    if "layer/21" in arrays:
        found.append(computed["decoded"])
    whole = arrays["decoded"].shape == found[0].shape
    for array in found:
        error = np.abs((array if whole else thinned("decoded", array)) - arrays["decoded"])[0]
        assert error[:4].max() < 2e-3 and error[4].max() < 1e-4 and error[5:].max() < 1e-3


def test_what_inference_runs_is_folded_and_equal(golden, computed):
    """`detect` folds by itself, or is given what is."""
    arrays, (config, params) = golden
    images = arrays["letterboxed_bgr_uint8"][None, ..., ::-1]
    decoded, prototypes = (np.moveaxis(np.asarray(a), -1, 1) for a in fast_sam.detect(config, params, images))
    wanted = {"decoded": computed["decoded"], "prototypes": computed["raw/prototypes"]}
    for expected in (wanted, {name: arrays.get(f"fused/{name}", wanted[name]) for name in wanted}):
        error = np.abs(decoded - expected["decoded"])[0]
        assert error[:4].max() < 2e-3 and error[4].max() < 1e-4 and error[5:].max() < 1e-3
        np.testing.assert_allclose(prototypes, expected["prototypes"], atol=1e-3)
    folded = fast_sam.folded(fast_sam.FastSam(config, params))
    assert not folded.config.batch_norm and fast_sam.folded(folded) is folded
    wanted = jax.tree.map(lambda leaf: leaf.shape, fast_sam.abstract_params(folded.config))
    assert jax.tree.map(lambda leaf: leaf.shape, folded.params) == wanted


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_the_original_s_to_the_digit(name):
    counted, config = COUNTED[name], PRESETS[name]
    assert scaled(*NAMES[name]) == config
    assert parameters_of(config) == counted["params"]
    assert parameters_of(dataclasses.replace(config, batch_norm=False)) == counted["params_fused"]
    assert macs_of(config) == counted["macs"]
    widths = {**dict(zip(fast_sam.CONVS, config.convs, strict=True)), 9: config.pool[-1]}
    widths |= {number: stage.out for number, stage in zip(fast_sam.STAGES, config.stages, strict=True)}
    given = {int(number): shape[0] for number, shape in counted["layer_output_chw"].items()}
    assert widths == {number: given[number] for number in widths}


def test_widths_are_read_off_the_arrays():
    assert config_of(fast_sam.abstract_params(TINY), 64) == TINY
    assert config_of(fast_sam.abstract_params(dataclasses.replace(TINY, batch_norm=False)), 64).batch_norm is False
    with pytest.raises(ValueError, match=r"not the parameters of a FastSAM: .prototypes."):
        config_of({})


def test_an_architecture_is_json():
    assert Config.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


STAGE = {"first": 4, "second": 4, "blocks": [[4, 4]], "out": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 65}, "a multiple of 32 up to 8192"),
        ({"image_size": [64, 64]}, "is one side in pixels"),
        ({"image_size": 1 << 40}, "is one side in pixels"),
        ({"convs": [8] * 6}, "convs of a FastSAM must be 1 x 7 widths"),
        ({"pool": [8, 0]}, "pool 0 is no whole number"),
        ({"boxes": [[8, 8]] * 2}, "boxes of a FastSAM must be 3 x 2 widths"),
        ({"prototypes": 8}, "prototypes is a list, not 8"),
        ({"stages": [STAGE] * 7}, "a FastSAM has 8 stages"),
        ({"stages": [{**STAGE, "blocks": [[4, 4]] * (MOST_BLOCKS + 1)}] * 8}, "a stage has 1 to 64 blocks"),
        ({"stages": [{**STAGE, "blocks": []}] * 8}, "a stage has 1 to 64 blocks"),
        ({"stages": [{**STAGE, "blocks": [[4, 5]]}] * 8}, "layer 2: residual blocks of another width"),
        ({"stages": [{**STAGE, "more": 1}] * 8}, "not an architecture of slimsam_jax"),
        ({"stages": 5}, "not an architecture of slimsam_jax"),
        ({"batch_norm": 1}, "batch_norm 1 is neither true nor false"),
        ({"more": 1}, "not an architecture of slimsam_jax"),
    ],
)
def test_what_is_no_architecture(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.from_json({**json.loads(json.dumps(TINY.to_json())), **changes})


def test_stages_check_themselves():
    with pytest.raises(ValueError, match="first 0 is no whole number"):
        Stage(0, 4, ((4, 4),), 8)

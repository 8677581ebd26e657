"""What a recipe begins with: presets, models and the teacher as a student's architecture and first weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from converters import from_torch
from helpers.family_models import efficient_sam
from helpers.models import SQUARE, UNEVEN, random_sam
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.compression.recipes import RECIPES, mobile_sam
from slimsam_jax.compression.steps import Initialize
from slimsam_jax.compression.student import resolved, where_they_agree
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import preset
from slimsam_jax.models.encoders import FAMILIES, name_of, presets


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_preset_gives_what_a_head_takes(name):
    config = preset("small")
    encoder = presets.encoder(name, config)
    assert (encoder.image_size, encoder.grid, encoder.out_chans) == ((256, 256), config.grid, config.out_chans)


def test_presets_are_of_all_families_and_small_ones_alike():
    names = [name for name in presets.NAMES if name.endswith("_small")]
    of_one_map = {name for name, family in FAMILIES.items() if not hasattr(family, "embedding_shapes")}
    assert {name_of(presets.encoder(name, preset("small"))) for name in names} == of_one_map


def test_what_is_no_student_of_a_teacher_is_refused():
    with pytest.raises(InputError, match="there is no preset 'vit_x'; there are vit_t, "):
        resolved(mobile_sam.RECIPE, "vit_x", SQUARE)
    with pytest.raises(InputError, match="vit_b brings along SAM's own head"):
        resolved(mobile_sam.RECIPE, "vit_b", efficient_sam().config)


def test_a_student_no_smaller_than_its_teacher_is_named(material, tmp_path, capsys):
    """Before anything is written; not where a recipe goes on with the teacher's encoder, or the student is smaller."""
    said = "no fewer than the teacher's 0.08 M: --student tiny_vit_small gives a smaller one"
    sam = from_torch.load(material / "teacher")
    for name, model, larger in (("same", SQUARE, True), ("uneven", UNEVEN, False)):
        checkpoint.save(random_sam(model), tmp_path / f"{name} student")
        how = {"recipe": "mobile_sam", "set": (), "student": tmp_path / f"{name} student"}
        prepare(compress_options(material, tmp_path / name, **how), sam, None, random_sam(model))
        out = capsys.readouterr().out
        assert (said in out) == larger, out
    prepare(compress_options(material, tmp_path / "cut"), sam)
    assert said not in capsys.readouterr().out


def test_a_student_takes_the_place_of_the_recipe_s():
    first, distill = resolved(mobile_sam.RECIPE, random_sam(UNEVEN), SQUARE)
    assert first.encoder == UNEVEN and distill is mobile_sam.RECIPE[1]
    assert name_of(resolved(mobile_sam.RECIPE, None, SQUARE)[0].encoder) == "tiny_vit"
    with pytest.raises(InputError, match="--student is for recipes that begin with another encoder"):
        resolved(RECIPES["default"], "vit_t", SQUARE)
    assert resolved((Initialize(),), None, SQUARE) == (Initialize(),)


def test_arrays_of_the_same_name_and_shape_are_taken(capsys):
    ours, theirs = ({"a": {"b": np.zeros(n) + n, "c": np.zeros(1) + n}} for n in (2, 3))
    found = where_they_agree(ours, {**theirs, "d": np.zeros(2)})
    assert found["a"]["c"] == 3 and found["a"]["b"] is ours["a"]["b"] and set(found) == {"a"}
    assert "1 of its 2 arrays" in capsys.readouterr().out


def test_mobile_sam_into_a_model_of_another_shape(material, tmp_path, unmeasured):
    """The encoder begins as that model's and learns; prompt encoder and decoder are the teacher's to the bit."""
    student = random_sam(UNEVEN, 1)
    checkpoint.save(student, tmp_path / "student")
    choices = {
        "recipe": "mobile_sam",
        "student": tmp_path / "student",
        "set": ("distill.validations=1",),
    }
    slim = compress_with(compress_options(material, tmp_path / "slim", **choices, steps=1)).sam
    teacher = checkpoint.load(material / "teacher")
    assert slim.config.encoder == UNEVEN and "sha256" in slim.provenance["student"]
    for part in ("prompt_encoder", "mask_decoder"):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, slim.params[part], teacher.params[part])))
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), slim.params["image_encoder"], student.params["image_encoder"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # two steps of at most 0.002 each
    with pytest.raises(InputError, match="this recipe cuts nothing"):
        compress_with(compress_options(material, tmp_path / "other", **choices, ratio=0.5))
    assert not (tmp_path / "other").exists()

"""The programs of a plan are those of a run: the same functions, on the shapes that a run's arrays have."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import SQUARE, random_sam
from slimsam_jax import sharding
from slimsam_jax.compression import trainer, widths
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.plan import planned
from slimsam_jax.compression.prune import MASKED_BELOW
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Distill, Prune
from slimsam_jax.compression.student import resolved
from slimsam_jax.errors import InputError
from slimsam_jax.models import config as plain
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.encoders import presets
from slimsam_jax.models.sam import encoder_for
from slimsam_jax.plan.programs import How, abstract, cut, programs
from slimsam_jax.plan.run import hours
from slimsam_jax.profiling import sam_costs

HOW = How(4, jnp.float32, 1, 1, "auto", 100)


def listed(recipe, config=SQUARE, how=HOW, only=()):
    counts = [10 if hasattr(step, "optimizer") else 0 for step in recipe]
    return list(programs(planned(recipe, counts), config, Target(0.5), how, only))


def test_the_default_recipe():
    found = {each.name: each for each in listed(RECIPES["default"])}
    assert list(found) == [
        "prune-embedding: statistics of the stream",
        "prune-bottleneck: statistics of heads",  # and of MLPs: of a small model by the same program
        "distill",
        *(f"{kind}: the {model}" for kind in ("evaluate", "encode") for model in ("teacher", "slim model")),
    ]
    assert sam_costs.encoder_macs(SQUARE).total < MASKED_BELOW
    assert found["distill"].calls == 10 and found["distill"].images == 4
    assert found["prune-embedding: statistics of the stream"].calls == 96  # multiples of 8


@pytest.mark.parametrize(("dtype", "distilled", "encoded"), [("bfloat16",) * 3, ("float32", "float32", "exact")])
def test_products_are_as_precise_as_the_run_asks_for(dtype, distilled, encoded):
    """Of float32 encoders and moments in all bits, of gradients as an accelerator does by default."""
    how = HOW._replace(dtype=jnp.dtype(dtype))
    precise = lambda recipe: {each.kind: each.precision for each in listed(RECIPES[recipe], how=how)}
    others = {"distill": distilled, "evaluate": "exact", "encode": encoded}
    assert precise("default") == {"prune": "exact"} | others
    assert precise("taylor") == {"prune": "float32"} | others


def test_what_learns_beside_integers_is_refused():
    with pytest.raises(InputError, match="distill-2, beside integers, is not planned: take --recipe default"):
        listed(RECIPES["integers"], only=("distill",))


def test_a_large_model_has_a_program_of_its_own_for_mlps():
    names = [each.name for each in listed(RECIPES["default"][:2], plain.preset("vit_b", 512))]
    assert "prune-bottleneck: statistics of MLPs" in names


def test_the_paper_distils_twice_each_time_against_the_model_before_the_cut():
    found = [each for each in listed(RECIPES["taylor"]) if each.kind == "distill"]
    frozen = [each.args[1]["previous" if "previous" in each.args[1] else "teacher"] for each in found]
    assert [tree["pos_embed"].shape[-1] for tree in frozen] == [24, 12]
    shapes = [each.args[0].params["image_encoder"]["blocks_0"]["mlp_lin1"]["kernel"].shape for each in found]
    assert shapes == [(12, 40), (12, 20)]


def test_a_trainer_of_shapes_is_the_trainer_of_arrays():
    config = cut(cut(SQUARE, Prune("embedding"), Target(0.5)), Prune("bottleneck"), Target(0.5))
    real = trainer.make_trainer(*(random_sam(each) for each in (config, SQUARE, SQUARE)), Distill(), jnp.bfloat16)
    shapes = trainer.make_trainer(*(abstract(each) for each in (config, SQUARE, SQUARE)), Distill(), jnp.bfloat16)
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype), leaf.sharding), tree)
    for name in ("state", "frozen"):
        assert described(getattr(shapes, name)) == described(getattr(real, name))
    assert sharding.is_abstract(shapes.frozen) and not sharding.is_abstract(real.frozen)


@pytest.mark.parametrize(("kind", "amount"), [("params", 25e6), ("macs", 120e9)])
def test_a_budget_is_met_by_what_is_planned(kind, amount):
    """As by the cut itself: bottlenecks take up what the embedding leaves."""
    target = Target(budget=Budget(kind, amount))
    config = plain.preset("vit_b")
    for step in RECIPES["default"][:2]:
        config = cut(config, step, target)
    assert target.budget.cost(config) == pytest.approx(amount, rel=0.01)
    assert len({(block.head_dim, block.mlp_dim) for block in config.blocks}) <= 4  # alike but for what is left


def test_planned_widths_are_those_of_the_choices():
    embedding, bottleneck = RECIPES["default"][:2]
    whole = plain.preset("vit_b")
    eights = [dataclasses.replace(step, round_to=8) for step in (embedding, bottleneck)]
    config = cut(cut(whole, eights[0], Target(0.77)), eights[1], Target(0.77))
    assert not any(width % 8 for block in config.blocks for width in (block.head_dim, block.mlp_dim))
    uniform = cut(cut(whole, embedding, Target(0.77)), bottleneck, Target(0.77), uniform=True)
    assert uniform.uniform
    assert uniform.blocks[0].mlp_dim == widths.stock_mlp_dim(uniform.embed_dim, uniform.blocks[0].mlp_dim)
    published = plain.preset("vit_p77")
    slim = whole
    for step in RECIPES["slimsam"]:
        slim = cut(slim, step, Target(0.77)) if isinstance(step, Prune) else slim
    assert slim.embed_dim == published.embed_dim
    for width in ("mlp_dim", "head_dim"):
        assert getattr(slim.blocks[0], width) == getattr(published.blocks[0], width)


def test_recipes_with_other_students_are_traced():
    """Their losses, too: what a batch lacks would not be read."""
    recipe = resolved(RECIPES["edge_sam"], "rep_vit_small", plain.preset("small"))
    kinds = [each for each in listed(recipe, plain.preset("small")) if each.kind == "distill"]
    assert len(kinds) == 2
    for each in kinds:
        each.function.trace(*each.args)


def test_what_cannot_be_planned_says_so():
    with pytest.raises(InputError, match="a cut of a rep_vit is not planned"):
        cut(resolved_config(), Prune("embedding"), Target(0.5))


def test_what_is_left_out_need_not_be_planned():
    masks = change(RECIPES["taylor"], ("prune.importance_loss=masks",))
    with pytest.raises(InputError, match="the other steps are, with --only distill"):
        listed(masks)
    frozen = lambda found: [each.args[0].params["image_encoder"]["pos_embed"].shape for each in found]
    alone, whole = listed(masks, only=("distill",)), listed(RECIPES["taylor"])
    assert frozen(alone) == frozen([each for each in whole if each.kind == "distill"])
    for kind in ("prune", "evaluate", "encode"):
        wanted = [each.name for each in whole if each.kind == kind]
        assert wanted and [each.name for each in listed(RECIPES["taylor"], only=(kind,))] == wanted


def resolved_config():
    small = plain.preset("small")
    return with_encoder(small, presets.encoder("rep_vit_small", small))


def test_hours_are_of_all_calls_or_of_none():
    needs = lambda name, seconds, calls: type("Needs", (), {"name": name, "seconds": seconds, "calls": calls})
    known = [needs("prune", 2.0, 900), needs("distill", 1.0, 1800), needs("encode", None, 0)]
    assert hours(known, 8) == {"hours": 1.0, "device_hours": 8.0, "hours_of": ["prune", "distill"]}
    assert hours(known[1:], 8) == {"hours": 0.5, "device_hours": 4.0, "hours_of": ["distill"]}
    assert hours([needs("prune", None, 1), *known], 8) == {"hours": None, "device_hours": None, "hours_of": []}


def test_a_narrow_stream_does_not_hide_wide_blocks(monkeypatch):
    """While a bottleneck's importance is estimated: each block of ViT-H is then computed again, as before the cut."""
    whole = plain.preset("vit_h")
    narrow = cut(whole, Prune("embedding"), Target(0.77))
    remat = lambda config: encoder_for(config, 1, jnp.float32).remat
    assert not remat(whole)  # on a CPU
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert narrow.embed_dim < 300 and remat(whole) and remat(narrow)
    assert not remat(cut(narrow, Prune("bottleneck"), Target(0.77)))
    assert not remat(plain.preset("vit_b")) and encoder_for(plain.preset("vit_b"), 2, jnp.float32).remat

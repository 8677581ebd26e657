"""A FastSAM compressed: the recipe, its steps, what is refused; a stand-in for the network spares its compilation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import slimsam_jax
from helpers.fast_sam_models import TINY, folded_config, random_fast_sam
from helpers.images import random_image, truncated
from helpers.programs import run_program
from slimsam_jax import checkpoint
from slimsam_jax.compression import fast_sam, fast_sam_distill, fast_sam_report, fast_sam_run
from slimsam_jax.compression.fast_sam_distill import FastSamDistillation, outputs_of, validator_of
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.recipes.fast_sam import RECIPE
from slimsam_jax.compression.steps import Distill, Initialize, Prune
from slimsam_jax.distillation.step import init_state
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.costs import ROWS
from slimsam_jax.models.encoders import layers
from slimsam_jax.models.fast_sam import FastSam, Network, Outputs, abstract_params

MAGNITUDE = {"recipe": "taylor", "set": ("prune.criterion=magnitude", "distill.validations=2")}


class Little:
    """Gives outputs of one layer's weights, of which the cut takes some."""

    def __init__(self, config, dtype=np.float32, of_batch=False):
        assert config.image_size == 64

    def apply(self, variables, pixels):
        shade = pixels.mean((1, 2, 3))[:, None] * variables["params"]["layers_0"]["kernel"].sum()
        levels = lambda count: tuple((1 + i) * shade * np.arange(count) for i in range(3))
        return Outputs(levels(4), levels(2), levels(5), shade * np.arange(3)), {}


@pytest.fixture
def teacher(tmp_path):
    checkpoint.save(random_fast_sam(bias=-20), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def little(monkeypatch):
    """Stands in for all that compiles: the network, of which one layer learns, its statistics, masks and costs."""
    recalibrated = []

    def recalibrate(network, params, batches):
        recalibrated.append([batch.shape for batch in batches])
        kernel = np.asarray(params["layers_0"]["kernel"]) * 1.5
        return {**params, "layers_0": {**params["layers_0"], "kernel": kernel}}

    found = SimpleNamespace(scores=[0.5])
    monkeypatch.setattr(fast_sam_distill, "Network", Little)
    monkeypatch.setattr(fast_sam_distill, "recalibrate", recalibrate)
    only = lambda params, *how: init_state({"layers_0": params["layers_0"]}, *how)
    monkeypatch.setattr(fast_sam_distill, "init_state", only)
    monkeypatch.setattr(fast_sam_report, "encode_image", lambda model, image: found)
    monkeypatch.setattr(fast_sam_report, "agreement", lambda pairs, grid: [np.ones(16), np.full(16, 0.25)])
    costs = [{key: float(count) for key, *_ in ROWS} for count in (100, 25)]
    monkeypatch.setattr(fast_sam_report.costs, "measure", lambda models: costs)
    outputs_of.clear_cache()
    yield recalibrated
    outputs_of.clear_cache()


def compress(teacher, material, out, **changes):
    fields = {"steps": 2, "batch": 2, "save_every": 2, "ratio": 0.5, **MAGNITUDE, **changes}
    return slimsam_jax.compress(teacher, material / "images", out=out, **fields)


def test_a_run_cuts_recalibrates_distils_and_reports(teacher, material, tmp_path, little, capsys):
    slim, report = compress(teacher, material, tmp_path / "slim")
    assert isinstance(slim, FastSam) and slim.config.prototypes == (4, 3, 4, 32) and slim.config.image_size == 64
    assert [row["step"] for row in slim.provenance["recipe"]] == ["prune", "distill"]
    assert little[0] == [(2, 64, 64, 3)] * 2  # five images, two at a time
    assert list(report["errors"]) == ["cut", "recalibrated", "slim"]
    cut, recalibrated, distilled = (report["errors"][stage] for stage in report["errors"])
    assert cut["mean"] == np.mean([cut[term] for term in Outputs._fields]) > 0
    assert recalibrated["boxes"] != cut["boxes"] and distilled["mean"] < recalibrated["mean"]
    assert report["agreement"] == 0.25 and report["slim"]["parameters"] == 25 and report["slim"]["masks"] == 1
    written = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert written["errors"] == report["errors"] and written["provenance"] == slim.provenance
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    loss = next(entry for entry in log if "loss" in entry)
    np.testing.assert_allclose(loss["loss"], np.mean([loss[term] for term in Outputs._fields]), rtol=1e-5)
    assert log[0]["learning_rate"] > 0 and sorted(path.name for path in (tmp_path / "slim").iterdir()) == [
        *("config.json", "log.jsonl", "model.safetensors", "report.json")
    ]
    said = capsys.readouterr().out
    assert "agreement with the teacher's 25.00 %" in said and "report.png" not in said


def test_a_run_that_is_killed_goes_on(teacher, material, tmp_path, little, monkeypatch):
    whole, _ = compress(teacher, material, tmp_path / "whole")
    killed, validate = tmp_path / "killed", FastSamDistillation.validate

    def kill(self, state, step):
        if step == 4:
            raise KeyboardInterrupt
        validate(self, state, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FastSamDistillation, "validate", kill)
        compress(teacher, material, killed)
    assert (killed / "checkpoints" / "prune-all" / "model" / "config.json").exists()
    with pytest.raises(InputError, match="was started otherwise"):
        compress(teacher, material, killed, resume=True, seed=1)
    monkeypatch.setattr(fast_sam, "prune", lambda *_: pytest.fail("the cut is there"))
    resumed, _ = compress(teacher, material, killed, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    steps = lambda out: [json.loads(line).get("step") for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps(killed) == steps(tmp_path / "whole")


def test_without_steps_it_is_cut_and_recalibrated(teacher, material, tmp_path, little, monkeypatch, capsys):
    """By the command, too, whose cut reads images; one that cannot be read is named."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        (images / f"{i}.png").write_bytes((material / "images" / f"{i % 6}.png").read_bytes())
    truncated(images / "3.png")
    seen = []

    def gradients(embed, params, frames, key):
        seen.extend(frame.shape for frame in frames)
        return jax.tree.map(np.ones_like, params)

    monkeypatch.setattr(fast_sam, "disturbed_gradients", gradients)
    arguments = ("--teacher", teacher, "--images", images, "--steps", "0", "--out", tmp_path / "slim")
    more = ("--importance-images", "5", "--max-broken", "0.5", "--batch", "1")
    code, said, error = run_program(monkeypatch, capsys, "compress", *arguments, *more)
    assert code == 0 and "skipped: " in said and "3.png" in said, error
    assert seen == [(1, 64, 64, 3)] * 5 and len(little[0]) == 5
    numbers = json.loads((tmp_path / "slim" / "report.json").read_text())["errors"]
    assert numbers["slim"] == numbers["recalibrated"] != numbers["cut"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "params=1M", "ratio": None}, "--budget is for SAMs, and the teacher is a FastSAM: leave it out"),
        ({"uniform": True}, "--uniform is for SAMs"),
        ({"attention": "rows"}, "--attention is for SAMs"),
        ({"cache": "cache"}, "--cache is for SAMs"),
        ({"recipe": "slimsam"}, "recipe slimsam is of SAM's encoders"),
        ({"recipe": "mobile_sam"}, "recipe mobile_sam is of SAM's encoders"),
        ({"student": Path("vit_t")}, "--student is for SAMs"),
        ({"set": ("prune.criterion=projection",)}, "no projection: prune.criterion=taylor, fisher or magnitude"),
        ({"set": ("prune.allocation=macs",)}, "compete globally or locally: set prune.allocation=global"),
        ({"set": ("prune.head_channels=whole",)}, "prune.head_channels is of SAM's encoders"),
        ({"set": ("prune.importance_loss=masks",)}, "prune.importance_loss is of SAM's encoders"),
        ({"set": ("distill.masks=1",)}, "distill.masks is of SAM's encoders"),
        ({"set": ("quirks.zeroed_rel_pos=true",)}, "prune.zeroed_rel_pos is of SAM's encoders"),
    ],
)
def test_what_is_sams_alone_is_refused_in_a_line(teacher, changes, message, tmp_path):
    options = Options(**{"teacher": teacher, "ratio": 0.5, "out": tmp_path / "slim", **changes})
    with pytest.raises(InputError, match=message):
        fast_sam_run.prepare(options, random_fast_sam())
    assert not (tmp_path / "slim").exists()


def test_steps_of_ones_own(teacher):
    folded = FastSam(folded_config(), {})
    for recipe, model, message in (
        ((Prune("embedding"),), random_fast_sam(), r"steps Prune\('all', ...\) and Distill\('none', ...\) alone"),
        ((Initialize(), Prune("all", criterion="taylor")), random_fast_sam(), "steps Prune"),
        ((*RECIPE[:1], Distill("stream")), random_fast_sam(), "distill.align is of SAM's encoders"),
        (RECIPE, folded, "batch norms are folded: leave distill.batch_norm out"),
    ):
        with pytest.raises(InputError, match=message):
            fast_sam_run.check_steps(recipe, model)
    assert [step.batch_norm for step in fast_sam_run.recipe_of(folded)[1:]] == ["frozen"]
    again = (*RECIPE, Prune("all", 0.2, criterion="magnitude", allocation="global"), RECIPE[1])
    fast_sam_run.check_steps(again, random_fast_sam())
    with pytest.raises(InputError, match="a cut of all parts is of a FastSAM"):
        slimsam_jax.compress(recipe=[Prune("all")], out="nowhere")


def test_the_whole_network_learns_but_for_statistics():
    """Traced, not compiled: every weight of the student gets a gradient's shape, and each term has its target."""
    run = SimpleNamespace(options=Options(), teacher=random_fast_sam(), dtype=np.float32)
    distillation = FastSamDistillation.__new__(FastSamDistillation)
    distillation.distill, student = RECIPE[1], random_fast_sam(1)
    trainer, frames = distillation.trained(run, student, run.teacher), jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8)
    how = (distillation.weights(1), 0.1)
    state, terms = jax.eval_shape(trainer.step, trainer.state, trainer.frozen, {"image": frames}, *how)
    assert set(terms) == {"loss", *Outputs._fields}
    assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, random_fast_sam().params)


def test_statistics_of_all_batch_norms_are_estimated():
    network, params = Network(TINY, of_batch=True), abstract_params(TINY)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    moments = jax.eval_shape(functools.partial(layers._moments.__wrapped__, network), params, images)
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert set(moments) == {path for path in paths if path[-1] in ("mean", "var")} and len(moments) > 100


def test_errors_are_relative_to_the_teacher(little):
    model = random_fast_sam()
    nothing = {**model.params, "layers_0": {"kernel": np.zeros(1)}}
    image = SimpleNamespace(image=lambda: fast_sam.as_image(random_image(0, 30, 60)))
    wanted = fast_sam_distill.wanted_of(model, image)
    assert set(fast_sam_distill.errors(model, image, wanted).values()) == {0.0}
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(wanted["boxes"])])
    found = fast_sam_distill.errors(FastSam(TINY, nothing), image, wanted)["boxes"]
    np.testing.assert_allclose(found, np.square(flat).mean() / flat.var(), rtol=1e-5)
    broken = SimpleNamespace(image=lambda: (_ for _ in ()).throw(InputError("no image")), name="x")
    with pytest.raises(InputError, match="no image can be validated on: no image"):
        validator_of(model, [broken], "error")

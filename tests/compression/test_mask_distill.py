"""Recipes with prompts in the loop run to the end, on annotated images and on others, and go on where they stopped."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from helpers.images import samples, save_image
from helpers.models import SQUARE, UNEVEN, random_sam
from helpers.runs import compiled_once, compress_options
from slimsam_jax import checkpoint, data
from slimsam_jax.api import compress_with
from slimsam_jax.compression import everything_masks, mask_distill, report
from slimsam_jax.compression.everything_masks import with_masks
from slimsam_jax.compression.mask_distill import MaskDistillation, make_trainer, masks_of
from slimsam_jax.compression.mask_steps import DistillMasks, Prompting
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Initialize
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.errors import RunError
from slimsam_jax.files import write_json

ROW = {"segmentation": {"size": [20, 30], "counts": [0, 100, 500]}, "bbox": [0, 0, 5, 20], "point_coords": [[1, 1]]}


@pytest.fixture()
def programs():
    with compiled_once(mask_distill):
        yield


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def moved(slim, teacher, part: str) -> bool:
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, slim.params[part], teacher.params[part])))


def test_edge_sam_is_resumed_within_its_prompts(material, tmp_path, monkeypatch, unmeasured, programs):
    """On images without annotations: by the masks that the teacher finds in them, searched for once."""
    choices = {"set": (), "save_every": 1, "steps": 1}
    step = dataclasses.replace(RECIPES["edge_sam"][-1], prompting=Prompting(prompts=2))
    recipe = change((Initialize(UNEVEN), step), ["distill.validations=1"])
    searched, search = [], everything_masks._search

    def useful(generator, sample, file):
        """The search itself, once; what a teacher of random weights gives is of no useful size."""
        if not searched:
            search(generator, sample, file)
            assert all({"segmentation", "bbox"} <= {*row} for row in everything_masks._rows(file))
        searched.append(sample)
        write_json(file, {"annotations": [ROW]})

    monkeypatch.setattr(everything_masks, "_search", useful)
    whole = compress_with(compress_options(material, tmp_path / "whole", **choices), recipe).sam
    teacher = checkpoint.load(material / "teacher")
    assert moved(whole, teacher, "mask_decoder") and not moved(whole, teacher, "prompt_encoder")
    losses = [entry for entry in log_of(tmp_path / "whole") if "loss" in entry]
    assert [entry["stage"] for entry in losses] == ["distill-masks"] * 2
    assert {"bce", "dice", "overlap"} <= {*losses[-1]}

    def step(self, state, number, batch, whole=MaskDistillation.step):
        if number == 2:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    options = compress_options(material, tmp_path / "slim", **choices)
    with monkeypatch.context() as patched:
        patched.setattr(MaskDistillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(options, recipe)
    resumed = compress_with(dataclasses.replace(options, resume=True), recipe).sam
    chex.assert_trees_all_equal(resumed.params, whole.params)
    assert log_of(tmp_path / "slim") == log_of(tmp_path / "whole")
    assert len(searched) == 2 * len({sample.name for sample in searched})  # not once more where it was resumed


def test_a_slim_student_learns_by_masks(material, tmp_path, unmeasured):
    """One line after a recipe's cuts; what is cut stays cut."""
    masks = DistillMasks(prompting=Prompting(prompts=2, rounds=1))
    recipe = change((*RECIPES["default"][:-1], masks), ["distill.validations=1"])
    options = compress_options(material, tmp_path / "slim", steps=1, set=(), images=(str(material / "val"),))
    slim, teacher = compress_with(options, recipe).sam, checkpoint.load(material / "teacher")
    assert {entry["stage"] for entry in log_of(tmp_path / "slim") if "loss" in entry} == {"distill-masks"}
    assert slim.config.embed_dim < teacher.config.embed_dim and moved(slim, teacher, "mask_decoder")


def test_a_decoder_learns_alone():
    """Traced, not compiled: the encoder lies beside it, and has no gradient."""
    sam = random_sam(SQUARE)
    trainer = make_trainer(sam, sam, DistillMasks(train=("mask_decoder",)), known=True)
    assert set(trainer.state.params) == {"mask_decoder"} and "image_encoder" in trainer.frozen["student"]


def test_what_nothing_can_be_learned_from_is_not_kept(tmp_path, monkeypatch):
    """A mask of all the image, or one that is lost in a cell, would stop a training as a broken image does."""
    image = samples([save_image(tmp_path / "x.png", 20, 30)])[0]
    as_row = lambda counts: {**ROW, "segmentation": {"size": [20, 30], "counts": counts}}
    found = [as_row(counts) for counts in ([0, 600], [0, 1, 599], [0, 100, 500])]
    generator = SimpleNamespace(model=random_sam(SQUARE), generate=lambda image: found)
    everything_masks._search(generator, image, tmp_path / "x.json")
    assert everything_masks._rows(tmp_path / "x.json") == found[2:]


def test_masks_are_the_same_however_embeddings_are_stored(tmp_path):
    teacher = random_sam(SQUARE)
    caches = [TeacherCache(tmp_path, teacher, "0" * 64, precision) for precision in ("float16", "int8")]
    first, second = (masks_of(SimpleNamespace(cache=cache, teacher=teacher)) for cache in caches)
    assert first == second and first.parent == caches[0].folder != caches[1].folder


@pytest.mark.parametrize(
    ("recipe", "known", "terms"),
    [
        ("edge_sam", False, {"bce", "dice"}),
        ("tiny_sam", True, {"embedding", "tokens", "outputs", "focal", "dice", "iou"}),
        ("efficient_sam", False, {"focal", "dice", "iou"}),
    ],
)
def test_a_step_of_each_recipe_has_its_terms(recipe, known, terms):
    """Traced, not compiled. The teacher's encoder is there only where its embedding is read and does not come along."""
    step, sam = RECIPES[recipe][-1], random_sam(UNEVEN)
    trainer = make_trainer(sam, random_sam(SQUARE), step, known=known)
    assert (
        set(trainer.frozen.get("teacher", {}))
        == {
            "edge_sam": {"image_encoder", "prompt_encoder", "mask_decoder"},
            "tiny_sam": {"prompt_encoder", "mask_decoder"},
            "efficient_sam": set(),
        }[recipe]
    )
    zeros = lambda *shape, dtype=np.float32: np.zeros((2, *shape), dtype)
    batch = {"image": zeros(64, 64, 3, dtype=np.uint8), "size": zeros(2, dtype=np.int32) + 64}
    batch |= {"points": zeros(3, 2, 2), "labels": zeros(3, 2, dtype=np.int32), "masks": zeros(3, 16, 16)}
    batch |= {"seed": zeros(dtype=np.uint32), **({"embedding": zeros(4, 4, 32)} if known else {})}
    how = trainer.state, trainer.frozen, batch, step.losses.weights(), 1e-3
    state, found = jax.eval_shape(trainer.step, *how)
    assert set(found) == {"loss", "overlap", *terms}
    assert set(state.params) == {"image_encoder", "mask_decoder"}


def test_a_training_by_masks_alone_is_drawn_by_its_loss():
    log = [{"stage": "distill", "step": 1, "loss": 3.0, "embedding": 2.0}]
    log += [{"stage": "distill-masks", "step": step, "loss": 1.0 / step} for step in (1, 2)]
    axes = Figure().subplots()
    report._plot_losses(axes, log)
    assert [list(line.get_ydata()) for line in axes.lines] == [[2.0], [1.0, 0.5]]
    assert [line.get_label() for line in axes.lines] == ["distill", "distill-masks, its loss"]


def test_images_without_any_mask_are_left_out(material, tmp_path, capsys):
    """The teacher's masks are read as annotations; an image that cannot be read stays, to be named when it is met."""
    images = samples(sorted((material / "images").iterdir())[:2])
    for image, rows in zip(images, ([], [ROW]), strict=True):
        write_json(everything_masks._file(tmp_path, image), {"annotations": rows})
    (tmp_path / "broken.png").write_bytes(b"none")
    kept = with_masks([*images, *samples([tmp_path / "broken.png"])], random_sam(SQUARE), tmp_path)
    assert [sample.name for sample in kept] == [images[1].name, str(tmp_path / "broken.png")]
    assert kept[0].annotations((20, 30))[0].mask.sum() == 100 and "1 images are left out" in capsys.readouterr().out
    empty = dataclasses.replace(images[1], load_annotations=list)  # as every image of a TFDS: reading alone tells
    assert with_masks([empty], random_sam(SQUARE), tmp_path)[0].annotations((20, 30))
    with pytest.raises(RunError, match="finds nothing in any"):
        with_masks(images[:1], random_sam(SQUARE), tmp_path)


def test_of_shards_with_annotations_no_sample_is_made(tmp_path, monkeypatch):
    """Eleven million samples would take 15 GB; one image without annotations, and they are looked at one by one."""
    for name, annotated in (("whole", True), ("bare", False)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(save_image(tmp_path / f"{name}.png", 20, 30), f"{name}.png")
            write_json(tmp_path / f"{name}.json", {"annotations": [ROW]})
            if annotated:
                tar.add(tmp_path / f"{name}.json", f"{name}.json")
    whole, both = data.find([tmp_path / "whole.tar"]), data.find([tmp_path / "whole.tar", tmp_path / "bare.tar"])
    monkeypatch.setattr(
        everything_masks, "_search", lambda generator, sample, file: write_json(file, {"annotations": []})
    )
    assert with_masks(whole, random_sam(SQUARE), tmp_path) is whole
    assert [sample.name for sample in with_masks(both, random_sam(SQUARE), tmp_path)] == [whole[0].name]

"""Training a SAM from masks: losses by hand, clicks where they belong, images that are learnt by heart."""

from __future__ import annotations

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from converters import from_torch, to_torch
from experiments import reference_results, reference_run, results, train_reference
from helpers.images import samples, truncated
from helpers.models import SQUARE, random_sam
from helpers.runs import compiled_once, compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.data.augment import draw_framing, flip_and_crop
from slimsam_jax.data.prompted import MaskBatches, first_prompt
from slimsam_jax.distillation import mask_losses
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.prompts import ABSENT
from slimsam_jax.models.config import preset
from slimsam_jax.training import masks as training
from slimsam_jax.training import prompt_loop
from slimsam_jax.training.masks import (
    FREQUENCIES,
    OBJECTIVES,
    MaskTraining,
    Settings,
    join,
    kernels,
    make_trainer,
    mious,
    split,
)


@pytest.fixture
def logits_and_target():
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((3, 4, 8, 6))).astype(np.float32)
    return logits, random.random((3, 8, 6)).astype(np.float32).round()


def test_losses_are_those_of_pytorch(logits_and_target):
    import torch

    logits, target = logits_and_target[0][:, 0], logits_and_target[1]
    x, y = torch.from_numpy(logits), torch.from_numpy(target)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    share = torch.sigmoid(x)
    wrong = share * (1 - y) + (1 - share) * y
    focal = (0.25 * y + 0.75 * (1 - y)) * wrong**2 * bce
    dice = 1 - (2 * (share * y).sum((1, 2)) + 1) / (share.sum((1, 2)) + y.sum((1, 2)) + 1)
    for ours, theirs in (("cross_entropy", bce), ("focal", focal), ("dice", dice)):
        np.testing.assert_allclose(jax.jit(getattr(mask_losses, ours))(logits, target), theirs, atol=1e-5)


def test_overlap_by_hand():
    logits = jnp.array([[[1.0, 1.0, -1.0]], [[-1.0, -1.0, -1.0]]])
    np.testing.assert_allclose(mask_losses.overlap(logits, jnp.array([[0.0, 0.6, 0.6]])), [1 / 3, 0])
    assert mask_losses.overlap(logits[1], jnp.zeros((1, 3))) == 1


def test_of_a_group_the_best_learns_its_mask_and_all_their_iou(logits_and_target):
    logits, target = logits_and_target
    predicted = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    weights = {"dice": 2.0, "iou": 3.0}
    both = lambda x: mask_losses.prompt_loss(x, predicted, target, weights, [[0], [1, 2, 3]])
    loss, terms, actual = jax.jit(both)(logits)
    dice = np.array(jax.jit(mask_losses.dice)(logits, target[:, None]))
    np.testing.assert_allclose(terms["dice"], (dice[:, 0].mean() + dice[:, 1:].min(1).mean()) / 2, atol=1e-5)
    error = (predicted - np.array(actual)) ** 2
    np.testing.assert_allclose(terms["iou"], (error[:, 0].mean() + error[:, 1:].mean()) / 2, atol=1e-5)
    np.testing.assert_allclose(loss, 2 * terms["dice"] + 3 * terms["iou"], atol=1e-5)
    one = lambda x: mask_losses.prompt_loss(x, predicted, target, weights, [[1, 2, 3]])[0]
    moved = np.abs(jax.jit(jax.grad(one))(logits)).sum((2, 3)) > 0
    assert (moved.sum(1) == 1).all() and (moved.argmax(1) == 1 + dice[:, 1:].argmin(1)).all()


def test_clicks_are_in_the_region_of_error_all_of_it_and_nowhere_else():
    random = np.random.default_rng(0)
    target = (random.random((6, 5)) < 0.5).astype(np.float32)
    logits = np.where(random.random((6, 5)) < 0.5, 1.0, -1.0)
    inside = np.arange(5) < 4
    inside = np.broadcast_to(inside, (6, 5))
    wrong = ((logits > 0) != (target > 0.5)) & inside
    keys = jax.random.split(jax.random.key(0), 1000)
    cells, kinds = jax.jit(jax.vmap(prompt_loop.correction, (0, None, None, None)))(keys, logits, target, inside)
    x, y = np.array(cells, int).T
    assert wrong[y, x].all()
    np.testing.assert_array_equal(kinds, target[y, x])
    counts = np.bincount(y * 5 + x, minlength=30).reshape(6, 5)[wrong]
    assert wrong.any() and counts.min() > 0.6 * 1000 / wrong.sum() and counts.max() < 1.5 * 1000 / wrong.sum()


def test_a_correction_is_a_click_in_pixels_and_the_logits_it_corrects():
    target = jnp.zeros((1, 16, 16)).at[0, 3, 9].set(1)  # one cell of 4 x 4 pixels is missing
    before = prompt_loop.Prompts(jnp.zeros((1, 2, 2)), jnp.array([[1, -1]]))
    low, keys = jnp.full((1, 16, 16), -3.0), jax.random.split(jax.random.key(0), 1)
    after = prompt_loop.corrected(SQUARE, keys, before, low, target, jnp.ones((1, 16, 16), bool))
    np.testing.assert_array_equal(after.points, [[[0, 0], [0, 0], [4 * 9 + 2, 4 * 3 + 2]]])
    assert after.labels.tolist() == [[1, -1, 1]]
    np.testing.assert_array_equal(after.masks, low[..., None])


def test_where_nothing_is_wrong_there_is_no_click(tiny_sam):
    target = jnp.zeros((16, 12)).at[3:5, 4:9].set(1)
    click = jax.jit(prompt_loop.correction)
    _, kind = click(jax.random.key(0), 10 * (target - 0.5), target, jnp.ones((16, 12), bool))
    assert kind == ABSENT
    # and what is said by such a prompt is what was said before
    points, labels_ = jnp.full((1, 1, 2), 9.0), jnp.ones((1, 1), jnp.int32)
    more = jnp.concatenate([points, points + 20], 1), jnp.concatenate([labels_, jnp.array([[ABSENT]])], 1)
    embedding = jax.random.normal(jax.random.key(1), (*tiny_sam.config.grid, tiny_sam.config.out_chans))
    found = [prompt_loop.decode(tiny_sam.config, tiny_sam.params, embedding, *p) for p in ((points, labels_), more)]
    chex.assert_trees_all_close(*found, atol=1e-4)


def test_rounds_draw_anew_and_what_lies_beside_the_image_costs_nothing(monkeypatch):
    """An image of half the frame, and a decoder that says anything in the other half."""
    random, target = np.random.default_rng(0), np.zeros((1, 1, 16, 16), np.float32)
    target[..., 3:9, 2:7] = 1
    prompts = {"points": np.zeros((1, 1, 2, 2)), "labels": np.array([[[1, -1]]]), "masks": target}
    batch = {**prompts, "size": np.array([[64, 32]]), "seed": np.zeros(1, np.uint32)}
    logits, drawn, corrected = random.standard_normal((1, 4, 16, 16)), [], prompt_loop.corrected

    def recorded(config, keys, *rest):
        drawn.append(jax.random.key_data(keys).tolist())
        return corrected(config, keys, *rest)

    def loss(beside: float) -> float:
        decoded = jnp.where(jnp.arange(16) < 8, logits, beside), jnp.zeros((1, 4))
        monkeypatch.setattr(prompt_loop, "decode", lambda *_: decoded)
        weights = OBJECTIVES["short"].weights
        return float(prompt_loop.interactive_loss(SQUARE, None, jnp.zeros((1, 4, 4, 32)), batch, weights, 2)[0])

    monkeypatch.setattr(prompt_loop, "corrected", recorded)
    assert loss(9.0) == loss(-9.0) == loss(0.1) > 0
    assert drawn[0] != drawn[1] and drawn[:2] == drawn[2:4]


@pytest.mark.parametrize("outputs", ["sam", "both"])
def test_outputs_that_learn(outputs):
    found = [prompt_loop.learning(SQUARE, turn, outputs) for turn in (0, 1)]
    assert found == ([[[1, 2, 3]], [[0]]] if outputs == "sam" else [[[0], [1, 2, 3]]] * 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images of 40 x 60 with two bright rectangles each, which are the masks."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels, annotations = np.full((40, 60, 3), 30 + 20 * i, np.uint8), []
        for k, (y, x) in enumerate(((4 + 6 * i, 6), (20, 32 - 8 * i))):
            mask = np.zeros((40, 60), bool)
            mask[y : y + 14, x : x + 20] = True
            pixels[mask] = (250, 60, 10) if k else (20, 90, 240)
            fields = {"id": k, "bbox": [x, y, 20, 14], "point_coords": [[x + 10, y + 7]]}
            annotations.append({**fields, "segmentation": rle.encode(mask)})
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def test_images_and_masks_stay_together(images):
    found = samples(sorted(images.glob("*.png")))
    stream = MaskBatches(found, SQUARE, 2, seed=0, prompts=3, flip=True, crop=0.6)
    overlaps = []
    for _ in range(6):
        batch = next(stream)
        assert batch["masks"].shape == (2, 3, 16, 16) and batch["points"].shape == (2, 3, 2, 2)
        for image, size, masks in zip(batch["image"], batch["size"], batch["masks"], strict=True):
            small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX), float)
            colours = small[..., 0] > 150, small[..., 2] > 150  # the orange one and the blue one
            for mask in masks > 0.5:
                overlaps.append(max((c & mask).sum() / (c | mask).sum() for c in colours))
            assert not masks[:, round(size[0] / 4) :].any() and not masks[:, :, round(size[1] / 4) :].any()
    assert np.median(overlaps) > 0.9 and min(overlaps) > 0.5


def test_framing_is_the_augmentation_of_images():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    for seed in range(5):
        augmented = flip_and_crop(True, 0.4)(image, np.random.default_rng(seed))
        framing = draw_framing(image.size, True, 0.4, np.random.default_rng(seed))
        np.testing.assert_array_equal(augmented, framing.of_mask(pixels))


def test_first_prompts_lie_on_the_object(images):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    clicks, boxes = [], []
    for seed in range(200):
        points, kinds = first_prompt(mask, np.random.default_rng(seed))
        (boxes if kinds.tolist() == [[2, 3]] else clicks).append(points[0])
    assert 60 < len(boxes) < 140
    assert all(mask[int(y), int(x)] for (x, y), _ in clicks)
    middle = np.mean([abs(x - 35) < 10 and abs(y - 20) < 1 for (x, y), _ in clicks])
    assert 0.4 < middle < 0.7 and len({tuple(c[0]) for c in clicks}) > 20
    error = np.array(boxes).reshape(-1, 4) - [20, 10, 50, 30]
    np.testing.assert_allclose(error.std(0), [3, 2, 3, 2], rtol=0.3)


def test_an_image_without_a_mask_of_a_useful_size_is_passed_over(images, tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "0.png")
    masks = [np.ones((40, 60), bool), np.zeros((40, 60), bool)]
    masks[1][0, 0] = True
    fields = [{"bbox": [0, 0, 1, 1], "point_coords": [[0, 0]], "segmentation": rle.encode(mask)} for mask in masks]
    (tmp_path / "0.json").write_text(json.dumps({"annotations": fields}))
    found = samples([tmp_path / "0.png", images / "0.png"])
    stream = MaskBatches(found, SQUARE, 2, seed=0)
    next(stream)
    assert stream.passed == {str(tmp_path / "0.png")} and not stream.skipped  # it is sound: --max-broken is for others
    with pytest.raises(RunError, match="none of the 1 images can be used; the last: it has nothing to learn from"):
        next(MaskBatches(found[:1], SQUARE, 2, seed=0))


def test_what_is_not_trained(tiny_sam):
    trained, frozen = split(tiny_sam.params, ("image_encoder",))
    assert set(frozen) == {"image_encoder", "prompt_encoder"} and len(frozen["prompt_encoder"]) == 1
    chex.assert_trees_all_equal(join(trained, frozen), tiny_sam.params)
    decayed = kernels(trained)["mask_decoder"]
    assert not decayed["mask_tokens"] and decayed["iou_prediction_head"]["layers_0"] == {"bias": False, "kernel": True}


def test_images_share_nothing_but_a_batch(images):
    """Each has its own clicks to correct, wherever it stands: a batch in parts gives the same."""
    sam, weights = random_sam(SQUARE), OBJECTIVES["short"].weights
    batch = next(MaskBatches(samples(sorted(images.glob("*.png"))), SQUARE, 2, seed=0, prompts=2))
    embedding = jax.random.normal(jax.random.key(0), (2, *SQUARE.grid, SQUARE.out_chans))
    loss = jax.jit(lambda params, *images: prompt_loop.interactive_loss(SQUARE, params, *images, weights)[1])
    both = loss(sam.params, embedding, batch)
    one = lambda i: loss(sam.params, *jax.tree.map(lambda rows: rows[i : i + 1], (embedding, batch)))
    each = [one(0), one(1)]
    assert abs(each[0]["iou_1"] - each[1]["iou_1"]) > 1e-3
    chex.assert_trees_all_close(both, jax.tree.map(lambda *two: sum(two) / 2, *each), rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_come_one_after_the_other(images):
    """That their gradients are those of the whole is `test_distill`'s."""
    trainer = make_trainer(random_sam(SQUARE), Settings(steps=1, batch=2, prompts=1, corrections=0, accumulate=2))
    batch = next(MaskBatches(samples(sorted(images.glob("*.png"))), SQUARE, 2, seed=0, prompts=1))
    step = jax.make_jaxpr(trainer.step)(trainer.state, trainer.frozen, batch, OBJECTIVES["short"].weights, 1e-3)
    assert "length=2" in str(step)


def options(folder, out, **changes) -> train_reference.Options:
    fields = {"images": (str(folder),), "val": (str(folder),), "out": out, "steps": 4, "batch": 2, "save_every": 2}
    return train_reference.Options(**{**fields, "prompts": 2, "validations": 2, **changes})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "sam"
    checkpoint.save(random_sam(SQUARE), folder)
    return folder


@pytest.fixture(scope="module")
def learnt(images, start, tmp_path_factory):
    out = tmp_path_factory.mktemp("learnt") / "out"
    how = {
        "steps": 150,
        "learning_rate": 2e-3,
        "flip": False,
        "crop": 1.0,
        "validations": 3,
        "keep": "last",
        "save_every": 1000,
        "ema": 0.9,  # as the resumed training below, whose compiled step is then this one
    }
    train_reference.main(options(images, out, init=start, **how))
    return out


@pytest.mark.slow
def test_two_images_are_learnt_by_heart(learnt):
    log = [json.loads(line) for line in (learnt / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    scores = [entry for entry in log if "score" in entry]
    assert scores[-1]["score"] > max(0.6, 2 * scores[0]["score"])
    assert (learnt / "curve.png").exists() and not (learnt / "checkpoints").exists()


@pytest.mark.slow
def test_the_frequencies_of_positions_stay(learnt, start):
    before, after = (from_torch.load(path).params for path in (start, learnt))
    name = FREQUENCIES
    np.testing.assert_array_equal(before["prompt_encoder"][name], after["prompt_encoder"][name])
    assert not np.array_equal(before["prompt_encoder"]["no_mask_embed"], after["prompt_encoder"]["no_mask_embed"])


@pytest.mark.slow
def test_the_result_is_a_teacher(learnt, material, tmp_path, unmeasured):
    out = tmp_path / "slim"
    compress_with(compress_options(material, out, teacher=learnt, steps=0))
    assert from_torch.load(out).provenance["teacher"]["provenance"]["options"]["steps"] == 150
    state = to_torch.to_state_dict(from_torch.load(learnt))
    chex.assert_trees_all_equal(from_torch.from_state_dict(state).params, from_torch.load(learnt).params)


@pytest.fixture()
def programs():
    with compiled_once(training):
        yield


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(images, start, tmp_path, monkeypatch, programs):
    how = {"init": start, "ema": 0.9}
    train_reference.main(options(images, tmp_path / "whole", **how))

    def step(self, state, number, batch, whole=MaskTraining.step):
        if number == 4:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTraining, "step", step)
        with pytest.raises(RunError, match="plug"):
            train_reference.main(options(images, tmp_path / "broken", **how))
    with pytest.raises(InputError, match=r"options crop: 0\.5 -> 0\.6"):
        train_reference.main(options(images, tmp_path / "broken", resume=True, crop=0.6, **how))
    train_reference.main(options(images, tmp_path / "broken", resume=True, **how))
    whole, broken = (from_torch.load(tmp_path / name).params for name in ("whole", "broken"))
    chex.assert_trees_all_equal(whole, broken)
    assert len({(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "broken")}) == 1


def test_an_image_that_cannot_be_measured_on_is_named(tmp_path, capsys):
    broken = samples([truncated(tmp_path / "x.jpg")])
    assert np.isnan(mious(random_sam(SQUARE), broken)["box"])
    assert "not measured on: " in capsys.readouterr().out


def test_sizes():
    config = reference_run.architecture("small", {"embed_dim": 96, "depth": 6, "image_size": 320})
    assert config.embed_dim == 96 and config.image_size == (320, 320)
    found = [(block.heads, block.head_dim, block.mlp_dim, block.window) for block in config.blocks]
    assert found == [(6, 16, 384, window) for window in (6, 0, 0) * 2]
    for name in ("small", "vit_b", "vit_h", "vit_p77"):
        assert reference_run.architecture(name, {}) == preset(name)
    with pytest.raises(InputError, match="--embed-dim 100 is no multiple of the 6 heads"):
        reference_run.architecture("small", {"embed_dim": 100})
    with pytest.raises(InputError, match=r"image_size \(100, 100\) must be multiples"):
        reference_run.architecture("small", {"image_size": 100})


def test_a_decoder_to_start_from(images, start, tmp_path):
    """Prompt encoder and mask decoder are the checkpoint's, as is whatever they fix; the encoder is new."""
    asked = {"embed_dim": 48, "image_size": 128, "heads": 3, "window": 2, "depth": 4}
    sam, other = reference_run.first_model(options(images, tmp_path, decoder=start, **asked)), from_torch.load(start)
    chex.assert_trees_all_equal(
        *({part: each.params[part] for part in ("prompt_encoder", "mask_decoder")} for each in (sam, other))
    )
    assert sam.config.embed_dim == 48 and sam.config.image_size == (128, 128)
    assert sam.config.out_chans == other.config.out_chans != preset("small").out_chans
    assert sam.params["image_encoder"]["pos_embed"].shape == (1, *sam.config.grid, 48)


def test_what_does_not_fit_is_said_in_a_line(images, start, tmp_path, material):
    refused = {
        "sam has embed-dim 24, and --embed-dim 96 asks for another": {"init": start, "embed_dim": 96},
        "leave out --preset vit_b": {"init": start, "preset": "vit_b"},
        "leave out --decoder": {"init": start, "decoder": start},
        r"image_size \(100, 100\) must be multiples": {"decoder": start, "image_size": 100},
        "does not exist": {"init": tmp_path / "nothing"},
        "training needs annotated images: there is none": {"init": start, "images": (str(material / "images"),)},
        "--steps 0 must be at least 1": {"steps": 0},
        "--crop 0 is not a share": {"crop": 0.0},
    }
    for message, changes in refused.items():
        with pytest.raises(InputError, match=message):
            train_reference.main(options(images, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_learning_curves_are_kept_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_results, "FILE", tmp_path / "reference.jsonl")
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(results, "check_committed", lambda: None)
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "score": 0.4, "point_miou": 0.3, "box_miou": 0.5}]
    (tmp_path / "config.json").write_text('{"provenance": {"options": {"steps": 2, "batch": 8, "prompts": 4}}}')
    (tmp_path / "log.jsonl").write_text(json.dumps(log[0]) + "\n")
    with pytest.raises(InputError, match="is no finished training"):
        reference_results.record("tiny", tmp_path)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    reference_results.record("tiny", tmp_path, minutes=3)
    reference_results.table()
    assert "| tiny | 2 x 8 x 4 | 3 | 2: 30.0 / 50.0 |" in (tmp_path / "tables" / "reference.md").read_text()

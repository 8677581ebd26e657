"""The teacher's embeddings on disk: computed once, found again, never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from converters import from_torch
from helpers.family_models import tiny_vit_sam
from helpers.images import samples, truncated
from helpers.models import SQUARE, random_images, random_sam
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression import teacher_cache
from slimsam_jax.compression.loss_terms import terms as terms_of
from slimsam_jax.compression.steps import Distill
from slimsam_jax.compression.stored_embeddings import Layout
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.compression.trainer import make_trainer
from slimsam_jax.data import embedded_teacher
from slimsam_jax.errors import RunError
from slimsam_jax.inference.decode import encode_image

OTHERS = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0), "decoder_heads": 4}


@pytest.fixture(scope="module")
def teacher():
    return random_sam(SQUARE)


def test_embeddings_are_computed_once_and_are_the_teachers(material, teacher, tmp_path, monkeypatch, capsys):
    images = samples(sorted((material / "images").iterdir()))
    shutil.copytree(material / "images", tmp_path / "images")
    broken = truncated(tmp_path / "images" / "broken.jpg")
    cache = TeacherCache(tmp_path / "cache", teacher, "0123456789abcdef")
    cache.fill([*images[:4], *samples([broken])])
    out = capsys.readouterr().out
    assert "about 0.00 GB in" in out and "5 images of 0.00102 MB (float16)" in out
    encoded, encode = [], teacher_cache.encode_image
    monkeypatch.setattr(teacher_cache, "encode_image", lambda *args: encoded.append(1) or encode(*args))
    copies = samples(sorted((tmp_path / "images").glob("*.png")))  # the same images elsewhere are the same images
    cache.fill(copies)
    assert len(encoded) == 2
    for sample in copies:
        expected = np.asarray(encode_image(teacher, sample.image()).embedding)
        np.testing.assert_allclose(cache.read(sample), expected, rtol=1e-3, atol=1e-3)
        assert cache.read(sample).dtype == np.float16
    assert len(list(cache.folder.iterdir())) == 6


def test_integers_have_a_range_for_each_channel(material, teacher, tmp_path):
    """Of several maps, too; a constant channel, and one of large values, lose nothing by each other."""
    random, shapes = np.random.default_rng(0), {"fine": (6, 4, 3), "coarse": (3, 2, 2)}
    maps = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    maps["fine"] = maps["fine"] * np.float32([1e-3, 100, 0]) + np.float32([0, 1000, 7.5])
    layout = Layout({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}, "int8")
    stored = layout.packed(maps)
    assert stored.dtype == np.int8 and stored.nbytes == layout.bytes == 72 + 12 + 8 * (3 + 2)
    found = layout.unpacked(stored)
    for name, expected in maps.items():
        step = (expected.max((0, 1)) - expected.min((0, 1))) / 254
        assert found[name].dtype == np.float16
        limit = 0.51 * step + 5e-4 * np.abs(expected).max((0, 1))  # half a step, and half precision
        assert (np.abs(found[name] - expected) <= limit).all()
    sample = samples([material / "images" / "0.png"])
    caches = [TeacherCache(tmp_path, teacher, "0" * 64, precision) for precision in ("float16", "int8")]
    for cache in caches:
        cache.fill(sample)
    half, integers = (cache.read(sample[0]) for cache in caches)
    assert 0 < np.abs(integers - half).max() < 0.01 * np.abs(half).max()
    assert caches[1].file(sample[0]).stat().st_size == 128 + 4 * 4 * 32 + 8 * 32


def test_what_is_damaged_missing_or_of_another_teacher_is_not_used(material, teacher, tmp_path):
    (sample,) = samples([material / "images" / "0.png"])
    cache = TeacherCache(tmp_path, teacher, "0" * 64)
    cache.fill([sample])
    whole = cache.file(sample).read_bytes()
    with pytest.raises(RunError, match="cannot be read"):
        TeacherCache(tmp_path, teacher, "1" * 64).read(sample)
    np.save(cache.file(sample), np.zeros((2, 2), np.float16))
    with pytest.raises(RunError, match=r"float16\[2, 2\].*continue with --resume"):
        cache.read(sample)
    cache.file(sample).write_bytes(whole[:50])
    with pytest.raises(RunError, match="computed again"):
        cache.read(sample)
    cache.fill([sample])
    assert cache.file(sample).read_bytes() == whole


def test_a_teacher_of_the_same_weights_and_another_architecture_has_its_own(material, teacher, tmp_path):
    """What no array shows; SAM's own is in the name of no folder, so that caches of before serve."""
    shipped = checkpoint.load(embedded_teacher())
    own = TeacherCache(tmp_path, shipped, checkpoint.sha256(embedded_teacher()))
    assert own.common.name == "888d86cdda17e060-256x256"
    configs = [SQUARE, *(dataclasses.replace(SQUARE, **{name: new}) for name, new in OTHERS.items())]
    folders = [TeacherCache(tmp_path, dataclasses.replace(teacher, config=c), "0" * 64).common for c in configs]
    assert folders[0].name == "0000000000000000-64x64" and len({*folders}) == len(folders)
    family = tiny_vit_sam().config
    white = dataclasses.replace(family, head=dataclasses.replace(family.head, pixel_mean=(0.0, 0.0, 0.0)))
    others = (family, white, dataclasses.replace(family, single_mask=False))
    assert len({"", *map(teacher_cache.unshown, others)}) == 4


def test_several_processes_leave_nothing_out(material, teacher, tmp_path, monkeypatch):
    """Each takes its share of all images, also when another has written some already."""
    images = samples(sorted((material / "images").iterdir()))
    cache = TeacherCache(tmp_path, teacher, "0" * 64)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(teacher_cache.sharding, "gather_json", lambda own: [own, 3])
    with monkeypatch.context() as patched, pytest.raises(RunError, match="choose another --cache"):
        patched.setattr(teacher_cache.sharding, "all_agree", lambda own: False)  # the other has seen less room
        cache.fill(images)
    monkeypatch.setattr(teacher_cache.sharding, "all_agree", lambda own: own)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        cache.fill(images)
        assert len(list(cache.folder.iterdir())) == 3 * (index + 1)


def test_the_main_process_announces_what_others_miss(material, teacher, tmp_path, monkeypatch, capsys):
    images = samples(sorted((material / "images").iterdir()))[:1]
    cache = TeacherCache(tmp_path, teacher, "0" * 64)
    monkeypatch.setattr(cache, "_is_there", lambda sample: True)
    cache.fill(images)
    assert "embeddings" not in capsys.readouterr().out
    monkeypatch.setattr(teacher_cache.sharding, "gather_json", lambda own: [own, 7])
    cache.fill(images)
    assert "7 images of 0.00102 MB" in capsys.readouterr().out and not list(cache.folder.iterdir())


def test_the_teacher_leaves_the_step(teacher):
    """Where its embedding alone is wanted: all of the second half."""
    step, previous = Distill("stream+embedding"), dataclasses.replace(teacher)  # whose features are wanted
    trainer = make_trainer(teacher, previous, teacher, step)
    batch = random_images(SQUARE, 1)
    embedding = np.zeros((1, *SQUARE.grid, SQUARE.out_chans), np.float16)
    terms = terms_of(step, 0, 10)
    flops = [
        trainer.step.lower(trainer.state, trainer.frozen, each, terms, 1e-4).cost_analysis()["flops"]
        for each in (batch, {**batch, "embedding": embedding})
    ]
    assert flops[1] < 0.9 * flops[0]


def test_a_full_disk_is_told_beforehand(material, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(RunError, match="choose another --cache"):
        TeacherCache(tmp_path, teacher, "0" * 64).fill(samples(sorted((material / "images").iterdir())))
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.slow
def test_a_run_with_a_cache_learns_the_same(finished, material, tmp_path, unmeasured):
    """But for half precision."""
    compress_with(compress_options(material, tmp_path / "with", cache=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path / "with", finished)]
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert (one["stage"], one["step"]) == (other["stage"], other["step"])
        np.testing.assert_allclose(one.get("embedding", 0), other.get("embedding", 0), rtol=0.02)
    assert from_torch.load(tmp_path / "with").provenance["options"]["cache"] is True

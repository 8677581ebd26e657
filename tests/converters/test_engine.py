"""An encoder on onnxruntime: exported once, the same as JAX's, taken by default only where it was measured faster."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest

from converters.onnx import engine
from helpers.models import SQUARE, random_sam
from slimsam_jax import SamAutomaticMaskGenerator, SamPredictor
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.evaluate import main as evaluate
from slimsam_jax.everything import Options as Search
from slimsam_jax.everything import everything
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.inference.engine import name_of
from slimsam_jax.inference.mixed_prompts import Prompt
from slimsam_jax.inference.predictor import as_image

IMAGES = [
    np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(((40, 60), (70, 30)))
]


@pytest.fixture(scope="module")
def sam():
    return random_sam(SQUARE)


@pytest.fixture(scope="module")
def exported(sam, tmp_path_factory):
    """The cache after an export, and the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield engine.cache_folder(engine.FOLDER), engine.engaged(sam, "onnxruntime")


@pytest.fixture
def kept(exported, monkeypatch):
    """The exported files, as they were; `faster` writes what was measured."""
    folder, _ = exported
    before = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path, content in before.items():
        path.write_bytes(content)


def measured(folder, jax_seconds: float, onnxruntime: float) -> None:
    (path,) = folder.glob("*.json")
    record = json.loads(path.read_text())
    record["seconds"][engine._here()] = {"jax": jax_seconds, "onnxruntime": onnxruntime}
    path.write_text(json.dumps(record))


def test_it_gives_what_jax_gives(sam, exported):
    """One image, several of different sizes, and everything mode."""
    ours, theirs = SamPredictor(sam), SamPredictor(exported[1])
    prompts = [[Prompt(point_coords=[[20, 10]], point_labels=[1])], [Prompt(box=[2, 3, 20, 40])]]
    for one, other in zip(*(p.predict_batch(IMAGES, prompts, return_logits=True) for p in (ours, theirs)), strict=True):
        for mine, its in zip(one[0], other[0], strict=True):
            np.testing.assert_allclose(its, mine, atol=1e-4 * np.abs(mine).max())
    embeddings = [np.asarray(encode_image(model, as_image(IMAGES[0])).embedding) for model in (sam, exported[1])]
    assert not np.array_equal(*embeddings)  # another program did compute it
    np.testing.assert_allclose(*embeddings, atol=1e-4 * np.abs(embeddings[0]).max())
    search = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    found = [SamAutomaticMaskGenerator(model, **search).generate(IMAGES[0]) for model in (sam, exported[1])]
    assert len(found[0]) == len(found[1]) > 0
    for mine, its in zip(*found, strict=True):
        assert (mine["segmentation"] == its["segmentation"]).mean() > 0.999


def test_it_is_exported_once(sam, kept, capsys, monkeypatch):
    monkeypatch.setattr(engine, "_exported", lambda *_: pytest.fail("exported"))
    again = engine.engaged(sam, "onnxruntime")
    assert name_of(again) == "onnxruntime" and len(list(kept.iterdir())) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the image encoder runs on onnxruntime: ") and "--engine jax" in line
    assert name_of(dataclasses.replace(again, params=dict(sam.params))) == "jax"  # of other parameters it knows nothing
    assert name_of(engine.engaged(sam, "jax")) == "jax"


@pytest.mark.parametrize(("seconds", "expected"), [((2.0, 1.0), "onnxruntime"), ((1.0, 2.0), "jax")])
def test_by_default_where_it_was_faster(sam, kept, capsys, seconds, expected):
    measured(kept, *seconds)
    assert name_of(engine.engaged(sam, "auto")) == expected
    assert bool(capsys.readouterr().out) == (expected == "onnxruntime")


def test_commands_ask_for_it_by_default(sam, monkeypatch, tmp_path):
    """`evaluate` and `everything` take what was faster; Python takes JAX."""
    asked = []
    monkeypatch.setattr("slimsam_jax.api.load", lambda path, engine: asked.append(engine))
    table = mock.Mock()
    monkeypatch.setattr("slimsam_jax.evaluation.run.run", lambda models, read, *_: read(models[0]) or table)
    for named in ({}, {"engine": "onnxruntime"}):
        evaluate((tmp_path,), ("data",), costs=False, **named)
    monkeypatch.setattr("converters.from_torch.load", lambda path: sam)
    monkeypatch.setattr("slimsam_jax.data.find", lambda images: ["one"])
    monkeypatch.setattr("slimsam_jax.data.together.map_together", lambda *_: ([], {"one": "it is not there"}))
    monkeypatch.setattr(engine, "engaged", lambda sam, name: asked.append(name) or sam)
    for named in ({}, {"engine": "jax"}):
        with pytest.raises(InputError, match="it is not there"):
            everything(Search(tmp_path, ("photos",), tmp_path / "masks.json", **named))
    assert asked == ["auto", "onnxruntime", "auto", "jax"]


def test_by_default_not_where_nothing_was_measured(sam, kept, monkeypatch, tmp_path):
    (path,) = kept.glob("*.json")
    for content in ("{}", "[]", '{"seconds": {"another machine": {"jax": 2, "onnxruntime": 1}}}', '{"seconds": 3}', ""):
        path.write_text(content)
        assert name_of(engine.engaged(sam, "auto")) == "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "digest", lambda sam: pytest.fail("hashed"))
    assert name_of(engine.engaged(sam, "auto")) == "jax"


def test_a_file_that_is_gone_was_never_measured(sam, kept, capsys):
    """Its record stays where the large files of a cache are removed by hand."""
    measured(kept, 2.0, 1.0)
    (path,) = kept.glob("*.onnx")
    path.unlink()
    assert name_of(engine.engaged(sam, "auto")) == "jax" and not path.exists()
    assert name_of(engine.engaged(sam, "onnxruntime")) == "onnxruntime" and path.exists()


def test_a_damaged_file_is_exported_again(sam, kept, capsys):
    measured(kept, 2.0, 1.0)
    (path,) = kept.glob("*.onnx")
    whole = path.read_bytes()
    record = json.loads(path.with_suffix(".json").read_text())
    record["seconds"]["another machine"] = {"jax": 1.0, "onnxruntime": 2.0}
    path.with_suffix(".json").write_text(json.dumps(record))
    for damaged in (whole[:1000], whole[:-1000] + bytes([whole[-1000] ^ 64]) + whole[-999:]):  # a weight, that is
        path.write_bytes(damaged)
        assert name_of(engine.engaged(sam, "auto")) == "onnxruntime"
        assert "exporting" in capsys.readouterr().out and path.read_bytes() == whole
        measured(kept, 2.0, 1.0)
    assert "another machine" in json.loads(path.with_suffix(".json").read_text())["seconds"]


def test_the_demo_and_the_engine_share_no_folder(exported, sam, monkeypatch, capsys):
    """Once it lay where the demo puts folders, after which nothing was trusted there."""
    import slimsam_jax.demo.export as demo

    monkeypatch.setattr("converters.to_onnx.export", lambda sam, folder, *_: folder.mkdir())
    demo.exported(sam, "float32", exported[0].parent)
    assert engine.cache_folder(engine.FOLDER) == exported[0] and not capsys.readouterr().err


def test_another_result_than_jax_gives_is_not_kept(sam, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened = engine._opened
    monkeypatch.setattr(engine, "_opened", lambda path: lambda *given: opened(path)(*given) * 1.001)
    with pytest.raises(RunError, match=r"differs from JAX's by 1.0e-03"):
        engine.engaged(sam, "onnxruntime")
    assert not list(engine.cache_folder(engine.FOLDER).iterdir())


def test_what_it_is_not_for(sam, monkeypatch):
    with pytest.raises(InputError, match="a model must be given"):
        engine.engaged("model.pth", "onnxruntime")
    monkeypatch.setattr("converters.to_onnx.LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="less than 2 GB"):
        engine.engaged(sam, "onnxruntime")
    monkeypatch.setattr(engine.sharding, "platform", lambda: "gpu")
    with pytest.raises(InputError, match="is for CPUs, and this is a gpu"):
        engine.engaged(sam, "onnxruntime")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx and onnxruntime: pip install 'slimsam_jax\[onnx\]'"):
        engine.engaged(sam, "onnxruntime")

"""Shared fixtures. Tests run on the CPU, whatever the machine has."""

from __future__ import annotations

import dataclasses
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
# Many tests compile the same small models; workers and the processes that tests start share what they compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="slimsam-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most of the suite is compilation, of programs that run a few times. (Level 0 breaks parity: experiments/LOG.md.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads folders of ours alone, and shall not wait for a network

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from slimsam_jax import checkpoint, compress
from slimsam_jax.compression.options import Options
from slimsam_jax.data import Sample
from slimsam_jax.data.sources import folder
from slimsam_jax.models.config import GLOBAL, Block, Config, Thresholds
from slimsam_jax.models.sam import Sam, abstract_params

# Golden vectors from the original code and a trained checkpoint. Too large for the repository (40 MB); they lie
# beside a developer's checkout. Parity with the original packages (tests/peers.py) needs none of them, nor does that
# with the part of the vectors that is small enough (tests/golden).
SHARED = Path(os.environ.get("SLIMSAM_SHARED", Path(__file__).parents[2] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the shared material; the test is skipped without it."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} of the shared material; set SLIMSAM_SHARED to its folder")
    return found


def tiny_config(image_size=(64, 48), embed_dim=24, heads=2, head_dim=12, mlp_dim=40, **kw) -> Config:
    """A rectangular SAM with a window block that needs padding (3 does not divide 4) and a global one."""
    blocks = (Block(heads, head_dim, mlp_dim, 3), Block(heads, head_dim, mlp_dim, GLOBAL))
    small = {"out_chans": 32, "decoder_mlp_dim": 48, "iou_head_dim": 32, "mask_in_chans": 8}
    return Config(image_size=image_size, embed_dim=embed_dim, blocks=blocks, **{**small, **kw})


def random_sam(config: Config, seed: int = 0) -> Sam:
    """Random weights without zeros, so that every array matters to the output."""
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    random = np.random.default_rng(seed)

    def array(path, leaf):
        spread = 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))  # keeps activations near 1
        return (path[-1].key == "scale") + (spread * random.standard_normal(leaf.shape)).astype(np.float32)

    structure = jax.tree.structure(abstract_params(config))
    leaves = [array(path, leaf) for path, leaf in shapes]
    return Sam(config, jax.tree.unflatten(structure, leaves), {"source": "random"})


@pytest.fixture(scope="session")
def tiny_sam() -> Sam:
    return random_sam(tiny_config())


def random_images(config: Config, count: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as `data.Batches` gives it; the last picture does not fill its frame."""
    random = np.random.default_rng(seed)
    height, width = config.image_size
    sizes = np.full((count, 2), (height, width), np.int32)
    sizes[-1] = (height, width - 5)
    return {"image": random.integers(0, 256, (count, height, width, 3), np.uint8), "size": sizes}


def pytest_collection_modifyitems(items):
    """What needs the finished run goes to one worker, so that it is made once."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("finished"))


def samples(paths) -> list[Sample]:
    """Of picture files, with the SA-1B .json beside those that have one."""
    return [folder.sample(path, path.with_suffix(".json").exists()) for path in paths]


SQUARE = tiny_config(image_size=(64, 64))
# As pruning leaves it: heads, channels and MLPs differ, and the embedding fits none of them.
UNEVEN = dataclasses.replace(SQUARE, embed_dim=13, blocks=(Block(2, 5, 17, 3), Block(3, 8, 40, GLOBAL)))


@pytest.fixture()
def uneven(tmp_path):
    """A model folder, without a report."""
    checkpoint.save(random_sam(UNEVEN, 1), tmp_path / "uneven")
    return tmp_path / "uneven"


@pytest.fixture()
def slim_sam_torch():
    """The module, imported without torchvision; what it registers is forgotten."""
    from peers import segment_anything

    registry = segment_anything().sam_model_registry
    from converters import slim_sam_torch

    before = dict(registry)
    yield slim_sam_torch
    registry.clear()
    registry.update(before)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a teacher and pictures, two of them annotated."""
    from test_data import write_annotation

    root = tmp_path_factory.mktemp("material")
    teacher = dataclasses.replace(random_sam(SQUARE), thresholds=Thresholds(0.0, 0.0, 0.5))
    checkpoint.save(teacher, root / "teacher")
    for name, count in (("images", 6), ("val", 2)):
        (root / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    for path in (root / "val").glob("*.png"):
        write_annotation(path)
    return root


PROJECTED = ("prune.criterion=projection", "prune.allocation=macs", "distill.lr=auto")
ALTERNATING = {"recipe": "taylor", "set": ("distill.validations=2", *PROJECTED)}


def compress_options(material, out, **changes) -> Options:
    """Of a run that distils after each of its two cuts, four steps each, validated and saved every second one.

    Another recipe or other choices are those of the default recipe, which distils once.
    """
    once = {"recipe": "default", "set": ("distill.validations=2",)}
    fields = {
        "teacher": material / "teacher",
        "images": (material / "images",),
        "val": (material / "val",),
        "steps": 4,
        "batch": 2,
        "save_every": 2,
        "out": out,
    }
    return Options(**{**fields, **(once if {"recipe", "set"} & {*changes} else ALTERNATING), **changes})


@pytest.fixture(scope="session")
def finished(material):
    compress.compress(compress_options(material, material / "slim"))
    return material / "slim"

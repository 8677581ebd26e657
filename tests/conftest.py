"""Shared fixtures. Tests run on the CPU, whatever the machine has."""

from __future__ import annotations

import collections
import dataclasses
import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
# Many tests compile the same small models; workers and the processes that tests start share what they compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="slimsam-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most of the suite is compilation, of programs that run a few times. Unoptimised they compile in a third of the time.
# OPTIMIZED below says which are optimised all the same, by XLA at level 1; with this variable at 0 all are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters compile a training step in two thirds of the time; newer versions have them no longer and would
# stop at the flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
# Workers fill the cores by themselves: more threads of PyTorch and BLAS would wait for each other, and busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What tests start imports this checkout and `helpers`, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [*map(str, Path(__file__).parents[1::-1]), os.environ.get("PYTHONPATH")])
)
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads folders of ours alone, and shall not wait for a network

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.images import write_annotation
from helpers.models import SQUARE, UNEVEN, random_sam, tiny_config
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression import pipeline, report
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.sam import Sam

# Tracing makes objects by the million, and walks of the garbage collector through them took a tenth of the time.
gc.set_threshold(20_000, 10, 10)
UNOPTIMIZED = "jax_disable_most_optimizations"
ALL_OPTIMIZED = not jax.config.read(UNOPTIMIZED)
# What compares gradients with other people's code, as unoptimised ones are off by more than parity allows
# (experiments/LOG.md), RepViT's last layers among it; and what computes longer than it compiles, photographs by the
# small SAM.
OPTIMIZED = (
    "models/test_rep_vit.py",
    "parity/test_golden.py",
    "parity/test_models.py",
    "parity/test_reference.py",
    "evaluation/",
    "inference/",
    "converters/test_torch_export.py",
    "experiments/test_notebooks.py",
)


@pytest.fixture()
def no_collector():
    """While a test takes time: a walk of the garbage collector through what others left takes a second, too."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def tiny_sam() -> Sam:
    return random_sam(tiny_config())


def optimized(item: pytest.Item) -> bool:
    """Tells whether a test's programs are optimised; those of a run that several compare themselves with never are."""
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    return ALL_OPTIMIZED or (path.startswith(OPTIMIZED) and "finished" not in item.fixturenames)


def pytest_collection_modifyitems(items):
    """Files with the most slow tests come first, then those with the most, so that no worker is left alone in the end.

    Before and after them those of a kind of program follow each other: what one has compiled the next can use.
    """
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    every = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (not slow[item.path], optimized(item), -slow[item.path], -every[item.path]))


def pytest_collection_finish():
    """What is there before the first test stays, and needs no walk of the garbage collector."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item):
    """Optimises programs from here on, or no more. JAX would go on with those of the other kind, and forgets them."""
    unoptimized = not optimized(item)
    if jax.config.read(UNOPTIMIZED) != unoptimized:
        jax.clear_caches()
        jax.config.update(UNOPTIMIZED, unoptimized)
        os.environ[UNOPTIMIZED.upper()] = str(int(unoptimized))  # for what it starts


@pytest.fixture()
def uneven(tmp_path):
    """A model folder, without a report."""
    checkpoint.save(random_sam(UNEVEN, 1), tmp_path / "uneven")
    return tmp_path / "uneven"


@pytest.fixture()
def slim_sam_torch():
    """The module, imported without torchvision; what it registers is forgotten."""
    from helpers.peers import segment_anything

    registry = segment_anything().sam_model_registry
    from converters import slim_sam_torch

    before = dict(registry)
    yield slim_sam_torch
    registry.clear()
    registry.update(before)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a teacher and images, two of them annotated."""
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


@pytest.fixture(scope="session")
def finished(material):
    compress_with(compress_options(material, material / "slim"))
    return material / "slim"


@pytest.fixture()
def without_figure(monkeypatch):
    """Leaves out the image of the report, where nobody looks at it."""
    monkeypatch.setattr(report, "draw", lambda *_: None)


@pytest.fixture()
def unmeasured(monkeypatch, without_figure):
    """Leaves out what is measured of a student in the end, a quarter of a run, where its model and log alone count."""
    monkeypatch.setattr(pipeline, "calibrated", lambda run, student: student)
    monkeypatch.setattr(report, "measure", lambda *_: {"skipped": []})
    monkeypatch.setattr(report, "print_table", lambda *_: None)

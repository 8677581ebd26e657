"""One device, eight, and several processes take the same steps.

More than one in processes of their own, since the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from converters import from_torch
from helpers import sharded_worker
from helpers.images import save_image
from helpers.processes import free_address, start, wait_for
from slimsam_jax import sharding
from slimsam_jax.profiling import sam_costs


def train(*runs: dict, devices: int = 1, processes: int = 1) -> None:
    """Runs `helpers.sharded_worker.main` with each of these arguments, one after the other, in new processes."""
    worker, address = ("-m", "helpers.sharded_worker"), free_address()
    joined = [{"distributed": f"{address},{processes},{i}"} if processes > 1 else {} for i in range(processes)]
    wait_for(*(start([*worker, json.dumps([run | own for run in runs])], devices) for own in joined))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Fifteen steps on one device, which is what this process has."""
    folder = tmp_path_factory.mktemp("alone")
    assert sharded_worker.main(fsdp=1, count=15, out=str(folder))["all-reduce"] == 0
    return folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Five steps on eight devices by data alone, and on 2 x 4."""
    folder = tmp_path_factory.mktemp("eight")
    train(*({"fsdp": fsdp, "count": 5, "out": str(folder / str(fsdp))} for fsdp in (1, 4)), devices=8)
    return folder


def assert_same_steps(one: Path, other: Path, step: int) -> None:
    with np.load(one / f"{step}.npz") as expected, np.load(other / f"{step}.npz") as found:
        assert set(expected) == set(found)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


def facts_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.slow
def test_data_parallel_reduces_gradients_once_and_gathers_nothing(alone, eight):
    facts = facts_of(eight / "1")
    assert_same_steps(alone, eight / "1", 5)
    assert facts["all-reduce"] > 0 and facts["parameters split"] == facts["state split"] == 0
    assert not any(facts[name] for name in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"))
    assert facts["parameters"] <= facts["numbers reduced"] < 1.01 * facts["parameters"] + 100  # and some sums


@pytest.mark.slow
def test_split_parameters_restored_by_two_processes_and_by_one(alone, eight):
    """Five steps on 2 x 4 devices, five in two processes of 1 x 2 each, five on one device."""
    folder = eight / "4"
    facts = facts_of(folder)
    assert_same_steps(alone, folder, 5)
    assert facts["all-gather"] > 0
    assert 0.5 * facts["parameters"] < facts["parameters split"] < facts["parameters"]
    assert facts["state split"] == 3 * facts["parameters split"]  # Adam's two moments and the average
    more = {"count": 5, "out": str(folder)}
    train({"fsdp": 2, **more}, devices=2, processes=2)
    assert_same_steps(alone, folder, 10)
    sharded_worker.main(fsdp=1, **more)
    assert_same_steps(alone, folder, 15)


@pytest.mark.slow
def test_parts_of_a_step_are_of_the_same_images_in_two_processes(tmp_path):
    """Each part's terms are relative to its own variance, so that other parts would learn something else."""
    how = {"fsdp": 1, "count": 5, "parts": 2}
    sharded_worker.main(**how, out=str(tmp_path / "one"))
    train({**how, "out": str(tmp_path / "two")}, processes=2)
    assert_same_steps(tmp_path / "one", tmp_path / "two", 5)


@pytest.mark.slow
def test_the_command_in_two_processes(finished, material, tmp_path):
    """Pruning, validation, checkpoints and report."""
    program = """
import sys
from pathlib import Path
from helpers.runs import compress_options
from slimsam_jax.api import compress_with
compress_with(compress_options(Path(sys.argv[1]), Path(sys.argv[2]), distributed=sys.argv[3]))
"""
    address, out = free_address(), tmp_path / "slim"
    wait_for(*(start(["-c", program, str(material), str(out), f"{address},2,{i}"]) for i in range(2)))
    one, two = (from_torch.load(folder) for folder in (finished, out))
    # Noise is drawn for each batch, and batches are as wide as there are devices, so widths may differ by a channel.
    assert one.config.embed_dim == two.config.embed_dim
    costs = [sam_costs.encoder_macs(sam.config).total for sam in (one, two)]
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.02)
    errors = [json.loads((folder / "report.json").read_text())["embedding_error"] for folder in (finished, out)]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.3)
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (finished, out)]
    assert len(logs[0]) == len(logs[1]) and sorted(os.listdir(finished)) == sorted(os.listdir(out))


def test_processes_count_broken_images_together(tmp_path):
    """Each of two meets another broken one, of 60; all know both, and stop alike, none by itself."""
    program = """
import itertools, json, sys
from pathlib import Path
import jax
from slimsam_jax import sharding
from slimsam_jax.data import batches, find
from slimsam_jax.errors import RunError
sharding.join_processes(sys.argv[2])
make = lambda limit: batches.Batches(find([sys.argv[1]]), (32, 32), 2, 0, 0, (jax.process_index(), 2), max_broken=limit)
def seen(limit):
    stream = make(limit)
    for sample in stream.samples_of(0):
        Path(sample.name).write_text("no image")
    list(itertools.islice(stream, 2))
    own = len(stream.skipped)
    try:
        stream.agree_on_skipped()
        return own, sorted(stream.skipped)
    except RunError as error:
        return own, str(error)
result = json.dumps([seen(0), seen(2 / 60)])
Path(sys.argv[3]).write_text(result)
"""
    for i in range(60):
        save_image(tmp_path / "in" / f"{i}.png", seed=i)
    address, outs = free_address(), [tmp_path / f"{i}.json" for i in range(2)]
    arguments = [["-c", program, str(tmp_path / "in"), f"{address},2,{i}", str(out)] for i, out in enumerate(outs)]
    wait_for(*map(start, arguments))
    results = [json.loads(out.read_text()) for out in outs]
    assert results[0] == results[1]
    (own, line), (_, names) = results[0]
    assert own == 1 and "2 of 60 images cannot be used, and --strict allows none; the last: " in line
    assert len(names) == 2


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((64, 128), 1, ()),
        ((64, 128), 4, (None, "fsdp")),
        ((168, 66), 4, ("fsdp", None)),  # the longest that divides
        ((66, 169), 4, ()),
        ((2, 4, 2), 2, ()),  # too small to be worth it
        ((), 2, ()),
        ((12, 64, 14), 8, (None, "fsdp", None)),
    ],
)
def test_what_is_split_along_which_axis(shape, fsdp, expected):
    assert sharding.partition(shape, fsdp) == PartitionSpec(*expected)


def test_devices_that_cannot_be_grouped():
    with pytest.raises(ValueError, match="cannot be split in groups of 3"):
        sharding.make_mesh(3)

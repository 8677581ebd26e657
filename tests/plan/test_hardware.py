"""Names of hardware, and compilers that are not installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jax.experimental import topologies

from slimsam_jax import sharding
from slimsam_jax.errors import InputError
from slimsam_jax.plan import hardware


class Device:
    platform, device_kind, compute_capability = "cuda", "NVIDIA H100 80GB HBM3", "9.0"


def described(**said):
    """In place of a topology: so many devices as it asks for."""
    sides = said["topology"] if "topology" in said else said["topology_name"].partition(":")[2]
    count = 1
    for side in sides.split("x"):
        count *= int(side)
    return type("Topology", (), {"devices": [Device()] * count})


@pytest.mark.parametrize(
    ("name", "devices"),
    [("h100", 1), ("h100x8", 8), ("h200", 1), ("v5e-1", 1), ("v5e-16", 16), ("v5e-256", 256), ("v5p-8", 8), ("cpu", 1)],
)
def test_names_stand_for_so_many_chips(monkeypatch, name, devices):
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    monkeypatch.setattr(hardware, "_cudnn_version", lambda: 92800)
    assert len(hardware.named(name).devices) == devices


@pytest.mark.parametrize("name", ["h100-8", "v5ex4", "h100x0", "tpu", "", "h1000", "V5E-1", "v5e-1\n"])
def test_an_unknown_name_is_answered_with_those_there_are(name):
    with pytest.raises(InputError, match="no hardware that can be planned for; there are cpu, h100"):
        hardware.named(name)


@pytest.mark.parametrize(("name", "message"), [("v5e-3", "a slice of 3 v5e chips"), ("h100x9", "9 GPUs are more")])
def test_a_number_that_there_is_not(name, message):
    with pytest.raises(InputError, match=message):
        hardware.named(name)


def test_a_compiler_that_is_not_installed(monkeypatch):
    def absent(**_):
        raise RuntimeError("no such plug-in\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r"pip install -e '.\[plan-tpu\]' brings libtpu \(no such plug-in\)$"):
        hardware.named("v5e-1")
    monkeypatch.setattr("jax._src.lib.cuda_versions", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[plan-gpu\]' brings jax-cuda12-plugin$"):
        hardware.named("h100")


def test_programs_ask_what_they_are_made_for_and_not_what_is_here():
    """`sharding` alone asks JAX: what asked it while tracing would be planned for the machine that compiles."""
    package = Path(sharding.__file__).parent
    asks = re.compile(r"jax\.(default_backend|device_count|devices)\(\)")
    assert [path.name for path in package.rglob("*.py") if asks.search(path.read_text())] == ["sharding.py"]


def test_jax_is_answered_for_the_hardware():
    from jax._src.cudnn import fused_attention_stablehlo as asked

    before = asked.check_compute_capability
    h100, a100 = (hardware.Hardware(name, hardware.CHIPS[name], [Device()]) for name in ("h100", "a100"))
    with hardware.compiled_elsewhere(h100):
        assert asked.check_compute_capability("9.0") and asked.is_cuda_compute_capability_equal("9.0")
    with hardware.compiled_elsewhere(a100):
        assert asked.check_compute_capability("8.0") and not asked.check_compute_capability("9.0")
    assert asked.check_compute_capability is before


def test_a_target_takes_the_place_of_the_devices(monkeypatch):
    forgotten = []
    monkeypatch.setattr("jax.clear_caches", lambda: forgotten.append(True))
    with sharding.targeting([Device()] * 8):
        assert sharding.platform() == "gpu" and sharding.device_count() == len(sharding.devices()) == 8
        assert forgotten == [True]  # what was traced for the CPU
    assert sharding.platform() == "cpu" and forgotten == [True, True]

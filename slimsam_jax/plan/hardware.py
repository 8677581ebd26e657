"""Describes the hardware that is planned for, and hands out its devices, which compile and never run.

Numbers of peak arithmetic (dense) and of memory are the vendors': NVIDIA's data sheets of H100 SXM, H200 and
A100 SXM, Google's pages of TPU v5e, v5p and v6e.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax

from slimsam_jax.errors import InputError

MIB = 2**20
# XLA's description of a GPU: what its compiler asks of a device (xla/tools/hlo_opt/gpu_specs has such files).
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{title}"
"""
HOPPER = {"shared": 233472, "optin": 232448, "cores": 132, "units": 128, "clock": 1.98, "cache": 52428800}
AMPERE = {"shared": 167936, "optin": 166912, "cores": 108, "units": 64, "clock": 1.41, "cache": 41943040}


Precision = Literal["bfloat16", "float32", "exact"]  # of products; "float32" is what JAX makes of it by default


class Chip(NamedTuple):
    """A kind of device.

    Attributes:
      flops: bfloat16 operations a second, at best.
      single: of float32 numbers as JAX multiplies them by default: a GPU's TF32, one pass in bfloat16 of a TPU.
      exact: float32 ones, in as many bits: of a TPU's six passes in bfloat16.
      bandwidth: bytes a second from and to its memory.
      memory: bytes that programs can have. Of a GPU's, JAX takes three quarters by default
        (XLA_PYTHON_CLIENT_MEM_FRACTION).
      platform: "cpu", "cuda" or "tpu".
      title: as the vendor calls it; of a TPU as its topologies are called.
      details: for `GPU_TARGET`.
    """

    flops: float
    single: float
    exact: float
    bandwidth: float
    memory: int
    platform: str
    title: str
    details: dict[str, float] = {}  # noqa: RUF012

    def peak(self, precision: Precision) -> float:
        """Operations a second, at best, of products in this precision."""
        return {"bfloat16": self.flops, "float32": self.single, "exact": self.exact}[precision]


H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
HOPPER |= {"major": 9, "minor": 0}
AMPERE |= {"major": 8, "minor": 0}
CHIPS = {
    "h100": Chip(989e12, 495e12, 67e12, 3.35e12, int(0.75 * 81559 * MIB), "cuda", H100, HOPPER),
    "h200": Chip(989e12, 495e12, 67e12, 4.8e12, int(0.75 * 143771 * MIB), "cuda", H200, HOPPER),
    "a100": Chip(312e12, 156e12, 19.5e12, 2.04e12, int(0.75 * 81920 * MIB), "cuda", A100, AMPERE),
    "v5e": Chip(197e12, 197e12, 197e12 / 6, 0.82e12, int(15.75 * 1024 * MIB), "tpu", "v5e"),
    "v5p": Chip(459e12, 459e12, 459e12 / 6, 2.77e12, int(95.74 * 1024 * MIB), "tpu", "v5p"),
    "v6e": Chip(918e12, 918e12, 918e12 / 6, 1.64e12, int(31.25 * 1024 * MIB), "tpu", "v6e"),
}
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
EXAMPLES = "cpu, h100, h100x8, h200, a100, v5e-1, v5e-16, v5e-256, v5p-8, v6e-8"


class Hardware(NamedTuple):
    """So many chips, of which JAX compiles for each the same."""

    name: str
    chip: Chip | None
    devices: Sequence[jax.Device]


def named(name: str) -> Hardware:
    """Returns the hardware of a name such as "h100x8" (GPUs of one machine), "v5e-16" (chips of a slice) or "cpu".

    Raises:
      InputError: there is none of this name, or its compiler is not installed.
    """
    if name == "cpu":
        return Hardware(name, None, jax.devices("cpu")[:1])
    match = re.fullmatch(r"([a-z0-9]+?)(?:(x|-)([1-9][0-9]{0,3}))?", name, re.ASCII)
    chip, count = (CHIPS.get(match[1]), int(match[3] or 1)) if match else (None, 1)
    if chip is None or match[2] == ("x" if chip.platform == "tpu" else "-"):
        raise InputError(f"--on {name!r:.40} is no hardware that can be planned for; there are {EXAMPLES}")
    devices = _tpus(chip, count) if chip.platform == "tpu" else _gpus(chip, count)
    return Hardware(name, chip, devices)


def _tpus(chip: Chip, count: int) -> Sequence[jax.Device]:
    shapes = CUBES if chip.title == "v5p" else SLICES
    if count not in shapes:
        raise InputError(f"a slice of {count} {chip.title} chips is not known; there are {', '.join(map(str, shapes))}")
    # A host has four chips, or this many.
    host = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    return _described("libtpu", "plan-tpu", platform="tpu", topology_name=f"{chip.title}:{shapes[count]}", **host)


def _gpus(chip: Chip, count: int) -> Sequence[jax.Device]:
    if count > 8:
        raise InputError(f"{count} GPUs are more than one machine has; up to 8 can be planned for, as in h100x8")
    number = _cudnn_version()
    numbers = {"dnn": (number // 10000, number // 100 % 100, number % 100), "title": chip.title}
    target = GPU_TARGET.format(memory=int(chip.memory / 0.75), bandwidth=int(chip.bandwidth), **numbers, **chip.details)
    return _described("jax-cuda12-plugin", "plan-gpu", platform="cuda", target_config=target, topology=f"1x{count}x1")


def _cudnn_version() -> int:
    """Of the cuDNN that is installed, 92800 say, which compiles the graphs of attention."""
    from jax._src.lib import cuda_versions

    try:
        return cuda_versions.cudnn_get_version()
    except (AttributeError, RuntimeError):  # None without the plug-in; or its library is not there
        raise InputError(missing("jax-cuda12-plugin", "plan-gpu")) from None


def _described(package: str, extra: str, **description: str | tuple[int, ...]) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**description).devices
    except Exception as error:  # JaxRuntimeError, RuntimeError, ImportError: as many as there are ways to be missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{missing(package, extra)} ({reason})") from None


def missing(package: str, extra: str) -> str:
    return f"the compiler for this hardware is not here: pip install -e '.[{extra}]' brings {package}"


@contextlib.contextmanager
def compiled_elsewhere(hardware: Hardware) -> Iterator[None]:
    """Answers for the hardware where JAX asks the machine that compiles: whether its GPU has flash attention."""
    from jax._src.cudnn import fused_attention_stablehlo as asked

    names = ("check_compute_capability", "is_cuda_compute_capability_equal")
    before = {name: getattr(asked, name) for name in names}
    own = (0, 0)
    if hardware.chip and hardware.chip.platform == "cuda":
        own = (hardware.chip.details["major"], hardware.chip.details["minor"])
    wanted = lambda text: tuple(int(number) for number in text.split("."))
    asked.check_compute_capability = lambda text: own >= wanted(text)
    asked.is_cuda_compute_capability_equal = lambda text: own == wanted(text)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(asked, name, function)

"""Measures what models cost, to stand beside what they score: parameters, multiply-accumulates, latency, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from slimsam_jax.evaluation import tables
from slimsam_jax.models.fast_sam import FastSam, detect
from slimsam_jax.models.sam import Sam, encode
from slimsam_jax.profiling import fast_sam_costs, sam_costs
from slimsam_jax.profiling.latency import encoder_runner, interleaved

Costs = list[dict[str, float]]  # of each model
ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # key, label, format of a cell
    ("parameters", "parameters, whole model", lambda v: f"{v / 1e6:.2f} M"),
    ("encoder_parameters", "parameters, encoder", lambda v: f"{v / 1e6:.2f} M"),
    ("encoder_macs_linear", "encoder MACs, linear", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_macs_attention", "encoder MACs, attention", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_latency_ms", "encoder, one image", lambda v: f"{v:.1f} ms"),
    ("encoder_memory", "encoder, peak memory", lambda v: f"{v / 1e6:.0f} MB"),
)


def measure(sams: Sequence[Sam | FastSam]) -> Costs:
    """Measures models, those of one image in float32 on this machine; latencies by turns, so that they compare.

    Returns:
      of each model "parameters", "encoder_parameters", "encoder_macs_linear", "encoder_macs_attention",
      "encoder_latency_ms" (the median) and "encoder_memory" in bytes: XLA's count of what the program holds at most,
      weights included.
    """
    seconds = interleaved([_runner(sam) for sam in sams])
    counted = [_of_fast_sam(sam) if isinstance(sam, FastSam) else _of(sam) for sam in sams]
    return [each | {"encoder_latency_ms": 1e3 * second} for each, second in zip(counted, seconds, strict=True)]


def _runner(sam: Sam | FastSam) -> Callable[[], Any]:
    """Encodes one black image; of a FastSAM the whole network does."""
    if not isinstance(sam, FastSam):
        return encoder_runner(sam.config, sam.params)
    return lambda: detect(sam.config, sam.params, _black(sam))


def _black(sam: FastSam) -> np.ndarray:
    return np.zeros((1, sam.config.image_size, sam.config.image_size, 3), np.uint8)


def _of_fast_sam(sam: FastSam) -> dict[str, float]:
    """Its network is all encoder."""
    count = fast_sam_costs.parameters_of(sam.config)
    memory = detect.lower(sam.config, sam.params, _black(sam)).compile().memory_analysis()
    return {
        "parameters": count,
        "encoder_parameters": count,
        "encoder_macs_linear": fast_sam_costs.macs_of(sam.config),
        "encoder_macs_attention": 0,
        "encoder_memory": _bytes(memory),
    }


def _of(sam: Sam) -> dict[str, float]:
    macs = sam_costs.encoder_macs(sam.config)
    return {
        "parameters": sam_costs.parameters(sam.params),
        "encoder_parameters": sam_costs.parameters(sam.params["image_encoder"]),
        "encoder_macs_linear": macs.linear,
        "encoder_macs_attention": macs.attention,
        "encoder_memory": _memory(sam),
    }


def _memory(sam: Sam) -> int:
    """Bytes of the encoder's program, which is compiled already where the latency was measured."""
    frame, size = np.zeros((1, *sam.config.image_size, 3), np.uint8), np.array([sam.config.image_size], np.int32)
    return _bytes(encode.lower(sam.config, sam.params, frame, size, jnp.float32).compile().memory_analysis())


def _bytes(memory: Any) -> int:
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def rows(costs: Costs) -> list[list[Any]]:
    """Formats the rows: [[label, a cell per model], ...]."""
    return [[label, *(cell(model[key]) for model in costs)] for key, label, cell in ROWS]


def print_table(names: Sequence[str], costs: Costs) -> None:
    tables.print_rows(["costs", *names], rows(costs))


def markdown(names: Sequence[str], costs: Costs) -> str:
    return tables.markdown_rows(["costs", *names], rows(costs))

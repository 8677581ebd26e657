"""Measures what models cost, to stand beside what they score: parameters, multiply-accumulates, latency, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slimsam_jax.evaluation import tables
from slimsam_jax.models.kinds import Model
from slimsam_jax.profiling.costs import costs_of
from slimsam_jax.profiling.latency import interleaved

Costs = list[dict[str, float]]  # of each model
ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # key, label, format of a cell
    ("parameters", "parameters, whole model", lambda v: f"{v / 1e6:.2f} M"),
    ("encoder_parameters", "parameters, encoder", lambda v: f"{v / 1e6:.2f} M"),
    ("encoder_macs_linear", "encoder MACs, linear", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_macs_attention", "encoder MACs, attention", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_latency_ms", "encoder, one image", lambda v: f"{v:.1f} ms"),
    ("encoder_memory", "encoder, peak memory", lambda v: f"{v / 1e6:.0f} MB"),
)


def measure(sams: Sequence[Model]) -> Costs:
    """Measures models, those of one image in float32 on this machine; latencies by turns, so that they compare.

    Returns:
      of each model "parameters", "encoder_parameters", "encoder_macs_linear", "encoder_macs_attention",
      "encoder_latency_ms" (the median) and "encoder_memory" in bytes: XLA's count of what the program holds at most,
      weights included.
    """
    costs = list(map(costs_of, sams))
    seconds = interleaved([each.program for each in costs])
    return [
        {
            "parameters": each.parameters,
            "encoder_parameters": each.encoder_parameters,
            "encoder_macs_linear": each.macs.linear,
            "encoder_macs_attention": each.macs.attention,
            "encoder_memory": each.memory(),
            "encoder_latency_ms": 1e3 * second,
        }
        for each, second in zip(costs, seconds, strict=True)
    ]


def rows(costs: Costs) -> list[list[Any]]:
    """Formats the rows: [[label, a cell per model], ...]."""
    return [[label, *(cell(model[key]) for model in costs)] for key, label, cell in ROWS]


def print_table(names: Sequence[str], costs: Costs) -> None:
    tables.print_rows(["costs", *names], rows(costs))


def markdown(names: Sequence[str], costs: Costs) -> str:
    return tables.markdown_rows(["costs", *names], rows(costs))

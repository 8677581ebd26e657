"""All files of experiments/tables/ and experiments/figures/, made anew from results/*.jsonl.

python -m experiments.tables
"""

from __future__ import annotations

from experiments import (
    distillers,
    estimators,
    fair,
    families,
    figures,
    hiera_end_to_end,
    hierarchical,
    pruning,
    quantization,
    quantization_latency,
    reference_results,
    slimming,
    spot_checks,
    teacher_card,
    teachers,
)
from experiments.sa1b import distillers_hours, hours
from slimsam_jax import cli

COUNTED = (hours, distillers_hours)
MEASURED = (
    slimming,
    pruning,
    hierarchical,
    estimators,
    reference_results,
    quantization,
    quantization_latency,
    distillers,
    families,
    hiera_end_to_end,
    teachers,
    fair,
    teacher_card,
    spot_checks,
)


def main() -> None:
    """Write all tables and figures."""
    for part in (*MEASURED, *COUNTED):
        part.table()
    figures.draw()


if __name__ == "__main__":
    cli.run(main)

"""All files of experiments/tables/ and experiments/figures/, made anew from results/*.jsonl.

python -m experiments.tables
"""

from __future__ import annotations

from experiments import estimators, hierarchical, pruning, quantization, reference_results, slimming
from experiments.sa1b import hours
from slimsam_jax import cli

PARTS = (slimming, pruning, hours, hierarchical, estimators, reference_results, quantization)


def main() -> None:
    """Write all tables and figures."""
    for part in PARTS:
        part.table()


if __name__ == "__main__":
    cli.run(main)

"""Says what a compression needs on hardware that is not here. `python -m slimsam_jax.plan`, or `slimsam plan`."""

from __future__ import annotations

import os

from slimsam_jax import cli
from slimsam_jax.compression.set_option import explain
from slimsam_jax.plan.options import Options

# The process computes on no device; libtpu would wait for a metadata server, and for a chip. A program from the cache
# says nothing of its memory.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody's chip is taken
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def main(options: Options) -> None:
    """Plans what the options name."""
    os.environ.update(ENVIRONMENT)
    from slimsam_jax.plan.run import run

    run(options)


if __name__ == "__main__":
    cli.run(Options, main, explain)

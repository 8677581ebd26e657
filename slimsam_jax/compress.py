"""A SAM and a folder of images in, a slim SAM out. `python -m slimsam_jax.compress`, or `slimsam compress`."""

from __future__ import annotations

from slimsam_jax import cli
from slimsam_jax.api import compress_with
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.set_option import explain

if __name__ == "__main__":
    cli.run(Options, compress_with, explain)

"""Compresses a SAM: it and a folder of images in, a slim SAM out. `python -m slimsam_jax.compress`."""

from __future__ import annotations

from typing import Any

from slimsam_jax import cli
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.steps import Recipe
from slimsam_jax.progress import say


def compress(options: Options, recipe: Recipe | None = None) -> dict[str, Any]:
    """Runs the whole compression, as `compression.pipeline` describes it.

    Args:
      recipe: the steps, if not those that the options name.

    Returns:
      The report, as in `report.json`.

    Raises:
      InputError: bad options or files; nothing has been written then.
      RunError, OSError: a fault while running; the folder can be resumed. Or too many of --val could not be
        measured on, once all is done and written.
    """
    options.check()
    if options.distributed:
        from slimsam_jax.sharding import join_processes  # needs JAX, whose import takes seconds

        join_processes(options.distributed)
    else:
        announce(options)
    from converters.from_torch import load  # here, so that --help and wrong options need not wait for JAX
    from slimsam_jax.compression.pipeline import run
    from slimsam_jax.data import embedded_teacher

    return run(options, load(options.teacher or embedded_teacher()), recipe)


def announce(options: Options) -> None:
    """Says what will be done before JAX is there, which takes seconds to come; `pipeline.announce` goes on."""
    images = ", ".join(map(str, options.images)) or "the photographs in the package"
    val = ", ".join(map(str, options.val)) or "an eighth of them, held out"
    how_much = f"budget {options.budget}" if options.budget else f"{100 * options.channel_ratio():g} % of the channels"
    say("teacher", str(options.teacher or "the small SAM in the package"))
    say("images", f"{images}; to measure on: {val}")
    say("recipe", f"{options.recipe}{''.join(f' {choice}' for choice in options.set)}, to cut: {how_much}")
    say("to", f"{options.out}/{' (resumed)' if options.resume else ''}")


if __name__ == "__main__":
    cli.run(Options, compress)

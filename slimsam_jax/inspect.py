"""Shows the parts of a model, and what pruning would do to it. `python -m slimsam_jax.inspect MODEL --images DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimsam_jax import cli, limits
from slimsam_jax.cli.checks import check_file, check_seed
from slimsam_jax.compression.set_option import explain
from slimsam_jax.errors import InputError


def main(
    model: Annotated[Path, tyro.conf.Positional],
    images: tuple[Path, ...] = (),
    ratio: float = 0.5,
    ratios: tuple[float, ...] = (0.25, 0.5, 0.77),
    recipe: Literal["default", "taylor", "slimsam"] = "default",
    set: tuple[str, ...] = (),
    importance_images: int = 32,
    seed: int = 0,
    layers: bool = False,
    out: Path = Path("inspect.png"),
):
    """Show the blocks of a SAM; with images, also what its channels gain and what cutting them would cost.

    Prints a table: widths, parameters and multiply-accumulates of every block. With --images, prunes
    by each of --ratios without distilling, prints the error of the embedding, and draws the gain of
    every channel, what --ratio would keep, and the error against the ratio; of encoders that are not SAM's ViT
    the error alone.

    Args:
      model: a model folder, a .pth, or a Hugging Face SamModel or Sam2Model folder.
      images: folders of images; an eighth of them measures the error, the others give the importance.
      ratio: what is drawn as kept.
      ratios: shares of the channels to try; 0.5 leaves 35 % of the parameters of the small SAM's encoder, 0.77 18 %.
      recipe: whose cuts, as for compress: "default" chooses a basis before it cuts, the others cut whole channels.
      set: choices that differ from the recipe's, as prune.NAME=VALUE.
      importance_images: how many images importance or statistics are estimated from.
      seed: of noise and order of images.
      layers: also list every layer of the image encoder: parameters, shape of its output, multiply-accumulates.
      out: the figure to write, PNG.
    """
    tried = sorted({ratio, *ratios})
    if not all(0 < r < 1 for r in tried):
        raise InputError(f"--ratio and --ratios must lie between 0 and 1, and {tried} do not")
    if len(tried) > 20:
        raise InputError(f"--ratios: {len(tried)} of them are more than a plot can show; at most 20")
    limits.check("--importance-images", importance_images, limits.Range(1, limits.COUNT, True))
    check_seed(seed)
    if images:
        check_file(out)
    from converters.from_torch import load
    from slimsam_jax.checkpoint import describe
    from slimsam_jax.compression import analysis, found_groups, widths
    from slimsam_jax.compression.budget import Target
    from slimsam_jax.compression.recipes import RECIPES
    from slimsam_jax.compression.set_option import change
    from slimsam_jax.compression.steps import Prune
    from slimsam_jax.data import find
    from slimsam_jax.profiling import sam_costs
    from slimsam_jax.profiling.layers import table

    choices = change(RECIPES[recipe], set)
    if any(isinstance(step, Prune) and step.ratio for step in choices):
        raise InputError("--ratio and --ratios say how much is cut here: leave --set prune.ratio out")
    samples = find(images) if images else []
    sam = load(model)
    analysis.print_parts(sam)
    if layers:
        print(table(sam_costs.encoder_layers(sam.config)))
    if not images:
        return
    if (family := describe(sam)["family"]) == "fast_sam":
        raise InputError(f"{model}: what cutting costs is tried of SAMs alone; leave out --images")
    check, prunes = (widths if family == "vit" else found_groups).check, [s for s in choices if isinstance(s, Prune)]
    for r in tried:
        check(sam.config, Target(r), prunes, uniform=False)
    bench = analysis.Bench(sam, choices, samples, importance_images, seed)
    slims = {}
    for r in tried:
        slims[r] = bench.prune(r)
        print(f"ratio {r:<5g} error of the embedding, before any distillation: {slims[r].error:.3g} of its variance")
    if family == "vit":
        analysis.draw(bench, slims, ratio, out)
    else:
        analysis.draw_errors(slims, out)
        print("the gains of single channels are drawn for SAM's ViT alone")
    print(f"drawn in {out}")


if __name__ == "__main__":
    cli.run(main, explain=explain)

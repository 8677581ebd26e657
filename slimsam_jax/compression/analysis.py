"""Analyses a model: its parts, and pruning by several ratios without distilling, as `slimsam_jax.inspect` shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from slimsam_jax import data
from slimsam_jax.compression import prune
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import batches_of, calibration_stream, on_devices
from slimsam_jax.compression.quantize import check_not_quantized
from slimsam_jax.compression.steps import Prune, Recipe
from slimsam_jax.compression.widths import target_of
from slimsam_jax.data import Sample
from slimsam_jax.data.reading import map_readable
from slimsam_jax.data.samples import take
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.files import replacing
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import Config
from slimsam_jax.models.kinds import Model
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.costs import costs_of


def print_parts(sam: Model) -> None:
    """Of a ViT its blocks; of another family the parts of its encoder's tree, with their parameters."""
    if sam.family == "vit":
        return print_blocks(sam.config)
    table = Table("part", "params [M]")
    for name, part in sam.encoder.items():
        table.add_row(name, f"{sam_costs.parameters({name: part}) / 1e6:.3f}")
    Console().print(table)
    size, _, macs, _ = costs_of(sam)
    attention = f" (attention {macs.attention / 1e9:.3f})" if macs.attention else ""
    pixels = sam.config.image_size
    height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
    print(
        f"encoder {macs.total / 1e9:.3f} G MACs{attention}, whole model {size / 1e6:.3f} M parameters, "
        f"{height} x {width} pixels"
    )


def print_blocks(config: Config) -> None:
    """Prints widths, parameters and multiply-accumulates of every block and of the whole encoder."""
    table = Table("block", "window", "heads", "MLP", "params [M]", "MACs [G]", "attention MACs [G]")
    for column in table.columns[1:]:
        column.justify = "right"
    number = lambda value, unit: f"{value / unit:.3f}"
    costs = lambda config: np.array([sam_costs.encoder_parameters(config), *sam_costs.encoder_macs(config)])
    cells = lambda cost: map(number, cost, (1e6, 1e9, 1e9))
    for i, block in enumerate(config.blocks):
        # The whole encoder without the block: what is missing is the block's.
        rest = dataclasses.replace(config, blocks=config.blocks[:i] + config.blocks[i + 1 :])
        heads, window = f"{block.heads} x {block.head_dim}", str(block.window or "global")
        table.add_row(str(i), window, heads, str(block.mlp_dim), *cells(costs(config) - costs(rest)))
    table.add_section()
    table.add_row("encoder", "", "", "", *cells(costs(config)))
    Console().print(table)
    height, width = config.image_size
    print(
        f"embedding {config.embed_dim} wide, whole SAM {sam_costs.sam_parameters(config) / 1e6:.3f} M parameters, "
        f"{height} x {width} pixels"
    )


class Pruned(NamedTuple):
    """A model before its bottlenecks are cut and in the end, and the relative squared error of its embedding then."""

    narrow: Sam
    slim: Sam
    error: float


class Bench:
    """A model with the images to prune it by, and those to measure on: an eighth of them, at most 16.

    Raises:
      InputError: none of them can be read, or the recipe needs labels and there are none.
    """

    def __init__(self, sam: Sam, recipe: Recipe, images: Sequence[Sample], count: int, seed: int):
        check_not_quantized(sam, "cut")
        self.sam, self.seed = sam, seed
        self.prunes = [step for step in recipe if isinstance(step, Prune)]
        self.steps = {step.part: step for step in self.prunes}
        held = np.arange(0, len(images), 8)[:16]
        rest = np.delete(np.arange(len(images)), held)
        held_out = list(take(images, held))
        used = take(images, rest) if len(rest) else held_out
        batch = jax.local_device_count()
        data.check_one_is_readable(used)
        stream = calibration_stream(self.prunes[0], used, sam.config, batch, seed)
        self.batches = list(itertools.islice(stream, batches_of(min(count, len(used)), batch)))
        readable, skipped = map_readable(Sample.image, held_out)
        if not readable:
            raise InputError(f"none of the images to measure on can be read: {next(iter(skipped.values()))}")
        self.judged = list(readable.values())
        self.embeddings = [encode_image(sam, image).embedding for image in self.judged]

    def calibration(self, name: str) -> Iterable[Any]:
        return on_devices(iter(self.batches), len(self.batches))

    def prune(self, ratio: float) -> Pruned:
        slim = narrow = self.sam
        for step in self.prunes:
            narrow = slim if step.part == "bottleneck" else narrow
            slim = prune.prune(slim, step, target_of(step, Target(ratio)), self.calibration, self.seed)
        embeddings = [encode_image(slim, image).embedding for image in self.judged]
        errors = list(map(relative_error, embeddings, self.embeddings))
        return Pruned(narrow, slim, float(np.mean(errors)))


def draw(bench: Bench, pruned: Mapping[float, Pruned], ratio: float, out: Path) -> None:
    """Writes a PNG: the gain of every channel with what `ratio` keeps, and the error against the ratio."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (stream, errors), (heads, hidden) = figure.subplots(2, 2)
    narrow, slim, _ = pruned[ratio]
    gains_of = lambda sam, part: prune.channel_gains(sam, bench.steps[part], bench.calibration, bench.seed)
    gains = gains_of(bench.sam, "embedding")["embedding"]
    stream.semilogy(np.maximum(gains, 1e-9 * gains.max()))
    stream.axvline(slim.config.embed_dim, color="black", label=f"kept at {ratio:g}")
    stream.set(title="embedding: gain of each further channel", xlabel="channels")
    stream.legend()
    _plot_errors(errors, pruned)
    gains = gains_of(narrow, "bottleneck")
    for axes, kind, field, title in ((heads, "attn", "head_dim", "heads"), (hidden, "mlp", "mlp_dim", "MLPs")):
        rows = [gains[f"blocks_{i}/{kind}"] for i in range(len(slim.config.blocks))]
        _draw_blocks(axes, rows, [getattr(block, field) for block in slim.config.blocks])
        axes.set(title=f"{title}: gain of each further channel (log10)", xlabel="channels", ylabel="block")
    _save(figure, out)


def draw_errors(pruned: Mapping[float, Pruned], out: Path) -> None:
    """Writes a PNG: the error against the ratio."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    _plot_errors(figure.subplots(), pruned)
    _save(figure, out)


def _plot_errors(axes: Any, pruned: Mapping[float, Pruned]) -> None:
    axes.semilogy(list(pruned), [cut.error for cut in pruned.values()], "o-")
    axes.set(title="error of the embedding before distillation", xlabel="share of the channels removed")
    axes.grid(alpha=0.3)


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _draw_blocks(axes: Any, rows: Sequence[np.ndarray], kept: Sequence[int]) -> None:
    """Draws a row per block, gain as colour, a white line where the cut falls."""
    width, floor = max(map(len, rows)), 1e-9 * max(row.max() for row in rows)
    pixels = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        pixels[i, : len(row)] = np.log10(np.maximum(row, max(floor, 1e-300)))
    image = axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, width, len(rows) - 0.5, -0.5))
    edges = np.arange(len(rows))[:, None] + [-0.5, 0.5]
    axes.plot(np.repeat(kept, 2), edges.ravel(), color="white")
    axes.figure.colorbar(image, ax=axes)

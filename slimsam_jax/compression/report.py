"""Reports what a run cost and what it kept: a table, a JSON, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from slimsam_jax.compression import showcase
from slimsam_jax.data import Sample
from slimsam_jax.evaluation.compare import compare_models
from slimsam_jax.files import replacing
from slimsam_jax.models.encoders import name_of
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.latency import encoder_runner, interleaved
from slimsam_jax.progress import track


def measure(teacher: Sam, slim: Sam, samples: Sequence[Sample], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Measures every number of the table.

    Args:
      samples: images for mIoU (where an annotation lies beside them) and agreement.
      dtype: of the latency measurement; masks are computed in float32.

    Returns:
      {"teacher": {...}, "slim": {...}, "agreement": ..., "images": ..., "annotated_images": ...,
      "skipped": {name: reason}}.
    """
    report = compare_models(teacher, slim, track(samples, "measuring", compiles=True))
    for name, sam in (("teacher", teacher), ("slim", slim)):
        report[name] = {**size_of(sam), **{f"{kind}_miou": value for kind, value in report[name].items()}}
    runs = [encoder_runner(sam.config, sam.params, dtype) for sam in (teacher, slim)]
    for name, seconds in zip(("teacher", "slim"), interleaved(runs), strict=True):
        report[name]["encoder_latency_ms"] = 1e3 * seconds
    return report


def size_of(sam: Sam) -> dict[str, int]:
    """Counts parameters and multiply-accumulates of a model; the decoder's are for one point."""
    encoder, decoder = sam_costs.encoder_macs(sam.config), sam_costs.decoder_macs(sam.config)
    return {
        "parameters": sam_costs.parameters(sam.params),
        "encoder_parameters": sam_costs.parameters(sam.params["image_encoder"]),
        "encoder_macs_linear": encoder.linear,
        "encoder_macs_total": encoder.total,
        "macs_linear": encoder.linear + decoder.linear,
        "macs_total": encoder.total + decoder.total,
    }


ROWS = (  # key, label, format of a cell
    ("encoder_parameters", "encoder parameters", lambda v: f"{v / 1e6:.2f} M"),
    ("parameters", "parameters, whole SAM", lambda v: f"{v / 1e6:.2f} M"),
    ("encoder_macs_linear", "encoder MACs, linear", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_macs_total", "encoder MACs, total", lambda v: f"{v / 1e9:.2f} G"),
    ("encoder_latency_ms", "encoder latency", lambda v: f"{v:.1f} ms"),
    ("point_miou", "point mIoU", lambda v: f"{100 * v:.2f} %"),
    ("box_miou", "box mIoU", lambda v: f"{100 * v:.2f} %"),
)


def print_table(report: dict[str, Any]) -> None:
    table = Table("", "teacher", "slim", "slim / teacher")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label, cell in ROWS:
        if key in report["teacher"]:
            teacher, slim = report["teacher"][key], report["slim"][key]
            table.add_row(label, cell(teacher), cell(slim), f"{100 * slim / teacher:.1f} %" if teacher else "")
    table.add_row("agreement with the teacher's masks", "", f"{100 * report['agreement']:.2f} %", "")
    table.add_row("error of the embedding", "", f"{report['embedding_error']:.2g} of its variance", "")
    if budget := report.get("budget"):
        share = 100 * (budget["reached"] / budget["amount"] - 1)
        table.add_row(
            f"budget of {budget['kind']}", f"{budget['amount']:.4g}", f"{budget['reached']:.4g}", f"{share:+.2f} %"
        )
    table.add_row("peak memory", "", f"{report['peak_memory_gb']:.2f} GB", "")
    for name, seconds in report["seconds"].items():
        table.add_row(f"time: {name}", "", f"{seconds:.1f} s", "")
    Console().print(table)
    for reason in report["skipped"].values():
        print(f"not measured: {reason}")


WIDTH, LABEL, GAP, TITLE, PLOTS = 13.0, 0.35, 0.04, 0.42, 3.0  # inches of the figure, and of what is in it, downwards
IMAGES, TALLEST = 4, 3.4  # shown, and inches of the height of a row of them


def draw(
    teacher: Sam,
    slim: Sam,
    samples: Sequence[Sample],
    numbers: dict[str, Any],
    log: Sequence[dict[str, Any]],
    out: Path,
) -> None:
    """Writes a PNG: masks of both models for the same prompts, loss curves, widths before and after.

    Args:
      samples: of which the images are shown where the teacher is surest.
      numbers: the report, from `measure`.
    """
    from matplotlib.figure import Figure

    shown = showcase.choose(teacher, samples, IMAGES)
    aspects = [example.image.width / example.image.height for example in shown]
    tall = min(TALLEST, (WIDTH - LABEL - GAP * len(shown)) / max(sum(aspects), 1e-9))
    height = TITLE + 2 * (tall + GAP) + PLOTS
    figure = Figure(figsize=(WIDTH, height), dpi=100)
    figure.text(0.5, 1 - TITLE / 2 / height, headline(numbers), fontsize=14, ha="center", va="center")
    for row, (name, sam) in enumerate((("teacher", teacher), ("slim", slim))):
        bottom = PLOTS + (1 - row) * (tall + GAP)
        _row(figure, name, [example.drawn(sam) for example in shown], bottom / height, tall / height)
    by_blocks = name_of(teacher.config.encoder) == name_of(slim.config.encoder) == "vit"
    below = 0.55 if by_blocks else 1.0  # names of parts stand upright
    edges = {"left": 0.06, "right": 0.99, "bottom": below / height, "top": (PLOTS - 0.5) / height}
    left, middle, right = (figure.add_subplot(cell) for cell in figure.add_gridspec(1, 3, **edges, wspace=0.16))
    _plot_losses(left, log)
    if by_blocks:
        _plot_widths(middle, teacher, slim, "head_dim", "channels per head")
        _plot_widths(right, teacher, slim, "mlp_dim", "MLP channels")
    else:
        for place, name, sam in ((middle, "teacher", teacher), (right, "slim", slim)):
            _plot_parameters(place, name, sam)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


def _row(figure: Any, name: str, images: Sequence[Image.Image], bottom: float, height: float) -> None:
    """Draws images side by side behind a label; `bottom` and `height` are shares of the figure's."""
    widths = [height * figure.get_figheight() * image.width / image.height for image in images]
    left = LABEL + (WIDTH - LABEL - sum(widths) - GAP * len(images)) / 2
    figure.text((left - 0.08) / WIDTH, bottom + height / 2, name, fontsize=13, rotation=90, ha="right", va="center")
    for image, width in zip(images, widths, strict=True):
        axes = figure.add_axes((left / WIDTH, bottom, width / WIDTH, height))
        axes.imshow(image, aspect="auto", interpolation="lanczos")
        axes.axis("off")
        left += width + GAP


def headline(numbers: dict[str, Any]) -> str:
    """Formats parameters, milliseconds and agreement in a line."""
    size = lambda model: f"{model['parameters'] / 1e6:.2f} M parameters, encoder {model['encoder_latency_ms']:.0f} ms"
    teacher, slim = size(numbers["teacher"]), size(numbers["slim"])
    return f"teacher {teacher}  →  slim {slim}, {100 * numbers['agreement']:.1f} % agreement"


def _plot_losses(axes: Any, log: Sequence[dict[str, Any]]) -> None:
    for stage in dict.fromkeys(entry["stage"] for entry in log if "loss" in entry):
        entries = [entry for entry in log if entry.get("stage") == stage and "loss" in entry]
        term = "embedding" if "embedding" in entries[0] else "loss"  # of masks alone there is no other
        label = stage if term == "embedding" else f"{stage}, its loss"
        axes.semilogy([e["step"] for e in entries], [e[term] for e in entries], label=label)
    axes.set(title="error of the embedding", xlabel="step")
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")


def _plot_widths(axes: Any, teacher: Sam, slim: Sam, field: str, title: str) -> None:
    for offset, (name, sam) in enumerate((("teacher", teacher), ("slim", slim))):
        places = np.arange(len(sam.config.blocks)) + 0.4 * (offset - 0.5)
        axes.bar(places, [getattr(block, field) for block in sam.config.blocks], 0.4, label=name)
    axes.set(title=f"{title} (embedding {teacher.config.embed_dim} → {slim.config.embed_dim})", xlabel="block")
    blocks = np.arange(max(len(sam.config.blocks) for sam in (teacher, slim)))  # another encoder may have more or fewer
    axes.set_xticks(blocks[:: -(-len(blocks) // 12)])
    axes.margins(y=0.25)  # room for the legend
    axes.legend(ncols=2, frameon=False, loc="upper center")


def _plot_parameters(axes: Any, name: str, sam: Sam) -> None:
    """Of the parts of an image encoder of any family, blocks by their numbers."""
    numbered = lambda part: [(word.isdigit(), int(word) if word.isdigit() else word) for word in part.split("_")]
    tree = sam.params["image_encoder"]
    parts = sorted(tree, key=numbered)
    axes.bar(np.arange(len(parts)), [sam_costs.parameters({part: tree[part]}) / 1e3 for part in parts])
    axes.set(title=f"{name}: encoder parameters, thousands")
    axes.set_xticks(np.arange(len(parts)), parts, rotation=90, fontsize=6)

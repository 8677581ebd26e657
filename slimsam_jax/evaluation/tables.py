"""Formats the numbers of an evaluation: on the terminal, as Markdown, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimsam_jax.evaluation.compare import Measured
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.files import replacing

Summary = dict[str, list[dict[str, Any]]]  # of statistics.summarise

TITLE = "per cent (95 % interval)"
LABELS = {
    "iou": "mIoU",
    "iou_best": "mIoU, best predicted",
    "iou_oracle": "mIoU, oracle",
    "boundary": "boundary IoU",
    "boundary_best": "boundary IoU, best predicted",
    "boundary_oracle": "boundary IoU, oracle",
    "iou_small": "mIoU, small",
    "iou_medium": "mIoU, medium",
    "iou_large": "mIoU, large",
    "ap": "AP",
    "ap_50": "AP50",
    "ap_75": "AP75",
    "ap_small": "AP, small",
    "ap_medium": "AP, medium",
    "ap_large": "AP, large",
}


def label(key: str, images: int, most: int) -> str:
    """Returns the title of a row; with its number of images, if it has fewer than others."""
    protocol, measure = key.split("/")
    if protocol == "clicks":
        kind, count = measure.split("_")
        text = f"mIoU after click {count}" if kind == "iou" else f"clicks to IoU 0.{count}"
    elif protocol == "everything":
        text = f"AR@{measure.removeprefix('ar_')}"
    else:
        choice = ", best predicted" if measure.startswith("ap") and measure.endswith("_best") else ""
        text = LABELS[measure.removesuffix("_best") if choice else measure] + choice
    return f"{protocol} {text}" + (f" ({images} images)" if images < most else "")


def rows(summary: Summary) -> list[list[str]]:
    """Formats the rows: [[label, a cell per model], ...]."""
    most = max(models[0]["images"] for models in summary.values())
    return [
        [label(key, models[0]["images"], most), *(cell(key, model) for model in models)]
        for key, models in summary.items()
    ]


def cell(key: str, model: dict[str, Any]) -> str:
    """Formats "57.12 (55.30 to 58.91)", or, beside another model, "57.11, -0.01 (-0.05 to +0.03)"."""
    measure = key.split("/")[1]
    scale = 1 if measure.startswith("noc") else 100
    text = f"{scale * model['mean']:.2f}"
    if "difference_interval" in model:
        low, high = model["difference_interval"]
        return f"{text}, {scale * model['difference']:+.2f} ({scale * low:+.2f} to {scale * high:+.2f})"
    if "interval" in model:
        low, high = model["interval"]
        return f"{text} ({scale * low:.2f} to {scale * high:.2f})"
    return f"{text}, {scale * model['difference']:+.2f}" if "difference" in model else text


def print_table(names: Sequence[str], summary: Summary) -> None:
    print_rows([TITLE, *names], rows(summary))


def print_rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table whose numbers are aligned to the right."""
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    Console(markup=False, emoji=False).print(table)  # models may be called slim[a]


def markdown(names: Sequence[str], summary: Summary) -> str:
    return markdown_rows([TITLE, *names], rows(summary))


def markdown_rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def write_markdown(path: Path, names: Sequence[str], summary: Summary, more: str = "") -> None:
    """Writes the summary, and `more` below it."""
    with replacing(path) as temporary:
        temporary.write_text(markdown(names, summary) + more)


def as_json(names: Sequence[str], measured: Measured, protocols: Protocols, summary: Summary) -> dict[str, Any]:
    """Collects all numbers, and what it takes to make them again."""
    by_model = lambda values: dict(zip(names, values, strict=True))
    return {
        "data": {"images": len(measured.samples), "sha256": measured.digest, "skipped": measured.skipped},
        "protocols": dataclasses.asdict(protocols),
        "results": {key: by_model(models) for key, models in summary.items()},
        "per_image": {image: by_model(scores) for image, scores in measured.scores.items()},
    }

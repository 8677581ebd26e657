"""All families at their published sizes side by side: what they cost here, and what their papers say (families.md).

    python -m experiments.families run --folder stand_ins
    python -m experiments.families table

`run` writes a model folder of random weights for each, which change no cost, measures them by turns in float32, and
counts those that are too large to time beside the others. `table` writes tables/families.md and figures/families.png.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import results
from slimsam_jax import checkpoint, cli
from slimsam_jax.evaluation import costs
from slimsam_jax.files import replacing
from slimsam_jax.models import fast_sam, sam2_head
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.config import preset
from slimsam_jax.models.efficient_sam_head import HeadConfig
from slimsam_jax.models.encoders import efficient_sam_vit, hiera, rep_vit, tiny_vit
from slimsam_jax.models.sam import Sam, abstract_params
from slimsam_jax.profiling import fast_sam_costs, sam_costs

FILE = results.FOLDER / "families.jsonl"
PLANNED = results.FOLDER / "planned_families.jsonl"  # `experiments.planned_families` writes it
PIXELS = (1024, 1024)


CONFIGS: dict[str, Callable[[], Any]] = {
    "sam_vit_b": lambda: preset("vit_b"),
    "slimsam_77": lambda: preset("vit_p77"),
    "mobile_sam": lambda: SamConfig(tiny_vit.PRESETS["vit_t"], head_of(PIXELS)),
    "efficient_sam_ti": lambda: SamConfig(efficient_sam_vit.PRESETS["efficient_sam_ti"], HeadConfig(PIXELS)),
    "edge_sam": lambda: SamConfig(rep_vit.PRESETS["rep_vit_m1"], head_of(PIXELS)),
    "sam2_tiny": lambda: _sam2("sam2_tiny"),
    "fast_sam_s": lambda: fast_sam.PRESETS["fast_sam_s"],
    "sam_vit_h": lambda: preset("vit_h"),
    "sam_vit_l": lambda: preset("vit_l"),
    "slimsam_50": lambda: preset("vit_p50"),
    "efficient_sam_s": lambda: SamConfig(efficient_sam_vit.PRESETS["efficient_sam_s"], HeadConfig(PIXELS)),
    "sam2_small": lambda: _sam2("sam2_small"),
    "sam2_base_plus": lambda: _sam2("sam2_base_plus"),
    "sam2_large": lambda: _sam2("sam2_large"),
    "fast_sam_x": lambda: fast_sam.PRESETS["fast_sam_x"],
}
MODELS = tuple(CONFIGS)[:7]  # timed by turns
COUNTED = tuple(CONFIGS)[7:]  # by shapes: too large to be timed here, or alike


def _sam2(name: str) -> SamConfig:
    return SamConfig(hiera.PRESETS[name], sam2_head.HeadConfig(PIXELS))


def model_of(config: Any) -> Sam | fast_sam.FastSam:
    """A model of this architecture with random weights."""
    provenance = {"source": "random weights"}
    if isinstance(config, fast_sam.Config):
        return fast_sam.FastSam(config, random_params(fast_sam.abstract_params(config)), provenance)
    return Sam(config, random_params(abstract_params(config)), provenance=provenance)


def random_params(shapes: Any) -> Any:
    """Parameters of these shapes: activations stay near 1, and variances positive."""
    random = np.random.default_rng(0)

    def array(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        fan = max(1, int(np.prod(leaf.shape[:-1])))
        return (random.standard_normal(leaf.shape) / fan**0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(array, shapes)


def run(folder: Path, turns: int = 3) -> None:
    """Measure what this code has not measured yet.

    Args:
      folder: for the models with random weights; those that are there stay.
      turns: how often all are timed, one after the other.
    """
    results.check_committed()
    for name in COUNTED:
        if not results.find(FILE, {"model": name}):
            results.append(FILE, {"model": name, **counted(CONFIGS[name]())})
    timed = {(entry["model"], entry.get("turn")) for entry in results.read(FILE)}
    missing = [[name for name in MODELS if (name, turn) not in timed] for turn in range(turns)]
    models = stand_ins(folder) if any(missing) else {}
    for turn, names in enumerate(missing):
        for name, cost in zip(names, costs.measure([models[name] for name in names]) if names else [], strict=True):
            results.append(FILE, {"model": name, "turn": turn, **cost})
    print("slimsam evaluate --model", *(str(folder / name) for name in MODELS))


def stand_ins(folder: Path) -> dict[str, Any]:
    """Makes the models, and a folder of each."""
    models = {name: model_of(CONFIGS[name]()) for name in MODELS}
    for name, model in models.items():
        if not (folder / name).exists():
            checkpoint.save(model, folder / name)
    return models


def counted(config: Any) -> dict[str, int]:
    """Counts by shapes alone what `costs.measure` gives of a model."""
    if isinstance(config, fast_sam.Config):
        parameters = fast_sam_costs.parameters_of(config)
        macs = {"encoder_macs_linear": fast_sam_costs.macs_of(config), "encoder_macs_attention": 0}
        return {"parameters": parameters, "encoder_parameters": parameters, **macs}
    macs = sam_costs.encoder_macs(config)
    return {
        "parameters": sam_costs.sam_parameters(config),
        "encoder_parameters": sam_costs.encoder_parameters(config),
        "encoder_macs_linear": macs.linear,
        "encoder_macs_attention": macs.attention,
    }


class Published(NamedTuple):
    """What papers say of a model.

    Attributes:
      ap: COCO AP with ViTDet-H's boxes, in %.
      miou: single-point mIoU on SA-1B, in %, by SlimSAM's table 1.
      file: what its authors call the checkpoint: the path that `evaluate` takes.
    """

    label: str
    ap: float | None
    miou: float | None
    file: str


# AP of SAM-L, SAM-B, SlimSAM-77, MobileSAM, TinySAM, EfficientSAM-Ti and FastSAM-x by TinySAM's table 1 (2312.13789);
# of SAM-H, EfficientSAM-S and EdgeSAM by their own papers (2304.02643, 2312.00863, 2312.06660).
PUBLISHED = {
    "sam_vit_h": Published("SAM, ViT-H", 46.5, 78.30, "sam_vit_h_4b8939.pth"),
    "sam_vit_l": Published("SAM, ViT-L", 46.2, 77.67, "sam_vit_l_0b3195.pth"),
    "sam_vit_b": Published("SAM, ViT-B", 43.4, 73.37, "sam_vit_b_01ec64.pth"),
    "slimsam_50": Published("SlimSAM-50", None, 72.33, "SlimSAM-50.pth"),
    "slimsam_77": Published("SlimSAM-77", 41.3, 67.40, "SlimSAM-77.pth"),
    "mobile_sam": Published("MobileSAM", 41.0, 62.73, "mobile_sam.pt"),
    "tiny_sam": Published("TinySAM", 42.3, None, "tinysam.pth"),
    "efficient_sam_s": Published("EfficientSAM-S", 44.4, 71.19, "efficient_sam_vits.pt"),
    "efficient_sam_ti": Published("EfficientSAM-Ti", 42.3, 69.42, "efficient_sam_vitt.pt"),
    "edge_sam": Published("EdgeSAM", 42.2, 65.96, "edge_sam.pth"),
    "sam2_tiny": Published("SAM 2.1 tiny", None, None, "sam2.1_hiera_tiny.pt"),
    "sam2_small": Published("SAM 2.1 small", None, None, "sam2.1_hiera_small.pt"),
    "sam2_base_plus": Published("SAM 2.1 base+", None, None, "sam2.1_hiera_base_plus.pt"),
    "sam2_large": Published("SAM 2.1 large", None, None, "sam2.1_hiera_large.pt"),
    "fast_sam_s": Published("FastSAM-s", None, 30.72, "FastSAM-s.pt"),
    "fast_sam_x": Published("FastSAM-x", 37.9, 35.41, "FastSAM-x.pt"),
}
SAME = {"tiny_sam": "mobile_sam"}  # but for the weights
MIB = 2**20
HEAD = (
    "| model | parameters, of the encoder | encoder MACs, linear + attention | float32 file | ms on this CPU | memory "
    "here | planned on an H100 | COCO AP, paper | SA-1B mIoU, SlimSAM's paper | load yours |"
)


def table() -> None:
    """Write experiments/tables/families.md and experiments/figures/families.png."""
    found = {name: cost_of(name) for name in PUBLISHED}
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *(line_of(name, cost) for name, cost in found.items())]
    command = "python -m experiments.families table"
    results.write_table("families", "Families side by side", lines, command, "../families.md")
    draw(found)


def cost_of(name: str) -> dict[str, Any]:
    """What is known of a model: counts, of its turns all milliseconds, and what was planned; {} without rows."""
    key = {"model": SAME.get(name, name)}
    entries, plans = results.find(FILE, key), results.find(PLANNED, {**key, "on": "h100"})
    times = [entry["encoder_latency_ms"] for entry in entries if "turn" in entry]
    counts = {**entries[-1], "times": times} if entries else {}
    return counts | ({"planned": plans[-1]["peak"]} if plans else {})


def line_of(name: str, cost: dict[str, Any]) -> str:
    """Formats a row; what nobody has measured is "to be run"."""
    paper, times = PUBLISHED[name], cost.get("times", ())
    percent = lambda value: f"{value:.1f}" if value else ""
    cells = [paper.label, *["to be run"] * 5]
    if "parameters" in cost:
        cells[1] = f"{cost['parameters'] / 1e6:.2f} M, {cost['encoder_parameters'] / 1e6:.2f} M"
        cells[2] = f"{cost['encoder_macs_linear'] / 1e9:.1f} + {cost['encoder_macs_attention'] / 1e9:.1f} G"
        cells[3] = f"{4 * cost['parameters'] / 1e6:.0f} MB"
    if times:
        cells[4] = f"{min(times):.0f} to {max(times):.0f}"
        cells[5] = f"{cost['encoder_memory'] / 1e6:.0f} MB"
    planned = f"{cost['planned'] / MIB:.0f} MiB" if "planned" in cost else "to be run"
    miou = f"{paper.miou:.2f}" if paper.miou else ""
    return f"| {' | '.join([*cells, planned, percent(paper.ap), miou, f'`{paper.file}`'])} |"


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Writes figures/families.png: the papers' AP against work and time, with the front of those that none beats."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    macs = lambda cost: (
        (cost["encoder_macs_linear"] + cost["encoder_macs_attention"]) / 1e9 if "parameters" in cost else None
    )
    milliseconds = lambda cost: float(np.median(cost["times"])) if cost.get("times") else None
    panels = {
        "G multiply-accumulates of the encoder, attention included": (macs, (20, 50, 100, 200, 500, 1000, 3000)),
        "ms of the encoder, one image on two CPU cores": (milliseconds, (250, 500, 1000, 2000, 4000)),
    }
    for axes, (label, (cost_in, ticks)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        points = [(cost_in(cost), PUBLISHED[name].ap, PUBLISHED[name].label) for name, cost in found.items()]
        points = sorted(point for point in points if None not in point)
        for x, y, text in points:
            beside, below = text in ("SlimSAM-77", "SAM, ViT-B", "SAM, ViT-H", "FastSAM-x"), text == "MobileSAM"
            where = (
                {"xytext": (7, -3), "ha": "left"} if beside else {"xytext": (0, -13 if below else 6), "ha": "center"}
            )
            axes.annotate(text, (x, y), textcoords="offset points", fontsize=8, **where)
        axes.scatter([x for x, *_ in points], [y for _, y, _ in points])
        axes.step(*front(points), where="post", color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.2, y=0.1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("COCO AP with ViTDet-H's boxes, as published")
    results.FIGURE_FOLDER.mkdir(exist_ok=True)
    with replacing(results.FIGURE_FOLDER / "families.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def front(points: list[tuple[float, float, str]]) -> tuple[list[float], list[float]]:
    """Of points sorted by cost, those that no cheaper one equals."""
    best: list[tuple[float, float]] = []
    for cost, score, _ in points:
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return [cost for cost, _ in best], [score for _, score in best]


if __name__ == "__main__":
    cli.run({"run": run, "table": table})

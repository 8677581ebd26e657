"""Learning curves of trainings by `train_reference`: lines of JSON, a table of them, and a figure of a teacher's.

python -m experiments.reference_results record --name "small, from nothing" --folder reference
python -m experiments.reference_results table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import results
from slimsam_jax import cli
from slimsam_jax.errors import InputError, reading
from slimsam_jax.files import replacing

FILE = results.FOLDER / "reference.jsonl"


def record(name: str, folder: Path, minutes: float | None = None, beside: str = "", after: int = 0) -> None:
    """Keep the learning curve of a training that is finished, or was stopped for good; once.

    Args:
      name: what the table calls it.
      folder: its --out.
      minutes: that it took.
      beside: what else the machine did meanwhile.
      after: steps that its --init had been trained for.

    Raises:
      InputError: the code is no commit's, or the folder no training's that was measured.
    """
    results.check_committed()
    with reading(folder):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        provenance = provenance_of(folder)
    curve = [{key: entry[key] for key in ("step", "point_miou", "box_miou")} for entry in log if "score" in entry]
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry]
    if not curve:
        raise InputError(f"{folder} is no finished training: its log has no scores")
    if not results.find(FILE, key := {"row": name, "curve": curve, "provenance": without_paths(provenance)}):
        steps = max(entry.get("step", 0) for entry in log)  # a line of an image that was skipped has none
        more = {"minutes": minutes, "beside": beside, "after": after, "steps": steps}
        results.append(FILE, {**key, "losses": losses, **more})


def provenance_of(folder: Path) -> dict[str, Any]:
    """What a training began with: of the model that it made, or of one that was stopped from its checkpoints."""
    if (folder / "config.json").exists():
        return json.loads((folder / "config.json").read_text())["provenance"]
    return json.loads((folder / "checkpoints" / "origin.json").read_text())


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """Names alone in the options of a training, and of those that it began with: the paths are their machines'."""
    options = dict(provenance.get("options", {}))
    for key in ("images", "val", "init", "decoder", "composites"):
        names = options.get(key) or []
        options[key] = Path(names).name if isinstance(names, str) else [Path(name).name for name in names]
    begun = {name: provenance[name] for name in ("init", "decoder") if provenance.get(name)}
    begun = {
        name: model | {"provenance": without_paths(model["provenance"])}
        for name, model in begun.items()
        if "options" in model.get("provenance", {})
    }
    return provenance | begun | {"options": options}


def table() -> None:
    """Write experiments/tables/reference.md and figures/teacher.png, the curves of trainings on composites."""
    lines = ["| training | steps x images x masks | minutes | point / box mIoU, after steps |", "|---|---|---|---|"]
    lines += [f"| {run['row']} | {_size(run)} | {_minutes(run)} | {_curve(run)} |" for run in results.read(FILE)]
    title, command = "Learning curves of reference teachers", "python -m experiments.reference_results table"
    results.write_table("reference", title, lines, command, "../reference_teacher.md")
    if runs := [run for run in results.read(FILE) if run["provenance"]["options"].get("composites")]:
        draw(runs)


def draw(runs: list[dict[str, Any]]) -> None:
    """Writes a PNG: point and box mIoU of trainings against steps, one that goes on behind the one before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("-", "--", ":", "-.") * len(runs), strict=False):
        steps = [run["after"] + entry["step"] for entry in run["curve"]]
        for name, colour in (("point", "C0"), ("box", "C1")):
            values = [100 * entry[f"{name}_miou"] for entry in run["curve"]]
            axes.plot(steps, values, style, marker=".", color=colour, label=f"{name}, {run['row']}")
    axes.set(xlabel="steps", ylabel="mIoU on held-out composites, %")
    axes.grid(alpha=0.3)
    axes.legend()
    results.FIGURE_FOLDER.mkdir(exist_ok=True)
    with replacing(results.FIGURE_FOLDER / "teacher.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _size(run: dict[str, Any]) -> str:
    options = run["provenance"]["options"]
    return f"{run.get('steps', options['steps'])} x {options['batch']} x {options['prompts']}"


def _minutes(run: dict[str, Any]) -> str:
    return "?" if run["minutes"] is None else f"{run['minutes']:.0f}"


def _curve(run: dict[str, Any]) -> str:
    show = lambda e: f"{e['step']}: {100 * e['point_miou']:.1f} / {100 * e['box_miou']:.1f}"
    return ", ".join(map(show, run["curve"]))


if __name__ == "__main__":
    cli.run({"record": record, "table": table})

"""Learning curves of trainings by `train_reference`: lines of JSON, and a table of them.

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

FILE = results.FOLDER / "reference.jsonl"


def record(name: str, folder: Path, minutes: float | None = None, beside: str = "") -> None:
    """Keep the learning curve of a finished training, once.

    Args:
      name: what the table calls it.
      folder: its --out.
      minutes: that it took.
      beside: what else the machine did meanwhile.

    Raises:
      InputError: the code is no commit's, or the folder no finished training's.
    """
    results.check_committed()
    with reading(folder):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        provenance = json.loads((folder / "config.json").read_text())["provenance"]
    curve = [{key: entry[key] for key in ("step", "point_miou", "box_miou")} for entry in log if "score" in entry]
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry]
    if not curve:
        raise InputError(f"{folder} is no finished training: its log has no scores")
    options = provenance["options"]
    for key in ("images", "val", "init", "decoder"):  # names alone: the paths are this machine's
        names = options.get(key) or []
        options[key] = Path(names).name if isinstance(names, str) else [Path(name).name for name in names]
    if not results.find(FILE, key := {"row": name, "curve": curve, "provenance": provenance}):
        results.append(FILE, {**key, "losses": losses, "minutes": minutes, "beside": beside})


def table() -> None:
    """Write experiments/tables/reference.md."""
    lines = ["| training | steps x images x masks | minutes | point / box mIoU, after steps |", "|---|---|---|---|"]
    lines += [f"| {run['row']} | {_size(run)} | {_minutes(run)} | {_curve(run)} |" for run in results.read(FILE)]
    title, command = "Learning curves of reference teachers", "python -m experiments.reference_results table"
    results.write_table("reference", title, lines, command, "../reference_teacher.md")


def _size(run: dict[str, Any]) -> str:
    options = run["provenance"]["options"]
    return f"{options['steps']} x {options['batch']} x {options['prompts']}"


def _minutes(run: dict[str, Any]) -> str:
    return "?" if run["minutes"] is None else f"{run['minutes']:.0f}"


def _curve(run: dict[str, Any]) -> str:
    show = lambda e: f"{e['step']}: {100 * e['point_miou']:.1f} / {100 * e['box_miou']:.1f}"
    return ", ".join(map(show, run["curve"]))


if __name__ == "__main__":
    cli.run({"record": record, "table": table})

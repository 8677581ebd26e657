"""Every command that several processes can share, one after the other in each of them: see test_together.py."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import jax

from slimsam_jax import checkpoint, sharding
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.data import __main__ as data_program
from slimsam_jax.data import find
from slimsam_jax.errors import RunError
from slimsam_jax.evaluate import main as evaluate
from slimsam_jax.evaluation.compare import measure_models
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.everything import Options, everything


def work(model: Path, images: tuple[str, ...], out: Path, distributed: str | None = None) -> None:
    """Writes into `out` what each command gives; of several processes the first one does."""
    out.mkdir(exist_ok=True)
    text = out / "said.txt" if not (distributed or "").endswith(",1") else out / "not said.txt"
    with text.open("w") as said, contextlib.redirect_stdout(said):
        evaluate(
            (model,), images, ("point",), max_broken=0.5, costs=False, json=out / "s.json", distributed=distributed
        )
        sharding.join_processes = lambda how, preemption: None  # they have joined
        search = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
        everything(Options(model, images, out / "masks.json", **search, distributed=distributed))
        try:
            data_program.check(images, distributed=distributed)
        except SystemExit as stop:
            print("exit code", stop.code)
        data_program.prepare(images, out / "prepared", distributed=distributed)
        sam = checkpoint.load(model)
        TeacherCache(out / "cache", sam, "0" * 16).fill(find(images))
        try:
            measure_models([sam], find(images), Protocols(("point",)), max_broken=0.1)
        except RunError as error:  # in all of them, so that none waits
            print(error)
        sharding.barrier("worked")
    if distributed:
        jax.distributed.shutdown()  # at once: on a busy machine one may take long to end, and the other does not wait


if __name__ == "__main__":
    work(Path(sys.argv[1]), tuple(sys.argv[4:]), Path(sys.argv[2]), sys.argv[3])

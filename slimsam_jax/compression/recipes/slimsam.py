"""SlimSAM exactly as its code runs, known bugs included: what the paper measured, not what we recommend.

20 epochs a distillation over 10,000 images of SA-1B; SAM-B at ratio 0.5 reached 72.33 % single-point mIoU, at 0.77
67.40 % (paper, table 2). experiments/pruning.md holds what each quirk does to a cut.

    python -m slimsam_jax.compress --images sa1b --limit 10000 --ratio 0.77 --recipe slimsam
"""

import dataclasses

from slimsam_jax.compression.steps import Distill, Losses, Optimizer, Prune, Quirks, Recipe, Validation

QUIRKS = Quirks(**{field.name: True for field in dataclasses.fields(Quirks)})
PRUNE = {
    "criterion": "taylor",
    "grad_reduction": "sum",
    "allocation": "global",
    "normalizer": "gaussian",
    "min_keep": 0.0,
    "quirks": QUIRKS,
}
OPTIMIZER = Optimizer(epochs=20, lr=1e-4, schedule="plateau", reduction="sum")
DISTILL = {"losses": Losses(relative=False), "validation": Validation(20, "miou"), "quirks": QUIRKS}

RECIPE: Recipe = (
    Prune("embedding", **PRUNE),
    Distill("bottleneck", optimizer=dataclasses.replace(OPTIMIZER, patience=3), **DISTILL),
    Prune("bottleneck", **PRUNE),
    Distill("stream+embedding", optimizer=OPTIMIZER, **DISTILL),
)

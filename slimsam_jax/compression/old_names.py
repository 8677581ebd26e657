"""What the choices of a recipe were called before, most of them in version 0.2, and what became of them."""

from __future__ import annotations

import re

RENAMED = {
    "criterion": "prune.criterion",
    "signal": "prune.importance_loss",
    "gradients": "prune.grad_reduction",
    "probes": "prune.noise_samples",
    "compete": "prune.allocation",
    "normalizer": "prune.normalizer",
    "multiple": "prune.round_to",
    "least": "prune.min_keep",
    "tie_embedding": "quirks.tied_embedding",
    "reference_selection": "quirks.rounded_selection",
    "round_by_index": "quirks.rounded_by_index",
    "skip_vanishing": "quirks.vanishing_kept",
    "align": "distill.features",
    "cosine": "distill.direction",
    "masks": "distill.masks",
    "points": "distill.points",
    "relative_loss": "distill.relative",
    "learning_rate": "distill.lr",
    "pace": "distill.auto_lr",
    "schedule": "distill.schedule",
    "reduction": "distill.reduction",
    "clip": "distill.clip",
    "weight_decay": "distill.weight_decay",
    "ema": "distill.ema",
    "flip": "distill.flip",
    "crop": "distill.crop",
    "validations": "distill.validations",
    "validate_by": "distill.validate_by",
    "keep": "distill.keep_checkpoint",
}
VALUES = {  # that are called otherwise, too: (old name, old value) -> new setting
    ("compete", "kind"): "prune.allocation=global",
    ("compete", "block"): "prune.allocation=local",
    ("weighting", "disturbed"): "prune.importance_loss=disturbance",
    ("weighting", "none"): "prune.importance_loss=none",
    ("values_apart", "true"): "prune.head_channels=separate",
    ("values_apart", "false"): "prune.head_channels=shared",
    ("whole_heads", "true"): "prune.head_channels=whole",
    ("whole_heads", "false"): "prune.head_channels=shared",
    ("slice_rel_pos", "true"): "quirks.zeroed_rel_pos=false",
    ("slice_rel_pos", "false"): "quirks.zeroed_rel_pos=true",
    ("keep_logit_scale", "true"): "quirks.jumping_logit_scale=false",
    ("keep_logit_scale", "false"): "quirks.jumping_logit_scale=true",
    ("align_global_attention", "true"): "quirks.self_aligned_global=false",
    ("align_global_attention", "false"): "quirks.self_aligned_global=true",
}
GONE = {
    **dict.fromkeys(
        ("alternate", "rounds", "polish", "scratch", "tune_decoder"),
        "since 0.3 a recipe is a list of steps: give slimsam_jax.compress one (experiments/recipes.py has some)",
    ),
    "passes": "it is distill.epochs since 0.3, and counts those of each distillation",
    "noise_std": "it is gone since 0.3: ranks do not depend on it",
    "fine_weights": "it is gone: give quantize.share=0.3, say, which gives layers 8 bits by itself",
}


def renamed(setting: str) -> str:
    """ "least=0.1" -> "prune.min_keep=0.1"; a setting that was never called otherwise stays."""
    name, _, value = setting.partition("=")
    if (name, value.lower()) in VALUES:
        return VALUES[name, value.lower()]
    return f"{RENAMED[name]}={value}" if name in RENAMED else setting


def what_became_of(setting: str) -> str | None:
    """A sentence for whoever types an old name; None if it is none."""
    setting = re.sub(r"^(prune|distill|quantize|quirks)\.", "", setting)  # of an old name behind a new prefix
    name = setting.partition("=")[0]
    if name in GONE:
        return GONE[name]
    new = sorted({value.partition("=")[0] for (old, _), value in VALUES.items() if old == name})
    if renamed(setting) != setting:
        return f"it is called {renamed(setting)} since 0.3"
    return f"it is called {' or '.join(new)} since 0.3" if new else None

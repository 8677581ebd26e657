"""Schedules learning rates: over the steps, and after validations."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import optax


def learning_rates(peak: float, steps: int, schedule: str = "cosine") -> np.ndarray:
    """Returns the learning rate of every step, [steps].

    Args:
      schedule: "cosine" warms up over 5 % of the steps and falls to zero; "warm" warms up over 500 steps and stays;
        "constant" and "plateau" (see `plateau_scale`) stay from the beginning. `compression.steps.Optimizer` chooses.

    Raises:
      ValueError: another schedule.
    """
    if schedule not in ("cosine", "warm", "constant", "plateau"):
        raise ValueError(f"there is no schedule {schedule!r}")
    if schedule == "warm":
        return peak * np.minimum(1.0, np.arange(1, steps + 1) / 500)
    if schedule != "cosine":
        return np.full(steps, peak)
    warm_up = max(1, steps // 20)
    share = optax.warmup_cosine_decay_schedule(1 / warm_up, 1.0, warm_up, max(steps, warm_up + 1))
    return peak * np.asarray(jax.jit(share)(np.arange(steps)))


def plateau_scale(scores: Sequence[float], patience: int, factor: float = 0.5, threshold: float = 1e-4) -> float:
    """Returns the factor on the learning rate after these scores (higher is better), from the first to the last.

    Each time that more than `patience` scores in a row are no better than the best before them by a share of
    `threshold`, it is multiplied by `factor`: `torch.optim.lr_scheduler.ReduceLROnPlateau(mode="max")`.
    """
    best, bad, scale = -float("inf"), 0, 1.0
    for score in scores:
        better = score > best + threshold * abs(best) if best > -float("inf") else True
        best, bad = (score, 0) if better else (best, bad + 1)
        if bad > patience:
            scale, bad = scale * factor, 0
    return scale

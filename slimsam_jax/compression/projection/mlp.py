"""Chooses hidden units of the MLPs greedily and refits what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from slimsam_jax.compression.projection.statistics import Moments, Weighting, in_float64, like
from slimsam_jax.models.sam import Params
from slimsam_jax.pruning import bases

# --------------------------------------------------------------------------------------------- MLP


class HiddenUnits:
    """The hidden units of one MLP in order of gain, the `count` best at least; see `attention_bases` for the gain."""

    def __init__(
        self, kernel: jax.Array, moments: Moments, i: int, weighting: Weighting = "none", count: int | None = None
    ):
        self.moments, self.kernel = moments["mlp"][i], np.float64(kernel)
        _, covariance = self._mean_and_covariance()
        if weighting == "disturbed":
            metric = bases.root(in_float64(moments["sensitivity"]["out"][i]) / moments["embedding"])
            self.order, self.gains = bases.choose_units(covariance, self.kernel @ metric, count)
        else:
            self.order, gains = bases.choose_units(covariance, self.kernel, count)
            self.gains = gains * moments["tokens"] / moments["blocks"][i]

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Computed each time: those of all blocks of SAM-H together would be 6.7 GB."""
        m = in_float64(self.moments)
        mean = m["hidden_sum"] / m["tokens"]
        return mean, m["hidden"] / m["tokens"] - np.outer(mean, mean)

    def refit(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept units (ascending), the kernel on them, and what to add to the bias."""
        kept, (mean, covariance) = np.sort(self.order[:width]), self._mean_and_covariance()
        return kept, *bases.refit(covariance, mean, self.kernel, kept)


def hidden_units(
    encoder: Params, moments: Moments, weighting: Weighting = "none", counts: Sequence[int] | None = None
) -> list[HiddenUnits]:
    """Those of every block, or of each the `counts[block]` best."""
    counts = counts or [None] * len(moments["mlp"])
    kernel_of = lambda i: encoder[f"blocks_{i}"]["mlp_lin2"]["kernel"]
    return [HiddenUnits(kernel_of(i), moments, i, weighting, count) for i, count in enumerate(counts)]


def project_mlp(encoder: Params, units: Sequence[HiddenUnits], widths: Sequence[int]) -> Params:
    """Keeps the `widths[block]` best hidden units of each MLP and refits what reads them."""
    new = dict(encoder)
    for i, (block_units, width) in enumerate(zip(units, widths, strict=True)):
        kept, kernel, bias = block_units.refit(width)
        old = encoder[f"blocks_{i}"]
        new[f"blocks_{i}"] = {
            **old,
            "mlp_lin1": {name: np.asarray(array)[..., kept] for name, array in old["mlp_lin1"].items()},
            "mlp_lin2": {"kernel": kernel, "bias": np.float64(old["mlp_lin2"]["bias"]) + bias},
        }
    return like(encoder, new)

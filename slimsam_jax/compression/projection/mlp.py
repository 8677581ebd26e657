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
    """The hidden units of one MLP in order of gain, the `count` best at least; gains as `attention.head_bases` has.

    Its kernel is [M, D], or [M, taps, D] of a convolution.
    """

    def __init__(
        self, kernel: jax.Array, moments: Moments, i: int, weighting: Weighting = "none", count: int | None = None
    ):
        self.moments, self.kernel = moments["mlp"][i], np.float64(kernel)
        _, covariance = self._mean_and_covariance()
        if weighting == "disturbed":
            metric = bases.root(in_float64(moments["sensitivity"]["out"][i]) / moments["embedding"])
            self.order, self.gains = bases.choose_units(covariance, _flat(self.kernel @ metric), count)
        else:
            self.order, gains = bases.choose_units(covariance, _flat(self.kernel), count)
            self.gains = gains * moments["tokens"] / moments["blocks"][i]

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Computed each time: those of all blocks of SAM-H together would be 6.7 GB."""
        m = in_float64(self.moments)
        mean = m["hidden_sum"] / m["tokens"]
        return mean, m["hidden"] / m["tokens"] - np.outer(mean, mean)

    def refit(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept units (ascending), the kernel on them, and what to add to the bias."""
        kept, (mean, covariance) = np.sort(self.order[:width]), self._mean_and_covariance()
        kernel, bias = bases.refit(covariance, mean, _flat(self.kernel), kept)
        shape = self.kernel.shape[1:]
        return kept, kernel.reshape(len(kept), *shape), bias.reshape(-1, shape[-1]).sum(0)


def _flat(kernel: np.ndarray) -> np.ndarray:
    """[M, ...] -> [M, all the others]: those of a convolution's kernel read a unit at several places."""
    return kernel.reshape(len(kernel), -1)


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
            "mlp_lin1": jax.tree.map(lambda array: np.asarray(array)[..., kept], old["mlp_lin1"]),  # noqa: B023
            "mlp_lin2": {"kernel": kernel, "bias": np.float64(old["mlp_lin2"]["bias"]) + bias},
        }
    return like(encoder, new)

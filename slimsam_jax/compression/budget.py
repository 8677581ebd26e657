"""Says how much to cut: a share of the channels, or a budget in parameters, multiply-accumulates or seconds."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Literal

import numpy as np

from slimsam_jax.errors import InputError, printable
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import family_of
from slimsam_jax.models.sam import Architecture
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.latency import block_seconds, encoder_seconds
from slimsam_jax.pruning import allocation

UNITS = {
    "params": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"ms": 1e-3, "s": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the cost of a slim SAM.

    Attributes:
      kind: "params", parameters of the whole SAM; "macs", multiply-accumulates of the image encoder for one
        image, attention included; "latency", seconds of the image encoder for one image on this machine, in
        float32.
      amount: in those units.
    """

    kind: Literal["params", "macs", "latency"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "params=9.1M", "macs=47G" or "latency=120ms".

        Raises:
          InputError: it is none of these.
        """
        match = re.fullmatch(r"(params|macs|latency)=([0-9.]+(?:e[0-9]+)?)([a-zA-Z]*)", str(text).strip())
        try:
            kind, number, unit = match.groups()
            amount = float(number) * UNITS[kind][unit]
        except (AttributeError, KeyError, ValueError):
            raise InputError(
                f"--budget {printable(text, 60)} is not understood; write params=9.1M, macs=47G or latency=120ms"
            ) from None
        if not 0 < amount < math.inf:
            raise InputError(f"--budget {printable(text, 60)} must be more than nothing and less than everything")
        return cls(kind, amount)

    def cost(self, config: Architecture) -> float:
        """Returns the cost of a model in the budget's units; latency is measured."""
        if self.kind == "params":
            return sam_costs.sam_parameters(config)
        return sam_costs.encoder_macs(config).total if self.kind == "macs" else encoder_seconds([config])[0]


@dataclasses.dataclass(frozen=True)
class Target:
    """How much to cut: a share of the channels, or as much as a budget asks for."""

    ratio: float | None = None
    budget: Budget | None = None

    def channel_ratio(self, config: Architecture) -> float:
        """Returns the share of all channels to remove.

        For a budget: the share that meets it if every width of `config` is cut alike, which is
        what fixes the embedding; the bottlenecks then take up what is left exactly.

        Raises:
          InputError: the budget is no less than what the model costs, or less than any cut can reach.
        """
        return self.ratio if self.budget is None else _ratio_of(self.budget, config)


RATIOS = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.97)


@functools.lru_cache  # times are measured once
def _ratio_of(budget: Budget, config: Architecture) -> float:
    """Interpolates the cost of evenly cut models; exact enough, as cutting the bottlenecks corrects it."""
    models = [even_cut(config, ratio) for ratio in RATIOS]
    costs = encoder_seconds(models) if budget.kind == "latency" else [budget.cost(model) for model in models]
    costs = np.minimum.accumulate(costs)
    if not costs[-1] <= budget.amount < costs[0]:
        raise InputError(
            f"--budget {budget.kind}={budget.amount:.8g}: the model costs {costs[0]:.8g}, and can be cut to "
            f"{costs[-1]:.8g} at best; choose something between"
        )
    return float(np.interp(budget.amount, costs[::-1], RATIOS[::-1]))


def even_cut(config: Architecture, ratio: float) -> Architecture:
    """Cuts every width by the same share. Returns the architecture."""
    narrow = lambda width: allocation.rounded_width(width, ratio)
    if not isinstance(config, Config):
        return config.with_encoder(family_of(config.encoder).narrowed(config.encoder, narrow))
    blocks = [dataclasses.replace(b, head_dim=narrow(b.head_dim), mlp_dim=narrow(b.mlp_dim)) for b in config.blocks]
    return dataclasses.replace(config, embed_dim=narrow(config.embed_dim), blocks=tuple(blocks))


def group_costs(config: Config, kind: str) -> dict[str, np.ndarray]:
    """Returns each group's cost at each width, {group: [size + 1]}.

    Parameters and MACs are linear in a width; times are measured.
    """
    if kind == "latency":
        return _latency_tables(config)
    cost = Budget(kind, 1).cost
    tables = {}
    for i, block in enumerate(config.blocks):
        for name, field in (("attn", "head_dim"), ("mlp", "mlp_dim")):
            size = getattr(block, field)
            blocks = [*config.blocks[:i], dataclasses.replace(block, **{field: size + 1}), *config.blocks[i + 1 :]]
            slope = cost(dataclasses.replace(config, blocks=tuple(blocks))) - cost(config)
            tables[f"blocks_{i}/{name}"] = slope * np.arange(size + 1.0)
    return tables


def _latency_tables(config: Config) -> dict[str, np.ndarray]:
    """Times single blocks at some widths of heads and of the MLP, and interpolates linearly between them."""
    tables: dict[str, np.ndarray] = {}
    measured: dict[tuple, np.ndarray] = {}
    for i, block in enumerate(config.blocks):
        for name, field in (("attn", "head_dim"), ("mlp", "mlp_dim")):
            if (block, field) not in measured:
                measured[block, field] = _time_widths(config, block, field)
            tables[f"blocks_{i}/{name}"] = measured[block, field]
    return tables


def _time_widths(config: Config, block, field: str) -> np.ndarray:
    size = getattr(block, field)
    widths = sorted({max(1, round(size * share)) for share in (0, 0.125, 0.25, 0.5, 0.75, 1.0)})
    seconds = block_seconds(config, [dataclasses.replace(block, **{field: width}) for width in widths])
    # Wider is never faster, but for noise.
    return np.interp(np.arange(size + 1), widths, np.maximum.accumulate(seconds) - min(seconds))

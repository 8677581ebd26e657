"""What a model costs, of whatever kind: counts, and a program to time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.fast_sam import FastSam, detect
from slimsam_jax.models.kinds import Model
from slimsam_jax.profiling import fast_sam_costs, sam_costs
from slimsam_jax.profiling.latency import encoder_runner
from slimsam_jax.profiling.macs import Macs


class Costs(NamedTuple):
    """Of one image in float32.

    Attributes:
      parameters, encoder_parameters: of the whole model, and of its image encoder.
      macs: of the encoder.
      program: encodes a black image when called; a jitted function with its arguments.
    """

    parameters: int
    encoder_parameters: int
    macs: Macs
    program: functools.partial[Any]

    def memory(self) -> int:
        """Bytes that the program holds at most by XLA's count, weights included; compiled already if it has run."""
        found = self.program.func.lower(*self.program.args).compile().memory_analysis()
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


@functools.singledispatch
def costs_of(sam: Model) -> Costs:
    """Counts without computing anything."""
    own, macs = sam_costs.parameters(sam.encoder), sam_costs.encoder_macs(sam.config)
    return Costs(sam_costs.parameters(sam.params), own, macs, encoder_runner(sam.config, sam.params))


@costs_of.register
def _(model: FastSam) -> Costs:
    """Its network is all encoder."""
    count, side = fast_sam_costs.parameters_of(model.config), model.config.image_size
    black = np.zeros((1, side, side, 3), np.uint8)
    macs = Macs(fast_sam_costs.macs_of(model.config), 0)
    return Costs(count, count, macs, functools.partial(detect, model.config, model.params, black, jnp.float32))

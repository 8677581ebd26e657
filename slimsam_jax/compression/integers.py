"""The step of a recipe that makes integers, as data; `quantize` carries it out."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from slimsam_jax.compression.record import Record
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range, check_weight_bits, check_weight_group


@dataclasses.dataclass(frozen=True)
class Quantize(Record):
    """Puts integers in the place of weights, the last step of a recipe. What each choice costs: docs/quantization.md.

    Attributes:
      weights: bits of the weights of all layers: 8, 6, 4 or 3.
      activations: bits of the inputs of the image encoder's layers, 3 to 8, but for the first, which reads the image;
        0 leaves them as they are.
      group: inputs of a channel that share a scale, a power of two from 16; 0 for all of them.
      method: of rounding weights. "gptq": the others make up for the error of each; "search": each by itself, with the
        best scale; "absmax": with the scale of the largest; "tinysam": the scales of weights and inputs in turn, by
        the curvature of the masks' loss, one a layer, two where GELU was before: TinySAM's scheme, to be compared with.
      ranges: of inputs. "minmax": what the calibration images reach, one range a layer; "percentile": what 99.99 % of
        their values lie within, on either side; "symmetric": as "minmax", as far below 0 as above, which TensorRT asks
        for; "token": symmetric, of each token as it comes.
      balance: inputs' channels are divided by this power of the largest value that each has, 0.75 say, and weights
        multiplied, so that channels which reach far leave the others more codes; 0 divides by nothing.
      float_inputs: so many layers keep their inputs as they are: those that cost most by themselves.
      arithmetic: with `activations`: "integer" multiplies int8 by int8 into int32; "float" what they stand for.
      head: also the prompt encoder and the mask decoder, their weights alone.
      float_weights: so many layers of the prompt encoder and the decoder keep their weights: those whose integers cost
        most by themselves.
      share: of float32's size, batch norms folded, 0.195 say, that arrays may fill: layers of all parts get 8 bits,
        or stay as they are, first where that saves most of the masks' error a byte; instead of `float_weights`. 0:
        none.
      images: to calibrate with, in whole batches of 4; "tinysam" takes 4 at most.
    """

    weights: int = 8
    activations: int = 0
    group: int = 0
    method: Literal["gptq", "search", "absmax", "tinysam"] = "gptq"
    ranges: Literal["minmax", "percentile", "symmetric", "token"] = "minmax"
    balance: float = 0.0
    float_inputs: int = 0
    arithmetic: Literal["float", "integer"] = "float"
    head: bool = True
    float_weights: int = 0
    share: float = 0.0
    images: int = 32

    RANGES: typing.ClassVar = {
        "activations": Range(0, 8, True),
        "group": Range(0, 2**16, True),
        "balance": Range(0, 1),
        "float_inputs": Range(0, 10**4, True),
        "float_weights": Range(0, 10**4, True),
        "share": Range(0, 1),
        "images": Range(1, 256, True),  # all are held at a time: 9 MB each at 1024 px
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight_bits(self.weights)
        check_weight_group(self.group)
        if self.activations in (1, 2):
            raise InputError(f"activations of {self.activations} bits: there are 3 to 8, and 0 for none")
        if self.method == "tinysam":
            self._check_tinysam()
        if self.arithmetic == "integer" and (not self.activations or self.group):
            raise InputError("arithmetic integer needs activations=8, say, and whole channels: group=0")
        if self.float_weights and not self.head:
            raise InputError(
                "float_weights are of prompt encoder and decoder, which head=false leaves as they are: "
                "add quantize.float_weights=0"
            )
        if self.share:
            self._check_share()
        if not self.activations and (self.float_inputs or self.balance or self.ranges != "minmax"):
            raise InputError("ranges, balance and float_inputs are of activations: set quantize.activations=8, say")
        if self.balance and (self.group or self.ranges == "percentile"):
            raise InputError("balance goes with whole channels, group=0, and ranges of all values, not percentile")

    def _check_share(self) -> None:
        """It chooses by itself, among layers of all parts."""
        unlike = {"float_weights=0": self.float_weights, "head=true": not self.head}
        if needed := [f"quantize.{choice}" for choice, differs in unlike.items() if differs]:
            raise InputError(f"share chooses among all layers by itself: add {' '.join(needed)}")
        if self.share <= (least := self.weights / 32):
            raise InputError(
                f"share={self.share:g}: integers of {self.weights} bits alone take more than {least:g} of float32's "
                "size; give a larger share, or fewer bits"
            )

    def _check_tinysam(self) -> None:
        """It is a scheme of its own, of the image encoder."""
        others = (self.group, self.balance, self.float_inputs, self.share)
        if not self.activations or self.head or self.arithmetic == "integer" or any(others) or self.ranges != "minmax":
            raise InputError(
                "method tinysam is of the image encoder and its inputs: head=false, activations=8, no more"
            )

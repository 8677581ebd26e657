"""A slim SAM of integers: the default recipe's cuts and distillation, then 8-bit weights, then a few steps more.

Codes stay as GPTQ has chosen them. What learns is beside them: scales, norms, biases, positions, and the layers that
keep their weights.

    python -m slimsam_jax.compress --recipe integers --images photos --ratio 0.77 --set quantize.weights=4
"""

from slimsam_jax.compression.recipes import default
from slimsam_jax.compression.steps import Distill, Optimizer, Quantize, Recipe, Validation

# Few steps, however many images there are: what integers have cost is little, and so is what can win it back. Its
# start is validated as well, and stays if no step is better.
MEND = Distill(align="none", optimizer=Optimizer(steps=100), validation=Validation(validations=2))

RECIPE: Recipe = (*default.RECIPE, Quantize(float_weights=10), MEND)

"""What each primitive says about the axes of its operands and results. A primitive without a rule freezes them."""

from slimsam_jax.pruning.rules import indexing, linear, pointwise, random, shapes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, unknown

RULES: dict[str, Rule] = {**pointwise.RULES, **shapes.RULES, **linear.RULES, **indexing.RULES, **random.RULES}

__all__ = ["RULES", "Call", "Nodes", "Rule", "unknown"]

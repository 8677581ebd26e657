"""What each primitive says about the axes of its operands and results. A primitive without a rule freezes them."""

from slimsam_jax.pruning.rules import indexing, linear, pointwise, shapes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, unknown

RULES: dict[str, Rule] = {**pointwise.RULES, **shapes.RULES, **linear.RULES, **indexing.RULES}

__all__ = ["RULES", "Call", "Nodes", "Rule", "unknown"]

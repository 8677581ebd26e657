"""Slim Segment Anything models in JAX (SlimSAM, Chen et al., NeurIPS 2024).

`load(path)` reads any SAM; `slimsam_jax.compress.compress` makes it slim;
`slimsam_jax.evaluation` encodes pictures and predicts masks.
"""

__version__ = "0.1.0"


def load(source):
    """Any SAM we can read; see `converters.from_torch.load`, which is imported when called: it needs JAX."""
    from converters.from_torch import load

    return load(source)

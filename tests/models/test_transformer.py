"""The two-way transformer's attention, where an image is shared by all prompts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from slimsam_jax.models.transformer import Attention


@pytest.mark.parametrize("cells", [4, 30])
def test_a_shared_image_is_that_of_each_prompt(cells):
    """Also one of fewer cells than there are tokens, as in small frames."""
    random = np.random.default_rng(0)
    tokens, image = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 9, 64), (1, cells, 64)))
    attention = Attention(heads=2)
    params = attention.init(jax.random.key(0), tokens, image, image)
    apply = jax.jit(attention.apply)
    shared = apply(params, tokens, image, image)
    each = np.broadcast_to(image, (3, cells, 64))
    np.testing.assert_allclose(shared, apply(params, tokens, each, each), atol=1e-5)

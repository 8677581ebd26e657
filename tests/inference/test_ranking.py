"""Stability of masks at the decoder's resolution, and which of them are given and ranked by what. Compiles nothing."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.family_models import SLIM_REP_VIT
from helpers.golden_edge_sam import SUBSET
from helpers.golden_families import read
from helpers.models import SQUARE
from slimsam_jax.errors import InputError
from slimsam_jax.inference.ranking import by_stability, outputs_of, ranking, stability_scores
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.sam import Sam

EDGE = Sam(SamConfig(SLIM_REP_VIT, head_of((32, 64), out_chans=16, decoder_heads=1)), {})
SAM = Sam(SQUARE, {})


def test_stability_is_the_originals():
    golden = read(SUBSET)
    for count in (3, 4):
        scores = stability_scores(golden[f"points3/n{count}/low_res_masks"])
        np.testing.assert_array_equal(scores, golden[f"points3/n{count}/stability_scores"])
        np.testing.assert_array_equal(scores.argmax(1), golden[f"points3/n{count}/best_by_stability"])


def test_stability_by_hand():
    """Pixels above 1 by those above -1; of an empty mask 0 and no warning."""
    low = np.array([[[2.0, 1.0], [0.0, -1.0]], [[-3.0, -2.0], [-1.0, -9.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_allclose(stability_scores(low), [1 / 3, 0, 1])
    np.testing.assert_allclose(stability_scores(low, offset=0.5), [2 / 3, 0, 1])


def test_what_is_ranked_by_stability():
    low, predicted = np.full((2, 3, 4, 4), 5.0), np.arange(6.0).reshape(2, 3)
    assert by_stability(EDGE) and not by_stability(SAM)
    np.testing.assert_array_equal(ranking(EDGE, low, predicted), np.ones((2, 3)))
    assert ranking(SAM, low, predicted) is predicted


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_places_of_masks(count, places):
    assert list(range(4))[outputs_of(SAM, count)] == places
    for wrong in (0, 2, 5, True, 3.0, "3"):
        with pytest.raises(InputError, match="is none of 1, 3, 4"):
            outputs_of(EDGE, wrong)

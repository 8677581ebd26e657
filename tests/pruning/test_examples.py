"""The three examples of docs/pruning_examples.md, run from the page's own text."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from slimsam_jax import pruning

PAGE = (Path(__file__).parents[2] / "docs/pruning_examples.md").read_text()
# title -> sizes of the groups that are cut, and what is left of the parameters
EXAMPLES = {
    "A Flax ResNet": ([16, 16, 32, 32], (0.2, 0.4)),
    "An Equinox ViT": ([4, 6, 6, 48, 4, 6, 6, 48], (0.3, 0.5)),
    "Plain functions": ([48, 48, 48], (0.4, 0.6)),
}


def code_of(title: str) -> str:
    """All blocks of a section, one after the other."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def test_these_are_all_the_examples_of_the_page():
    assert re.findall(r"(?m)^## (.*)$", PAGE) == list(EXAMPLES)
    assert PAGE.count("```python") == len(re.findall(r"(?m)^```\w+", PAGE)) == 6


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, (least, most) = EXAMPLES[title]
    names = {"__name__": "example"}
    exec(compile(code_of(title), title, "exec", dont_inherit=True), names)
    grouping, keep, saved = names["grouping"], names["keep"], names["saved"]
    assert [group.size for group in grouping.groups if group.name in keep] == sizes
    if title == "An Equinox ViT":
        assert names["difference"] < 1e-5 and len(names["own"]) == 4
        projected, by_magnitude = names["lost"]
        assert projected < 0.6 * by_magnitude and sorted(names["widths"].values()) == [3, 3, 3, 3, 12, 24, 24]
    assert names["losses"][-1] < names["losses"][0]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    full = names["variables"] if "variables" in names else names["params"]
    assert least < count(saved.params) / count(full) < most
    jax.tree.map(np.testing.assert_array_equal, saved.params, names["slim"])
    assert saved.grouping == grouping and np.isfinite(names["logits"]).all()
    np.testing.assert_allclose(names["same_logits"], names["logits"], rtol=1e-5, atol=1e-5)
    masked = pruning.mask(full, grouping, keep)
    assert jax.tree.structure(masked) == jax.tree.structure(saved.params)

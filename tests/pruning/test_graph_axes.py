"""The union-find under the groups: products, sums, and what happens where they meet."""

from __future__ import annotations

import pytest

from slimsam_jax.pruning.axes import Axes, Mismatch


@pytest.fixture
def axes():
    return Axes()


def test_a_leaf_takes_the_form_of_what_it_equals(axes):
    kernel, heads, width = axes.leaf(12), axes.leaf(3), axes.leaf(4)
    axes.unify(kernel, axes.product([heads, width]))
    assert axes.show(kernel) == "(3 * 4)"
    assert axes.parts(kernel) == [heads, width]


def test_two_products_are_refined_until_they_agree(axes):
    coarse = axes.product([axes.leaf(6), axes.leaf(4)])
    fine = axes.product([axes.leaf(2), axes.leaf(12)])
    axes.unify(coarse, fine)
    assert axes.show(fine).replace("(", "").replace(")", "") == "2 * 3 * 4"
    assert axes.parts(coarse) == axes.parts(fine)


def test_a_sum_and_a_product_share_the_inner_factor(axes):
    """A fused qkv: thirds on one side, (heads · channels) on each of them on the other."""
    fused = axes.leaf(24)
    first, rest = axes.split_sum(fused, 8)
    second, third = axes.split_sum(rest, 8)
    heads = axes.leaf(2)
    for part in (first, second, third):
        axes.unify(part, axes.product([heads, axes.leaf(4)]))
    assert [axes.size(leaf) for leaf in axes.parts(fused)] == [2, 4] * 3
    assert len({axes.find(leaf) for leaf in axes.parts(fused) if axes.size(leaf) == 2}) == 1


def test_blocks_of_a_sum_are_counts_of_one_block(axes):
    joined = axes.sum([axes.leaf(6), axes.leaf(4)])
    outer, inner = axes.split_product(joined, 5)
    assert (axes.show(outer), axes.show(inner)) == ("(3 + 2)", "2")
    assert axes.parts(joined)[1::2] == [inner, inner]


def test_what_has_no_common_parts_is_frozen_with_the_reason(axes):
    a, b = axes.product([axes.leaf(6), axes.leaf(4)]), axes.product([axes.leaf(4), axes.leaf(6)])
    bystander = axes.leaf(6)
    axes.unify(a, b)
    assert "(6 * 4)" in axes.why(a)
    assert axes.why(a) == axes.why(b)
    assert axes.why(bystander) is None


def test_a_cut_through_a_block_is_a_mismatch(axes):
    product = axes.product([axes.leaf(3), axes.leaf(4)])
    with pytest.raises(Mismatch):
        axes.split_sum(product, 5)
    head, tail = axes.split_sum(product, 8)
    assert (axes.show(head), axes.show(tail)) == ("(2 * 4)", "4")


def test_freezing_reaches_every_part_and_what_is_joined_later(axes):
    product = axes.product([axes.leaf(3), axes.leaf(4)])
    axes.freeze(product, "an axis of an input")
    late = axes.leaf(12)
    axes.unify(late, product)
    assert axes.why(late) == "an axis of an input"


def test_a_frozen_axis_freezes_what_equals_it_but_collects_no_form(axes):
    window, product = axes.leaf(12, "the window of a kernel"), axes.product([axes.leaf(3), axes.leaf(4)])
    axes.unify(window, product)
    assert axes.why(product) == "the window of a kernel"
    assert axes.parts(window) == [window]
    assert axes.split_product(window, 3)[0] != axes.split_product(window, 3)[0]
    assert axes.parts(window) == [window]
    grid = axes.product([window, axes.leaf(5, "an axis of an input")])
    assert axes.parts(grid) == [grid]


def test_a_reduction_is_noted_at_the_parts_that_are_found_later(axes):
    axis = axes.leaf(12)
    axes.cross(axis, "reduce_sum")
    outer, inner = axes.split_product(axis, 3)
    other = axes.leaf(4)
    axes.unify(inner, other)
    assert axes.crossed(axes.find(other)) == axes.crossed(outer) == ("reduce_sum",)


def test_a_chain_of_concatenations_needs_no_recursion(axes):
    row = axes.leaf(2)
    for _ in range(5000):
        row = axes.sum([row, axes.leaf(2)])
    assert len(axes.parts(row)) == 5001

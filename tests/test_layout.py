"""Layouts: parsing, rearranging and its inverse, inferring sizes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway import layout

pytestmark = pytest.mark.host
AXES = ("vocab", "heads", "head_dim", "embed")


@st.composite
def axis_strings(draw, axes=AXES):
    """An axis string over ``axes`` in any order and any grouping."""
    order = draw(st.permutations(axes))
    cuts = sorted(draw(st.sets(st.integers(1, len(axes) - 1))))
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(axes)])]
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})


@given(axis_strings(), axis_strings(), SIZES)
def test_swapping_the_strings_inverts(source, target, sizes):
    x = np.arange(math.prod(sizes.values())).reshape(layout.parse(source).shape(sizes))
    y = layout.rearrange(source, target, sizes)(x)
    assert y.shape == layout.parse(target).shape(sizes)
    np.testing.assert_array_equal(layout.rearrange(target, source, sizes)(y), x)


@given(axis_strings(), axis_strings(), SIZES)
def test_each_element_keeps_its_place_on_every_axis(source, target, sizes):
    # One array per axis holds its own index: afterwards it must hold the index on the moved axis.
    def indices(axes, axis):
        names = layout.parse(axes).axes
        ones = [-1 if name == axis else 1 for name in names]
        index = np.arange(sizes[axis]).reshape(ones)
        split = np.broadcast_to(index, [sizes[name] for name in names])
        return split.reshape(layout.parse(axes).shape(sizes))

    move = layout.rearrange(source, target, sizes)
    for axis in sizes:
        np.testing.assert_array_equal(move(indices(source, axis)), indices(target, axis))


@given(axis_strings(), SIZES, st.sampled_from(AXES))
def test_infer_sizes_finds_one_unknown_axis(axes, sizes, unknown):
    known = {axis: size for axis, size in sizes.items() if axis != unknown}
    assert layout.infer_sizes(axes, layout.parse(axes).shape(sizes), known) == sizes


def test_equal_order_is_a_view():
    x = np.zeros((6, 5))
    sizes = {"heads": 2, "head_dim": 3, "embed": 5}
    y = layout.rearrange("(heads head_dim) embed", "heads head_dim embed", sizes)(x)
    assert y.shape == (2, 3, 5)
    assert np.shares_memory(x, y)


def test_empty_group_has_size_one():
    x = np.arange(6).reshape(2, 1, 3)
    y = layout.rearrange("mlp () embed", "embed mlp", {"mlp": 2, "embed": 3})(x)
    np.testing.assert_array_equal(y, x[:, 0].T)


MALFORMED = ["(heads embed", "heads) embed", "embed embed", "(embed) embed", "2heads", "a-b"]


@pytest.mark.parametrize("axes", MALFORMED)
def test_malformed_strings_are_refused(axes):
    with pytest.raises(ValueError, match="axis string"):
        layout.parse(axes)


def test_other_axes_are_refused():
    with pytest.raises(ValueError, match="same axes"):
        layout.rearrange("heads embed", "heads mlp", {"heads": 1, "embed": 1, "mlp": 1})


@pytest.mark.parametrize(
    "axes, shape, known",
    [
        ("heads embed", (2,), {}),
        ("(heads head_dim)", (7,), {"heads": 2}),
        ("(heads head_dim)", (8,), {}),
        ("heads", (8,), {"heads": 4}),
    ],
)
def test_sizes_that_do_not_divide_are_refused(axes, shape, known):
    with pytest.raises(ValueError):
        layout.infer_sizes(axes, shape, known)

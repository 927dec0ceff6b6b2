"""Reading and writing of Params, and HF keys of every arrangement of Stacks and Chains."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway import layout, tree
from slipway.tree import Chain, Param, leaves, module, separate, stack

pytestmark = pytest.mark.host
AXES = ("vocab", "heads", "head_dim", "embed")


@st.composite
def axis_strings(draw):
    order = draw(st.permutations(AXES))
    cuts = sorted(draw(st.sets(st.integers(1, len(AXES) - 1))))
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(AXES)])]
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


@st.composite
def params(draw):
    """Param of any layout; its outermost axes may be repeated or padded."""
    sizes = {axis: draw(st.integers(1, 4)) for axis in AXES}
    axes, repeats, pads = draw(axis_strings()), {}, {}
    for group in layout.parse(axes).groups:
        how = draw(st.sampled_from(["as it is", "repeat", "pad"]))
        if how == "repeat":
            repeats[group[0]] = draw(st.integers(2, 3))
        elif how == "pad":
            pads[group[0]] = sizes[group[0]] + draw(st.integers(1, 5))
    return Param(axes, sizes, hf=draw(axis_strings()), repeats=repeats, pads=pads)


def hf_tensor(param):
    return np.arange(1, 1 + math.prod(param.hf_shape), dtype=np.int32).reshape(param.hf_shape)


def whole(param):
    return tuple(slice(0, size) for size in param.shape[len(param.stacks) :])


@given(params())
def test_write_inverts_read(param):
    hf = hf_tensor(param)
    x = param.read(hf, whole(param))
    assert x.shape == param.shape
    np.testing.assert_array_equal(param.write(x), hf)


@given(params(), st.data())
def test_reading_a_block_equals_a_block_of_the_whole(param, data):
    hf, index = hf_tensor(param), []
    for group, full in zip(layout.parse(param.axes).groups, param.shape):
        inner = math.prod(param.sizes[axis] for axis in group[1:])
        start = data.draw(st.integers(0, full // inner))
        stop = data.draw(st.integers(start, full // inner))
        index.append(slice(start * inner, stop * inner))
    expected = param.read(hf, whole(param))[tuple(index)]
    np.testing.assert_array_equal(param.read(hf, tuple(index)), expected)


@given(params())
def test_growth_is_repetition_in_a_row_or_zeros_at_the_end(param):
    plain = dataclasses.replace(param, repeats={}, pads={})
    expected = plain.read(hf_tensor(param), whole(plain))
    for dim, group in enumerate(layout.parse(param.axes).groups):
        inner = math.prod(param.sizes[axis] for axis in group[1:])
        rows = np.split(expected, expected.shape[dim] // inner, axis=dim)
        rows = [row for row in rows for _ in range(param.repeats.get(group[0], 1))]
        rows += [np.zeros_like(rows[0])] * (param.pads.get(group[0], 0) - len(rows))
        expected = np.concatenate(rows, axis=dim)
    np.testing.assert_array_equal(param.read(hf_tensor(param), whole(param)), expected)


def test_reading_the_checkpoints_own_layout_is_a_view():
    param = Param("(heads head_dim) embed", {"heads": 4, "head_dim": 2, "embed": 3})
    hf = hf_tensor(param)
    block = param.read(hf, (slice(2, 6), slice(0, 3)))
    assert np.shares_memory(block, hf)
    assert block.flags.c_contiguous


@module
class Body:
    weight: Param
    experts: tree.Stack


@module
class Model:
    layers: Chain
    scale: Param


def declaration():
    weight = Param("embed mlp", {"embed": 2, "mlp": 3})
    body = Body(weight, stack(Body(weight, ()), 2, axis="experts"))
    return Model(Chain([stack(body, 2), stack(body, 3, first=2)]), Param("", {}))


def keys(tree_):
    return [key for leaf in leaves(tree_) for key in leaf.keys.values()]


def test_keys_carry_indices_from_each_stacks_first():
    held = keys(declaration())
    assert held[:2] == ["layers.0.weight", "layers.1.weight"]
    assert {"layers.4.weight", "layers.4.experts.1.weight", "scale"} <= {*held}
    assert len(held) == len({*held}) == 5 + 5 * 2 + 1


def test_stacks_put_axes_in_front():
    shapes = [leaf.param.shape for leaf in leaves(declaration())]
    assert shapes == [(2, 2, 3), (2, 2, 2, 3), (3, 2, 3), (3, 2, 2, 3), ()]


def test_separating_keeps_the_keys():
    for axes in (["layers"], ["layers", "experts"]):
        separated = declaration()
        for axis in axes:
            separated = separate(separated, axis)
        assert sorted(keys(separated)) == sorted(keys(declaration()))
        for leaf in leaves(separated):
            assert all(axis not in axes for axis, _ in leaf.param.stacks)
            assert all(len(index) == len(leaf.param.stacks) for index in leaf.keys)


def test_leaves_come_in_the_order_of_jax():
    expected = jax.tree.leaves(declaration(), is_leaf=tree.is_param)
    assert [leaf.param for leaf in leaves(declaration())] == expected

"""Linear layers, embedding and output head against NumPy, on one device and split over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import mesh, tree
from slipway.errors import InvalidConfig
from slipway.nn.linear import Embedding, Linear, quantize, together
from tests.nn.layers import CLOSE, call, draw, fill, one_sequence

SIZES = {"embed": 12, "heads": 4, "head_dim": 6, "mlp": 8}
COUNT, PADDING = 5, 3


def inputs(rng, size):
    """Return the input of a step, and hidden states [T, size] with rows of padding."""
    return one_sequence(0, COUNT, padding=PADDING), draw(rng, COUNT + PADDING, size)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_with_split_inputs_adds_partial_sums(tensor, bias):
    rng = np.random.default_rng(0)
    declared = Linear.declare("embed", "(heads head_dim)", SIZES, bias)
    layer = fill(declared, rng)
    step, x_TD = inputs(rng, 24)

    def run(layer, x_TD, step):
        return layer(x_TD, step)

    y_TO = call(
        run,
        declared,
        layer,
        x_TD,
        step,
        tensor=tensor,
        specs=[mesh.spec([None, "heads"], mesh.make_mesh())],
    )
    expected = x_TD @ np.asarray(layer.weight).T
    expected = expected + np.asarray(layer.bias) if bias else expected
    np.testing.assert_allclose(y_TO[:COUNT], expected[:COUNT], **CLOSE)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_projection_with_split_outputs(tensor):
    rng = np.random.default_rng(1)
    declared = Linear.declare("mlp", "embed", SIZES, bias=True)
    layer = fill(declared, rng)
    step, x_TD = inputs(rng, 12)

    def run(layer, x_TD, step):
        return mesh.all_gather(layer(x_TD, step), "mlp")

    y_TO = call(run, declared, layer, x_TD, step, tensor=tensor)
    expected = x_TD @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    np.testing.assert_allclose(y_TO[:COUNT], expected[:COUNT], **CLOSE)


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(2)
    declared = Linear.declare("mlp", "embed", SIZES, bias=True)
    layer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fill(declared, rng))
    step, x_TD = inputs(rng, 12)
    x_TD = jnp.asarray(x_TD, jnp.bfloat16)

    def run(layer, x_TD, step):
        return layer(x_TD, step)

    y_TO = call(run, declared, layer, x_TD, step)
    assert y_TO.dtype == jnp.bfloat16
    as_f32 = [np.asarray(x.astype(jnp.float32)) for x in (x_TD, layer.weight, layer.bias, y_TO)]
    expected = as_f32[0] @ as_f32[1].T + as_f32[2]
    np.testing.assert_allclose(as_f32[3][:COUNT], expected[:COUNT], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_together_equal_each_alone(bias):
    rng = np.random.default_rng(3)
    declared = [
        Linear.declare("(heads head_dim)", "embed", SIZES, bias),
        Linear.declare("mlp", "embed", SIZES, bias),
    ]
    layers = [fill(each, rng) for each in declared]
    step, x_TD = inputs(rng, 12)

    def run(layers, x_TD, step):
        return together(layers, x_TD, step), [layer(x_TD, step) for layer in layers]

    joint, alone = call(run, declared, layers, x_TD, step)
    for one, other in zip(joint, alone, strict=True):
        np.testing.assert_allclose(one[:COUNT], other[:COUNT], **CLOSE)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_an_embedding_looks_rows_up_and_scores_them(tensor):
    """A vocabulary of 10 is padded to 12 rows by 4 devices."""
    rng = np.random.default_rng(4)
    declared = mesh.fit(Embedding.declare(10, 12), mesh.make_mesh(1, tensor))
    table = draw(rng, 10, 12)
    (param,) = jax.tree.leaves(declared, is_leaf=tree.is_param)
    layer = Embedding(jnp.asarray(param.read(table, tuple(map(slice, param.shape)))))
    step = one_sequence(0, COUNT)
    ids_T = np.array([0, 9, 4, 4, 7], np.int32)

    def run(layer, ids_T, step):
        x_TD = layer(ids_T, step)
        return x_TD, layer.logits(x_TD, step.num_tokens, 10)

    x_TD, logits_TV = call(run, declared, layer, ids_T, step, tensor=tensor)
    np.testing.assert_array_equal(x_TD, table[ids_T])
    assert logits_TV.shape == (COUNT, 10)
    np.testing.assert_allclose(logits_TV, table[ids_T] @ table.T, **CLOSE)


def test_weights_that_do_not_fill_words_are_refused():
    declared = Linear.declare("mlp", "embed", SIZES)
    with pytest.raises(InvalidConfig) as caught:
        quantize(declared, bits=4, group=0)
    assert caught.value.field == "quantization: bits"
    with pytest.raises(InvalidConfig) as caught:
        quantize(Linear.declare("mlp", "embed", SIZES | {"embed": 40}), bits=4, group=32)
    assert caught.value.field == "quantization: group"

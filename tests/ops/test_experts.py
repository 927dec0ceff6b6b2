"""Choice of experts and the computation with them: oracles, ties, groups, bits in every batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway import mesh, ops, tree
from slipway.ops import Addresses, ExpertMatrices, Routing, cpu, tpu, xla
from slipway.ops.addresses import by_address
from slipway.ops.quantized import Quantized, dequantized

F32, BF16 = jnp.float32, jnp.bfloat16
BODIES = pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
RULES = {
    "softmax": Routing(num_experts=8, top_k=2),
    "normalized": Routing(num_experts=60, top_k=4, normalize=True),
    "of chosen": Routing(num_experts=32, top_k=4, score="softmax_of_chosen"),
    "sigmoid": Routing(num_experts=16, top_k=3, score="sigmoid", normalize=True, scale=2.5),
    "groups of two": Routing(
        num_experts=32, top_k=4, score="sigmoid", num_groups=8, top_groups=4,
        group_score="sum_of_two", normalize=True, epsilon=1e-20, scale=1.5,
    ),
    "largest of a group": Routing(num_experts=24, top_k=3, num_groups=4, top_groups=2),
}  # fmt: skip


def expected_route(logits, bias, rule):
    """Choose the experts of one token with Python's sort, as the families publish their rules."""
    logits = [float(x) for x in logits]
    peak = max(logits)
    total = sum(math.exp(x - peak) for x in logits)
    scores = {
        "softmax": [math.exp(x - peak) / total for x in logits],
        "sigmoid": [1 / (1 + math.exp(-x)) for x in logits],
        "softmax_of_chosen": logits,
    }[rule.score]
    values = [s + float(b) for s, b in zip(scores, bias)]
    size = rule.num_experts // rule.num_groups

    def group_value(group):
        of_group = sorted(values[group * size : (group + 1) * size], reverse=True)
        return sum(of_group[:2]) if rule.group_score == "sum_of_two" else of_group[0]

    best = sorted(range(rule.num_groups), key=lambda g: (-group_value(g), g))
    best = best[: rule.top_groups if rule.num_groups > 1 else 1]
    allowed = [e for e in range(rule.num_experts) if e // size in best or rule.num_groups == 1]
    chosen = sorted(allowed, key=lambda e: (-values[e], e))[: rule.top_k]
    weights = [scores[e] for e in chosen]
    if rule.score == "softmax_of_chosen":
        weights = [math.exp(w - weights[0]) for w in weights]
        weights = [w / sum(weights) for w in weights]
    if rule.normalize:
        weights = [w / (sum(weights) + rule.epsilon) for w in weights]
    return chosen, [w * rule.scale for w in weights]


def route(body, logits, bias, rule, num_tokens=None):
    count = jnp.int32(logits.shape[0] if num_tokens is None else num_tokens)
    experts, weights = jax.jit(body.route, static_argnames="rule")(logits, bias, count, rule=rule)
    return np.asarray(experts), np.asarray(weights)


@BODIES
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_experts_are_chosen_as_the_rule_states(body, rule, has_bias):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(37, rule.num_experts)).astype(np.float32)
    bias = rng.normal(size=rule.num_experts).astype(np.float32) * has_bias
    experts, weights = route(body, logits, jnp.asarray(bias) if has_bias else None, rule)
    for t, row in enumerate(logits):
        chosen, expected = expected_route(row, bias, rule)
        assert experts[t].tolist() == chosen
        np.testing.assert_allclose(weights[t], expected, rtol=2e-6)


@BODIES
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_of_equal_scores_the_lower_index_is_chosen(body, data):
    """Logits of few values, so that experts and groups tie."""
    rule = data.draw(st.sampled_from([RULES["softmax"], RULES["sigmoid"], RULES["of chosen"]]))
    values = st.lists(st.integers(-1, 1), min_size=rule.num_experts, max_size=rule.num_experts)
    logits = np.array([data.draw(values) for _ in range(3)], np.float32)
    experts, _ = route(body, logits, None, rule)
    for t, row in enumerate(logits):
        assert experts[t].tolist() == np.argsort(-row, kind="stable")[: rule.top_k].tolist()


@BODIES
def test_of_equal_groups_the_lower_index_is_chosen(body):
    for name in ("groups of two", "largest of a group"):
        rule = RULES[name]
        experts, _ = route(body, np.zeros((2, rule.num_experts), np.float32), None, rule)
        assert experts.tolist() == [list(range(rule.top_k))] * 2


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_choice_has_the_same_bits_in_every_batch(rule):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, rule.num_experts)).astype(np.float32)
    bias = jnp.asarray(rng.normal(size=rule.num_experts), F32)
    whole = route(ops, logits, bias, rule)
    for rows in (slice(0, 1), slice(5, 8), slice(20, 61)):
        for found, expected in zip(route(ops, logits[rows], bias, rule), whole):
            np.testing.assert_array_equal(found, expected[rows])


E, D, F, K = 7, 64, 96, 3
KINDS = {"f32": (F32, 0, 0), "bf16": (BF16, 0, 0), "int8": (BF16, 8, 0), "int4": (F32, 4, 32)}


def matrix(rng, rows, size, kind):
    dtype, bits, group = kind
    if not bits:
        return jnp.asarray(rng.normal(size=(rows, size)) / size**0.5, dtype)
    words = rng.integers(-(2**31), 2**31, size=(rows, size * bits // 32)).astype(np.int32)
    scale = rng.uniform(0.5, 1.5, size=(rows, size // group if group else 1)) / 2**bits / size**0.5
    return Quantized(jnp.asarray(words), jnp.asarray(scale, dtype), bits, group)


def experts_of(rng, kind):
    """Return gate, up and down of each expert."""
    shapes = ((F, D), (F, D), (D, F))
    return [tuple(matrix(rng, *shape, kind) for shape in shapes) for _ in range(E)]


def stacked(experts):
    gate, up, down = jax.tree.map(lambda *each: jnp.stack(each), *experts)
    return ExpertMatrices((gate, up), down)


def addressed(experts):
    """Return the matrices as programs of a CPU get them."""
    one = mesh.make_mesh(devices=jax.devices()[:1])
    placed = jax.device_put(experts, jax.NamedSharding(one, jax.P()))
    node = tree.Separate(tuple(placed), axis="experts")
    gate, up, down = by_address(node, one).body
    return ExpertMatrices((gate, up), down), placed


def random_choice(rng, tokens, low=0, high=E):
    return np.stack([rng.permutation(np.arange(low, high))[:K] for _ in range(tokens)])


def expected_experts(x, choice, weights, experts):
    """Compute each token's experts one after the other, in f32."""

    def numbers(w):
        return dequantized(w) if isinstance(w, Quantized) else w.astype(F32)

    x, out = jnp.asarray(x), np.zeros(x.shape, np.float32)
    for t in range(x.shape[0]):
        for e, weight in zip(choice[t], weights[t]):
            if not 0 <= e < E:
                continue
            gate, up, down = (numbers(w) for w in experts[e])
            row = x[t].astype(F32)
            hidden = (jax.nn.silu(gate @ row) * (up @ row)).astype(x.dtype).astype(F32)
            out[t] += weight * np.asarray(down @ hidden)
    return out


def run(form, x, choice, weights, num_tokens=None):
    count = jnp.int32(x.shape[0] if num_tokens is None else num_tokens)
    call = jax.jit(functools.partial(ops.experts, num_experts=E))
    return np.asarray(call(x, jnp.asarray(choice, jnp.int32), weights, form, count))


FORMS = pytest.mark.parametrize(
    "form",
    [
        "stacked",
        pytest.param(
            "addressed", marks=pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
        ),
    ],
)


@FORMS
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_experts_equal_their_oracle(kind, form):
    rng = np.random.default_rng(2)
    experts = experts_of(rng, kind)
    matrices, _held = addressed(experts) if form == "addressed" else (stacked(experts), None)
    for tokens in (1, 2, 5, 33, 70):
        x = jnp.asarray(rng.normal(size=(tokens, D)), kind[0])
        # Numbers below 0 and from E on are experts of other devices.
        choice = random_choice(rng, tokens, -2, E + 2)
        weights = jnp.asarray(rng.uniform(size=(tokens, K)), F32)
        expected = expected_experts(x, choice, np.asarray(weights), experts)
        close = {"rtol": 1e-4, "atol": 1e-5} if kind[0] == F32 else {"rtol": 2e-2, "atol": 2e-2}
        np.testing.assert_allclose(run(matrices, x, choice, weights), expected, **close)


@FORMS
def test_rows_of_padding_are_not_computed(form):
    """A NaN in padding, and an expert that nothing else chose, change no other row."""
    rng = np.random.default_rng(3)
    experts = experts_of(rng, KINDS["f32"])
    matrices, _held = addressed(experts) if form == "addressed" else (stacked(experts), None)
    x = rng.normal(size=(9, D)).astype(np.float32)
    choice, weights = random_choice(rng, 9), jnp.ones((9, K), F32)
    expected = run(matrices, jnp.asarray(x[:4]), choice[:4], weights[:4])
    x[4:] = np.nan
    found = run(matrices, jnp.asarray(x), choice, weights, num_tokens=4)
    np.testing.assert_allclose(found[:4], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_experts_have_the_same_bits_in_every_batch(kind):
    rng = np.random.default_rng(4)
    matrices, _held = addressed(experts_of(rng, kind))
    x = jnp.asarray(rng.normal(size=(50, D)), kind[0])
    choice, weights = random_choice(rng, 50), jnp.asarray(rng.uniform(size=(50, K)), F32)
    whole = run(matrices, x, choice, weights)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 5), slice(11, 50)):
        found = run(matrices, x[rows], choice[rows], weights[rows])
        np.testing.assert_array_equal(found, whole[rows])


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
def test_the_tables_of_several_layers_are_told_apart():
    rng = np.random.default_rng(5)
    layers = [experts_of(rng, KINDS["f32"]) for _ in range(3)]
    forms = [addressed(experts) for experts in layers]
    x, choice = jnp.asarray(rng.normal(size=(4, D)), F32), random_choice(rng, 4)
    weights = jnp.ones((4, K), F32)
    node = tree.Separate(tuple(matrices for matrices, _held in forms))

    def every_layer(node, x):
        def layer(matrices, index, sums):
            routed = x, jnp.asarray(choice, jnp.int32), weights, matrices, jnp.int32(4)
            y = ops.experts(*routed, num_experts=E)
            return sums.at[index].set(y)

        return node.fold(layer, jnp.zeros((3, 4, D), F32))

    found = jax.jit(every_layer)(node, x)
    for index, (matrices, _held) in enumerate(forms):
        np.testing.assert_array_equal(found[index], run(matrices, x, choice, weights))


def transposed_experts(rng, dtype):
    """Return gpt-oss's matrices of each expert, gate and up in turn, and their biases."""
    # no multiples of a vector, and several runs of columns
    size, hidden = 68, 150
    shapes = {
        "both": (size, 2 * hidden),
        "down": (hidden, size),
        "both_bias": (2 * hidden,),
        "down_bias": (size,),
    }
    return [
        {name: jnp.asarray(rng.normal(size=shape) / 8, dtype) for name, shape in shapes.items()}
        for _ in range(E)
    ]


def expected_transposed(x, choice, weights, experts, parts):
    out = np.zeros(x.shape, np.float32)
    for t in range(len(x)):
        for e, weight in zip(choice[t], weights[t]):
            if not 0 <= e < E:
                continue
            of = {name: np.asarray(array, np.float32) for name, array in experts[e].items()}
            both = np.asarray(x[t], np.float32) @ of["both"] + of["both_bias"]
            gate, up = np.minimum(both[0::2], 0.7), np.clip(both[1::2], -0.7, 0.7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            hidden = np.asarray(jnp.asarray(hidden, x.dtype), np.float32)
            out[t] += weight * (hidden @ of["down"] + of["down_bias"] / parts)
    return out


def transposed(experts, form):
    if form == "stacked":
        of = jax.tree.map(lambda *each: jnp.stack(each), *experts)
    else:
        one = mesh.make_mesh(devices=jax.devices()[:1])
        experts = jax.device_put(experts, jax.NamedSharding(one, jax.P()))
        of = by_address(tree.Separate(tuple(experts), axis="experts"), one).body
    options = {"into_bias": of["both_bias"], "down_bias": of["down_bias"], "clamp": (1.702, 0.7)}
    return ExpertMatrices((of["both"],), of["down"], **options), experts


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens, parts", [(1, 1), (5, 2), (33, 1)])
def test_transposed_matrices_biases_and_a_clamp(form, dtype, tokens, parts):
    """gpt-oss: gate and up in one matrix, rows along the outputs."""
    rng = np.random.default_rng(tokens)
    experts = transposed_experts(rng, dtype)
    matrices, _held = transposed(experts, form)
    matrices = dataclasses.replace(matrices, parts=parts)
    x = jnp.asarray(rng.normal(size=(tokens, 68)), dtype)
    choice, weights = random_choice(rng, tokens, -2, E + 2), rng.uniform(size=(tokens, K))
    expected = expected_transposed(x, choice, weights, experts, parts)
    found = run(matrices, x, choice, jnp.asarray(weights, F32))
    tolerance = 1e-4 if dtype == F32 else 1e-2
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    if form == "addressed":
        for t in range(0, tokens, 7):
            alone = run(
                matrices, x[t : t + 1], choice[t : t + 1], jnp.asarray(weights[t:][:1], F32)
            )
            np.testing.assert_array_equal(alone[0], found[t])


def test_addresses_are_those_of_the_arrays():
    experts = experts_of(np.random.default_rng(7), KINDS["bf16"])
    matrices, held = addressed(experts)
    gate = matrices.into[0]
    assert isinstance(gate, Addresses)
    assert (gate.shape, gate.dtype) == ((F, D), "bfloat16")
    pointers = np.asarray(gate.table).view(np.uint64)[:, 0]
    assert pointers.tolist() == [each[0].unsafe_buffer_pointer() for each in held]
    assert dataclasses.is_dataclass(gate)


@pytest.mark.parametrize(
    "counts", [[3, 0, 200, 1, 0, 40, 7], [0, 0, 0, 0, 0, 0, 0], [130, 0, 0, 0, 0, 0, 0]]
)
def test_the_grouped_product_of_a_tpu_is_the_portable_one(counts):
    """megablox, interpreted, for a matrix and for one layer of a stack."""
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.normal(size=(260, 256)), F32)
    stack = jnp.asarray(rng.normal(size=(3, E, 384, 256)), F32)
    counts = jnp.asarray(counts, jnp.int32)
    live = int(counts.sum())
    for layer in range(3):
        expected = xla.multiply_by_group(x, stack[layer], counts)[:live]
        row = tree.StackedArray(stack, jnp.int32(layer))
        for matrix in (stack[layer], row):
            with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
                found = tpu.multiply_by_group(x, matrix, counts, interpret=True)[:live]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

"""Rules: each named transform against its formula, and round trips of random trees, bit for bit."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.convert.rules import Rule, TreeMapping, rules
from slipway.errors import CheckpointError
from tests.convert.memory import forth_and_back, moved, planned

pytestmark = pytest.mark.host
BF16 = np.dtype(ml_dtypes.bfloat16)


def numbers(*shape: int, dtype: np.dtype = BF16) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def mapping(*rows, **fields) -> TreeMapping:
    return TreeMapping(name="test", rules=rules(rows), **fields)


def test_a_kernel_is_transposed():
    x = numbers(3, 5)
    tensors = forth_and_back(
        mapping(("a.kernel", "a.weight", "into out -> out into")), {"a.kernel": x}
    )
    assert np.array_equal(tensors["a.weight"], x.T)


@pytest.mark.parametrize("axis", range(4))
def test_layers_and_experts_are_stacked_along_any_axis(axis):
    axes = ["experts", "embed", "mlp"]
    axes.insert(axis, "layers")
    rule = (
        "w",
        "layers.{layers}.experts.{experts}.w",
        f"{' '.join(axes)} -> layers experts mlp embed",
    )
    sizes = {"layers": 3, "experts": 2, "embed": 4, "mlp": 5}
    x = numbers(*(sizes[a] for a in axes))
    tensors = forth_and_back(mapping(rule), {"w": x})
    assert len(tensors) == 6
    whole = x.transpose([axes.index(a) for a in ("layers", "experts", "mlp", "embed")])
    assert all(
        np.array_equal(tensors[f"layers.{i}.experts.{j}.w"], whole[i, j])
        for i in range(3)
        for j in range(2)
    )


def test_layers_one_by_one_need_no_other_pattern():
    # Two digits: order is by number.
    trees = {f"layers_{i}.w": numbers(3, 4) + np.array(i, BF16) for i in range(11)}
    tensors = forth_and_back(
        mapping(("layers_{layers}.w", "l.{layers}.w", "a layers b -> layers b a")), trees
    )
    assert all(np.array_equal(tensors[f"l.{i}.w"], trees[f"layers_{i}.w"].T) for i in range(11))


def test_a_fused_tensor_is_split_into_parts_of_unlike_size():
    parts = {"qkv": {"q": "heads", "k": "kv_heads", "v": "kv_heads"}}
    rule = ("qkv.kernel", "{qkv}_proj.weight", "embed qkv head_dim -> (qkv head_dim) embed")
    x = numbers(6, 4 + 2 + 2, 3)
    fused = mapping(rule, parts=parts, fields={"heads": "h", "kv_heads": "k"})
    tensors = forth_and_back(fused, {"qkv.kernel": x}, heads=4, kv_heads=2)
    assert np.array_equal(tensors["k_proj.weight"], x[:, 4:6].reshape(6, 6).T)
    assert np.array_equal(tensors["q_proj.weight"], x[:, :4].reshape(6, 12).T)


def test_a_fused_tensor_may_lie_on_the_other_side_and_by_groups():
    """Queries, key and value of each key-value head in a row, as in GPT-NeoX and Bailing."""
    parts = {"qkv": {"query": "group", "key": 1, "value": 1}}
    rule = (
        "{qkv}.kernel",
        "qkv.weight",
        "embed kv_heads qkv head_dim -> (kv_heads qkv head_dim) embed",
    )
    tree = {
        "query.kernel": numbers(6, 2, 3, 4),
        "key.kernel": numbers(6, 2, 4),
        "value.kernel": numbers(6, 2, 4),
    }
    tree |= {name: x[:, :, None] for name, x in tree.items() if x.ndim == 3}
    fused = mapping(rule, parts=parts, fields={"group": "g"})
    tensors = forth_and_back(fused, tree, group=3)
    whole = np.concatenate([tree[f"{name}.kernel"] for name in ("query", "key", "value")], axis=2)
    assert np.array_equal(tensors["qkv.weight"], whole.reshape(6, 2 * 5 * 4).T)


def test_pairs_and_halves_of_a_rotated_head():
    """Hugging Face rotates (x[i], x[i + half]), the other convention (x[2i], x[2i + 1])."""
    rule = ("q", "q", "embed heads (half two) -> (heads two half) embed")
    x = numbers(4, 2, 6)
    tensor = forth_and_back(mapping(rule, sizes={"two": 2}), {"q": x})["q"].reshape(2, 6, 4)
    assert np.array_equal(tensor[:, :3], x[..., 0::2].transpose(1, 2, 0))
    assert np.array_equal(tensor[:, 3:], x[..., 1::2].transpose(1, 2, 0))


def test_two_axes_are_one_index_of_a_name():
    """Layers of two kinds alternate, and each kind is stacked: layer 5 is block 2, place 1."""
    rule = ("layers_{cycle}.w", "l.{blocks cycle}.w", "a blocks b -> blocks b a")
    trees = {f"layers_{i}.w": numbers(4, 3, 5) + np.array(i, BF16) for i in range(2)}
    tensors = forth_and_back(mapping(rule, sizes={"cycle": 2}), trees)
    assert sorted(tensors) == [f"l.{i}.w" for i in range(6)]
    for i in range(6):
        assert np.array_equal(tensors[f"l.{i}.w"], trees[f"layers_{i % 2}.w"][:, i // 2].T)


LAYERS = (
    ("moe.norm", "l.{dense+moe}.norm", "a moe -> moe a"),
    ("moe.w", "l.{dense+moe}.experts.{experts}", "experts moe a b -> moe experts b a"),
    ("dense.norm", "l.{dense}.norm", "a dense -> dense a"),
    ("dense.w", "l.{dense}.w", "a dense b -> dense b a"),
)


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_an_index_begins_after_another_axis(dense):
    tree = {"moe.norm": numbers(4, 2), "moe.w": numbers(3, 2, 4, 5)}
    if dense:
        tree |= {"dense.norm": numbers(4, dense), "dense.w": numbers(4, dense, 5)}
    tensors = forth_and_back(mapping(*LAYERS, absent=("dense",)), tree)
    names = {f"l.{i}.norm" for i in range(dense + 2)} | {f"l.{i}.w" for i in range(dense)}
    assert tensors.keys() == names | {
        f"l.{dense + i}.experts.{j}" for i in range(2) for j in range(3)
    }
    assert np.array_equal(tensors[f"l.{dense + 1}.experts.2"], tree["moe.w"][2, 1].T)
    assert np.array_equal(tensors[f"l.{dense + 1}.norm"], tree["moe.norm"][:, 1])
    if dense:
        assert np.array_equal(tensors[f"l.{dense - 1}.norm"], tree["dense.norm"][:, -1])


def test_some_tensors_of_an_axis_that_may_be_absent_are_no_whole():
    absent = mapping(*LAYERS, absent=("dense",))
    tree = {"moe.norm": numbers(4, 2), "moe.w": numbers(3, 2, 4, 5), "dense.w": numbers(4, 1, 5)}
    assert planned(absent, "to_hf", tree).unmatched == ("dense.norm: missing",)
    tree = {"moe.norm": numbers(4, 2), "moe.w": numbers(3, 2, 4, 5)}
    assert set(planned(mapping(*LAYERS), "to_hf", tree).unmatched) == {
        "dense.norm: missing",
        "dense.w: missing",
    }
    tensors = {"l.0.w": numbers(5, 4), "l.1.norm": numbers(4), "l.1.experts.0": numbers(5, 4)}
    assert planned(absent, "to_jax", tensors).unmatched == ("l.0.norm: missing",)


def test_the_only_unknown_part_of_an_axis_is_the_rest():
    parts = {"both": {"latent": "rank", "rope": "rope"}, "query": {"nope": "nope", "rope": "rope"}}
    fields = {axis: axis for axis in ("rank", "rope", "nope", "heads")}
    rows = (
        ("norm", "norm", "rank -> rank"),
        ("down", "down", "a both -> both a"),
        ("query", "query", "a heads query -> (heads query) a"),
    )
    tree = {"norm": numbers(6), "down": numbers(4, 6 + 2), "query": numbers(4, 3, 5 + 2)}
    plan = planned(mapping(*rows, parts=parts, fields=fields), "to_hf", tree)
    assert plan.fits
    sizes = {"rank": 6, "rope": 2, "nope": 5, "heads": 3}
    assert {axis: plan.sizes[axis] for axis in fields} == sizes


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_scale_is_computed_in_float32_and_its_loss_is_told(dtype, head_dim):
    rule = ("q", "q", "embed head_dim -> head_dim embed", "* head_dim ** 0.5")
    x = numbers(50, head_dim, dtype=dtype)
    tensors, written = moved(planned(mapping(rule), "to_hf", {"q": x}), {"q": x})
    wanted = (x.astype(np.float32) * np.float32(head_dim**0.5)).astype(dtype).T
    assert tensors["q"].tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert written[0].max_ulp == (0 if head_dim == 64 else 1)  # a power of two is exact
    assert written[0].lossless == (head_dim == 64)


def test_a_convolution_and_a_transposed_one():
    kernel = numbers(3, 2, 5, 7)
    plain = ("conv.kernel", "conv.weight", "h w into out -> out into h w")
    flipped = ("up.kernel", "up.weight", "-h -w into out -> into out h w")
    tensors = forth_and_back(mapping(plain, flipped), {"conv.kernel": kernel, "up.kernel": kernel})
    assert np.array_equal(tensors["conv.weight"], kernel.transpose(3, 2, 0, 1))
    assert np.array_equal(tensors["up.weight"], kernel[::-1, ::-1].transpose(2, 3, 0, 1))


def test_the_first_linear_after_a_flatten():
    h, w, c, out = 2, 3, 4, 5
    kernel = numbers(h * w * c, out)
    rule = ("fc.kernel", "fc.weight", "(h w c) out -> out (c h w)")
    tensors = forth_and_back(mapping(rule, sizes={"h": h, "w": w}), {"fc.kernel": kernel})
    wanted = kernel.reshape(h, w, c, out).transpose(3, 2, 0, 1).reshape(out, -1)
    assert np.array_equal(tensors["fc.weight"], wanted)


def test_replicated_kv_heads_are_held_once_and_must_be_equal():
    rule = ("k", "k", "embed (kv_heads copies) head_dim -> (kv_heads head_dim) embed")
    replicated = mapping(rule, sizes={"copies": 2})
    once = numbers(3, 2, 4)
    tensors = forth_and_back(replicated, {"k": np.repeat(once, 2, axis=1)})
    assert np.array_equal(tensors["k"], once.reshape(3, 8).T)
    unequal = {"k": numbers(3, 4, 4)}
    with pytest.raises(CheckpointError, match="copies along copies differ"):
        moved(planned(replicated, "to_hf", unequal), unequal)


def test_a_padded_vocabulary_is_cut_and_padded_again():
    rule = ("embedding", "embed.weight", "vocab+pad embed -> vocab embed")
    padded = mapping(rule, fields={"vocab": "vocab_size"})
    x = np.concatenate([numbers(5, 3), np.zeros((3, 3), BF16)])
    assert np.array_equal(forth_and_back(padded, {"embedding": x}, vocab=5)["embed.weight"], x[:5])
    trained = {"embedding": numbers(8, 3)}
    _, written = moved(planned(padded, "to_hf", trained, vocab=5), trained)
    assert written[0].notes == ["embedding: 9 numbers in its padding were not zero and are gone"]
    assert not written[0].lossless


def test_an_error_of_equal_size_cannot_hide():
    rule = ("q", "q", "embed (heads head_dim) -> (heads head_dim) embed")
    square = mapping(rule, fields={"embed": "hidden_size", "heads": "n", "head_dim": "d"})
    plan = planned(square, "to_hf", {"q": numbers(8, 32)}, embed=32, heads=4, head_dim=2)
    assert len(plan.problems) == 1
    assert "q: shape (8, 32)" in plan.problems[0]


def test_every_problem_is_listed():
    rows = (
        ("l.{layers}.a", "l.{layers}.a", "x -> x"),
        ("l.{layers}.b", "l.{layers}.b", "x -> x"),
        ("c", "c", "y -> y"),
    )
    tree = {"l.0.a": numbers(2), "l.1.a": numbers(3), "l.0.b": numbers(2), "new": numbers(1)}
    plan = planned(mapping(*rows, fields={"x": "x"}), "to_hf", tree)
    problems = "\n".join([*plan.unmatched, *plan.problems])
    for told in ("new: no rule", "l.1.a: shape (3,)", "l.1.b: missing", "c: missing"):
        assert told in problems


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (("a", "a", "x y"), "->"),
        (("a", "a", "(x y -> x y"), "unmatched"),
        (("a", "a", "x x -> x"), "twice"),
        (("a", "a", "x -> x", "times 3"), "scale"),
    ],
)
def test_a_rule_that_cannot_be_read_says_why(rule, told):
    with pytest.raises(ValueError, match=told):
        Rule(*rule).sides({})
        Rule(*rule).factor({})


AXES = ("a", "b", "c", "d")


@st.composite
def trees(draw):
    """A tree of a few rules with random axis orders, groups, stackings and fusings, and its
    mapping.
    """
    sizes = {axis: draw(st.integers(1, 4)) for axis in (*AXES, "layers", "experts")}
    rows, arrays = [], {}
    parts = {"part": {"p": 1, "q": draw(st.integers(1, 3)), "r": "a"}}
    full = {**sizes, "part": 1 + parts["part"]["q"] + sizes["a"]}
    for i in range(draw(st.integers(1, 3))):
        axes = list(draw(st.permutations(AXES)))[: draw(st.integers(1, 4))]
        stacked = draw(st.sets(st.sampled_from(["layers", "experts"])))
        fused = draw(st.booleans())
        inner = [*axes, "part"] if fused else axes
        ours = draw(grouped(draw(st.permutations([*inner, *stacked])), alone={*stacked}))
        theirs = draw(grouped(draw(st.permutations(inner)), alone=set()))
        names = "".join(f".{{{axis}}}" for axis in (*sorted(stacked), *(["part"] if fused else [])))
        leading = " ".join(sorted(stacked))
        rows.append((f"t{i}", f"t{i}{names}", f"{flipped(draw, ours)} -> {leading} {theirs}"))
        shape = [
            int(np.prod([full[axis] for axis in group.strip("()").split()]))
            for group in groups_of(ours)
        ]
        arrays[f"t{i}"] = (
            np.random.default_rng(i).integers(0, 65536, shape).astype(np.uint16).view(BF16)
        )
    everything = mapping(*rows, parts=parts, sizes=sizes)
    return everything, arrays


@st.composite
def grouped(draw, order, alone):
    """Return the axes of ``order``, with random neighbours in parentheses."""
    groups: list[list[str]] = []
    for axis in order:
        if groups and axis not in alone and groups[-1][0] not in alone and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def groups_of(axes: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\w+", axes)


def flipped(draw, axes: str) -> str:
    """Reverse some axis that is in no stack."""
    axis = draw(st.sampled_from(AXES))
    return re.sub(rf"\b{axis}\b", f"-{axis}", axes)


@settings(max_examples=150, deadline=None)
@given(trees())
def test_back_of_forth_is_the_same_bit_for_bit(tree):
    everything, arrays = tree
    finite = {
        name: np.where(np.isfinite(x.astype(np.float32)), x, np.array(1, BF16))
        for name, x in arrays.items()
    }
    forth_and_back(everything, finite)
    forth_and_back(
        dataclasses.replace(everything, roots=("params.",)),
        {f"params.{n}": x for n, x in finite.items()},
    )

"""A tiny model that has every kind of tensor, and weights for it."""

import ml_dtypes
import numpy as np
import pytest

from slipway import tree
from slipway.tree import Chain, Param, module, stack

SIZES = {"embed": 8, "kv_heads": 2, "heads": 4, "head_dim": 4, "vocab": 10, "mlp": 8}


def param(axes: str, **kwargs) -> Param:
    names = axes.replace("(", "").replace(")", "").split()
    return Param(axes, {name: SIZES[name] for name in names}, **kwargs)


@module
class Attention:
    q_proj: Param
    k_proj: Param
    k_bias: Param


@module
class Layer:
    attn: Attention
    norm: Param


@module
class Model:
    embed_tokens: Param
    layers: object
    down: Param
    head: Param
    scale: Param


@pytest.fixture
def declaration() -> Model:
    """Declaration with every kind of tensor.

    It has identity and transposed layouts, merged axes, a repeated and a padded axis, two stacks,
    an alias and a scalar.
    """
    layer = Layer(
        Attention(
            param("(heads head_dim) embed"),
            param("(kv_heads head_dim) embed"),
            param("kv_heads head_dim", hf="(kv_heads head_dim)"),
        ),
        param("embed", init="ones"),
    )
    return Model(
        param("vocab embed", alias="lm_head.weight"),
        Chain([stack(layer, 2), stack(layer, 1, first=2)]),
        param("embed mlp"),
        param("embed vocab", hf="vocab embed"),
        Param("", {}, init="zeros"),
    )


@pytest.fixture
def tensors(declaration) -> dict[str, np.ndarray]:
    """Random bfloat16 weights for ``declaration``, by HF key."""
    rng = np.random.default_rng(0)
    return {
        key: rng.standard_normal(leaf.param.hf_shape, np.float32).astype(ml_dtypes.bfloat16)
        for leaf in tree.leaves(declaration)
        for key in leaf.keys.values()
    }

"""Rounding to 4 and 8 bits against plain NumPy, and the scheme in config.json."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from slipway import native
from slipway.checkpoint import quantize
from slipway.checkpoint.files import open_tensors
from slipway.checkpoint.quantize import BF16, Scheme
from slipway.checkpoint.shards import write_safetensors
from slipway.errors import UnsupportedModel

pytestmark = pytest.mark.host

SCHEMES = [Scheme(8, 0), Scheme(4, 32), Scheme(4, 128), Scheme(4, 0), Scheme(8, 64)]


def weights(dtype=np.float32):
    """Return unequal rows: one far larger, one of zeros, one with a single number."""
    w = np.random.default_rng(0).normal(size=(40, 256)) * 0.02
    w[3] *= 100
    w[5] = 0
    w[6], w[6, 77] = 0, -3.0
    return w.astype(dtype)


def numbers(words, scales, bits):
    """Return the numbers of packed words, by the format's description."""
    stored = [
        [(int(word) >> (bits * i)) % 2**bits for word in row for i in range(32 // bits)]
        for row in words
    ]
    whole = np.array(stored, np.float32) - 2.0 ** (bits - 1)
    return (whole.reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]).reshape(
        whole.shape
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_numbers_come_back_within_half_a_step(scheme, dtype):
    w = weights(dtype)
    words, scales = quantize.quantize(w, scheme, np.dtype(dtype))
    assert words.dtype == np.int32
    assert words.shape == (40, 256 * scheme.bits // 32)
    assert scales.dtype == dtype
    assert scales.shape == (
        40,
        256 // scheme.group if scheme.group else 1,
    )
    back = numbers(words.view(np.uint32), scales, scheme.bits)
    steps = np.abs(np.repeat(scales.astype(np.float32), 256 // scales.shape[1], axis=1))
    off = np.abs(back - w.astype(np.float32))
    # Clipped: the largest number may lie beyond.
    ends = np.abs(back) >= steps * (2 ** (scheme.bits - 1) - 1)
    assert (off <= 0.5001 * steps)[~ends].all()
    assert (off <= (0.51 if scheme.bits == 8 else 1.75) * steps).all()
    assert not back[5].any()


def test_four_bits_lose_less_than_the_plain_way():
    w = weights()
    back = numbers(
        *(
            x.view(np.uint32) if x.dtype == np.int32 else x
            for x in quantize.quantize(w, SCHEMES[1], BF16)
        ),
        4,
    )
    scale = np.abs(w.reshape(40, -1, 32)).max(-1, keepdims=True) / 7
    plain = (np.rint(w.reshape(40, -1, 32) / np.where(scale == 0, 1, scale)) * scale).reshape(
        w.shape
    )
    usual = [0, 1, 2, 4, *range(7, 40)]
    assert np.square(back - w)[usual].sum() < 0.9 * np.square(plain - w)[usual].sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_a_compiler_the_numbers_are_as_good(scheme, monkeypatch):
    if native.library() is None:
        pytest.skip("installed without a C++ compiler: there is one way only")
    compiled = quantize.quantize(weights(), scheme, BF16)
    monkeypatch.setattr(quantize, "library", lambda: None)
    portable = quantize.quantize(weights(), scheme, BF16)
    off = [
        np.square(numbers(words.view(np.uint32), scales, scheme.bits) - weights()).sum()
        for words, scales in (compiled, portable)
    ]
    # A different order of the sums may choose another of two equal scales.
    assert off[0] == pytest.approx(off[1], rel=1e-3)
    assert (compiled[0] == portable[0]).mean() > 0.98


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_a_number_that_is_not_finite_shows_in_its_scale(scheme, portable, bad, monkeypatch):
    if portable:
        monkeypatch.setattr(quantize, "library", lambda: None)
    w = weights()
    w[7, 40] = bad
    _, scales = quantize.quantize(w, scheme, BF16)
    assert np.argwhere(~np.isfinite(scales.astype(np.float32))).tolist() == [
        [7, 40 // scheme.group if scheme.group else 0]
    ]


@pytest.mark.parametrize(
    "array",
    [np.ones((4, 64), np.int64), np.ones((4, 64)), np.ones((4, 0), np.float32)],
    ids=["integers", "doubles", "no columns"],
)
def test_what_is_no_float_matrix_is_left_to_the_check_of_tensors(array, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": array})
    view = quantize.packed_view(
        open_tensors(tmp_path), {"a.weight_packed": (4, 16), "a.weight_scale": (4, 1)}
    )
    assert list(view.tensors) == ["a.weight"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_config_says_what_the_scheme_is(scheme):
    assert (
        quantize.read_scheme(json.loads(json.dumps({quantize.FIELD: quantize.config_of(scheme)})))
        == scheme
    )


def test_a_float_model_has_no_scheme():
    assert quantize.read_scheme({}) is None


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        (("quant_method",), "gptq", "quant_method"),
        (("format",), "int-quantized", "format"),
        (("config_groups", "group_0", "weights", "num_bits"), 3, "num_bits"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "symmetric"),
        (("config_groups", "group_0", "weights", "group_size"), 48, "group_size"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "actorder"),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}, "input_activations"),
        (("config_groups", "group_1"), {}, "config_groups"),
        (("ignore",), ["lm_head", "model.layers.0.mlp.gate_proj"], "ignore"),
    ],
)
def test_a_scheme_that_means_something_else_is_refused(field, value, named):
    config = quantize.config_of(dataclasses.replace(SCHEMES[1]))
    *path, last = field
    at = config
    for key in path:
        at = at[key]
    at[last] = value
    with pytest.raises(UnsupportedModel, match=named):
        quantize.read_scheme({quantize.FIELD: config})

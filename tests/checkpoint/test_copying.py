"""The compiled copy against NumPy's assignment, on random shapes, strides and item sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.checkpoint import copying

pytestmark = pytest.mark.host


def test_the_compiled_copy_is_in_use():
    assert copying.is_compiled(), "the test environment has a compiler"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_view_is_copied_as_numpy_copies_it(data):
    dtype = np.dtype(data.draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64])))
    shape = tuple(data.draw(st.lists(st.integers(0, 21), max_size=4)))
    source = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    view = source.transpose(data.draw(st.permutations(range(source.ndim))))
    for dim in range(view.ndim):
        kind = data.draw(st.sampled_from(["as it is", "backwards", "sparse", "repeated"]))
        at = (slice(None),) * dim
        if kind == "backwards":
            view = view[(*at, slice(None, None, -1))]
        elif kind == "sparse":
            view = view[(*at, slice(1, None, 2))]
        elif kind == "repeated":
            view = np.broadcast_to(
                view[(*at, slice(0, 1))],
                (*view.shape[:dim], min(1, view.shape[dim]) * 3, *view.shape[dim + 1 :]),
            )
    target = np.zeros([2 * n for n in view.shape], dtype)[(*(slice(0, n) for n in view.shape), ...)]
    if data.draw(st.booleans()):
        target = np.zeros(view.shape, dtype)
    copying.copy_bits(target, view)
    assert np.array_equal(target, view)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_infinities_and_nans_are_counted(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(copying, "load_library", lambda: None)
    values = np.random.default_rng(0).standard_normal(1001).astype(dtype)
    values[[3, 500, 1000]] = np.nan, np.inf, -np.inf
    values[7], values[8] = np.finfo(dtype).max, np.finfo(dtype).min
    limit = int(np.asarray(np.finfo(dtype).max).view(f"u{values.itemsize}"))
    assert copying.count_above(values, limit) == 3


@pytest.mark.parametrize("shape", [(1000, 700), (64, 64), (65, 127), (3, 513, 66)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_large_transposes(shape, dtype):
    source = np.random.default_rng(0).integers(0, 65535, shape).astype(dtype)
    target = np.empty((*shape[:-2], shape[-1], shape[-2]), dtype)
    copying.copy_bits(target, source.swapaxes(-1, -2))
    assert np.array_equal(target, source.swapaxes(-1, -2))


def test_without_a_compiler_numpy_does_it(monkeypatch):
    monkeypatch.setattr(copying, "load_library", lambda: None)
    source = np.arange(12, dtype=np.uint16).reshape(3, 4)
    target = np.empty((4, 3), np.uint16)
    copying.copy_bits(target, source.T)
    assert np.array_equal(target, source.T)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 100_003])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 3), (17, 40)])
def test_streamed_bytes_are_the_same(size, offsets, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(copying, "load_library", lambda: None)
    source = np.random.default_rng(0).integers(0, 255, size + 64).astype(np.uint8)
    target = np.zeros(size + 64, np.uint8)
    to, from_ = target[offsets[0] : offsets[0] + size], source[offsets[1] : offsets[1] + size]
    copying.stream(to, from_)
    assert np.array_equal(to, from_)
    assert not target[: offsets[0]].any()
    assert not target[offsets[0] + size :].any()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_streamed_is_counted_in_the_same_pass(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(copying, "load_library", lambda: None)
    source = np.random.default_rng(0).standard_normal(30_001).astype(dtype)
    source[[0, 8191, 8192, 30_000]] = np.nan, np.inf, -np.inf, np.nan
    limit = int(np.asarray(np.finfo(dtype).max).view(f"u{source.itemsize}"))
    target = np.zeros_like(source)
    assert copying.stream(target, source, limit) == 4
    np.testing.assert_array_equal(target, source)

"""The TPU bodies without a TPU: layout of the cache, arguments of the kernel, compilation.

The real step is compiled for a TPU. The kernel only runs on a TPU; a plain version from its package
takes its place here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernels

from benchmarks.compile import WITHOUT_DEVICE
from slipway import ops
from slipway.errors import UnsupportedModel
from slipway.ops import kv_cache, tpu

ROOT = Path(__file__).parents[2]
LAYERS, PAGES, PAGE, KV_HEADS, HEADS, HEAD_DIM, WIDTH = 3, 12, 4, 2, 6, 128, 5


def ragged(rng, counts, lengths):
    """Return a step with ``counts`` tokens a row, after which the sequences have ``lengths``.

    Pages are random; there is one row and one token of padding.
    """
    pages, rows, T = rng.permutation(PAGES).astype(np.int32), len(counts) + 1, sum(counts) + 1
    table = np.zeros((rows, WIDTH), np.int32)
    slots = np.full(T, PAGES * PAGE, np.int32)
    positions = np.zeros(T, np.int32)
    starts, taken, t = np.zeros(rows, np.int32), 0, 0
    for row, (count, length) in enumerate(zip(counts, lengths)):
        used = -(-length // PAGE)
        table[row, :used], starts[row] = pages[taken : taken + used], t
        taken += used
        for position in range(length - count, length):
            slots[t], positions[t] = table[row, position // PAGE] * PAGE + position % PAGE, position
            t += 1
    padded = [*counts, 0], [*lengths, 0]
    step = ops.StepInput(
        num_tokens_1=np.array([t], np.int32),
        ids_T=np.zeros(T, np.int32),
        positions_T=positions,
        prompt_lengths_T=positions + 1,
        row_T=np.append(np.repeat(np.arange(len(counts)), counts), 0).astype(np.int32),
        starts_B=starts,
        counts_B=np.array(padded[0], np.int32),
        lengths_B=np.array(padded[1], np.int32),
        pages=(ops.PageMap(slots, table),),
        num_samples_1=np.zeros(1, np.int32),
        sample_at_B=np.zeros(rows, np.int32),
    )
    return jax.tree.map(jnp.asarray, step)


def cache(platform, num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype):
    spec = ops.CacheSpec(num_layers, num_kv_heads, head_dim)
    return kv_cache.allocate(
        [spec], [num_pages], platform=platform, page_size=page_size, dtype=dtype
    )[0]


def plain(
    q,
    kv,
    lengths,
    table,
    ends,
    num_seqs,
    *,
    num_kv_pages_per_block,
    num_queries_per_block,
    **options,
):
    """Call the kernel's own reference, which takes no block sizes and returns live tokens only."""
    assert num_kv_pages_per_block >= 1
    assert num_queries_per_block >= 1
    out = kernels.kernel.ref_ragged_paged_attention(
        q, kv, lengths, table, ends, num_seqs, **options
    )
    return jnp.concatenate([out, jnp.zeros((len(q) - len(out), *out.shape[1:]), out.dtype)])


@pytest.mark.parametrize("static", [{}, {"window": 3}, {"soft_cap": 2.0}], ids=str)
@pytest.mark.parametrize(
    "counts, lengths", [((1, 1, 1), (9, 1, 14)), ((5, 1, 7), (5, 11, 16)), ((2,), (17,))]
)
def test_cache_and_arguments_mean_what_the_portable_bodies_do(counts, lengths, static, monkeypatch):
    monkeypatch.setattr(kernels, "ragged_paged_attention", plain)
    rng, sizes = np.random.default_rng(0), (PAGES, PAGE, KV_HEADS, HEAD_DIM, jnp.float32)
    # "gpu" has no bodies of its own: the portable cache, and on this CPU the C++ bodies or the
    # portable ones.
    caches = {platform: cache(platform, LAYERS, *sizes) for platform in ("gpu", "tpu")}
    assert isinstance(caches["tpu"], tpu.TpuCache)
    assert isinstance(caches["gpu"], kv_cache.PagedCache)
    whole = ragged(rng, lengths, lengths)  # everything, and then the step's own tokens once more
    step = ragged(np.random.default_rng(0), counts, lengths)
    options = kv_cache.AttentionOptions(**{"scale": HEAD_DIM**-0.5} | static)
    for layer in range(LAYERS):
        k, v = (
            jnp.asarray(rng.normal(size=(len(whole.ids_T), KV_HEADS, HEAD_DIM)), jnp.float32)
            for _ in range(2)
        )
        for platform in caches:
            caches[platform] = caches[platform].write(k, v, layer=jnp.int32(layer), step=whole)
    q = jnp.asarray(rng.normal(size=(sum(counts) + 1, HEADS, HEAD_DIM)), jnp.float32)
    for layer in range(LAYERS):
        expected = caches["gpu"].read(q, layer=layer, step=step, options=options)
        with jax.numpy_dtype_promotion("standard"):  # the reference mixes its dtypes
            got = caches["tpu"].read(q, layer=layer, step=step, options=options)
        np.testing.assert_allclose(
            got[: sum(counts)], expected[: sum(counts)], rtol=2e-5, atol=2e-5
        )


def test_padded_latents_mean_what_unpadded_ones_do():
    rng, heads, latent, rotated = np.random.default_rng(0), 3, 32, 8
    spec = ops.CacheSpec(2, 1, latent + rotated, latent_dim=latent)
    caches = {
        platform: kv_cache.allocate(
            [spec], [PAGES], platform=platform, page_size=PAGE, dtype=jnp.float32
        )[0]
        for platform in ("gpu", "tpu")
    }
    assert caches["tpu"].kv.shape[-1] == 128, "other widths are copied in every step"
    assert caches["gpu"].kv.shape[-1] == latent + rotated
    step = ragged(rng, (5, 1, 7), (5, 1, 7))
    q, k = (
        jnp.asarray(rng.normal(size=(len(step.ids_T), n, latent + rotated)), jnp.float32)
        for n in (heads, 1)
    )
    options = {"layer": jnp.int32(1), "step": step, "scale": 0.2, "window": None}
    found = {name: cache.attend(q, k, None, **options)[0] for name, cache in caches.items()}
    assert found["gpu"].shape[-1] == latent
    np.testing.assert_allclose(found["tpu"][:13], found["gpu"][:13], atol=1e-6, rtol=0)


def test_what_the_kernel_does_not_serve_is_portable_or_refused():
    sizes = 2, 4, 16, 2
    assert isinstance(cache("tpu", *sizes, 64, jnp.bfloat16), kv_cache.PagedCache), (
        "heads of 64 numbers"
    )
    kv = cache("tpu", *sizes, 128, jnp.bfloat16)
    options = kv_cache.AttentionOptions(scale=1.0, sinks_N=jnp.zeros(4))
    with pytest.raises(UnsupportedModel, match="sinks"):
        kv.read(jnp.zeros((2, 4, 128)), layer=0, step=None, options=options)


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux")
@pytest.mark.parametrize(
    "topology, memory", [("v6e:2x4", 31.25 * 2**30), ("tpu7x:2x2x1", 94.75 * 2**30)]
)
def test_the_step_of_a_32b_model_compiles_for_eight_devices_that_are_not_there(topology, memory):
    """The step fits, and neither the donated cache nor any weight is copied."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "benchmarks.compile", "--topology", topology]
    variables = os.environ | WITHOUT_DEVICE
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)  # compile times and collectives, shown by pytest -s
    report = json.loads(run.stdout)
    assert report["devices"] == 8
    assert report["bodies"]["paged_attention"].startswith("pallas")
    for program in report["programs"].values():
        assert program["aliased_bytes"] == report["kv_bytes_a_device"]
        assert program["temporaries_bytes"] < report["kv_bytes_a_device"] / 10, (
            "no copy of the cache, or of weights"
        )
        assert program["copies_of_the_cache"] == 0
        assert program["arguments_bytes"] + program["temporaries_bytes"] < memory
        # the embedding, then two in the body that stands for every layer
        assert program["collectives"]["all-reduce"] == 3
        assert program["collectives"]["all-gather"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_experts_compile_for_devices_that_are_not_there(topology):
    """Three grouped products and one exchange of rows; no copy of the experts of a layer."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "tests.ops.compile_experts", topology]
    variables = os.environ | WITHOUT_DEVICE
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["3", "1", "0"]

"""Backends: one module compares platforms, and a toy backend computes one op."""

import dataclasses
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import slipway
from slipway import LLM, SamplingParams, ops
from slipway.ops import backend, cpu, xla
from slipway.ops.backend import Backend, Body

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
COMPARED = re.compile(r"""platform\S*\s*(==|!=|in|not in)\s|(==|!=)\s*["'](cpu|tpu|gpu|cuda)["']""")


@pytest.fixture
def register():
    """Function that registers a backend for the test."""
    yield backend.register
    backend.register(cpu.BACKEND)


def test_the_platform_is_compared_in_one_module():
    package = Path(slipway.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if COMPARED.search(line) and "sys.platform" not in line
    }
    assert found == {"ops/backend.py"}


def norm(x_TD, weight, num_tokens, eps):
    """Compute an RMS norm with a trace that differs from that of all other bodies."""
    return -xla.rms_norm(-x_TD, weight, num_tokens, eps=eps)


def test_a_toy_backend_serves_one_op_and_is_printed_at_start(tiny, register, caplog):
    with LLM(tiny, skip_tokenizer_init=True) as llm:
        expected = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    calls = []

    def counted(*args, **static):
        calls.append(static)
        return norm(*args, **static)

    toy = {"rms_norm": Body(counted, lambda *_, eps: "" if eps else "no eps")}
    register(
        Backend(
            "cpu", ("cpu",), toy, label=lambda: "toy", memory_fraction=0.1, uses_host_memory=True
        )
    )
    with caplog.at_level(logging.INFO, "slipway"), LLM(tiny, skip_tokenizer_init=True) as llm:
        got = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        bodies = llm.engine.limits.bodies
    assert got == expected
    assert calls
    assert bodies.pop("rms_norm") == "toy"
    assert set(bodies.values()) == {"xla"}
    assert "'rms_norm': 'toy'" in caplog.text


def test_the_reason_against_a_platforms_own_body_is_recorded():
    x_TD = jax.ShapeDtypeStruct((2, 8), jnp.float16)
    weight = jax.ShapeDtypeStruct((8,), jnp.float16)
    for platform, expected in [
        ("cpu", r"xla \((float16|turned off.*|built without.*)\)"),
        ("tpu", "xla"),
        ("gpu", "xla"),
    ]:
        with backend.recording(platform) as bodies:
            jax.eval_shape(lambda x, w: ops.rms_norm(x, w, 2, 1e-6), x_TD, weight)
        assert re.fullmatch(expected, bodies["rms_norm"]), platform


def test_an_unknown_platform_has_the_portable_bodies():
    assert dataclasses.asdict(backend.of("gpu"))["bodies"] == {}
    assert not backend.of("gpu").uses_host_memory

"""Fixtures of all tests, which run on 8 virtual CPU devices with JAX's implicit promotions refused.

Compiling an engine takes seconds, so the tests share one over a tiny random model, and leave it
idle.
"""

import os

os.environ.setdefault("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import json
import shutil
from pathlib import Path

import jax  # the flag is read once, when the backend starts
import numpy as np
import pytest

from slipway import models, tree
from slipway.checkpoint.save import save
from slipway.codec.tokenizer import Tokenizer
from slipway.llm import LLM, NANO
from slipway.runtime.runner import Runner

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Random two-layer Qwen3 with varied greedy text, nano's tokenizer and an odd vocabulary."""
    directory = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(NANO) / name, directory)
    config = TINY | {"vocab_size": Tokenizer.load(directory).vocab_size // 2 * 2 + 3}
    declaration, rng = models.declare(config), np.random.default_rng(0)

    def draw(param: tree.Param) -> np.ndarray:
        scale = 1 if "vocab" in param.sizes else param.shape[-1] ** -0.5
        noise = rng.normal(size=param.shape) * scale
        values = np.ones(param.shape) if param.init == "ones" else noise
        return values.astype(np.float32)

    save(declaration, tree.map_params(draw, declaration), config, directory)
    return directory


@pytest.fixture(scope="session")
def _shared_llm(tiny) -> LLM:
    return LLM(tiny, max_num_seqs=4, max_num_batched_tokens=32, page_size=4)


@pytest.fixture
def llm(_shared_llm):
    """Shared engine: 4 rows, 32 tokens a step, a context of 64.

    Each test must leave it without work or pages.
    """
    yield _shared_llm
    assert not _shared_llm.engine.has_work()
    for scheduler in _shared_llm.engine.schedulers:
        assert scheduler.load == 0
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.pages.num_free + scheduler.tree.num_unlocked == scheduler.pages.num_pages


@pytest.fixture
def uncompiled(monkeypatch):
    """Bytes that a step claims to need, for engines that start without compiling and cannot run."""
    temp_bytes = 50_000
    monkeypatch.setattr(Runner, "compile", lambda self, wanted: None)
    monkeypatch.setattr(Runner, "temp_bytes", lambda self: temp_bytes)
    return temp_bytes


@pytest.fixture
def config_only(tmp_path):
    """Function that makes a directory with only TINY's config.json.

    Fields are replaced; a field of None is removed.
    """

    def make(**fields) -> Path:
        config = TINY | {"vocab_size": 97} | fields
        kept = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return tmp_path

    return make

"""Model directories of published shapes with random weights, for benchmarks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The published config.json of Qwen3-0.6B.
QWEN3_SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


# The published config.json of Qwen3-30B-A3B.
QWEN3_MOE_SHAPE: dict[str, Any] = QWEN3_SHAPE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def write_random_model(config: Mapping[str, Any], directory: Path) -> None:
    """Write an HF directory with random weights for a config.json."""
    # brings JAX, which a benchmark of another server does not need
    import jax.numpy as jnp

    from slipway import mesh, models
    from slipway.checkpoint import tensor_reader
    from slipway.checkpoint.save import save

    declaration = models.declare(config)
    arrays = tensor_reader.dummy(declaration, mesh.make_mesh(), jnp.dtype(config["torch_dtype"]))
    save(declaration, arrays, config, directory=directory)

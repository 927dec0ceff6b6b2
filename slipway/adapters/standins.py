"""What the adapters read of vLLM's and tpu-inference's objects, as small classes: for tests that have neither.

`python -m benchmarks.adapters` checks that the real ones have these fields. Knows no model.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class ModelConfig:
    """Of vllm.config.ModelConfig."""

    model: str
    hf_config: Any
    dtype: Any = np.float32
    hf_config_path: str | None = None


@dataclasses.dataclass
class LoadConfig:
    """Of vllm.config.LoadConfig."""

    load_format: str = "auto"


@dataclasses.dataclass
class ShardingConfig:
    """Of tpu_inference's ShardingConfigManager, whose fields are properties."""

    tp_size: int = 1
    expert_size: int = 1
    attn_dp_size: int = 1


@dataclasses.dataclass
class VllmConfig:
    """Of vllm.config.VllmConfig."""

    model_config: ModelConfig
    load_config: LoadConfig = dataclasses.field(default_factory=LoadConfig)
    sharding_config: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    additional_config: dict[str, Any] | None = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AttentionMetadata:
    """Of tpu_inference.layers.common.attention_metadata.AttentionMetadata."""

    input_positions: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    request_distribution: jax.Array

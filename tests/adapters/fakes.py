"""Fakes of the objects of vLLM and tpu-inference that the adapters read, for tests without either
package.

Not here: the list of fields that the adapters read (slipway/adapters/engine_fields.py), which the
adapters benchmark checks against the real objects.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class ModelConfig:
    """Fake of vllm.config.ModelConfig."""

    model: str
    hf_config: Any
    dtype: Any = np.float32
    hf_config_path: str | None = None


@dataclasses.dataclass
class LoadConfig:
    """Fake of vllm.config.LoadConfig."""

    load_format: str = "auto"


@dataclasses.dataclass
class ShardingConfig:
    """Fake of tpu_inference's ShardingConfigManager; there the fields are properties."""

    tp_size: int = 1
    expert_size: int = 1
    attn_dp_size: int = 1


@dataclasses.dataclass
class VllmConfig:
    """Fake of vllm.config.VllmConfig."""

    model_config: ModelConfig
    load_config: LoadConfig = dataclasses.field(default_factory=LoadConfig)
    sharding_config: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    additional_config: dict[str, Any] | None = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AttentionMetadata:
    """Fake of tpu_inference.layers.common.attention_metadata.AttentionMetadata."""

    input_positions: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    request_distribution: jax.Array

"""Names of the fields that the adapters read from objects of vLLM and tpu-inference.

Not here: the adapters that read them (vllm.py, maxtext.py), fakes with these fields
(tests/adapters/fakes.py).
"""

# vllm.config has the first three classes. ShardingConfig is tpu_inference's ShardingConfigManager:
# its fields are properties. AttentionMetadata is in tpu_inference.layers.common.attention_metadata.
FIELDS = {
    "VllmConfig": ("model_config", "load_config", "sharding_config", "additional_config"),
    "ModelConfig": ("model", "hf_config", "dtype", "hf_config_path"),
    "LoadConfig": ("load_format",),
    "ShardingConfig": ("tp_size", "expert_size", "attn_dp_size"),
    "AttentionMetadata": (
        "input_positions",
        "block_tables",
        "seq_lens",
        "query_start_loc",
        "request_distribution",
    ),
}

"""Run by an environment that has vLLM for TPUs and MaxText: a MaxText model behind our class, beside transformers.

Arguments: devices that share each layer, and what to run. Prints one JSON object. A random model is saved as Hugging
Face has it, made a checkpoint by MaxText's own converter, and loaded from that; the steps are worker_tpu_inference's.
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh

from slipway.adapters import vllm as adapter
from slipway.bench import worker_tpu_inference as host

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=256,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """An HF config, MaxText's name for its family, and MaxText's options beside the sizes."""

    model_name: str
    config: transformers.PretrainedConfig
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "qwen3": Case("qwen3-0.6b", transformers.Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": Case("llama3.1-8b", transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen3_moe": Case(
        "qwen3-30b-a3b",
        transformers.Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
        {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 96},
    ),
}  # fmt: skip


def main(devices: int, name: str) -> None:
    """Compare and print."""
    case = CASES[name]
    loader = importlib.import_module("tpu_inference.models.common.model_loader")
    with tempfile.TemporaryDirectory() as folder:
        model = host.random_model(case.config, folder)
        options = {"model_name": case.model_name, "dtype": "float32", "weight_dtype": "float32"}
        options |= sizes(case.config) | case.options
        convert(case, folder, options)
        adapter.register()
        config = host.vllm_config(
            folder, "MaxTextForCausalLM", hf_config_path=folder, tensor_parallel_size=devices,
            additional_config={"maxtext_config": options | {"load_parameters_path": f"{folder}/maxtext/0/items"}},
        )  # fmt: skip
        host.on_a_host_without_a_tpu(loader)
        experts_on_a_host_without_a_tpu()
        axes = importlib.import_module("tpu_inference.layers.common.sharding").MESH_AXIS_NAMES
        shape = [devices if axis == "model" else 1 for axis in axes]
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(shape), axes)
        with importlib.import_module("vllm.config").set_current_vllm_config(config):
            interface = loader.get_flax_model(config, jax.random.PRNGKey(0), mesh)
    made = interface.model.maxtext_config
    found = host.compare(model, host.Runner(interface, mesh, case.config))
    print(json.dumps({
        "maxtext": importlib.import_module("importlib.metadata").version("maxtext"), "model": name,
        "tensor_parallel_size": devices, "kv_heads": made.num_kv_heads,
        "expert_rows": made.padded_base_moe_mlp_dim or made.base_moe_mlp_dim, **found,
    }))  # fmt: skip


def sizes(config: Any) -> dict[str, Any]:
    """MaxText's names for them."""
    return {
        "base_emb_dim": config.hidden_size, "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads, "base_mlp_dim": config.intermediate_size,
        "base_num_decoder_layers": config.num_hidden_layers, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "rope_max_timescale": int(config.rope_parameters["rope_theta"]),
        "normalization_layer_epsilon": config.rms_norm_eps, "logits_via_embedding": config.tie_word_embeddings,
    }  # fmt: skip


def convert(case: Case, folder: str, options: dict[str, Any]) -> None:
    """By MaxText, whose table of configs has only published sizes: ours takes a place there."""
    configs = importlib.import_module("maxtext.checkpoint_conversion.utils.hf_model_configs")
    configs.HF_MODEL_CONFIGS[case.model_name] = case.config
    base = importlib.import_module("maxtext.utils.globals").MAXTEXT_CONFIGS_DIR
    given = options | {
        "base_output_directory": f"{folder}/maxtext", "scan_layers": False, "override_model_config": True,
        "skip_jax_distributed_system": True, "hardware": "cpu",
    }  # fmt: skip
    importlib.import_module("maxtext.checkpoint_conversion.to_maxtext").main(
        ["", str(Path(base) / "base.yml"), *(f"{key}={value}" for key, value in given.items())],
        hf_model_path=folder, save_dtype="float32", simulated_cpu_devices_count=1, lazy_load_tensors=False,
    )  # fmt: skip


def experts_on_a_host_without_a_tpu() -> None:
    """In place of the fused experts their own reference."""
    kernels = importlib.import_module("tpu_inference.kernels.fused_moe.v1.kernel")

    def experts(hidden_states, w1, w2, gating_output, topk, renormalize, activation, scoring_fn, **_):
        rows_E2DF = jnp.stack(jnp.split(w1, 2, axis=-1), axis=1)
        return kernels.ref_moe(
            hidden_states, rows_E2DF, w2, gating_output, topk, renormalize_topk_logits=renormalize,
            act_fn=activation, scoring_fn=scoring_fn,
        )  # fmt: skip

    fused: Any = importlib.import_module("tpu_inference.layers.common.fused_moe_gmm")
    fused.fused_moe_func = experts


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
